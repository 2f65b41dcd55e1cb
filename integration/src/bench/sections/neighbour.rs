// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Somebody else on the same disk: how long their reads take while a guest writes.
//!
//! The guest writes at the same rate in all situations, half of what extentd can do there, and flushes once a second: what
//! differs is how the writes get to the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::Serialize;

use crate::bench::ground::{Ground, fill};
use crate::bench::guest::{Guest, Wait};
use crate::bench::histogram::Histogram;
use crate::bench::interrupt;
use crate::bench::load::{self, Disk, Timing};
use crate::bench::measure::Trial;
use crate::bench::native::Native;
use crate::bench::report::distribution;
use crate::bench::stats::median;
use crate::bench::subject::Subject;
use crate::bench::workload::{Request, Source, Workload};
use crate::rig::{Backing, LoopDisk, Random};

/// Bytes of the neighbour's file.
const SIZE: u64 = 256 << 20;
const BLOCK: usize = 4096;
/// The neighbour's reads per second.
const READS: u32 = 500;
/// The guest's writes come in as many portions a second.
const PORTIONS: u32 = 1000;
const FLUSHES: Duration = Duration::from_secs(1);
const WRITES: Workload = Workload::WRITE_32;

/// What goes on beside the neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum Situation {
    /// Nothing.
    Alone,
    /// A guest writes through extentd.
    Extentd,
    /// The same writes go to the kernel's loop device on the same image, as it is by default: through the page cache.
    KernelLoop,
}

impl Situation {
    const ALL: [Situation; 3] = [Situation::Alone, Situation::Extentd, Situation::KernelLoop];

    /// Its name in the report.
    pub(in crate::bench) fn name(self) -> &'static str {
        match self {
            Situation::Alone => "alone",
            Situation::Extentd => "extentd-direct",
            Situation::KernelLoop => "kernel-loop-buffered",
        }
    }
}

/// The neighbour's latencies in one situation; medians over the rounds.
#[derive(Debug, Clone, Serialize)]
pub(in crate::bench) struct NeighbourRow {
    /// What went on beside it.
    pub(in crate::bench) beside: &'static str,
    /// The guest's writes per second, wanted.
    pub(in crate::bench) writes_per_s_wanted: f64,
    /// The same, done.
    pub(in crate::bench) writes_per_s: f64,
    /// The neighbour's reads.
    pub(in crate::bench) reads: u64,
    /// Median latency in microseconds.
    pub(in crate::bench) p50_us: f64,
    /// 99 % latency.
    pub(in crate::bench) p99_us: f64,
    /// 99.9 % latency.
    pub(in crate::bench) p999_us: f64,
    /// 99 % latency in each round.
    pub(in crate::bench) p99_rounds: Vec<f64>,
    /// Latencies at the report's `quantiles`, all rounds together.
    pub(in crate::bench) latency_us: Vec<f64>,
}

/// One round in one situation.
#[derive(Debug, Clone)]
struct Seen {
    reads: Histogram,
    writes_per_s: f64,
}

impl NeighbourRow {
    fn new(situation: Situation, wanted: f64, rounds: &[Seen]) -> NeighbourRow {
        let of = |value: &dyn Fn(&Seen) -> f64| -> Vec<f64> { rounds.iter().map(value).collect() };
        let quantile = |quantile: f64| of(&|seen: &Seen| seen.reads.quantile_us(quantile));
        let mut all = Histogram::default();
        rounds.iter().for_each(|seen| all.merge(&seen.reads));
        NeighbourRow {
            beside: situation.name(),
            writes_per_s_wanted: if situation == Situation::Alone { 0.0 } else { wanted },
            writes_per_s: median(&of(&|seen| seen.writes_per_s)),
            reads: all.total(),
            p50_us: median(&quantile(0.5)),
            p99_us: median(&quantile(0.99)),
            p999_us: median(&quantile(0.999)),
            p99_rounds: quantile(0.99),
            latency_us: distribution(&all),
        }
    }
}

/// Measures all situations in turn, `rounds` times for `time` each.
pub(in crate::bench) fn neighbour(
    ground: &Ground,
    rounds: usize,
    time: Duration,
) -> io::Result<Vec<NeighbourRow>> {
    let file = ground.filesystem().path().join("neighbour");
    fill(&file, true, SIZE)?;
    let rate = capacity(ground)? / 2.0;
    let mut seen = Situation::ALL.map(|situation| (situation, Vec::new()));
    for _ in 0..rounds {
        seen.reverse();
        for (situation, seen) in &mut seen {
            interrupt::check()?;
            seen.push(beside(ground, *situation, rate, time, &file)?);
        }
    }
    std::fs::remove_file(&file)?;
    if rounds % 2 == 1 {
        seen.reverse();
    }
    Ok(seen.iter().map(|(situation, seen)| NeighbourRow::new(*situation, rate, seen)).collect())
}

/// What a guest can write a second through extentd.
fn capacity(ground: &Ground) -> io::Result<f64> {
    let time = Duration::from_secs(1);
    let timing = Timing { warm_up: time / 5, measured: time };
    let outcome = ground.measure_on(&Trial {
        subject: Subject::ExtentdDirect,
        image: ground.image(),
        workload: WRITES,
        timing,
        wait: Wait::Event,
    })?;
    Ok(outcome.sample.iops())
}

