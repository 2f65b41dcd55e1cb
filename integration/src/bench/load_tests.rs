// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The loop over a disk that answers at once: what is counted does not depend on how long anything takes.

use std::collections::VecDeque;

use super::super::workload::Access;
use super::*;

/// Answers in another order than it is asked in, a few at a time, and sometimes not yet.
#[derive(Default)]
struct Instantly {
    queued: VecDeque<u16>,
    sent: Vec<u16>,
    looks: u64,
    most: usize,
    requests: Vec<Request>,
}

impl Disk for Instantly {
    fn queue(&mut self, slot: u16, request: Request) -> io::Result<()> {
        assert!(!self.queued.contains(&slot) && !self.sent.contains(&slot), "slot {slot} is busy");
        self.queued.push_back(slot);
        self.requests.push(request);
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        self.sent.extend(self.queued.drain(..));
        self.most = self.most.max(self.sent.len());
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        self.looks += 1;
        if !self.looks.is_multiple_of(3) {
            done.extend(self.sent.pop());
            done.extend(self.sent.pop());
        }
        Ok(())
    }
}

#[test]
fn a_transfer_ends_when_everything_has_been_answered() {
    let mut disk = Instantly::default();
    let workload = Workload::random(Access::Write, 8, 2);
    transfer(&mut disk, workload, 1 << 20, 1000).unwrap();
    assert_eq!(disk.most, 16);
    assert!(disk.sent.is_empty() && disk.queued.is_empty());
    // What was in flight when the last one ended is sent, too, but not more.
    assert!((1000..1016).contains(&disk.requests.len()), "{}", disk.requests.len());
}

#[test]
fn flushes_have_their_own_histogram_and_marks_bracket_what_is_counted() {
    let mut disk = Instantly::default();
    let workload = Workload { flush_every: 3, ..Workload::random(Access::Write, 4, 1) };
    let timing = Timing { warm_up: Duration::ZERO, measured: Duration::from_millis(5) };
    let mut marks = 0;
    let sample = run(&mut disk, workload, timing, 1 << 20, || {
        marks += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!(marks, 2);
    assert!(disk.sent.is_empty() && sample.requests() > 0 && sample.seconds > 0.0);
    let flushes = disk.requests.iter().filter(|r| **r == Request::Flush).count() as u64;
    assert!(sample.flushes.total() <= flushes);
    // One to three, up to what was in flight at both ends.
    assert!(sample.requests().abs_diff(3 * sample.flushes.total()) <= 3 * 8);
}

#[test]
fn discards_are_counted_and_the_writes_before_them_are_not() {
    let mut disk = Instantly::default();
    let workload = Workload::random(Access::Discard, 4, 1);
    transfer(&mut disk, workload, 1 << 20, 100).unwrap();
    let discards = disk.requests.iter().filter(|r| matches!(r, Request::Discard(_))).count();
    assert!((100..=104).contains(&discards), "{discards}");
}

#[test]
fn an_error_of_the_disk_ends_the_run() {
    struct Broken;
    impl Disk for Broken {
        fn queue(&mut self, _: u16, _: Request) -> io::Result<()> {
            Ok(())
        }
        fn submit(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn reap(&mut self, _: &mut Vec<u16>) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
    let error = transfer(&mut Broken, Workload::READ_1, 1 << 20, 1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}
