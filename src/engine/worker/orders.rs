// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a worker owes the keeper: park orders kept and answered, flush points reported, the lease
//! confirmed before raw I/O, syncs carried out.

use std::time::Duration;

use super::Worker;
use crate::engine::Op;
use crate::engine::barrier::Generation;
use crate::engine::io::{Io, OpId};
use crate::engine::message::{Drain, ParkId, ToKeeper};
use crate::engine::ops::Running;
use crate::engine::pace::Pace;
use crate::engine::plan::Route;
use crate::engine::units::{DeviceOffset, FileRange};

#[derive(Clone, Copy, Debug)]
pub(super) struct ParkOrder {
    pub(super) id: ParkId,
    pub(super) range: FileRange,
    pub(super) drain: Drain,
    pub(super) answered: bool,
}

impl Worker {
    /// Says the last word to the keeper; nothing may be in flight.
    pub fn retire(&mut self) {
        debug_assert_eq!(self.in_flight, 0, "a worker retires with requests in flight");
        self.settle_down();
    }

    /// A data-modifying request begins. Said before any of it is written: who sees that nobody is stirred takes it that there
    /// is nothing to drain (R13).
    pub(super) fn stir(&mut self) -> Generation {
        if !std::mem::replace(&mut self.stirred, true) {
            self.shared.stir();
        }
        self.generations.begin()
    }

    /// Says that nothing is being written any more, if that is so and was not said.
    pub(super) fn settle_down(&mut self) {
        if self.stirred && (self.generations.is_still() || !self.rules.still) {
            self.stirred = false;
            let (raw, file) = (self.raw_written.take(), std::mem::take(&mut self.file_written));
            self.say(ToKeeper::Still { raw, file });
        }
    }

    /// R2a: is the lease ours, as far as was confirmed shortly before `now`? If it is not, raw I/O stops here
    /// until the keeper has gone through a break.
    pub(in crate::engine) fn lease_ours(&mut self, io: &mut impl Io, now: Duration) -> bool {
        let Some(fresh) = self.geometry.lease_fresh else { return true };
        if self.confirmed.is_some_and(|at| now.saturating_sub(at) <= fresh) {
            return true;
        }
        if io.submit(OpId(u32::MAX), Op::ConfirmLease) == std::task::Poll::Ready(1) {
            self.confirmed = Some(now);
            return true;
        }
        self.confirmed = None;
        if !self.lease_lost {
            self.lease_lost = true;
            self.say(ToKeeper::LeaseLost);
        }
        false
    }

    /// The lease is asked for again before the next raw operation, if this was one.
    pub(in crate::engine) const fn forget_confirmation(&mut self, raw: bool) {
        if raw {
            self.confirmed = None;
        }
    }

    /// A write operation ended, well or not: the medium may have changed.
    pub(in crate::engine) fn wrote(&mut self, device: Option<DeviceOffset>) {
        match device {
            None => self.file_written = true,
            Some(at) => {
                self.raw_written = Some(at);
                if !self.dirty_told {
                    self.dirty_told = true;
                    self.say(ToKeeper::Dirty);
                }
            }
        }
    }

    pub(super) fn report_point(&mut self) {
        if let Some(id) = self.generations.reached() {
            let (raw, file) = (self.raw_written.take(), std::mem::take(&mut self.file_written));
            self.say(ToKeeper::PointReached { id, raw, file });
            self.settle_down();
        }
    }

    /// Answers the park orders whose drain is reached, and says what the others wait for.
    pub(in crate::engine) fn answer_parks(&mut self) {
        for park in self.parks.iter_mut().filter(|park| !park.answered) {
            let busy = |op: &Running| {
                op.piece().is_some_and(|piece| {
                    let raw = matches!(piece.route, Route::Device(_));
                    (raw || park.drain == Drain::Everything) && piece.unit.overlaps(&park.range)
                })
            };
            if !self.rules.drain || !self.ops.iter().any(busy) {
                park.answered = true;
                self.outbox.push_back(ToKeeper::Parked(park.id));
            }
        }
        self.counters.draining.set(self.raw.iter().map(Pace::in_flight).sum());
    }

    /// Whether any park order waits for something.
    pub(in crate::engine) fn draining(&self) -> bool {
        self.parks.iter().any(|park| !park.answered)
    }

    /// Starts the sync the keeper ordered, when an operation is free.
    pub(super) fn start_sync(&mut self, io: &mut impl Io) {
        if !self.ops.has_room() {
            return;
        }
        if let Some((image, device)) = self.sync.take() {
            self.launch(io, Running::sync(image, device));
        }
    }
}
