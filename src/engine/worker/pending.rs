// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A request on its way: how much of it is still to be planned, and how it ends.

use super::Worker;
use crate::engine::barrier::Generation;
use crate::engine::io::Tag;
use crate::engine::message::ToKeeper;
use crate::engine::request::{Request, Status};
use crate::engine::units::FileRange;

/// What a request is waiting for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Its pieces: the rest is not planned yet or in flight.
    Running,
    /// An answer of the keeper.
    Keeper,
    /// The end of a park order, or a confirmed lease.
    Parked,
    /// A free operation or bounce buffer.
    Stalled,
}

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) request: Request,
    pub(super) phase: Phase,
    /// Planned up to here.
    pub(super) next: u64,
    /// Pieces that were planned and have to be planned again; empty as a rule.
    pub(super) redo: Vec<FileRange>,
    /// Pieces in flight.
    pub(super) pieces: u32,
    pub(super) status: Status,
    pub(super) locked: bool,
    pub(super) wrote_file: bool,
    /// In the barrier's books; `None` once it has been counted out.
    pub(super) generation: Option<Generation>,
}

impl Pending {
    pub(super) fn rest(&self) -> Option<FileRange> {
        let all = self.request.kind.range();
        self.redo
            .last()
            .copied()
            .or((self.next < all.end).then(|| FileRange::new(self.next, all.end)))
    }

    pub(super) fn advance(&mut self, done: FileRange) {
        match self.redo.last_mut() {
            Some(redo) if done.end < redo.end => redo.start = done.end,
            Some(_) => drop(self.redo.pop()),
            None => self.next = done.end,
        }
    }

    pub(super) fn fail(&mut self) {
        self.status = self.status.max(Status::IoError);
        self.next = self.request.kind.range().end;
        self.redo.clear();
    }
}

impl Worker {
    /// Everything is planned: ends the request once its pieces have ended.
    pub(super) fn finish(&mut self, tag: Tag) {
        let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return };
        if pending.pieces > 0 {
            return;
        }
        if pending.locked {
            let wrote_file = pending.wrote_file;
            return self.ask(tag, ToKeeper::Unlock { tag, wrote_file });
        }
        if let Some(generation) = pending.generation.take() {
            let durable = self.write_through && pending.status == Status::Ok;
            self.generations.end(generation);
            self.report_point();
            if durable {
                // R15, by the same barrier: the write is data that a flush of its own follows.
                return self.ask(tag, ToKeeper::Flush(tag));
            }
        }
        self.hand_back(tag);
    }

    pub(super) fn flushed(&mut self, tag: Tag, errno: i32) {
        let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return };
        if errno != 0 {
            pending.fail();
        }
        self.hand_back(tag);
    }

    fn hand_back(&mut self, tag: Tag) {
        let Some(pending) = self.requests.get_mut(tag.0 as usize).and_then(Option::take) else {
            return;
        };
        if pending.status != Status::Ok {
            self.counters.errors.add(1);
        }
        self.in_flight -= 1;
        self.done.push_back((tag, pending.status));
    }
}
