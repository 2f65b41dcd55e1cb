// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The extent map (R7–R11): what is known of where the image's bytes lie.
//!
//! It is a sorted list cut into shared chunks, so that a copy for the workers costs one pointer
//! per few hundred extents and a change rewrites only the chunks it touches.

use std::sync::Arc;

use super::units::{DeviceOffset, FileRange};

/// Extents in a full chunk: 8 KiB of memory to rewrite for a change.
const CHUNK: usize = 256;

/// What a range of the file is, as far as raw access goes (section 4 of the design page).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Written blocks that are ours alone: raw reads and writes.
    Mapped,
    /// No blocks: reads are zeros, writes go through the file.
    Hole,
    /// Allocated and never written; on disk is garbage. Reads are zeros, writes go through the file.
    Unwritten,
    /// Blocks shared with another file: raw reads, writes go through the file.
    Shared,
    /// Anything else: everything goes through the file.
    Opaque,
}

/// A run of bytes in one state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Extent {
    /// Where in the file.
    pub range: FileRange,
    /// Where its first byte is on the device; meaningful for `Mapped` and `Shared` only.
    pub device: DeviceOffset,
    /// What it is.
    pub state: State,
}

// R8: at most 32 bytes each.
const _: () = assert!(size_of::<Extent>() <= 32);

impl Extent {
    /// The part of it inside `range`; empty if there is none.
    #[must_use]
    pub fn clip(&self, range: &FileRange) -> Self {
        let part = self.range.intersect(range);
        Self {
            range: part,
            device: self.device.plus(part.start.saturating_sub(self.range.start)),
            state: self.state,
        }
    }

    /// Where byte `at` of the file lies on the device, for a state that has a place.
    #[must_use]
    pub const fn place(&self, at: u64) -> DeviceOffset {
        self.device.plus(at - self.range.start)
    }

    const fn has_place(&self) -> bool {
        matches!(self.state, State::Mapped | State::Shared)
    }

    /// Whether `next` goes on where this one ends, in the file and on the device.
    fn joins(&self, next: &Self) -> bool {
        self.state == next.state
            && self.range.end == next.range.start
            && (!self.has_place() || self.device.plus(self.range.len()) == next.device)
    }
}

/// Where the last lookup was answered from; a worker keeps one per queue.
#[derive(Clone, Copy, Default, Debug)]
pub struct Hint {
    chunk: usize,
    extent: usize,
}

#[derive(Clone, Debug)]
struct Chunk {
    /// Start of its first extent.
    start: u64,
    /// Never empty.
    extents: Arc<[Extent]>,
}

/// The map. Ranges it has no extent for are *not cached*.
#[derive(Clone, Debug, Default)]
pub struct ExtentMap {
    chunks: Vec<Chunk>,
    count: usize,
    /// Where eviction goes on (a clock hand over the chunks).
    hand: usize,
}

impl ExtentMap {
    /// An empty map: nothing cached.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many extents are cached.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether nothing is cached.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The extent that holds byte `at`, if cached; tries `hint` first and leaves it where the
    /// answer was.
    #[must_use]
    pub fn lookup(&self, at: u64, hint: &mut Hint) -> Option<Extent> {
        if let Some(extent) = self.chunks.get(hint.chunk).and_then(|c| c.extents.get(hint.extent))
            && extent.range.start <= at
            && at < extent.range.end
        {
            return Some(*extent);
        }
        let chunk = self.chunks.partition_point(|c| c.start <= at).checked_sub(1)?;
        let extents = &self.chunks.get(chunk)?.extents;
        let index = extents.partition_point(|e| e.range.start <= at).checked_sub(1)?;
        let extent = extents.get(index)?;
        *hint = Hint { chunk, extent: index };
        (at < extent.range.end).then_some(*extent)
    }

