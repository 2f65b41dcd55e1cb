// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How much raw I/O may be in flight: what the device is expected to complete within a quarter of
//! lease-break-time, at the slowest rate it has shown lately (R2b).
//!
//! A lease break waits for the raw I/O in flight. If that takes longer than lease-break-time, the
//! kernel lets the opener in, and queued raw writes then land in blocks that have been freed.
//! A device may become slow at any time (`io.max`, a rebuild, a shared disk), so the bound follows
//! what it completes. Its rate is measured in windows of the time in which I/O was in flight, four
//! to a quarter of lease-break-time, and the slowest of the last four counts. While nothing is known
//! of the device the bound starts small and grows with each byte completed: by the time the first
//! window ends, no more is in flight than what that window has completed, and the start.

use std::time::Duration;

/// Windows in the time in which a drain has to end; as many samples are kept.
const WINDOWS: u32 = 4;
/// Operations in addition to those completed, while nothing is known of the device.
const START_OPS: u64 = 64;
/// Operations that may always be in flight.
const LEAST_OPS: u64 = 4;
/// How many drains long a device may be idle before it may be a fast one again.
const MEMORY: u32 = 8;

/// Which bound a raw operation counts towards: a device reads, writes and zeroes at different rates.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lane {
    /// Reads.
    Read,
    /// Writes of data.
    Write,
    /// Zeros written by reference, which may cost a device nothing.
    Zeroes,
}

impl Lane {
    /// All of them, in the order of their discriminants.
    pub(super) const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Zeroes];

    pub(super) const fn of(write: bool, by_reference: bool) -> Self {
        match (write, by_reference) {
            (false, _) => Self::Read,
            (true, false) => Self::Write,
            (true, true) => Self::Zeroes,
        }
    }
}

/// Bounds of the raw I/O of one worker, in each [`Lane`], in bytes; powers of two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RawLimits {
    /// Most bytes in flight, however fast the device is. All workers' together are what has to be
    /// drained when a fast device turns slow from one moment to the next.
    pub bytes: u64,
    /// Bytes in flight in addition to those completed, while nothing is known of the device.
    pub start: u64,
    /// Bytes that may always be in flight, besides one operation of one block.
    pub least: u64,
    /// Most bytes of one operation that moves data.
    pub operation: u64,
}

impl RawLimits {
    /// The limits of one of `workers` workers, up to 64. Together they have at most 32 MiB in flight in
    /// each lane, which keeps any disk busy, and which one that completes 2 MiB/s drains within the
    /// default lease-break-time. Devices that share a disk add up.
    #[must_use]
    pub fn of_one_in(workers: u16) -> Self {
        let workers = u64::from(workers.clamp(1, 64)).next_power_of_two();
        Self {
            bytes: (32 << 20) / workers,
            start: ((4 << 20) / workers).min(1 << 20),
            least: ((256 << 10) / workers).min(128 << 10),
            operation: 1 << 20,
        }
    }
}

