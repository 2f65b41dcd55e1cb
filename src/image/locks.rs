// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The locks by which virtual machine monitors keep out of each other's images, and which fence a
//! restarted extentd off from the last writes of a killed one (R1a). All of them belong to the
//! image's one description, and live as long as that.
//!
//! * QEMU takes shared byte locks only, on 100 + *p* for each permission *p* that it uses and on
//!   200 + *p* for each that it grants to nobody else, and then tests whether somebody holds the
//!   opposite one. We do the same, so that its error is the one that its users know: `Failed to get
//!   "write" lock`, `Is another process using the image`.
//! * cloud-hypervisor locks all bytes, or those of the file's length: exclusively to write, shared
//!   to read. Bytes that mean nothing to QEMU, locked in the same way, keep it out, and keep
//!   instances of extentd apart.
//! * crosvm, and tools that use flock(1), take a flock(2): exclusively to write, shared to read.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::holders::{Class, Listed};
use crate::sys::ofd_lock::{self, Bytes, Kind};

const fn byte(start: u32) -> Bytes {
    Bytes { start, len: 1 }
}

/// These bytes lie below those that mean anything to QEMU.
const OURS: Bytes = Bytes { start: 0, len: 100 };
/// And these lie above them.
const BEYOND: Bytes = Bytes { start: 204, len: 0 };
/// QEMU locks these when it reads consistently, writes, resizes.
const READS: Bytes = byte(100);
const WRITES: Bytes = byte(101);
const RESIZES: Bytes = byte(103);
/// QEMU locks these when nobody else may read consistently, write, resize.
const NO_READS: Bytes = byte(200);
const NO_WRITES: Bytes = byte(201);
const NO_RESIZES: Bytes = byte(203);

/// What one side takes, and where it tolerates nobody else's lock, of whatever kind.
#[derive(Debug)]
struct Rules {
    takes: &'static [(Kind, Bytes)],
    alone: &'static [Bytes],
    flock: FlockOperation,
    /// Also in `alone`, one that is shared and begins below QEMU's bytes is welcome: a
    /// cloud-hypervisor that reads.
    readers_welcome: bool,
}

const WRITER: Rules = Rules {
    takes: &[
        (Kind::Exclusive, OURS),
        (Kind::Shared, READS),
        (Kind::Shared, WRITES),
        (Kind::Shared, RESIZES),
        (Kind::Shared, NO_WRITES),
        (Kind::Shared, NO_RESIZES),
        (Kind::Exclusive, BEYOND),
    ],
    alone: &[WRITES, RESIZES, NO_READS, NO_WRITES, NO_RESIZES],
    flock: FlockOperation::NonBlockingLockExclusive,
    readers_welcome: false,
};

const READER: Rules = Rules {
    takes: &[
        (Kind::Shared, OURS),
        (Kind::Shared, READS),
        (Kind::Shared, NO_WRITES),
        (Kind::Shared, NO_RESIZES),
    ],
    alone: &[WRITES, RESIZES, NO_READS],
    flock: FlockOperation::NonBlockingLockShared,
    readers_welcome: true,
};

const fn rules(read_only: bool) -> &'static Rules {
    if read_only { &READER } else { &WRITER }
}

impl Rules {
    /// Whether a lock of somebody else's, in the lists of `/proc`, keeps us out.
    fn forbid(&self, lock: &Listed) -> bool {
        let exclusive = lock.exclusive;
        match lock.class {
            Class::Flock => exclusive || self.flock == FlockOperation::NonBlockingLockExclusive,
            Class::Bytes { start, end } => {
                let meets = |bytes: &Bytes| {
                    let last = bytes.len.checked_sub(1).map(|more| bytes.start + more);
                    start <= last.map_or(u64::MAX, u64::from) && end >= u64::from(bytes.start)
                };
                let welcome = self.readers_welcome && !exclusive && start < u64::from(READS.start);
                let taken = self
                    .takes
                    .iter()
                    .any(|(kind, bytes)| (exclusive || *kind == Kind::Exclusive) && meets(bytes));
                taken || (!welcome && self.alone.iter().any(meets))
            }
            // Not a lock: opening the file ends it.
            Class::Lease => false,
        }
    }
}

/// Takes the locks for writing or for reading only; `false` if somebody else's stand in the way,
/// and then none is held.
///
/// # Errors
/// fcntl's or flock's; see [`unsupported`].
pub(super) fn try_take(fd: BorrowedFd<'_>, read_only: bool) -> io::Result<bool> {
    let rules = rules(read_only);
    let bytes = match take_bytes(fd, rules) {
        Ok(false) => return Ok(false),
        Ok(true) => Ok(()),
        Err(error) if unsupported(&error) => Err(error),
        Err(error) => return Err(error),
    };
    match flock(fd, rules.flock) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => {
            if bytes.is_ok() {
                ofd_lock::unlock_all(fd)?;
            }
            Ok(false)
        }
        // One of the two is enough to keep other instances out.
        Err(errno) if unsupported(&errno.into()) => bytes.map(|()| true),
        Err(errno) => Err(errno.into()),
    }
}

fn take_bytes(fd: BorrowedFd<'_>, rules: &Rules) -> io::Result<bool> {
    for &(kind, bytes) in rules.takes {
        if !ofd_lock::try_lock(fd, kind, bytes)? {
            ofd_lock::unlock_all(fd)?;
            return Ok(false);
        }
    }
    // Only now, as QEMU does it: of two that begin at once at least one sees the other.
    for &bytes in rules.alone {
        if let Some(conflict) = ofd_lock::conflict(fd, Kind::Exclusive, bytes)? {
            let shared = conflict.kind == Kind::Shared;
            if !(rules.readers_welcome && shared && conflict.start < u64::from(READS.start)) {
                ofd_lock::unlock_all(fd)?;
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Whether such a lock, in the lists of `/proc`, keeps [`try_take`] from succeeding.
pub(super) fn forbids(lock: &Listed, read_only: bool) -> bool {
    rules(read_only).forbid(lock)
}

/// Whether the list of all locks shows that [`try_take`] cannot succeed. Looked at before the image
/// is opened: an open would break the lease of the very process that serves it.
pub(super) fn seen_locked(dev: u64, ino: u64, read_only: bool) -> bool {
    let text = fs::read_to_string("/proc/locks").unwrap_or_default();
    super::holders::listed(&text, dev, ino).any(|lock| forbids(&lock, read_only))
}

/// Whether an error of [`try_take`] means that this filesystem has no locks.
pub(super) fn unsupported(error: &io::Error) -> bool {
    let known = [libc::EINVAL, libc::ENOLCK, libc::EOPNOTSUPP, libc::ENOSYS];
    error.raw_os_error().is_some_and(|errno| known.contains(&errno))
}

#[cfg(test)]
#[path = "locks_tests.rs"]
mod tests;
