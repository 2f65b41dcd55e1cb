// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The load every subject gets: a fixed number of requests in flight, all from one thread, whatever the number of queues.

use std::io;
use std::time::{Duration, Instant};

use super::histogram::Histogram;
use super::interrupt;
use super::workload::{Request, Source, Workload};

/// No completion for so long is a hang.
const HANG: Duration = Duration::from_secs(10);
/// Looks in vain before the clock is looked at.
const LOOKS: u64 = 1 << 20;
/// How long one of two disks is used before it is the other one's turn.
const SLICE: Duration = Duration::from_millis(50);

/// How long it runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    /// Before anything is counted.
    pub(super) warm_up: Duration,
    /// While it is counted.
    pub(super) measured: Duration,
}

/// Something that takes requests by slot number; a slot has a buffer of one block.
pub(super) trait Disk {
    /// Puts a request on the queue.
    fn queue(&mut self, slot: u16, request: Request) -> io::Result<()>;
    /// Sends what is queued.
    fn submit(&mut self) -> io::Result<()>;
    /// Appends the slots that have completed, after waiting for one if this disk is waited for; none means "look again".
    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()>;
}

/// What one run came to.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    /// Latencies of the requests counted.
    pub(super) latencies: Histogram,
    /// Latencies of the flushes among them.
    pub(super) flushes: Histogram,
    /// Seconds counted.
    pub(super) seconds: f64,
    /// Times the client looked for completions and found none, per request: near 0, it was the bottleneck.
    pub(super) idle_looks: f64,
}

impl Sample {
    /// Requests counted.
    pub(super) fn requests(&self) -> u64 {
        self.latencies.total()
    }

    /// Requests per second.
    pub(super) fn iops(&self) -> f64 {
        if self.seconds > 0.0 { self.requests() as f64 / self.seconds } else { 0.0 }
    }
}

/// A running load, with everything it needs allocated.
struct Run<'a, D> {
    disk: &'a mut D,
    source: Source,
    started: Vec<Instant>,
    latencies: Histogram,
    flushes: Histogram,
    idle_looks: u64,
    in_flight: usize,
    done: Vec<u16>,
}

/// Runs `workload` on a disk of `size` bytes; `mark` is called when counting begins and when it ends, the first time with
/// nothing in flight.
pub(super) fn run(
    disk: &mut impl Disk,
    workload: Workload,
    timing: Timing,
    size: u64,
    mut mark: impl FnMut() -> io::Result<()>,
) -> io::Result<Sample> {
    let mut run = Run::new(disk, workload, size);
    let end = Instant::now() + timing.warm_up;
    run.until(workload, |_, now| now >= end)?;
    run.drain()?;
    mark()?;
    run.forget();
    let start = Instant::now();
    let end = start + timing.measured;
    run.until(workload, |_, now| now >= end)?;
    let sample = run.sample(start.elapsed());
    mark()?;
    run.drain()?;
    Ok(sample)
}

/// Runs `workload` on two disks of `size` bytes, a slice of time on the one and a slice on the other: what else happens on the machine
/// for longer than that happens to both. Each gets as much time as [`run`] would give it. `mark` is called when counting
/// begins and when it ends, with nothing in flight.
pub(super) fn run_in_turn<D: Disk>(
    disks: [&mut D; 2],
    workload: Workload,
    timing: Timing,
    size: u64,
    mut mark: impl FnMut() -> io::Result<()>,
) -> io::Result<[Sample; 2]> {
    let mut runs = disks.map(|disk| Run::new(disk, workload, size));
    for run in &mut runs {
        run.slice(workload, timing.warm_up)?;
        run.forget();
    }
    mark()?;
    let turns = timing.measured.as_nanos().div_ceil(SLICE.as_nanos()).max(1);
    let turns = u32::try_from(turns).unwrap_or(u32::MAX);
    let slice = timing.measured / turns;
    let mut used = [Duration::ZERO; 2];
    for turn in 0..turns as usize {
        for half in 0..2 {
            // A B B A: what goes on getting slower gets slower for both.
            let index = (turn + half) % 2;
            if let (Some(run), Some(used)) = (runs.get_mut(index), used.get_mut(index)) {
                *used += run.slice(workload, slice)?;
            }
        }
    }
    mark()?;
    let [one, other] = runs;
    let [of_one, of_other] = used;
    Ok([one.sample(of_one), other.sample(of_other)])
}

