// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls for each request: the daemon that is shipped, on a loop device over memory, without spinning.
//!
//! Each batch begins when the thread that serves the queue sleeps, so that every one finds the same: a kick wakes it.

use std::io;
use std::path::{Path, PathBuf};

use super::load::{Load, Pattern};
use super::{Measured, each_failed};
use crate::rig::syscalls::{self, Counter};
use crate::rig::wait::{self, PATIENCE};
use crate::rig::{Backing, Client, ClientOptions, Daemon, Filesystem, Kind, Layout, Mount, Rig};

const IMAGE: u64 = 32 << 20;
/// Batches of a figure.
const BATCHES: u64 = 1000;
/// Requests before anything is counted.
const WARM_UP: u64 = 256;
/// Requests that are counted of all threads.
const COUNTED: u64 = 2048;
/// Nothing is looked for before a thread sleeps, and there is one thread that serves queues.
const OPTIONS: [&str; 3] = ["--mode=direct", "--poll-us=0", "--threads=1"];

/// On an image that is written: calls of the thread that serves the queue.
const TRANSFERS: [(&str, Load); 4] = [
    ("system calls, 4 KiB reads, depth 1", Load::new(Pattern::Read, 4096, 1)),
    ("system calls, 4 KiB reads, depth 32", Load::new(Pattern::Read, 4096, 32)),
    ("system calls, 4 KiB writes, depth 1", Load::new(Pattern::Write, 4096, 1)),
    ("system calls, 4 KiB writes, depth 32", Load::new(Pattern::Write, 4096, 32)),
];
/// On one that is a hole, which is zeros without I/O: nothing but chains and signals is left, whatever the disk does.
const HOLES: [(&str, Load); 1] =
    [("system calls, 4 KiB reads of a hole, depth 32", Load::new(Pattern::Read, 4096, 32))];
/// The write and its flush together: calls of all threads.
const FLUSHES: [(&str, Load); 1] =
    [("system calls, 4 KiB write and flush, depth 1", Load::new(Pattern::Flush, 0, 1))];
/// On one that is a hole at first: calls of all threads, since the one that serves the queue asks the others, and they
/// do most of it.
const FILLS: [(&str, Load); 2] = [
    ("system calls, 4 KiB writes into a hole, depth 1", Load::new(Pattern::Fill, 4096, 1)),
    ("system calls, 4 KiB writes into a hole, depth 32", Load::new(Pattern::Fill, 4096, 32)),
];

/// Names of the figures.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    TRANSFERS.iter().chain(&HOLES).chain(&FLUSHES).chain(&FILLS).map(|(name, _)| *name)
}

/// All of them.
pub(super) fn measure(program: &dyn Fn() -> io::Result<PathBuf>) -> Vec<Measured> {
    match Ground::make(program) {
        Err(error) => each_failed(names(), &error),
        Ok(ground) => {
            let mut figures = ground.each(Layout::Written, &TRANSFERS, least);
            figures.extend(ground.each(Layout::Sparse, &HOLES, least));
            figures.extend(ground.each(Layout::Written, &FLUSHES, all));
            for fill in &FILLS {
                figures.extend(ground.each(Layout::Sparse, std::slice::from_ref(fill), all));
            }
            figures
        }
    }
}

/// A filesystem for images, and what serves them.
struct Ground {
    program: PathBuf,
    run: PathBuf,
    fs: Filesystem,
    _tracing: Option<Mount>,
    _rig: Rig,
}

impl Ground {
    fn make(program: &dyn Fn() -> io::Result<PathBuf>) -> io::Result<Ground> {
        let rig = super::enter()?;
        let tracing = syscalls::tracing()?;
        let (mount, run) = (rig.dir("fs")?, rig.dir("run")?);
        let fs = Filesystem::make(Kind::Ext4, IMAGE * 8, 512, &Backing::Memory, &mount)?;
        Ok(Ground { program: program()?, run, fs, _tracing: tracing, _rig: rig })
    }

