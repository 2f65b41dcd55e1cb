// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a descriptor is that a frontend sends, found out without asking what it leads to (R18a).
//!
//! A descriptor may lead to a FUSE file, whose server is the frontend itself: `fstat`, `fstatfs`, a page fault and even
//! `close` (FUSE_FLUSH) then wait for it, the last one without heeding SIGKILL. So a message that carries descriptors is
//! received only when they are known to be harmless. Until then they stay in the socket's queue, where they are looked at with
//! `MSG_PEEK`; a message that is refused is never received, and when the socket is closed the kernel drops what is queued
//! without a flush.
//!
//! Looking makes duplicates, which have to be closed as well. That happens on a thread with a descriptor table of its
//! own, in which there is nothing else and never was (`inspector`): if it never gets rid of them, it holds nothing of
//! this process's, the image with its lease and lock least of all.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use rustix::fs::{FileType, fcntl_get_seals, fstat};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use rustix::process::Pid;

use super::inspector;
use super::process::peer_pid;

/// Descriptors of one device's frontends that may be waiting to be closed.
const MOST: usize = 8;
/// Descriptors that one message can carry.
const MOST_WITH_A_MESSAGE: usize = 32;
/// How often a caller looks whether it still makes sense to wait.
const STEP: Duration = Duration::from_millis(100);

/// Filesystems whose files no other process can hold up.
const LOCAL: [&str; 8] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "ramfs"];

/// What a descriptor is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A memfd, or a regular file on tmpfs, hugetlbfs or a local filesystem: it can be mapped.
    Memory,
    /// An eventfd.
    Event,
    /// Anything else, in words.
    Other(String),
}

/// Why nothing is known.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Too many earlier ones have not been closed yet.
    #[error(
        "{MOST} descriptors of this device's frontends are still being closed: end the FUSE filesystem that they belong to"
    )]
    Busy,
    /// More than any message has.
    #[error("too many file descriptors with a message")]
    TooMany,
    /// The caller has stopped waiting.
    #[error("the session ended meanwhile")]
    Ended,
    /// Nothing tells an eventfd from a FUSE file then.
    #[error(
        "cannot tell what its file descriptors are, because /proc is not mounted: mount it where this process runs"
    )]
    NoProc,
    /// Ours.
    #[error("cannot look at a message's file descriptors: {0}")]
    Io(#[from] io::Error),
}

/// The threads that look at descriptors of one device's frontends, or wait until those are closed.
#[derive(Debug, Default)]
pub struct Inspections(AtomicUsize);

/// One of them, until it ends.
struct Running(Arc<Inspections>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Inspections {
    /// Says what the descriptors are that come with the next `bytes` bytes of `socket`, and leaves them there. Gives up
    /// when `alive` says so.
    ///
    /// # Errors
    /// [`InspectError`].
    pub fn inspect(
        self: &Arc<Self>,
        socket: BorrowedFd<'_>,
        bytes: usize,
        alive: &dyn Fn() -> bool,
    ) -> Result<Vec<Kind>, InspectError> {
        let before = self.0.fetch_add(1, Ordering::AcqRel);
        let running = Running(Arc::clone(self));
        if before >= MOST {
            return Err(InspectError::Busy);
        }
        let (reply, answer) = mpsc::channel();
        let work = move |socket: io::Result<OwnedFd>| {
            // Ended last: by then the descriptors are closed.
            let _running = running;
            look(socket, bytes, &reply);
        };
        inspector::spawn(socket, Box::new(work))?;
        loop {
            match answer.recv_timeout(STEP) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) if alive() => {}
                Err(RecvTimeoutError::Timeout) => return Err(InspectError::Ended),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("no thread can be made for it").into());
                }
            }
        }
    }
}

