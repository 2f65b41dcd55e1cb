// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Planning: what a request needs before it may start, and the pieces it moves in (R10, R10a, R11).

use super::Geometry;
use super::extent::{Extent, Hint, State};
use super::shared::{Mode, View};
use super::units::{DeviceOffset, FileRange};

/// Most bytes of one operation; keeps lengths inside `u32` and the kernel's `i32` results.
const MAX_PIECE: u64 = 1 << 30;

/// What has to be arranged with the keeper before any piece of a request may be moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// The map does not know all of it.
    Map,
    /// It writes through the file, or part of a block: the range must be locked.
    Lock,
}

/// How a piece moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// Straight to the device.
    Device(DeviceOffset),
    /// Through the host filesystem.
    File,
    /// No I/O: it reads as zeros.
    Zero,
}

/// A part of a request that moves in one operation, or in a read-modify-write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The guest's bytes.
    pub range: FileRange,
    /// What is transferred: `range`, or the whole block around it.
    pub unit: FileRange,
    /// How. For the device: where `unit` starts.
    pub route: Route,
    /// Whether it goes through a bounce buffer.
    pub bounce: bool,
}

impl Piece {
    /// Whether more is transferred than the guest asked for.
    #[must_use]
    pub fn partial(&self) -> bool {
        self.unit != self.range
    }
}

/// A request's direction and what it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// A write.
    pub write: bool,
    /// What it writes is zeros, from no guest memory.
    pub zeroes: bool,
    /// The keeper has locked its range for it.
    pub locked: bool,
    /// Its guest memory is fit for O_DIRECT; for zeros, which have none: they may be written by
    /// reference ([`Op::Zeroes`](super::Op::Zeroes)).
    pub mem_aligned: bool,
    /// Where it begins in the file: guest memory is counted from there.
    pub base: u64,
    /// Most bytes of one raw operation (R2b); less than a filesystem block counts as one.
    pub longest: u64,
}

impl Access {
    /// Zeros are to be written where zeros are read anyway.
    const fn is_there(&self, state: State) -> bool {
        self.zeroes && matches!(state, State::Hole | State::Unwritten)
    }
}

/// The first piece of `rest`, the part of a request still to be planned, or what that needs before it may start. A piece is
/// never empty unless `rest` is.
///
/// # Errors
/// What has to be arranged.
pub fn next(
    view: &View,
    g: &Geometry,
    access: Access,
    rest: FileRange,
    hint: &mut Hint,
) -> Result<Piece, Need> {
    let extent = match view.mode {
        Mode::Filesystem => Some(opaque(rest)),
        Mode::Direct => view.map.lookup(rest.start, hint),
    };
    if let Some(need) = need(view, g, access, rest, extent, hint) {
        return Err(need);
    }
    let gap = || opaque(view.map.first_gap(rest).unwrap_or(rest));
    Ok(first_piece(g, access, rest, &extent.unwrap_or_else(gap)))
}

/// What `rest`, which begins in `first` if that is cached, needs.
///
/// Under a lock a write needs nothing more: what is not cached then is written through the file, which
/// is right wherever the blocks are, because nobody else can have them mapped raw.
fn need(
    view: &View,
    g: &Geometry,
    access: Access,
    rest: FileRange,
    first: Option<Extent>,
    hint: &mut Hint,
) -> Option<Need> {
    if access.write && access.locked {
        return None;
    }
    if view.mode == Mode::Filesystem {
        let whole = file_unit(g, rest, u64::from(g.fs_block)) == rest;
        return (access.write && !whole).then_some(Need::Lock);
    }
    let Some(mut extent) = first else { return Some(Need::Map) };
    if !access.write {
        // A read goes piece by piece, whatever comes later: were all of it looked at before each piece, a guest could
        // keep a worker busy for seconds with one long read of many small extents.
        return None;
    }
    let mut lock = !rest.aligned(u64::from(g.write_block));
    loop {
        lock |= !(extent.state == State::Mapped || access.is_there(extent.state));
        if extent.range.end >= rest.end {
            return lock.then_some(Need::Lock);
        }
        let Some(next) = view.map.lookup(extent.range.end, hint) else { return Some(Need::Map) };
        extent = next;
    }
}

