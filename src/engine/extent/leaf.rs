// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A run of extents in 16 bytes each: only where each begins is kept, for it ends where the next one does.

use std::sync::Arc;

use super::{Extent, State, joined};
use crate::engine::units::{DeviceOffset, FileRange};

/// Places on the device are multiples of a sector, so the lowest bits of one are free to say the state.
const STATE_BITS: u64 = 7;

/// Where an extent begins, or something that is not cached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Mark {
    start: u64,
    /// Place on the device and state; 0: not cached.
    what: u64,
}

// R8: at most 32 bytes each, all told.
const _: () = assert!(size_of::<Mark>() == 16);

impl Mark {
    fn of(extent: &Extent) -> Self {
        let place = extent.device.0 & !STATE_BITS;
        let what = match extent.state {
            State::Mapped => 1 | place,
            State::Hole => 2,
            State::Unwritten => 3,
            State::Shared => 4 | place,
            State::Opaque => 5,
        };
        Self { start: extent.range.start, what }
    }

    fn extent(self, end: u64) -> Option<Extent> {
        let state = match self.what & STATE_BITS {
            1 => State::Mapped,
            2 => State::Hole,
            3 => State::Unwritten,
            4 => State::Shared,
            5 => State::Opaque,
            _ => return None,
        };
        let device = DeviceOffset(self.what & !STATE_BITS);
        Some(Extent { range: FileRange::new(self.start, end), device, state })
    }
}

/// What the map can hold of an extent. Raw access to a place that is no multiple of a sector is impossible anyway.
pub(super) const fn storable(extent: Extent) -> Extent {
    if extent.has_place() && extent.device.0 & STATE_BITS != 0 {
        return Extent { state: State::Opaque, ..extent };
    }
    extent
}

/// The one of `list` that holds byte `at` of `range`, which they share among them in order.
///
/// Guessed from where it would be if all were equally long, a few times, as what is in between becomes smaller: of a map that is larger
/// than the CPU's caches that reads one or two cache lines, where a search by halves reads one for each half and drives as many out.
pub(super) fn place<T>(
    list: &[T],
    range: FileRange,
    at: u64,
    start: impl Fn(&T) -> u64,
) -> Option<usize> {
    /// Guesses that are worth their while: with lengths that differ wildly each may cut off little.
    const GUESSES: usize = 4;
    if list.is_empty() || !range.has(at) {
        return None;
    }
    let (mut low, mut high) = (0, list.len());
    let (mut from, mut to) = (range.start, range.end);
    for _ in 0..GUESSES {
        let guess = low + guess(high - low, FileRange::new(from, to), at);
        let begins = start(list.get(guess)?);
        // What is next to it lies in the same cache line, as a rule.
        if begins > at {
            (high, to) = (guess, begins);
            let before = start(list.get(guess.checked_sub(1)?)?);
            if before <= at {
                return Some(guess - 1);
            }
        } else {
            let Some(next) = list.get(guess + 1).map(&start).filter(|next| *next <= at) else {
                return Some(guess);
            };
            (low, from) = (guess + 1, next);
        }
    }
    Some(low + rank(list.get(low..high)?, at, start).checked_sub(1)?)
}

/// Which of `count` (not 0) that share `range` holds byte `at` of it, if all are equally long.
pub(super) fn guess(count: usize, range: FileRange, at: u64) -> usize {
    let each = (range.len() / count as u64).max(1);
    let ahead = usize::try_from((at - range.start) / each).unwrap_or(usize::MAX);
    ahead.min(count - 1)
}

/// How many of `list`, which is in order of `start`, begin at byte `at` or before.
///
/// In two rounds of loads that do not wait for each other. A binary search waits for each of its loads, and in a map that is
/// larger than the CPU's caches nearly all of them come from memory.
fn rank<T>(list: &[T], at: u64, start: impl Fn(&T) -> u64) -> usize {
    let step = 1 << (list.len().checked_ilog2().unwrap_or(0) / 2);
    let steps = list.iter().step_by(step).filter(|item| start(item) <= at).count();
    let from = steps.saturating_sub(1) * step;
    let rest = list.get(from..list.len().min(from + step)).unwrap_or_default();
    from + rest.iter().filter(|item| start(item) <= at).count()
}