/// What a thread does that looks at descriptors. It must not log: what is open here is not what it seems.
fn look(
    socket: io::Result<OwnedFd>,
    bytes: usize,
    reply: &Sender<Result<Vec<Kind>, InspectError>>,
) {
    let peeked = socket.and_then(|socket| Ok((peer_pid(socket.as_fd()), peek(&socket, bytes)?)));
    // The caller may have stopped waiting.
    let (answer, fds) = match peeked {
        Ok((peer, (fds, true))) => (fds.iter().map(|fd| kind(fd, peer)).collect(), fds),
        Ok((_, (fds, false))) => (Err(InspectError::TooMany), fds),
        Err(error) => (Err(error.into()), Vec::new()),
    };
    let _ = reply.send(answer);
    // Here it may hang.
    drop(fds);
}

/// Duplicates of the descriptors in the next `bytes` bytes of `socket`, and whether these are all.
fn peek(socket: &OwnedFd, bytes: usize) -> io::Result<(Vec<OwnedFd>, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_WITH_A_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = vec![0; bytes];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT | RecvFlags::PEEK;
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut into)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    // There may be room for one or two more than were asked for.
    let whole = !got.flags.contains(ReturnFlags::CTRUNC) && fds.len() <= MOST_WITH_A_MESSAGE;
    Ok((fds, whole))
}

/// What `fd` is, which process `peer` has sent. Nothing here calls an operation of its file before that is known to be
/// harmless: seals are asked of the kernel's own files only, and `/proc` tells the name and the mount from what the
/// kernel keeps itself.
fn kind(fd: &OwnedFd, peer: Option<Pid>) -> Result<Kind, InspectError> {
    // Memfds, tmpfs and hugetlbfs have seals, everything else has not, whatever its name.
    if fcntl_get_seals(fd).is_ok() {
        return Ok(Kind::Memory);
    }
    let link = std::fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()))
        .map_err(|_| InspectError::NoProc)?;
    // No file with a path is called so: a path begins with a slash.
    if link.as_os_str() == "anon_inode:[eventfd]" {
        return Ok(Kind::Event);
    }
    // Before its mount is asked for: with it, /proc tells what the file's own driver has to say, and an epoll set's
    // waits for a lock that a frontend can hold for ever.
    if !link.as_os_str().as_bytes().starts_with(b"/") {
        return Ok(Kind::Other(format!("called {}", link.display())));
    }
    Ok(match mount_type(fd, peer) {
        Some(name) if LOCAL.contains(&name.as_str()) => match fstat(fd).map(|stat| stat.st_mode) {
            Ok(mode) if FileType::from_raw_mode(mode) == FileType::RegularFile => Kind::Memory,
            _ => Kind::Other("a special file".to_owned()),
        },
        Some(name) => Kind::Other(format!("a file of type {name}")),
        None => {
            let nowhere = "a file on a mount that neither this process nor the frontend's shows";
            Kind::Other(nowhere.to_owned())
        }
    })
}

/// The type of the filesystem that `fd` is on, if this process or `peer` shows where it is mounted.
///
/// Mounts of all namespaces are numbered together, and a number is not given again while a file is open there. So
/// whatever list it is found in, the kernel has written the type, and that of FUSE begins with `fuse`.
fn mount_type(fd: &OwnedFd, peer: Option<Pid>) -> Option<String> {
    let info = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd()));
    let info = info.ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
    type_in("/proc/thread-self/mountinfo", id).or_else(|| {
        // Unsharing a mount namespace gives every mount another number.
        type_in(&format!("/proc/{}/mountinfo", peer?.as_raw_pid()), id)
    })
}

/// The type of mount `id` in a list as proc(5) describes it.
fn type_in(list: &str, id: &str) -> Option<String> {
    // A line at a time: a process can have made many mounts. Paths need not be UTF-8.
    for line in BufReader::new(File::open(list).ok()?).split(b'\n') {
        let line = line.ok()?;
        let line = String::from_utf8_lossy(&line);
        // The number first, and behind a lone dash the type. Spaces within a field are escaped.
        if line.split(' ').next() == Some(id) {
            let (_, rest) = line.split_once(" - ")?;
            return rest.split(' ').next().map(str::to_owned);
        }
    }
    None
}

#[cfg(test)]
#[path = "inspect_tests.rs"]
mod tests;
