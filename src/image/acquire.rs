// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening the one description of the image and locking it, with patience for a killed
//! predecessor whose last I/O still holds lease, locks or device (R1a).

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, major, minor, open, stat};
use rustix::io::Errno;

use crate::sys::fd::set_io_flags;

use super::error::{OpenError, name};
use super::holders::{self, Class, Holder};
use super::locks::{self, Claim};
use super::mounts::parse_mountinfo;

/// How often a lock is tried.
const PAUSE: Duration = Duration::from_millis(50);

/// An image, open and locked.
#[derive(Debug)]
pub(super) struct Acquired {
    pub(super) fd: OwnedFd,
    pub(super) stat: Stat,
    /// Whether O_DIRECT was accepted.
    pub(super) direct_io: bool,
    pub(super) is_block_device: bool,
}

/// A lease is given up as soon as its holder has heard of us: only one that stays is worth a line.
const POLITE: Duration = Duration::from_secs(1);

/// What keeps us waiting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Obstacle {
    /// A lock, or the device being in use.
    Lock,
    /// A lease that is being broken.
    Lease,
}

/// Waits for somebody else, up to a limit, and says for whom, once.
struct Patience<'a> {
    path: &'a Path,
    file: (u64, u64),
    claim: Claim,
    wait: Duration,
    since: Instant,
    said: bool,
}

impl<'a> Patience<'a> {
    fn new(path: &'a Path, found: &Stat, claim: Claim, wait: Duration) -> Self {
        let file = (found.st_dev, found.st_ino);
        Self { path, file, claim, wait, since: Instant::now(), said: false }
    }

    /// A pause; `false` when the time is up.
    fn pause(&mut self, obstacle: Obstacle) -> bool {
        let waited = self.since.elapsed();
        let left = self.wait.saturating_sub(waited);
        if left.is_zero() {
            return false;
        }
        if !self.said && (obstacle == Obstacle::Lock || waited >= POLITE) {
            self.said = true;
            let (path, seconds) = (self.path.display(), left.as_secs_f32().ceil());
            // One that has ended while its last I/O goes on, one of another namespace or host, or
            // one that we may not look into.
            let holder = self
                .holder()
                .map_or_else(|| " that cannot be seen".to_owned(), |holder| name(Some(&holder)));
            tracing::warn!("{path}: locked by another process{holder}; waiting up to {seconds} s");
        }
        thread::sleep(PAUSE.min(left));
        true
    }

    /// Whose lock or lease it is.
    fn holder(&self) -> Option<Holder> {
        let (dev, ino) = self.file;
        let lock = holders::find(dev, ino, |lock| locks::forbids(lock, self.claim));
        lock.or_else(|| holders::find(dev, ino, |lock| lock.class == Class::Lease))
    }

    fn locked(&self) -> OpenError {
        OpenError::Locked { path: self.path.to_owned(), holder: self.holder(), waited: self.wait }
    }
}

/// Opens and locks the image.
pub(super) fn acquire(path: &Path, read_only: bool, wait: Duration) -> Result<Acquired, OpenError> {
    let found = stat(path).map_err(|errno| match errno {
        Errno::NOENT => OpenError::Missing { path: path.to_owned() },
        _ => io_error(path, "stat")(errno),
    })?;
    let is_block_device = check_type(path, found.st_mode)?;
    let mut patience = Patience::new(path, &found, Claim::on(&found, read_only), wait);
    let (fd, direct_io) = open_patiently(path, &found, read_only, &mut patience)?;
    // What is open is looked at again: the path may have changed hands in between.
    let stat = fstat(&fd).map_err(io_error(path, "fstat"))?;
    if check_type(path, stat.st_mode)? != is_block_device {
        let swapped = io::Error::other("something else took its place");
        return Err(io_error(path, "open")(swapped));
    }
    let access = if direct_io { OFlags::DIRECT } else { OFlags::empty() };
    // O_NONBLOCK was for opening only: io_uring would return EAGAIN for it.
    set_io_flags(&fd, access).map_err(io_error(path, "F_SETFL"))?;
    patience.file = (stat.st_dev, stat.st_ino);
    lock_patiently(path, &fd, &mut patience)?;
    Ok(Acquired { fd, stat, direct_io, is_block_device })
}

