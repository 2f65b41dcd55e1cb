// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A branch of the extent map: leaves that copies of the map share as long as none of them changes.

use std::sync::Arc;

use super::leaf::{Leaf, guess, place};
use crate::engine::units::FileRange;

#[derive(Clone, Debug)]
pub(super) struct Branch {
    /// Where its first extent begins, and its last one ends.
    pub(super) start: u64,
    pub(super) end: u64,
    /// Never empty.
    pub(super) leaves: Arc<[Leaf]>,
}

impl Branch {
    pub(super) const fn range(&self) -> FileRange {
        FileRange::new(self.start, self.end)
    }

    /// The leaf that byte `at` lies in, or behind which.
    pub(super) fn leaf(&self, at: u64) -> Option<usize> {
        place(&self.leaves, self.range(), at, |leaf| leaf.start)
    }

    /// What [`leaf`](Self::leaf) reads first for byte `at`: a value of no meaning.
    pub(super) fn glance(&self, at: u64) -> u64 {
        let leaf = self.range().has(at).then(|| guess(self.leaves.len(), self.range(), at));
        leaf.and_then(|leaf| self.leaves.get(leaf)).map_or(0, |leaf| leaf.start)
    }
}
