// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `check` answers: can this image be served direct, and if not, why and what helps.

use std::fs;
use std::os::fd::BorrowedFd;

use rustix::fs::{fstat, major, minor};
use serde::{Deserialize, Serialize};

use crate::engine::keeper::Start;
use crate::engine::message::{Job, JobDone, Refusal};
use crate::engine::units::FileRange;
use crate::image::Image;
use crate::sys::page_cache;

/// The verdict on an image.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Check {
    /// Path of the image.
    pub image: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Type of the filesystem it is on, or `block device`.
    pub filesystem: String,
    /// The block device raw I/O would go to.
    pub device: Option<String>,
    /// `held` by the daemon asked, `granted` to this check, `refused`, or `none` if not tried.
    pub lease: String,
    /// Sizes in bytes.
    pub alignment: Alignment,
    /// Pages of the image in the page cache; direct mode needs none (R3).
    pub cached_pages: Option<u64>,
    /// `direct` or `filesystem`.
    pub verdict: String,
    /// Why.
    pub reason: String,
    /// What to do about it, if anything.
    pub fix: Option<String>,
}

/// Sizes in bytes that offsets and lengths must be multiples of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Alignment {
    /// The filesystem's block.
    pub filesystem_block: u32,
    /// The device's logical block.
    pub device_block: u32,
    /// What raw writes are multiples of: the block of the device's page cache.
    pub raw_write: u32,
    /// O_DIRECT through the file.
    pub file: u32,
    /// Memory used for O_DIRECT.
    pub memory: u32,
}

/// Mode and lease, as whoever asks for the check knows them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ownership {
    /// Direct mode is on, or could be.
    pub direct: bool,
    /// See [`Check::lease`].
    pub lease: &'static str,
    /// Why; what follows the first semicolon says what helps.
    pub reason: String,
}

impl Ownership {
    /// Tries what a daemon would, with `--read-only` or without: takes the lease and empties the
    /// page cache, and gives the lease back. `image` is open for reading only in both cases, so
    /// that looking changes nothing.
    #[must_use]
    pub fn try_out(image: &Image, read_only: bool) -> Self {
        let said = |direct, lease, reason: &str| Self { direct, lease, reason: reason.to_owned() };
        if let Some(reason) = image.not_eligible() {
            return said(false, "none", &reason.to_string());
        }
        match image.start() {
            Start::Identity => said(true, "none", "a block device of our own"),
            Start::Filesystem => said(false, "none", "filesystem mode was asked for"),
            Start::Eligible if !read_only && in_use(image) => {
                said(false, "refused", refusal(Refusal::Busy))
            }
            Start::Eligible => {
                let done = image.run(&Job::Enter);
                image.drop_lease();
                match done {
                    JobDone::Enter(Err(Refusal::Busy)) => said(
                        false,
                        "refused",
                        if read_only { busy(image) } else { refusal(Refusal::Busy) },
                    ),
                    JobDone::Enter(Err(other)) => said(false, "granted", refusal(other)),
                    _ if read_only && !image.is_alone_read_only() => {
                        said(true, "granted", "nobody has the file open for writing")
                    }
                    _ => said(true, "granted", "nobody else has the file open"),
                }
            }
        }
    }
}

/// Whether somebody else has the file open, if only for reading. Other errors come again when the
/// lease is taken.
fn in_use(image: &Image) -> bool {
    image.try_write_lease().is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
}

/// Why an image that another process has open is not direct, and what helps: a second instance is no reason for those that may share.
#[must_use]
pub fn busy(image: &Image) -> &'static str {
    if image.is_alone_read_only() {
        "another process has the image open, and where files can share blocks, as on this filesystem, even one that only reads can have them moved; end it, or put the image on ext4 or an XFS without reflink (mkfs.xfs -m reflink=0), where read-only instances share direct mode"
    } else {
        refusal(Refusal::Busy)
    }
}

/// Why direct mode could not be entered, and what helps.
#[must_use]
pub const fn refusal(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Busy => {
            "another process has the image open; end it, or wait until it closes the file"
        }
        Refusal::Unseen => {
            "extentd cannot see the descriptors of all processes, and by one for ioctls only blocks of the image could be moved on this filesystem; add CAP_SYS_PTRACE to CapabilityBoundingSet= (for another user than root to AmbientCapabilities= too) and leave it the host's /proc and pid namespace (no ProtectProc=, PrivatePIDs=), or put the image on ext4 or an XFS without reflink (mkfs.xfs -m reflink=0)"
        }
        Refusal::PagesCached => {
            "pages of the image stay in the page cache; end the process that maps or locks them"
        }
        Refusal::Changed => {
            "the file was changed by another process while it was served; restart extentd"
        }
        Refusal::Mismatch => {
            "raw reads differ from reads through the file; check the device below the filesystem"
        }
        Refusal::Unsynced(_) => "the disk failed to take what was written; see the kernel log",
        Refusal::Failed(_) => "the lease or the page cache could not be had; see the log",
    }
}

/// Looks at the image. May block in the filesystem.
#[must_use]
pub fn look(image: &Image, ownership: &Ownership) -> Check {
    let geometry = image.geometry();
    let (reason, fix) = match ownership.reason.split_once("; ") {
        Some((reason, fix)) => (reason.to_owned(), Some(fix.to_owned())),
        None => (ownership.reason.clone(), None),
    };
    let cached = page_cache::pages(image.image_fd(), FileRange::new(0, geometry.file_size));
    Check {
        image: image.path().display().to_string(),
        size_bytes: geometry.file_size,
        filesystem: match image.start() {
            Start::Identity => "block device".to_owned(),
            _ => filesystem(image.image_fd()),
        },
        device: image.device_path().map(|path| path.display().to_string()),
        lease: ownership.lease.to_owned(),
        alignment: Alignment {
            filesystem_block: image.fs_block(),
            device_block: geometry.dev_block,
            raw_write: geometry.write_block,
            file: geometry.file_align,
            memory: geometry.mem_align,
        },
        cached_pages: cached.ok().map(|pages| pages.cached),
        verdict: mode_name(ownership.direct).to_owned(),
        reason,
        fix,
    }
}

/// The mode's name in outputs.
#[must_use]
pub const fn mode_name(direct: bool) -> &'static str {
    if direct { "direct" } else { "filesystem" }
}

/// Type of the filesystem a file is on.
fn filesystem(fd: BorrowedFd<'_>) -> String {
    let unknown = || "unknown".to_owned();
    let Ok(stat) = fstat(fd) else { return unknown() };
    let device = format!("{}:{}", major(stat.st_dev), minor(stat.st_dev));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    type_in(&mounts, &device).map_or_else(unknown, str::to_owned)
}

/// `36 35 98:0 /root /mount options … - type source options` (proc_pid_mountinfo(5)).
fn type_in<'a>(mounts: &'a str, device: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let same = mount.split(' ').nth(2) == Some(device);
        same.then(|| source.split(' ').next()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::type_in;

    #[test]
    fn the_filesystem_is_found_by_its_device() {
        let mounts = "22 1 0:20 / /proc rw,nosuid shared:12 - proc proc rw\n\
                      36 35 254:1 /a /b rw - ext4 /dev/vda1 rw\n";
        assert_eq!(type_in(mounts, "254:1"), Some("ext4"));
        assert_eq!(type_in(mounts, "254:11"), None);
        assert_eq!(type_in("", "254:1"), None);
    }
}
