// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From FIEMAP's extents to the map's states (section 4 of the design page).

use crate::engine::extent::{Extent, State};
use crate::engine::units::{DeviceOffset, FileRange};
use crate::sys::fiemap::{self, RawExtent};

/// What an extent must fit to be used raw.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Bytes in the file.
    pub(super) file_size: u64,
    /// Bytes on the device.
    pub(super) device_size: u64,
    /// The filesystem's block size.
    pub(super) fs_block: u64,
    /// What raw writes are multiples of.
    pub(super) write_block: u64,
}

/// What the flags say. A flag this does not know makes the extent opaque.
fn state(flags: u32) -> State {
    const HARMLESS: u32 = fiemap::LAST | fiemap::MERGED;
    match flags & !HARMLESS {
        0 => State::Mapped,
        fiemap::SHARED => State::Shared,
        fiemap::UNWRITTEN => State::Unwritten,
        _ => State::Opaque,
    }
}

/// The extents inside `range` (whole filesystem blocks), in order. What lies between is a hole.
pub(super) fn translate(raw: &[RawExtent], range: FileRange, bounds: &Bounds) -> Vec<Extent> {
    let mut out = Vec::with_capacity(raw.len() + 1);
    let mut done = range.start;
    // The block the file ends in is only partly ours: what lies behind the end is not.
    let whole = bounds.file_size - bounds.file_size % bounds.fs_block;
    for extent in raw {
        let exact = FileRange::new(extent.logical, extent.logical + extent.length);
        let device = DeviceOffset(extent.physical);
        let mut state = state(extent.flags);
        let placed = matches!(state, State::Mapped | State::Shared);
        let aligned =
            exact.aligned(bounds.fs_block) && extent.physical.is_multiple_of(bounds.write_block);
        // Byte 0 of the device belongs to the filesystem itself.
        let inside = extent.physical != 0
            && extent.physical.saturating_add(extent.length) <= bounds.device_size;
        if !aligned || placed && !inside {
            state = State::Opaque;
        }
        let rounded = exact.round_out(bounds.fs_block);
        let shift = exact.start - rounded.start;
        let device = DeviceOffset(device.0.saturating_sub(shift));
        let extent =
            Extent { range: rounded, device, state }.clip(&FileRange::new(done, range.end));
        done = done.max(extent.range.end);
        push(&mut out, extent.clip(&FileRange::new(0, whole)));
        let tail = extent.clip(&FileRange::new(whole, range.end));
        push(&mut out, Extent { state: State::Opaque, ..tail });
    }
    out
}

fn push(out: &mut Vec<Extent>, extent: Extent) {
    if !extent.range.is_empty() {
        out.push(extent);
    }
}

/// `extents` with the holes between them, so that every byte of `range` is in one.
pub(super) fn with_holes(extents: &[Extent], range: FileRange) -> Vec<Extent> {
    let hole = |start, end| Extent {
        range: FileRange::new(start, end),
        device: DeviceOffset(0),
        state: State::Hole,
    };
    let mut out = Vec::with_capacity(extents.len() * 2 + 1);
    let mut done = range.start;
    for extent in extents {
        push(&mut out, hole(done, extent.range.start));
        push(&mut out, *extent);
        done = extent.range.end;
    }
    push(&mut out, hole(done, range.end));
    out
}

#[cfg(test)]
#[path = "extents_tests.rs"]
mod tests;
