// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest: what it asks, what it must get, and that it gets one answer to each request.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use extentd::engine::Tag;
use extentd::engine::message::WorkerId;
use extentd::engine::request::{Kind, Request, Status};
use extentd::engine::units::FileRange;

use super::disk::{Stamp, ZERO};
use super::hazard::Hazard;
use super::model::Wrong;
use super::rng::Rng;
use super::scenario::{Scenario, bytes, sectors};
use super::world::World;

/// What guest memory holds before a read fills it.
const POISON: Stamp = 0x90 << 56;

/// A request the guest waits for.
#[derive(Debug)]
pub(super) struct Pending {
    number: u64,
    pub(super) request: Request,
    pub(super) sectors: Range<usize>,
    memory: Vec<Stamp>,
    began: u64,
    /// Reads: what each sector may be.
    admissible: Vec<Vec<Stamp>>,
    /// Flushes: modifying requests accepted earlier and not answered then.
    earlier: Vec<u64>,
    write_through: bool,
    /// Held back by a flush, perhaps (`--barrier=strict`): flushes of other queues may overtake it.
    behind: bool,
    /// A failed flush had been answered before it was asked.
    after_failure: bool,
}

#[derive(Debug)]
pub(super) struct Guest {
    /// By worker and tag.
    pub(super) pending: BTreeMap<(WorkerId, Tag), Pending>,
    pub(super) next_number: u64,
    pub(super) next_stamp: Stamp,
    /// Requests still to be made.
    pub(super) to_issue: u32,
    /// Places the guest likes.
    pub(super) hot: Vec<usize>,
    /// Writes to make first: the ones a killed daemon owed.
    pub(super) redo: VecDeque<Range<usize>>,
    pub(super) write_through: bool,
    ever_write_through: bool,
    /// A flush has failed and nothing has reset the device since (R16).
    flush_failed: bool,
    /// It has written where it was writing already.
    pub(super) overlapped: bool,
    /// Errors were injected or the file was cut short: requests may fail.
    excused: bool,
    /// A new driver flushes first.
    pub(super) flush_first: bool,
    /// What the last phase reads, so that all of the image is looked at.
    pub(super) sweep: VecDeque<Range<usize>>,
    pub(super) answered: u64,
}

impl Guest {
    pub(super) fn new(scenario: &Scenario, rng: &mut Rng) -> Self {
        Self {
            pending: BTreeMap::new(),
            next_number: 1,
            next_stamp: 1 << 16,
            to_issue: 0,
            hot: (0..scenario.hot).map(|_| rng.index(scenario.sectors())).collect(),
            redo: VecDeque::new(),
            write_through: scenario.write_through,
            ever_write_through: scenario.write_through,
            flush_failed: false,
            overlapped: false,
            excused: false,
            flush_first: false,
            sweep: VecDeque::new(),
            answered: 0,
        }
    }

    pub(super) fn memory(&mut self, worker: WorkerId, tag: Tag) -> Option<&mut Vec<Stamp>> {
        self.pending.get_mut(&(worker, tag)).map(|p| &mut p.memory)
    }

    pub(super) fn is_aligned(&self, worker: WorkerId, tag: Tag) -> bool {
        self.pending.get(&(worker, tag)).is_some_and(|p| p.request.mem_aligned)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.to_issue == 0 && self.pending.is_empty()
    }

    pub(super) fn waits_for_flush(&self) -> bool {
        self.pending.values().any(|p| p.request.kind == Kind::Flush)
    }

    /// What it still waits for, for a report.
    pub(super) fn waiting(&self) -> Vec<String> {
        let line = |((w, t), p): (&(WorkerId, Tag), &Pending)| {
            format!("w{} tag {} {:?}", w.0, t.0, p.request.kind)
        };
        self.pending.iter().map(line).collect()
    }

    /// A tag of this worker that is free.
    pub(super) fn free_tag(&self, worker: WorkerId, depth: usize) -> Option<Tag> {
        let depth = u32::try_from(depth).ok()?;
        (0..depth).map(Tag).find(|t| !self.pending.contains_key(&(worker, *t)))
    }

    /// The guest switches between write-back and write-through; what it is now.
    pub(super) fn switch_cache(&mut self) -> bool {
        self.write_through = !self.write_through;
        self.ever_write_through = true;
        self.write_through
    }

    /// A new driver: an old flush error is forgotten.
    pub(super) fn device_reset(&mut self) {
        self.flush_failed = false;
    }

