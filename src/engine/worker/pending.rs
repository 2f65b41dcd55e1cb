// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A request on its way: how much of it is still to be planned, and how it ends.

use std::task::Poll;

use super::Worker;
use crate::engine::Geometry;
use crate::engine::barrier::Generation;
use crate::engine::io::{Io, Op, OpId, Tag};
use crate::engine::message::ToKeeper;
use crate::engine::ops::EOPNOTSUPP;
use crate::engine::pace::{Lane, Pace};
use crate::engine::plan::Access;
use crate::engine::request::{Kind, Request, Status};
use crate::engine::shared::Mode;
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
    /// What the request is about after this range, the next one last; empty as a rule.
    pub(super) later: Vec<Kind>,
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
        self.later.clear();
    }

    pub(super) fn access(&self, raw: &[Pace; 3]) -> Access {
        let zeroes = matches!(self.request.kind, Kind::WriteZeroes { .. });
        let lane = Lane::of(self.request.kind.writes(), zeroes);
        let [read, write, zero] = raw;
        let pace = match lane {
            Lane::Read => read,
            Lane::Write => write,
            Lane::Zeroes => zero,
        };
        Access {
            longest: pace.longest(),
            write: self.request.kind.writes(),
            zeroes,
            locked: self.locked,
            mem_aligned: self.request.mem_aligned,
            base: self.request.kind.range().start,
        }
    }

    /// The first part of a range: of a large one no more than may be locked, or be in the way of a
    /// lease break, at a time (R17).
    fn shorten(&mut self, g: &Geometry) {
        let whole = self.request.kind.range();
        let most = match self.request.kind {
            Kind::Discard(_) | Kind::WriteZeroes { unmap: true, .. } => g.punch_bytes,
            Kind::WriteZeroes { unmap: false, .. } => g.zeroes_bytes,
            Kind::Read(_) | Kind::Write(_) | Kind::Flush => return,
        };
        // Cut where a block ends.
        let end = (whole.start / most + 1).saturating_mul(most);
        if whole.end > end {
            self.later.push(self.request.kind.with_range(FileRange::new(end, whole.end)));
            self.request.kind = self.request.kind.with_range(FileRange::new(whole.start, end));
        }
    }

    /// The keeper has punched the whole blocks of the range, or says why not.
    pub(super) fn punched(&mut self, errno: i32, block: u64) {
        let range = self.request.kind.range();
        self.next = range.end;
        match (self.request.kind, errno) {
            // DISCARD is advice (virtio 1.3, 5.2.6.2): a filesystem that cannot punch is no error.
            (Kind::Discard(_), 0 | EOPNOTSUPP) => {}
            (Kind::WriteZeroes { .. }, 0) => {
                let inside = range.round_in(block);
                let edges = [
                    FileRange::new(inside.end, range.end),
                    FileRange::new(range.start, inside.start),
                ];
                let edges = edges.into_iter().filter(|edge| !edge.is_empty());
                self.later.extend(edges.map(|range| Kind::WriteZeroes { range, unmap: false }));
            }
            (Kind::WriteZeroes { .. }, EOPNOTSUPP) => {
                self.later.push(Kind::WriteZeroes { range, unmap: false });
            }
            _ => self.fail(),
        }
    }
}

impl Worker {
    /// Starts with a request's range: asks the keeper where it is not just reading and writing.
    pub(super) fn begin(&mut self, tag: Tag) {
        let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return };
        pending.shorten(&self.geometry);
        let range = pending.request.kind.range();
        pending.next = range.start;
        let block = u64::from(self.geometry.fs_block);
        match pending.request.kind {
            Kind::Flush => {
                self.settle_down();
                self.ask(tag, ToKeeper::Flush(tag));
            }
            Kind::Discard(_) | Kind::WriteZeroes { unmap: true, .. } => {
                if range.round_in(block).is_empty() && self.rules.punch_rounded {
                    // Nothing to give back: of a discard nothing is left, of zeroes the writing.
                    pending.punched(EOPNOTSUPP, block);
                } else {
                    self.ask(tag, ToKeeper::Discard(tag, range));
                }
            }
            Kind::Read(_) | Kind::Write(_) | Kind::WriteZeroes { unmap: false, .. } => {}
        }
    }

    /// Everything of a range is planned: once its pieces have ended, goes on with the next (then it
    /// says `true`) or ends the request.
    pub(super) fn finish(&mut self, io: &mut impl Io, tag: Tag) -> bool {
        let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return false };
        if pending.pieces > 0 {
            return false;
        }
        if pending.locked {
            let wrote_file = std::mem::take(&mut pending.wrote_file);
            let range = pending.request.kind.range().round_out(u64::from(self.geometry.fs_block));
            // Writes that failed may have left anything, and in filesystem mode there is no map to care for.
            let ask = wrote_file && pending.status == Status::Ok && self.view.mode == Mode::Direct;
            let uncached =
                ask && io.submit(OpId(u32::MAX), Op::CachedPages(range)) == Poll::Ready(0);
            self.ask(tag, ToKeeper::Unlock { tag, wrote_file, uncached });
            return false;
        }
        if let Some(kind) = pending.later.pop() {
            pending.request.kind = kind;
            self.begin(tag);
            return true;
        }
        self.end(tag);
        false
    }

    /// Ends a request: a flush may be waiting for it, and in write-through it for a flush.
    fn end(&mut self, tag: Tag) {
        let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return };
        if let Some(generation) = pending.generation.take() {
            let durable = self.write_through && pending.status == Status::Ok;
            self.generations.end(generation);
            self.report_point();
            if durable {
                // R15, by the same barrier: the write is data that a flush of its own follows.
                self.settle_down();
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
        self.asking -= u32::from(pending.phase == Phase::Keeper);
        self.fence.ended(tag);
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
