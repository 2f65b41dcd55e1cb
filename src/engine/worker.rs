// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A worker: the requests of one queue thread, from acceptance to their status.
//!
//! A request waits (for the map, a lock, a park order to end) or runs, as pieces. Each piece is one
//! operation of the [`Io`], or two for a read-modify-write; see `ops.rs`.

mod fence;
mod orders;
mod pending;
mod pieces;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::Geometry;
use super::barrier::Generations;
use super::counters::Counters;
use super::extent::Hint;
use super::io::{BounceSlot, Io, Tag};
use super::message::{ToKeeper, ToWorker};
use super::ops::OpTable;
use super::pace::{Lane, Pace};
use super::plan::{self, Need};
use super::request::{Kind, Request, Status};
use super::rules::Rules;
use super::shared::{Mode, Shared, View};
use super::units::DeviceOffset;
use fence::Fence;
use orders::ParkOrder;
use pending::{Pending, Phase};

/// Who waits for a flush that no request asked for.
const NOBODY: Tag = Tag(u32::MAX);

/// The requests of one queue thread. See the [module](self).
#[derive(Debug)]
pub struct Worker {
    pub(super) geometry: Geometry,
    rules: Rules,
    shared: Arc<Shared>,
    counters: Arc<Counters>,
    version: u64,
    view: Arc<View>,
    hint: Hint,
    /// By tag; grows with the tags that are used.
    requests: Vec<Option<Pending>>,
    max_requests: usize,
    in_flight: u32,
    /// Of these, those that wait for an answer of the keeper.
    asking: u32,
    pub(super) ops: OpTable,
    pub(super) bounce: Vec<BounceSlot>,
    /// Raw I/O in flight, by lane (R2b).
    raw: [Pace; 3],
    /// Requests that wait until their lane admits them, by lane, in the order they came: a large one
    /// must not wait for ever behind small ones.
    crowd: [VecDeque<Tag>; 3],
    /// Requests in all crowds.
    crowded: usize,
    /// The first of this lane's crowd is being tried.
    admitting: Option<Lane>,
    parks: Vec<ParkOrder>,
    parked: VecDeque<Tag>,
    stalled: VecDeque<Tag>,
    generations: Generations,
    /// Counted in [`Shared`] among those that may have begun to write.
    stirred: bool,
    /// What was written since the last report to the keeper.
    raw_written: Option<DeviceOffset>,
    file_written: bool,
    dirty_told: bool,
    begun: bool,
    /// When the lease was last seen to be ours; `None`: not yet.
    confirmed: Option<Duration>,
    lease_lost: bool,
    write_through: bool,
    fence: Fence,
    /// A sync ordered by the keeper that waits for a free operation.
    sync: Option<(bool, Option<DeviceOffset>)>,
    done: VecDeque<(Tag, Status)>,
    outbox: VecDeque<ToKeeper>,
}

impl Worker {
    /// A worker for at most `max_requests` requests at a time: tags are below that.
    #[must_use]
    pub fn new(
        geometry: Geometry,
        rules: Rules,
        shared: Arc<Shared>,
        counters: Arc<Counters>,
        max_requests: u32,
    ) -> Self {
        let (version, view) = shared.latest();
        let drain = geometry.lease_fresh.filter(|_| rules.pace);
        let pace = || Pace::new(geometry.raw, drain);
        Self {
            geometry,
            rules,
            shared,
            counters,
            version,
            view,
            hint: Hint::default(),
            requests: Vec::new(),
            max_requests: usize::try_from(max_requests).unwrap_or(usize::MAX),
            in_flight: 0,
            asking: 0,
            ops: OpTable::new(geometry.ops),
            bounce: (0..geometry.bounce_slots).rev().map(BounceSlot).collect(),
            raw: [pace(), pace(), pace()],
            crowd: Default::default(),
            crowded: 0,
            admitting: None,
            parks: Vec::new(),
            parked: VecDeque::new(),
            stalled: VecDeque::new(),
            generations: Generations::default(),
            stirred: false,
            raw_written: None,
            file_written: false,
            dirty_told: false,
            begun: false,
            confirmed: None,
            lease_lost: false,
            write_through: false,
            fence: Fence::default(),
            sync: None,
            done: VecDeque::new(),
            outbox: VecDeque::new(),
        }
    }

