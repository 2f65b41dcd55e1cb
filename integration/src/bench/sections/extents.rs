// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What it costs that an image is in pieces.

use std::fs::{File, OpenOptions};
use std::io;

use rustix::fs::{FallocateFlags, fallocate, syncfs};
use rustix::io::Errno;
use serde::Serialize;

use crate::bench::ground::{Ground, Image, fill};
use crate::bench::guest::{Guest, Wait};
use crate::bench::interrupt;
use crate::bench::load::{self, Sample, Timing};
use crate::bench::measure::on_client_thread;
use crate::bench::report::distribution;
use crate::bench::stats::{Spread, median};
use crate::bench::subject::Subject;
use crate::bench::usage::{Memory, available_bytes, cpu_ns};
use crate::bench::workload::{Order, Workload};
use crate::rig::image::extents as count;
use crate::rig::{Backing, Daemon, Filesystem, Kind};

/// An image in pieces is so much larger than the ground's image: 4 GiB, which are 2^20 blocks, where that has 1 GiB.
const TIMES: u64 = 4;
/// Memory that stays free for others.
const SPARE: u64 = 2 << 30;
const BLOCK: u64 = 4096;

/// Random reads of an image in so many pieces, beside those of an image in as few as can be.
#[derive(Debug, Clone, Serialize)]
pub(in crate::bench) struct ExtentsRow {
    /// Extents of the image, as the filesystem counts them.
    pub(in crate::bench) extents: u64,
    /// Requests per second.
    pub(in crate::bench) iops: f64,
    /// 99 % latency in microseconds.
    pub(in crate::bench) p99_us: f64,
    /// Latencies at the report's `quantiles`.
    pub(in crate::bench) latency_us: Vec<f64>,
    /// Server CPU per request in microseconds.
    pub(in crate::bench) server_cpu_us_per_io: f64,
    /// The server's largest resident set.
    pub(in crate::bench) peak_rss_kib: u64,
    /// Requests per second in each round.
    pub(in crate::bench) rounds: Vec<f64>,
    /// Requests per second over those of the image in one piece, in the same rounds.
    pub(in crate::bench) ratio: Option<Spread>,
}

/// What one run of one image came to.
#[derive(Debug, Clone, Default)]
struct Outcome {
    sample: Sample,
    /// Server CPU time per request.
    cpu_us_per_io: f64,
    peak_rss_kib: u64,
}

impl Outcome {
    /// Ends the server.
    fn new(sample: Sample, cpu_ns: u64, server: &mut Daemon) -> io::Result<Outcome> {
        let cpu_us_per_io = cpu_ns as f64 / 1000.0 / sample.requests().max(1) as f64;
        let peak_rss_kib = Memory::of(server.pid())?.peak;
        server.sigterm()?;
        Ok(Outcome { sample, cpu_us_per_io, peak_rss_kib })
    }
}

impl ExtentsRow {
    /// Sums up the rounds of an image in `extents` pieces and of the image in one, taken in turn.
    fn new(extents: u64, own: &[Outcome], one: &[Outcome]) -> ExtentsRow {
        let iops = |outcomes: &[Outcome]| -> Vec<f64> {
            outcomes.iter().map(|o| o.sample.iops()).collect()
        };
        let of = |value: fn(&Outcome) -> f64| median(&own.iter().map(value).collect::<Vec<f64>>());
        let mut latencies = crate::bench::histogram::Histogram::default();
        own.iter().for_each(|outcome| latencies.merge(&outcome.sample.latencies));
        ExtentsRow {
            extents,
            iops: of(|o| o.sample.iops()),
            p99_us: of(|o| o.sample.latencies.quantile_us(0.99)),
            latency_us: distribution(&latencies),
            server_cpu_us_per_io: of(|o| o.cpu_us_per_io),
            peak_rss_kib: own.iter().map(|o| o.peak_rss_kib).max().unwrap_or(0),
            rounds: iops(own),
            ratio: Spread::of_ratios(&iops(own), &iops(one)),
        }
    }
}