/// The first piece of `rest`, whose needs are met, and which begins in `extent`.
fn first_piece(g: &Geometry, access: Access, rest: FileRange, extent: &Extent) -> Piece {
    let run = rest.intersect(&extent.range);
    let run = FileRange::new(run.start, run.end.min(run.start + MAX_PIECE));
    match (extent.state, access.write) {
        (State::Mapped, _) | (State::Shared, false) => {
            let run = at_most(run, access.longest, u64::from(g.fs_block));
            let block = if access.write { g.write_block } else { g.dev_block };
            let unit = unit_of(run, u64::from(block), u64::MAX);
            // The keeper caches whole blocks only, so a block lies in one extent. Were it ever
            // otherwise, the file knows better than an extrapolated address.
            let inside = extent.range.contains(&unit);
            debug_assert!(inside, "{unit:?} reaches out of {extent:?}");
            let route = if inside { Route::Device(extent.place(unit.start)) } else { Route::File };
            cut(g, access, run, unit, route)
        }
        (state @ (State::Hole | State::Unwritten), write) if !write || access.is_there(state) => {
            Piece { range: run, unit: run, route: Route::Zero, bounce: false }
        }
        (_, write) => {
            let block = u64::from(if write { g.fs_block } else { g.file_align });
            let mut unit = unit_of(run, block, reach(g));
            if access.zeroes && unit.len() > block {
                // The end of a file inside a block is written on its own.
                unit.end &= !(block - 1);
            }
            cut(g, access, run, unit, Route::File)
        }
    }
}

/// The beginning of `run`, of no more than `longest` bytes but at least to the end of its first
/// block; ends with a block unless it is all of `run`.
fn at_most(run: FileRange, longest: u64, block: u64) -> FileRange {
    let end = run.start.saturating_add(longest) & !(block - 1);
    let least = (run.start & !(block - 1)).saturating_add(block);
    FileRange::new(run.start, run.end.min(end.max(least)))
}

const fn opaque(range: FileRange) -> Extent {
    Extent { range, device: DeviceOffset(0), state: State::Opaque }
}

/// Where O_DIRECT can reach to. The bytes behind it, of a file that ends inside a sector, no guest sees.
const fn reach(g: &Geometry) -> u64 {
    g.file_size - g.file_size % g.file_align as u64
}

/// `range` rounded out to blocks, but not past the end of the file.
#[must_use]
pub fn file_unit(g: &Geometry, range: FileRange, block: u64) -> FileRange {
    let unit = range.round_out(block);
    FileRange::new(unit.start, unit.end.min(reach(g).max(range.end)))
}

/// What to transfer first for `run`: its whole blocks if it starts with one, else the block its
/// start lies in. The last block of a file may be cut short at `end`.
fn unit_of(run: FileRange, block: u64, end: u64) -> FileRange {
    let first = FileRange::new(run.start, run.start + 1).round_out(block);
    let first = FileRange::new(first.start, first.end.min(end.max(run.end)));
    if run.start > first.start || run.end < first.end {
        return first;
    }
    if run.end == end {
        return run;
    }
    FileRange::new(run.start, (run.end & !(block - 1)).max(first.end))
}

/// The piece of `run` that transferring `unit` moves; cut to a bounce buffer if it needs one.
fn cut(g: &Geometry, access: Access, run: FileRange, unit: FileRange, route: Route) -> Piece {
    let range = unit.intersect(&run);
    if range != unit {
        return Piece { range, unit, route, bounce: true };
    }
    // A piece behind an odd head begins at an odd place of memory whose own beginning is even.
    let at = range.start.saturating_sub(access.base);
    let fits = if access.zeroes {
        matches!(route, Route::Device(_)) || unit.aligned(u64::from(g.fs_block))
    } else {
        (at | range.len()).is_multiple_of(u64::from(g.mem_align))
    };
    if access.mem_aligned && fits {
        return Piece { range, unit, route, bounce: false };
    }
    let end = range.end.min(range.start + u64::from(g.bounce_bytes));
    let range = FileRange::new(range.start, end);
    Piece { range, unit: range, route, bounce: true }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
