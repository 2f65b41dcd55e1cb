// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Filling sparse images: each write to a hole goes through the file, and the map learns what became of it (R10).

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::disk::{BLOCK, Bed, connect};
use crate::rig::{Client, Random, Request, Shape};

/// Writes of one run.
const WRITES: u64 = 1 << 15;
/// Bytes of the image that is filled.
const IMAGE: u64 = 1 << 30;

/// One run.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// How it was filled.
    pub(super) name: String,
    /// Thousands of writes a second.
    pub(super) kiops: f64,
    /// Latencies, in µs.
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
    /// FIEMAPs asked for.
    pub(super) fiemap_calls: u64,
}

/// All runs.
pub(super) fn measure(bed: &Bed) -> io::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for depth in [1, 32] {
        for random in [false, true] {
            for options in [&[][..], &["--mode=filesystem"]] {
                rows.push(fill(bed, depth, random, options)?);
            }
        }
    }
    Ok(rows)
}

fn fill(bed: &Bed, depth: usize, random: bool, options: &[&str]) -> io::Result<Row> {
    let image = bed.path("filled");
    File::create_new(&image)?.set_len(IMAGE)?;
    let mut daemon = bed.start_any(&image, options)?;
    let mut client = connect(&daemon)?;
    let mut blocks: Vec<u64> = (0..WRITES).collect();
    if random {
        blocks = scattered(IMAGE / BLOCK);
    }
    let start = Instant::now();
    let mut latencies = write_all(&mut client, &blocks, depth)?;
    let time = start.elapsed();
    let fiemap_calls = daemon.status()?.number("extents/fiemap_calls");
    drop(client);
    daemon.sigterm()?;
    std::fs::remove_file(image)?;
    latencies.sort_unstable();
    let at = |per_mille: usize| {
        let latency = latencies.get(latencies.len() * per_mille / 1000);
        latency.map_or(0.0, |latency| latency.as_secs_f64() * 1e6)
    };
    let order = if random { "random" } else { "sequential" };
    let mode = if options.is_empty() { "direct" } else { "filesystem" };
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let kiops = WRITES as f64 / time.as_secs_f64() / 1000.0;
    let name = format!("{order}, depth {depth}, {mode}");
    Ok(Row { name, kiops, p50_us: at(500), p99_us: at(990), p999_us: at(999), fiemap_calls })
}

/// So many different blocks below `limit`, in no order.
fn scattered(limit: u64) -> Vec<u64> {
    let mut random = Random::new(3);
    let mut all: Vec<u64> = (0..limit).collect();
    for at in 0..usize::try_from(WRITES).unwrap_or(0).min(all.len()) {
        let other = at + random.index(all.len() - at);
        all.swap(at, other);
    }
    all.truncate(usize::try_from(WRITES).unwrap_or(0));
    all
}

/// Writes the blocks, `depth` at a time; how long each took.
fn write_all(client: &mut Client, blocks: &[u64], depth: usize) -> io::Result<Vec<Duration>> {
    let queue = client.queue(0)?;
    let data = Random::new(5).bytes(usize::try_from(BLOCK).unwrap_or(0));
    let mut latencies = Vec::with_capacity(blocks.len());
    let mut starts = Vec::with_capacity(blocks.len());
    let mut next = blocks.iter();
    while latencies.len() < blocks.len() {
        while queue.in_flight() < depth
            && let Some(block) = next.next()
        {
            let request = Request::Write { offset: block * BLOCK, data: &data };
            queue.submit(request, &Shape::whole(), starts.len() as u64)?;
            starts.push(Instant::now());
        }
        queue.kick()?;
        for done in queue.wait()? {
            done.result?;
            let started = usize::try_from(done.token).ok().and_then(|index| starts.get(index));
            latencies.extend(started.map(Instant::elapsed));
        }
    }
    Ok(latencies)
}
