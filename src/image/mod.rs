// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the bytes live: opens and checks an image, finds out whether it may be served raw, and
//! carries out what the [`Keeper`](crate::engine::Keeper) decides. The process has exactly one
//! open file description of the image, this one (R1): it carries the lease and the byte locks.

mod acquire;
mod aligned;
mod device;
mod eligible;
mod error;
pub mod extents;
mod format;
mod holders;
mod jobs;
mod locks;
mod mounts;
mod open;
mod openers;
mod proof;
mod watch;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod frozen_tests;
#[cfg(test)]
mod jobs_tests;
#[cfg(test)]
mod layout_tests;
#[cfg(test)]
mod lease_tests;
#[cfg(test)]
mod open_tests;
#[cfg(test)]
mod refused_tests;
#[cfg(test)]
mod residue_tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{
    AtFlags, FileType, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fstat, futimens,
    major, minor, stat, statx,
};

pub use self::eligible::NotEligible;
pub use self::error::OpenError;
pub use self::format::Format;
pub use self::holders::Holder;
pub use self::watch::{Change, Watch, WatchId, Watches};
pub use crate::sys::signals::{LeaseSignal, LeaseSignals, block_lease_signals};

use self::device::Device;
use self::locks::Claim;
use crate::engine::Geometry;
use crate::engine::keeper::Start;
use crate::engine::request::Limits;
use crate::engine::units::FileRange;
use crate::sys::fiemap::Fiemap;
use crate::sys::lease;
use crate::sys::signals::lease_signal;

/// How long [`Image::open`] waits for somebody else's locks (R1a): the last I/O of a killed
/// predecessor may take that long.
pub const LOCK_WAIT: Duration = Duration::from_secs(60);

/// `--mode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ModeChoice {
    /// Direct when it can be had.
    #[default]
    Auto,
    /// Direct, or not at all.
    Direct,
    /// Never direct.
    Filesystem,
}

/// What to open, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// `--blk-file`.
    pub path: PathBuf,
    /// `--read-only`.
    pub read_only: bool,
    /// `--mode`.
    pub mode: ModeChoice,
    /// `--offset`, in bytes.
    pub offset: u64,
    /// `--size-limit`, in bytes.
    pub size_limit: Option<u64>,
    /// `--format raw`: no look for other formats.
    pub format_raw: bool,
    /// `--block-size`, in bytes: 512 or 4096.
    pub block_size: u32,
    /// `--discard unmap`.
    pub unmap: bool,
}

/// For VIRTIO_BLK_F_TOPOLOGY; bytes, as the guest sees the device from its first byte on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Topology {
    /// What is written without a read-modify-write below; a power of two.
    pub physical_block: u32,
    /// The smallest transfer to prefer.
    pub min_io: u32,
    /// The best transfer; 0: unknown.
    pub opt_io: u32,
    /// Where the first whole physical block begins.
    pub alignment_offset: u32,
}

/// What a file is known by, besides its path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Identity {
    dev: u64,
    ino: u64,
}

/// By which two paths are seen to lead to the same image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum FileKey {
    /// A regular file, by its filesystem and its inode.
    File(u64, u64),
    /// A block device, by its number: several nodes may name it.
    Device(u64),
}