/// Whether it is a block device; an error if it is neither that nor a regular file. Nothing else
/// is ever opened: a FIFO would wait, a tape would move.
fn check_type(path: &Path, mode: u32) -> Result<bool, OpenError> {
    let kind = match FileType::from_raw_mode(mode) {
        FileType::RegularFile => return Ok(false),
        FileType::BlockDevice => return Ok(true),
        FileType::Directory => return Err(OpenError::Directory { path: path.to_owned() }),
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        _ => "special file",
    };
    Err(OpenError::NotAFile { path: path.to_owned(), kind })
}

fn open_patiently(
    path: &Path,
    found: &Stat,
    read_only: bool,
    patience: &mut Patience<'_>,
) -> Result<(OwnedFd, bool), OpenError> {
    let is_block_device = FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice;
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    // O_NONBLOCK: a leased file says EWOULDBLOCK at once. O_EXCL: a mounted device says EBUSY.
    let exclusive = if is_block_device { OFlags::EXCL } else { OFlags::empty() };
    let flags = access | exclusive | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    loop {
        let locked = locks::seen_locked(found.st_dev, found.st_ino, patience.claim);
        let opened = if locked {
            Err(Errno::WOULDBLOCK)
        } else {
            match open(path, flags | OFlags::DIRECT, Mode::empty()) {
                Err(Errno::INVAL) => open(path, flags, Mode::empty()).map(|fd| (fd, false)),
                other => other.map(|fd| (fd, true)),
            }
        };
        match opened {
            Ok(opened) => return Ok(opened),
            Err(Errno::BUSY) if is_block_device => {
                if is_mounted(found.st_rdev) || !patience.pause(Obstacle::Lock) {
                    return Err(OpenError::DeviceBusy { path: path.to_owned() });
                }
            }
            Err(Errno::WOULDBLOCK) => {
                let obstacle = if locked { Obstacle::Lock } else { Obstacle::Lease };
                if !patience.pause(obstacle) {
                    return Err(patience.locked());
                }
            }
            Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY))
                if !read_only =>
            {
                return Err(OpenError::NotWritable { path: path.to_owned(), source: errno.into() });
            }
            Err(errno) => return Err(io_error(path, "open")(errno)),
        }
    }
}

fn is_mounted(number: u64) -> bool {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let device = (major(number), minor(number));
    parse_mountinfo(&text).iter().any(|mount| mount.device == device)
}

/// Keeps the description between tries: each open would break the other's lease anew.
fn lock_patiently(path: &Path, fd: &OwnedFd, patience: &mut Patience<'_>) -> Result<(), OpenError> {
    loop {
        match locks::try_take(fd.as_fd(), patience.claim) {
            Ok(true) => return Ok(()),
            Ok(false) => {
                if !patience.pause(Obstacle::Lock) {
                    return Err(patience.locked());
                }
            }
            Err(error) if locks::unsupported(&error) => {
                let path = path.display();
                tracing::warn!(
                    "{path}: its filesystem has no locks ({error}): nothing keeps another \
                     process from serving it too"
                );
                return Ok(());
            }
            Err(error) => return Err(io_error(path, "F_OFD_SETLK or flock")(error)),
        }
    }
}

/// Wraps what the kernel said of an operation on the image.
pub(super) fn io_error<E: Into<io::Error>>(
    path: &Path,
    operation: &'static str,
) -> impl FnOnce(E) -> OpenError {
    move |error| OpenError::Io { path: path.to_owned(), operation, source: error.into() }
}
