// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The load every subject gets: a fixed number of 4 KiB requests in flight at random offsets, from one thread.

use std::io;
use std::time::{Duration, Instant};

use super::histogram::Histogram;
use crate::rig::Random;

/// Bytes of every request.
pub(super) const BLOCK: usize = 4096;
/// The deepest queue of any workload.
pub(super) const MAX_DEPTH: u16 = 128;
/// No completion for so long is a hang.
const HANG: Duration = Duration::from_secs(10);

/// What is done to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Workload {
    /// Writes instead of reads.
    pub(super) write: bool,
    /// Requests in flight.
    pub(super) depth: u16,
}

impl Workload {
    /// Those of the bench.
    pub(super) const ALL: [Workload; 4] = [
        Workload { write: false, depth: 1 },
        Workload::READ_32,
        Workload { write: true, depth: 32 },
        Workload { write: false, depth: MAX_DEPTH },
    ];
    /// The one the bench's verdict rests on.
    pub(super) const READ_32: Workload = Workload { write: false, depth: 32 };

    /// Its name in the report, for example `randread-4k-qd32-q1`.
    pub(super) fn name(self) -> String {
        let kind = if self.write { "randwrite" } else { "randread" };
        format!("{kind}-4k-qd{}-q1", self.depth)
    }
}

/// How long it runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    /// Before anything is counted.
    pub(super) warm_up: Duration,
    /// While it is counted.
    pub(super) measured: Duration,
}

/// Something that takes requests by slot number; a slot has a buffer of [`BLOCK`] bytes.
pub(super) trait Disk {
    /// Puts a request for the block at `offset` on the queue.
    fn queue(&mut self, slot: u16, write: bool, offset: u64) -> io::Result<()>;
    /// Sends what is queued.
    fn submit(&mut self) -> io::Result<()>;
    /// Appends the slots that have completed, after waiting for one if this disk is waited for; none means "look again".
    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()>;
}

/// What one run came to.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    /// Requests per second.
    pub(super) iops: f64,
    /// Latency at the median, in microseconds.
    pub(super) p50_us: f64,
    /// At 99 %.
    pub(super) p99_us: f64,
    /// At 99.9 %.
    pub(super) p999_us: f64,
    /// Requests counted.
    pub(super) requests: u64,
    /// Seconds counted.
    pub(super) seconds: f64,
    /// Times the client looked for completions and found none, per request: near 0, it was the bottleneck.
    pub(super) idle_looks: f64,
}

/// A running load, with everything it needs allocated.
struct Run<'a, D> {
    disk: &'a mut D,
    workload: Workload,
    blocks: u64,
    random: Random,
    started: Vec<Instant>,
    latencies: Histogram,
    idle_looks: u64,
    done: Vec<u16>,
}

/// Runs `workload` on a disk of `size` bytes; `mark` is called when counting begins and when it ends.
pub(super) fn run(
    disk: &mut impl Disk,
    workload: Workload,
    timing: Timing,
    size: u64,
    mut mark: impl FnMut() -> io::Result<()>,
) -> io::Result<Sample> {
    let depth = usize::from(workload.depth);
    let mut run = Run {
        disk,
        workload,
        blocks: size / BLOCK as u64,
        random: Random::new(size ^ u64::from(workload.depth)),
        started: vec![Instant::now(); depth],
        latencies: Histogram::default(),
        idle_looks: 0,
        done: Vec::with_capacity(depth),
    };
    run.done.extend(0..workload.depth);
    run.send(Instant::now())?;
    run.until(Instant::now() + timing.warm_up)?;
    mark()?;
    run.latencies.clear();
    run.idle_looks = 0;
    let start = Instant::now();
    run.until(start + timing.measured)?;
    let seconds = start.elapsed().as_secs_f64();
    let requests = run.latencies.total();
    mark()?;
    run.drain()?;
    Ok(Sample {
        iops: requests as f64 / seconds,
        p50_us: run.latencies.quantile_us(0.5),
        p99_us: run.latencies.quantile_us(0.99),
        p999_us: run.latencies.quantile_us(0.999),
        requests,
        seconds,
        idle_looks: run.idle_looks as f64 / requests.max(1) as f64,
    })
}

impl<D: Disk> Run<'_, D> {
    /// Gives every slot in `done` a new request, as one batch.
    fn send(&mut self, now: Instant) -> io::Result<()> {
        for slot in self.done.drain(..) {
            let offset = self.random.below(self.blocks) * BLOCK as u64;
            self.disk.queue(slot, self.workload.write, offset)?;
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
            if looks.is_multiple_of(1 << 20)
                && since.get_or_insert_with(Instant::now).elapsed() > HANG
            {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "requests are not answered"));
            }
        }
        let now = Instant::now();
        for slot in &self.done {
            if let Some(started) = self.started.get(usize::from(*slot)) {
                let nanos = now.saturating_duration_since(*started).as_nanos();
                self.latencies.record(u64::try_from(nanos).unwrap_or(u64::MAX));
            }
        }
        Ok(now)
    }

    fn until(&mut self, end: Instant) -> io::Result<()> {
        loop {
            let now = self.receive()?;
            self.send(now)?;
            if now >= end {
                return Ok(());
            }
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        let mut in_flight = usize::from(self.workload.depth);
        while in_flight > 0 {
            self.receive()?;
            in_flight -= self.done.drain(..).count();
        }
        Ok(())
    }
}