impl FileKey {
    /// What is at a path now; seen without opening it, which would break the lease of whoever serves it.
    #[must_use]
    pub fn at(path: &Path) -> Option<Self> {
        let stat = stat(path).ok()?;
        Some(match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => Self::Device(stat.st_rdev),
            _ => Self::File(stat.st_dev, stat.st_ino),
        })
    }
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: OwnedFd,
    /// As the user wrote it, for messages.
    path: PathBuf,
    /// Absolute, without symbolic links.
    canonical: PathBuf,
    identity: Identity,
    direct_io: bool,
    /// For a regular file that may be served raw: what it lies on.
    device: Option<Device>,
    /// For a block device: its number.
    block_device: Option<u64>,
    geometry: Geometry,
    /// The filesystem's own block size, or the device's for a block device.
    fs_block: u32,
    limits: Limits,
    topology: Topology,
    start: Start,
    /// The lease that direct mode takes.
    lease: lease::Kind,
    /// Files can share blocks here.
    shares_blocks: bool,
    /// The last process that was seen to have it open in a way that leases do not count; 0: none;
    /// `u32::MAX`: it could not be told.
    uncounted: AtomicU32,
    not_eligible: Option<NotEligible>,
    lease_break_time: Duration,
    proven: AtomicBool,
    /// Grows by one when a punch begins and when it ends.
    punches: AtomicU64,
    fiemap: Mutex<Fiemap>,
}

