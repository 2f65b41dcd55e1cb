// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! May this file be served raw (R5, R5a)? Every "no" has a reason and a fix.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};

use super::device;
use super::mounts::{Mount, Place, parse_exports, parse_mountinfo, parse_swaps};
use crate::sys::{inode, xfs};

/// `statfs.f_type` of ext2, ext3 and ext4.
const EXT_MAGIC: u64 = 0xef53;
/// `statfs.f_type` of XFS.
const XFS_MAGIC: u64 = 0x5846_5342;

/// Why an image is never served raw by this process. Displayed: the reason, and the fix.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum NotEligible {
    /// Not ext2/3/4 or XFS.
    #[error(
        "{kind} does not say where blocks lie in a way that can be relied on; put the image on ext4 or XFS"
    )]
    Filesystem {
        /// Its type.
        kind: String,
    },
    /// O_DIRECT is refused, or silently buffered.
    #[error(
        "the filesystem has no O_DIRECT for this file; move it to an ext4 or XFS without data journalling or encryption"
    )]
    NoDirectIo,
    /// ext3/ext4 `data=journal`.
    #[error(
        "the filesystem journals file data and would replay it over ours; mount it with data=ordered (see tune2fs -l)"
    )]
    DataJournal,
    /// Neither `/proc/fs/ext4` nor statx tell.
    #[error("cannot see whether the filesystem journals file data; make /proc/fs/ext4 visible")]
    DataJournalUnknown,
    /// An inode flag.
    #[error("the file is marked {flag}; {fix}")]
    Flag {
        /// What it is called.
        flag: &'static str,
        /// How to get rid of it.
        fix: &'static str,
    },
    /// The XFS debug knob.
    #[error(
        "XFS is told to move every block it writes; echo 0 > /sys/fs/xfs/debug/always_cow and remount"
    )]
    AlwaysCow,
    /// In `/proc/swaps`.
    #[error("the file is swap space; swapoff it")]
    Swap,
    /// An overlay could truncate it without an open.
    #[error("it lies in the upper directory of the overlay at {}, through which it can be truncated unseen; move it or unmount that", overlay.display())]
    OverlayUpper {
        /// Where the overlay is mounted.
        overlay: PathBuf,
    },
    /// knfsd could truncate it without an open.
    #[error("it is exported over NFS with {}, through which it can be truncated unseen; move it or end the export", export.display())]
    NfsExport {
        /// The exported directory.
        export: PathBuf,
    },
    /// The block device could not be opened, or is not the filesystem's.
    #[error("the device {major}:{minor} below the filesystem cannot be used ({}: {source}); see its permissions, and bdev_allow_write_mounted", path.display())]
    Device {
        /// Major number of `st_dev`.
        major: u32,
        /// Minor number of `st_dev`.
        minor: u32,
        /// The node tried; empty if none was found.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// F_SETLEASE refuses for good.
    #[error(
        "no lease on the file ({source}); run as its owner or with CAP_LEASE, on a local filesystem"
    )]
    NoLease {
        /// The kernel's word.
        source: io::Error,
    },
    /// The file cannot be asked about.
    #[error(
        "{operation}: {source}; let mode=filesystem serve it, or see that /proc and /sys are mounted"
    )]
    Unknown {
        /// What was asked.
        operation: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
    /// R6 at open.
    #[error("the blocks read from {} differ from the file's; the filesystem's map must not be trusted, check its device", device.display())]
    Mismatch {
        /// The device that was read.
        device: PathBuf,
    },
}

/// The file looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject<'a> {
    /// The one description of it.
    pub(super) fd: BorrowedFd<'a>,
    /// Its path when it was opened, absolute and without symbolic links.
    pub(super) path: &'a Path,
    /// `st_dev`.
    pub(super) dev: u64,
    /// `st_ino`.
    pub(super) ino: u64,
    /// Whether it is open with O_DIRECT.
    pub(super) direct_io: bool,
}

fn unknown<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> NotEligible {
    move |error| NotEligible::Unknown { operation, source: error.into() }
}

