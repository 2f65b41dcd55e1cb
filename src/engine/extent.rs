// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The extent map (R7–R11): what is known of where the image's bytes lie.
//!
//! It is a sorted list cut into shared leaves, and the list of those cut into shared branches, so that a
//! copy for the workers costs one pointer per few thousand extents and a change rewrites only the leaf and the
//! branch it touches.

mod branch;
mod leaf;

use std::ops::Range;
use std::sync::Arc;

use super::units::{DeviceOffset, FileRange};
use branch::Branch;
use leaf::{Leaf, place, storable};

/// Extents in a full leaf: 4 KiB of memory to rewrite for a change. Tests have small ones, for trees of
/// many branches.
const LEAF: usize = if cfg!(test) { 4 } else { 256 };
/// Leaves in a full branch: 64 pointers to copy for a change.
const BRANCH: usize = if cfg!(test) { 3 } else { 64 };
/// With so many extents a map is larger than the cache a CPU has to itself.
const LARGE: usize = if cfg!(test) { 8 } else { 20_000 };

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
    branch: usize,
    leaf: usize,
    extent: usize,
}

/// The map. Ranges it has no extent for are *not cached*.
#[derive(Clone, Debug, Default)]
pub struct ExtentMap {
    branches: Vec<Branch>,
    count: usize,
    mapped: u64,
    /// Where eviction goes on (a clock hand over the file).
    hand: u64,
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

    /// The extent that holds byte `at`, if cached; tries the one of `hint` first, then the one behind it, and
    /// leaves the hint where the answer was.
    #[must_use]
    pub fn lookup(&self, at: u64, hint: &mut Hint) -> Option<Extent> {
        if let Some(leaf) = self.branches.get(hint.branch).and_then(|b| b.leaves.get(hint.leaf)) {
            for index in [hint.extent, hint.extent + 1] {
                if let Some(extent) = leaf.get(index)
                    && extent.range.start <= at
                    && at < extent.range.end
                {
                    hint.extent = index;
                    return Some(extent);
                }
            }
        }
        let branch = self.branch(at)?;
        let above = self.branches.get(branch)?;
        let leaf = above.leaf(at)?;
        let found = above.leaves.get(leaf)?;
        let extent = found.find(at)?;
        *hint = Hint { branch, leaf, extent };
        found.get(extent)
    }

    /// Whether [`foresee`](Self::foresee) is worth its while.
    #[must_use]
    pub const fn is_large(&self) -> bool {
        self.count > LARGE
    }

    /// Brings what lookups of these bytes are going to read into the CPU's caches. In a large map each of them waits for memory
    /// twice, once for its leaf and once for its extent; the loads of one such round here do not wait for each other.
    pub fn foresee(&self, bytes: &[u64]) {
        let branches =
            bytes.iter().map(|at| (*at, self.branch(*at).and_then(|b| self.branches.get(b))));
        let mut read = 0;
        for (at, branch) in branches.clone() {
            read ^= branch.map_or(0, |branch| branch.glance(at));
        }
        for (at, branch) in branches {
            let leaf = branch.and_then(|branch| branch.leaves.get(branch.leaf(at)?));
            read ^= leaf.filter(|leaf| leaf.range().has(at)).map_or(0, |leaf| leaf.glance(at));
        }
        std::hint::black_box(read);
    }

    /// The branch that byte `at` lies in, if any does.
    fn branch(&self, at: u64) -> Option<usize> {
        let all = FileRange::new(self.branches.first()?.start, self.branches.last()?.end);
        place(&self.branches, all, at, |branch| branch.start)
    }

    /// The leaf that holds byte `at`, or else the one before it or the first one, and all behind it.
    fn leaves_from(&self, at: u64) -> impl Iterator<Item = &Leaf> {
        let first = self.branches.partition_point(|b| b.start <= at).saturating_sub(1);
        let mut branches = self.branches.get(first..).unwrap_or_default().iter();
        let leaves = branches.next().map_or(&[][..], |branch| &branch.leaves);
        let first = leaves.partition_point(|l| l.start <= at).saturating_sub(1);
        let leaves = leaves.get(first..).unwrap_or_default();
        leaves.iter().chain(branches.flat_map(|branch| branch.leaves.iter()))
    }

