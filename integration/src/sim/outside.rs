// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everybody else on the host: the lease that holds them off, and what they do when they are in.

use std::collections::BTreeMap;
use std::ops::Range;

use super::disk::ZERO;
use super::hazard::Hazard;
use super::ops::Class;
use super::pagecache::PAGE;
use super::scenario::LEASE_BREAK;
use super::world::{Event, World};

/// The image's lease, as the kernel sees it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lease {
    held: bool,
    /// The break under way.
    breaking: Option<u64>,
    next_break: u64,
}

impl Lease {
    pub(super) const fn is_held(&self) -> bool {
        self.held
    }

    /// The break under way.
    pub(super) const fn number(&self) -> Option<u64> {
        self.breaking
    }

    pub(super) const fn is_breaking(&self) -> bool {
        self.held && self.breaking.is_some()
    }

    /// What F_GETLEASE tells: ours, and nobody wants in.
    pub(super) const fn is_undisturbed(&self) -> bool {
        self.held && self.breaking.is_none()
    }
}

/// What an outside opener is up to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Errand {
    /// Reads through the page cache.
    Read,
    /// Writes through the page cache, and leaves without a sync.
    Write,
    /// Punches a hole.
    Punch,
    /// Cuts the file short, and most often makes it as long again.
    Truncate,
    /// Moves blocks to other places.
    Defragment,
    /// Clones it.
    Clone,
    /// Opens with O_NONBLOCK: goes away at once, and the break is on.
    Glance,
    /// Has the filesystem share its blocks with a file that has the same bytes.
    Deduplicate,
    /// Serves it read-only, too.
    Instance,
}

#[derive(Clone, Copy, Debug)]
struct Opener {
    errand: Errand,
    inside: bool,
    deeds: u64,
}

#[derive(Debug, Default)]
pub(super) struct Outside {
    /// The file's size was changed at some time: a daemon that saw it stays in filesystem mode.
    pub(super) resized: bool,
    openers: BTreeMap<u64, Opener>,
    next: u64,
}

impl Outside {
    pub(super) fn anybody(&self) -> bool {
        !self.openers.is_empty()
    }

    /// Other instances that are in, each with a lease of its own if that is a shared one.
    pub(super) fn instances(&self) -> usize {
        self.openers.values().filter(|o| o.inside && o.errand == Errand::Instance).count()
    }

    /// An opener is being kept waiting.
    pub(super) fn writer_waits(&self) -> bool {
        self.openers.values().any(|o| !o.inside)
    }

    fn errands(&self) -> impl Iterator<Item = Errand> + '_ {
        self.openers.values().map(|o| o.errand)
    }
}

impl World {
    /// Somebody opens the image.
    pub(super) fn open(&mut self, errand: Errand) {
        self.trace(|| format!("outside opens to {errand:?}"));
        let breaks = self.breaks_lease(errand);
        if self.lease.held && self.lease.breaking.is_none() && breaks {
            self.begin_break();
        }
        if errand == Errand::Glance {
            self.hit(Hazard::OpenedWithoutWaiting);
            return;
        }
        let id = self.outside.next;
        self.outside.next += 1;
        let deeds = self.rng.range(1, 5);
        self.outside.openers.insert(id, Opener { errand, inside: false, deeds });
        self.let_in();
    }

    fn begin_break(&mut self) {
        let id = self.lease.next_break;
        self.lease.next_break += 1;
        self.lease.breaking = Some(id);
        if self.raw_in_flight().next().is_some() {
            self.hit(Hazard::BreakWithRawInFlight);
            if self.is_slow() {
                self.hit(Hazard::SlowBreak);
            }
        }
        if self.guest.waits_for_flush() {
            self.hit(Hazard::FlushDuringBreak);
        }
        if self.jobs.is_entering() {
            self.hit(Hazard::BreakWhileEntering);
        }
        let signal = self.delay(5, 2_000);
        self.daemon_after(signal, Event::LeaseSignal);
        self.time_break(id, signal);
        self.after(LEASE_BREAK, Event::Forced(id));
    }