impl Image {
    /// Opens an image: checks it, takes the byte locks and finds out whether it may be served raw.
    /// Waits up to [`LOCK_WAIT`] for somebody else's locks. The lease's signal must be
    /// blocked already ([`block_lease_signals`]), for a lease is tried.
    ///
    /// # Errors
    /// One line that names the fix.
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        Self::open_within(options, LOCK_WAIT)
    }

    /// [`open`](Self::open) with another wait for locks.
    ///
    /// # Errors
    /// One line that names the fix.
    pub fn open_within(options: &Options, wait: Duration) -> Result<Self, OpenError> {
        open::open(options, wait)
    }

    /// Whether locks keep [`open`](Self::open) from this file; seen without opening it, which
    /// would break the lease of whoever serves it.
    #[must_use]
    pub fn is_locked(path: &Path, read_only: bool) -> bool {
        stat(path).is_ok_and(|stat| {
            locks::seen_locked(stat.st_dev, stat.st_ino, Claim::on(&stat, read_only))
        })
    }

    /// The one description of the image: carries lease and locks (R1, R1a).
    #[must_use]
    pub fn image_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What raw I/O and device flushes go to, if there can be any; for a block device the image itself.
    #[must_use]
    pub fn device_fd(&self) -> Option<BorrowedFd<'_>> {
        match (&self.device, self.block_device) {
            (Some(device), _) => Some(device.fd.as_fd()),
            (None, Some(_)) => Some(self.file.as_fd()),
            (None, None) => None,
        }
    }

    /// Sizes and alignments.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The filesystem's own block size in bytes, where `geometry().fs_block` may be a page of
    /// several (ADR 0010).
    #[must_use]
    pub const fn fs_block(&self) -> u32 {
        self.fs_block
    }

    /// What the guest may ask for.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How the keeper begins.
    #[must_use]
    pub const fn start(&self) -> Start {
        self.start
    }

    /// Why it is never served raw; `None` also when it was not asked (`--mode filesystem`).
    #[must_use]
    pub const fn not_eligible(&self) -> Option<&NotEligible> {
        self.not_eligible.as_ref()
    }

    /// The part of the file the guest sees.
    #[must_use]
    pub const fn window(&self) -> FileRange {
        FileRange::new(self.limits.base, self.limits.base.saturating_add(self.limits.capacity))
    }

    /// `/proc/sys/fs/lease-break-time` when it was opened; a year if breaks are never forced.
    #[must_use]
    pub const fn lease_break_time(&self) -> Duration {
        self.lease_break_time
    }

    /// Whether raw and file reads were seen to agree (R6).
    #[must_use]
    pub fn proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }

    /// Whether a sync of the file flushes the device's cache too (R14): not under `barrier=0`. Where
    /// no device is open there is nothing to be done about it.
    #[must_use]
    pub fn barriers(&self) -> bool {
        self.device.is_none() || eligible::barriers(self.identity.dev)
    }

    /// For the guest's config space.
    #[must_use]
    pub const fn topology(&self) -> Topology {
        self.topology
    }

    /// A serial that stays the same as long as the file does, wherever its disk turns up after a
    /// reboot: at most 20 bytes of ASCII.
    #[must_use]
    pub fn default_serial(&self) -> String {
        if let Some(number) = self.block_device {
            return format!("blk-{}-{}", major(number), minor(number));
        }
        let born = statx(&self.file, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME);
        let born = born.map_or(0, |statx| statx.stx_btime.tv_sec);
        let mut serial = format!("{:x}-{born:x}", self.identity.ino);
        serial.truncate(20);
        serial
    }

    /// What it is, whatever its path.
    #[must_use]
    pub fn key(&self) -> FileKey {
        let Identity { dev, ino } = self.identity;
        self.block_device.map_or(FileKey::File(dev, ino), FileKey::Device)
    }

    /// As given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The node of the block device that raw I/O goes to.
    #[must_use]
    pub fn device_path(&self) -> Option<&Path> {
        match self.block_device {
            Some(_) => Some(&self.path),
            None => self.device.as_ref().map(|device| device.path.as_path()),
        }
    }

    /// Whether the image is a block device (R6a).
    #[must_use]
    pub const fn is_block_device(&self) -> bool {
        self.block_device.is_some()
    }

    /// The file's size now, in bytes.
    ///
    /// # Errors
    /// fstat's.
    pub fn file_size_now(&self) -> io::Result<u64> {
        if self.block_device.is_some() {
            return Ok(crate::sys::blockdev::facts(self.file.as_fd())?.size);
        }
        u64::try_from(fstat(&self.file)?.st_size).map_err(io::Error::other)
    }

    /// What the filesystem has allocated to the file, in units of 512 bytes.
    fn blocks_now(&self) -> io::Result<u64> {
        u64::try_from(fstat(&self.file)?.st_blocks).map_err(io::Error::other)
    }

    /// Odd while a punch is under way.
    fn punches(&self) -> u64 {
        self.punches.load(Ordering::SeqCst)
    }

    /// Whether the file has no name any more (R24).
    ///
    /// # Errors
    /// fstat's.
    pub fn is_unlinked(&self) -> io::Result<bool> {
        Ok(fstat(&self.file)?.st_nlink == 0)
    }

    /// Sets the mtime to now, for raw writes do not (R4). May block in the filesystem.
    ///
    /// # Errors
    /// futimens's.
    pub fn touch(&self) -> io::Result<()> {
        let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
        let times =
            Timestamps { last_access: time(UTIME_OMIT), last_modification: time(UTIME_NOW) };
        Ok(futimens(&self.file, &times)?)
    }

    /// Watches for changes of the file that break no lease (R5a, R24).
    ///
    /// # Errors
    /// inotify's.
    pub fn watch(self: &Arc<Self>, watches: &Arc<Watches>) -> io::Result<Watch> {
        Watch::new(Arc::clone(self), Arc::clone(watches))
    }

    /// Whether a writable image would get its lease (R1): for one opened read-only, whose own lease
    /// lets other readers be.
    ///
    /// # Errors
    /// As [`lease::take`]: EAGAIN if somebody else has the file open.
    pub fn try_write_lease(&self) -> io::Result<()> {
        lease::take(self.file.as_fd(), lease::Kind::Write, lease_signal())?;
        lease::release(self.file.as_fd())
    }

    /// Whether the lease is held and nobody waits for it: one that is being broken is called what it is to become.
    #[must_use]
    pub fn has_lease(&self) -> bool {
        lease::is_held(self.file.as_fd(), self.lease)
    }

    /// The lease that direct mode takes (R1).
    #[must_use]
    pub const fn lease_kind(&self) -> lease::Kind {
        self.lease
    }

    /// Whether it is read-only and yet wants nobody else to have it open, as other instances that are read-only too.
    #[must_use]
    pub fn is_alone_read_only(&self) -> bool {
        self.limits.read_only && self.lease == lease::Kind::Write
    }

    fn take_lease(&self) -> io::Result<()> {
        lease::take(self.file.as_fd(), self.lease, lease_signal())
    }
}
