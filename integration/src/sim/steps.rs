// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The steps in which an operation reaches the disk.

use super::disk::Stamp;
use super::hazard::Hazard;
use super::host::ENOSPC;
use super::ops::{Class, InFlight};
use super::world::{Event, World};

impl World {
    /// Half of a raw transfer; a ghost's is checked like any other.
    pub(super) fn raw_step(&mut self, key: u64, flight: &InFlight) {
        let middle = flight.moved / 2;
        let first = (flight.step == 0) != flight.swapped;
        let part = if first { 0..middle } else { middle..flight.moved };
        if flight.class == Class::RawWrite && flight.life != self.life && !part.is_empty() {
            self.hit(Hazard::GhostWrite);
        }
        for i in part {
            let sector = flight.sectors.start + i;
            self.check_place(sector, flight.class == Class::RawWrite, "landing");
            if flight.class == Class::RawWrite {
                let stamp = self.data(flight, i);
                self.host.disk.write(sector, stamp, key);
                self.through_the_page(key, flight, sector, stamp);
            } else if let Some(buf) = flight.buf {
                let stamp = self.host.disk.read(sector);
                self.receive(flight, buf, i, stamp);
            }
        }
    }

    /// A raw write of `sector` meets a page of the device's cache: with it goes to the disk what the write leaves out of the block.
    fn through_the_page(&mut self, key: u64, flight: &InFlight, sector: usize, stamp: Stamp) {
        let spb = self.host.spb;
        let place = sector / spb;
        let Some(page) = self.host.former.page(place) else { return };
        page[sector % spb] = stamp;
        for (sector, stamp) in (place * spb..).zip(&*page) {
            if !flight.sectors.contains(&sector) {
                self.host.disk.write(sector, *stamp, key);
            }
        }
        self.hit(Hazard::FormerBlock);
    }

    pub(super) fn file_read_step(&mut self, flight: &mut InFlight) {
        if flight.step == 0 {
            if !flight.buffered {
                self.host.sync_range(&flight.sectors);
            }
            return;
        }
        let there = self.host.layout.size().saturating_sub(flight.sectors.start);
        flight.moved = flight.moved.min(there);
        let Some(buf) = flight.buf else { return };
        for i in 0..flight.moved {
            let sector = flight.sectors.start + i;
            let stamp = if flight.buffered {
                self.host.buffered_read(sector)
            } else {
                self.host.stored(sector)
            };
            self.receive(flight, buf, i, stamp);
        }
    }

    pub(super) fn file_write_step(&mut self, key: u64, flight: &mut InFlight) {
        if flight.moved == 0 {
            return;
        }
        let range = flight.sectors.start..flight.sectors.start + flight.moved;
        self.trace(|| {
            let way = if flight.buffered { "buffered" } else { "direct" };
            format!("file write of sectors {range:?}, {way}, step {}", flight.step)
        });
        match (flight.buffered, flight.step) {
            (true, 0) => {
                self.hit(Hazard::BufferedFallback);
                for i in 0..flight.moved {
                    let stamp = self.data(flight, i);
                    self.host.buffered_write(range.start + i, stamp);
                }
                self.maybe_stick(range.start);
            }
            (true, 1) if flight.tidy => {
                self.host.sync_range(&range);
                self.drop_pages(&range);
            }
            (true, 2) => {
                let later = self.delay(100, 20_000);
                self.after(later, Event::Writeback);
            }
            (true, _) => {}
            (false, 0) => match self.host.prepare(&range, &mut self.rng) {
                Some(copies) => flight.copies = copies,
                None => flight.moved = 0,
            },
            (false, 1) => {
                let data: Vec<Stamp> = (0..flight.moved).map(|i| self.data(flight, i)).collect();
                self.host.transfer(&range, &flight.copies, key, |s| data[s - range.start]);
            }
            (false, _) => {
                // The data's I/O has ended: a commit's barrier covers it.
                self.host.disk.acknowledge(key);
                let before = std::mem::take(&mut self.host.kept_stale);
                self.host.convert(&range, &flight.copies, &mut self.rng);
                if self.host.kept_stale {
                    self.hit(Hazard::KeptStale);
                    // Of two writes to the same place at once, one may meet the other's page.
                    if self.guest.overlapped {
                        self.note_error();
                    }
                    self.trace(|| format!("the page cache kept pages of {range:?}"));
                }
                self.host.kept_stale |= before;
            }
        }
    }

    /// `fallocate(ZERO_RANGE)`: what was dirty is written, then the blocks become unwritten ones.
    pub(super) fn file_zeroes_step(&mut self, flight: &mut InFlight) {
        let range = flight.sectors.start..flight.sectors.start + flight.moved;
        if flight.step == 0 {
            self.host.sync_range(&range);
        } else if !self.host.zero_range(&range, &mut self.rng) {
            flight.error = ENOSPC;
            self.note_error();
        }
    }
}
