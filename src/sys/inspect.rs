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
//! own, in which there is nothing else: if it never gets rid of them, it holds nothing of this process's, the
//! image with its lease and lock least of all.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use rustix::fs::{FileType, fcntl_get_seals, fstat};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// Descriptors of one device's frontends that may be waiting to be closed.
const MOST: usize = 8;
/// Descriptors that one message can carry.
const MOST_WITH_A_MESSAGE: usize = 32;
/// How often a caller looks whether it still makes sense to wait.
const STEP: Duration = Duration::from_millis(100);
/// The stack of a thread that looks.
const STACK: usize = 128 << 10;

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
        let socket = socket.as_raw_fd();
        let look = move || {
            // Ended last: by then the descriptors are closed.
            let _running = running;
            look(socket, bytes, &reply);
        };
        std::thread::Builder::new().name("inspect".to_owned()).stack_size(STACK).spawn(look)?;
        loop {
            match answer.recv_timeout(STEP) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) if alive() => {}
                Err(_) => return Err(InspectError::Ended),
            }
        }
    }
}

/// What a thread does that looks at descriptors. It must not log: what is open here is not what it seems.
fn look(socket: RawFd, bytes: usize, reply: &Sender<Result<Vec<Kind>, InspectError>>) {
    let peeked = own_table(socket).and_then(|socket| peek(&socket, bytes));
    // The caller may have stopped waiting.
    let (answer, fds) = match peeked {
        Ok((fds, true)) => (Ok(fds.iter().map(kind).collect()), fds),
        Ok((fds, false)) => (Err(InspectError::TooMany), fds),
        Err(error) => (Err(error.into()), Vec::new()),
    };
    let _ = reply.send(answer);
    // Here it may hang.
    drop(fds);
}

/// Gives this thread a descriptor table of its own, with nothing in it but `socket` and the standard ones.
fn own_table(socket: RawFd) -> io::Result<OwnedFd> {
    /// The first after the standard ones.
    const FIRST: RawFd = 3;
    // First those below, the image among them: newer kernels do not even copy what is in the range.
    if socket > FIRST {
        close_range(FIRST, socket - 1, libc::CLOSE_RANGE_UNSHARE)?;
    }
    close_range(socket.saturating_add(1), RawFd::MAX, libc::CLOSE_RANGE_UNSHARE)?;
    // In this table it belongs to nobody yet. If the caller has stopped waiting and closed it, this may be another descriptor
    // of its table by now: it is peeked at in vain, or is no socket.
    super::process::adopt(socket)
}

fn close_range(first: RawFd, last: RawFd, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: it takes numbers only. The flag gives this thread a table of its own, so that what other threads own stays
    // open; this thread owns no descriptor yet.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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

/// What `fd` is. Nothing here calls an operation of its file before that is known to be harmless: seals are asked of
/// the kernel's own files only, and `/proc` tells the name and the mount from what the kernel keeps itself.
fn kind(fd: &OwnedFd) -> Kind {
    let link = std::fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()));
    // No file with a path is called so: a path begins with a slash.
    if link.as_ref().is_ok_and(|link| link.as_os_str() == "anon_inode:[eventfd]") {
        return Kind::Event;
    }
    // Memfds, tmpfs and hugetlbfs have seals, everything else has not, whatever its name.
    if fcntl_get_seals(fd).is_ok() {
        return Kind::Memory;
    }
    match mount_type(fd) {
        Some(name) if LOCAL.contains(&name.as_str()) => match fstat(fd).map(|stat| stat.st_mode) {
            Ok(mode) if FileType::from_raw_mode(mode) == FileType::RegularFile => Kind::Memory,
            _ => Kind::Other("a special file".to_owned()),
        },
        Some(name) => Kind::Other(format!("a file of type {name}")),
        None => Kind::Other("no file in a mount of this mount namespace".to_owned()),
    }
}

/// The type of the filesystem that `fd` is on, if it is mounted where this process can see it.
fn mount_type(fd: &OwnedFd) -> Option<String> {
    let info = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd()));
    let info = info.ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").ok()?;
    // proc(5): the number first, and behind a lone dash the type.
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(id))?;
    let (_, rest) = line.split_once(" - ")?;
    rest.split(' ').next().map(str::to_owned)
}

#[cfg(test)]
#[path = "inspect_tests.rs"]
mod tests;
