// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From FIEMAP's extents to the map's states (section 4 of the design page).

use crate::engine::extent::{Extent, State};
use crate::engine::units::{DeviceOffset, FileRange};
use crate::sys::fiemap::{self, RawExtent};

/// What an extent must fit to be used raw. All in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The file's size.
    pub file_size: u64,
    /// The device's size.
    pub device_size: u64,
    /// The filesystem's block size.
    pub fs_block: u64,
    /// What the file is written and locked in multiples of: a block, or a page of several (ADR
    /// 0010).
    pub unit: u64,
    /// What raw writes are multiples of.
    pub write_block: u64,
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

/// The extents inside `range` (whole units), in order. What lies between is a hole.
///
/// A unit that lies in more than one extent, or is a hole in part, is opaque: it is written as a
/// whole, through the file, and no part of it may be written raw meanwhile.
#[must_use]
pub fn translate(raw: &[RawExtent], range: FileRange, bounds: &Bounds) -> Vec<Extent> {
    let mut out = Vec::with_capacity(raw.len() + 1);
    let mut done = range.start;
    // The unit the file ends in is only partly ours: what lies behind the end is not.
    let whole = bounds.file_size - bounds.file_size % bounds.unit;
    for extent in raw {
        let exact = FileRange::new(extent.logical, extent.logical + extent.length);
        let state = usable(extent, exact, bounds);
        let rounded = exact.round_out(bounds.unit);
        let inner = match state {
            State::Opaque => FileRange::new(rounded.end, rounded.end),
            _ => exact.intersect(&FileRange::new(0, whole)).round_in(bounds.unit),
        };
        let opaque = |start, end| Extent {
            range: FileRange::new(start, end),
            device: DeviceOffset(0),
            state: State::Opaque,
        };
        let shift = inner.start.saturating_sub(exact.start);
        let device = DeviceOffset(extent.physical).plus(shift);
        let parts = [
            opaque(rounded.start, inner.start),
            Extent { range: inner, device, state },
            opaque(inner.end, rounded.end),
        ];
        for part in parts {
            let part = part.clip(&FileRange::new(done, range.end));
            done = done.max(part.range.end);
            push(&mut out, part);
        }
    }
    out
}

/// What may be done with an extent: nothing raw where it is not what a regular file's extent must
/// be.
fn usable(extent: &RawExtent, exact: FileRange, bounds: &Bounds) -> State {
    let state = state(extent.flags);
    let placed = matches!(state, State::Mapped | State::Shared);
    let aligned =
        exact.aligned(bounds.fs_block) && extent.physical.is_multiple_of(bounds.write_block);
    // Byte 0 of the device belongs to the filesystem itself.
    let inside =
        extent.physical != 0 && extent.physical.saturating_add(extent.length) <= bounds.device_size;
    if aligned && (inside || !placed) { state } else { State::Opaque }
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
