// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Inode flags that decide whether a file may be served raw (R5).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::opcode;

/// FS_ENCRYPT_FL: encrypted by the filesystem.
pub const ENCRYPT: u32 = 0x800;
/// FS_IMMUTABLE_FL.
pub const IMMUTABLE: u32 = 0x10;
/// FS_APPEND_FL.
pub const APPEND: u32 = 0x20;
/// FS_JOURNAL_DATA_FL: ext's `chattr +j`.
pub const JOURNAL_DATA: u32 = 0x4000;
/// FS_VERITY_FL.
pub const VERITY: u32 = 0x0010_0000;
/// FS_DAX_FL.
pub const DAX: u32 = 0x0200_0000;
/// FS_INLINE_DATA_FL: the data lie in the inode.
pub const INLINE_DATA: u32 = 0x1000_0000;

/// FS_XFLAG_REALTIME: XFS keeps the data on another device.
pub const X_REALTIME: u32 = 0x1;
/// FS_XFLAG_DAX.
pub const X_DAX: u32 = 0x8000;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct Fsxattr {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

/// FS_IOC_GETFLAGS.
///
/// # Errors
/// ENOTTY or EOPNOTSUPP: the filesystem has none.
pub fn flags(fd: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(rustix::fs::ioctl_getflags(fd)?.bits())
}

/// The flags of FS_IOC_FSGETXATTR.
///
/// # Errors
/// ENOTTY or EOPNOTSUPP: the filesystem has none.
pub fn extended_flags(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut attributes = Fsxattr::default();
    let pointer: *mut Fsxattr = &raw mut attributes;
    let request = opcode::read::<Fsxattr>(b'X', 31);
    // SAFETY: FS_IOC_FSGETXATTR writes one `struct fsxattr` to `pointer`, the local above.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, pointer) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(attributes.flags) }
}
