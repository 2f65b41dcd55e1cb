// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a block device says of itself.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::{Opcode, opcode};

const BLKBSZGET: Opcode = opcode::read::<usize>(0x12, 112);
const BLKIOMIN: Opcode = opcode::none(0x12, 120);
const BLKIOOPT: Opcode = opcode::none(0x12, 121);
const BLKALIGNOFF: Opcode = opcode::none(0x12, 122);
const BLKGETSIZE64: Opcode = opcode::read::<usize>(0x12, 114);

/// Sizes of a block device, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceFacts {
    /// The whole device.
    pub size: u64,
    /// The unit of addressing.
    pub logical_block: u32,
    /// The unit of its page cache, which a mounted filesystem sets.
    pub cache_block: u32,
    /// The unit it writes without a read-modify-write of its own.
    pub physical_block: u32,
    /// The smallest transfer it likes.
    pub min_io: u32,
    /// The best transfer; 0: it does not say.
    pub opt_io: u32,
    /// Where the first whole physical block begins.
    pub alignment_offset: u32,
}

fn get_u32(fd: BorrowedFd<'_>, request: Opcode) -> io::Result<u32> {
    let mut value = 0_u32;
    let pointer: *mut u32 = &raw mut value;
    // SAFETY: the requests passed here write one int to `pointer`, the local `value`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, pointer) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

fn get_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut value = 0_u64;
    let pointer: *mut u64 = &raw mut value;
    // SAFETY: BLKGETSIZE64 writes one u64 to `pointer`, the local `value`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64 as _, pointer) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Asks the device.
///
/// # Errors
/// ENOTTY: it is none.
pub fn facts(fd: BorrowedFd<'_>) -> io::Result<DeviceFacts> {
    let alignment = get_u32(fd, BLKALIGNOFF)?;
    Ok(DeviceFacts {
        size: get_size(fd)?,
        logical_block: rustix::fs::ioctl_blksszget(fd)?,
        cache_block: get_u32(fd, BLKBSZGET)?,
        physical_block: rustix::fs::ioctl_blkpbszget(fd)?,
        min_io: get_u32(fd, BLKIOMIN)?,
        opt_io: get_u32(fd, BLKIOOPT)?,
        // A stack of devices that do not fit together says -1.
        alignment_offset: if alignment == u32::MAX { 0 } else { alignment },
    })
}
