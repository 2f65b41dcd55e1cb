// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;

use super::{LEAST_OPS, Pace, RawLimits};

const LIMITS: RawLimits =
    RawLimits { bytes: 32 << 20, start: 1 << 20, least: 128 << 10, operation: 1 << 20 };
/// A quarter of 45 s.
const DRAIN: Duration = Duration::from_millis(11_250);
const WINDOW: Duration = Duration::from_nanos(DRAIN.as_nanos() as u64 / 4);

/// A device that completes one operation after the other, and a guest that never has too little
/// to do.
struct Rig {
    pace: Pace,
    now: Duration,
    /// When the last operation in flight ends.
    free: Duration,
    queue: VecDeque<(Duration, u64)>,
    bytes_per_second: u64,
    /// What an operation takes beyond its bytes.
    each: Duration,
    completed: u64,
}

impl Rig {
    fn new(bytes_per_second: u64, each: Duration) -> Self {
        Self {
            pace: Pace::new(LIMITS, Some(DRAIN)),
            now: Duration::from_secs(1000),
            free: Duration::ZERO,
            queue: VecDeque::new(),
            bytes_per_second,
            each,
            completed: 0,
        }
    }

    /// Starts operations of `size` bytes until no more are admitted; the longest are cut.
    fn fill(&mut self, size: u64) {
        loop {
            let size = size.min(self.pace.longest());
            if !self.pace.admits(self.now, size) {
                return;
            }
            self.pace.started(self.now, size);
            let takes = Duration::from_secs_f64(size as f64 / self.bytes_per_second as f64);
            self.free = self.free.max(self.now) + takes + self.each;
            self.queue.push_back((self.free, size));
        }
    }

    /// The device ends the next operation.
    fn complete(&mut self) {
        let Some((at, size)) = self.queue.pop_front() else { return };
        self.now = self.now.max(at);
        self.completed += size;
        self.pace.ended(self.now, size, true);
    }

    /// How long a drain that begins now would take.
    fn drain(&self) -> Duration {
        self.queue.back().map_or(Duration::ZERO, |(at, _)| at.saturating_sub(self.now))
    }

    fn run(&mut self, size: u64, time: Duration, mut look: impl FnMut(&Self)) {
        let end = self.now + time;
        while self.now < end {
            self.fill(size);
            look(self);
            self.complete();
        }
    }
}

proptest! {
    /// Whatever its rate, a steady device can drain what is in flight in a quarter of
    /// lease-break-time, or in what its least amount takes.
    #[test]
    fn a_steady_device_drains_in_time(
        rate in prop_oneof![1u64 << 10..1 << 17, 1u64 << 17..1 << 24, 1u64 << 24..1 << 33],
        micros in prop_oneof![Just(0u64), 1u64..200_000],
        size in 1u64..2048,
    ) {
        let mut rig = Rig::new(rate, Duration::from_micros(micros));
        let size = size * 4096;
        let one = |bytes: u64| Duration::from_secs_f64(bytes as f64 / rate as f64) + rig.each;
        // Before anything is known the start is in flight, and in the first window as much again as
        // has completed; what the device cannot do within a window is one operation too many.
        let start = one(LIMITS.start).max(rig.each * 64);
        let slack = one(LIMITS.operation) * 2;
        let least = one(LIMITS.least).max(rig.each * u32::try_from(LEAST_OPS).unwrap());
        let most = (start + WINDOW).max(DRAIN).max(least) + slack;
        let mut worst = Duration::ZERO;
        let steps = (2_000 + rate / size).min(20_000) as u32;
        let time = (one(size.min(LIMITS.operation)) * steps).min(DRAIN * 8);
        rig.run(size, time, |rig| worst = worst.max(rig.drain()));
        prop_assert!(worst <= most, "{worst:?}, not {most:?}");
    }
}

#[test]
fn a_fast_device_has_all_it_may_have_in_flight_at_once() {
    let mut rig = Rig::new(2 << 30, Duration::ZERO);
    rig.run(128 << 10, Duration::from_millis(40), |_| ());
    rig.fill(128 << 10);
    assert_eq!(rig.pace.in_flight.bytes, LIMITS.bytes);
    assert_eq!(rig.pace.longest(), LIMITS.operation);
    rig.run(128 << 10, Duration::from_secs(30), |rig| {
        assert_eq!(rig.pace.in_flight.bytes, LIMITS.bytes);
    });
}

#[test]
fn small_requests_at_any_depth_are_never_held_back_on_a_fast_device() {
    let mut rig = Rig::new(1 << 30, Duration::from_micros(2));
    rig.run(4096, Duration::from_millis(10), |_| ());
    rig.fill(4096);
    assert!(rig.queue.len() >= 1024, "{}", rig.queue.len());
}

#[test]
fn a_device_that_turns_slow_has_less_in_flight_from_then_on() {
    let mut rig = Rig::new(1 << 30, Duration::ZERO);
    rig.run(1 << 20, Duration::from_secs(20), |_| ());
    rig.bytes_per_second = 1 << 20;
    // What was in flight is done with, and a window later the new rate is all that counts.
    rig.run(1 << 20, Duration::from_secs(32) + WINDOW, |_| ());
    let most = DRAIN + Duration::from_secs(2);
    rig.run(1 << 20, Duration::from_secs(60), |rig| {
        assert!(rig.drain() <= most, "{:?}", rig.drain());
    });
    // And more again once the slow windows are a quarter of lease-break-time ago.
    rig.bytes_per_second = 1 << 30;
    rig.run(1 << 20, DRAIN * 2 + WINDOW, |_| ());
    rig.fill(1 << 20);
    assert_eq!(rig.pace.in_flight.bytes, LIMITS.bytes);
}

