// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's kernel as far as the image is concerned: disk, layout and page cache together.

use std::ops::Range;

use super::disk::{Disk, Stamp, ZERO};
use super::former::Former;
use super::layout::{Layout, NOWHERE, Owner};
use super::pagecache::{Cache, PAGE, Writeback};
use super::rng::Rng;

/// Marks what the canary writes; the sector number is below it.
const CANARY: Stamp = 0xCA << 56;

/// Out of space (ENOSPC, negated).
pub(super) const ENOSPC: i32 = -28;

/// New places for the blocks a direct write must copy: pairs of block and place.
pub(super) type Copies = Vec<(usize, usize)>;

#[derive(Hash, Debug)]
pub(super) struct Host {
    pub(super) disk: Disk,
    pub(super) layout: Layout,
    pub(super) cache: Cache,
    /// Sectors in a filesystem block.
    pub(super) spb: usize,
    /// How often in 1000 the canary takes a freed block at once.
    pub(super) greed: u64,
    /// The device's page cache.
    pub(super) former: Former,
    /// Whether the filesystem flushes the disk's cache when it commits for `fsync`.
    pub(super) barriers: bool,
    /// A direct write could not drop a page that was dirty again: the next fsync says EIO.
    pub(super) kept_stale: bool,
    /// A shared block that a size change behind the daemon's back has the kernel copy: raw reads of
    /// the old place are residue (R5a).
    pub(super) cut_shared: Option<usize>,
    /// A commit that the disk has only in its cache.
    unflushed: bool,
    next_writeback: u64,
}

impl Host {
    pub(super) fn new(disk: Disk, layout: Layout, spb: usize, greed: u64) -> Self {
        let cache = Cache::default();
        Self {
            disk,
            layout,
            cache,
            spb,
            greed,
            former: Former::default(),
            barriers: true,
            kept_stale: false,
            cut_shared: None,
            unflushed: false,
            next_writeback: 1,
        }
    }

    /// The blocks that hold `sectors`.
    pub(super) fn blocks_of(&self, sectors: &Range<usize>) -> Range<usize> {
        if sectors.is_empty() {
            return 0..0;
        }
        sectors.start / self.spb..sectors.end.div_ceil(self.spb)
    }

    pub(super) const fn sectors_of(&self, block: usize) -> Range<usize> {
        block * self.spb..(block + 1) * self.spb
    }

    /// What the filesystem says is in a sector of the file, page cache aside.
    pub(super) fn stored(&self, sector: usize) -> Stamp {
        let block = self.layout.block(sector / self.spb);
        if block.place == NOWHERE || !block.written {
            return ZERO;
        }
        self.disk.read(block.place * self.spb + sector % self.spb)
    }

    /// What a buffered reader sees in a sector.
    pub(super) fn visible(&self, sector: usize) -> Stamp {
        self.cache.get(sector).unwrap_or_else(|| self.stored(sector))
    }

    /// A buffered read of one sector: the whole page is cached afterwards.
    pub(super) fn buffered_read(&mut self, sector: usize) -> Stamp {
        let page = sector - sector % PAGE;
        for s in page..page + PAGE {
            if self.cache.get(s).is_none() {
                let stamp = self.stored(s);
                self.cache.fill(s, stamp);
            }
        }
        self.visible(sector)
    }

    /// A buffered write of one sector: its block is read in if it is not wholly cached.
    pub(super) fn buffered_write(&mut self, sector: usize, stamp: Stamp) {
        for s in self.sectors_of(sector / self.spb) {
            if self.cache.get(s).is_none() {
                let stored = self.stored(s);
                self.cache.fill(s, stored);
            }
        }
        self.cache.write(sector, stamp);
        if sector >= self.layout.size() {
            self.layout.set_size(sector + 1);
        }
    }

    /// Starts to write a dirty block back; its number, for [`finish_writeback`](Self::finish_writeback).
    pub(super) fn start_writeback(&mut self, block: usize) -> u64 {
        self.settle(block..block + 1);
        let sectors = self.sectors_of(block);
        let data = sectors.clone().map(|s| self.visible(s)).collect();
        self.cache.clean(sectors);
        let id = self.next_writeback;
        self.next_writeback += 1;
        self.cache.writebacks.push(Writeback { id, block, data });
        id
    }

