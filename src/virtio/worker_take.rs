// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the available ring to the engine.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::Bytes;

use super::{Disk, Queue, Worker};
use crate::engine::request::{self, Kind, MAX_SEGMENTS, Parsed, Request, SEGMENT_BYTES, Status};
use crate::virtio::Memory;
use crate::virtio::chain::{Chain, Malformed, Parts, Piece, Table};
use crate::virtio::features::MAX_DATA;
use crate::virtio::queue::Vring;
use crate::virtio::requests::Pending;

/// A chain on its way in.
#[derive(Clone, Copy)]
struct Arrival {
    queue: usize,
    head: u16,
    now: Duration,
}

impl<D: Disk> Worker<D> {
    /// Takes a batch from every queue that may be served. True if one of them has more.
    pub(super) fn take_all(&mut self, vrings: &[Vring]) -> bool {
        self.queues.iter_mut().for_each(Queue::pass);
        if self.holds_everything() {
            return false;
        }
        let Some(mut disk) = self.disk.take() else { return false };
        for (place, vring) in vrings.iter().enumerate() {
            self.take(&mut disk, place, vring);
        }
        self.disk = Some(disk);
        self.queues.iter().any(Queue::is_behind)
    }

    fn take(&mut self, disk: &mut D, place: usize, vring: &Vring) {
        let Some(queue) = self.queues.get_mut(place) else { return };
        // What is in flight will complete, and then this is asked again.
        if !queue.is_open() || disk.is_crowded() {
            return;
        }
        let mut heads = std::mem::take(&mut self.heads);
        heads.clear();
        match queue.take(vring, &self.memory, &mut heads) {
            Err(why) => self.break_queue(place, why),
            Ok(_) if heads.is_empty() => {}
            Ok(at) => {
                self.tell_of_start(place);
                self.adopt_write_through();
                let memory = Arc::clone(&self.memory);
                let table = Table::new(&memory, at.table, u32::from(at.size));
                self.foresee(&table, &heads);
                let now = disk.now();
                for head in heads.drain(..) {
                    let arrival = Arrival { queue: place, head, now };
                    self.arrive(disk, &memory, &table, arrival);
                }
            }
        }
        self.heads = heads;
    }

    /// Where a ring begins says something about its driver, which counts for this batch already.
    fn tell_of_start(&mut self, place: usize) {
        let Some(queue) = self.queues.get_mut(place) else { return };
        if let Some(index) = queue.begun() {
            self.backend.ring_started(queue.index, index);
        }
    }

    /// Has the places of a batch looked for in a large map all at once.
    fn foresee(&mut self, table: &Table<'_>, heads: &[u16]) {
        if heads.len() > 1 && self.engine.foresees() {
            self.ahead.clear();
            let base = self.backend.limits().base;
            let place = |head: &u16| table.glimpse(*head)?.checked_add(base);
            self.ahead.extend(heads.iter().filter_map(place));
            self.engine.foresee(&self.ahead);
        }
    }

    /// Looked at after a batch was taken and before any of it is accepted: a guest that was told
    /// that `writeback` is 0 before it made a write available gets write-through for it.
    pub(super) fn adopt_write_through(&mut self) {
        let wanted = self.backend.write_through();
        if self.write_through != Some(wanted) {
            self.write_through = Some(wanted);
            self.engine.set_write_through(wanted);
        }
    }

    fn arrive(&mut self, disk: &mut D, memory: &Arc<Memory>, table: &Table<'_>, arrival: Arrival) {
        match self.chain.parse(table, arrival.head) {
            Ok(parts) => self.begin(disk, memory, parts, arrival),
            Err(why) => self.refuse(arrival, why),
        }
    }

    /// Nobody knows where the status of a malformed chain would go: it goes back unwritten.
    fn refuse(&mut self, arrival: Arrival, why: Malformed) {
        let Some(queue) = self.queues.get_mut(arrival.queue) else { return };
        queue.counters.malformed.add(1);
        queue.done(arrival.head, 0);
        let index = queue.index;
        self.complain(arrival.queue);
        if !self.memory_is_lost() {
            tracing::warn!(queue = index, %why, "malformed descriptor chain");
        }
    }

