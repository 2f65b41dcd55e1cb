// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Read-only images, whose lease may be a shared one. Any open for writing breaks it; readers come in beside it, and
//! other instances with leases of their own. Where the filesystem can share blocks that is not enough: a deduplication wants its
//! destination open for reading only, moves the file to other blocks and frees the old ones (ADR 0001).

use extentd::engine::request::Kind;

use super::guest::file_range;
use super::hazard::Hazard;
use super::host::Host;
use super::layout::NOWHERE;
use super::life::Incident;
use super::mutant::Mutant;
use super::outside::Errand;
use super::rng::Rng;
use super::world::World;

/// What can go wrong with a read-only image.
pub(super) const INCIDENTS: &[(Incident, u64)] = &[
    (Incident::Open(Errand::Read), 10),
    (Incident::Open(Errand::Write), 4),
    (Incident::Open(Errand::Punch), 3),
    (Incident::Open(Errand::Defragment), 4),
    (Incident::Open(Errand::Clone), 4),
    (Incident::Open(Errand::Deduplicate), 14),
    (Incident::Open(Errand::Instance), 14),
    (Incident::Open(Errand::Glance), 3),
    (Incident::StopAll, 4),
    (Incident::StopKeeper, 3),
    (Incident::StopWorker, 3),
    (Incident::Kill, 5),
    (Incident::PowerCut, 4),
    (Incident::Session, 5),
];

impl Errand {
    /// Whether it opens the file to write.
    const fn writes(self) -> bool {
        match self {
            Self::Write | Self::Punch | Self::Truncate | Self::Defragment => true,
            Self::Read | Self::Clone | Self::Deduplicate | Self::Instance | Self::Glance => false,
        }
    }
}

impl World {
    /// F_RDLCK instead of F_WRLCK: for a read-only image, where no blocks can be shared.
    fn shares_lease(&self) -> bool {
        let hard = &self.scenario.hard;
        hard.read_only && (!hard.reflink || self.scenario.is(Mutant::ReadLease))
    }

    /// Whether an opener and the lease are in each other's way.
    pub(super) fn breaks_lease(&self, errand: Errand) -> bool {
        errand.writes() || !self.shares_lease()
    }

    /// Whether an opener need not wait.
    pub(super) fn may_enter(&self, errand: Errand) -> bool {
        let leased = self.lease.is_held() || self.outside.instances() > 0;
        !(leased && self.breaks_lease(errand))
    }

    /// An opener has come in; what that means for a shared lease.
    pub(super) fn note_entry(&mut self, errand: Errand) {
        if self.lease.is_held() {
            self.hit(Hazard::BesideSharedLease);
        } else if errand.writes() && self.scenario.hard.read_only {
            self.hit(Hazard::WriterOfReadOnly);
        }
    }

    /// The lease was granted.
    pub(super) fn note_lease(&mut self) {
        if self.shares_lease() {
            self.hit(Hazard::SharedLease);
        } else if self.scenario.hard.read_only {
            self.hit(Hazard::ExclusiveReadOnly);
        }
    }

    /// Another instance has the file open and perhaps a lease on it; it leaves when an opener wants to write. Whether it is done.
    pub(super) fn instance_acts(&mut self) -> bool {
        if self.shares_lease() && self.outside.writer_waits() {
            self.hit(Hazard::SecondLease);
            return true;
        }
        false
    }

    /// `FIDEDUPERANGE` with the image as destination.
    pub(super) fn deduplicate(&mut self, block: usize) {
        if !self.scenario.hard.reflink || self.scenario.identity() {
            return;
        }
        // Most often it is a block that the guest likes.
        let hot = self.guest.hot.first().map_or(block, |sector| sector / self.host.spb);
        let block = if self.rng.chance(600) { hot } else { block };
        if self.host.deduplicate(block, &mut self.rng) {
            self.hit(Hazard::Deduplicated);
        }
    }

    /// What the guest of a read-only image asks for.
    pub(super) fn choose_read(&mut self) -> Kind {
        if self.rng.chance(self.scenario.flushes / 2) {
            return Kind::Flush;
        }
        Kind::Read(file_range(&self.any_range()))
    }
}

impl Host {
    /// The block lies where another file has the same bytes from now on, and the canary takes what it has left. False if there is
    /// nothing to share.
    fn deduplicate(&mut self, block: usize, rng: &mut Rng) -> bool {
        self.sync_range(&self.sectors_of(block));
        let old = self.layout.block(block);
        if old.place == NOWHERE || old.shared || !old.written {
            return false;
        }
        let Some(place) = self.find(block, rng) else { return false };
        for i in 0..self.spb {
            let stamp = self.disk.read(old.place * self.spb + i);
            self.disk.write_back(place * self.spb + i, stamp);
        }
        self.layout.unmap(block);
        self.layout.map(block, place, true);
        self.layout.set_shared(block);
        self.commit();
        self.adopt(old.place);
        true
    }
}
