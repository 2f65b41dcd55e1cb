// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that flushes while its discard is being punched, and once more when it has the answer: what the first flush made durable
//! was not the punch, so the second has to (R14).

use extentd::engine::request::Kind;

use super::hazard::Hazard;
use super::world::{Event, World};

/// Longest that a punch is held up for the flush beside it, in microseconds.
const HOLD: u64 = 15_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Trim {
    #[default]
    Idle,
    /// A punch is held up until then, unless a flush ends before.
    Holding(u64),
    /// A flush has ended beside the punch.
    Flushed,
    /// The discard is answered, the guest flushes again.
    Again,
}

impl World {
    /// Whether the filesystem takes its time with the punch at hand.
    pub(super) fn holds_punch(&mut self) -> bool {
        if !self.scenario.hard.trims || self.peace {
            return false;
        }
        match self.strain.trim {
            Trim::Holding(until) => {
                if until <= self.now {
                    self.strain.trim = Trim::Idle;
                }
                until > self.now
            }
            Trim::Flushed => false,
            Trim::Idle | Trim::Again => {
                self.strain.trim = Trim::Holding(self.now + HOLD);
                self.ask_for_flush();
                true
            }
        }
    }

    fn ask_for_flush(&mut self) {
        self.guest.flush_first = true;
        self.guest.to_issue += 1;
        self.after(0, Event::Issue);
    }

    /// Whether the guest only reads for now: what it wrote would have the second flush do what the punch is to have it do.
    pub(super) fn trims_now(&self) -> bool {
        self.strain.trim != Trim::Idle && !self.peace
    }

    /// The guest has got an answer.
    pub(super) fn note_trim(&mut self, kind: Kind, ok: bool) {
        if !self.scenario.hard.trims || self.peace {
            return;
        }
        match (self.strain.trim, kind) {
            // A flush that fails at once because an earlier one has holds nothing up again and again.
            (Trim::Holding(_), Kind::Flush) if !ok => self.strain.trim = Trim::Flushed,
            (_, Kind::Flush | Kind::Discard(_) | Kind::WriteZeroes { .. }) if !ok => {
                self.strain.trim = Trim::Idle;
            }
            (Trim::Holding(_), Kind::Flush) => self.strain.trim = Trim::Flushed,
            (Trim::Flushed, Kind::Discard(_) | Kind::WriteZeroes { unmap: true, .. }) => {
                self.strain.trim = Trim::Again;
                self.ask_for_flush();
            }
            (Trim::Again, Kind::Flush) => {
                self.strain.trim = Trim::Idle;
                self.hit(Hazard::FlushBesidePunch);
                if self.rng.chance(700) {
                    let delay = self.rng.below(300);
                    self.after(delay, Event::Blackout);
                }
            }
            _ => {}
        }
    }
}
