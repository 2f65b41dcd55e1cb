// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block device below a filesystem: found by number, opened, and checked to be that one.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, major, minor, open};

use crate::sys::blockdev::{self, DeviceFacts};
use crate::sys::fd::set_io_flags;

/// An open block device.
#[derive(Debug)]
pub(super) struct Device {
    /// Opened O_DIRECT.
    pub(super) fd: OwnedFd,
    /// Its node.
    pub(super) path: PathBuf,
    /// Its sizes.
    pub(super) facts: DeviceFacts,
}

/// Opens the device with this number.
///
/// # Errors
/// The path tried (empty if none was found) and why it will not do.
pub(super) fn open_number(number: u64, read_only: bool) -> Result<Device, (PathBuf, io::Error)> {
    let path = node(number).map_err(|error| (PathBuf::new(), error))?;
    let fail = |error: io::Error| (path.clone(), error);
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let fd = open(&path, flags, Mode::empty()).map_err(|error| fail(error.into()))?;
    let stat = rustix::fs::fstat(&fd).map_err(|error| fail(error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice || stat.st_rdev != number {
        return Err(fail(io::Error::other("the node is another device's")));
    }
    // O_NONBLOCK was for opening only: io_uring would return EAGAIN for it.
    set_io_flags(&fd, access | OFlags::DIRECT).map_err(|error| fail(error.into()))?;
    let facts = blockdev::facts(fd.as_fd()).map_err(fail)?;
    Ok(Device { fd, path, facts })
}

/// `/sys/dev/block/MAJOR:MINOR`.
fn sysfs(number: u64) -> PathBuf {
    Path::new("/sys/dev/block").join(format!("{}:{}", major(number), minor(number)))
}

/// The node udev or devtmpfs made for it.
fn node(number: u64) -> io::Result<PathBuf> {
    let uevent = fs::read_to_string(sysfs(number).join("uevent"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| io::Error::other("sysfs names no device node"))?;
    Ok(Path::new("/dev").join(name))
}

/// What the kernel calls it, as `sda1`: the name of its directories under `/proc/fs`.
pub(super) fn kernel_name(number: u64) -> io::Result<String> {
    let target = fs::read_link(sysfs(number))?;
    let name = target.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| io::Error::other("sysfs has no name for the device"))
}

/// Whether the filesystem sits on no device of its own (btrfs, overlayfs, NFS, tmpfs, …).
pub(super) fn is_anonymous(number: u64) -> bool {
    major(number) == 0
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
