// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Direct mode begins and ends (R1–R3): the lease is taken, the cache emptied, everybody parked and
//! the cache seen empty once more; a break parks everybody and waits for raw I/O only.

use std::time::Duration;

use super::layout::Parking;
use super::{Keeper, Lease};
use crate::engine::message::{Action, Drain, Job, JobId, ParkId, Refusal, Report, Why};
use crate::engine::shared::Mode;
use crate::engine::units::FileRange;

/// Shortest wait before direct mode is tried for again.
const RETRY: Duration = Duration::from_millis(250);
/// The wait doubles with each break in a row, this often.
const DOUBLINGS: u32 = 5;
/// The same for attempts that are refused, so that its owner's close is seen within a second.
const BUSY_DOUBLINGS: u32 = 2;
/// The same where descriptors could not be searched, which may have taken ten seconds of the helper.
const UNSEEN_DOUBLINGS: u32 = 6;
/// Direct mode that held this long ends a row of breaks.
const CALM: Duration = Duration::from_secs(10);
/// Longest that everybody stays parked for entering direct mode; slow I/O makes it give up.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who owns the layout of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ownership {
    /// Not we, and it stays so.
    Final,
    /// A block device: ours by O_EXCL.
    Device,
    /// Not we; direct mode is tried for at this time.
    Shared { retry_at: Duration },
    /// The helper takes the lease. `cancelled`: a break came meanwhile.
    Entering { job: JobId, cancelled: bool },
    /// The lease is ours, everybody is being parked.
    Gathering { park: ParkId, since: Duration },
    /// Everybody is parked, the helper looks at the cache again.
    Confirming { job: JobId, park: Option<ParkId>, since: Duration },
    /// We, by lease.
    Direct,
    /// We still, until raw I/O has ended. `half`: of lease-break-time; `reports`: how many of these
    /// have passed and were reported; `broken`: somebody waits for the lease, whatever else came
    /// before or after.
    Leaving { since: Duration, why: Why, broken: bool, reports: u32, half: Duration },
}

impl Ownership {
    pub(super) fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Shared { retry_at } => Some(*retry_at),
            Self::Gathering { since, .. } | Self::Confirming { park: Some(_), since, .. } => {
                Some(*since + PATIENCE)
            }
            Self::Leaving { since, reports: reports @ 0..2, half, .. } => {
                Some(*since + *half * (*reports + 1))
            }
            _ => None,
        }
    }

    pub(super) const fn lease(&self) -> Lease {
        match self {
            Self::Direct | Self::Gathering { .. } | Self::Confirming { park: Some(_), .. } => {
                Lease::Held
            }
            Self::Leaving { .. } => Lease::Breaking,
            _ => Lease::None,
        }
    }
}

impl Keeper {
    /// The lease's signal arrived: somebody wants in (R2).
    pub fn lease_break(&mut self, now: Duration) {
        self.counts.lease_breaks += 1;
        self.leave(now, Why::LeaseBroken);
    }

    /// The file's size changed and it was not us (R5a).
    pub fn size_changed(&mut self, now: Duration) {
        self.leave(now, Why::SizeChanged);
    }

    /// The file has lost blocks and it was not us, as by two changes of its size in a row (R5a):
    /// the map is made anew.
    pub fn blocks_lost(&mut self, now: Duration) {
        self.leave(now, Why::BlocksLost);
    }

    /// Stops direct mode for good and gives the lease back, for the end of the process. Done when
    /// [`Action::DropLease`] has come out; it comes in any case.
    pub fn shut_down(&mut self, now: Duration) {
        if self.touch_at.is_some() {
            self.touch();
        }
        match self.ownership {
            Ownership::Direct | Ownership::Leaving { .. } => self.leave(now, Why::Stopping),
            _ => {
                self.cancel_entry(now);
                self.ownership = Ownership::Final;
                self.actions.push_back(Action::DropLease);
            }
        }
        self.why = Why::Stopping;
    }

    /// Has the helper take the lease and empty the cache.
    pub(super) fn enter(&mut self) {
        let job = self.run(Job::Enter);
        self.ownership = Ownership::Entering { job, cancelled: false };
    }

    /// An `fsync` that failed is told once, and it was not a flush that heard it (R16).
    fn hear_loss(&mut self, result: Result<(), Refusal>) {
        if let Err(Refusal::Unsynced(errno)) = result {
            self.commit.lost(errno);
            self.report(Report::FlushFailed(errno));
        }
    }

    pub(super) fn entered(&mut self, now: Duration, id: JobId, result: Result<(), Refusal>) {
        self.hear_loss(result);
        match self.ownership {
            Ownership::Entering { job, cancelled } if job == id => match result {
                Ok(()) if cancelled => {
                    // The break may have been served before the lease was taken.
                    self.actions.push_back(Action::DropLease);
                    self.retry(now);
                }
                Ok(()) => {
                    let park = self.park(now, FileRange::ALL, Drain::Everything, Parking::Enter);
                    if let Some(park) = park {
                        self.ownership = Ownership::Gathering { park, since: now };
                    }
                }
                Err(refusal) => self.refused(now, refusal),
            },
            // Shut down meanwhile.
            _ => self.actions.push_back(Action::DropLease),
        }
    }

    /// Everybody is parked.
    pub(super) fn gathered(&mut self, now: Duration, park: ParkId) {
        let since = match self.ownership {
            Ownership::Gathering { since, .. } => since,
            _ => now,
        };
        let job = self.run(Job::Confirm);
        self.ownership = Ownership::Confirming { job, park: Some(park), since };
    }

