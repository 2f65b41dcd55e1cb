// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What changes the file's layout besides writing to it.

use std::ops::Range;

use super::disk::ZERO;
use super::host::Host;
use super::layout::{NOWHERE, Owner};
use super::rng::Rng;

impl Host {
    /// Whether a block is allocated, or going to be when the cache is written back.
    fn has_data(&self, block: usize) -> bool {
        self.layout.block(block).place != NOWHERE
            || self.sectors_of(block).any(|s| self.cache.get(s).is_some())
            || self.cache.writebacks.iter().any(|w| w.block == block)
    }

    /// `fallocate(PUNCH_HOLE)`: whole blocks are freed, edges zeroed through the page cache,
    /// where they stay dirty.
    pub(super) fn punch(&mut self, sectors: &Range<usize>, rng: &mut Rng) {
        let inner = sectors.start.div_ceil(self.spb)..sectors.end / self.spb;
        for sector in sectors.clone() {
            if !inner.contains(&(sector / self.spb)) && self.has_data(sector / self.spb) {
                self.buffered_write(sector, ZERO);
            }
        }
        if inner.is_empty() {
            return;
        }
        self.settle(inner.clone());
        self.cache.invalidate(&(inner.start * self.spb..inner.end * self.spb));
        for block in inner {
            if let Some(place) = self.layout.unmap(block) {
                self.release(place, false, rng);
            }
        }
    }

    /// `fallocate(ZERO_RANGE)` of whole blocks: each becomes an unwritten one, where it was or elsewhere.
    /// False if there was no room for all.
    pub(super) fn zero_range(&mut self, sectors: &Range<usize>, rng: &mut Rng) -> bool {
        self.cache.invalidate(sectors);
        for block in self.blocks_of(sectors) {
            let old = self.layout.block(block);
            if old.place != NOWHERE && !old.shared && rng.chance(500) {
                self.layout.set_unwritten(block);
                continue;
            }
            let Some(place) = self.find(block, rng) else { return false };
            if let Some(old) = self.layout.unmap(block) {
                self.release(old, false, rng);
            }
            self.layout.map(block, place, false);
        }
        true
    }

    /// `truncate` to a smaller size; `residue` keeps the freed blocks from the canary.
    pub(super) fn shrink(&mut self, size: usize, residue: bool, rng: &mut Rng) {
        let all = self.everything();
        if !size.is_multiple_of(self.spb) && self.has_data(size / self.spb) {
            for sector in size..size.next_multiple_of(self.spb) {
                self.buffered_write(sector, ZERO);
            }
        }
        let cut = size / self.spb;
        if residue && !size.is_multiple_of(self.spb) && self.layout.block(cut).shared {
            self.cut_shared = Some(cut);
        }
        let first = size.div_ceil(self.spb);
        self.settle(first..self.layout.len());
        self.cache.invalidate(&(first * self.spb..all.end));
        for block in first..self.layout.len() {
            let old = self.layout.block(block);
            if let Some(place) = self.layout.unmap(block) {
                self.release(place, residue, rng);
            } else if residue && old.shared {
                self.layout.set_owner(old.place, Owner::Residue);
            }
        }
        self.layout.set_size(size);
    }

    /// `e4defrag` of one block: same bytes, another place.
    pub(super) fn relocate(&mut self, block: usize, rng: &mut Rng) {
        self.sync_range(&self.sectors_of(block));
        let old = self.layout.block(block);
        if old.place == NOWHERE || old.shared || !old.written {
            return;
        }
        let Some(place) = self.find(block, rng) else { return };
        for i in 0..self.spb {
            let stamp = self.disk.read(old.place * self.spb + i);
            self.disk.write_back(place * self.spb + i, stamp);
        }
        self.layout.unmap(block);
        self.layout.map(block, place, true);
        self.commit();
        self.adopt(old.place);
    }

    /// A clone is made of one block.
    pub(super) fn share(&mut self, block: usize) {
        self.sync_range(&self.sectors_of(block));
        let entry = self.layout.block(block);
        if entry.place != NOWHERE && entry.written {
            self.layout.set_shared(block);
            self.commit();
        }
    }
}
