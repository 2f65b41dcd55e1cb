// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a seed stands for: sizes, how the image begins, how bad the weather is.

use std::time::Duration;

use extentd::engine::Geometry;
use extentd::engine::keeper::Start;
use extentd::engine::units::{FileRange, SECTOR};

use super::hardship::Hardships;
use super::mutant::Mutant;
use super::pagecache;
use super::rng::Rng;
use super::slow::{self, SlowDevice};

/// Bytes in a page: no filesystem's block here is larger.
const PAGE: u32 = 4096;
const _: () = assert!(pagecache::PAGE * 512 == PAGE as usize);

/// `/proc/sys/fs/lease-break-time`, in microseconds.
pub(super) const LEASE_BREAK: u64 = 1_000_000;

/// How the image's blocks look at the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fill {
    Written,
    Holes,
    Unwritten,
    Mixed,
    /// Mixed, with clones of some blocks.
    Cloned,
}

const FILLS: &[(Fill, u64)] = &[
    (Fill::Written, 3),
    (Fill::Holes, 2),
    (Fill::Unwritten, 2),
    (Fill::Mixed, 4),
    (Fill::Cloned, 3),
];

/// Everything a seed decides before the first event. Chances are per mille.
#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub(super) geometry: Geometry,
    pub(super) start: Start,
    pub(super) window: FileRange,
    pub(super) fill: Fill,
    pub(super) blocks: usize,
    /// Sectors in a filesystem block.
    pub(super) spb: usize,
    pub(super) workers: usize,
    pub(super) queue_depth: usize,
    pub(super) max_extents: usize,
    /// All of the map is loaded at once.
    pub(super) populate: bool,
    /// Extents that one FIEMAP answers at most.
    pub(super) batch: usize,
    /// Longest transfer, in sectors: 64 KiB, but more extents than a FIEMAP answers where there are
    /// that many.
    pub(super) longest: usize,
    /// Operations that take long.
    pub(super) slow: u64,
    pub(super) phases: u64,
    pub(super) errors: u64,
    pub(super) shorts: u64,
    pub(super) no_space: u64,
    pub(super) fallback: u64,
    pub(super) buffered_reads: u64,
    pub(super) stuck: u64,
    pub(super) greed: u64,
    pub(super) unaligned: u64,
    pub(super) flushes: u64,
    pub(super) discards: u64,
    /// Places the guest likes, and how much.
    pub(super) hot: usize,
    pub(super) focus: u64,
    /// FIEMAP names other places than the true ones (R6).
    pub(super) lies: bool,
    pub(super) write_through: bool,
    /// The filesystem can punch holes.
    pub(super) punches: bool,
    /// The filesystem can zero ranges; and the disk.
    pub(super) zeroes: [bool; 2],
    /// How often in 1000 a block that a file gets still has a page in the device's cache.
    pub(super) former: u64,
    /// `--barrier=strict`.
    pub(super) strict: bool,
    /// The host's filesystem flushes the disk (no `barrier=0`).
    pub(super) barriers: bool,
    /// The kernel has cachestat(2) for those who must not wait.
    pub(super) cachestat: bool,
    /// A device that is slow, or turns so (R2b).
    pub(super) slow_device: Option<SlowDevice>,
    pub(super) hard: Hardships,
    pub(super) mutant: Option<Mutant>,
}

impl Scenario {
    pub(super) fn new(rng: &mut Rng, mutant: Option<Mutant>) -> Self {
        let slow = rng.chance(60);
        let mut scenario = Self::drawn(rng, mutant, slow);
        Hardships::add_to(&mut scenario, rng);
        if slow && !scenario.identity() {
            slow::slow_down(&mut scenario, rng);
        }
        scenario
    }