fn beside(
    ground: &Ground,
    situation: Situation,
    rate: f64,
    time: Duration,
    file: &Path,
) -> io::Result<Seen> {
    let image = ground.image();
    match situation {
        Situation::Alone => {
            let stop = AtomicBool::new(false);
            let reads = with_reader(file, &stop, || {
                thread::sleep(time);
                Ok(0.0)
            })?;
            Ok(reads)
        }
        Situation::Extentd => {
            let server = ground.start(Subject::ExtentdDirect, &image.path, 1)?;
            let mut server = server.ok_or_else(|| io::Error::other("extentd is a server"))?;
            let stop = AtomicBool::new(false);
            let seen = with_reader(file, &stop, || {
                let guest = Guest::connect(server.socket(), WRITES, Wait::Event)?;
                steadily(guest, rate, time, image.size)
            })?;
            server.sigterm()?;
            Ok(seen)
        }
        Situation::KernelLoop => {
            let disk = LoopDisk::attach(image.size, 512, &Backing::Buffered(image.path.clone()))?;
            let stop = AtomicBool::new(false);
            let seen = with_reader(file, &stop, || {
                let native = Native::open(disk.path(), WRITES, Wait::Event)?;
                steadily(native, rate, time, image.size)
            })?;
            drop(disk);
            // What it has left in the page cache is not the next one's.
            crate::rig::outside::settle(&image.path)?;
            Ok(seen)
        }
    }
}

/// Runs `writer`, which says how many writes a second it did, while the neighbour reads.
fn with_reader(
    file: &Path,
    stop: &AtomicBool,
    writer: impl FnOnce() -> io::Result<f64>,
) -> io::Result<Seen> {
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(file, stop));
        let written = writer();
        stop.store(true, Ordering::Relaxed);
        let reads =
            reader.join().unwrap_or_else(|_| Err(io::Error::other("the neighbour panicked")));
        Ok(Seen { reads: reads?, writes_per_s: written? })
    })
}

/// Reads at its pace until `stop`. A read that should have begun while the last one was still under way counts from then.
fn read(path: &Path, stop: &AtomicBool) -> io::Result<Histogram> {
    let direct = OFlags::DIRECT.bits().cast_signed();
    let file: File = OpenOptions::new().read(true).custom_flags(direct).open(path)?;
    let mut memory = vec![0_u8; 2 * BLOCK];
    let start = memory.as_ptr().align_offset(BLOCK);
    let buffer = memory.get_mut(start..start + BLOCK).ok_or(io::ErrorKind::InvalidInput)?;
    let mut latencies = Histogram::default();
    let mut random = Random::new(5);
    let mut due = Instant::now();
    let mut ended = due;
    while !stop.load(Ordering::Relaxed) {
        due += Duration::from_secs(1) / READS;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let begun = if ended > due { due } else { Instant::now() };
        let block = random.below(SIZE / BLOCK as u64);
        file.read_exact_at(buffer, block * BLOCK as u64)?;
        ended = Instant::now();
        let nanos = ended.saturating_duration_since(begun).as_nanos();
        latencies.record(u64::try_from(nanos).unwrap_or(u64::MAX));
    }
    Ok(latencies)
}

/// Writes at `rate`, in portions of at most the workload's depth, and flushes now and then; the rate that came of it.
fn steadily(mut disk: impl Disk, rate: f64, time: Duration, size: u64) -> io::Result<f64> {
    let mut source = Source::new(WRITES, size);
    let start = Instant::now();
    let mut flushed = start;
    let mut written = 0_u32;
    let mut done = Vec::new();
    while start.elapsed() < time {
        interrupt::check()?;
        let owed = (start.elapsed().as_secs_f64() * rate - f64::from(written)).max(0.0);
        let portion = (0..WRITES.depth).take_while(|slot| f64::from(*slot) < owed.floor());
        let mut waiting = 0;
        for slot in portion {
            disk.queue(slot, source.next(slot))?;
            waiting += 1;
            written += 1;
        }
        if flushed.elapsed() >= FLUSHES && waiting < usize::from(WRITES.depth) {
            disk.queue(WRITES.depth - 1, Request::Flush)?;
            waiting += 1;
            flushed = Instant::now();
        }
        load::wait_for(&mut disk, waiting, &mut done)?;
        if owed < f64::from(WRITES.depth) {
            thread::sleep(Duration::from_secs(1) / PORTIONS);
        }
    }
    Ok(f64::from(written) / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_neighbours_figures_are_of_its_rounds() {
        let seen = |micros: u64, writes_per_s| {
            let mut reads = Histogram::default();
            (0..100).for_each(|_| reads.record(micros * 1000));
            Seen { reads, writes_per_s }
        };
        let rounds = [seen(100, 10.0), seen(300, 30.0), seen(200, 20.0)];
        let row = NeighbourRow::new(Situation::KernelLoop, 25.0, &rounds);
        assert_eq!((row.reads, row.writes_per_s, row.writes_per_s_wanted), (300, 20.0, 25.0));
        assert!((row.p99_us / 200.0 - 1.0).abs() < 0.02 && row.p99_rounds.len() == 3);
        assert!((row.latency_us.last().unwrap() / 300.0 - 1.0).abs() < 0.02);
        assert_eq!(NeighbourRow::new(Situation::Alone, 25.0, &rounds).writes_per_s_wanted, 0.0);
    }

    #[test]
    fn the_neighbour_reads_at_least_once_and_stops() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("file");
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let stop = AtomicBool::new(false);
        let seen = with_reader(&path, &stop, || {
            thread::sleep(Duration::from_millis(50));
            Ok(7.0)
        })
        .unwrap();
        assert!(seen.reads.total() > 0 && seen.writes_per_s == 7.0);
    }
}