impl Default for RawLimits {
    fn default() -> Self {
        Self::of_one_in(1)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Amount {
    bytes: u64,
    ops: u64,
}

/// The raw I/O of one lane in flight, and how fast the device completes it.
#[derive(Debug)]
pub(super) struct Pace {
    limits: RawLimits,
    /// Length of a window; `None`: nothing but [`RawLimits::bytes`] bounds the I/O.
    window: Option<Duration>,
    in_flight: Amount,
    /// Completed in the open window.
    done: Amount,
    /// How much of the open window had passed when I/O was last started with none in flight.
    before: Duration,
    /// When that was, or when the window was opened after it.
    since: Duration,
    /// When the open window ends if I/O stays in flight; never, where there are no windows.
    ends: Duration,
    /// When an operation last ended.
    active: Duration,
    samples: [Amount; WINDOWS as usize],
    /// Samples taken since the device was last idle for long.
    taken: usize,
    limit: Amount,
}

impl Pace {
    /// `drain`: how long a drain may take; `None` or more than a device is idle for: any time.
    pub(super) fn new(limits: RawLimits, drain: Option<Duration>) -> Self {
        let window = drain.map(|drain| drain / WINDOWS);
        let mut pace = Self {
            limits,
            window,
            in_flight: Amount::default(),
            done: Amount::default(),
            before: Duration::ZERO,
            since: Duration::ZERO,
            ends: Duration::MAX,
            active: Duration::ZERO,
            samples: [Amount::default(); WINDOWS as usize],
            taken: 0,
            limit: Amount { bytes: limits.bytes, ops: u64::MAX },
        };
        pace.forget();
        pace
    }

    /// Bytes in flight.
    pub(super) const fn in_flight(&self) -> u64 {
        self.in_flight.bytes
    }

    /// Most bytes of one operation: there is room for four.
    pub(super) fn longest(&self) -> u64 {
        (self.limit.bytes / 4).max(self.limits.least).min(self.limits.operation)
    }

    /// Whether an operation of `bytes` may be started at `now`. One always may if none is in flight.
    pub(super) fn admits(&mut self, now: Duration, bytes: u64) -> bool {
        if self.in_flight.ops == 0 {
            return true;
        }
        self.observe(now);
        self.in_flight.bytes.saturating_add(bytes) <= self.limit.bytes
            && self.in_flight.ops < self.limit.ops
    }

    /// An operation of `bytes` starts.
    pub(super) fn started(&mut self, now: Duration, bytes: u64) {
        if self.in_flight.ops == 0
            && let Some(window) = self.window
        {
            let idle = now.saturating_sub(self.active);
            if idle > window * WINDOWS * MEMORY {
                self.forget();
            } else if idle > window {
                self.doubt();
            }
            self.since = now;
            self.ends = now + window.saturating_sub(self.before);
        }
        self.in_flight.bytes += bytes;
        self.in_flight.ops += 1;
    }

    /// An operation of `bytes` has ended, and the device has moved them if it is `done`.
    pub(super) fn ended(&mut self, now: Duration, bytes: u64, done: bool) {
        self.in_flight.bytes -= bytes;
        self.in_flight.ops -= 1;
        self.active = now;
        if done {
            self.done.bytes += bytes;
            self.done.ops += 1;
            if self.taken == 0 {
                self.limit.bytes = (self.limit.bytes + bytes).min(self.limits.bytes);
                self.limit.ops = self.limit.ops.saturating_add(1);
            }
        }
        self.observe(now);
        if self.in_flight.ops == 0 {
            self.before += now.saturating_sub(self.since);
        }
    }

    /// The device may have completed nothing for long: then nobody but the one who wants to start
    /// more notices.
    #[inline]
    fn observe(&mut self, now: Duration) {
        if now >= self.ends {
            self.sample(now);
        }
    }

    /// The open window ends, and the next one is opened.
    #[cold]
    fn sample(&mut self, now: Duration) {
        let Some(window) = self.window else { return };
        let length = self.before + now.saturating_sub(self.since);
        let rate = |done: u64| scaled(done, window, length);
        let sample = Amount { bytes: rate(self.done.bytes), ops: rate(self.done.ops) };
        if let Some(place) = self.samples.get_mut(self.taken % WINDOWS as usize) {
            *place = sample;
        }
        self.taken += 1;
        self.done = Amount::default();
        self.before = Duration::ZERO;
        self.since = now;
        self.ends = now + window;
        let known = self.samples.iter().take(self.taken);
        let slowest = |of: fn(&Amount) -> u64| {
            known.clone().map(of).min().unwrap_or(0).saturating_mul(u64::from(WINDOWS))
        };
        self.limit = Amount {
            bytes: slowest(|a| a.bytes).clamp(self.limits.least, self.limits.bytes),
            ops: slowest(|a| a.ops).max(LEAST_OPS),
        };
    }

    /// Others may have started to use the device meanwhile, other workers as well, each of which has
    /// seen it alone: that it is slow is still believed, that it is fast is not.
    fn doubt(&mut self) {
        let known = self.limit;
        self.forget();
        self.limit.bytes = self.limit.bytes.min(known.bytes);
        self.limit.ops = self.limit.ops.min(known.ops);
    }

    /// Nothing is known of the device (any more).
    fn forget(&mut self) {
        self.taken = 0;
        self.done = Amount::default();
        self.before = Duration::ZERO;
        if self.window.is_some() {
            self.limit = Amount { bytes: self.limits.start, ops: START_OPS };
        }
    }
}

/// What would have been done in a window, had it been as long as `window`.
fn scaled(done: u64, window: Duration, length: Duration) -> u64 {
    let scaled = u128::from(done) * window.as_nanos() / length.as_nanos().max(1);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "pace_tests.rs"]
mod tests;