/// At least one extent, and no end of more; shared, never changed.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    /// Where its first extent begins.
    pub(super) start: u64,
    /// Where its last extent ends.
    pub(super) end: u64,
    /// In order. The last one is only the end of the one before.
    marks: Arc<[Mark]>,
}

impl Leaf {
    /// Of extents in order; `None` of none.
    pub(super) fn of(extents: &[Extent]) -> Option<Self> {
        let start = extents.first()?.range.start;
        let mut marks = Vec::with_capacity(extents.len() + 1);
        let mut end = start;
        for extent in extents {
            if extent.range.start > end {
                marks.push(Mark { start: end, what: 0 });
            }
            marks.push(Mark::of(extent));
            end = extent.range.end;
        }
        marks.push(Mark { start: end, what: 0 });
        Some(Self { start, end, marks: marks.into() })
    }

    /// The leaf after `extents` have become all that is known of `range`, and the extents that went for that and those that came. Only
    /// where that concerns no other leaf and leaves this one neither too full (`most` extents) nor so empty that it should grow together with
    /// others. All but a few of its marks are copied as they are, which makes such a change several times cheaper.
    pub(super) fn patched(
        &self,
        range: FileRange,
        extents: &[Extent],
        most: usize,
    ) -> Option<(Self, Vec<Extent>, Vec<Extent>)> {
        let low = range.start.checked_sub(1).filter(|low| *low >= self.start)?;
        if range.end >= self.end {
            return None;
        }
        // What holds the byte before the range, and the one behind it, keeps its outer part: further out nothing changes.
        let (first, last) = (self.find(low)?, self.find(range.end)?);
        let outer = FileRange::new(self.marks.get(first)?.start, self.marks.get(last + 1)?.start);
        let old: Vec<Extent> = (first..=last).filter_map(|index| self.get(index)).collect();
        let new = joined(&old, range, extents, &old);
        let mut marks = Vec::with_capacity(self.marks.len() + 2 * new.len() + 1);
        marks.extend_from_slice(self.marks.get(..first)?);
        let mut end = outer.start;
        for extent in &new {
            if extent.range.start > end {
                marks.push(Mark { start: end, what: 0 });
            }
            marks.push(Mark::of(extent));
            end = extent.range.end;
        }
        if end < outer.end {
            marks.push(Mark { start: end, what: 0 });
        }
        marks.extend_from_slice(self.marks.get(last + 1..)?);
        let count = marks.iter().filter(|mark| mark.what != 0).count();
        let fits = count <= most && (count >= most / 4 || new.len() >= old.len());
        let leaf = Self { marks: marks.into(), ..*self };
        fits.then_some((leaf, old, new))
    }

    /// From its first byte to its last one, what is not cached between them included.
    pub(super) fn range(&self) -> FileRange {
        FileRange::new(self.start, self.end)
    }

    /// The number of the extent, or of the gap, that holds byte `at`, if one does.
    pub(super) fn find(&self, at: u64) -> Option<usize> {
        let (_, marks) = self.marks.split_last()?;
        place(marks, self.range(), at, |mark| mark.start)
    }

    /// What [`find`](Self::find) reads first for byte `at`: a value of no meaning.
    pub(super) fn glance(&self, at: u64) -> u64 {
        let count = self.marks.len() - 1;
        self.marks.get(guess(count, self.range(), at)).map_or(0, |mark| mark.start)
    }

    /// The extent of this number, if it is not a gap.
    pub(super) fn get(&self, index: usize) -> Option<Extent> {
        let end = self.marks.get(index + 1)?.start;
        self.marks.get(index)?.extent(end)
    }

    /// Its extents, in order.
    pub(super) fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents_from(0)
    }

    /// Its extents from this number on, in order.
    pub(super) fn extents_from(&self, index: usize) -> impl Iterator<Item = Extent> + '_ {
        let pairs = self.marks.get(index..).unwrap_or_default().windows(2);
        pairs.filter_map(|pair| match pair {
            [mark, next] => mark.extent(next.start),
            _ => None,
        })
    }
}
