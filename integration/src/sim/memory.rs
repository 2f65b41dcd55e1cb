// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory and bounce buffers, as operations see them: whole sectors of what exists.

use extentd::engine::io::Buf;
use extentd::engine::message::WorkerId;

use super::disk::{Stamp, ZERO};
use super::ops::InFlight;
use super::scenario::sectors;
use super::world::World;

impl World {
    /// What a write has in sector `i` of its memory.
    pub(super) fn data(&mut self, flight: &InFlight, i: usize) -> Stamp {
        match (&flight.pinned, flight.buf) {
            (Some(pinned), _) => pinned.get(i).copied().unwrap_or(ZERO),
            (None, Some(buf)) => self.memory_get(flight.worker, buf, i),
            (None, None) => ZERO,
        }
    }

    pub(super) fn receive(&mut self, flight: &InFlight, buf: Buf, i: usize, stamp: Stamp) {
        if flight.life == self.life && self.alive {
            self.memory_set(flight.worker, buf, i, stamp);
        }
    }

    /// The daemon is about to die: its writes keep their memory and go on without it.
    pub(super) fn pin_all(&mut self) {
        for key in self.ops.keys().copied().collect::<Vec<_>>() {
            let Some(mut flight) = self.ops.remove(&key) else { continue };
            if flight.pinned.is_none() {
                let count = flight.sectors.len();
                flight.pinned = Some((0..count).map(|i| self.data(&flight, i)).collect());
                flight.hold = if self.rng.chance(600) { self.rng.range(1_000, 60_000) } else { 0 };
            }
            self.ops.insert(key, flight);
        }
    }

    /// Where sector `i` of a buffer is, if it is a whole sector of existing memory.
    fn memory(&mut self, worker: WorkerId, buf: Buf, i: usize) -> Option<&mut Stamp> {
        let (data, at) = match buf {
            Buf::Guest { tag, at, .. } => (self.guest.memory(worker, tag)?, at),
            Buf::Bounce { slot, at, .. } => {
                let index = usize::try_from(slot.0).ok()?;
                (self.bounce.get_mut(&worker)?.get_mut(index)?, u64::from(at))
            }
        };
        if !at.is_multiple_of(512) || !buf.len().is_multiple_of(512) {
            return None;
        }
        data.get_mut(sectors(at) + i)
    }

    pub(super) fn memory_get(&mut self, worker: WorkerId, buf: Buf, i: usize) -> Stamp {
        if let Some(stamp) = self.memory(worker, buf, i) {
            return *stamp;
        }
        self.fail(format!("w{} reads sector {i} of memory it has not got: {buf:?}", worker.0));
        ZERO
    }

    pub(super) fn memory_set(&mut self, worker: WorkerId, buf: Buf, i: usize, stamp: Stamp) {
        match self.memory(worker, buf, i) {
            Some(place) => *place = stamp,
            None => self.fail(format!("w{} writes memory it has not got: {buf:?}", worker.0)),
        }
    }
}