    fn drawn(rng: &mut Rng, mutant: Option<Mutant>, slow: bool) -> Self {
        let dev_block: u32 = if rng.chance(250) { 4096 } else { 512 };
        let fs_block: u32 = if dev_block == 512 && rng.chance(300) { 1024 } else { 4096 };
        let spb = usize::try_from(u64::from(fs_block) / SECTOR).unwrap_or(1);
        // Now and then an image of more extents than the map may hold.
        let vast = rng.chance(if fs_block == 1024 { 200 } else { 30 });
        let many = if fs_block == 1024 { 700 } else { 180 };
        let blocks = if vast { many } else { slow::blocks(slow, rng) };
        let tail = if dev_block == 512 && rng.chance(300) { rng.index(spb) } else { 0 };
        let sectors = blocks * spb + tail;
        let start = start(rng);
        let identity = start == Start::Identity;
        let blocks = if identity { blocks } else { sectors.div_ceil(spb) };
        let file_size = if identity { blocks * spb } else { sectors } as u64 * SECTOR;
        let window = window(rng, file_size, u64::from(dev_block));
        // A page of several blocks is written as one (ADR 0010).
        let unit = if identity || mutant == Some(Mutant::PartOfPage) { fs_block } else { PAGE };
        let mut geometry = geometry(rng, file_size, (unit, dev_block), identity);
        // The filesystem keeps its own blocks in the device's page cache, or it does not.
        let buffers = !identity && rng.chance(500);
        if buffers && mutant != Some(Mutant::PartialRawWrites) {
            geometry.write_block = fs_block;
        }
        let (rough, narrow) = (rng.chance(300), rng.chance(350));
        let rare = |rng: &mut Rng, often: u64, high: u64| if rng.chance(often) { high } else { 0 };
        Self {
            geometry,
            start,
            window,
            fill: rng.weighted(FILLS).unwrap_or(Fill::Mixed),
            blocks,
            spb,
            workers: 1 + rng.index(4),
            queue_depth: 2 + rng.index(7),
            max_extents: if vast { 4 + rng.index(40) } else { 1 << 20 },
            populate: rng.chance(200),
            batch: if rng.chance(350) { 1 + rng.index(6) } else { usize::MAX },
            longest: if vast { sectors } else { 128 },
            slow: if narrow { 200 } else { 30 },
            phases: rng.range(5, 16),
            errors: if rough { 15 } else { 0 },
            shorts: rare(rng, 400, 60),
            no_space: if rough { 10 } else { 0 },
            fallback: rare(rng, 700, 250),
            // No eligible filesystem does it at all: a page that a read of ours takes in beside a
            // FIEMAP would be stale in direct mode, and seen by the next daemon (seed 104913).
            buffered_reads: if start == Start::Filesystem { rare(rng, 200, 200) } else { 0 },
            stuck: rare(rng, 500, 300),
            former: if buffers { 300 } else { 0 },
            greed: if rng.chance(500) { 1000 } else { 600 },
            unaligned: rare(rng, 500, 300),
            flushes: rng.range(20, 150),
            discards: rng.range(20, 150),
            hot: if narrow { 1 } else { 3 },
            focus: if narrow { 920 } else { 550 },
            lies: start == Start::Eligible && rng.chance(20),
            write_through: rng.chance(100),
            punches: !rng.chance(100),
            zeroes: [200, 100].map(|never| !rng.chance(never)),
            barriers: !rng.chance(150),
            strict: rng.chance(150),
            cachestat: !rng.chance(150),
            slow_device: None,
            hard: Hardships::default(),
            mutant,
        }
    }

    /// Sectors that the file is written in multiples of.
    pub(super) fn unit(&self) -> usize {
        sectors(u64::from(self.geometry.fs_block))
    }

    pub(super) fn identity(&self) -> bool {
        self.start == Start::Identity
    }

    pub(super) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// Sectors of the file at the start.
    pub(super) fn sectors(&self) -> usize {
        sectors(self.geometry.file_size)
    }

    /// Blocks of the disk.
    pub(super) fn places(&self) -> usize {
        if self.identity() { self.blocks } else { self.blocks * 4 + 32 }
    }
}

fn start(rng: &mut Rng) -> Start {
    match rng.below(40) {
        0 => Start::Filesystem,
        1 => Start::Identity,
        _ => Start::Eligible,
    }
}

fn geometry(rng: &mut Rng, file_size: u64, blocks: (u32, u32), identity: bool) -> Geometry {
    let (fs_block, dev_block) = blocks;
    Geometry {
        file_size,
        fs_block,
        file_align: dev_block,
        dev_block,
        write_block: dev_block,
        bounce_bytes: 4096 << rng.below(3),
        mem_align: if rng.chance(500) { 512 } else { dev_block },
        bounce_slots: u32::try_from(rng.range(1, 6)).unwrap_or(1),
        ops: u32::try_from(rng.range(4, 40)).unwrap_or(4),
        zeroes_bytes: u64::from(fs_block) << rng.below(3),
        punch_bytes: u64::from(fs_block) << rng.below(5),
        lease_fresh: (!identity).then_some(Duration::from_micros(LEASE_BREAK / 4)),
        raw: extentd::engine::RawLimits::default(),
    }
}

/// The part of the file the guest sees: all of it, or less at one end or both (R20).
fn window(rng: &mut Rng, file_size: u64, dev_block: u64) -> FileRange {
    if rng.chance(700) {
        return FileRange::new(0, file_size);
    }
    let start = rng.below(5) * dev_block;
    let end = file_size - rng.below(12) * SECTOR;
    FileRange::new(start, end)
}

/// Whole sectors in `bytes`.
pub(super) fn sectors(bytes: u64) -> usize {
    usize::try_from(bytes / SECTOR).unwrap_or(usize::MAX)
}

/// Bytes of that many sectors.
pub(super) const fn bytes(sectors: usize) -> u64 {
    sectors as u64 * SECTOR
}
