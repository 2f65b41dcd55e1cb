// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counts the system calls of another process, with the kernel's own tracepoint.
//!
//! Counting slows every call down a little, so it happens in runs of its own, never in those that are timed.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, RawFd};
use std::path::Path;

use super::filesystem::Mount;

/// Where the kernel's tracing is to be mounted.
const TRACING: &str = "/sys/kernel/tracing";
/// Where the tracepoint's number is, below that.
const ID: &str = "events/raw_syscalls/sys_enter/id";
const PERF_TYPE_TRACEPOINT: u64 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
/// Bytes of the first published `perf_event_attr`, which has all that a plain counter needs.
const ATTR_SIZE: u64 = 64;

/// Mounts what the tracepoint's number is found in, where it is not mounted.
pub fn tracing() -> io::Result<Option<Mount>> {
    if tracepoint().is_some() {
        return Ok(None);
    }
    Mount::of_kind("tracefs", Path::new(TRACING)).map(Some)
}

fn tracepoint() -> Option<u64> {
    std::fs::read_to_string(format!("{TRACING}/{ID}")).ok()?.trim().parse().ok()
}

/// A running counter over the threads a process had when it was made.
#[derive(Debug)]
pub struct Counter(Vec<File>);

impl Counter {
    /// Starts counting; `None` where the kernel or the system's settings do not let us.
    pub fn start(pid: u32) -> Option<Counter> {
        let id = tracepoint()?;
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
        let ids = threads.flatten().filter_map(|t| t.file_name().to_str()?.parse().ok());
        let counters: io::Result<Vec<File>> = ids.map(|thread| open(id, thread)).collect();
        counters.ok().map(Counter)
    }

    /// The same for one thread only; an error says why not.
    pub fn of_thread(thread: libc::pid_t) -> io::Result<Counter> {
        let id =
            tracepoint().ok_or_else(|| io::Error::other(format!("{TRACING}/{ID} is not there")))?;
        open(id, thread).map(|counter| Counter(vec![counter]))
    }

    /// Calls made since the start.
    pub fn read(&self) -> io::Result<u64> {
        let mut total = 0;
        for mut counter in &self.0 {
            let mut value = [0; 8];
            counter.read_exact(&mut value)?;
            total += u64::from_ne_bytes(value);
        }
        Ok(total)
    }
}

fn open(tracepoint: u64, thread: libc::pid_t) -> io::Result<File> {
    // perf_event_attr: type and size, config; no sampling, no flags: a counter that runs from the start.
    let attributes: [u64; 8] =
        [PERF_TYPE_TRACEPOINT | (ATTR_SIZE << 32), tracepoint, 0, 0, 0, 0, 0, 0];
    // SAFETY: `attributes` is a whole perf_event_attr of the size it states and lives across the call, which only reads it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            attributes.as_ptr(),
            thread,
            -1,
            -1,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    match RawFd::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