    /// Serves an image and measures each of `loads` on it.
    fn each(
        &self,
        layout: Layout,
        loads: &[(&'static str, Load)],
        measure: impl Fn(&Daemon, &mut Client, &Load) -> io::Result<f64>,
    ) -> Vec<Measured> {
        let image = self.fs.path().join("image");
        let serve = || {
            layout.make(&image, IMAGE, 1)?;
            let daemon = Daemon::start(&self.program, &self.run, &image, &OPTIONS)?;
            let client = Client::connect(daemon.socket(), &ClientOptions::default())?;
            io::Result::Ok((daemon, client))
        };
        let figures = match serve() {
            Err(error) => each_failed(loads.iter().map(|(name, _)| *name), &error),
            Ok((daemon, mut client)) => {
                let one = |(name, load): &(_, Load)| (*name, measure(&daemon, &mut client, load));
                loads.iter().map(one).collect()
            }
        };
        // What was not made cannot be removed, and that has been said.
        let _ = std::fs::remove_file(image);
        figures
    }
}

/// Calls of the thread that serves the queue, for each request: of the batch that took the fewest. The disk's completions
/// may wake the thread several times in a batch, as chance will have it; what a batch takes that woke it once is no chance.
fn least(daemon: &Daemon, client: &mut Client, load: &Load) -> io::Result<f64> {
    let worker = worker(daemon)?;
    let queue = client.queue(0)?;
    load.run(queue, IMAGE, WARM_UP)?;
    asleep(daemon.pid(), worker)?;
    let counter = Counter::of_thread(worker)?;
    let mut least = u64::MAX;
    let mut before = counter.read()?;
    load.batches(queue, IMAGE, BATCHES * load.depth, |_| {
        asleep(daemon.pid(), worker)?;
        let now = counter.read()?;
        least = least.min(now - before);
        before = now;
        Ok(())
    })?;
    Ok(per_request(least, load.depth))
}

/// Calls of all threads, for each request.
fn all(daemon: &Daemon, client: &mut Client, load: &Load) -> io::Result<f64> {
    let worker = worker(daemon)?;
    let (mut counter, mut calls) = (None, 0);
    let (first, last) = (WARM_UP / load.depth, (WARM_UP + COUNTED) / load.depth);
    load.batches(client.queue(0)?, IMAGE, WARM_UP + COUNTED, |batch| {
        if batch == first {
            asleep(daemon.pid(), worker)?;
            counter = Counter::start(daemon.pid());
        }
        if batch == last {
            asleep(daemon.pid(), worker)?;
            let counter = counter.as_ref().ok_or_else(|| io::Error::other("no counter"))?;
            calls = counter.read()?;
        }
        Ok(())
    })?;
    Ok(per_request(calls, COUNTED))
}

fn worker(daemon: &Daemon) -> io::Result<i32> {
    let threads = super::threads(daemon.pid(), "vring_worker")?;
    threads.first().copied().ok_or_else(|| io::Error::other("no thread serves the queue"))
}

/// Waits until a thread sleeps, for disks included: `ps` has both.
fn asleep(pid: u32, thread: i32) -> io::Result<()> {
    let stat = format!("/proc/{pid}/task/{thread}/stat");
    let sleeps = || {
        let text = std::fs::read_to_string(Path::new(&stat)).ok()?;
        // The name, field 2, may contain spaces; what follows it does not.
        let state = text.rsplit(')').next()?.split_whitespace().next()?.to_owned();
        matches!(state.as_str(), "S" | "D").then_some(())
    };
    // As a rule it does at once.
    for _ in 0..1000 {
        if sleeps().is_some() {
            return Ok(());
        }
        std::thread::yield_now();
    }
    wait::until("the worker's sleep", PATIENCE, sleeps)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn per_request(count: u64, requests: u64) -> f64 {
    count as f64 / requests as f64
}
