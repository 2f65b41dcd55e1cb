// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The filesystem's metadata: which disk block holds which block of the image, who owns the rest,
//! and what of it a power cut leaves.
//!
//! A *canary* file takes freed blocks at once: whatever writes to a block that is no longer the
//! image's, writes to the canary.

use std::collections::VecDeque;

use super::rng::Rng;

/// Nowhere on the disk.
pub(super) const NOWHERE: usize = usize::MAX;

/// Whose a disk block is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Owner {
    /// Nobody's.
    Free,
    /// The filesystem's, for good.
    Filesystem,
    /// Freed, but the journal has not said so yet: not to be re-used before it has.
    Freed,
    /// The image's block of this number.
    Image(usize),
    /// Chosen for a copy-on-write that has not ended.
    Staged,
    /// The canary's.
    Canary,
    /// A clone's of the image, and no longer the image's.
    Clone,
    /// Freed by a size change that broke no lease; kept from the canary until the daemon can
    /// know, since raw access until then is the documented residue (R5a).
    Residue,
}

/// A block of the image.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Block {
    /// Its disk block, or [`NOWHERE`] for a hole.
    pub(super) place: usize,
    /// Allocated blocks only: written, or still garbage.
    pub(super) written: bool,
    /// A clone has the same disk block.
    pub(super) shared: bool,
}

impl Block {
    const HOLE: Self = Self { place: NOWHERE, written: false, shared: false };
}

#[derive(Hash, Debug)]
pub(super) struct Layout {
    blocks: Vec<Block>,
    /// Bytes / 512 of the file.
    size: usize,
    owners: Vec<Owner>,
    canaries: VecDeque<usize>,
    /// What the journal holds: blocks and size.
    journal: (Vec<Block>, usize),
    /// Whether it differs from the journal.
    pub(super) dirty: bool,
}

impl Layout {
    /// An empty file of `size` sectors on a disk of `places` blocks, room for `blocks`.
    pub(super) fn new(blocks: usize, size: usize, places: usize) -> Self {
        let blocks = vec![Block::HOLE; blocks];
        let mut owners = vec![Owner::Free; places];
        // The first block of a disk is the filesystem's own.
        owners[0] = Owner::Filesystem;
        Self {
            journal: (blocks.clone(), size),
            blocks,
            size,
            owners,
            canaries: VecDeque::new(),
            dirty: false,
        }
    }

    pub(super) fn block(&self, block: usize) -> Block {
        self.blocks.get(block).copied().unwrap_or(Block::HOLE)
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    pub(super) const fn size(&self) -> usize {
        self.size
    }

    pub(super) fn set_size(&mut self, sectors: usize) {
        self.dirty |= self.size != sectors;
        self.size = sectors;
    }

    pub(super) fn owner(&self, place: usize) -> Owner {
        self.owners.get(place).copied().unwrap_or(Owner::Free)
    }

    pub(super) fn set_owner(&mut self, place: usize, owner: Owner) {
        self.owners[place] = owner;
    }

    pub(super) fn canaries(&self) -> impl Iterator<Item = usize> + '_ {
        self.owners.iter().enumerate().filter(|(_, o)| **o == Owner::Canary).map(|(i, _)| i)
    }

    pub(super) fn places(&self) -> usize {
        self.owners.len()
    }

    /// A free disk block, `close` times in 1000 behind `near` so that extents form; staged.
    pub(super) fn find(&mut self, near: usize, close: u64, rng: &mut Rng) -> Option<usize> {
        let count = self.owners.len();
        let start = if near < count && rng.chance(close) { near + 1 } else { rng.index(count) };
        let mut place = self.search(start);
        if place.is_none() {
            // The disk is full of canaries: the oldest gives its block up.
            let oldest = self.canaries.pop_front()?;
            self.owners[oldest] = Owner::Free;
            place = Some(oldest);
        }
        let place = place?;
        self.owners[place] = Owner::Staged;
        Some(place)
    }

    fn search(&self, start: usize) -> Option<usize> {
        let count = self.owners.len();
        (0..count).map(|i| (start + i) % count).find(|p| self.owners[*p] == Owner::Free)
    }