/// Runs `workload` until `requests` of its requests have ended.
pub(super) fn transfer(
    disk: &mut impl Disk,
    workload: Workload,
    size: u64,
    requests: u64,
) -> io::Result<()> {
    let mut run = Run::new(disk, workload, size);
    run.until(workload, |run, _| run.latencies.total() >= requests)?;
    run.drain()
}

/// Sends what is queued and waits until `waiting` requests have completed.
pub(super) fn wait_for(
    disk: &mut impl Disk,
    waiting: usize,
    done: &mut Vec<u16>,
) -> io::Result<()> {
    disk.submit()?;
    let mut ended = 0;
    while ended < waiting {
        disk.reap(done)?;
        ended += done.drain(..).count();
    }
    Ok(())
}

impl<'a, D: Disk> Run<'a, D> {
    fn new(disk: &'a mut D, workload: Workload, size: u64) -> Run<'a, D> {
        let slots = usize::from(workload.slots());
        Run {
            disk,
            source: Source::new(workload, size),
            started: vec![Instant::now(); slots],
            latencies: Histogram::default(),
            flushes: Histogram::default(),
            idle_looks: 0,
            in_flight: 0,
            done: Vec::with_capacity(slots),
        }
    }

    /// Gives every slot in `done` a new request, as one batch.
    fn send(&mut self, now: Instant) -> io::Result<()> {
        for slot in self.done.drain(..) {
            self.disk.queue(slot, self.source.next(slot))?;
            self.in_flight += 1;
            if let Some(started) = self.started.get_mut(usize::from(slot)) {
                *started = now;
            }
        }
        self.disk.submit()
    }

    /// Waits for completions and counts them; the time they were seen at.
    fn receive(&mut self) -> io::Result<Instant> {
        let mut looks = 0_u64;
        let mut since = None;
        loop {
            self.disk.reap(&mut self.done)?;
            if !self.done.is_empty() {
                break;
            }
            self.idle_looks += 1;
            looks += 1;
            std::hint::spin_loop();
            if looks.is_multiple_of(LOOKS) {
                // The signal may have ended the server as well.
                interrupt::check()?;
                if since.get_or_insert_with(Instant::now).elapsed() > HANG {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "requests are not answered",
                    ));
                }
            }
        }
        let now = Instant::now();
        self.in_flight = self.in_flight.saturating_sub(self.done.len());
        for slot in &self.done {
            let Some(started) = self.started.get(usize::from(*slot)) else { continue };
            let nanos = now.saturating_duration_since(*started).as_nanos();
            let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
            let request = self.source.doing(*slot);
            if request == Request::Flush {
                self.flushes.record(nanos);
            } else if self.source.counts(request) {
                self.latencies.record(nanos);
            }
        }
        Ok(now)
    }

    /// From nothing in flight to everything, until `end`.
    fn until(
        &mut self,
        workload: Workload,
        mut end: impl FnMut(&Self, Instant) -> bool,
    ) -> io::Result<()> {
        self.done.extend(0..workload.slots());
        self.send(Instant::now())?;
        loop {
            let now = self.receive()?;
            if end(self, now) || interrupt::asked() {
                self.done.clear();
                return interrupt::check();
            }
            self.send(now)?;
        }
    }

    /// From nothing in flight to everything and, after this time, to nothing; how long that was.
    fn slice(&mut self, workload: Workload, time: Duration) -> io::Result<Duration> {
        let start = Instant::now();
        self.until(workload, |_, now| now.saturating_duration_since(start) >= time)?;
        self.drain()?;
        Ok(start.elapsed())
    }

    /// Nothing has been counted yet.
    fn forget(&mut self) {
        self.latencies.clear();
        self.flushes.clear();
        self.idle_looks = 0;
    }

    /// What has been counted, in this time.
    fn sample(&self, time: Duration) -> Sample {
        Sample {
            latencies: self.latencies.clone(),
            flushes: self.flushes.clone(),
            seconds: time.as_secs_f64(),
            idle_looks: self.idle_looks as f64 / self.latencies.total().max(1) as f64,
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        while self.in_flight > 0 {
            self.receive()?;
            self.done.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod load_tests;
