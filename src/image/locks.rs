// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The byte locks by which virtual machine monitors keep out of each other's images, and which
//! fence a restarted extentd off from the last writes of a killed one (R1a).
//!
//! cloud-hypervisor locks the whole file: exclusively to write, shared to read. QEMU takes
//! shared locks only, on byte 100 + *p* for each permission *p* it uses and on byte 200 + *p* for
//! each it grants to nobody else, and looks whether somebody holds the opposite one.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{major, minor};

use crate::sys::ofd_lock::{self, Bytes, Kind};

/// QEMU: reads consistently.
const READS: Bytes = Bytes { start: 100, len: 1 };
/// QEMU: writes, writes unchanged data, resizes.
const WRITES: [Bytes; 2] = [Bytes { start: 101, len: 1 }, Bytes { start: 103, len: 1 }];
/// QEMU: grants nobody to write, or to resize.
const GRANTS_NO_WRITES: [Bytes; 2] = [Bytes { start: 201, len: 1 }, Bytes { start: 203, len: 1 }];

/// For a writable image: everything, but so that `qemu-img info --force-share` still works, which
/// reads under the lock [`READS`] and wants byte 200 free.
const WRITER: [(Kind, Bytes); 4] = [
    (Kind::Exclusive, Bytes { start: 0, len: 100 }),
    (Kind::Shared, READS),
    (Kind::Exclusive, Bytes { start: 101, len: 99 }),
    (Kind::Exclusive, Bytes { start: 201, len: 0 }),
];

/// What came of trying.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// The locks are ours.
    Locked,
    /// Somebody else's stand in the way; the pid, if the kernel names it.
    Refused(Option<u32>),
}

/// Takes the locks for writing or for reading only.
///
/// # Errors
/// fcntl's; EINVAL, ENOLCK or EOPNOTSUPP mean there are no such locks here.
pub(super) fn try_take(fd: BorrowedFd<'_>, read_only: bool) -> io::Result<Outcome> {
    let wanted: Vec<(Kind, Bytes)> = if read_only {
        [READS].into_iter().chain(GRANTS_NO_WRITES).map(|bytes| (Kind::Shared, bytes)).collect()
    } else {
        WRITER.to_vec()
    };
    for (kind, bytes) in wanted {
        if !ofd_lock::try_lock(fd, kind, bytes)? {
            let pid = ofd_lock::conflict(fd, kind, bytes)?.and_then(|conflict| conflict.pid);
            ofd_lock::unlock_all(fd)?;
            return Ok(Outcome::Refused(pid));
        }
    }
    if read_only && let Some(pid) = qemu_writer(fd)? {
        ofd_lock::unlock_all(fd)?;
        return Ok(Outcome::Refused(pid));
    }
    Ok(Outcome::Locked)
}

/// Whether a QEMU writes the image; `Some(pid)` if so. A shared lock from below byte 100 on is a
/// cloud-hypervisor that reads, and welcome.
fn qemu_writer(fd: BorrowedFd<'_>) -> io::Result<Option<Option<u32>>> {
    for bytes in WRITES {
        if let Some(conflict) = ofd_lock::conflict(fd, Kind::Exclusive, bytes)?
            && (conflict.kind == Kind::Exclusive || conflict.start >= u64::from(READS.start))
        {
            return Ok(Some(conflict.pid));
        }
    }
    Ok(None)
}

/// A lock as `/proc/locks` and `/proc/PID/fdinfo` list it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Listed {
    exclusive: bool,
    start: u64,
}

/// The byte locks on this file in such a list.
fn listed(text: &str, dev: u64, ino: u64) -> impl Iterator<Item = Listed> {
    let file = format!("{:02x}:{:02x}:{ino}", major(dev), minor(dev));
    text.lines().filter_map(move |line| {
        // "1: OFDLCK ADVISORY  WRITE -1 fe:00:10019010 0 99"; fdinfo puts "lock:" in front.
        let line = line.strip_prefix("lock:").unwrap_or(line);
        let mut fields = line.split_whitespace().skip(1);
        let class = fields.next()?;
        let kind = fields.nth(1)?;
        let (place, start) = (fields.nth(1)?, fields.next()?);
        (matches!(class, "OFDLCK" | "POSIX") && place == file)
            .then(|| Listed { exclusive: kind == "WRITE", start: start.parse().unwrap_or(0) })
    })
}

/// Whether the list of all locks shows that [`try_take`] cannot succeed. Looked at before
/// the image is opened: an open would break the lease of the very process that serves it.
pub(super) fn seen_locked(dev: u64, ino: u64, read_only: bool) -> bool {
    let text = fs::read_to_string("/proc/locks").unwrap_or_default();
    let mut locks = listed(&text, dev, ino);
    locks.any(|lock| lock.exclusive || (!read_only && lock.start > u64::from(READS.start)))
}

/// A process that holds a byte lock on this file, as far as `/proc` shows.
pub(super) fn holder(dev: u64, ino: u64) -> Option<u32> {
    let own = std::process::id();
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|&pid| pid != own).find(|pid| {
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
        files.flatten().any(|file| {
            let info = fs::read_to_string(file.path()).unwrap_or_default();
            let locks: String = info
                .lines()
                .filter(|line| line.starts_with("lock:"))
                .collect::<Vec<_>>()
                .join("\n");
            listed(&locks, dev, ino).next().is_some()
        })
    })
}

/// Whether an error of [`try_take`] means that this filesystem has no byte locks.
pub(super) fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP))
}

#[cfg(test)]
#[path = "locks_tests.rs"]
mod tests;