    /// Makes `place` hold image block `block`.
    pub(super) fn map(&mut self, block: usize, place: usize, written: bool) {
        self.owners[place] = Owner::Image(block);
        self.blocks[block] = Block { place, written, shared: false };
        self.dirty = true;
    }

    pub(super) fn set_written(&mut self, block: usize) {
        if !self.blocks[block].written && self.blocks[block].place != NOWHERE {
            self.blocks[block].written = true;
            self.dirty = true;
        }
    }

    pub(super) fn set_unwritten(&mut self, block: usize) {
        self.blocks[block].written = false;
        self.dirty = true;
    }

    pub(super) fn set_shared(&mut self, block: usize) {
        self.blocks[block].shared = true;
        self.dirty = true;
    }

    /// Takes `block` out of the image; its place, if it had one of its own. What becomes of the
    /// place is the caller's choice.
    pub(super) fn unmap(&mut self, block: usize) -> Option<usize> {
        let old = std::mem::replace(&mut self.blocks[block], Block::HOLE);
        if old.place == NOWHERE {
            return None;
        }
        self.dirty = true;
        if old.shared {
            self.owners[old.place] = Owner::Clone;
            return None;
        }
        self.owners[old.place] = Owner::Freed;
        Some(old.place)
    }

    /// The canary takes a freed block. Its first write commits the journal: a block whose
    /// freeing could be rolled back is never re-used.
    pub(super) fn adopt(&mut self, place: usize) {
        self.owners[place] = Owner::Canary;
        self.canaries.push_back(place);
    }

    /// The journal's commit: what is now is what a power cut leaves.
    pub(super) fn commit(&mut self) {
        self.journal = (self.blocks.clone(), self.size);
        for owner in self.owners.iter_mut().filter(|o| **o == Owner::Freed) {
            *owner = Owner::Free;
        }
        self.dirty = false;
    }

    /// The block as a power cut now would leave it.
    pub(super) fn journalled(&self, block: usize) -> Block {
        self.journal.0.get(block).copied().unwrap_or(Block::HOLE)
    }

    /// The power failed: back to the journal.
    pub(super) fn roll_back(&mut self) {
        (self.blocks, self.size) = self.journal.clone();
        for owner in &mut self.owners {
            if !matches!(owner, Owner::Canary | Owner::Clone | Owner::Filesystem) {
                *owner = Owner::Free;
            }
        }
        for (block, entry) in self.blocks.iter().enumerate() {
            if entry.place != NOWHERE {
                self.owners[entry.place] = Owner::Image(block);
            }
        }
        self.dirty = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_takes_back_what_was_not_committed() {
        let mut rng = Rng::new(1);
        let mut layout = Layout::new(4, 32, 8);
        let first = layout.find(NOWHERE, 700, &mut rng).unwrap();
        layout.map(0, first, false);
        layout.commit();
        layout.set_written(0);
        let second = layout.find(first, 700, &mut rng).unwrap();
        layout.map(1, second, true);
        layout.roll_back();
        assert_eq!(layout.block(0), Block { place: first, written: false, shared: false });
        assert_eq!(layout.block(1), Block::HOLE);
        assert_eq!(layout.owner(second), Owner::Free);
    }

    #[test]
    fn freed_blocks_wait_for_the_journal_and_shared_ones_stay_with_the_clone() {
        let mut rng = Rng::new(2);
        let mut layout = Layout::new(2, 16, 3);
        for block in 0..2 {
            let place = layout.find(NOWHERE, 700, &mut rng).unwrap();
            layout.map(block, place, true);
        }
        layout.set_shared(1);
        let clone = layout.block(1).place;
        assert!(layout.unmap(1).is_none());
        assert_eq!(layout.owner(clone), Owner::Clone);
        let freed = layout.unmap(0).unwrap();
        assert!(layout.find(NOWHERE, 700, &mut rng).is_none());
        layout.commit();
        assert_eq!(layout.find(NOWHERE, 700, &mut rng), Some(freed));
    }
}
