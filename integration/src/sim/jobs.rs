// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The helper thread: carries out the keeper's jobs one after the other, each in steps between
//! which anything may happen.

use std::collections::VecDeque;
use std::ops::Range;

use extentd::engine::extent::State;
use extentd::engine::message::{Job, JobDone, JobId, MapAnswer, Proof, Refusal};
use extentd::engine::units::FileRange;
use extentd::image::extents::{Bounds, translate};
use extentd::sys::fiemap::{self, RawExtent};

use super::disk::ZERO;
use super::hazard::Hazard;
use super::layout::NOWHERE;
use super::mutant::Mutant;
use super::ops::{EIO, EOPNOTSUPP, InFlight};
use super::scenario::{bytes, sectors};
use super::world::{Event, World};

#[derive(Debug, Default)]
pub(super) struct Jobs {
    queue: VecDeque<(JobId, Job)>,
    step: u32,
    /// R6's comparison has succeeded in this daemon's life.
    proved: bool,
    /// What FIEMAP has said so far.
    found: Vec<(usize, State, usize)>,
}

impl Jobs {
    /// A punch is next.
    pub(super) fn is_punching(&self) -> bool {
        matches!(self.queue.front(), Some((_, Job::Punch { .. })))
    }

    pub(super) fn is_entering(&self) -> bool {
        matches!(self.queue.front(), Some((_, Job::Enter | Job::Confirm)))
    }