/// Looks at everything that does not need the device open. Some of it can change later, so
/// direct mode asks again each time it begins.
pub(super) fn check(subject: &Subject<'_>) -> Result<(), NotEligible> {
    let text = fs::read_to_string("/proc/self/mountinfo").map_err(unknown("mountinfo"))?;
    let mounts = parse_mountinfo(&text);
    let statx = rustix::fs::statx(
        subject.fd,
        "",
        AtFlags::EMPTY_PATH,
        StatxFlags::MNT_ID | StatxFlags::DIOALIGN,
    )
    .map_err(unknown("statx"))?;
    // A mount that was taken away under us, or that another namespace hides.
    let unseen = || unknown("mountinfo")(io::Error::other("its mount is not listed"));
    let mount = mounts.iter().find(|mount| mount.id == statx.stx_mnt_id).ok_or_else(unseen)?;
    let reported = statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    let direct_align = reported.then_some(statx.stx_dio_offset_align);

    let is_xfs = filesystem(subject, mount)?;
    if is_xfs {
        check_xfs(subject)?
    } else {
        ext(subject, mount, direct_align)?
    }
    check_flags(inode::flags(subject.fd).map_err(unknown("FS_IOC_GETFLAGS"))?)?;
    check_attributes(statx.stx_attributes)?;
    if !subject.direct_io || direct_align == Some(0) {
        return Err(NotEligible::NoDirectIo);
    }
    swap(subject)?;
    // It may have been moved since it was opened.
    let link = format!("/proc/self/fd/{}", subject.fd.as_raw_fd());
    let path = fs::read_link(link).unwrap_or_else(|_| subject.path.to_owned());
    let place = Place::new(&path, mount).ok_or_else(unseen)?;
    overlays(&place, &mounts)?;
    exports(&place, &mounts)
}

/// Whether it is XFS; otherwise it is ext2/3/4.
fn filesystem(subject: &Subject<'_>, mount: &Mount) -> Result<bool, NotEligible> {
    let magic = rustix::fs::fstatfs(subject.fd).map_err(unknown("statfs"))?.f_type;
    // f_type is a signed word whose type differs between architectures; the magic has 32 bits.
    #[allow(clippy::cast_sign_loss)]
    let magic = magic as u64 & 0xffff_ffff;
    let fits = match mount.kind.as_str() {
        "ext2" | "ext3" | "ext4" => magic == EXT_MAGIC,
        "xfs" => magic == XFS_MAGIC,
        _ => false,
    };
    if fits && !device::is_anonymous(subject.dev) {
        return Ok(magic == XFS_MAGIC);
    }
    Err(NotEligible::Filesystem { kind: mount.kind.clone() })
}

/// Whether the filesystem flushes the device's cache when it is told to sync a file (R14). Of those
/// that are eligible only the ext4 driver can be told not to.
pub(super) fn barriers(dev: u64) -> bool {
    ext_options(dev).is_none_or(|options| options.lines().all(|line| line != "nobarrier"))
}

/// What the ext4 driver goes by, with what `tune2fs -o` made the default: mountinfo hides that.
/// The old ext2 driver has no such file.
fn ext_options(dev: u64) -> Option<String> {
    let name = device::kernel_name(dev).ok()?;
    fs::read_to_string(Path::new("/proc/fs/ext4").join(name).join("options")).ok()
}

fn ext(subject: &Subject<'_>, mount: &Mount, direct_align: Option<u32>) -> Result<(), NotEligible> {
    match ext_options(subject.dev) {
        Some(options) if options.lines().any(|line| line == "data=journal") => {
            Err(NotEligible::DataJournal)
        }
        // The old ext2 driver has no journal.
        None if direct_align.is_none() && mount.kind != "ext2" => {
            Err(NotEligible::DataJournalUnknown)
        }
        _ => Ok(()),
    }
}

fn check_xfs(subject: &Subject<'_>) -> Result<(), NotEligible> {
    if fs::read_to_string("/sys/fs/xfs/debug/always_cow").is_ok_and(|on| on.trim() != "0") {
        return Err(NotEligible::AlwaysCow);
    }
    check_extended_flags(inode::extended_flags(subject.fd).map_err(unknown("FS_IOC_FSGETXATTR"))?)
}

/// The flags of XFS that refuse a file.
fn check_extended_flags(flags: u32) -> Result<(), NotEligible> {
    if flags & inode::X_REALTIME != 0 {
        let fix = "copy it into a directory without it (xfs_io -c 'chattr -t')";
        return Err(NotEligible::Flag { flag: "realtime", fix });
    }
    if flags & inode::X_DAX != 0 {
        return Err(NotEligible::Flag { flag: "DAX", fix: "xfs_io -c 'chattr -x'" });
    }
    Ok(())
}

/// Whether files can share blocks here, so that FIDEDUPERANGE, which is content with a destination open for reading, may move and free
/// blocks of one (ADR 0008). What cannot be told counts as that.
pub(super) fn shares_blocks(fd: BorrowedFd<'_>) -> bool {
    // The signed word of f_type, as in `filesystem`.
    #[allow(clippy::cast_sign_loss)]
    let magic = rustix::fs::fstatfs(fd).map_or(0, |stat| stat.f_type as u64 & 0xffff_ffff);
    match magic {
        EXT_MAGIC => false,
        XFS_MAGIC => xfs::shares_blocks(fd).unwrap_or(true),
        _ => true,
    }
}

