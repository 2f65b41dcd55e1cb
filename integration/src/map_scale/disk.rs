// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A scattered image on a real filesystem: what starting, loading and reading cost.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use extentd::sys::fiemap::{Fiemap, MAX_EXTENTS};
use rustix::fs::{FallocateFlags, OFlags, fallocate};
use serde::Serialize;

use super::median;
use crate::rig::{
    Backing, Client, ClientOptions, Daemon, Filesystem, Kind, Random, Request, Rig, Shape,
};

pub(super) const BLOCK: u64 = 4096;
const TIMES: usize = 5;
/// Reads of the runs that compare a scattered with a plain image.
const READS: u64 = 200_000;
const LARGE: usize = 128 << 10;

/// The disk, and what starts on it.
pub(super) struct Bed {
    program: PathBuf,
    blocks: u64,
    run: PathBuf,
    filesystem: Filesystem,
    _rig: Rig,
}

/// What was measured; times in ms unless the name says otherwise.
#[derive(Debug, Default, Serialize)]
pub(super) struct Figures {
    extents: u64,
    start_1_mib_ms: f64,
    start_1_tib_sparse_ms: f64,
    start_scattered_ms: f64,
    first_read_scattered_ms: f64,
    start_populate_all_ms: Option<f64>,
    cached_by_populate_all: u64,
    rss_populate_all_kib: u64,
    fiemap_all_ms: f64,
    fiemap_ns_per_extent: f64,
    sequential_read_s: f64,
    sequential_read_fiemap_calls: u64,
    random_reads: u64,
    random_read_cold_s: f64,
    random_read_fiemap_calls: u64,
    random_read_warm_s: f64,
    warm_cpu_us_per_read: f64,
    plain_cpu_us_per_read: f64,
    plain_read_s: f64,
}

