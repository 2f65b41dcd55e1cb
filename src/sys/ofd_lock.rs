// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Open-file-description byte locks (fcntl_locking(2)): they live as long as the description,
//! which registered io_uring files keep alive until the last request is done (R1a).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a lock keeps others from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// From locking exclusively.
    Shared,
    /// From locking at all.
    Exclusive,
}

/// Bytes `start..start + len`; a `len` of 0 reaches to the end of all files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bytes {
    /// First byte.
    pub start: u32,
    /// How many.
    pub len: u32,
}

/// A lock of somebody else that stands in the way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conflict {
    /// What it is.
    pub kind: Kind,
    /// Its first byte.
    pub start: u64,
    /// Who holds it; known for classic POSIX locks only.
    pub pid: Option<u32>,
}

const fn flock(kind: libc::c_int, bytes: Bytes) -> libc::flock64 {
    // The three lock types are 0, 1 and 2, SEEK_SET is 0.
    #[allow(clippy::cast_possible_truncation)]
    libc::flock64 {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: bytes.start as i64,
        l_len: bytes.len as i64,
        l_pid: 0,
    }
}

const fn raw(kind: Kind) -> libc::c_int {
    match kind {
        Kind::Shared => libc::F_RDLCK as libc::c_int,
        Kind::Exclusive => libc::F_WRLCK as libc::c_int,
    }
}

fn set(fd: BorrowedFd<'_>, mut lock: libc::flock64) -> io::Result<()> {
    let pointer: *mut libc::flock64 = &raw mut lock;
    // SAFETY: `pointer` is the local `lock`, which outlives the call; F_OFD_SETLK only reads it.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, pointer) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes a lock, without waiting; `false` if somebody else's stands in the way.
///
/// # Errors
/// fcntl's, as EINVAL or ENOLCK where the filesystem has no locks.
pub fn try_lock(fd: BorrowedFd<'_>, kind: Kind, bytes: Bytes) -> io::Result<bool> {
    match set(fd, flock(raw(kind), bytes)) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Gives every lock of this description back.
///
/// # Errors
/// fcntl's.
pub fn unlock_all(fd: BorrowedFd<'_>) -> io::Result<()> {
    set(fd, flock(libc::F_UNLCK as libc::c_int, Bytes { start: 0, len: 0 }))
}

/// Whose lock would refuse this one.
///
/// # Errors
/// fcntl's.
pub fn conflict(fd: BorrowedFd<'_>, kind: Kind, bytes: Bytes) -> io::Result<Option<Conflict>> {
    let mut lock = flock(raw(kind), bytes);
    let pointer: *mut libc::flock64 = &raw mut lock;
    // SAFETY: `pointer` is the local `lock`, which outlives the call; F_OFD_GETLK fills it in.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, pointer) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let kind = match libc::c_int::from(lock.l_type) {
        libc::F_RDLCK => Kind::Shared,
        libc::F_WRLCK => Kind::Exclusive,
        _ => return Ok(None),
    };
    let pid = u32::try_from(lock.l_pid).ok().filter(|&pid| pid != 0);
    Ok(Some(Conflict { kind, start: u64::try_from(lock.l_start).unwrap_or(0), pid }))
}
