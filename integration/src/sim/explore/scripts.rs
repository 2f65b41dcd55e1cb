// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The scripts: small enough to go through in every order, each about one way in which two things meet.

use std::time::Duration;

use extentd::engine::Geometry;
use extentd::engine::keeper::Start;
use extentd::engine::request::Kind;
use extentd::engine::units::{FileRange, SECTOR};

use super::super::hardship::Hardships;
use super::super::mutant::Mutant;
use super::super::outside::Errand;
use super::super::rng::Rng;
use super::super::scenario::{Fill, LEASE_BREAK, Scenario};

/// Sectors in a block here.
const SPB: usize = 8;

/// How a block of the image begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Block {
    Written,
    Hole,
    Unwritten,
    Shared,
}
use Block::{Hole, Shared, Unwritten, Written};

/// A small course of events.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) name: &'static str,
    pub(super) blocks: &'static [Block],
    pub(super) queues: u32,
    /// Begins before direct mode has.
    pub(super) entering: bool,
    /// What was asked and answered before.
    pub(super) before: &'static [Kind],
    /// Requests, by queue.
    pub(super) asks: &'static [(u32, Kind)],
    /// Who opens the image at some time.
    pub(super) outside: &'static [Errand],
    /// So many of the keeper's deadlines may pass at any time; all others only when nothing else is left to happen.
    pub(super) early: u8,
    pub(super) write_through: bool,
    pub(super) strict: bool,
}

impl Script {
    pub(super) fn scenario(&self, mutant: Option<Mutant>) -> Scenario {
        let file_size = (self.blocks.len() * SPB) as u64 * SECTOR;
        let mut scenario = Scenario::new(&mut Rng::still(), mutant);
        scenario.geometry = Geometry {
            file_size,
            fs_block: 4096,
            file_align: 512,
            dev_block: 512,
            write_block: 512,
            bounce_bytes: 4096,
            mem_align: 512,
            bounce_slots: 2,
            ops: 4,
            zeroes_bytes: 4096,
            punch_bytes: 8192,
            lease_fresh: Some(Duration::from_micros(LEASE_BREAK / 4)),
            raw: extentd::engine::RawLimits::default(),
        };
        Scenario {
            start: Start::Eligible,
            window: FileRange::new(0, file_size),
            fill: Fill::Written,
            blocks: self.blocks.len(),
            spb: SPB,
            workers: self.queues as usize,
            queue_depth: 3,
            max_extents: 1 << 20,
            populate: false,
            batch: usize::MAX,
            errors: 0,
            shorts: 0,
            no_space: 0,
            fallback: 0,
            buffered_reads: 0,
            stuck: 0,
            former: 0,
            greed: 1000,
            unaligned: 0,
            lies: false,
            write_through: self.write_through,
            punches: true,
            zeroes: [true, true],
            strict: self.strict,
            barriers: true,
            cachestat: true,
            hard: Hardships::default(),
            ..scenario
        }
    }
}

const fn span(first: usize, count: usize) -> FileRange {
    FileRange::new(first as u64 * SECTOR, (first + count) as u64 * SECTOR)
}

/// By sectors, like all of these.
pub(super) const fn read(first: usize, count: usize) -> Kind {
    Kind::Read(span(first, count))
}

const fn write(first: usize, count: usize) -> Kind {
    Kind::Write(span(first, count))
}

const fn discard(first: usize, count: usize) -> Kind {
    Kind::Discard(span(first, count))
}

const fn zeroes(first: usize, count: usize, unmap: bool) -> Kind {
    Kind::WriteZeroes { range: span(first, count), unmap }
}

/// One queue, direct mode, nothing cached, nobody else.
const PLAIN: Script = Script {
    name: "",
    blocks: &[Written, Hole],
    queues: 1,
    entering: false,
    before: &[],
    asks: &[],
    outside: &[],
    early: 0,
    write_through: false,
    strict: false,
};