    /// A block's write-back reaches the disk; nothing if something made it end before.
    pub(super) fn finish_writeback(&mut self, id: u64) {
        if let Some(at) = self.cache.writebacks.iter().position(|w| w.id == id) {
            let writeback = self.cache.writebacks.remove(at);
            self.write_block(writeback.block, &writeback.data);
        }
    }

    /// Waits for the write-backs under way in `blocks`.
    pub(super) fn settle(&mut self, blocks: Range<usize>) {
        let ids: Vec<u64> = self
            .cache
            .writebacks
            .iter()
            .map(|w| (w.id, w.block))
            .collect::<Vec<_>>()
            .into_iter()
            .filter(|(_, b)| blocks.contains(b))
            .map(|(id, _)| id)
            .collect();
        for id in ids {
            self.finish_writeback(id);
        }
    }

    fn write_block(&mut self, block: usize, data: &[Stamp]) {
        if block * self.spb >= self.layout.size() {
            return;
        }
        let old = self.layout.block(block);
        if old.place == NOWHERE || old.shared {
            let mut rng = Rng::new(block as u64);
            let Some(place) = self.find(block, &mut rng) else { return };
            if old.shared {
                self.leave_shared(block);
            }
            self.layout.map(block, place, false);
        }
        let first = self.layout.block(block).place * self.spb;
        for (i, stamp) in data.iter().enumerate() {
            self.disk.write_back(first + i, *stamp);
        }
        self.layout.set_written(block);
    }

    /// A shared block is going to be somewhere else; whose its old place is then.
    fn leave_shared(&mut self, block: usize) {
        let old = self.layout.block(block).place;
        self.layout.unmap(block);
        if self.cut_shared == Some(block) && old != NOWHERE {
            self.layout.set_owner(old, Owner::Residue);
        }
    }

    /// A free place for `block`, staged.
    pub(super) fn find(&mut self, block: usize, rng: &mut Rng) -> Option<usize> {
        let near = block.checked_sub(1).map_or(NOWHERE, |b| self.layout.block(b).place);
        // What is written at once is allocated at once: of blocks in a page most lie together.
        let close = if (block * self.spb).is_multiple_of(PAGE) { 700 } else { 950 };
        let found = self.layout.find(near, close, rng).or_else(|| {
            // Everything freed waits for the journal.
            self.commit();
            self.layout.find(near, close, rng)
        });
        if let Some(place) = found {
            let now = (0..self.spb).map(|i| self.disk.read(place * self.spb + i)).collect();
            self.former.allocated(place, now, rng);
        }
        found
    }

    /// Writes everything dirty in the pages of `sectors` to the disk and waits for it.
    pub(super) fn sync_range(&mut self, sectors: &Range<usize>) {
        let first = sectors.start - sectors.start % PAGE;
        let pages = first..sectors.end.next_multiple_of(PAGE);
        self.settle(self.blocks_of(&pages));
        while let Some(dirty) = self.cache.first_dirty(&pages) {
            let id = self.start_writeback(dirty / self.spb);
            self.finish_writeback(id);
        }
    }

    /// The journal's commit, with the barriers that order it behind the data.
    pub(super) fn commit(&mut self) {
        self.disk.flush();
        self.layout.commit();
    }

    /// `fsync`.
    pub(super) fn fsync(&mut self) {
        self.sync_range(&self.everything());
        if self.barriers {
            self.commit();
        } else {
            self.unflushed = true;
        }
    }

    /// The disk's own flush.
    pub(super) fn flush_disk(&mut self) {
        self.disk.flush();
        if std::mem::take(&mut self.unflushed) {
            self.layout.commit();
        }
    }

    /// All sectors the model has room for.
    pub(super) fn everything(&self) -> Range<usize> {
        0..self.layout.len() * self.spb
    }

    /// What becomes of a freed place: the canary's, or free once committed, or residue.
    pub(super) fn release(&mut self, place: usize, residue: bool, rng: &mut Rng) {
        if residue {
            self.layout.set_owner(place, Owner::Residue);
        } else if rng.chance(self.greed) {
            self.commit();
            self.adopt(place);
        }
    }

