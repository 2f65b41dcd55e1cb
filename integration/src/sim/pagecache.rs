// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's page cache of the image: what buffered openers see, and what comes back at an
//! unlucky moment to write old bytes over new ones.

use std::collections::BTreeMap;
use std::ops::Range;

use super::disk::Stamp;

/// Sectors in a page.
pub(super) const PAGE: usize = 8;

/// A page: 4 KiB, of which parts may be up to date or dirty.
#[derive(Clone, Copy, Hash, Debug, Default)]
struct Page {
    data: [Stamp; PAGE],
    /// Sectors that hold something.
    uptodate: u8,
    /// Sectors newer than the disk.
    dirty: u8,
    /// Until when `fadvise(DONTNEED)` leaves it alone: some CPU has it in its hands.
    stuck_until: u64,
}

/// A block on its way from the cache to the disk.
#[derive(Clone, Hash, Debug)]
pub(super) struct Writeback {
    pub(super) id: u64,
    pub(super) block: usize,
    pub(super) data: Vec<Stamp>,
}

#[derive(Hash, Debug, Default)]
pub(super) struct Cache {
    pages: BTreeMap<usize, Page>,
    pub(super) writebacks: Vec<Writeback>,
}

/// The pages that hold `sectors`.
fn pages_of(sectors: &Range<usize>) -> Range<usize> {
    if sectors.is_empty() {
        return 0..0;
    }
    sectors.start / PAGE..sectors.end.div_ceil(PAGE)
}

impl Cache {
    pub(super) fn get(&self, sector: usize) -> Option<Stamp> {
        let page = self.pages.get(&(sector / PAGE))?;
        (page.uptodate & bit(sector) != 0).then(|| page.data[sector % PAGE])
    }

    /// Takes a sector in from the disk.
    pub(super) fn fill(&mut self, sector: usize, stamp: Stamp) {
        let page = self.pages.entry(sector / PAGE).or_default();
        page.data[sector % PAGE] = stamp;
        page.uptodate |= bit(sector);
    }

    /// Writes a sector; it is dirty now.
    pub(super) fn write(&mut self, sector: usize, stamp: Stamp) {
        self.fill(sector, stamp);
        let page = self.pages.entry(sector / PAGE).or_default();
        page.dirty |= bit(sector);
    }

    /// Keeps DONTNEED away from a page until `until`.
    pub(super) fn stick(&mut self, sector: usize, until: u64) {
        if let Some(page) = self.pages.get_mut(&(sector / PAGE)) {
            page.stuck_until = page.stuck_until.max(until);
        }
    }

    pub(super) fn is_dirty(&self, sector: usize) -> bool {
        self.pages.get(&(sector / PAGE)).is_some_and(|p| p.dirty & bit(sector) != 0)
    }

    /// The first dirty sector in a range, if any.
    pub(super) fn first_dirty(&self, sectors: &Range<usize>) -> Option<usize> {
        let pages = self.pages.range(pages_of(sectors));
        let mut dirty = pages
            .filter(|(_, p)| p.dirty != 0)
            .flat_map(|(i, _)| i * PAGE..(i + 1) * PAGE)
            .filter(|s| sectors.contains(s));
        dirty.find(|s| self.is_dirty(*s))
    }

    /// The sectors are on their way to the disk.
    pub(super) fn clean(&mut self, sectors: Range<usize>) {
        for sector in sectors {
            if let Some(page) = self.pages.get_mut(&(sector / PAGE)) {
                page.dirty &= !bit(sector);
            }
        }
    }

    /// `fadvise(DONTNEED)`: drops the clean pages that have a sector in the range; how many of
    /// them would not go because they are stuck.
    pub(super) fn drop_clean(&mut self, sectors: &Range<usize>, now: u64, spb: usize) -> usize {
        let range = pages_of(sectors);
        let busy: Vec<usize> = self.writebacks.iter().map(|w| w.block * spb / PAGE).collect();
        let mut stuck = 0;
        self.pages.retain(|index, page| {
            let spared = !range.contains(index) || page.dirty != 0 || busy.contains(index);
            let held = !spared && page.stuck_until > now;
            stuck += usize::from(held);
            spared || held
        });
        stuck
    }

    /// What direct I/O does before and after a write: the sectors are no longer cached,
    /// whatever holds their pages.
    pub(super) fn invalidate(&mut self, sectors: &Range<usize>) {
        self.forget(sectors, true);
    }

    /// What the kernel does after a direct write: a page dirtied meanwhile stays, with all that it
    /// holds. Whether one did.
    pub(super) fn invalidate_clean(&mut self, sectors: &Range<usize>) -> bool {
        self.forget(sectors, false);
        self.pages.range(pages_of(sectors)).any(|(_, page)| page.dirty != 0)
    }

    fn forget(&mut self, sectors: &Range<usize>, dirty_too: bool) {
        for index in pages_of(sectors) {
            let Some(page) = self.pages.get_mut(&index) else { continue };
            if page.dirty != 0 && !dirty_too {
                continue;
            }
            for sector in index * PAGE..(index + 1) * PAGE {
                if sectors.contains(&sector) {
                    page.uptodate &= !bit(sector);
                    page.dirty &= !bit(sector);
                }
            }
            if page.uptodate == 0 {
                self.pages.remove(&index);
            }
        }
    }

    /// `cachestat`: pages with a sector in the range.
    pub(super) fn pages_in(&self, sectors: &Range<usize>) -> usize {
        self.pages.range(pages_of(sectors)).count()
    }

    pub(super) fn any_dirty(&self) -> bool {
        !self.writebacks.is_empty() || self.pages.values().any(|p| p.dirty != 0)
    }
}

const fn bit(sector: usize) -> u8 {
    1 << (sector % PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stuck_and_dirty_pages_stay_and_direct_io_takes_both() {
        let mut cache = Cache::default();
        cache.fill(0, 1);
        cache.write(9, 2);
        cache.fill(16, 3);
        cache.stick(16, 10);
        assert_eq!(cache.drop_clean(&(0..24), 5, 8), 1);
        assert_eq!((cache.get(0), cache.get(9), cache.get(16)), (None, Some(2), Some(3)));
        assert_eq!(cache.first_dirty(&(0..24)), Some(9));
        assert_eq!(cache.pages_in(&(0..24)), 2);
        assert_eq!(cache.drop_clean(&(0..24), 10, 8), 0);
        assert_eq!(cache.pages_in(&(0..24)), 1);
        cache.invalidate(&(9..10));
        assert!(!cache.any_dirty() && cache.pages_in(&(0..24)) == 0);
    }
}
