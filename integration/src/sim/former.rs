// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device's page cache: what a block held in a former life, when it was the filesystem's metadata.
//!
//! File I/O goes around it and leaves it stale. A raw write wants the page gone; where a buffer of it is still in use the kernel
//! makes the write a buffered one, and the whole block goes to the disk as the page has it.

use std::collections::BTreeMap;

use super::disk::Stamp;
use super::rng::Rng;

/// Pages that do not go, by place.
#[derive(Hash, Debug, Default)]
pub(super) struct Former {
    pages: BTreeMap<usize, Vec<Stamp>>,
    /// How often in 1000 a block has one when a file gets it.
    pub(super) often: u64,
}

impl Former {
    /// A file gets the block at `place`, on which the disk has `now`.
    pub(super) fn allocated(&mut self, place: usize, now: Vec<Stamp>, rng: &mut Rng) {
        if self.often == 0 {
            return;
        }
        if rng.chance(self.often) {
            self.pages.insert(place, now);
        } else {
            self.pages.remove(&place);
        }
    }

    /// The page of `place`, to be written to.
    pub(super) fn page(&mut self, place: usize) -> Option<&mut Vec<Stamp>> {
        self.pages.get_mut(&place)
    }
}
