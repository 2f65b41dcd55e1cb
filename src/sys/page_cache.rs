// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the page cache holds of a file, and making it hold nothing (R3, R10a).

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use rustix::fs::{Advice, fadvise};

use crate::engine::units::FileRange;

/// cachestat(2), the same on every architecture with the common system call table (Linux 6.5).
const SYS_CACHESTAT: libc::c_long = 451;

/// How much of a file [`mincore`] looks at in one go; a multiple of every page size.
const WINDOW: u64 = 1 << 30;

/// Pages of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pages {
    /// In the page cache.
    pub cached: u64,
    /// Dirty or being written back; `None` where the kernel cannot tell.
    pub unwritten: Option<u64>,
}

/// `struct cachestat_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct cachestat`.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// What the page cache holds of `range`. Without cachestat(2) it counts with mincore(2), which
/// does not know about dirty pages.
///
/// # Errors
/// Neither system call would tell.
pub fn pages(fd: BorrowedFd<'_>, range: FileRange) -> io::Result<Pages> {
    match cachestat(fd, range) {
        // Before Linux 6.5, or not ours to look at: mincore has its own rules for that.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP)
            ) =>
        {
            mincore(fd, range).map(|cached| Pages { cached, unwritten: None })
        }
        other => other,
    }
}

/// Whether the page cache holds pages of the file and none of them waits to be written. Only where
/// cachestat(2) tells: mincore(2) could not, and takes 12 ms for each GiB of the file.
pub fn has_clean_only(fd: BorrowedFd<'_>) -> bool {
    let pages = cachestat(fd, FileRange::ALL);
    pages.is_ok_and(|pages| pages.cached > 0 && pages.unwritten == Some(0))
}

/// How many pages hold bytes of `range`, those that reach out of it included. Only by cachestat(2), which never waits: mincore(2)
/// needs the process's memory map, for which its other threads may be queueing.
///
/// # Errors
/// cachestat's; ENOSYS before Linux 6.5.
pub fn count(fd: BorrowedFd<'_>, range: FileRange) -> io::Result<u64> {
    cachestat(fd, range).map(|pages| pages.cached)
}

fn cachestat(fd: BorrowedFd<'_>, range: FileRange) -> io::Result<Pages> {
    if range.is_empty() {
        // A length of 0 would mean: to the end of the file.
        return Ok(Pages { cached: 0, unwritten: Some(0) });
    }
    let range = Range { start: range.start, len: range.len() };
    let mut stat = Stat::default();
    let from: *const Range = &raw const range;
    let to: *mut Stat = &raw mut stat;
    // SAFETY: `from` and `to` point to the two locals above, laid out as cachestat(2) wants them
    // and alive until it returns; the kernel reads the first and writes the second.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), from, to, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Pages { cached: stat.cached, unwritten: Some(stat.dirty + stat.writeback) })
}

fn mincore(fd: BorrowedFd<'_>, range: FileRange) -> io::Result<u64> {
    let page = page_size();
    let size = u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0);
    let whole = range.intersect(&FileRange::new(0, size)).round_out(page);
    let mut cached = 0;
    let mut at = whole.start;
    while at < whole.end {
        let len = (whole.end - at).min(WINDOW);
        cached += mincore_window(fd, at, usize::try_from(len).map_err(io::Error::other)?)?;
        at += len;
    }
    Ok(cached)
}

/// The granule of the page cache, in bytes.
#[must_use]
pub fn page_size() -> u64 {
    // SAFETY: sysconf takes and returns a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

fn mincore_window(fd: BorrowedFd<'_>, at: u64, len: usize) -> io::Result<u64> {
    let page = usize::try_from(page_size()).map_err(io::Error::other)?;
    let mut resident = vec![0_u8; len.div_ceil(page)];
    let offset = i64::try_from(at).map_err(io::Error::other)?;
    let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
    // SAFETY: a new mapping of `len` bytes at an address the kernel chooses replaces nothing; it
    // is only asked about, never read, and ends below.
    let map = unsafe { libc::mmap(ptr::null_mut(), len, read, shared, fd.as_raw_fd(), offset) };
    if map == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `map` is the mapping of `len` bytes made above; `resident` has a byte for each of
    // its pages.
    let result = unsafe { libc::mincore(map, len, resident.as_mut_ptr()) };
    let outcome = if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: `map` is the mapping of `len` bytes made above, and nothing refers to it any more.
    unsafe { libc::munmap(map, len) };
    outcome.map(|()| resident.iter().filter(|&&byte| byte & 1 != 0).count() as u64)
}

/// Drops the clean pages wholly inside `range`. Begins to write dirty ones back, which may block;
/// with none dirty it does not.
///
/// # Errors
/// fadvise's.
pub fn drop_clean(fd: BorrowedFd<'_>, range: FileRange) -> io::Result<()> {
    let Some(len) = NonZeroU64::new(range.len()) else { return Ok(()) };
    // `len` of None is: to the end of the file.
    let len = (range.end != FileRange::ALL.end).then_some(len);
    Ok(fadvise(fd, range.start, len, Advice::DontNeed)?)
}

#[cfg(test)]
#[path = "page_cache_tests.rs"]
mod tests;