    /// Takes a request on. A tag that is out of range or taken is a bug of the caller; the
    /// request is answered with an error then.
    pub fn accept(&mut self, io: &mut impl Io, tag: Tag, request: Request) {
        self.accept_all(io, tag, request, &[]);
    }

    /// Takes a request of several ranges on: `request`, and the same for each of `more`.
    pub fn accept_all(&mut self, io: &mut impl Io, tag: Tag, request: Request, more: &[Kind]) {
        let index = tag.0 as usize;
        if (self.requests.len()..self.max_requests).contains(&index) {
            self.requests.resize_with(index + 1, || None);
        }
        let Some(slot @ None) = self.requests.get_mut(index) else {
            debug_assert!(false, "{tag:?} is not free");
            self.done.push_back((tag, Status::IoError));
            return;
        };
        match request.kind {
            Kind::Read(_) => self.counters.read.add(1),
            Kind::Write(_) => self.counters.write.add(1),
            Kind::Flush => self.counters.flush.add(1),
            Kind::Discard(_) => self.counters.discard.add(1),
            Kind::WriteZeroes { .. } => self.counters.write_zeroes.add(1),
        }
        *slot = Some(Pending {
            request,
            phase: Phase::Running,
            next: request.kind.range().start,
            redo: Vec::new(),
            later: more.iter().rev().copied().collect(),
            pieces: 0,
            status: Status::Ok,
            locked: false,
            wrote_file: false,
            generation: None,
        });
        self.in_flight += 1;
        self.enter_in_turn(io, tag, request.kind);
        self.pump(io);
    }

    /// Whether [`foresee`](Self::foresee) is worth its while.
    #[must_use]
    pub fn foresees(&self) -> bool {
        self.view.mode == Mode::Direct && self.view.map.is_large()
    }

    /// Requests are going to be accepted that begin at these bytes of the file, or at others: it only saves them waiting for memory.
    pub fn foresee(&self, bytes: &[u64]) {
        self.view.map.foresee(bytes);
    }

    /// Takes a message from the keeper.
    pub fn message(&mut self, io: &mut impl Io, message: ToWorker) {
        // What it sets going starts now, not when the last completion was read (R2b).
        io.now();
        match message {
            ToWorker::Begin => {
                self.begun = true;
                self.unpark(io);
            }
            ToWorker::Retry(tag) => self.resume(io, tag, |_| ()),
            ToWorker::Locked(tag) => self.resume(io, tag, |p| p.locked = true),
            ToWorker::Settled(tag) => self.resume(io, tag, |p| p.locked = false),
            ToWorker::Discarded(tag, errno) => {
                let block = u64::from(self.geometry.fs_block);
                self.resume(io, tag, |p| p.punched(errno, block));
            }
            ToWorker::Flushed(tag, errno) => {
                self.flushed(tag, errno);
                self.pass(io);
            }
            ToWorker::Passed => {
                self.fence.close();
                self.pass(io);
            }
            ToWorker::Park(id, range, drain) => {
                self.parks.push(ParkOrder { id, range, drain, answered: false });
                self.answer_parks();
            }
            ToWorker::Release(id) => {
                self.parks.retain(|park| park.id != id);
                self.lease_lost = false;
                self.unpark(io);
            }
            ToWorker::Point(id) => {
                self.fence.open(self.rules.fence_all);
                self.generations.point(id);
                self.report_point();
            }
            ToWorker::Sync { image, device } => {
                self.sync = Some((image, device));
                self.start_sync(io);
            }
            ToWorker::Touched => self.dirty_told = false,
        }
        self.pump(io);
    }

    /// Reaps all finished operations and goes on with what they were for.
    pub fn reap(&mut self, io: &mut impl Io) {
        let mut next = io.reap();
        if next.is_some() {
            // What has completed did so before now: its rate is not overrated (R2b).
            io.now();
        }
        while let Some(completion) = next {
            self.completed(io, completion.id, completion.result);
            next = io.reap();
        }
        self.pump(io);
    }

    /// Works off what was done at once and starts what waited for room.
    fn pump(&mut self, io: &mut impl Io) {
        loop {
            while let Some((id, result)) = self.ops.pop_ready() {
                self.completed(io, id, result);
            }
            if self.sync.is_some() {
                self.start_sync(io);
            }
            // Each gets one try: one that stalls again goes to the back.
            for _ in 0..self.stalled.len() {
                if !self.room() {
                    break;
                }
                let Some(tag) = self.stalled.pop_front() else { break };
                self.resume(io, tag, |_| ());
            }
            if self.crowded > 0 {
                self.admit(io);
            }
            if !self.ops.any_ready() {
                return;
            }
        }
    }

