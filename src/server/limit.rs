// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How much of the log each cause may have: token buckets, without a clock of their own.
//!
//! A *kind* of line is one log statement of one device. Every kind is limited, the host's included: a process that
//! opens an image again and again makes as many lines as a frontend that connects again and again. The kinds
//! that a guest, a frontend or a control client can cause share a limit of their device's as well, so that
//! many of them together say no more than a few of them would. Lines of the host's causes do not count
//! there: no guest can keep a change of mode out of the log.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

/// Lines at once, and how long until there may be one more.
#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: u32,
    every: Duration,
}

/// A kind that the operator or the host causes.
const HOST: Rate = Rate { burst: 20, every: Duration::from_secs(2) };
/// A kind that a guest, a frontend or a control client causes.
const OUTSIDE: Rate = Rate { burst: 10, every: Duration::from_secs(10) };
/// All the latter of one device together.
const DEVICE: Rate = Rate { burst: 60, every: Duration::from_secs(2) };

/// Which limits a line has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cause {
    /// The operator, or the host: its disks, filesystems and other processes.
    Host,
    /// A guest, a frontend or a control client. Also what nobody has thought about.
    Outside,
}

/// A token bucket, as the moment at which it is full again.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    full_at: Duration,
}

impl Bucket {
    fn has_token(self, rate: Rate, now: Duration) -> bool {
        self.full_at.saturating_sub(now) <= rate.every * rate.burst.saturating_sub(1)
    }

    fn take(&mut self, rate: Rate, now: Duration) {
        self.full_at = self.full_at.max(now) + rate.every;
    }
}

#[derive(Debug)]
struct Kind<L> {
    bucket: Bucket,
    /// Lines left out since the last report, and the last one of them.
    suppressed: u64,
    last: Option<L>,
}

/// What was left out of the log.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Suppressed<D, L> {
    pub(super) device: D,
    /// So many lines of a kind.
    pub(super) lines: u64,
    /// The last one.
    pub(super) last: L,
}

/// The limits of log statements `S` of devices `D`, whose lines are described by an `L`. Neither kinds nor devices
/// go away: there are as many as the program has statements, times its devices.
#[derive(Debug)]
pub(super) struct Limiter<S, D, L> {
    kinds: HashMap<(S, D), Kind<L>>,
    devices: HashMap<D, Bucket>,
}

impl<S, D, L> Default for Limiter<S, D, L> {
    fn default() -> Self {
        Self { kinds: HashMap::new(), devices: HashMap::new() }
    }
}

impl<S: Hash + Eq, D: Hash + Eq + Clone, L: Default> Limiter<S, D, L> {
    /// Whether a line may go to the log. One that may not is counted, and `describe` makes a description of it
    /// out of the one before.
    pub(super) fn admit(
        &mut self,
        (site, device): (S, D),
        cause: Cause,
        now: Duration,
        describe: impl FnOnce(&mut L),
    ) -> bool {
        let shared = match cause {
            Cause::Host => None,
            Cause::Outside => Some(self.devices.entry(device.clone()).or_default()),
        };
        let rate = match cause {
            Cause::Host => HOST,
            Cause::Outside => OUTSIDE,
        };
        let kind = self.kinds.entry((site, device)).or_insert_with(|| Kind {
            bucket: Bucket::default(),
            suppressed: 0,
            last: None,
        });
        let free = shared.as_ref().is_none_or(|bucket| bucket.has_token(DEVICE, now));
        if free && kind.bucket.has_token(rate, now) {
            kind.bucket.take(rate, now);
            if let Some(bucket) = shared {
                bucket.take(DEVICE, now);
            }
            return true;
        }
        kind.suppressed += 1;
        describe(kind.last.get_or_insert_default());
        false
    }

    /// What was left out since the last time this was asked, one entry for each kind.
    pub(super) fn report(&mut self) -> Vec<Suppressed<D, L>> {
        let kinds = self.kinds.iter_mut();
        let report = kinds.filter_map(|((_, device), kind)| {
            let lines = std::mem::take(&mut kind.suppressed);
            Some(Suppressed { device: device.clone(), lines, last: kind.last.take()? })
        });
        report.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Lines = Limiter<u32, u32, String>;

    fn admit(limiter: &mut Lines, site: u32, device: u32, cause: Cause, now: Duration) -> bool {
        limiter.admit((site, device), cause, now, |last| *last = format!("{site} at {now:?}"))
    }

    /// How many of `times` lines at once are admitted.
    fn burst(limiter: &mut Lines, site: u32, device: u32, cause: Cause, now: Duration) -> usize {
        (0..1000).filter(|_| admit(limiter, site, device, cause, now)).count()
    }

    const START: Duration = Duration::from_secs(1000);

    #[test]
    fn a_kind_has_a_burst_and_then_a_line_now_and_then() {
        let mut limiter = Lines::default();
        for (site, cause, rate) in [(1, Cause::Outside, OUTSIDE), (2, Cause::Host, HOST)] {
            let full = usize::try_from(rate.burst).unwrap();
            assert_eq!(burst(&mut limiter, site, 0, cause, START), full);
            let almost = START + rate.every - Duration::from_nanos(1);
            assert_eq!(burst(&mut limiter, site, 0, cause, almost), 0);
            assert_eq!(burst(&mut limiter, site, 0, cause, START + rate.every), 1);
            assert_eq!(burst(&mut limiter, site, 0, cause, START + rate.every * 3), 2);
            // After a long silence it is the burst again, not all that could have been said.
            assert_eq!(burst(&mut limiter, site, 0, cause, START * 1000), full);
        }
    }

    #[test]
    fn all_kinds_of_a_device_together_are_limited_and_the_hosts_are_not_among_them() {
        let mut limiter = Lines::default();
        let said: usize =
            (0..50).map(|site| burst(&mut limiter, site, 7, Cause::Outside, START)).sum();
        assert_eq!(said, usize::try_from(DEVICE.burst).unwrap());
        assert_eq!(burst(&mut limiter, 99, 7, Cause::Outside, START), 0);
        assert_eq!(burst(&mut limiter, 100, 7, Cause::Host, START), 20);
        // Another device, and the process itself, have limits of their own.
        assert_eq!(burst(&mut limiter, 0, 8, Cause::Outside, START), 10);
        // An hour of it: no more than the rate of the device.
        let hour = (1..=36_000_u32).map(|step| START + Duration::from_millis(100) * step);
        let mut said = 0_u32;
        for now in hour {
            said += (0..50_u32)
                .map(|site| u32::from(admit(&mut limiter, site, 7, Cause::Outside, now)))
                .sum::<u32>();
        }
        assert_eq!(said, 1800);
    }

    #[test]
    fn what_was_left_out_is_reported_once_with_the_last_line() {
        let mut limiter = Lines::default();
        assert!(limiter.report().is_empty());
        burst(&mut limiter, 1, 7, Cause::Outside, START);
        let later = START + Duration::from_secs(1);
        assert!(!admit(&mut limiter, 1, 7, Cause::Outside, later));
        let last = format!("1 at {later:?}");
        assert_eq!(limiter.report(), [Suppressed { device: 7, lines: 991, last }]);
        assert!(limiter.report().is_empty());
        // A line that is refused takes no token of its device's.
        burst(&mut limiter, 2, 7, Cause::Outside, START);
        assert_eq!(burst(&mut limiter, 3, 7, Cause::Outside, START), 10);
    }
}
