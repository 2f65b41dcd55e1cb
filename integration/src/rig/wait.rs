// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting with a deadline: a hang is an error.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longer than anything that is waited for takes, on a machine that is busy with other things too: what is not there by
/// then never comes.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Calls `ready` every few milliseconds until it answers, or fails after `limit` naming `what`.
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Option<T>,
) -> io::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = ready() {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{what}: not within {limit:?}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until `fd` is readable; false when `limit` passes first.
pub fn readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    ready(fd, PollFlags::IN, limit)
}

/// Waits until the other end of the socket `fd` is gone; false when `limit` passes first.
pub fn hung_up(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    ready(fd, PollFlags::RDHUP, limit)
}

fn ready(fd: BorrowedFd<'_>, events: PollFlags, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
