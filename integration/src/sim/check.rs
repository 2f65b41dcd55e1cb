// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What no operation may do, checked when it is submitted and again when it reaches the disk.

use std::ops::Range;

use extentd::engine::io::Buf;

use super::layout::Owner;
use super::ops::{Class, InFlight};
use super::scenario::bytes;
use super::world::World;

impl World {
    /// The image's blocks on these sectors of the device.
    pub(super) fn file_blocks(&self, sectors: &Range<usize>) -> Vec<usize> {
        let places = self.host.blocks_of(sectors);
        places
            .filter_map(|p| match self.host.layout.owner(p) {
                Owner::Image(block) => Some(block),
                _ => None,
            })
            .collect()
    }

    /// Checks an operation before it starts. `place` is its offset in bytes.
    pub(super) fn check_submit(&mut self, flight: &InFlight, place: u64, len: u64) {
        if !self.begun.contains(&flight.worker) {
            self.fail(format!("{:?} of a worker that was not told to begin", flight.class));
        }
        let taken =
            self.ops.values().filter(|o| o.life == flight.life && o.worker == flight.worker);
        let limit = self.scenario.geometry.ops as usize;
        let (mut count, mut twice) = (0, false);
        for other in taken {
            count += 1;
            twice |= other.id == flight.id;
        }
        let waiting = self.ended.get(&flight.worker).map_or(0, |e| {
            twice |= e.iter().any(|c| c.id == flight.id);
            e.len()
        });
        if twice {
            self.fail(format!("operation {} is used twice", flight.id.0));
        }
        if count + waiting >= limit {
            self.fail(format!("more than {limit} operations in flight"));
        }
        if !matches!(flight.class, Class::SyncImage | Class::SyncDevice) {
            self.check_alignment(flight, place, len);
        }
        match flight.class {
            Class::RawRead | Class::RawWrite => self.check_raw(flight),
            Class::FileWrite | Class::FileZeroes => self.check_file_write(flight),
            _ => {}
        }
    }

    /// Whether somebody moved the end of the file to an odd place and this is what is left of a
    /// transfer that stopped there. The kernel refuses it.
    pub(super) fn is_odd_end(&self, flight: &InFlight, place: u64) -> bool {
        self.outside.resized
            && !flight.class.is_raw()
            && !place.is_multiple_of(u64::from(self.scenario.geometry.file_align))
    }

    fn check_alignment(&mut self, flight: &InFlight, place: u64, len: u64) {
        let geometry = self.scenario.geometry;
        let align = match flight.class {
            Class::RawWrite => geometry.write_block,
            Class::RawRead => geometry.dev_block,
            _ => geometry.file_align,
        };
        if self.is_odd_end(flight, place) {
            return;
        }
        if len == 0 || !(place | len).is_multiple_of(u64::from(align)) {
            self.fail(format!(
                "{:?} at {place}, {len} bytes: not aligned to {align}",
                flight.class
            ));
        }
        if let Some(buf @ Buf::Guest { tag, at, .. }) = flight.buf
            && (at % u64::from(geometry.mem_align) != 0
                || !self.guest.is_aligned(flight.worker, tag))
        {
            self.fail(format!("{:?} uses unaligned guest memory {buf:?}", flight.class));
        }
    }

    /// R1: nothing raw without a lease; R4, R10: only to mapped blocks; R10a: none where the
    /// file is being written or the page cache will write.
    fn check_raw(&mut self, flight: &InFlight) {
        if !self.scenario.identity() && !self.lease.is_held() {
            self.fail(format!("{:?} at {:?} without a lease", flight.class, flight.sectors));
        }
        if let Some(block) = flight.blocks.iter().find(|block| self.is_tail(**block)) {
            let what = "the file ends in it, and what is behind the end is not ours";
            self.fail(format!("{:?} of block {block}: {what}", flight.class));
        }
        let write = flight.class == Class::RawWrite;
        for sector in flight.sectors.clone() {
            self.check_place(sector, write, "submitted");
        }
        if !write {
            return;
        }
        let racing = self
            .ops
            .values()
            .find(|o| o.class.writes_file() && o.blocks.iter().any(|b| flight.blocks.contains(b)));
        if let Some(racing) = racing {
            let what = format!("{:?} while {:?} is in flight", flight.blocks, racing.blocks);
            self.fail(format!("raw write to block {what} through the file (R10a)"));
        }
        for block in flight.blocks.clone() {
            if self.model.is_wild(block * self.host.spb) {
                // The kernel rewrites the block with the new end: the residue of R5a.
                self.residue += 1;
                continue;
            }
            let dirty = self.host.sectors_of(block).any(|s| self.host.cache.is_dirty(s));
            if dirty || self.host.cache.writebacks.iter().any(|w| w.block == block) {
                self.fail(format!("raw write to block {block} under a dirty page (R10a)"));
            }
        }
    }

    /// Whether the file, as the daemon opened it, ends inside this block.
    pub(super) fn is_tail(&self, block: usize) -> bool {
        let end = self.scenario.sectors();
        block * self.host.spb < end && end < (block + 1) * self.host.spb
    }

    /// R10a from the other side, and whole blocks only.
    fn check_file_write(&mut self, flight: &InFlight) {
        let racing = self.ops.values().find(|o| {
            o.class == Class::RawWrite && o.blocks.iter().any(|b| flight.blocks.contains(b))
        });
        if let Some(racing) = racing {
            let what = format!("{:?} while {:?} is in flight", flight.blocks, racing.blocks);
            self.fail(format!("file write to block {what} raw (R10a)"));
        }
        let unit = self.scenario.unit();
        let whole = flight.sectors.start.is_multiple_of(unit)
            && (flight.sectors.end.is_multiple_of(unit)
                || flight.sectors.end == self.scenario.sectors());
        if !whole {
            self.fail(format!("file write of part of a unit: {:?} (R10a)", flight.sectors));
        }
        if bytes(flight.sectors.end) > self.scenario.geometry.file_size {
            self.fail(format!("file write past the end: {:?}", flight.sectors));
        }
    }

    /// Whether a raw access to this sector of the device is to the image's own block.
    pub(super) fn check_place(&mut self, sector: usize, write: bool, when: &str) {
        let what = if write { "raw write" } else { "raw read" };
        let place = sector / self.host.spb;
        let owner = self.host.layout.owner(place);
        let block = match owner {
            Owner::Image(block) => block,
            Owner::Residue if self.lease.is_held() => {
                self.residue += 1;
                return;
            }
            // What the guest gets to see of it is the judge.
            Owner::Canary if !write && self.scenario.hard.read_only => return,
            _ => {
                self.fail(format!("{what} {when} at sector {sector} of a block of {owner:?}"));
                return;
            }
        };
        let entry = self.host.layout.block(block);
        if !entry.written {
            self.fail(format!("{what} {when} at sector {sector}, block {block}: unwritten"));
        } else if write && entry.shared {
            self.fail(format!("{what} {when} at sector {sector}, block {block}: shared"));
        }
    }

    /// Raw operations of the living daemon that are in flight.
    pub(super) fn raw_in_flight(&self) -> impl Iterator<Item = &InFlight> {
        self.ops.values().filter(|o| o.class.is_raw() && o.life == self.life)
    }
}
