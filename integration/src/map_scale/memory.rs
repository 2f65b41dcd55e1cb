// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The map alone: lookups, insertions, changes that are published, eviction.

use std::hint::black_box;
use std::time::Instant;

use extentd::engine::extent::{Extent, ExtentMap, Hint, State};
use extentd::engine::shared::{Mode, Shared, View};
use extentd::engine::units::{DeviceOffset, FileRange};
use serde::Serialize;

use super::median;
use crate::rig::{Random, heap};

const BLOCK: u64 = 4096;
/// Extents of one answer of FIEMAP.
const BATCH: u64 = 512;
/// Each figure is the median of so many.
const TIMES: usize = 5;
const LOOKUPS: u64 = 1 << 20;
/// As the keeper: a sixteenth of a full map goes at a time.
const EVICTED_SHARE: usize = 16;

/// The figures of one size.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// Extents in the map.
    pub(super) extents: u64,
    /// Heap bytes for each, the allocator's overhead and the directory counted.
    pub(super) bytes_per_extent: f64,
    /// Time to insert one, of an answer of FIEMAP's size, in ns.
    pub(super) insert_ns: f64,
    /// A lookup answered by the hint, in ns.
    pub(super) hint_ns: f64,
    /// A lookup in the extent behind the last one's, in ns.
    pub(super) next_ns: f64,
    /// A lookup anywhere, in ns.
    pub(super) random_ns: f64,
    /// Changing one extent and publishing it to one worker, which drops the view it had, in µs.
    pub(super) publish_us: f64,
    /// Evicting a sixteenth, each range published, in ms.
    pub(super) evict_ms: f64,
    /// The ranges that were evicted for it: park orders to each worker.
    pub(super) evict_ranges: usize,
}

/// No two of them join.
fn extent(block: u64, state: State) -> Extent {
    let range = FileRange::new(block * BLOCK, (block + 1) * BLOCK);
    Extent { range, device: DeviceOffset((block * 2 + 1) * BLOCK), state }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn each(start: Instant, count: u64) -> f64 {
    start.elapsed().as_secs_f64() * 1e9 / count as f64
}

/// Measures a map of `count` extents.
#[expect(clippy::cast_precision_loss, reason = "figures for people")]
pub(super) fn measure(count: u64) -> Row {
    let before = heap::in_use();
    let start = Instant::now();
    let mut map = ExtentMap::new();
    for first in (0..count).step_by(usize::try_from(BATCH).unwrap_or(1)) {
        let end = count.min(first + BATCH);
        let list: Vec<Extent> = (first..end).map(|block| extent(block, State::Mapped)).collect();
        map.replace(FileRange::new(first * BLOCK, end * BLOCK), &list);
    }
    let insert_ns = each(start, count);
    let bytes_per_extent = heap::in_use().saturating_sub(before) as f64 / count as f64;
    let random = &mut Random::new(count);
    let mut anywhere = || ((u128::from(random.bits()) * u128::from(count)) >> 64) as u64;
    let random_ns = lookups(&map, |_| anywhere());
    let next_ns = lookups(&map, |last| if last + 1 < count { last + 1 } else { 0 });
    let hint_ns = lookups(&map, |last| last);
    let publish_us = publish(&mut map, anywhere) / 1000.0;
    let (evict_ms, evict_ranges) = evict(map);
    Row {
        extents: count,
        bytes_per_extent,
        insert_ns,
        hint_ns,
        next_ns,
        random_ns,
        publish_us,
        evict_ms,
        evict_ranges,
    }
}

/// Nanoseconds of a lookup in the block that `choose` makes of the last one.
fn lookups(map: &ExtentMap, mut choose: impl FnMut(u64) -> u64) -> f64 {
    let mut block = 0;
    let mut hint = Hint::default();
    let once = |_| {
        let start = Instant::now();
        for _ in 0..LOOKUPS {
            block = choose(block);
            black_box(map.lookup(black_box(block * BLOCK + 512), &mut hint));
        }
        each(start, LOOKUPS)
    };
    median((0..TIMES).map(once).collect())
}

/// Nanoseconds of a change, from the keeper's map to the worker's view.
fn publish(map: &mut ExtentMap, mut choose: impl FnMut() -> u64) -> f64 {
    const CHANGES: u64 = 200;
    let shared = Shared::new();
    shared.publish(View { mode: Mode::Direct, map: map.clone() });
    let mut worker = shared.latest();
    let mut state = State::Mapped;
    let once = |_| {
        let start = Instant::now();
        for _ in 0..CHANGES {
            state = if state == State::Mapped { State::Opaque } else { State::Mapped };
            let changed = extent(choose(), state);
            map.replace(changed.range, &[changed]);
            shared.publish(View { mode: Mode::Direct, map: map.clone() });
            worker = shared.latest();
        }
        each(start, CHANGES)
    };
    let median = median((0..TIMES).map(once).collect());
    drop(worker);
    median
}

/// Milliseconds of an eviction as the keeper does it, and its ranges.
fn evict(mut map: ExtentMap) -> (f64, usize) {
    let cap = map.len() - 1;
    let shared = Shared::new();
    shared.publish(View { mode: Mode::Direct, map: map.clone() });
    let start = Instant::now();
    let victims = map.victims(cap - cap / EVICTED_SHARE, &[]);
    for victim in &victims {
        map.remove(*victim);
        shared.publish(View { mode: Mode::Direct, map: map.clone() });
    }
    (each(start, 1) / 1e6, victims.len())
}