/// Measures extentd on images in pieces of so many bytes, each beside one of the same size on the same filesystem that is in as few
/// as that gives it: so that the pieces are all the difference, and not how much memory the disk is spread over or what of
/// its metadata waits to be written.
///
/// What the pieces cost is a few hundredths, and far less than what the machine differs by from one second to the next. So both are used in
/// slices of less than that, and each round has servers of its own all the same.
pub(in crate::bench) fn extents(
    ground: &Ground,
    pieces: &[u64],
    rounds: usize,
    timing: Timing,
    wait: Wait,
) -> io::Result<Vec<ExtentsRow>> {
    let mut rows = Vec::new();
    let (mut few, mut ones) = (0, Vec::new());
    for piece in pieces {
        // With less memory it gets fewer pieces of the same size.
        let size = affordable(TIMES * ground.image().size, available_bytes());
        let directory = ground.rig().dir(&format!("pieces-{piece}"))?;
        // A third one while they are made, and some for the filesystem.
        let disk = 3 * size + size / 4 + (1 << 30);
        let fs = Filesystem::make(Kind::Ext4, disk, 512, &Backing::Memory, &directory)?;
        let image = Image { path: fs.path().join("image"), size };
        make(&image, *piece)?;
        let whole = Image { path: fs.path().join("whole"), size };
        fill(&whole.path, true, size)?;
        fs.sync()?;
        let (mut many, mut one) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            interrupt::check()?;
            let (of_many, of_one) = if round % 2 == 0 {
                measure(ground, [&image, &whole], timing, wait)?.into()
            } else {
                let [of_one, of_many] = measure(ground, [&whole, &image], timing, wait)?;
                (of_many, of_one)
            };
            many.push(of_many);
            one.push(of_one);
        }
        rows.push(ExtentsRow::new(count(&image.path)?, &many, &one));
        few = count(&whole.path)?;
        ones.extend(one);
    }
    rows.insert(0, ExtentsRow::new(few, &ones, &ones));
    Ok(rows)
}

/// A round: a server for each of the two images, used in turn.
fn measure(
    ground: &Ground,
    images: [&Image; 2],
    timing: Timing,
    wait: Wait,
) -> io::Result<[Outcome; 2]> {
    let start = |image: &Image, name: &str| {
        let directory = ground.sockets().join(name);
        std::fs::create_dir_all(&directory)?;
        let server = ground.start_in(Subject::ExtentdDirect, &image.path, 1, &directory)?;
        server.ok_or_else(|| io::Error::other("extentd is a server"))
    };
    let [one, other] = images;
    let [mut first, mut second] = [start(one, "first")?, start(other, "second")?];
    // Both are read at as many different places, so that the processor's caches do not make the difference.
    let stride = (one.size / ground.image().size).max(1) * BLOCK;
    let stride = u32::try_from(stride).map_err(io::Error::other)?;
    let workload = Workload { stride, ..Workload::READ_32 };
    // All the places there are, lest the map is still being asked for while it is measured.
    let sweep = Workload { order: Order::Sequential, ..workload };
    let mut used = Vec::new();
    let [of_first, of_second] = on_client_thread(|| {
        let connect = |server: &Daemon| {
            let mut guest = Guest::connect(server.socket(), workload, wait)?;
            load::transfer(&mut guest, sweep, one.size, one.size / u64::from(stride))?;
            Ok::<_, io::Error>(guest)
        };
        let (mut one_guest, mut other_guest) = (connect(&first)?, connect(&second)?);
        let guests = [&mut one_guest, &mut other_guest];
        load::run_in_turn(guests, workload, timing, one.size, || {
            used.push((cpu_ns(first.pid())?, cpu_ns(second.pid())?));
            Ok(())
        })
    })?;
    let (cpu_of_first, cpu_of_second) = match used.as_slice() {
        [start, end] => (end.0.saturating_sub(start.0), end.1.saturating_sub(start.1)),
        _ => (0, 0),
    };
    Ok([
        Outcome::new(of_first, cpu_of_first, &mut first)?,
        Outcome::new(of_second, cpu_of_second, &mut second)?,
    ])
}

