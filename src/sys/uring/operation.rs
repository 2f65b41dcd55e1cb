// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From an [`Op`](crate::engine::Op) to a submission queue entry.

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{opcode, squeue};

use super::pinned::Pinned;
use super::setup;
use crate::engine::io::Target;
use crate::engine::units::DeviceOffset;
use crate::sys::buffer::{Span, Spans};

/// The image's place among the fixed files.
const IMAGE: Fixed = Fixed(0);
/// The device's.
const DEVICE: Fixed = Fixed(setup::DEVICE);
/// The kernel's UIO_MAXIOV. A longer list is cut there, which looks like any short transfer.
const MAX_IOVECS: usize = 1024;

/// Which way data goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// From the target to memory.
    Read,
    /// From memory to the target.
    Write,
}

/// A transfer of `len` bytes between `target` and the memory that `spans` yields. `iovecs` is the
/// operation's own list: it must stay as it is until the operation completes. Memory that is `pinned` is named by its buffer.
///
/// `None` if the target is the device and there is none (`device`), or if the range ends beyond
/// what file offsets can say. That includes `u64::MAX`, which io_uring would take for "wherever the
/// file position is".
pub(super) fn transfer(
    way: Way,
    target: Target,
    len: u32,
    device: bool,
    mut spans: Spans<'_>,
    pinned: Option<&Pinned>,
    iovecs: &mut Vec<libc::iovec>,
) -> Option<squeue::Entry> {
    let (file, offset) = match target {
        Target::Image(offset) => (IMAGE, offset),
        Target::Device(offset) => (device.then_some(DEVICE)?, offset.0),
    };
    in_range(offset, len)?;
    let single = spans.single().and_then(|span| Some((span, u32::try_from(span.len).ok()?)));
    if let Some((span @ Span { base, .. }, len)) = single {
        let buffer = pinned.and_then(|pinned| pinned.buffer_of(span));
        return Some(match (way, buffer) {
            (Way::Read, Some(buffer)) => {
                opcode::ReadFixed::new(file, base, len, buffer).offset(offset).build()
            }
            (Way::Write, Some(buffer)) => {
                opcode::WriteFixed::new(file, base, len, buffer).offset(offset).build()
            }
            (Way::Read, None) => opcode::Read::new(file, base, len).offset(offset).build(),
            (Way::Write, None) => opcode::Write::new(file, base, len).offset(offset).build(),
        });
    }
    iovecs.clear();
    iovecs.extend(
        spans
            .by_ref()
            .take(MAX_IOVECS)
            .map(|span| libc::iovec { iov_base: span.base.cast(), iov_len: span.len }),
    );
    let (list, count) = (iovecs.as_ptr(), u32::try_from(iovecs.len()).ok()?);
    let buffer = pinned.and_then(|pinned| pinned.buffer_of_all(iovecs));
    Some(match (way, buffer) {
        (Way::Read, Some(buffer)) => {
            opcode::ReadvFixed::new(file, list, count, buffer).offset(offset).build()
        }
        (Way::Write, Some(buffer)) => {
            opcode::WritevFixed::new(file, list, count, buffer).offset(offset).build()
        }
        (Way::Read, None) => opcode::Readv::new(file, list, count).offset(offset).build(),
        (Way::Write, None) => opcode::Writev::new(file, list, count).offset(offset).build(),
    })
}

/// Zeros over `len` bytes of `target`, whose blocks stay. Of a device under a mounted filesystem the
/// kernel does it without disturbing the other pages it caches of it.
///
/// `None` as for [`transfer`].
pub(super) fn zeroes(target: Target, len: u32, device: bool) -> Option<squeue::Entry> {
    let (file, offset) = match target {
        Target::Image(offset) => (IMAGE, offset),
        Target::Device(offset) => (device.then_some(DEVICE)?, offset.0),
    };
    in_range(offset, len)?;
    let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    Some(opcode::Fallocate::new(file, u64::from(len)).offset(offset).mode(mode).build())
}

/// `fdatasync` of the whole image.
pub(super) fn sync_image() -> squeue::Entry {
    opcode::Fsync::new(IMAGE).flags(FsyncFlags::DATASYNC).build()
}

/// A flush of the device's cache that writes back only what the host's page cache holds of
/// `offset..offset + len`: a full fsync would push out the host filesystem's own dirty blocks (R14).
///
/// `None` if there is no device, or the range is empty or ends beyond what file offsets can say.
pub(super) fn sync_device(offset: DeviceOffset, len: u32, device: bool) -> Option<squeue::Entry> {
    in_range(offset.0, len)?;
    // The kernel's range includes the byte at offset + len, and takes a range that ends at 0 for
    // everything. So: one less, but never a range that ends at 0.
    let last = len.checked_sub(1)?;
    let len = if offset.0 == 0 { last.max(1) } else { last };
    let entry = opcode::Fsync::new(device.then_some(DEVICE)?).offset(offset.0).len(len);
    Some(entry.flags(FsyncFlags::DATASYNC).build())
}

fn in_range(offset: u64, len: u32) -> Option<()> {
    i64::try_from(offset.checked_add(u64::from(len))?).ok().map(|_| ())
}