    /// Wants all of the window read before the end.
    pub(super) fn plan_sweep(&mut self, window: &Range<usize>, step: usize) {
        let mut at = window.start;
        while at < window.end {
            let end = (at + step).min(window.end);
            self.sweep.push_back(at..end);
            self.to_issue += 1;
            at = end;
        }
    }

    fn stamps(&mut self, count: usize) -> Vec<Stamp> {
        let first = self.next_stamp;
        self.next_stamp += count as u64;
        (first..self.next_stamp).collect()
    }
}

impl Pending {
    /// Whether it was asked with this number or a later one.
    pub(super) const fn is_since(&self, number: u64) -> bool {
        self.number >= number
    }
}

impl World {
    /// The guest's sectors.
    pub(super) fn window(&self) -> Range<usize> {
        let window = self.scenario.window;
        sectors(window.start)..sectors(window.end)
    }

    /// From now on requests may fail.
    pub(super) fn note_error(&mut self) {
        self.guest.excused = true;
    }

    /// The guest makes a request on a worker's queue.
    pub(super) fn make_request(&mut self, worker: WorkerId, tag: Tag) -> Request {
        let kind = self.choose();
        self.make(worker, tag, kind)
    }

    /// The guest makes this request.
    pub(super) fn make(&mut self, worker: WorkerId, tag: Tag, kind: Kind) -> Request {
        let number = self.guest.next_number;
        self.guest.next_number += 1;
        let range = sectors(kind.range().start)..sectors(kind.range().end);
        let mem_align = u64::from(self.scenario.geometry.mem_align);
        let odd_memory = self.rng.chance(self.scenario.unaligned);
        let request = Request {
            kind,
            mem_aligned: matches!(kind, Kind::WriteZeroes { .. })
                || (!odd_memory && bytes(range.len()).is_multiple_of(mem_align)),
        };
        let memory = match kind {
            Kind::Write(_) => self.guest.stamps(range.len()),
            Kind::Read(_) => vec![POISON; range.len()],
            Kind::Discard(_) | Kind::WriteZeroes { .. } | Kind::Flush => Vec::new(),
        };
        if !request.mem_aligned && !memory.is_empty() {
            self.hit(Hazard::Bounced);
        }
        let behind = self.scenario.strict && self.guest.waits_for_flush();
        let modifying = self
            .guest
            .pending
            .iter()
            .filter(|((of, _), p)| p.request.kind.modifies() && (*of == worker || !p.behind));
        let earlier = match kind {
            Kind::Flush => modifying.map(|(_, p)| p.number).collect(),
            _ => Vec::new(),
        };
        let admissible = match kind {
            Kind::Read(_) => range.clone().map(|s| self.model.admissible(s)).collect(),
            _ => Vec::new(),
        };
        let began = self.model.moment();
        let pending = Pending {
            number,
            request,
            sectors: range.clone(),
            memory,
            began,
            admissible,
            earlier,
            write_through: self.guest.write_through,
            behind,
            after_failure: self.guest.flush_failed,
        };
        self.trace(|| format!("w{} tag {} request {number} {request:?}", worker.0, tag.0));
        if kind.modifies() {
            let stamps = pending.memory.clone();
            let stamp = |s: usize| stamps.get(s - range.start).copied().unwrap_or(ZERO);
            self.model.begin(number, range.clone(), stamp);
            self.tell_readers(&range, stamp);
        }
        self.note_hazards(kind, &range);
        self.guest.pending.insert((worker, tag), pending);
        request
    }

    fn note_hazards(&mut self, kind: Kind, range: &Range<usize>) {
        let unit = self.scenario.unit();
        match kind {
            Kind::Discard(_) | Kind::WriteZeroes { unmap: true, .. }
                if !(range.start.is_multiple_of(unit) && range.end.is_multiple_of(unit)) =>
            {
                self.hit(Hazard::OddEdgePunch);
            }
            Kind::Flush if self.lease.is_breaking() => self.hit(Hazard::FlushDuringBreak),
            Kind::Write(_) if self.guest.write_through => self.hit(Hazard::WriteThrough),
            _ => {}
        }
    }

    /// Reads under way may see what is written now.
    pub(super) fn tell_readers(&mut self, range: &Range<usize>, stamp: impl Fn(usize) -> Stamp) {
        for pending in self.guest.pending.values_mut() {
            for (i, admissible) in pending.admissible.iter_mut().enumerate() {
                let at = pending.sectors.start + i;
                if range.contains(&at) {
                    admissible.push(stamp(at));
                }
            }
        }
    }