/// The size of an image, halved until there is memory for two.
fn affordable(size: u64, available: u64) -> u64 {
    let mut size = size;
    while size > BLOCK << 10 && 2 * size + SPARE > available {
        size /= 2;
    }
    size
}

/// A written image in pieces of `piece` bytes, which lie next to each other: as on an old disk that is full. Left a piece of the disk
/// between every two of them it would be spread over twice as much disk as the image in one, and what the disk itself is slower
/// by then, a twentieth in memory, would be taken for the pieces' cost.
///
/// Another file gets every other piece until there is a little more than half of the image; a third takes all space that is
/// left; the other is removed; and the rest of the image finds nothing but the holes it leaves.
fn make(image: &Image, piece: u64) -> io::Result<()> {
    let create = |name: &str| {
        let path = image.path.with_extension(name);
        Ok::<_, io::Error>((OpenOptions::new().write(true).create_new(true).open(&path)?, path))
    };
    let file = OpenOptions::new().write(true).create_new(true).open(&image.path)?;
    let (other, other_path) = create("other")?;
    let (filler, filler_path) = create("filler")?;
    let take = |file: &File, offset, len| fallocate(file, FallocateFlags::empty(), offset, len);
    // What is more than half is for the filesystem's own blocks.
    let in_turn = (image.size / 2 + image.size / 64).next_multiple_of(piece).min(image.size);
    for offset in (0..in_turn).step_by(usize::try_from(piece).map_err(io::Error::other)?) {
        take(&file, offset, piece)?;
        take(&other, offset, piece)?;
        if offset.is_multiple_of(1 << 26) {
            interrupt::check()?;
        }
    }
    let (mut taken, mut want) = (0, 1 << 30);
    while want >= BLOCK {
        match take(&filler, taken, want) {
            Ok(()) => taken += want,
            Err(Errno::NOSPC) => want /= 2,
            Err(error) => return Err(error.into()),
        }
    }
    std::fs::remove_file(other_path)?;
    drop(other);
    // Its space is free when the journal says so.
    syncfs(&file)?;
    if in_turn < image.size {
        take(&file, in_turn, image.size - in_turn)?;
    }
    std::fs::remove_file(filler_path)?;
    drop((file, filler));
    fill(&image.path, false, image.size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::load::Sample;
    use crate::rig::Rig;

    #[test]
    fn an_image_has_as_many_pieces_as_were_asked_for() {
        let Some(rig) = Rig::enter() else { return };
        let directory = rig.dir("fs").unwrap();
        let fs = Filesystem::make(Kind::Ext4, 64 << 20, 512, &Backing::Memory, &directory).unwrap();
        let image = Image { path: fs.path().join("image"), size: 8 << 20 };
        make(&image, 4096).unwrap();
        let found = count(&image.path).unwrap();
        // The filesystem's own blocks are in the way here and there.
        assert!((2000..=2100).contains(&found), "{found}");
        assert_eq!(crate::rig::outside::allocated(&image.path).unwrap() >> 20, 8);
    }

    #[test]
    fn the_image_shrinks_with_the_memory() {
        assert_eq!(affordable(4 << 30, 100 << 30), 4 << 30);
        assert_eq!(affordable(4 << 30, 9 << 30), 2 << 30);
        assert_eq!(affordable(4 << 30, 0), 4 << 20);
    }

    #[test]
    fn the_ratio_is_of_rounds() {
        let outcome = |requests: u64| {
            let mut sample = Sample { seconds: 1.0, ..Sample::default() };
            (0..requests).for_each(|_| sample.latencies.record(1000));
            Outcome { sample, peak_rss_kib: 7, cpu_us_per_io: 1.0 }
        };
        let row = ExtentsRow::new(
            9,
            &[outcome(90), outcome(190), outcome(50)],
            &[outcome(100), outcome(200), outcome(50)],
        );
        assert_eq!((row.extents, row.iops, row.peak_rss_kib), (9, 90.0, 7));
        assert_eq!(row.ratio.map(|r| (r.low, r.median, r.high)), Some((0.9, 0.95, 1.0)));
    }
}