    fn begin(&mut self, disk: &mut D, memory: &Arc<Memory>, parts: Parts, arrival: Arrival) {
        let kind = match self.parse(&parts) {
            Parsed::Io(kind) => {
                self.ranges.clear();
                kind
            }
            Parsed::Segments(kind) => match self.read_ranges(memory, kind, &parts) {
                Ok(kind) => kind,
                Err(status) => return self.answer_now(&parts, arrival, status),
            },
            Parsed::GetId => {
                let status = self.write_id(memory);
                return self.answer_now(&parts, arrival, status);
            }
            Parsed::Answer(status) => return self.answer_now(&parts, arrival, status),
        };
        if self.memory_is_lost() {
            // What was read of the request itself.
            return self.answer_now(&parts, arrival, Status::IoError);
        }
        let Arrival { queue, head, now } = arrival;
        let written = written(&parts);
        let pending = Pending { queue, head, status: parts.status, written, since: now };
        let Some(tag) = self.requests.enter(pending) else {
            return self.answer_now(&parts, arrival, Status::IoError);
        };
        let aligned = match data(&self.chain, kind) {
            [] => Some(true),
            pieces => disk.attach(tag, memory, pieces),
        };
        match aligned {
            Some(mem_aligned) => {
                let more = self.ranges.get(1..).unwrap_or_default();
                self.engine.accept_all(disk, tag, Request { kind, mem_aligned }, more);
            }
            None => {
                self.requests.leave(tag);
                self.answer_now(&parts, arrival, Status::IoError);
            }
        }
    }

    fn parse(&self, parts: &Parts) -> Parsed {
        let Some(header) = parts.header else { return Parsed::Answer(Status::IoError) };
        if parts.readable > MAX_DATA || parts.writable > MAX_DATA {
            return Parsed::Answer(Status::IoError);
        }
        request::parse(header, parts.readable, parts.writable, self.backend.limits())
    }

    /// Reads the ranges of a DISCARD or WRITE_ZEROES into `self.ranges`; gives the first.
    fn read_ranges(&mut self, memory: &Memory, kind: u32, parts: &Parts) -> Result<Kind, Status> {
        let mut bytes = [0; MAX_SEGMENTS * SEGMENT_BYTES];
        let length = usize::try_from(parts.readable).unwrap_or(usize::MAX);
        let bytes = bytes.get_mut(..length).ok_or(Status::IoError)?;
        let mut rest = &mut *bytes;
        for (start, len) in self.chain.readable_data() {
            let take = rest.len().min(usize::try_from(*len).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(take);
            memory.read_slice(now, *start).map_err(|_| Status::IoError)?;
            rest = later;
        }
        request::segments(kind, bytes, self.backend.limits(), &mut self.ranges)?;
        self.ranges.first().copied().ok_or(Status::IoError)
    }

    fn answer_now(&mut self, parts: &Parts, arrival: Arrival, status: Status) {
        if status != Status::Ok {
            self.counters.errors.add(1);
        }
        self.answer(arrival.queue, arrival.head, parts.status, status, written(parts));
    }

    /// Copies the serial number into the first 20 writable bytes (virtio 1.3, 5.2.6).
    fn write_id(&self, memory: &Memory) -> Status {
        let mut rest = self.backend.id().as_slice();
        for (start, len) in self.chain.writable_data() {
            let take = rest.len().min(usize::try_from(*len).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at(take);
            if memory.write_slice(now, *start).is_err() {
                return Status::IoError;
            }
            rest = later;
        }
        Status::Ok
    }
}

/// The pieces a request's data are in.
fn data(chain: &Chain, kind: Kind) -> &[Piece] {
    match kind {
        Kind::Read(_) => chain.writable_data(),
        Kind::Write(_) => chain.readable_data(),
        Kind::Discard(_) | Kind::WriteZeroes { .. } | Kind::Flush => &[],
    }
}

/// Bytes of guest memory a request may write, the status byte included.
fn written(parts: &Parts) -> u32 {
    u32::try_from(parts.writable.saturating_add(1)).unwrap_or(u32::MAX)
}
