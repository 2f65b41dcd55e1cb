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
//! * crosvm, and tools that use flock(1), take a flock(2): exclusively to write, shared to read. We
//!   do the same, with two exceptions:
//!   - On a block device ours is shared, also to write. An exclusive one keeps udev from looking at
//!     the device (systemd.io/BLOCK_DEVICE_LOCKING): its events would wait, and who settles for them
//!     with it, as long as the device is served. The shared one is compatible with udev's own and
//!     keeps crosvm and partitioning tools out, whose is exclusive; other instances are kept out by
//!     O_EXCL and the byte locks.
//!   - On NFS and SMB there is none. Their clients make a byte lock of the whole file of it
//!     (`nfs_flock`, `cifs_flock`). On NFS that has the owner of our byte locks, which is the
//!     description, and makes all of them exclusive on the server, so that QEMU finds no words for
//!     it; and other hosts' flocks meet our byte locks there without. An SMB server without POSIX
//!     extensions lets locks of one owner conflict too (`cifs_find_fid_lock_conflict`): we would be
//!     locked out by ourselves.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, FlockOperation, Stat, flock};
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
    readers_welcome: true,
};

/// f_type of filesystems whose clients make byte locks of a flock: NFS, and SMB in three versions.
const NO_FLOCK: [u64; 4] = [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42];

/// What is to be locked, and for what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Claim {
    pub(super) read_only: bool,
    pub(super) block_device: bool,
}

impl Claim {
    pub(super) fn on(stat: &Stat, read_only: bool) -> Self {
        let block_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        Self { read_only, block_device }
    }

    const fn rules(self) -> &'static Rules {
        if self.read_only { &READER } else { &WRITER }
    }

    const fn shares_flock(self) -> bool {
        self.read_only || self.block_device
    }

    /// Whether a lock of somebody else's, in the lists of `/proc`, keeps us out.
    fn forbids(self, lock: &Listed) -> bool {
        let (rules, exclusive) = (self.rules(), lock.exclusive);
        match lock.class {
            Class::Flock => exclusive || !self.shares_flock(),
            Class::Bytes { start, end } => {
                let meets = |bytes: &Bytes| {
                    let last = bytes.len.checked_sub(1).map(|more| bytes.start + more);
                    start <= last.map_or(u64::MAX, u64::from) && end >= u64::from(bytes.start)
                };
                let welcome = rules.readers_welcome && !exclusive && start < u64::from(READS.start);
                let taken = rules
                    .takes
                    .iter()
                    .any(|(kind, bytes)| (exclusive || *kind == Kind::Exclusive) && meets(bytes));
                taken || (!welcome && rules.alone.iter().any(meets))
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
pub(super) fn try_take(fd: BorrowedFd<'_>, claim: Claim) -> io::Result<bool> {
    let bytes = match take_bytes(fd, claim.rules()) {
        Ok(false) => return Ok(false),
        Ok(true) => Ok(()),
        Err(error) if unsupported(&error) => Err(error),
        Err(error) => return Err(error),
    };
    if emulates_flock(fd) {
        return bytes.map(|()| true);
    }
    let operation = if claim.shares_flock() {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match flock(fd, operation) {
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

fn emulates_flock(fd: BorrowedFd<'_>) -> bool {
    // f_type is a signed word whose type differs between architectures; the magic has 32 bits.
    #[allow(clippy::cast_sign_loss)]
    let magic = rustix::fs::fstatfs(fd).map_or(0, |stat| stat.f_type as u64 & 0xffff_ffff);
    NO_FLOCK.contains(&magic)
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
pub(super) fn forbids(lock: &Listed, claim: Claim) -> bool {
    claim.forbids(lock)
}

/// Whether the list of all locks shows that [`try_take`] cannot succeed. Looked at before the image
/// is opened: an open would break the lease of the very process that serves it.
pub(super) fn seen_locked(dev: u64, ino: u64, claim: Claim) -> bool {
    let text = fs::read_to_string("/proc/locks").unwrap_or_default();
    super::holders::listed(&text, dev, ino).any(|lock| forbids(&lock, claim))
}

/// Whether an error of [`try_take`] means that this filesystem has no locks.
pub(super) fn unsupported(error: &io::Error) -> bool {
    let known = [libc::EINVAL, libc::ENOLCK, libc::EOPNOTSUPP, libc::ENOSYS];
    error.raw_os_error().is_some_and(|errno| known.contains(&errno))
}

#[cfg(test)]
#[path = "locks_tests.rs"]
mod tests;