    /// The next finished request; its tag is free again.
    pub fn poll_done(&mut self) -> Option<(Tag, Status)> {
        self.done.pop_front()
    }

    /// The next message for the keeper.
    pub fn poll_message(&mut self) -> Option<ToKeeper> {
        self.outbox.pop_front()
    }

    /// Requests taken and not yet finished.
    #[must_use]
    pub const fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether what happens here comes in steps that somebody waits for each of: a request goes to and fro between here and
    /// the keeper, a drain or a flush waits for what is in flight.
    #[must_use]
    pub fn is_hurried(&self) -> bool {
        self.asking > 0 || !self.parks.is_empty() || self.generations.is_awaited()
    }

    /// Write-through: writes complete only when durable (R15). What was written before becomes so
    /// at the switch.
    pub fn set_write_through(&mut self, on: bool) {
        if on && !self.write_through {
            self.outbox.push_back(ToKeeper::Flush(NOBODY));
        }
        self.write_through = on;
    }

    /// `--barrier=strict`: no request starts before a FLUSH that was accepted earlier has ended
    /// (R13). To be said before the first request.
    pub fn set_strict(&mut self) {
        self.fence.strict = true;
    }

    pub(super) fn say(&mut self, message: ToKeeper) {
        self.outbox.push_back(message);
    }

    fn ask(&mut self, tag: Tag, message: ToKeeper) {
        if let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) {
            self.asking += u32::from(pending.phase != Phase::Keeper);
            pending.phase = Phase::Keeper;
        }
        self.outbox.push_back(message);
    }

    /// The raw I/O of a lane.
    pub(super) const fn pace(&mut self, lane: Lane) -> &mut Pace {
        let [read, write, zeroes] = &mut self.raw;
        match lane {
            Lane::Read => read,
            Lane::Write => write,
            Lane::Zeroes => zeroes,
        }
    }

    fn room(&self) -> bool {
        self.ops.has_room() && !self.bounce.is_empty()
    }

    /// Goes on with a request that waited.
    fn resume(&mut self, io: &mut impl Io, tag: Tag, change: impl FnOnce(&mut Pending)) {
        let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return };
        change(pending);
        self.asking -= u32::from(pending.phase == Phase::Keeper);
        pending.phase = Phase::Running;
        self.advance(io, tag);
    }

    fn unpark(&mut self, io: &mut impl Io) {
        for _ in 0..self.parked.len() {
            let Some(tag) = self.parked.pop_front() else { break };
            self.resume(io, tag, |_| ());
        }
    }

    fn refresh(&mut self) {
        if self.shared.version() != self.version {
            (self.version, self.view) = self.shared.latest();
        }
    }

    /// Plans and starts as much of a request as can be; ends it when nothing is left.
    fn advance(&mut self, io: &mut impl Io, tag: Tag) {
        self.refresh();
        loop {
            let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return };
            if pending.phase != Phase::Running {
                return;
            }
            let Some(rest) = pending.rest() else {
                if self.finish(io, tag) {
                    continue;
                }
                return;
            };
            let range = rest.round_out(u64::from(self.geometry.fs_block));
            let access = pending.access(&self.raw);
            let begun = self.begun || !self.rules.begin;
            if !begun || self.lease_lost || self.parks.iter().any(|p| p.range.overlaps(&range)) {
                pending.phase = Phase::Parked;
                self.parked.push_back(tag);
                return;
            }
            // A lock is for the whole request: a piece that has to be planned again is inside it.
            let all = pending.request.kind.range();
            match plan::next(&self.view, &self.geometry, access, rest, &mut self.hint) {
                Ok(piece) if self.start_piece(io, tag, access, piece) => {}
                Ok(_) => return,
                Err(Need::Map) => return self.ask(tag, ToKeeper::NeedMap(tag, range)),
                Err(Need::Lock) => {
                    let all = all.round_out(u64::from(self.geometry.fs_block));
                    return self.ask(tag, ToKeeper::Lock(tag, all));
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
