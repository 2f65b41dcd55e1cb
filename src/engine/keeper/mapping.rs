// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loading, settling and forgetting extents (R7–R10a).

use std::time::Duration;

use super::layout::{Parking, Purpose};
use super::{Keeper, Ownership};
use crate::engine::extent::{Extent, State};
use crate::engine::locks::Owner;
use crate::engine::message::{Drain, Job, JobId, MapAnswer, ParkId, Proof, ToWorker, Why};
use crate::engine::shared::Mode;
use crate::engine::units::{DeviceOffset, FileRange};

/// How far ahead of a miss the map is loaded, in bytes; the extents of one answer bound it too.
const AHEAD: u64 = 1 << 30;
/// Extents asked for at a time, as many as one system call tells. Each costs a third of a microsecond, the way to the helper and
/// back a hundred times that.
const BATCH: u32 = 512;
/// The same where something is cached on the way: as many as cost what the way to the helper costs. That is not too many where nearly
/// all is cached, and not too few where it is gap after gap, in a disk that was filled at random places.
const FEW: u32 = 128;
/// Written ranges that a query remembers one by one.
const SPOILT: usize = 256;

/// A request that waits for the map.
#[derive(Clone, Copy, Debug)]
pub(super) struct Want {
    pub(super) owner: Owner,
    pub(super) range: FileRange,
}

/// A FIEMAP under way.
#[derive(Debug)]
pub(super) struct Query {
    range: FileRange,
    /// What of it somebody waits for; only this is given up on if FIEMAP fails.
    wanted: FileRange,
    epoch: u64,
    /// Where something was written through the file or punched at any time since it began (R9).
    pub(super) spoilt: Vec<FileRange>,
    /// The lock whose writes it settles.
    settles: Option<Owner>,
}

impl Query {
    /// A query may wait long for the helper, and the guest write all the while. What becomes too much to remember is as good as all
    /// written: on either side of what somebody waits for, who would otherwise wait in vain.
    fn spoil(&mut self, range: FileRange) {
        if !self.spoilt.contains(&range) {
            self.spoilt.push(range);
        }
        if self.spoilt.len() > SPOILT {
            let before = |range: &FileRange| range.start < self.wanted.start;
            let sides: (Vec<_>, Vec<_>) = self.spoilt.drain(..).partition(before);
            let hull = |side: Vec<FileRange>| {
                side.into_iter()
                    .reduce(|a, b| FileRange::new(a.start.min(b.start), a.end.max(b.end)))
            };
            self.spoilt = [hull(sides.0), hull(sides.1)].into_iter().flatten().collect();
        }
    }
}

impl Keeper {
    pub(super) fn want(&mut self, want: Want) {
        self.wants.push_back(want);
        self.load_wanted();
    }

    /// Answers the requests whose ranges are cached and loads what others miss.
    pub(super) fn load_wanted(&mut self) {
        for _ in 0..self.wants.len() {
            let Some(want) = self.wants.pop_front() else { return };
            let gap = if self.direct() { self.map.first_gap(want.range) } else { None };
            match gap {
                None => self.send(want.owner.0, ToWorker::Retry(want.owner.1)),
                Some(gap) => {
                    self.load(gap);
                    self.wants.push_back(want);
                }
            }
        }
    }

    /// Loads `gap` and what is missing of a stretch that follows, unless that is under way or being written: then the
    /// end of it comes back here. What is cached in between does not end the stretch: a disk that was filled at random places
    /// would be loaded block by block.
    fn load(&mut self, gap: FileRange) {
        let under_way =
            self.queries.values().any(|q| q.epoch == self.epoch && q.range.overlaps(&gap));
        if under_way || self.locks.held().any(|lock| lock.range.overlaps(&gap)) {
            return;
        }
        let block = u64::from(self.config.geometry.fs_block);
        let end = self.config.window.round_out(block).end;
        let far = gap.start.saturating_add(AHEAD).min(end).max(gap.end);
        let stretch = FileRange::new(gap.start, far);
        let missing = self.map.first_gap(stretch).unwrap_or(gap);
        let most = if missing == stretch { BATCH } else { FEW };
        self.query(stretch, gap, most, None);
    }

    /// Loads the beginning of a gap, however long it is.
    pub(super) fn query_ahead(&mut self, gap: FileRange) -> JobId {
        let part = FileRange::new(gap.start, gap.end.min(gap.start.saturating_add(AHEAD)));
        self.query(part, part, BATCH, None)
    }