    /// An answer comes back: everything the guest may rely on is checked here.
    pub(super) fn answered(&mut self, worker: WorkerId, tag: Tag, status: Status) {
        self.trace(|| format!("w{} tag {} answered {status:?}", worker.0, tag.0));
        let Some(pending) = self.guest.pending.remove(&(worker, tag)) else {
            self.fail(format!("w{} tag {}: an answer nobody waits for", worker.0, tag.0));
            return;
        };
        self.guest.answered += 1;
        let ok = status == Status::Ok;
        // A flush that fails because an earlier one has (R16) says nothing of what is on the disk.
        if ok || pending.request.kind != Kind::Flush {
            self.check_strict(worker, pending.number);
            self.check_fence(worker, tag);
        }
        self.note_trim(pending.request.kind, ok);
        if !ok && !self.guest.excused {
            self.fail(format!("{:?} failed without a cause: {status:?}", pending.request.kind));
        }
        match pending.request.kind {
            Kind::Read(_) if ok => self.check_read(&pending),
            Kind::Read(_) => {}
            Kind::Write(_) | Kind::WriteZeroes { .. } => self.write_ended(&pending, ok),
            Kind::Discard(_) => self.discard_ended(&pending, ok),
            Kind::Flush => self.flush_ended(&pending, ok),
        }
    }

    /// `--barrier=strict`: nothing overtakes a flush of its own queue.
    fn check_strict(&mut self, worker: WorkerId, number: u64) {
        let mut flushes = self.guest.pending.iter().filter(|((of, _), p)| {
            *of == worker && p.number < number && p.request.kind == Kind::Flush
        });
        if self.scenario.strict && flushes.next().is_some() {
            self.fail(format!("request {number} overtook a flush (R13, strict)"));
        }
    }

    fn check_read(&mut self, pending: &Pending) {
        for (i, saw) in pending.memory.iter().enumerate() {
            let sector = pending.sectors.start + i;
            if self.model.is_wild(sector) {
                continue;
            }
            let admissible = &pending.admissible[i];
            if !admissible.contains(saw) {
                let wrong = Wrong { sector, saw: *saw, admissible: admissible.clone() };
                self.fail(format!("read {}: {wrong}", pending.number));
                return;
            }
            self.model.observed(sector, *saw, pending.began);
        }
    }

    /// The whole units inside read as zeros, unless the filesystem cannot punch; the rest is as it
    /// was or zeros, which is more than the guest was promised.
    fn discard_ended(&mut self, pending: &Pending, ok: bool) {
        let unit = self.scenario.unit();
        let Range { start, end } = pending.sectors;
        let inside = start.next_multiple_of(unit)..end - end % unit;
        if inside.is_empty() || !self.scenario.punches {
            return self.model.end(pending.number, start..end, false);
        }
        self.model.end(pending.number, start..inside.start, false);
        self.model.end(pending.number, inside.clone(), ok);
        self.model.end(pending.number, inside.end..end, false);
    }

    fn write_ended(&mut self, pending: &Pending, ok: bool) {
        self.model.end(pending.number, pending.sectors.clone(), ok);
        if ok && pending.write_through && self.guest.write_through {
            self.model.durable(pending.number, pending.sectors.clone());
            if pending.after_failure && self.guest.flush_failed {
                self.fail("write-through write succeeded after a failed flush (R16)".into());
            }
        }
    }

    fn flush_ended(&mut self, pending: &Pending, ok: bool) {
        if !ok {
            self.hit(Hazard::FailedFlush);
            self.guest.flush_failed = true;
            return;
        }
        let open = self.guest.pending.values().find(|p| pending.earlier.contains(&p.number));
        // Write-through requests that have ended wait for a flush themselves, perhaps for this one.
        if let Some(open) = open
            && !self.guest.ever_write_through
        {
            let what = format!("flush {} ended before request {}", pending.number, open.number);
            self.fail(format!("{what}, which was accepted earlier (R13)"));
        }
        if pending.after_failure && self.guest.flush_failed {
            self.fail("flush succeeded after a failed one (R16)".into());
        }
        self.model.flushed(pending.began);
    }

    /// The daemon died: nobody answers any more. The guest will write again where it had
    /// written, as soon as it can.
    pub(super) fn drop_requests(&mut self) {
        self.guest.flush_failed = false;
        for pending in std::mem::take(&mut self.guest.pending).into_values() {
            if matches!(pending.request.kind, Kind::Write(_)) {
                self.guest.redo.push_back(pending.sectors);
            }
            self.guest.to_issue += 1;
        }
    }
}

pub(super) fn file_range(sectors: &Range<usize>) -> FileRange {
    FileRange::new(bytes(sectors.start), bytes(sectors.end))
}
