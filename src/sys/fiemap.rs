// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! FS_IOC_FIEMAP: where the blocks of a file lie (Documentation/filesystems/fiemap.rst).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::opcode;

/// Most extents one call returns: 28 KiB of buffer.
pub const MAX_EXTENTS: u32 = 512;

/// Write dirty pages back before mapping.
const FLAG_SYNC: u32 = 0x1;

/// The last extent of the file.
pub const LAST: u32 = 0x1;
/// The place is not known.
pub const UNKNOWN: u32 = 0x2;
/// Not allocated yet; comes with [`UNKNOWN`].
pub const DELALLOC: u32 = 0x4;
/// What is on disk is not the data itself.
pub const ENCODED: u32 = 0x8;
/// Encrypted by the filesystem.
pub const DATA_ENCRYPTED: u32 = 0x80;
/// Not aligned to the filesystem's blocks.
pub const NOT_ALIGNED: u32 = 0x100;
/// Mixed with metadata.
pub const DATA_INLINE: u32 = 0x200;
/// Packed together with other files' data.
pub const DATA_TAIL: u32 = 0x400;
/// Allocated, never written; on disk is garbage.
pub const UNWRITTEN: u32 = 0x800;
/// Several of the filesystem's own extents, given as one.
pub const MERGED: u32 = 0x1000;
/// Shared with another file.
pub const SHARED: u32 = 0x2000;

/// `struct fiemap` without its extents.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Abi {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const _: () = assert!(size_of::<Header>() == 32 && size_of::<Abi>() == 56);

#[repr(C)]
struct Buffer {
    header: Header,
    extents: [Abi; MAX_EXTENTS as usize],
}

/// An extent as the kernel tells it; bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RawExtent {
    /// Offset in the file.
    pub logical: u64,
    /// Offset on the filesystem's device, if `flags` do not say otherwise.
    pub physical: u64,
    /// Length; above 0.
    pub length: u64,
    /// The constants of this module.
    pub flags: u32,
}

/// What one call said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// In order, without overlap. They may begin before and end after what was asked for.
    pub extents: Vec<RawExtent>,
    /// Whether it speaks about the whole range; if not, only up to the end of the last extent.
    pub complete: bool,
}

/// A reusable buffer for the ioctl.
pub struct Fiemap {
    buffer: Box<Buffer>,
}

impl std::fmt::Debug for Fiemap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fiemap").finish_non_exhaustive()
    }
}

impl Default for Fiemap {
    fn default() -> Self {
        Self::new()
    }
}

impl Fiemap {
    /// A buffer of [`MAX_EXTENTS`].
    #[must_use]
    pub fn new() -> Self {
        let header = Header { start: 0, length: 0, flags: 0, mapped: 0, count: 0, reserved: 0 };
        let empty = Abi {
            logical: 0,
            physical: 0,
            length: 0,
            reserved64: [0; 2],
            flags: 0,
            reserved: [0; 3],
        };
        Self { buffer: Box::new(Buffer { header, extents: [empty; MAX_EXTENTS as usize] }) }
    }

    /// Asks for `length` bytes of the file from `start`, at most `max` extents (and
    /// [`MAX_EXTENTS`]), after writing dirty pages back (FIEMAP_FLAG_SYNC).
    ///
    /// # Errors
    /// The ioctl's error; [`io::ErrorKind::InvalidData`] if the answer is not in order.
    pub fn query(
        &mut self,
        fd: BorrowedFd<'_>,
        start: u64,
        length: u64,
        max: u32,
    ) -> io::Result<Answer> {
        let count = max.clamp(1, MAX_EXTENTS);
        self.buffer.header =
            Header { start, length, flags: FLAG_SYNC, mapped: 0, count, reserved: 0 };
        let request = opcode::read_write::<Header>(b'f', 11);
        let pointer: *mut Buffer = &raw mut *self.buffer;
        // SAFETY: `pointer` is the whole of `self.buffer`, borrowed mutably for this call; the
        // kernel writes the header and at most `count` extents, which `extents` has room for.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, pointer) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let mapped = self.buffer.header.mapped;
        let said = self
            .buffer
            .extents
            .get(..mapped as usize)
            .filter(|_| mapped <= count)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        check(said, count)
    }
}

/// Checks what the kernel said: nothing behind this looks for nonsense again.
fn check(said: &[Abi], count: u32) -> io::Result<Answer> {
    let mut extents = Vec::with_capacity(said.len());
    let mut end = 0;
    for abi in said {
        let next = abi.logical.checked_add(abi.length);
        let device_end = abi.physical.checked_add(abi.length);
        match (next, device_end) {
            (Some(next), Some(_)) if abi.length > 0 && abi.logical >= end => end = next,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        let Abi { logical, physical, length, flags, .. } = *abi;
        extents.push(RawExtent { logical, physical, length, flags });
    }
    let room = said.len() < count as usize;
    let complete = room || extents.last().is_some_and(|e| e.flags & LAST != 0);
    Ok(Answer { extents, complete })
}

#[cfg(test)]
#[path = "fiemap_tests.rs"]
mod tests;
