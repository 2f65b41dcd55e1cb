// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest asks for next, and where.

use std::ops::Range;

use extentd::engine::request::Kind;

use super::guest::file_range;
use super::hazard::Hazard;
use super::world::{Event, World};

impl World {
    pub(super) fn choose(&mut self) -> Kind {
        if let Some(range) = self.guest.sweep.pop_front() {
            return Kind::Read(file_range(&range));
        }
        if let Some(range) = self.guest.redo.pop_front() {
            return Kind::Write(file_range(&range));
        }
        if std::mem::take(&mut self.guest.flush_first) {
            return Kind::Flush;
        }
        if self.scenario.hard.read_only {
            return self.choose_read();
        }
        if self.trims_now() {
            return Kind::Read(file_range(&self.any_range()));
        }
        let discards = self.scenario.discards;
        let flushes = self.scenario.flushes;
        let draw = self.rng.below(1000);
        if draw < flushes {
            return Kind::Flush;
        }
        if draw < flushes + discards {
            if let Some(range) = self.free_range() {
                let range = file_range(&range);
                return match self.rng.below(3) {
                    0 => Kind::Discard(range),
                    1 => Kind::WriteZeroes { range, unmap: true },
                    _ => Kind::WriteZeroes { range, unmap: false },
                };
            }
        } else if self.rng.chance(500) {
            if let Some(range) = self.free_range() {
                return Kind::Write(file_range(&range));
            }
            if let Some(range) = self.range_under_way() {
                self.hit(Hazard::Overlap);
                self.guest.overlapped = true;
                return Kind::Write(file_range(&range));
            }
        }
        Kind::Read(file_range(&self.any_range()))
    }

    /// A range nothing is writing to.
    fn free_range(&mut self) -> Option<Range<usize>> {
        for _ in 0..4 {
            let range = self.any_range();
            if range.clone().all(|s| !self.model.contended(s)) {
                return Some(range);
            }
        }
        None
    }

    /// A range that is being written, for a second write to the same sectors. Writes that overlap
    /// otherwise are the guest's mistake, and may cost it a neighbour in the same block.
    fn range_under_way(&mut self) -> Option<Range<usize>> {
        let writes = self.guest.pending.values();
        let ranges: Vec<_> = writes
            .filter(|p| matches!(p.request.kind, Kind::Write(_)))
            .map(|p| p.sectors.clone())
            .collect();
        let choice = self.rng.index(ranges.len());
        ranges.into_iter().nth(choice)
    }

    /// An outside opener has written a sector while the manager gets no CPU: does the guest see it?
    pub(super) fn read_behind(&mut self, sector: usize) {
        let stopped = self.alive && self.stalls.keeper.max(self.stalls.all) > self.now;
        if stopped && self.window().contains(&sector) && self.rng.chance(400) {
            self.hit(Hazard::ReadBehindManager);
            self.guest.sweep.push_back(sector..sector + 1);
            self.guest.to_issue += 1;
            let delay = self.delay(1, 5_000);
            self.after(delay, Event::Issue);
        }
    }

    pub(super) fn any_range(&mut self) -> Range<usize> {
        let window = self.window();
        let spb = self.host.spb;
        let len = match self.rng.below(10) {
            _ if self.scenario.slow_device.is_some() => 1 + self.rng.index(self.scenario.longest),
            0..5 => 1 + self.rng.index(spb),
            5..8 => 1 + self.rng.index(4 * spb),
            8 => spb * (1 + self.rng.index(3)),
            _ => 1 + self.rng.index(self.scenario.longest),
        };
        let at = if self.rng.chance(self.scenario.focus) {
            let hot = self.rng.index(self.guest.hot.len());
            let near = self.guest.hot[hot] + self.rng.index(16);
            if self.rng.chance(300) { near - near % spb } else { near }
        } else {
            window.start + self.rng.index(window.len())
        };
        let start = at.clamp(window.start, window.end - 1);
        start..(start + len).min(window.end)
    }
}
