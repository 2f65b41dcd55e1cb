// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block-granular range lock across workers (R10a): first come, first served where ranges overlap.

use std::collections::VecDeque;

use super::io::Tag;
use super::message::WorkerId;
use super::units::FileRange;

/// Whose lock: a request of a worker.
pub type Owner = (WorkerId, Tag);

/// A lock, asked for or held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lock<P> {
    /// Whose.
    pub owner: Owner,
    /// What, in whole filesystem blocks.
    pub range: FileRange,
    /// What it is for, and how far that is.
    pub purpose: P,
}

/// The locks of an image.
#[derive(Debug)]
pub struct RangeLocks<P> {
    held: Vec<Lock<P>>,
    waiting: VecDeque<Lock<P>>,
}

impl<P> Default for RangeLocks<P> {
    fn default() -> Self {
        Self { held: Vec::new(), waiting: VecDeque::new() }
    }
}

impl<P: Copy> RangeLocks<P> {
    /// Queues a request for a lock; [`grant`](Self::grant) says when it is held.
    pub fn ask(&mut self, lock: Lock<P>) {
        self.waiting.push_back(lock);
    }

    /// Makes the next lock held that nothing held, and nothing that waits longer, overlaps.
    pub fn grant(&mut self) -> Option<Lock<P>> {
        let index = self.waiting.iter().enumerate().position(|(i, lock)| {
            let free = |other: &Lock<P>| !other.range.overlaps(&lock.range);
            self.held.iter().all(free) && self.waiting.iter().take(i).all(free)
        })?;
        let lock = self.waiting.remove(index)?;
        self.held.push(lock);
        Some(lock)
    }

    /// The locks held.
    pub fn held(&self) -> impl Iterator<Item = &Lock<P>> {
        self.held.iter()
    }

    /// An owner's held lock.
    pub fn find(&mut self, owner: Owner) -> Option<&mut Lock<P>> {
        self.held.iter_mut().find(|lock| lock.owner == owner)
    }

    /// Gives an owner's lock back.
    pub fn release(&mut self, owner: Owner) -> Option<Lock<P>> {
        let index = self.held.iter().position(|lock| lock.owner == owner)?;
        Some(self.held.swap_remove(index))
    }
}

#[cfg(test)]
#[path = "locks_tests.rs"]
mod tests;
