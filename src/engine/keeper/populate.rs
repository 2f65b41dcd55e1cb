// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--populate all`: the whole map is loaded when direct mode begins, and stays (R7).

use std::collections::BTreeMap;

use super::{Keeper, Ownership};
use crate::engine::message::{JobId, Report};
use crate::engine::units::FileRange;

/// Parts of the map remembered as missing. A guest can punch any number; beyond this they are taken for one.
const PARTS: usize = 1024;
/// Locks passed over at a time on the way to a part that can be loaded.
const LOCKS: usize = 8;

/// What of the map is still to be loaded.
#[derive(Debug, Default)]
pub(super) struct Population {
    /// Nothing is evicted: the map is complete, or will be.
    pub(super) pinned: bool,
    /// It was complete once since direct mode began.
    told: bool,
    /// Where each part begins and ends; they do not touch. Some of it may be cached by now.
    missing: BTreeMap<u64, u64>,
    query: Option<JobId>,
}

impl Population {
    fn add(&mut self, part: FileRange) {
        let (mut start, mut end) = (part.start, part.end);
        while let Some((first, last)) = self.missing.range(..=end).next_back()
            && *last >= start
        {
            (start, end) = (start.min(*first), end.max(*last));
            let first = *first;
            self.missing.remove(&first);
        }
        self.missing.insert(start, end);
        let ends = self.missing.first_key_value().zip(self.missing.last_key_value());
        if self.missing.len() > PARTS
            && let Some(((first, _), (_, last))) = ends
        {
            self.missing = BTreeMap::from([(*first, *last)]);
        }
    }

    /// The first part, or rest of one, from byte `at` on.
    fn from(&self, at: u64) -> Option<FileRange> {
        let before = self.missing.range(..at).next_back().filter(|(_, end)| **end > at);
        let (start, end) = before.or_else(|| self.missing.range(at..).next())?;
        Some(FileRange::new((*start).max(at), *end))
    }

    /// Nothing of `range`, which lies inside one part, is missing.
    fn found(&mut self, range: FileRange) {
        if range.is_empty() {
            return;
        }
        let part = self.missing.range(..=range.start).next_back();
        let Some((start, end)) = part.map(|(start, end)| (*start, *end)) else { return };
        self.missing.remove(&start);
        for (start, end) in [(start, range.start), (range.end, end)] {
            if start < end {
                self.missing.insert(start, end);
            }
        }
    }
}

impl Keeper {
    /// How far the loading of the whole map is, in bytes of the disk and of all of it; `None` when it is not under way.
    #[must_use]
    pub fn populating(&self) -> Option<(u64, u64)> {
        let window = self.config.window;
        let left: u64 = self.population.missing.iter().map(|(start, end)| end - start).sum();
        let under_way = self.population.pinned && left > 0;
        under_way.then(|| (window.len().saturating_sub(left), window.len()))
    }

    /// Direct mode has begun, with nothing cached.
    pub(super) fn populate(&mut self) {
        self.population.missing.clear();
        self.population.pinned = self.config.populate;
        self.population.told = false;
        let block = u64::from(self.config.geometry.fs_block);
        self.miss(self.config.window.round_out(block));
        self.populate_more();
    }

    /// Direct mode ends, and the map with it.
    pub(super) fn depopulate(&mut self) {
        self.population.missing.clear();
    }

    /// `range` is not cached any more; if all is to be, it is loaded again.
    pub(super) fn miss(&mut self, range: FileRange) {
        let block = u64::from(self.config.geometry.fs_block);
        let range = range.intersect(&self.config.window.round_out(block));
        if self.population.pinned && !range.is_empty() {
            self.population.add(range);
        }
    }

    /// Asks for the next part that is missing, one at a time: requests that wait for the map go between.
    pub(super) fn populate_more(&mut self) {
        let population = &self.population;
        let under_way = population.query.is_some_and(|id| self.queries.contains_key(&id));
        if under_way || population.missing.is_empty() || self.ownership != Ownership::Direct {
            return;
        }
        let (mut at, mut locked) = (0, 0);
        while let Some(part) = self.population.from(at) {
            let gap = self.map.first_gap(part);
            let known = gap.map_or(part.end, |gap| gap.start);
            self.population.found(FileRange::new(part.start, known));
            at = part.end;
            let Some(gap) = gap else { continue };
            let lock = self.locks.held().map(|lock| lock.range);
            let lock = lock.filter(|lock| lock.overlaps(&gap)).min_by_key(|lock| lock.start);
            let free = lock.map_or(gap.end, |lock| lock.start);
            if gap.start < free {
                self.population.query = Some(self.query_ahead(FileRange::new(gap.start, free)));
                return;
            }
            // Being written: what becomes of it is known when the lock goes, and then this goes on.
            at = lock.map_or(gap.end, |lock| lock.end);
            locked += 1;
            if locked == LOCKS {
                return;
            }
        }
        if self.population.missing.is_empty() && !std::mem::replace(&mut self.population.told, true)
        {
            self.report(Report::Populated);
        }
    }

    /// The map has outgrown its cap, which counts more than having all of it.
    pub(super) fn unpin(&mut self) {
        if std::mem::take(&mut self.population.pinned) {
            self.population.missing.clear();
            self.report(Report::Unpinned);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(population: &Population) -> Vec<(u64, u64)> {
        population.missing.iter().map(|(start, end)| (*start, *end)).collect()
    }

    #[test]
    fn what_is_missing_is_remembered_once_and_in_bounded_space() {
        let mut population = Population::default();
        for _ in 0..3 {
            for (start, end) in [(30, 40), (10, 20), (50, 60), (20, 30), (12, 18), (39, 50)] {
                population.add(FileRange::new(start, end));
            }
        }
        assert_eq!(parts(&population), [(10, 60)]);
        population.found(FileRange::new(20, 30));
        population.found(FileRange::new(15, 15));
        population.found(FileRange::new(10, 12));
        population.found(FileRange::new(55, 60));
        assert_eq!(parts(&population), [(12, 20), (30, 55)]);
        let from = |at| population.from(at).map(|part| (part.start, part.end));
        assert_eq!(
            [from(0), from(12), from(15), from(20)],
            [(12, 20), (12, 20), (15, 20), (30, 55)].map(Some)
        );
        assert_eq!((from(54), from(55)), (Some((54, 55)), None));
        for part in 0..10 * PARTS as u64 {
            population.add(FileRange::new(100 + 2 * part, 101 + 2 * part));
            assert!(population.missing.len() <= PARTS);
        }
        assert_eq!(population.from(0).map(|part| part.start), Some(12));
        assert_eq!(parts(&population).last().map(|part| part.1), Some(100 + 20 * PARTS as u64 - 1));
    }
}
