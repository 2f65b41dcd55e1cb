// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--populate all`: the whole map is loaded when direct mode begins, and stays (R7).

use std::collections::VecDeque;

use super::{Keeper, Ownership};
use crate::engine::message::{JobId, Report};
use crate::engine::units::FileRange;

/// What of the map is still to be loaded.
#[derive(Debug, Default)]
pub(super) struct Population {
    /// Nothing is evicted: the map is complete, or will be.
    pub(super) pinned: bool,
    missing: VecDeque<FileRange>,
    query: Option<JobId>,
}

impl Keeper {
    /// How far the loading of the whole map is, in bytes of the disk and of all of it; `None` when it is not under way.
    #[must_use]
    pub fn populating(&self) -> Option<(u64, u64)> {
        let window = self.config.window;
        let left: u64 = self.population.missing.iter().map(FileRange::len).sum();
        let under_way = self.population.pinned && left > 0;
        under_way.then(|| (window.len().saturating_sub(left), window.len()))
    }

    /// Direct mode has begun, with nothing cached.
    pub(super) fn populate(&mut self) {
        self.population.missing.clear();
        self.population.pinned = self.config.populate;
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
            self.population.missing.push_back(range);
        }
    }

    /// Asks for the next part that is missing, one at a time: requests that wait for the map go between.
    pub(super) fn populate_more(&mut self) {
        let population = &self.population;
        let under_way = population.query.is_some_and(|id| self.queries.contains_key(&id));
        if under_way || population.missing.is_empty() || self.ownership != Ownership::Direct {
            return;
        }
        // Each lock may cut a part in two and put it off once.
        for _ in 0..=population.missing.len() + self.locks.held().count() {
            let Some(range) = self.population.missing.pop_front() else {
                return self.report(Report::Populated);
            };
            let Some(gap) = self.map.first_gap(range) else { continue };
            let lock = self.locks.held().map(|lock| lock.range);
            let lock = lock.filter(|lock| lock.overlaps(&gap)).min_by_key(|lock| lock.start);
            let free = lock.map_or(gap.end, |lock| lock.start);
            if gap.start < free {
                self.population.missing.push_front(FileRange::new(gap.start, range.end));
                self.population.query = Some(self.query_ahead(FileRange::new(gap.start, free)));
                return;
            }
            // Being written: what becomes of it is known when the lock goes.
            let end = lock.map_or(gap.end, |lock| lock.end.min(range.end));
            self.population.missing.push_back(FileRange::new(gap.start, end));
            if end < range.end {
                self.population.missing.push_front(FileRange::new(end, range.end));
            }
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
