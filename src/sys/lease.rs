// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! File leases (fcntl_locking(2), F_SETLEASE): to be told before anybody else opens the image.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::c_int;

/// fcntl's command; libc leaves it out on Linux.
const F_SETSIG: c_int = 10;

/// What a lease keeps others from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// From opening the file for writing: F_RDLCK. Several may be held at once.
    Read,
    /// From opening it at all: F_WRLCK.
    Write,
}

impl Kind {
    const fn raw(self) -> c_int {
        match self {
            Self::Read => libc::F_RDLCK as c_int,
            Self::Write => libc::F_WRLCK as c_int,
        }
    }
}

fn fcntl(fd: BorrowedFd<'_>, command: c_int, argument: c_int) -> io::Result<c_int> {
    // SAFETY: `fd` is open for the duration of the borrow, and the commands used here take an
    // int, no pointer.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Takes a lease whose break sends `signal` to this process, with `si_fd` set to `fd`.
///
/// Signal and owner are set anew each time, for the end of a lease resets both. The process is
/// named as the owner: F_SETLEASE alone would name the calling *thread*, and when that one has ended
/// nobody would be told.
///
/// # Errors
/// EAGAIN: somebody has the file open in a way that conflicts. EACCES: not our file, and no
/// CAP_LEASE. EINVAL: the filesystem has no leases.
pub fn take(fd: BorrowedFd<'_>, kind: Kind, signal: c_int) -> io::Result<()> {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    fcntl(fd, libc::F_SETOWN, process)?;
    fcntl(fd, F_SETSIG, signal)?;
    fcntl(fd, libc::F_SETLEASE, kind.raw()).map(drop)
}

/// The lease that is held; of one that is being broken, what it is to become.
///
/// # Errors
/// The kernel's.
pub fn held(fd: BorrowedFd<'_>) -> io::Result<Option<Kind>> {
    let held = fcntl(fd, libc::F_GETLEASE, 0)?;
    Ok([Kind::Read, Kind::Write].into_iter().find(|kind| kind.raw() == held))
}

/// Whether a lease of this kind is held and nobody waits for its end. One system call, and no allocation: it is asked on the hot path.
#[must_use]
pub fn is_held(fd: BorrowedFd<'_>, kind: Kind) -> bool {
    held(fd).is_ok_and(|held| held == Some(kind))
}

/// Gives the lease back; never blocks, also on a frozen filesystem.
///
/// # Errors
/// EAGAIN: there was none.
pub fn release(fd: BorrowedFd<'_>) -> io::Result<()> {
    fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK as c_int).map(drop)
}