pub(super) const SCRIPTS: &[Script] = &[
    Script {
        name: "raw write, break",
        before: &[read(0, 8)],
        asks: &[(0, write(0, 8)), (0, read(0, 8))],
        outside: &[Errand::Defragment],
        ..PLAIN
    },
    Script {
        name: "two queues, raw, break",
        blocks: &[Written, Written],
        queues: 2,
        before: &[read(0, 8)],
        asks: &[(0, write(0, 8)), (1, read(0, 8))],
        outside: &[Errand::Defragment],
        ..PLAIN
    },
    Script {
        name: "hole write beside a load",
        queues: 2,
        asks: &[(0, write(8, 8)), (1, read(0, 16))],
        ..PLAIN
    },
    Script {
        name: "hole write, break",
        before: &[read(0, 16)],
        asks: &[(0, write(10, 4)), (0, read(8, 8))],
        outside: &[Errand::Read],
        ..PLAIN
    },
    Script {
        name: "copy on write beside a load",
        blocks: &[Written, Shared],
        queues: 2,
        before: &[read(8, 8)],
        asks: &[(0, write(8, 8)), (1, read(0, 8)), (1, read(8, 8))],
        ..PLAIN
    },
    Script {
        name: "two parts of a hole",
        queues: 2,
        before: &[read(0, 16)],
        asks: &[(0, write(8, 3)), (1, write(13, 3))],
        ..PLAIN
    },
    Script {
        name: "part of an unwritten block",
        blocks: &[Unwritten, Written],
        queues: 2,
        before: &[read(0, 16)],
        asks: &[(0, write(2, 4)), (1, read(0, 16))],
        ..PLAIN
    },
    Script {
        name: "flush over two queues",
        blocks: &[Written, Written],
        queues: 2,
        before: &[read(0, 16)],
        asks: &[(0, write(0, 8)), (1, write(8, 8)), (1, Kind::Flush)],
        ..PLAIN
    },
    Script {
        name: "flush behind a hole write",
        before: &[read(0, 16)],
        asks: &[(0, write(8, 8)), (0, Kind::Flush), (0, write(0, 8))],
        ..PLAIN
    },
    Script {
        name: "flushes, strict",
        blocks: &[Written, Written],
        queues: 2,
        before: &[read(0, 16)],
        asks: &[(0, write(0, 8)), (0, Kind::Flush), (0, write(0, 8)), (1, Kind::Flush)],
        strict: true,
        ..PLAIN
    },
    Script {
        name: "write-through, break",
        before: &[read(0, 16)],
        asks: &[(0, write(0, 8))],
        outside: &[Errand::Read],
        write_through: true,
        ..PLAIN
    },
    Script {
        name: "discard beside raw I/O",
        blocks: &[Written, Written],
        queues: 2,
        before: &[read(0, 16)],
        asks: &[(0, discard(0, 16)), (1, write(8, 8)), (1, read(0, 16))],
        ..PLAIN
    },
    Script {
        name: "discard at odd ends",
        blocks: &[Written, Written, Written],
        before: &[read(0, 24)],
        asks: &[(0, discard(4, 16)), (0, read(0, 24))],
        ..PLAIN
    },
    Script {
        name: "zeroes in place, break",
        blocks: &[Written, Written],
        before: &[read(0, 16)],
        asks: &[(0, zeroes(0, 12, false)), (0, read(0, 16))],
        outside: &[Errand::Defragment],
        ..PLAIN
    },
    Script {
        name: "zeroes with unmap",
        blocks: &[Written, Written],
        queues: 2,
        before: &[read(0, 16)],
        asks: &[(0, zeroes(2, 14, true)), (1, read(0, 16))],
        ..PLAIN
    },
    Script {
        name: "I/O while entering",
        entering: true,
        asks: &[(0, write(0, 8)), (0, read(0, 8))],
        outside: &[Errand::Read],
        early: 1,
        ..PLAIN
    },
    Script {
        name: "a dirty page left behind",
        before: &[read(0, 16)],
        asks: &[(0, write(1, 3)), (0, read(0, 8))],
        outside: &[Errand::Write],
        early: 1,
        ..PLAIN
    },
];
