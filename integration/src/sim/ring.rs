// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ring between a worker and the kernel: what is queued goes over some time later, all at once or in parts, and a raw operation
//! whose check of the lease is too old by then goes back instead of over (R2a).
//!
//! The rule is that of `sys::uring::enter`: it holds for what the kernel would not take at first, too.

use std::collections::{BTreeMap, VecDeque};

use extentd::engine::Completion;
use extentd::engine::message::WorkerId;

use super::hazard::Hazard;
use super::mutant::Mutant;
use super::ops::Class;
use super::scenario::bytes;
use super::world::{Event, World};

/// EAGAIN and EINTR, negated.
const AGAIN: i32 = -11;
const INTERRUPTED: i32 = -4;

/// An operation that the kernel has not taken.
#[derive(Clone, Copy, Debug)]
struct Queued {
    key: u64,
    /// When its lease was checked, or later.
    checked: u64,
    /// It was handed over before, and not taken.
    offered: bool,
}

/// By worker, oldest first.
#[derive(Debug, Default)]
pub(super) struct Rings(BTreeMap<WorkerId, VecDeque<Queued>>);

impl Rings {
    /// The daemon dies: nothing that the kernel has not taken is left. Their numbers.
    pub(super) fn lose(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.0).into_values().flatten().map(|queued| queued.key).collect()
    }
}

impl World {
    /// An operation is queued for the kernel, which takes it at once unless the ring is a difficult one.
    pub(super) fn hand_over(&mut self, key: u64, worker: WorkerId) {
        if self.scenario.hard.refuses == 0 {
            return self.taken(key);
        }
        let ring = self.strain.rings.0.entry(worker).or_default();
        ring.push_back(Queued { key, checked: self.now, offered: false });
        if ring.len() == 1 {
            let delay = self.delay(1, 60);
            self.daemon_after(delay, Event::Enter(worker));
        }
    }

    fn taken(&mut self, key: u64) {
        let raw = self.ops.get(&key).filter(|op| op.class.is_raw());
        let bytes = raw.map(|op| bytes(op.sectors.len()));
        let device = bytes.map_or(0, |bytes| self.device_delay(bytes));
        let delay = device + self.op_delay();
        self.after(delay, Event::Step(key));
    }

    /// One `io_uring_enter`: the kernel takes everything, or is short of memory and takes only some, or a signal comes first.
    pub(super) fn enter(&mut self, worker: WorkerId) {
        let mut ring = self.strain.rings.0.remove(&worker).unwrap_or_default();
        ring.retain(|queued| !self.goes_back(worker, queued));
        let refuses = self.rng.chance(self.scenario.hard.refuses);
        let takes = if refuses { self.rng.index(ring.len()) } else { ring.len() };
        for queued in ring.drain(..takes) {
            self.check_handed(queued.key);
            self.taken(queued.key);
        }
        if ring.is_empty() {
            return;
        }
        self.hit(Hazard::NotTaken);
        ring.iter_mut().for_each(|queued| queued.offered = true);
        self.strain.rings.0.insert(worker, ring);
        // After EINTR it is tried again at once, after EAGAIN when the thread has slept, or has other work.
        let delay = if self.rng.chance(300) { 2 } else { self.delay(2_000, 15_000) };
        self.daemon_after(delay, Event::Enter(worker));
    }

    /// Whether an operation is not handed over because its lease was checked too long ago; it ends with EAGAIN then.
    fn goes_back(&mut self, worker: WorkerId, queued: &Queued) -> bool {
        let Some(fresh) = self.scenario.geometry.lease_fresh else { return false };
        let Some((id, class)) = self.ops.get(&queued.key).map(|o| (o.id, o.class)) else {
            return false;
        };
        let old = u128::from(self.now - queued.checked) > fresh.as_micros();
        let checks = !(queued.offered && self.scenario.is(Mutant::StaleSubmission));
        if !(class.is_raw() && old && checks) {
            return false;
        }
        self.trace(|| format!("w{} does not hand over operation {}", worker.0, id.0));
        let done = Completion { id, result: AGAIN };
        self.ops.remove(&queued.key);
        self.hit(if queued.offered { Hazard::LeaseCheckedAgain } else { Hazard::LeaseCheckStale });
        self.deliver(worker, done);
        true
    }

    /// R1, as the kernel gets to see it.
    fn check_handed(&mut self, key: u64) {
        let Some(flight) = self.ops.get(&key) else { return };
        if flight.class.is_raw() && !self.scenario.identity() && !self.lease.is_held() {
            let what = format!("{:?} at {:?}", flight.class, flight.sectors);
            self.fail(format!("{what} is handed to the kernel without a lease (R2a)"));
        }
    }

    /// What an operation says at once that is to be tried again. The daemon does not try a sync again, and no kernel asks for it.
    pub(super) fn try_again(&mut self, class: Class) -> Option<i32> {
        let again = self.scenario.hard.again;
        if again == 0
            || matches!(class, Class::SyncImage | Class::SyncDevice)
            || !self.rng.chance(again)
        {
            return None;
        }
        self.hit(Hazard::Again);
        Some(if self.rng.chance(500) { AGAIN } else { INTERRUPTED })
    }
}
