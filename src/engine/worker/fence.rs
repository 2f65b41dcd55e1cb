// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--barrier=strict`: requests that arrive behind a FLUSH wait until it has ended (R13).

use std::collections::VecDeque;

use super::Worker;
use crate::engine::io::{Io, Tag};
use crate::engine::request::Kind;

/// What holds requests back, and those that are held.
#[derive(Debug, Default)]
pub(super) struct Fence {
    pub(super) strict: bool,
    /// A flush of whatever queue is under way: the keeper has set its point and not passed it.
    open: bool,
    /// Requests in the order they came, and among them the flushes they are behind.
    held: VecDeque<Tag>,
}

impl Fence {
    /// A flush point is set. `all`: it holds back what arrives on any queue, not only behind the flush on its own.
    pub(super) const fn open(&mut self, all: bool) {
        self.open = self.strict && all;
    }

    /// No flush is under way any more.
    pub(super) const fn close(&mut self) {
        self.open = false;
    }

    /// A request has ended; if it was a flush, nothing is behind it any more.
    pub(super) fn ended(&mut self, tag: Tag) {
        self.held.retain(|held| *held != tag);
    }
}

impl Worker {
    /// Starts with a request, or holds it back. A flush always goes to the keeper at once, for it has to
    /// keep its place among those of other workers.
    pub(super) fn enter_in_turn(&mut self, io: &mut impl Io, tag: Tag, kind: Kind) {
        let behind = self.fence.open || !self.fence.held.is_empty();
        let flush = kind == Kind::Flush;
        if self.fence.strict && (flush || behind) {
            self.fence.held.push_back(tag);
        }
        if flush || !behind {
            self.enter(io, tag);
        }
    }

    /// From here on a flush waits for the request.
    fn enter(&mut self, io: &mut impl Io, tag: Tag) {
        let Some(Some(pending)) = self.requests.get(tag.0 as usize) else { return };
        if pending.request.kind.modifies() {
            let generation = self.stir();
            if let Some(Some(pending)) = self.requests.get_mut(tag.0 as usize) {
                pending.generation = Some(generation);
            }
        }
        self.begin(tag);
        self.advance(io, tag);
    }

    /// Starts with what was held, up to the next flush.
    pub(super) fn pass(&mut self, io: &mut impl Io) {
        while !self.fence.open
            && let Some(tag) = self.fence.held.front().copied()
            && let Some(Some(pending)) = self.requests.get(tag.0 as usize)
            && pending.request.kind != Kind::Flush
        {
            self.fence.held.pop_front();
            self.enter(io, tag);
        }
    }
}
