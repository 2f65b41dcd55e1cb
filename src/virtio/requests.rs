// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The requests a worker has taken from its queues and not yet answered, by tag.

use std::time::Duration;

use vm_memory::GuestAddress;

use crate::engine::Tag;

/// What is needed to answer a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pending {
    /// The queue it came from, by its place in the worker.
    pub(crate) queue: usize,
    /// Its chain's head.
    pub(crate) head: u16,
    /// Where its status byte goes.
    pub(crate) status: GuestAddress,
    /// Bytes of guest memory it may have written, the status byte included.
    pub(crate) written: u32,
    /// When it was taken.
    pub(crate) since: Duration,
}

/// A table that grows to what a guest has used at a time: most never have as many requests in flight as all their queues
/// have room for, and an idle device is to cost little.
#[derive(Debug)]
pub(crate) struct Requests {
    slots: Vec<Option<Pending>>,
    /// Most of them.
    limit: usize,
    /// Free places; the last one freed is taken first, so that its memory is still in the cache.
    free: Vec<u32>,
}

impl Requests {
    /// Room for `count` requests.
    pub(crate) fn new(count: u32) -> Self {
        let limit = usize::try_from(count).unwrap_or(usize::MAX);
        Self { slots: Vec::new(), limit, free: Vec::new() }
    }

    /// Enters a request. `None` if the table is full.
    pub(crate) fn enter(&mut self, pending: Pending) -> Option<Tag> {
        let Some(index) = self.free.pop() else {
            let index = Some(self.slots.len()).filter(|index| *index < self.limit)?;
            self.slots.push(Some(pending));
            return u32::try_from(index).ok().map(Tag);
        };
        *self.slot(index)? = Some(pending);
        Some(Tag(index))
    }

    /// Takes a request out.
    pub(crate) fn leave(&mut self, tag: Tag) -> Option<Pending> {
        let pending = self.slot(tag.0)?.take()?;
        self.free.push(tag.0);
        Some(pending)
    }

    /// When the oldest request of a queue (of all, if `None`) was taken.
    pub(crate) fn oldest(&self, queue: Option<usize>) -> Option<Duration> {
        let of_queue = |p: &&Pending| queue.is_none_or(|queue| queue == p.queue);
        self.slots.iter().flatten().filter(of_queue).map(|pending| pending.since).min()
    }

    fn slot(&mut self, index: u32) -> Option<&mut Option<Pending>> {
        self.slots.get_mut(usize::try_from(index).ok()?)
    }
}

#[cfg(test)]
#[path = "requests_tests.rs"]
mod tests;
