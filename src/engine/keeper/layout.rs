// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Locks, park orders and punches (R10a, R12). Park orders of different purposes stand side by
//! side; none of them waits for a lock, so a lock holder that is parked is always let go again.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Keeper;
use crate::engine::barrier::Dirt;
use crate::engine::extent::State;
use crate::engine::locks::{Lock, Owner};
use crate::engine::message::{Action, Drain, Job, JobId, ParkId, ToWorker, WorkerId};
use crate::engine::units::FileRange;

/// What a lock is for, and how far that is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// File writes or a read-modify-write, from before the first to after the last.
    Write,
    /// A punch.
    Discard,
    /// The writes have ended, the map is being brought up to date.
    Settling,
}

/// What to do when everybody is parked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Parking {
    /// Enter direct mode.
    Enter,
    /// Leave it.
    Leave,
    /// Forget the range (R8).
    Evict,
    /// Make the range writable through the file for this lock: it holds shared blocks, which
    /// readers must not address any more once they may be freed.
    Unshare(Owner),
    /// Punch, for this lock.
    Punch(Owner),
}

/// A park order.
#[derive(Debug)]
pub(super) struct Park {
    range: FileRange,
    drain: Drain,
    missing: BTreeSet<WorkerId>,
    /// Everybody has answered.
    complete: bool,
    pub(super) parking: Parking,
}

impl Park {
    /// A worker joins while the order stands.
    pub(super) fn join(&mut self, id: ParkId, worker: WorkerId) -> ToWorker {
        if !self.complete {
            self.missing.insert(worker);
        }
        ToWorker::Park(id, self.range, self.drain)
    }
}

/// A punch the helper does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Punch {
    owner: Owner,
    park: ParkId,
}

impl Keeper {
    pub(super) fn lock(&mut self, owner: Owner, range: FileRange, purpose: Purpose) {
        self.locks.ask(Lock { owner, range, purpose });
        self.grant_locks();
    }

    pub(super) fn grant_locks(&mut self) {
        while let Some(lock) = self.locks.grant() {
            // R9: what is loading right now will not be believed where this lock writes.
            self.spoil(lock.range);
            match lock.purpose {
                Purpose::Discard => {
                    self.park(Duration::ZERO, lock.range, Drain::Raw, Parking::Punch(lock.owner));
                }
                Purpose::Write if self.holds_shared(lock.range) => {
                    self.park(Duration::ZERO, lock.range, Drain::Raw, Parking::Unshare(lock.owner));
                }
                Purpose::Write | Purpose::Settling => self.locked(lock.owner),
            }
        }
    }

    fn locked(&mut self, owner: Owner) {
        self.send(owner.0, ToWorker::Locked(owner.1));
    }

    fn holds_shared(&self, range: FileRange) -> bool {
        self.direct() && self.map.overlapping(range).any(|e| e.state == State::Shared)
    }

    pub(super) fn unlock(&mut self, now: Duration, owner: Owner, wrote_file: bool, uncached: bool) {
        if wrote_file {
            self.commit.soil(Dirt { metadata: true, device: None });
        }
        let settle = wrote_file && self.ownership == super::Ownership::Direct;
        let range = self.locks.find(owner).filter(|_| settle).map(|lock| lock.range);
        let Some(range) = range else { return self.settled(owner) };
        if uncached && self.forget_written(now, range) {
            return self.settled(owner);
        }
        if let Some(lock) = self.locks.find(owner) {
            lock.purpose = Purpose::Settling;
        }
        self.settle(owner, range);
    }

    /// The map says nothing wrong where `owner` wrote, or there is none.
    pub(super) fn settled(&mut self, owner: Owner) {
        if let Some(lock) = self.locks.release(owner)
            && !self.direct()
        {
            // Direct mode is being left, its map is stale where this lock wrote and not everybody may have
            // stopped using it: a guest that is told of this write must not read zeros there.
            self.forget(lock.range);
        }
        self.send(owner.0, ToWorker::Settled(owner.1));
        self.work();
    }

    pub(super) fn discard(&mut self, owner: Owner, range: FileRange) {
        let block = u64::from(self.config.geometry.fs_block);
        let inside = range.round_in(block);
        if inside.is_empty() && self.config.rules.punch_rounded {
            return self.send(owner.0, ToWorker::Discarded(owner.1, 0));
        }
        let range = if self.config.rules.punch_rounded { inside } else { range };
        self.punch_ranges.insert(owner, range);
        self.lock(owner, range.round_out(block), Purpose::Discard);
    }

    pub(super) fn punched(&mut self, id: JobId, result: Result<(), i32>) {
        let Some(Punch { owner, park }) = self.punches.remove(&id) else { return };
        self.punch_ranges.remove(&owner);
        if let Some(lock) = self.locks.release(owner) {
            self.forget(lock.range);
        }
        if self.config.rules.punch_dirt {
            self.commit.soil(Dirt { metadata: true, device: None });
        }
        self.release(park);
        self.send(owner.0, ToWorker::Discarded(owner.1, result.err().unwrap_or(0)));
        self.work();
    }

    /// Orders every worker to start nothing in `range`; `None` if that is already so, because
    /// there is no worker, and the purpose has been served.
    pub(super) fn park(
        &mut self,
        now: Duration,
        range: FileRange,
        drain: Drain,
        parking: Parking,
    ) -> Option<ParkId> {
        self.next_id += 1;
        let id = ParkId(self.next_id);
        let missing = self.workers.clone();
        for worker in &missing {
            self.actions.push_back(Action::Send(*worker, ToWorker::Park(id, range, drain)));
        }
        self.parks.insert(id, Park { range, drain, missing, complete: false, parking });
        self.check_park(now, id);
        self.parks.get(&id).is_some_and(|park| !park.complete).then_some(id)
    }

    pub(super) fn parked(&mut self, now: Duration, worker: WorkerId, id: ParkId) {
        if let Some(park) = self.parks.get_mut(&id) {
            park.missing.remove(&worker);
            self.check_park(now, id);
        }
    }

    fn check_park(&mut self, now: Duration, id: ParkId) {
        let Some(park) = self.parks.get_mut(&id) else { return };
        if park.complete || !park.missing.is_empty() {
            return;
        }
        park.complete = true;
        let (range, parking) = (park.range, park.parking);
        match parking {
            Parking::Enter => self.gathered(now, id),
            Parking::Leave => self.left(now, id),
            Parking::Evict => self.evicted(id, range),
            Parking::Unshare(owner) => {
                self.forget(range);
                self.locked(owner);
                self.release(id);
            }
            Parking::Punch(owner) => {
                let exact = self.punch_ranges.get(&owner).copied().unwrap_or(range);
                // R14: before the punch starts, so that no flush meanwhile forgets it.
                self.commit.soil(Dirt { metadata: true, device: None });
                let job = self.run(Job::Punch { range: exact });
                self.punches.insert(job, Punch { owner, park: id });
            }
        }
    }

    pub(super) fn release(&mut self, id: ParkId) {
        if self.parks.remove(&id).is_some() {
            for worker in self.workers.clone() {
                self.send(worker, ToWorker::Release(id));
            }
        }
    }
}
