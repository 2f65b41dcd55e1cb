// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A helper thread that never comes back from the filesystem. Lease breaks are answered all the same (R2), and reads that wait for
//! nothing of what it was to do; everything else is, when the daemon has been started anew.

use std::ops::Range;

use extentd::engine::message::Job;
use extentd::engine::request::Kind;

use super::hazard::Hazard;
use super::mutant::Mutant;
use super::outside::Errand;
use super::run::Sim;
use super::world::World;

/// Longest that a read takes, in microseconds.
const PATIENCE: u64 = 20_000_000;

impl World {
    /// Whether the helper hangs at the job at hand.
    pub(super) fn hangs(&mut self, job: Job) -> bool {
        let hangs = self.scenario.hard.hangs;
        if !self.strain.hangs && hangs > 0 && !self.peace && self.rng.chance(hangs) {
            self.trace(|| format!("the helper hangs: {job:?}"));
            self.hit(Hazard::HelperHangs);
            self.strain.hangs = true;
        }
        self.strain.hangs
    }

    /// The mutant gives the lease up where the helper works, and the helper hangs.
    pub(super) fn keeps_lease(&self) -> bool {
        self.scenario.is(Mutant::LeaseByHelper) && self.strain.hangs
    }
}

impl Sim {
    /// At the end of a run in which the helper hangs: the image is opened, the guest reads all of it, and then the daemon is
    /// started anew.
    pub(super) fn outlive_hang(&mut self) {
        if !self.world.strain.hangs {
            return;
        }
        if !self.world.scenario.identity() {
            // A reader breaks no shared lease, and as long as that holds, reads wait for a map.
            let read_only = self.world.scenario.hard.read_only;
            self.world.open(if read_only { Errand::Defragment } else { Errand::Read });
        }
        let limit = self.world.now + PATIENCE;
        self.run_until(limit, |sim| !sim.world.outside.anybody());
        // Requests behind a flush wait for what that waits for, which may be the helper.
        if !self.closing && !self.world.scenario.strict {
            let first = self.world.guest.next_number;
            self.read_all();
            let limit = self.world.now + PATIENCE;
            self.run_until(limit, |sim| sim.world.guest.reads_since(first, &[]).is_none());
            if let Some(read) = self.world.guest.reads_since(first, &self.world.jobs.punches()) {
                self.world
                    .fail(format!("a read of {read:?} is not answered while the helper hangs"));
            }
        }
        self.world.guest.sweep.clear();
        self.kill();
    }

    /// Every queue that has room reads a part of the image, until all of it is read or no queue has room.
    fn read_all(&mut self) {
        let window = self.world.window();
        let step = window.len().div_ceil(16).max(1);
        let mut at = window.start;
        let ids: Vec<_> = self.workers.keys().copied().collect();
        while at < window.end {
            self.world.guest.sweep.push_back(at..(at + step).min(window.end));
            at += step;
            if let Some(id) = ids.get(at % ids.len().max(1)) {
                self.ask_of(*id);
            }
        }
    }
}

impl super::guest::Guest {
    /// A read that waits, of those from number `first` on that touch nothing of `but`.
    fn reads_since(&self, first: u64, but: &[Range<usize>]) -> Option<Range<usize>> {
        let apart = |a: &Range<usize>, b: &Range<usize>| a.end <= b.start || b.end <= a.start;
        let clear = |read: &Range<usize>| but.iter().all(|but| apart(read, but));
        let mut reads = self.pending.values().filter(|p| p.is_since(first) && clear(&p.sectors));
        reads.find(|p| matches!(p.request.kind, Kind::Read(_))).map(|p| p.sectors.clone())
    }
}