    /// What punches that have not ended keep quiesced.
    pub(super) fn punches(&self) -> Vec<Range<usize>> {
        let punch = |(_, job): &(JobId, Job)| match job {
            Job::Punch { range } => Some(sectors(range.start)..sectors(range.end)),
            Job::Map { .. } | Job::Enter | Job::Confirm => None,
        };
        self.queue.iter().filter_map(punch).collect()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// What FIEMAP says of a block in this state.
const fn flags(state: State) -> u32 {
    match state {
        State::Mapped => 0,
        State::Unwritten => fiemap::UNWRITTEN,
        State::Shared => fiemap::SHARED,
        State::Opaque | State::Hole => fiemap::UNKNOWN,
    }
}

/// Whether `next` goes on where `last` ends, in the file and on the disk.
const fn joins(last: &RawExtent, next: &RawExtent) -> bool {
    last.flags == next.flags
        && last.logical + last.length == next.logical
        && last.physical + last.length == next.physical
}

impl World {
    /// The keeper gives the helper a job.
    pub(super) fn run_job(&mut self, id: JobId, job: Job) {
        self.trace(|| format!("job {} queued: {job:?}", id.0));
        self.jobs.queue.push_back((id, job));
        if self.jobs.queue.len() == 1 {
            self.next_step();
        }
    }

    fn next_step(&mut self) {
        let longest = if self.scenario.hard.slow_helper { 60_000 } else { 6_000 };
        let delay = self.delay(20, longest);
        self.daemon_after(delay, Event::Job);
    }

    /// The job at hand goes one step on.
    pub(super) fn job_step(&mut self) {
        let Some((id, job)) = self.jobs.queue.front().copied() else { return };
        if self.hangs(job) {
            return;
        }
        let done = match job {
            Job::Map { range, max_extents } => self.map_step(range, max_extents).map(JobDone::Map),
            Job::Enter => self.enter_step().map(JobDone::Enter),
            Job::Confirm => self.confirm_step(self.jobs.step).map(JobDone::Confirm),
            Job::Punch { range } => self.punch_step(range).map(JobDone::Punch),
        };
        let Some(done) = done else {
            self.jobs.step += 1;
            self.next_step();
            return;
        };
        self.trace(|| format!("job {} done: {done:?}", id.0));
        self.jobs.queue.pop_front();
        self.jobs.step = 0;
        self.jobs.found.clear();
        let delay = self.delay(1, 3_000);
        self.daemon_after(delay, Event::JobDone(id, done));
        if !self.jobs.queue.is_empty() {
            self.next_step();
        }
    }

    fn drop_cache(&mut self) {
        let all = self.host.everything();
        self.drop_pages(&all);
    }

    /// R3: `cachestat` says 0, or nobody looks.
    fn cache_is_empty(&self, range: &Range<usize>) -> bool {
        self.scenario.is(Mutant::NoCacheCheck) || self.host.cache.pages_in(range) == 0
    }

    fn job_fails(&mut self) -> bool {
        let fails = self.rng.chance(self.scenario.errors);
        if fails {
            self.note_error();
            self.hit(Hazard::IoError);
        }
        fails
    }

    /// FIEMAP fails where the map does not hold all extents, and what was evicted comes back as unknown.
    fn map_fails(&mut self) -> bool {
        let unmapped = self.scenario.hard.unmapped;
        unmapped > 0 && self.rng.chance(unmapped)
    }

    fn enter_step(&mut self) -> Option<Result<(), Refusal>> {
        if self.jobs.step == 0 {
            if !self.take_lease() {
                return Some(Err(Refusal::Busy));
            }
            self.trace(|| "lease taken".into());
            if self.host.layout.size() != self.scenario.sectors() {
                self.end_lease();
                return Some(Err(Refusal::Changed));
            }
            return None;
        }
        let done = self.confirm_step(self.jobs.step - 1);
        if matches!(done, Some(Err(_))) {
            self.end_lease();
        }
        done
    }

    fn confirm_step(&mut self, step: u32) -> Option<Result<(), Refusal>> {
        match step {
            0 if self.job_fails() => Some(Err(Refusal::Failed(-EIO))),
            0 => {
                self.host.fsync();
                // The kernel says so once, to whoever syncs first.
                let lost = std::mem::take(&mut self.host.kept_stale);
                lost.then_some(Err(Refusal::Unsynced(-EIO)))
            }
            1 => {
                self.drop_cache();
                None
            }
            _ if self.host.layout.size() != self.scenario.sectors() => Some(Err(Refusal::Changed)),
            _ if self.cache_is_empty(&self.host.everything()) => Some(Ok(())),
            _ => Some(Err(Refusal::PagesCached)),
        }
    }

    /// A punch waits for direct I/O on the file, as the kernel does.
    fn punch_step(&mut self, range: FileRange) -> Option<Result<(), i32>> {
        if self.job_fails() {
            return Some(Err(-EIO));
        }
        if self.ops.values().any(InFlight::holds_layout) || self.holds_punch() {
            return None;
        }
        if !self.scenario.punches {
            self.hit(Hazard::NoPunch);
            return Some(Err(-EOPNOTSUPP));
        }
        let range = sectors(range.start)..sectors(range.end).min(self.scenario.sectors());
        if self.scenario.identity() {
            // A disk's blocks stay where they are.
            range.for_each(|sector| self.host.disk.write_back(sector, ZERO));
            return Some(Ok(()));
        }
        self.host.punch(&range, &mut self.rng);
        for edge in [range.start, range.end.saturating_sub(1)] {
            if self.host.cache.is_dirty(edge) && range.contains(&edge) {
                self.fail(format!("punching {range:?} left a dirty page at its edge (R12)"));
            }
        }
        let later = self.delay(100, 20_000);
        self.after(later, Event::Writeback);
        Some(Ok(()))
    }

    /// Empties the cache, reads the extents in two goes, looks at the cache again.
    fn map_step(&mut self, range: FileRange, max: u32) -> Option<Result<MapAnswer, i32>> {
        let end = sectors(range.end).min(self.host.everything().end);
        let span = sectors(range.start).min(end)..end;
        let blocks = self.host.blocks_of(&span);
        let middle = blocks.start + blocks.len() / 2;
        let step = self.jobs.step;
        match step {
            0 if self.job_fails() || self.map_fails() => Some(Err(-EIO)),
            0 => {
                self.host.sync_range(&span);
                self.drop_pages(&span);
                None
            }
            1 => {
                self.host.sync_range(&span);
                self.fiemap(blocks.start..middle);
                None
            }
            2 => {
                self.fiemap(middle..blocks.end);
                None
            }
            _ => Some(Ok(self.map_answer(range, max))),
        }
    }

    fn fiemap(&mut self, blocks: Range<usize>) {
        let writing =
            |o: &InFlight| o.class.writes_file() && o.blocks.iter().any(|b| blocks.contains(b));
        if !blocks.is_empty() && self.ops.values().any(writing) {
            self.hit(Hazard::FiemapDuringFileWrite);
        }
        for block in blocks {
            let entry = self.host.layout.block(block);
            let mut beyond = (block + 1) * self.host.spb > self.host.layout.size();
            // The filesystem says of the file's last block what it says of any.
            if beyond && self.is_tail(block) && self.host.layout.size() == self.scenario.sectors() {
                beyond = false;
                self.hit(Hazard::TailMapped);
            }
            let delayed = self.host.sectors_of(block).any(|s| self.host.cache.is_dirty(s));
            let state = match entry {
                _ if beyond => State::Opaque,
                e if e.place == NOWHERE && delayed => State::Opaque,
                e if e.place == NOWHERE => State::Hole,
                e if !e.written => State::Unwritten,
                e if e.shared => State::Shared,
                _ => State::Mapped,
            };
            self.jobs.found.push((block, state, entry.place));
        }
    }

    fn map_answer(&mut self, range: FileRange, max: u32) -> MapAnswer {
        let block_bytes = bytes(self.host.spb);
        let unit = bytes(self.scenario.unit());
        let mut answer = MapAnswer { covered: range, ..MapAnswer::default() };
        let few = self.scenario.hard.ragged && self.rng.chance(500);
        let most = if few { 1 + self.rng.index(6) } else { self.scenario.batch };
        // As many as a page has blocks at least: the daemon asks for no fewer.
        let most = most.min(max as usize).max(sectors(unit) / self.host.spb);
        let (lies, places) = (self.scenario.lies, self.host.layout.places());
        let mut raws: Vec<RawExtent> = Vec::new();
        for (block, found, place) in std::mem::take(&mut self.jobs.found) {
            let cached = !self.cache_is_empty(&self.host.sectors_of(block));
            let state = if found == State::Mapped && cached { State::Opaque } else { found };
            if state == State::Hole {
                continue;
            }
            let told = if lies && place != NOWHERE { (place + 7) % places } else { place };
            let now = self.host.layout.block(block);
            // A difference counts only where the block has not moved meanwhile.
            if state == State::Mapped && now.place == place && now.written {
                self.compare(block, told, &mut answer.proof);
            }
            let next = RawExtent {
                logical: block as u64 * block_bytes,
                physical: if told == NOWHERE { 0 } else { told as u64 * block_bytes },
                length: block_bytes,
                flags: flags(state),
            };
            let full = raws.len() >= most;
            match raws.last_mut().filter(|last| joins(last, &next)) {
                Some(last) => last.length += next.length,
                None if full => {
                    answer.covered.end = next.logical - next.logical % unit;
                    break;
                }
                None => raws.push(next),
            }
        }
        let odd = |raw: &RawExtent| !raw.logical.is_multiple_of(unit);
        if raws.iter().any(odd) {
            self.hit(Hazard::PageOfExtents);
        }
        answer.extents = translate(&raws, answer.covered, &self.bounds());
        match answer.proof {
            Proof::Different => self.hit(Hazard::LyingMap),
            // The image compares until it has seen them equal once, and says so once.
            Proof::Equal if std::mem::replace(&mut self.jobs.proved, true) => {
                answer.proof = Proof::None;
            }
            Proof::Equal | Proof::None => {}
        }
        if answer.covered.end < range.end {
            self.hit(Hazard::CutShort);
        }
        answer
    }

    /// What the daemon holds FIEMAP's extents against.
    fn bounds(&self) -> Bounds {
        Bounds {
            // To the end of the last block: that the daemon's own translation leaves a cut block out
            // is nothing that the core may rest on.
            file_size: self.scenario.geometry.file_size.next_multiple_of(bytes(self.host.spb)),
            device_size: bytes(self.host.layout.places() * self.host.spb),
            fs_block: bytes(self.host.spb),
            unit: bytes(self.scenario.unit()),
            write_block: u64::from(self.scenario.geometry.write_block),
        }
    }

    /// R6: what is read raw where the map points, against what the file says.
    fn compare(&mut self, block: usize, told: usize, proof: &mut Proof) {
        for (i, sector) in self.host.sectors_of(block).enumerate() {
            let (raw, file) =
                (self.host.disk.read(told * self.host.spb + i), self.host.stored(sector));
            if raw != file {
                *proof = Proof::Different;
            } else if raw != 0 && *proof == Proof::None {
                *proof = Proof::Equal;
            }
        }
    }
}