/// Whether the inode still is what it was when direct mode began, as far as flags say that can be set without an open: by
/// file_setattr(2), or through a descriptor that leases do not count.
pub(super) fn check_inode(fd: BorrowedFd<'_>) -> Result<(), NotEligible> {
    check_flags(inode::flags(fd).map_err(unknown("FS_IOC_GETFLAGS"))?)?;
    // ext2/3/4 answer the question as well, and never with either.
    check_extended_flags(inode::extended_flags(fd).map_err(unknown("FS_IOC_FSGETXATTR"))?)
}

/// The inode flags that refuse a file.
fn check_flags(set: u32) -> Result<(), NotEligible> {
    const REFUSED: [(u32, &str, &str); 7] = [
        (inode::IMMUTABLE, "immutable", "chattr -i"),
        (inode::APPEND, "append-only", "chattr -a"),
        (inode::JOURNAL_DATA, "for data journalling", "chattr -j"),
        (inode::ENCRYPT, "encrypted", "copy it into a directory that is not"),
        (inode::VERITY, "sealed by fs-verity", "serve a copy of it"),
        (inode::DAX, "DAX", "chattr -x"),
        (inode::INLINE_DATA, "inline", "enlarge it: truncate -s"),
    ];
    match REFUSED.iter().find(|(bit, ..)| set & bit != 0) {
        Some(&(_, flag, fix)) => Err(NotEligible::Flag { flag, fix }),
        None => Ok(()),
    }
}

/// What is so without a flag of the inode's: a whole filesystem can be mounted with `dax=always`.
fn check_attributes(set: StatxAttributes) -> Result<(), NotEligible> {
    if set.contains(StatxAttributes::DAX) {
        return Err(NotEligible::Flag { flag: "DAX", fix: "mount it without dax=always" });
    }
    Ok(())
}

fn swap(subject: &Subject<'_>) -> Result<(), NotEligible> {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let ours = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (subject.dev, subject.ino))
    };
    if parse_swaps(&swaps).iter().any(ours) { Err(NotEligible::Swap) } else { Ok(()) }
}

/// Where a directory lies, if it can be seen from here.
fn place_of(directory: &Path, mounts: &[Mount]) -> Option<Place> {
    let path = fs::canonicalize(directory).ok()?;
    let statx = rustix::fs::statx(CWD, &path, AtFlags::NO_AUTOMOUNT, StatxFlags::MNT_ID).ok()?;
    let mount = mounts.iter().find(|mount| mount.id == statx.stx_mnt_id)?;
    Place::new(&path, mount)
}

fn overlays(place: &Place, mounts: &[Mount]) -> Result<(), NotEligible> {
    let overlays = mounts.iter().filter(|mount| mount.kind == "overlay");
    for overlay in overlays {
        let Some(named) = overlay.option_path("upperdir") else { continue };
        let below = match place_of(&named, mounts) {
            Some(upper) => place.is_below(&upper),
            // Named from a directory or a namespace that is not ours: whatever ends like it may be it.
            None => place.is_below_any(&named),
        };
        if below {
            return Err(NotEligible::OverlayUpper { overlay: overlay.point.clone() });
        }
    }
    Ok(())
}

fn exports(place: &Place, mounts: &[Mount]) -> Result<(), NotEligible> {
    let threads = fs::read_to_string("/proc/fs/nfsd/threads").unwrap_or_default();
    if threads.trim().parse().unwrap_or(0) == 0 {
        return Ok(());
    }
    // The kernel lists what it was asked for so far; the other two what it would grant.
    for table in ["/proc/fs/nfsd/exports", "/var/lib/nfs/etab", "/etc/exports"] {
        for export in parse_exports(&fs::read_to_string(table).unwrap_or_default()) {
            if place_of(&export, mounts).is_some_and(|exported| place.is_below(&exported)) {
                return Err(NotEligible::NfsExport { export });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_access_that_no_flag_tells_of_refuses() {
        assert!(check_attributes(StatxAttributes::MOUNT_ROOT | StatxAttributes::APPEND).is_ok());
        let set = StatxAttributes::DAX | StatxAttributes::AUTOMOUNT;
        let reason = check_attributes(set).unwrap_err().to_string();
        assert_eq!(reason, "the file is marked DAX; mount it without dax=always");
    }

    #[test]
    fn each_flag_of_the_list_refuses() {
        assert!(check_flags(0).is_ok());
        // FS_EXTENT_FL and FS_NOATIME_FL matter to nobody.
        assert!(check_flags(0x8_0080).is_ok());
        for (flag, name) in [
            (inode::ENCRYPT, "encrypted"),
            (inode::VERITY, "sealed by fs-verity"),
            (inode::DAX, "DAX"),
            (inode::JOURNAL_DATA, "for data journalling"),
        ] {
            let reason = check_flags(0x8_0000 | flag).unwrap_err().to_string();
            assert!(reason.starts_with(&format!("the file is marked {name}; ")), "{reason}");
        }
    }
}
