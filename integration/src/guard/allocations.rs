// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the thread that serves a queue asks of the heap, for each request: extentd itself, in this process, on a real
//! image on a loop device, with a real client.
//!
//! Once a second after a write that thread tells the keeper that the image's mtime is due (R4), and a channel allocates
//! for every 31st message. So a figure is the least of some windows: a request that allocates does so in each.

use std::io;
use std::path::Path;
use std::thread;

use clap::ValueEnum;
use extentd::config::invocation::{self, Invocation};
use extentd::engine::Rules;
use extentd::server::{self, AllSignals};
use rustix::process::{Signal, getpid, kill_process};

use super::Measured;
use super::core::{Case, Core};
use super::load::{Load, Pattern};
use crate::rig::allocations::{Count, of_this_thread, of_thread};
use crate::rig::command::context;
use crate::rig::wait::{self, PATIENCE};
use crate::rig::{Backing, Client, ClientOptions, Filesystem, Kind, Layout};

const IMAGE: u64 = 32 << 20;
const WINDOWS: usize = 8;
const REQUESTS: u64 = 1024;
/// Of the core alone: tables have grown by then.
const WARM_UP: u32 = 1000;
const CORE_REQUESTS: u32 = 10_000;

const LOADS: [(&str, Load); 7] = [
    ("allocations, 4 KiB reads, depth 1", Load::new(Pattern::Read, 4096, 1)),
    ("allocations, 4 KiB reads, depth 32", Load::new(Pattern::Read, 4096, 32)),
    ("allocations, 4 KiB writes, depth 1", Load::new(Pattern::Write, 4096, 1)),
    ("allocations, 4 KiB writes, depth 32", Load::new(Pattern::Write, 4096, 32)),
    ("allocations, 64 KiB in pieces, depth 32", Load::new(Pattern::Pieces, 64 << 10, 32)),
    ("allocations, 128 KiB, depth 32", Load::new(Pattern::Mixed, 128 << 10, 32)),
    ("allocations, flushes", Load::new(Pattern::Flush, 0, 1)),
];

const CORE: &str = "allocations, core alone";

/// Of the core alone, on the calling thread, over all it can be asked for.
pub(super) fn of_core() -> Measured {
    let one = |case: &Case| {
        let mut core = Core::new(*case)?;
        core.run(WARM_UP)?;
        let before = counted(of_this_thread())?;
        core.run(CORE_REQUESTS)?;
        io::Result::Ok((of_this_thread() - before).total())
    };
    let cases = Case::value_variants();
    let sum = cases.iter().map(one).sum::<io::Result<u64>>();
    (CORE, sum.map(|sum| per_request(sum, u64::from(CORE_REQUESTS) * cases.len() as u64)))
}

/// Whoever is not counted allocates nothing either.
fn counted(count: Count) -> io::Result<Count> {
    if count == Count::default() {
        return Err(io::Error::other("this program does not count what it allocates"));
    }
    Ok(count)
}

/// Names of all figures.
#[cfg(test)]
pub(super) fn all_names() -> impl Iterator<Item = &'static str> {
    std::iter::once(CORE).chain(names())
}

/// Names of the figures of [`of_daemon`].
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    LOADS.iter().map(|(name, _)| *name)
}

/// Those of the daemon, in the order of [`names`]. For a process that has no other thread yet.
pub(super) fn of_daemon() -> io::Result<Vec<f64>> {
    // Before any thread exists (R1).
    let signals = AllSignals::block()?;
    let rig = super::enter()?;
    let fs = Filesystem::make(Kind::Ext4, IMAGE * 4, 512, &Backing::Memory, &rig.dir("fs")?)?;
    let (image, socket) = (fs.path().join("image"), rig.path().join("blk.sock"));
    Layout::Written.make(&image, IMAGE, 1)?;
    let arguments = ["extentd", "--mode=direct", "--threads=1", "--blk-file"].map(Into::into);
    let more = [image.into(), "--socket-path".into(), socket.clone().into()];
    let invocation = invocation::parse(arguments.into_iter().chain(more));
    let Invocation::Serve(config) = invocation.map_err(io::Error::other)? else {
        return Err(io::Error::other("nothing to serve"));
    };
    thread::scope(|scope| {
        let served = scope.spawn(|| server::run_under(&config, Rules::default(), signals));
        let up = || served.is_finished() || socket.exists();
        let figures = wait::until("the socket", PATIENCE, || up().then_some(()))
            .and_then(|()| drive(&socket));
        // Blocked in every thread, so the server reads it.
        kill_process(getpid(), Signal::TERM)?;
        let ended = served.join().map_err(|_| io::Error::other("extentd panicked"))?;
        ended.map_err(context("extentd"))?;
        figures
    })
}

fn drive(socket: &Path) -> io::Result<Vec<f64>> {
    let mut client = Client::connect(socket, &ClientOptions::default())?;
    let workers = super::threads(std::process::id(), "vring_worker")?;
    counted(sum(&workers))?;
    LOADS.iter().map(|(_, load)| least(&mut client, &workers, load)).collect()
}

fn least(client: &mut Client, workers: &[i32], load: &Load) -> io::Result<f64> {
    let queue = client.queue(0)?;
    load.run(queue, IMAGE, REQUESTS)?;
    let window = |_| {
        let before = sum(workers);
        load.run(queue, IMAGE, REQUESTS)?;
        Ok((sum(workers) - before).total())
    };
    let windows = (0..WINDOWS).map(window).collect::<io::Result<Vec<u64>>>()?;
    Ok(per_request(windows.into_iter().min().unwrap_or(u64::MAX), REQUESTS))
}

fn sum(workers: &[i32]) -> Count {
    let add = |a: Count, b: Count| Count { taken: a.taken + b.taken, given: a.given + b.given };
    workers.iter().map(|thread| of_thread(*thread)).fold(Count::default(), add)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn per_request(count: u64, requests: u64) -> f64 {
    count as f64 / requests as f64
}