    /// Every opener that waits and no longer has to comes in.
    fn let_in(&mut self) {
        let waiting = self.outside.openers.iter().filter(|(_, o)| !o.inside);
        let waiting: Vec<_> = waiting.map(|(id, o)| (*id, o.errand)).collect();
        for (id, errand) in waiting {
            if !self.may_enter(errand) {
                continue;
            }
            self.note_entry(errand);
            if let Some(opener) = self.outside.openers.get_mut(&id) {
                opener.inside = true;
            }
            let delay = self.delay(1, 2_000);
            self.after(delay, Event::Opener(id));
        }
    }

    /// F_SETLEASE: granted when no other process has the file open in a way that would break it.
    pub(super) fn take_lease(&mut self) -> bool {
        if self.outside.errands().any(|e| self.breaks_lease(e)) || self.lease.held {
            return false;
        }
        self.note_lease();
        self.lease.held = true;
        self.lease.breaking = None;
        true
    }

    /// The lease goes, whoever ended it.
    pub(super) fn end_lease(&mut self) {
        self.lease.held = false;
        self.lease.breaking = None;
        self.host.end_residue();
        self.let_in();
    }

    /// The daemon gives the lease up (R2).
    pub(super) fn drop_lease(&mut self) {
        if self.keeps_lease() {
            return;
        }
        self.trace(|| "lease dropped".into());
        let raw = self.raw_in_flight().next().map(|o| (o.class, o.sectors.clone()));
        if let Some((class, sectors)) = raw
            && self.lease.held
        {
            self.fail(format!("the lease is dropped with a {class:?} at {sectors:?} (R2)"));
        }
        if !self.host.cache.any_dirty() {
            let all = self.host.everything();
            self.drop_pages(&all);
        }
        self.end_lease();
    }

    /// The lease-break time is over (R2a).
    pub(super) fn force(&mut self, id: u64) {
        if self.lease.held && self.lease.breaking == Some(id) {
            self.trace(|| "lease break forced".into());
            self.hit(Hazard::ForcedBreak);
            self.end_lease();
        }
    }

    /// `fadvise(DONTNEED)`.
    pub(super) fn drop_pages(&mut self, range: &Range<usize>) {
        let spb = self.host.spb;
        if self.host.cache.drop_clean(range, self.now, spb) > 0 {
            self.hit(Hazard::StuckPage);
        }
    }

    /// Now and then DONTNEED will not get at a page for a while.
    pub(super) fn maybe_stick(&mut self, sector: usize) {
        if self.rng.chance(self.scenario.stuck) {
            let until = self.now + self.rng.range(1_000, 3_000_000);
            self.host.cache.stick(sector, until);
        }
    }

    /// An opener does one thing, or leaves.
    pub(super) fn opener_acts(&mut self, id: u64) {
        let Some(mut opener) = self.outside.openers.remove(&id) else { return };
        if opener.deeds == 0 || opener.errand == Errand::Instance && self.instance_acts() {
            self.opener_leaves(opener.errand);
            return;
        }
        if self.deed(opener.errand) {
            opener.deeds -= 1;
        }
        self.outside.openers.insert(id, opener);
        let delay = self.delay(50, 60_000);
        self.after(delay, Event::Opener(id));
    }

    fn opener_leaves(&mut self, errand: Errand) {
        self.let_in();
        self.trace(|| format!("outside has done with {errand:?}"));
        let whole = self.scenario.sectors();
        if errand == Errand::Truncate && self.host.layout.size() < whole && self.rng.chance(800) {
            self.host.layout.set_size(whole);
            self.tell_size();
        }
    }

    /// Does one thing; `false` if it has to wait for direct I/O on the file.
    fn deed(&mut self, errand: Errand) -> bool {
        let block = self.rng.index(self.host.layout.len());
        let busy = self.ops.values().any(super::ops::InFlight::holds_layout);
        self.trace(|| format!("outside: {errand:?}, block {block} if any, busy: {busy}"));
        match errand {
            Errand::Read => self.outside_read(),
            Errand::Write => self.outside_write(),
            _ if busy => return false,
            Errand::Punch => return self.outside_punch(),
            Errand::Truncate => return self.cut_short(false),
            Errand::Defragment if self.scenario.identity() => {}
            Errand::Defragment => self.host.relocate(block, &mut self.rng),
            Errand::Clone => self.host.share(block),
            Errand::Deduplicate => self.deduplicate(block),
            Errand::Glance | Errand::Instance => {}
        }
        true
    }

    fn some_range(&mut self) -> Range<usize> {
        let size = self.host.layout.size().max(1);
        let start = self.rng.index(size);
        start..(start + 1 + self.rng.index(4 * self.host.spb)).min(size)
    }