    /// Every cached extent that has a byte in `range`, unclipped, in order.
    pub fn overlapping(&self, range: FileRange) -> impl Iterator<Item = Extent> + '_ {
        let first = self.chunks.partition_point(|c| c.start <= range.start).saturating_sub(1);
        self.chunks
            .iter()
            .skip(first)
            .take_while(move |c| c.start < range.end)
            .flat_map(|c| c.extents.iter().copied())
            .filter(move |e| e.range.overlaps(&range))
    }

    /// All cached extents, in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.chunks.iter().flat_map(|c| c.extents.iter().copied())
    }

    /// Bytes cached in `Mapped` state.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.iter().filter(|e| e.state == State::Mapped).map(|e| e.range.len()).sum()
    }

    /// The first stretch of `range` that is not cached, or `None` if all of it is.
    #[must_use]
    pub fn first_gap(&self, range: FileRange) -> Option<FileRange> {
        let mut at = range.start;
        for extent in self.overlapping(range) {
            if extent.range.start > at {
                return Some(FileRange::new(at, extent.range.start));
            }
            at = extent.range.end;
            if at >= range.end {
                return None;
            }
        }
        (at < range.end).then(|| FileRange::new(at, range.end))
    }

    /// Forgets `range`; extents across its ends keep their outer parts.
    pub fn remove(&mut self, range: FileRange) {
        self.replace(range, &[]);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Makes `extents` all that is known of `range`. They must be in order and are clipped to it;
    /// empty ones are dropped and neighbours that go on one another are merged.
    pub fn replace(&mut self, range: FileRange, extents: &[Extent]) {
        if range.is_empty() {
            return;
        }
        // One chunk of margin on both sides, so that merging with the neighbours is seen and
        // small chunks grow together again.
        let from = self.chunks.partition_point(|c| c.start <= range.start).saturating_sub(1);
        let from = from.saturating_sub(1);
        let to = (self.chunks.partition_point(|c| c.start <= range.end) + 1).min(self.chunks.len());
        let mut merged: Vec<Extent> = Vec::with_capacity(extents.len() + 2 * CHUNK);
        let old: Vec<Extent> =
            self.chunks.drain(from..to).flat_map(|c| c.extents.to_vec()).collect();
        self.count -= old.len();
        let before = FileRange::new(0, range.start);
        let after = FileRange::new(range.end, u64::MAX);
        let pieces = old
            .iter()
            .map(|e| e.clip(&before))
            .chain(extents.iter().map(|e| e.clip(&range)))
            .chain(old.iter().map(|e| e.clip(&after)))
            .filter(|e| !e.range.is_empty());
        for piece in pieces {
            match merged.last_mut() {
                Some(last) if last.joins(&piece) => last.range.end = piece.range.end,
                _ => merged.push(piece),
            }
        }
        self.count += merged.len();
        // Balanced chunks: a list just over the limit becomes two halves, not a full and a sliver.
        let parts = merged.len().div_ceil(CHUNK).max(1);
        let size = merged.len().div_ceil(parts).max(1);
        let chunks = merged.chunks(size).filter_map(|extents| {
            Some(Chunk { start: extents.first()?.range.start, extents: extents.into() })
        });
        self.chunks.splice(from..from, chunks);
    }

    /// Chooses what to forget so that at most `cap` extents stay: ranges of whole chunks, taken
    /// round robin, never one that overlaps any of `keep`. The caller removes them (R8).
    pub fn victims(&mut self, cap: usize, keep: &[FileRange]) -> Vec<FileRange> {
        let mut excess = self.count.saturating_sub(cap);
        let mut chosen = Vec::new();
        for _ in 0..self.chunks.len() {
            if excess == 0 {
                break;
            }
            self.hand = if self.hand + 1 < self.chunks.len() { self.hand + 1 } else { 0 };
            let Some(chunk) = self.chunks.get(self.hand) else { break };
            let end = chunk.extents.last().map_or(chunk.start, |e| e.range.end);
            let range = FileRange::new(chunk.start, end);
            if !keep.iter().any(|keep| range.overlaps(keep)) {
                excess = excess.saturating_sub(chunk.extents.len());
                chosen.push(range);
            }
        }
        chosen
    }
}

#[cfg(test)]
#[path = "extent_tests.rs"]
mod tests;