    pub(super) fn confirmed(&mut self, now: Duration, id: JobId, result: Result<(), Refusal>) {
        self.hear_loss(result);
        let Ownership::Confirming { job, park, .. } = self.ownership else { return };
        if job != id {
            return;
        }
        match (result, park) {
            (Ok(()), Some(park)) => {
                self.epoch += 1;
                self.map.clear();
                self.ownership = Ownership::Direct;
                self.direct_since = now;
                self.refusals = 0;
                self.publish(Mode::Direct);
                self.release(park);
                self.report(Report::Direct);
                self.populate();
            }
            (_, None) => self.retry(now),
            (Err(refusal), Some(park)) => {
                self.actions.push_back(Action::DropLease);
                self.release(park);
                self.refused(now, refusal);
            }
        }
    }

    fn refused(&mut self, now: Duration, refusal: Refusal) {
        let why = match refusal {
            Refusal::Busy => Why::Busy,
            Refusal::Unseen => Why::Unseen,
            Refusal::PagesCached => Why::PagesCached,
            Refusal::Changed => Why::Changed,
            Refusal::Mismatch => Why::Mismatch,
            Refusal::Unsynced(_) | Refusal::Failed(_) => Why::Failed,
        };
        // A refusal that repeats is news only once.
        if self.why != why {
            self.why = why;
            self.report(Report::Refused(refusal));
        }
        self.refusals = self.refusals.saturating_add(1);
        match refusal {
            Refusal::Changed | Refusal::Mismatch => self.ownership = Ownership::Final,
            Refusal::Busy
            | Refusal::Unseen
            | Refusal::PagesCached
            | Refusal::Unsynced(_)
            | Refusal::Failed(_) => self.retry(now),
        }
    }

    fn retry(&mut self, now: Duration) {
        let most = if self.why == Why::Unseen { UNSEEN_DOUBLINGS } else { BUSY_DOUBLINGS };
        let doublings = self.breaks.saturating_sub(1).min(DOUBLINGS).max(self.refusals.min(most));
        self.ownership = Ownership::Shared { retry_at: now + RETRY * (1 << doublings) };
    }

    /// Ends direct mode, or the attempt to begin it.
    pub(super) fn leave(&mut self, now: Duration, why: Why) {
        match self.ownership {
            Ownership::Direct => {
                let calm = now.saturating_sub(self.direct_since) > CALM;
                self.breaks = if calm { 1 } else { self.breaks + 1 };
                let half = self.config.lease_break_time / 2;
                let broken = why == Why::LeaseBroken;
                self.ownership = Ownership::Leaving { since: now, why, broken, reports: 0, half };
                self.park(now, FileRange::ALL, Drain::Raw, Parking::Leave);
            }
            Ownership::Leaving { since, why: old, broken, reports, half } => {
                // The time until a break is forced begins with the break, whatever made us leave before.
                let breaks = !broken && why == Why::LeaseBroken;
                let (since, reports) = if breaks { (now, 0) } else { (since, reports) };
                let broken = broken || breaks;
                // What is for good wins.
                let for_good = matches!(old, Why::Mismatch | Why::SizeChanged | Why::Stopping);
                let why = if for_good { old } else { why };
                self.ownership = Ownership::Leaving { since, why, broken, reports, half };
            }
            Ownership::Entering { .. }
            | Ownership::Gathering { .. }
            | Ownership::Confirming { .. } => {
                self.breaks += 1;
                self.cancel_entry(now);
            }
            Ownership::Final | Ownership::Device | Ownership::Shared { .. } => {}
        }
    }

    /// No raw I/O is in flight any more and none can start: the lease goes (R2).
    pub(super) fn left(&mut self, now: Duration, park: ParkId) {
        let Ownership::Leaving { why, .. } = self.ownership else { return };
        self.epoch += 1;
        self.map.clear();
        self.depopulate();
        self.why = why;
        self.publish(Mode::Filesystem);
        self.actions.push_back(Action::DropLease);
        match why {
            Why::Mismatch | Why::Stopping | Why::SizeChanged => self.ownership = Ownership::Final,
            _ => self.retry(now),
        }
        self.release(park);
        self.report(Report::Filesystem(why));
        if self.touch_at.is_some() {
            self.touch();
        }
        self.work();
    }

    /// A break while entering: nothing raw has been started yet, so the lease goes at once.
    fn cancel_entry(&mut self, now: Duration) {
        match self.ownership {
            Ownership::Entering { job, .. } => {
                self.ownership = Ownership::Entering { job, cancelled: true };
            }
            Ownership::Gathering { park, .. } => {
                self.retry(now);
                self.release(park);
            }
            Ownership::Confirming { job, park: Some(park), since } => {
                self.ownership = Ownership::Confirming { job, park: None, since };
                self.release(park);
            }
            _ => return,
        }
        self.actions.push_back(Action::DropLease);
    }

    pub(super) fn ownership_tick(&mut self, now: Duration) {
        match &mut self.ownership {
            Ownership::Shared { retry_at } if *retry_at <= now => self.enter(),
            Ownership::Gathering { since, .. }
            | Ownership::Confirming { park: Some(_), since, .. }
                if *since + PATIENCE <= now =>
            {
                self.breaks += 1;
                self.cancel_entry(now);
            }
            Ownership::Leaving { since, reports: reports @ 0..2, half, broken, .. }
                if *since + *half * (*reports + 1) <= now =>
            {
                *reports += 1;
                let broken = *broken;
                if *reports == 1 {
                    self.report(Report::SlowBreak);
                } else if broken {
                    self.counts.forced_breaks += 1;
                    self.report(Report::ForcedBreak);
                }
            }
            _ => {}
        }
    }

    /// Goes on with everything a change of mode or of locks may have set free.
    pub(super) fn work(&mut self) {
        self.grant_locks();
        self.load_wanted();
        self.populate_more();
    }
}