    fn query(
        &mut self,
        range: FileRange,
        wanted: FileRange,
        max_extents: u32,
        settles: Option<Owner>,
    ) -> JobId {
        self.counts.fiemap_calls += 1;
        let job = self.run(Job::Map { range, max_extents });
        let spoilt = self
            .locks
            .held()
            .filter(|lock| Self::spoils(lock.purpose))
            .map(|lock| lock.range)
            .filter(|spoilt| spoilt.overlaps(&range))
            .collect();
        self.queries.insert(job, Query { range, wanted, epoch: self.epoch, spoilt, settles });
        job
    }

    /// R9: something begins to be written in `range`. What ends was there when it began.
    pub(super) fn spoil(&mut self, range: FileRange) {
        for query in self.queries.values_mut().filter(|q| q.range.overlaps(&range)) {
            query.spoil(range);
        }
    }

    /// R10: after file writes under a lock the map learns what the blocks have become.
    pub(super) fn settle(&mut self, owner: Owner, range: FileRange) {
        self.query(range, range, BATCH, Some(owner));
    }

    /// Instead of that, what is known of the range is forgotten: whoever comes next loads it, with some of what follows (ADR 0006).
    /// Not so (`false`) as long as nothing is proven (R6) or where all of the map is to be kept (R7). Nor where something is opaque,
    /// which may stay so after the next write as well: forgotten and loaded in turns, it would keep those waiting who need it.
    pub(super) fn forget_written(&mut self, now: Duration, range: FileRange) -> bool {
        let known: Vec<Extent> = self.map.overlapping(range).map(|e| e.clip(&range)).collect();
        let opaque = known.iter().any(|extent| extent.state == State::Opaque);
        if opaque || !self.proven || self.population.pinned {
            return false;
        }
        let mapped = |extent: &Extent| extent.state == State::Mapped;
        if self.config.rules.forget && !known.iter().all(mapped) {
            // Written raw under the lock, if at all, and others may have raw I/O in flight there: see `replace_written`.
            let kept: Vec<Extent> = known.into_iter().filter(mapped).collect();
            self.map.replace(range, &kept);
            self.publish(Mode::Direct);
            self.evict(now, range);
        }
        true
    }

    pub(super) fn mapped(&mut self, now: Duration, id: JobId, answer: Result<MapAnswer, i32>) {
        let Some(query) = self.queries.remove(&id) else { return };
        // Heard even if the answer comes too late to be used: it is said only once.
        if !self.proven && answer.as_ref().is_ok_and(|answer| answer.proof == Proof::Equal) {
            // Nothing was raw until now, so all that is known can be asked for again.
            self.proven = true;
            self.forget(FileRange::ALL);
        }
        let current = query.epoch == self.epoch && self.ownership == Ownership::Direct;
        if current {
            self.take(now, &query, answer);
        }
        match query.settles {
            Some(owner) => self.settled(owner),
            None => self.work(),
        }
    }

    fn take(&mut self, now: Duration, query: &Query, answer: Result<MapAnswer, i32>) {
        // FIEMAP failed or said nothing: through the file, then, whatever it is.
        let unknown = MapAnswer { covered: query.wanted, ..MapAnswer::default() };
        let answer = answer.ok().filter(|answer| !answer.covered.is_empty());
        let failed = answer.is_none();
        let answer = answer.unwrap_or(unknown);
        if answer.proof == Proof::Different {
            return self.leave(now, Why::Mismatch);
        }
        let covered = answer.covered.intersect(&query.range);
        let rest = if failed { State::Opaque } else { State::Hole };
        let extents = self.complete(covered, &answer.extents, rest);
        if query.settles.is_some() {
            self.replace_written(query.range, covered, &extents);
        } else {
            self.insert_gaps(covered, &extents, &query.spoilt);
        }
        self.publish(Mode::Direct);
        self.evict(now, covered);
    }