    /// Every cached extent that has a byte in `range`, unclipped, in order.
    pub fn overlapping(&self, range: FileRange) -> impl Iterator<Item = Extent> + '_ {
        self.leaves_from(range.start)
            .skip_while(move |leaf| leaf.end <= range.start)
            .take_while(move |leaf| leaf.start < range.end)
            .flat_map(move |leaf| leaf.extents_from(leaf.find(range.start).unwrap_or(0)))
            .take_while(move |extent| extent.range.start < range.end)
            .filter(move |extent| extent.range.overlaps(&range))
    }

    /// All cached extents, in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.leaves_from(0).flat_map(Leaf::extents)
    }

    /// Bytes cached in `Mapped` state.
    #[must_use]
    pub const fn mapped_bytes(&self) -> u64 {
        self.mapped
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
        if range.is_empty() || self.patch(range, extents).is_some() {
            return;
        }
        // What ends where the range begins, or begins where it ends, may merge with what comes in.
        let (low, high) = (range.start.saturating_sub(1), range.end);
        let branches = self.branches_around(low, high);
        let old = self.branches.get(branches.clone()).unwrap_or_default();
        let leaves: Vec<Leaf> = old.iter().flat_map(|b| b.leaves.iter().cloned()).collect();
        // One leaf of margin on both sides, so that small ones grow together again.
        let from = leaves.partition_point(|l| l.start <= low).saturating_sub(2);
        let to = (leaves.partition_point(|l| l.start <= high) + 1).min(leaves.len());
        let touched = leaves.get(from..to).unwrap_or_default();
        let merged = merge(touched, range, extents);
        self.uncount(touched);
        self.count += merged.len();
        self.mapped += merged.iter().map(mapped).sum::<u64>();
        let before = leaves.get(..from).unwrap_or_default().iter().cloned();
        let after = leaves.get(to..).unwrap_or_default().iter().cloned();
        let new = balanced(&merged, LEAF).filter_map(Leaf::of);
        let leaves: Vec<Leaf> = before.chain(new).chain(after).collect();
        let new = balanced(&leaves, BRANCH).filter_map(|leaves| {
            let (start, end) = (leaves.first()?.start, leaves.last()?.end);
            Some(Branch { start, end, leaves: leaves.into() })
        });
        self.branches.splice(branches, new);
    }

    /// The same where it concerns one leaf; `None` if it does not.
    fn patch(&mut self, range: FileRange, extents: &[Extent]) -> Option<()> {
        let low = range.start.checked_sub(1)?;
        let branch = self.branches.partition_point(|b| b.start <= low).checked_sub(1)?;
        let branch = self.branches.get_mut(branch)?;
        let index = branch.leaves.partition_point(|l| l.start <= low).checked_sub(1)?;
        let (leaf, old, new) = branch.leaves.get(index)?.patched(range, extents, LEAF)?;
        // A branch that no copy for the workers shares is not copied.
        *Arc::make_mut(&mut branch.leaves).get_mut(index)? = leaf;
        self.count = self.count + new.len() - old.len();
        let bytes = |list: &[Extent]| list.iter().map(mapped).sum::<u64>();
        self.mapped = self.mapped + bytes(&new) - bytes(&old);
        Some(())
    }

    /// The branches that a change between these bytes touches; with a neighbour or two if they are small, so
    /// that they grow together again.
    fn branches_around(&self, low: u64, high: u64) -> Range<usize> {
        let from = self.branches.partition_point(|b| b.start <= low).saturating_sub(1);
        let to = self.branches.partition_point(|b| b.start <= high).max(from);
        let leaves = |branches: Range<usize>| -> usize {
            self.branches.get(branches).unwrap_or_default().iter().map(|b| b.leaves.len()).sum()
        };
        if leaves(from..to) > BRANCH / 2 {
            return from..to;
        }
        from.saturating_sub(1)..(to + 1).min(self.branches.len())
    }

    fn uncount(&mut self, leaves: &[Leaf]) {
        for extent in leaves.iter().flat_map(Leaf::extents) {
            self.count -= 1;
            self.mapped -= mapped(&extent);
        }
    }

    /// Chooses what to forget so that at most `cap` extents stay: ranges of whole leaves, taken
    /// round robin, few and long, never one that overlaps any of `keep`. The caller removes them (R8).
    pub fn victims(&mut self, cap: usize, keep: &[FileRange]) -> Vec<FileRange> {
        let kept = |range: FileRange| keep.iter().any(|keep| range.overlaps(keep));
        let mut excess = self.count.saturating_sub(cap);
        let mut chosen: Vec<FileRange> = Vec::new();
        let hand = self.hand;
        let rest = self.leaves_from(hand).skip_while(|leaf| leaf.start < hand);
        let round = rest.chain(self.leaves_from(0)).take(self.leaf_count());
        let mut turned = hand;
        for leaf in round.filter(|leaf| !kept(leaf.range())) {
            if excess == 0 {
                break;
            }
            excess = excess.saturating_sub(leaf.extents().count());
            let range = leaf.range();
            turned = range.end;
            match chosen.last_mut() {
                Some(last)
                    if last.end <= range.start && !kept(FileRange::new(last.start, range.end)) =>
                {
                    last.end = range.end;
                }
                _ => chosen.push(range),
            }
        }
        self.hand = turned;
        chosen
    }

    fn leaf_count(&self) -> usize {
        self.branches.iter().map(|branch| branch.leaves.len()).sum()
    }
}