    pub(super) fn adopt(&mut self, place: usize) {
        self.layout.adopt(place);
        for sector in place * self.spb..(place + 1) * self.spb {
            self.disk.write_durable(sector, CANARY | sector as u64);
        }
    }

    /// The canary takes what a size change had freed behind the daemon's back.
    pub(super) fn end_residue(&mut self) {
        self.cut_shared = None;
        for place in 0..self.layout.places() {
            if self.layout.owner(place) == Owner::Residue {
                self.commit();
                self.adopt(place);
            }
        }
    }

    /// A place whose canary is not what it wrote.
    pub(super) fn dead_canary(&self) -> Option<usize> {
        self.layout.canaries().find(|place| {
            (place * self.spb..(place + 1) * self.spb)
                .any(|s| self.disk.read(s) != CANARY | s as u64)
        })
    }

    /// A direct write's first step: the cache is written back and emptied, holes are
    /// allocated as unwritten, shared blocks get new places.
    pub(super) fn prepare(&mut self, sectors: &Range<usize>, rng: &mut Rng) -> Option<Copies> {
        self.sync_range(sectors);
        self.cache.invalidate(sectors);
        let mut copies = Copies::new();
        for block in self.blocks_of(sectors) {
            let old = self.layout.block(block);
            if old.shared {
                copies.push((block, self.find(block, rng)?));
            } else if old.place == NOWHERE {
                let place = self.find(block, rng)?;
                self.layout.map(block, place, false);
            }
        }
        Some(copies)
    }

    /// The second: data reach the disk, and what of their blocks they leave out is filled up.
    pub(super) fn transfer(
        &mut self,
        sectors: &Range<usize>,
        copies: &Copies,
        writer: u64,
        data: impl Fn(usize) -> Stamp,
    ) {
        for block in self.blocks_of(sectors) {
            let entry = self.layout.block(block);
            let copy = copies.iter().find(|(b, _)| *b == block).map(|(_, p)| *p);
            let place = copy.unwrap_or(entry.place);
            if place == NOWHERE {
                continue;
            }
            for (i, sector) in self.sectors_of(block).enumerate() {
                if sectors.contains(&sector) {
                    self.disk.write(place * self.spb + i, data(sector), writer);
                } else if copy.is_some() || !entry.written {
                    let rest = self.stored(sector);
                    self.disk.write(place * self.spb + i, rest, writer);
                }
            }
        }
    }

    /// The third: what was written counts as written, copies take their blocks' place, and the
    /// cache is emptied again.
    pub(super) fn convert(&mut self, sectors: &Range<usize>, copies: &Copies, rng: &mut Rng) {
        let done = self.blocks_of(sectors);
        for block in done.clone() {
            self.layout.set_written(block);
        }
        for (block, place) in copies {
            if !done.contains(block) {
                self.layout.set_owner(*place, Owner::Free);
                continue;
            }
            let old = self.layout.block(*block).place;
            self.leave_shared(*block);
            self.layout.map(*block, *place, true);
            if old != NOWHERE && self.layout.owner(old) == Owner::Clone && rng.chance(self.greed) {
                // The clone is deleted as soon as it can be.
                self.commit();
                self.adopt(old);
            }
        }
        self.kept_stale |= self.cache.invalidate_clean(sectors);
        if sectors.end > self.layout.size() {
            self.layout.set_size(sectors.end);
        }
    }

    /// What a sector of the file may hold after a power cut now.
    pub(super) fn leavings(&self, sector: usize) -> Vec<Stamp> {
        let block = self.layout.journalled(sector / self.spb);
        if block.place == NOWHERE || !block.written {
            return vec![ZERO];
        }
        self.disk.leavings(block.place * self.spb + sector % self.spb).collect()
    }

    /// The host's power fails.
    pub(super) fn cut(&mut self, rng: &mut Rng) {
        self.disk.cut(rng);
        self.cache = Cache::default();
        self.layout.roll_back();
        self.unflushed = false;
        self.kept_stale = false;
    }
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