    /// Fills the gaps of an answer and weakens what may not be raw: unproven (R6), or not in whole
    /// filesystem blocks.
    fn complete(&self, covered: FileRange, extents: &[Extent], rest: State) -> Vec<Extent> {
        let block = u64::from(self.config.geometry.fs_block);
        let mut list = Vec::with_capacity(extents.len() * 2 + 1);
        let mut at = covered.start;
        let fill = |start, end| Extent {
            range: FileRange::new(start, end),
            device: DeviceOffset(0),
            state: rest,
        };
        for extent in extents.iter().map(|e| e.clip(&covered)).filter(|e| !e.range.is_empty()) {
            let raw = matches!(extent.state, State::Mapped | State::Shared);
            let inside = extent.range.end <= self.config.geometry.file_size;
            let whole = extent.range.aligned(block)
                && (inside || !self.config.rules.tail_opaque)
                && extent.device.0 % u64::from(self.config.geometry.write_block) == 0;
            let state = if raw && !(self.proven && whole) { State::Opaque } else { extent.state };
            if extent.range.start > at {
                list.push(fill(at, extent.range.start));
            }
            at = at.max(extent.range.end);
            list.push(Extent { state, ..extent });
        }
        if at < covered.end {
            list.push(fill(at, covered.end));
        }
        list
    }

    /// Inserts an answer where nothing is cached and nothing was written meanwhile (R9). One change of the map, however many the
    /// gaps are.
    pub(super) fn insert_gaps(
        &mut self,
        covered: FileRange,
        extents: &[Extent],
        spoilt: &[FileRange],
    ) {
        let spoilt = if self.config.rules.generation { spoilt } else { &[] };
        let mut list: Vec<Extent> =
            self.map.overlapping(covered).map(|extent| extent.clip(&covered)).collect();
        let end = FileRange::new(covered.end, covered.end);
        let mut taken: Vec<FileRange> =
            list.iter().map(|e| e.range).chain(spoilt.iter().copied()).chain([end]).collect();
        taken.sort_unstable_by_key(|range| range.start);
        let (mut at, mut rest) = (covered.start, extents);
        for taken in taken {
            let free = FileRange::new(at, taken.start.min(covered.end));
            at = at.max(taken.end);
            if free.is_empty() {
                continue;
            }
            let passed = rest.partition_point(|extent| extent.range.end <= free.start);
            rest = rest.get(passed..).unwrap_or_default();
            let inside = rest.iter().take_while(|extent| extent.range.start < free.end);
            list.extend(inside.map(|extent| extent.clip(&free)));
        }
        list.sort_unstable_by_key(|extent| extent.range.start);
        self.map.replace(covered, &list);
    }

    /// Replaces what is known of a lock's range after its file writes, but for mapped blocks: those were
    /// written raw under the lock as well, nothing has changed there, and other workers may have
    /// raw I/O in flight on them. An answer that knows less of them (FIEMAP failed or was cut
    /// short, pages stayed cached) would let a read-modify-write through the file meet it.
    fn replace_written(&mut self, range: FileRange, covered: FileRange, extents: &[Extent]) {
        let mapped: Vec<Extent> = self
            .map
            .overlapping(range)
            .filter(|extent| extent.state == State::Mapped)
            .map(|extent| extent.clip(&range))
            .collect();
        self.map.remove(range);
        self.map.replace(covered, extents);
        for extent in mapped {
            self.map.replace(extent.range, &[extent]);
        }
    }

    /// R8: over the cap, whole chunks go; parked, because a worker may still address them.
    fn evict(&mut self, now: Duration, keep: FileRange) {
        let cap = self.config.max_extents;
        if self.map.len() <= cap {
            return;
        }
        self.unpin();
        if self.parks.values().any(|park| park.parking == Parking::Evict) {
            return;
        }
        // What a request waits for has to be there at once, even if that alone is over the cap: it
        // would be loaded and forgotten in turns.
        let mut kept = vec![keep];
        kept.extend(self.wants.iter().map(|want| want.range));
        // A sixteenth more than needed, so that a full map does not evict at every miss.
        for range in self.map.victims(cap - cap / 16, &kept) {
            if self.config.rules.evict_drain {
                self.park(now, range, Drain::Raw, Parking::Evict);
            } else {
                self.drop_evicted(range);
            }
        }
    }

    pub(super) fn evicted(&mut self, park: ParkId, range: FileRange) {
        self.drop_evicted(range);
        self.release(park);
    }

    fn drop_evicted(&mut self, range: FileRange) {
        let before = self.map.len();
        let unpublished = self.unpublished;
        self.forget(range);
        if !self.config.rules.evict_publish {
            self.unpublished = unpublished;
        }
        self.counts.evictions += before.saturating_sub(self.map.len()) as u64;
    }

    /// Whether a lock's purpose means that its range is being written.
    const fn spoils(purpose: Purpose) -> bool {
        matches!(purpose, Purpose::Write | Purpose::Discard)
    }
}