#[test]
fn a_device_with_few_operations_a_second_is_not_given_thousands_of_small_ones() {
    // 10 operations a second, of whatever size.
    let mut rig = Rig::new(u64::MAX, Duration::from_millis(100));
    rig.run(1 << 20, Duration::from_secs(30), |_| ());
    let most = DRAIN + Duration::from_secs(1);
    rig.run(4096, Duration::from_secs(60), |rig| {
        assert!(rig.drain() <= most, "{:?}", rig.drain());
    });
}

#[test]
fn a_device_that_completes_nothing_is_given_nothing_more() {
    let mut rig = Rig::new(1 << 30, Duration::ZERO);
    rig.run(1 << 20, Duration::from_secs(20), |_| ());
    while rig.queue.len() > 1 {
        rig.complete();
    }
    assert!(rig.pace.admits(rig.now, 1 << 20));
    for quarters in 1..12 {
        rig.pace.admits(rig.now + WINDOW / 4 * quarters, 1 << 20);
    }
    // A window in which nothing came back has passed.
    assert!(!rig.pace.admits(rig.now + WINDOW * 3, 4096));
    assert_eq!(rig.pace.longest(), LIMITS.least);
}

#[test]
fn one_operation_may_always_be_in_flight() {
    let mut pace = Pace::new(LIMITS, Some(DRAIN));
    assert!(pace.admits(Duration::ZERO, u64::MAX));
    pace.started(Duration::ZERO, 1 << 30);
    assert!(!pace.admits(Duration::ZERO, 1));
}

#[test]
fn what_has_failed_was_not_done() {
    let mut rig = Rig::new(1 << 30, Duration::ZERO);
    for _ in 0..1000 {
        rig.pace.started(rig.now, 1 << 20);
        rig.now += Duration::from_millis(20);
        rig.pace.ended(rig.now, 1 << 20, false);
    }
    assert_eq!(rig.pace.limit.bytes, LIMITS.least);
}

#[test]
fn after_an_idle_time_the_device_is_a_stranger_again() {
    let mut rig = Rig::new(1 << 30, Duration::ZERO);
    rig.run(1 << 20, Duration::from_secs(20), |_| ());
    while !rig.queue.is_empty() {
        rig.complete();
    }
    assert_eq!(rig.pace.limit.bytes, LIMITS.bytes);
    rig.now += WINDOW + Duration::from_millis(1);
    rig.pace.started(rig.now, 4096);
    assert_eq!(rig.pace.limit.bytes, LIMITS.start);
}

#[test]
fn that_a_device_is_slow_is_believed_for_longer() {
    let mut rig = Rig::new(1 << 10, Duration::ZERO);
    rig.run(1 << 20, DRAIN * 80, |_| ());
    while !rig.queue.is_empty() {
        rig.complete();
    }
    assert_eq!(rig.pace.limit.bytes, LIMITS.least);
    rig.now += WINDOW * 2;
    rig.pace.started(rig.now, 4096);
    assert_eq!(rig.pace.limit.bytes, LIMITS.least);
    rig.pace.ended(rig.now, 4096, true);
    rig.now += DRAIN * 9;
    rig.pace.started(rig.now, 4096);
    assert_eq!(rig.pace.limit.bytes, LIMITS.start);
}

#[test]
fn idle_moments_do_not_count_as_the_devices_time() {
    // A guest that thinks for a second after each request of 1 ms.
    let mut rig = Rig::new(1 << 30, Duration::from_millis(1));
    for _ in 0..20_000 {
        assert!(rig.pace.admits(rig.now, 4096));
        rig.pace.started(rig.now, 4096);
        rig.now += Duration::from_millis(1);
        rig.pace.ended(rig.now, 4096, true);
        rig.now += Duration::from_secs(1);
    }
    // 4 MB/s for a quarter of lease-break-time.
    assert!(rig.pace.limit.bytes > 30 << 20, "{}", rig.pace.limit.bytes);
}

#[test]
fn a_block_device_has_no_lease_to_break() {
    let mut pace = Pace::new(LIMITS, None);
    pace.started(Duration::ZERO, 31 << 20);
    assert!(pace.admits(Duration::from_secs(1 << 20), 1 << 20));
    assert!(!pace.admits(Duration::from_secs(1 << 20), (1 << 20) + 1));
}

#[test]
fn limits_hold_for_any_number_of_workers() {
    for workers in 0..=64 {
        let limits = RawLimits::of_one_in(workers);
        assert!(limits.least <= limits.start, "{limits:?}");
        assert!(limits.start <= limits.bytes, "{limits:?}");
        assert!(limits.bytes * u64::from(workers) <= 32 << 20, "{limits:?}");
        assert!(limits.start * u64::from(workers) <= 4 << 20, "{limits:?}");
        let mut pace = Pace::new(limits, Some(DRAIN));
        pace.limit.bytes = limits.bytes;
        assert!(pace.longest() <= limits.bytes.max(4096) / 4 || pace.longest() <= limits.least);
    }
}