    /// Whether the guest writes in the sector's page: it is written as a whole then, and two who
    /// write the same page at once lose one's bytes on any system.
    fn is_contended(&self, sector: usize) -> bool {
        let first = sector - sector % PAGE;
        let end = (first + PAGE).min(self.scenario.sectors());
        (first..end).any(|s| self.model.contended(s))
    }

    fn outside_read(&mut self) {
        for sector in self.some_range() {
            if self.host.cache.get(sector).is_some_and(|s| s != self.host.stored(sector))
                && !self.host.cache.is_dirty(sector)
            {
                self.hit(Hazard::StalePage);
            }
            let saw = self.host.buffered_read(sector);
            if sector < self.scenario.sectors()
                && let Err(wrong) = self.model.check(sector, saw)
            {
                self.fail(format!("outside reader: {wrong}"));
            }
            self.maybe_stick(sector);
        }
    }

    fn outside_write(&mut self) {
        let first = self.rng.next() | (0x0F << 56);
        for sector in self.some_range() {
            if sector < self.scenario.sectors() && !self.is_contended(sector) {
                let stamp = first.wrapping_add(sector as u64);
                self.host.buffered_write(sector, stamp);
                self.model.overwrite(sector, stamp);
                self.tell_readers(&(sector..sector + 1), |_| stamp);
                self.maybe_stick(sector);
                self.read_behind(sector);
            }
        }
        let later = self.delay(100, 50_000);
        self.after(later, Event::Writeback);
    }

    fn outside_punch(&mut self) -> bool {
        let range = self.some_range();
        let end = range.end.min(self.scenario.sectors());
        let range = range.start.min(end)..end;
        if range.clone().any(|s| self.is_contended(s)) {
            return false;
        }
        self.host.punch(&range, &mut self.rng);
        for sector in range.clone() {
            self.model.overwrite(sector, ZERO);
        }
        self.tell_readers(&range, |_| ZERO);
        true
    }

    /// The file gets shorter: by an opener whom the lease let in, or through an overlay.
    pub(super) fn cut_short(&mut self, behind: bool) -> bool {
        let whole = self.scenario.sectors();
        let size = whole / 2 + self.rng.index(whole / 2);
        let first = size / self.host.spb;
        let in_flight = self
            .ops
            .values()
            .any(|o| o.class != Class::SyncImage && o.blocks.iter().any(|b| *b >= first));
        if in_flight || size >= self.host.layout.size() {
            return false;
        }
        let residue = behind && self.lease.held;
        self.trace(|| format!("file cut to {size} sectors, behind our back: {behind}"));
        self.host.shrink(size, residue, &mut self.rng);
        self.outside.resized = true;
        // The block with the new end is rewritten by the kernel as well.
        self.model.let_go(first * self.host.spb..whole);
        self.note_error();
        self.tell_size();
        true
    }

    /// inotify tells the keeper (R5a).
    fn tell_size(&mut self) {
        let delay = self.delay(10, 3_000);
        self.daemon_after(delay, Event::SizeChanged);
    }

    /// `truncate(2)` through an overlay: no open, no break (R5a).
    pub(super) fn overlay(&mut self) {
        if self.peace {
            return;
        }
        if self.cut_short(true) {
            if self.lease.held {
                self.hit(Hazard::SizeChange);
            }
        } else if self.host.layout.size() == self.scenario.sectors() {
            let delay = self.delay(50, 5_000);
            self.after(delay, Event::Overlay);
        }
    }

    /// A power cut takes the openers too.
    pub(super) fn forget_outside(&mut self) {
        self.outside.openers.clear();
        self.lease = Lease { next_break: self.lease.next_break, ..Lease::default() };
    }

    /// The kernel writes some dirty block back, over some time.
    pub(super) fn writeback(&mut self) {
        let all = self.host.everything();
        let Some(dirty) = self.host.cache.first_dirty(&all) else { return };
        let block = dirty / self.host.spb;
        let id = self.host.start_writeback(block);
        self.trace(|| format!("write-back of block {block}"));
        let (lands, again) = (self.delay(50, 5_000), self.delay(100, 20_000));
        self.after(lands, Event::WritebackEnds(id));
        self.after(again, Event::Writeback);
    }
}