/// The extents of `leaves` outside of `range`, and inside of it the new ones; in order, neighbours merged.
fn merge(leaves: &[Leaf], range: FileRange, extents: &[Extent]) -> Vec<Extent> {
    let left = leaves.iter().take_while(|l| l.start < range.start).flat_map(Leaf::extents);
    let right = leaves.iter().skip_while(|l| l.end <= range.end).flat_map(Leaf::extents);
    let mut merged = Vec::with_capacity(extents.len() + 4 * LEAF);
    join(&mut merged, left, range, extents, right);
    merged
}

/// The same of two lists of extents, of which one reaches to `range` and one goes on behind it.
fn joined(left: &[Extent], range: FileRange, extents: &[Extent], right: &[Extent]) -> Vec<Extent> {
    let mut joined = Vec::with_capacity(extents.len() + 2);
    join(&mut joined, left.iter().copied(), range, extents, right.iter().copied());
    joined
}

fn join(
    into: &mut Vec<Extent>,
    left: impl Iterator<Item = Extent>,
    range: FileRange,
    extents: &[Extent],
    right: impl Iterator<Item = Extent>,
) {
    let (before, after) = (FileRange::new(0, range.start), FileRange::new(range.end, u64::MAX));
    let pieces = left
        .map(|e| e.clip(&before))
        .chain(extents.iter().map(|e| e.clip(&range)))
        .chain(right.map(|e| e.clip(&after)))
        .filter(|e| !e.range.is_empty())
        .map(storable);
    for piece in pieces {
        match into.last_mut() {
            Some(last) if last.joins(&piece) => last.range.end = piece.range.end,
            _ => into.push(piece),
        }
    }
}

/// Cuts a list into parts of at most `most`: one just over that becomes two halves, not a full one and a sliver.
fn balanced<T>(list: &[T], most: usize) -> impl Iterator<Item = &[T]> {
    let parts = list.len().div_ceil(most).max(1);
    list.chunks(list.len().div_ceil(parts).max(1))
}

fn mapped(extent: &Extent) -> u64 {
    if extent.state == State::Mapped { extent.range.len() } else { 0 }
}

#[cfg(test)]
#[path = "extent_tests.rs"]
mod tests;
