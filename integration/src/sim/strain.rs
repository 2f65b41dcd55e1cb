// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The manager's thread has other things to do: each event costs it CPU time, and a lease break waits behind what came before. It
//! is answered in time all the same, as long as nothing is slow.

use super::fences::Fences;
use super::hazard::Hazard;
use super::mutant::Mutant;
use super::ring::Rings;
use super::scenario::LEASE_BREAK;
use super::trims::Trim;
use super::world::{Event, Party, World};

/// Longest that a lease break may take where no thread is stopped and no I/O fails, in microseconds: a quarter of the time after
/// which it is forced, as for everything that a break waits for (R2). It covers a read-modify-write at the slowest of the
/// simulated disks, which takes 160 ms.
const PROMPT: u64 = LEASE_BREAK / 4;
/// A wait that is put down to a burst of messages, in microseconds.
const NOTABLE: u64 = 500;

/// What the world keeps of [`Hardships`](super::hardship::Hardships).
#[derive(Debug, Default)]
pub(super) struct Strain {
    pub(super) fences: Fences,
    pub(super) trim: Trim,
    pub(super) rings: Rings,
    /// The helper never comes back from the job at hand.
    pub(super) hangs: bool,
    /// Until when the manager's thread is at work on what it has heard.
    pub(super) busy: u64,
    /// When the last lease break began, and when its signal came.
    broken: (u64, u64),
}

impl Strain {
    /// The daemon is dead.
    pub(super) fn end_life(&mut self) {
        *self = Self::default();
    }
}

impl World {
    /// The manager's thread takes an event up, and is busy with it for a while.
    pub(super) fn take_time(&mut self, event: &Event) {
        let waited = self.now.saturating_sub(self.strain.broken.1);
        if matches!(event, Event::LeaseSignal)
            && waited >= NOTABLE
            && !self.was_stalled(self.strain.broken.0)
        {
            self.hit(Hazard::BreakBehindBurst);
        }
        if self.scenario.hard.cpu == 0 {
            return;
        }
        let mut cost = 1 + self.rng.below(self.scenario.hard.cpu);
        if self.scenario.is(Mutant::QuadraticManager) {
            let due =
                |e: &&super::world::Entry| e.at <= self.now && e.event.party() == Party::Keeper;
            let waiting = self.queue.iter().filter(due).count() as u64;
            cost += 20 * waiting * waiting;
        }
        self.strain.busy = self.now + cost;
    }

    /// Whether any thread was stopped at `since` or later.
    fn was_stalled(&self, since: u64) -> bool {
        let stalls = &self.stalls;
        let last = stalls.workers.values().copied().max().unwrap_or(0);
        stalls.all.max(stalls.keeper).max(last) > since
    }

    /// A lease break begins, and its signal comes in so many microseconds.
    pub(super) fn time_break(&mut self, id: u64, signal: u64) {
        self.strain.broken = (self.now, self.now + signal);
        self.daemon_after(PROMPT, Event::Overdue(id));
    }

    /// The break with this number should have been answered.
    pub(super) fn check_prompt(&mut self, id: u64) {
        let slow = self.is_slow()
            || self.scenario.errors + self.scenario.shorts > 0
            || self.was_stalled(self.now - PROMPT);
        if !slow && self.lease.is_breaking() && self.lease.number() == Some(id) {
            self.fail(format!(
                "lease break {id} is not answered after {PROMPT} us, and nothing is slow (R2)"
            ));
        }
    }
}
