// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A request's pieces: when one may start, and what follows its end.

use std::collections::VecDeque;

use super::Worker;
use super::pending::Phase;
use crate::engine::io::{Io, Tag};
use crate::engine::ops::{self, Running};
use crate::engine::pace::Lane;
use crate::engine::plan::{Access, Piece, Route};
use crate::engine::units::FileRange;

impl Worker {
    /// Starts a piece; `false` if the request has to wait.
    pub(super) fn start_piece(
        &mut self,
        io: &mut impl Io,
        tag: Tag,
        access: Access,
        piece: Piece,
    ) -> bool {
        let raw = matches!(piece.route, Route::Device(_));
        let lane = Lane::of(access.write, access.zeroes && !piece.bounce);
        if raw && !self.admits(io, lane, piece.unit.len()) {
            self.wait_in_crowd(tag, lane);
            return false;
        }
        let full = !self.ops.has_room() || (piece.bounce && self.bounce.is_empty());
        if raw && full && self.admitting == Some(lane) {
            self.wait_in_crowd(tag, lane);
            return false;
        }
        let stalled = full || self.meets_its_own(tag, access, &piece);
        // Zeros too: nobody may have filled the hole since the map was read (R2a). They start and end here.
        let mapped = raw || piece.route == Route::Zero && self.rules.zero_lease;
        let parked = !stalled && mapped && {
            let now = if raw { io.lately() } else { io.now() };
            !self.lease_ours(io, now)
        };
        let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return false };
        if parked {
            pending.phase = Phase::Parked;
            self.parked.push_back(tag);
            return false;
        }
        if stalled {
            pending.phase = Phase::Stalled;
            self.stalled.push_back(tag);
            return false;
        }
        pending.advance(piece.range);
        if piece.route == Route::Zero {
            self.counters.zero.add(1);
            if !access.write {
                ops::zero(io, tag, piece.range, access.base);
            }
            return true;
        }
        pending.pieces += 1;
        pending.wrote_file |= access.write && piece.route == Route::File;
        let running = Running::new(tag, piece, access);
        if raw {
            self.counters.direct.add(1)
        } else {
            self.counters.file.add(1)
        }
        if piece.bounce {
            self.counters.bounced.add(1);
        }
        self.launch(io, running);
        true
    }

    /// Whether a raw operation of `bytes` may start: there is room for it, and nobody came before it.
    fn admits(&mut self, io: &impl Io, lane: Lane, bytes: u64) -> bool {
        let behind = self.crowded > 0
            && self.admitting != Some(lane)
            && self.crowd.get(lane as usize).is_some_and(|crowd| !crowd.is_empty());
        !behind && self.pace(lane).admits(io.lately(), bytes)
    }

    fn wait_in_crowd(&mut self, tag: Tag, lane: Lane) {
        let first = self.admitting == Some(lane);
        if let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize)
            && let Some(crowd) = self.crowd.get_mut(lane as usize)
        {
            pending.phase = Phase::Stalled;
            self.crowded += 1;
            // The one that is being tried keeps its place.
            if first { crowd.push_front(tag) } else { crowd.push_back(tag) }
        }
    }

    /// Goes on with the requests that wait for a lane to admit them, as far as it does.
    pub(super) fn admit(&mut self, io: &mut impl Io) {
        for lane in Lane::ALL {
            while self.ops.has_room()
                && let Some(tag) = self.crowd.get_mut(lane as usize).and_then(VecDeque::pop_front)
            {
                self.crowded -= 1;
                self.admitting = Some(lane);
                self.resume(io, tag, |_| ());
                self.admitting = None;
                let first = self.crowd.get(lane as usize).and_then(VecDeque::front);
                if first == Some(&tag) {
                    break;
                }
            }
        }
    }

    /// Whether a read-modify-write through the file would meet another piece of its own request in
    /// the same unit: of pieces that were raw and are planned again, several may lie in one. The
    /// lock keeps only other requests out.
    fn meets_its_own(&self, tag: Tag, access: Access, piece: &Piece) -> bool {
        access.write
            && piece.route == Route::File
            && piece.partial()
            && self.ops.iter().any(|running| running.meets(tag, piece.unit))
    }

    /// A piece ended; called by `ops.rs`.
    pub(in crate::engine) fn piece_done(&mut self, io: &mut impl Io, tag: Tag, ok: bool) {
        let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return };
        pending.pieces -= 1;
        if !ok {
            pending.fail();
        }
        match pending.phase {
            Phase::Running => self.advance(io, tag),
            // The rest was cut off by the failure: nothing is waited for any more. The keeper's
            // answer, if that was it, still comes and finishes the request.
            Phase::Parked | Phase::Stalled | Phase::Keeper => {}
        }
    }

    /// Zeros have to be written after all.
    pub(in crate::engine) fn bounce_zeroes(
        &mut self,
        io: &mut impl Io,
        tag: Tag,
        range: FileRange,
    ) {
        if let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) {
            pending.request.mem_aligned = false;
        }
        self.piece_again(io, tag, range);
    }

    /// A piece could not be carried to its end under the lease it was planned with. Of a write, all that
    /// the request has of the blocks is written again, what has been written among it: through the file
    /// the rest alone would be a read-modify-write, which puts back what others write meanwhile.
    pub(in crate::engine) fn piece_again(&mut self, io: &mut impl Io, tag: Tag, rest: FileRange) {
        let block = u64::from(self.geometry.fs_block);
        let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) else { return };
        pending.pieces -= 1;
        let kind = pending.request.kind;
        let blocks = || rest.round_out(block).intersect(&kind.range());
        pending.redo.push(if kind.writes() { blocks() } else { rest });
        if pending.phase == Phase::Running {
            self.advance(io, tag);
        }
    }
}