impl Figures {
    /// Names and values.
    pub(super) fn rows(&self) -> Vec<(String, String)> {
        let ms = |value: f64| format!("{value:.1} ms");
        let s = |value: f64| format!("{value:.2} s");
        let reads = self.random_reads;
        let all = self.start_populate_all_ms.map_or("not to be had".to_owned(), ms);
        [
            ("extents of the scattered image", self.extents.to_string()),
            ("start, 1 MiB image", ms(self.start_1_mib_ms)),
            ("start, 1 TiB sparse image", ms(self.start_1_tib_sparse_ms)),
            ("start, scattered image, lazy", ms(self.start_scattered_ms)),
            ("start to first read, scattered image, lazy", ms(self.first_read_scattered_ms)),
            ("start, scattered image, --populate=all", all),
            ("extents cached by it", self.cached_by_populate_all.to_string()),
            ("resident memory after it", format!("{} KiB", self.rss_populate_all_kib)),
            ("FIEMAP over all of it", ms(self.fiemap_all_ms)),
            ("FIEMAP per extent", format!("{:.0} ns", self.fiemap_ns_per_extent)),
            ("reading all of it, 128 KiB at a time", s(self.sequential_read_s)),
            ("FIEMAP calls for that", self.sequential_read_fiemap_calls.to_string()),
            (&*format!("{reads} random 4 KiB reads, nothing cached"), s(self.random_read_cold_s)),
            ("FIEMAP calls for that", self.random_read_fiemap_calls.to_string()),
            ("the same, everything cached", s(self.random_read_warm_s)),
            ("the same, image of one extent", s(self.plain_read_s)),
            (
                "server CPU per read, everything cached",
                format!("{:.2} us", self.warm_cpu_us_per_read),
            ),
            (
                "server CPU per read, image of one extent",
                format!("{:.2} us", self.plain_cpu_us_per_read),
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }
}

impl Bed {
    /// Makes the disk and a scattered image of `blocks` blocks.
    pub(super) fn make(program: PathBuf, blocks: u64) -> io::Result<Bed> {
        let rig = Rig::enter()
            .ok_or_else(|| io::Error::other("run it as root: it needs loop devices"))?;
        // Room for the scattered image, half of it written, a plain one of that half, and the ones that are filled.
        let size = blocks * BLOCK * 2 + (2 << 30);
        let mount = rig.dir("fs")?;
        let filesystem = Filesystem::make(Kind::Ext4, size, 512, &Backing::Memory, &mount)?;
        let bed = Bed { program, blocks, run: rig.dir("run")?, filesystem, _rig: rig };
        scatter(&bed.scattered(), blocks)?;
        Ok(bed)
    }

    fn scattered(&self) -> PathBuf {
        self.path("scattered")
    }

    /// A file on the disk.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.filesystem.path().join(name)
    }

    /// Starts an extentd on `image`, in whatever mode.
    pub(super) fn start_any(&self, image: &Path, options: &[&str]) -> io::Result<Daemon> {
        Daemon::start(&self.program, &self.run, image, options)
    }

    /// Starts an extentd on `image`, in direct mode.
    fn start(&self, image: &Path, options: &[&str]) -> io::Result<Daemon> {
        let daemon = self.start_any(image, options)?;
        let status = daemon.status()?;
        if !status.direct() {
            return Err(io::Error::other(format!("not in direct mode: {}", status.reason())));
        }
        Ok(daemon)
    }

    /// Milliseconds until the socket is there, the median of some starts.
    fn start_ms(&self, image: &Path, options: &[&str]) -> io::Result<f64> {
        let mut times = Vec::new();
        for _ in 0..TIMES {
            let start = Instant::now();
            let mut daemon = self.start_any(image, options)?;
            times.push(milliseconds(start));
            daemon.sigterm()?;
        }
        Ok(median(times))
    }

    /// Everything on the scattered image, and the same on a plain one where there is something to compare.
    pub(super) fn measure(&self) -> io::Result<Figures> {
        let mut figures = Figures { random_reads: READS, ..Figures::default() };
        let (small, large, plain) = (self.path("small"), self.path("large"), self.path("plain"));
        File::create_new(&small)?.set_len(1 << 20)?;
        File::create_new(&large)?.set_len(1 << 40)?;
        write_plain(&plain, self.blocks / 2)?;
        self.start_ms(&small, &[])?;
        figures.start_1_mib_ms = self.start_ms(&small, &[])?;
        figures.start_1_tib_sparse_ms = self.start_ms(&large, &[])?;
        std::fs::remove_file(large)?;
        let scattered = self.scattered();
        figures.start_scattered_ms = self.start_ms(&scattered, &[])?;
        (figures.extents, figures.fiemap_all_ms) = fiemap_all(&scattered, self.blocks)?;
        figures.fiemap_ns_per_extent = ratio(figures.fiemap_all_ms * 1e6, figures.extents);
        self.first_read(&mut figures)?;
        self.populate_all(&mut figures)?;
        self.sequential(&mut figures)?;
        self.random(&mut figures)?;
        self.plain(&plain, &mut figures)?;
        std::fs::remove_file(plain)?;
        Ok(figures)
    }

    fn first_read(&self, figures: &mut Figures) -> io::Result<()> {
        let mut times = Vec::new();
        for _ in 0..TIMES {
            let start = Instant::now();
            let mut daemon = self.start(&self.scattered(), &[])?;
            let mut client = connect(&daemon)?;
            client.read_at(self.blocks / 4 * 2 * BLOCK, 4096)?;
            times.push(milliseconds(start));
            drop(client);
            daemon.sigterm()?;
        }
        figures.first_read_scattered_ms = median(times);
        Ok(())
    }

    fn populate_all(&self, figures: &mut Figures) -> io::Result<()> {
        let options = ["--populate=all", "--max-extents=16777216"];
        let start = Instant::now();
        // An extentd of before the option, measured for comparison, does not know it.
        let Ok(mut daemon) = self.start(&self.scattered(), &options) else { return Ok(()) };
        figures.start_populate_all_ms = Some(milliseconds(start));
        figures.cached_by_populate_all = daemon.status()?.number("extents/cached");
        figures.rss_populate_all_kib = daemon.resident_kib()?;
        daemon.sigterm()?;
        Ok(())
    }

    fn sequential(&self, figures: &mut Figures) -> io::Result<()> {
        let mut daemon = self.start(&self.scattered(), &["--max-extents=16777216"])?;
        let mut client = connect(&daemon)?;
        let start = Instant::now();
        let reads = (0..self.blocks * BLOCK / LARGE as u64).map(|at| at * LARGE as u64);
        run_reads(&mut client, reads, LARGE)?;
        figures.sequential_read_s = start.elapsed().as_secs_f64();
        figures.sequential_read_fiemap_calls = daemon.status()?.number("extents/fiemap_calls");
        drop(client);
        daemon.sigterm()?;
        Ok(())
    }

    fn random(&self, figures: &mut Figures) -> io::Result<()> {
        let mut daemon = self.start(&self.scattered(), &["--max-extents=16777216"])?;
        let mut client = connect(&daemon)?;
        let mut random = Random::new(7);
        let half = self.blocks / 2;
        let mut reads = || (0..READS).map(|_| random.below(half) * 2 * BLOCK).collect::<Vec<_>>();
        let start = Instant::now();
        run_reads(&mut client, reads().into_iter(), 4096)?;
        figures.random_read_cold_s = start.elapsed().as_secs_f64();
        figures.random_read_fiemap_calls = daemon.status()?.number("extents/fiemap_calls");
        // What is not cached yet.
        let all = (0..self.blocks * BLOCK / LARGE as u64).map(|at| at * LARGE as u64);
        run_reads(&mut client, all, 4096)?;
        let ticks = daemon.cpu_ticks()?;
        let start = Instant::now();
        run_reads(&mut client, reads().into_iter(), 4096)?;
        figures.random_read_warm_s = start.elapsed().as_secs_f64();
        figures.warm_cpu_us_per_read = ratio(ticks_us(daemon.cpu_ticks()? - ticks), READS);
        drop(client);
        daemon.sigterm()?;
        Ok(())
    }

    fn plain(&self, image: &Path, figures: &mut Figures) -> io::Result<()> {
        let mut daemon = self.start(image, &[])?;
        let mut client = connect(&daemon)?;
        let mut random = Random::new(7);
        let mut reads =
            || (0..READS).map(|_| random.below(self.blocks / 2) * BLOCK).collect::<Vec<_>>();
        run_reads(&mut client, reads().into_iter().take(1000), 4096)?;
        let ticks = daemon.cpu_ticks()?;
        let start = Instant::now();
        run_reads(&mut client, reads().into_iter(), 4096)?;
        figures.plain_read_s = start.elapsed().as_secs_f64();
        figures.plain_cpu_us_per_read = ratio(ticks_us(daemon.cpu_ticks()? - ticks), READS);
        drop(client);
        daemon.sigterm()?;
        Ok(())
    }
}

/// A frontend with one queue of 32 requests.
pub(super) fn connect(daemon: &Daemon) -> io::Result<Client> {
    Client::connect(daemon.socket(), &ClientOptions::default())
}

/// Reads at all of `offsets`, as many at a time as the queue takes.
fn run_reads(
    client: &mut Client,
    offsets: impl Iterator<Item = u64>,
    len: usize,
) -> io::Result<()> {
    let queue = client.queue(0)?;
    let mut offsets = offsets.peekable();
    while offsets.peek().is_some() || queue.in_flight() > 0 {
        while let Some(&offset) = offsets.peek() {
            match queue.submit(Request::Read { offset, len }, &Shape::whole(), 0) {
                Ok(()) => offsets.next(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
        }
        queue.kick()?;
        for done in queue.wait()? {
            done.result?;
        }
    }
    Ok(())
}

/// Every second block is written, the others are allocated only: an extent each.
fn scatter(path: &Path, blocks: u64) -> io::Result<()> {
    let direct = i32::try_from(OFlags::DIRECT.bits()).map_err(io::Error::other)?;
    let file = OpenOptions::new().write(true).create_new(true).custom_flags(direct).open(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, blocks * BLOCK)?;
    let mut bytes = Aligned([0; 4096]);
    for block in (0..blocks).step_by(2) {
        Random::new(block).fill(&mut bytes.0);
        file.write_all_at(&bytes.0, block * BLOCK)?;
    }
    file.sync_all()
}

/// What O_DIRECT takes.
#[repr(align(4096))]
struct Aligned([u8; 4096]);

fn write_plain(path: &Path, blocks: u64) -> io::Result<()> {
    let file = File::create_new(path)?;
    fallocate(&file, FallocateFlags::empty(), 0, blocks * BLOCK)?;
    let bytes = Random::new(1).bytes(1 << 20);
    for at in (0..blocks * BLOCK).step_by(1 << 20) {
        let len = (blocks * BLOCK - at).min(1 << 20);
        file.write_all_at(bytes.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default(), at)?;
    }
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Extents of the file, and the time FIEMAP takes to tell all of them.
fn fiemap_all(path: &Path, blocks: u64) -> io::Result<(u64, f64)> {
    let file = File::open(path)?;
    let mut fiemap = Fiemap::new();
    let start = Instant::now();
    let (mut at, mut extents) = (0, 0);
    while at < blocks * BLOCK {
        let answer = fiemap.query(file.as_fd(), at, blocks * BLOCK - at, MAX_EXTENTS)?;
        extents += answer.extents.len() as u64;
        let end = answer.extents.last().map_or(u64::MAX, |e| e.logical + e.length);
        at = if answer.complete { u64::MAX } else { end };
    }
    Ok((extents, milliseconds(start)))
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

/// The kernel reports hundredths of a second on every architecture we run on.
#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn ticks_us(ticks: u64) -> f64 {
    ticks as f64 * 10_000.0
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn ratio(sum: f64, count: u64) -> f64 {
    sum / count.max(1) as f64
}
