// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an XFS says of itself.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::opcode;

/// XFS_FSOP_GEOM_FLAGS_REFLINK: files may share blocks.
const REFLINK: u32 = 1 << 20;

/// `struct xfs_fsop_geom_v4`: its size is part of the request's number.
#[repr(C)]
#[derive(Default)]
struct Geometry {
    /// From `blocksize` to `imaxpct`.
    sizes: [u32; 8],
    /// From `datablocks` to `logstart`.
    blocks: [u64; 4],
    uuid: [u8; 16],
    stripe: [u32; 2],
    version: i32,
    flags: u32,
    /// From `logsectsize` to `logsunit`.
    rest: [u32; 4],
}

/// Whether the filesystem of this file can have files share blocks. It is decided by mkfs, and not
/// changed while it is mounted.
///
/// # Errors
/// The kernel's: ENOTTY if it is no XFS.
pub fn shares_blocks(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut geometry = Geometry::default();
    let pointer: *mut Geometry = &raw mut geometry;
    let request = opcode::read::<Geometry>(b'X', 124);
    // SAFETY: XFS_IOC_FSGEOMETRY_V4 writes one `struct xfs_fsop_geom_v4` to `pointer`, the local
    // above.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, pointer) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(geometry.flags & REFLINK != 0) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_request_has_the_number_of_the_kernels_header() {
        assert_eq!(size_of::<Geometry>(), 112);
        assert_eq!(std::mem::offset_of!(Geometry, flags), 92);
        assert_eq!(opcode::read::<Geometry>(b'X', 124), 0x8070_587c);
    }

    #[test]
    fn a_file_elsewhere_is_an_error() {
        let file = std::fs::File::open("/proc/self/maps").unwrap();
        assert!(shares_blocks(file.as_fd()).is_err());
    }
}
