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
fn two_disks_in_turn_get_the_same_and_never_at_the_same_time() {
    /// Asks, before anything is sent to the one, whether the other has answered everything.
    #[derive(Default)]
    struct Either<'a> {
        disk: Instantly,
        busy: Option<&'a std::cell::Cell<Option<usize>>>,
        me: usize,
    }
    impl Disk for Either<'_> {
        fn queue(&mut self, slot: u16, request: Request) -> io::Result<()> {
            let busy = self.busy.unwrap();
            assert!(busy.get().is_none_or(|who| who == self.me), "the other one is busy");
            busy.set(Some(self.me));
            self.disk.queue(slot, request)
        }
        fn submit(&mut self) -> io::Result<()> {
            self.disk.submit()
        }
        fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
            self.disk.reap(done)?;
            if self.disk.sent.is_empty() {
                self.busy.unwrap().set(None);
            }
            Ok(())
        }
    }
    let busy = std::cell::Cell::new(None);
    let disk = |me| Either { disk: Instantly::default(), busy: Some(&busy), me };
    let (mut one, mut other) = (disk(0), disk(1));
    let workload = Workload::random(Access::Read, 8, 1);
    let measured = Duration::from_millis(120);
    let timing = Timing { warm_up: Duration::from_millis(10), measured };
    let mut sent = Vec::new();
    let samples = run_in_turn([&mut one, &mut other], workload, timing, 1 << 30, || {
        assert!(busy.get().is_none(), "nothing is in flight");
        sent.push(());
        Ok(())
    })
    .unwrap();
    assert_eq!(sent.len(), 2);
    for (sample, disk) in samples.iter().zip([&one, &other]) {
        assert!(sample.seconds >= measured.as_secs_f64(), "{}", sample.seconds);
        // All that was asked for after the warm-up is counted, and a slice goes on where the one before it ended.
        let reads = disk.disk.requests.len() as u64;
        assert!(sample.requests() > 0 && sample.requests() < reads);
        let places: std::collections::HashSet<u64> = disk.disk.requests.iter().map(place).collect();
        assert!(places.len() as u64 > reads.min(1 << 17) / 2, "{} of {reads}", places.len());
    }
}

fn place(request: &Request) -> u64 {
    match request {
        Request::Read(at) | Request::Write(at) | Request::Discard(at) => *at,
        Request::Flush => 0,
    }
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
