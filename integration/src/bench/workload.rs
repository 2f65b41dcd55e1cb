// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is done to a disk: the bench's workloads, their names, and the requests they are made of.

use super::subject::Subject;
use crate::rig::Random;

/// Bytes of a block of the filesystem, and of most requests.
const BLOCK: u32 = 4096;
/// Reads of ten requests of a mixed load.
const READS_OF_TEN: u64 = 7;

/// Which requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Seven reads to three writes.
    Mixed,
    /// A write and then a discard of the same place; only the discards count.
    Discard,
}

/// In which order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Anywhere.
    Random,
    /// One after the other, from the beginning again at the end.
    Sequential,
}

/// One workload. What it does is fixed by this, up to the seed of its random numbers, which is fixed too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Workload {
    /// Which requests.
    pub(super) access: Access,
    /// In which order.
    pub(super) order: Order,
    /// Bytes of a request.
    pub(super) block: u32,
    /// Bytes from one request's place to the next one's; more than a block leaves some blocks out.
    pub(super) stride: u32,
    /// Requests in flight on each queue.
    pub(super) depth: u16,
    /// Virtqueues.
    pub(super) queues: u16,
    /// A flush after so many writes; 0 is none at all.
    pub(super) flush_every: u32,
    /// On an image that is made anew, and is one hole, for each run.
    pub(super) sparse: bool,
}

impl Workload {
    /// Random requests of 4 KiB.
    pub(super) const fn random(access: Access, depth: u16, queues: u16) -> Workload {
        Workload {
            access,
            order: Order::Random,
            block: BLOCK,
            stride: BLOCK,
            depth,
            queues,
            flush_every: 0,
            sparse: false,
        }
    }

    const fn sequential(access: Access, block: u32, depth: u16) -> Workload {
        Workload {
            order: Order::Sequential,
            block,
            stride: block,
            ..Workload::random(access, depth, 1)
        }
    }

    const fn flushing(depth: u16, flush_every: u32) -> Workload {
        Workload { flush_every, ..Workload::random(Access::Write, depth, 1) }
    }

    /// Those with targets.
    pub(super) const READ_1: Workload = Workload::random(Access::Read, 1, 1);
    /// 32 reads in flight.
    pub(super) const READ_32: Workload = Workload::random(Access::Read, 32, 1);
    /// 128 reads in flight.
    pub(super) const READ_128: Workload = Workload::random(Access::Read, 128, 1);
    /// 32 writes in flight.
    pub(super) const WRITE_32: Workload = Workload::random(Access::Write, 32, 1);
    /// Writes of a sector: less than a block of the filesystem, so extentd locks the block and reads the rest of it (ADR 0004).
    pub(super) const SECTORS_32: Workload =
        Workload { block: 512, stride: 512, ..Workload::random(Access::Write, 32, 1) };
    /// Everything written once.
    pub(super) const WRITE_ALL: Workload = Workload::sequential(Access::Write, 1 << 20, 4);
    /// Writes into a hole.
    pub(super) const FILL: Workload =
        Workload { sparse: true, ..Workload::random(Access::Write, 32, 1) };

    /// Those that a target is about.
    pub(super) const TARGETS: [Workload; 4] =
        [Workload::READ_1, Workload::READ_32, Workload::WRITE_32, Workload::READ_128];

    /// All others, in the order of the report.
    pub(super) const OTHERS: [Workload; 25] = [
        Workload::FILL,
        Workload::random(Access::Read, 4, 1),
        Workload::random(Access::Write, 1, 1),
        Workload::random(Access::Write, 4, 1),
        Workload::random(Access::Write, 128, 1),
        Workload::SECTORS_32,
        Workload::random(Access::Mixed, 1, 1),
        Workload::random(Access::Mixed, 4, 1),
        Workload::random(Access::Mixed, 32, 1),
        Workload::random(Access::Mixed, 128, 1),
        Workload::sequential(Access::Read, 128 << 10, 8),
        Workload::sequential(Access::Write, 128 << 10, 8),
        Workload::sequential(Access::Read, 1 << 20, 4),
        Workload::WRITE_ALL,
        Workload::flushing(1, 1),
        Workload::flushing(32, 1),
        Workload::flushing(32, 8),
        Workload::flushing(32, 64),
        Workload::random(Access::Read, 32, 2),
        Workload::random(Access::Read, 32, 4),
        Workload::random(Access::Write, 32, 2),
        Workload::random(Access::Write, 32, 4),
        Workload::random(Access::Mixed, 32, 2),
        Workload::random(Access::Mixed, 32, 4),
        Workload { block: 64 << 10, stride: 64 << 10, ..Workload::random(Access::Discard, 8, 1) },
    ];

    /// Its name in the report, for example `randread-4k-qd32-q1`; the depth is that of each queue.
    pub(super) fn name(self) -> String {
        let kind = match (self.access, self.order) {
            _ if self.sparse => "fill",
            (Access::Discard, _) => "discard",
            (Access::Read, Order::Random) => "randread",
            (Access::Write, Order::Random) => "randwrite",
            (Access::Mixed, Order::Random) => "randrw",
            (Access::Read, Order::Sequential) => "seqread",
            (Access::Write, Order::Sequential) => "seqwrite",
            (Access::Mixed, Order::Sequential) => "seqrw",
        };
        let size = match self.block >> 10 {
            0 => self.block.to_string(),
            kib if kib >= 1024 => format!("{}m", kib >> 10),
            kib => format!("{kib}k"),
        };
        let flush = match self.flush_every {
            0 => String::new(),
            every => format!("-flush{every}"),
        };
        format!("{kind}-{size}-qd{}-q{}{flush}", self.depth, self.queues)
    }

    /// Requests in flight on all queues.
    pub(super) fn slots(self) -> u16 {
        self.depth * self.queues
    }

    /// Whether `subject` is given it: a device has neither holes nor, the loop device's being what it is, cheap discards.
    /// Sectors are about what servers do with them.
    pub(super) fn suits(self, subject: Subject) -> bool {
        let device = subject != Subject::NativeDevice || !self.needs_scratch();
        device && (subject.has_server() || self.block >= BLOCK)
    }

    /// Whether it spoils the image it runs on, and so needs one of its own.
    pub(super) fn needs_scratch(self) -> bool {
        self.sparse || self.access == Access::Discard
    }

    /// Whether all of its data should go straight to the device.
    pub(super) fn all_direct(self) -> bool {
        !self.needs_scratch()
    }
}

/// One request; bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Read the block at this offset.
    Read(u64),
    /// Write it.
    Write(u64),
    /// Give it up.
    Discard(u64),
    /// Make what was written durable.
    Flush,
}

/// Where the requests of a run come from.
#[derive(Debug)]
pub(super) struct Source {
    workload: Workload,
    blocks: u64,
    next: u64,
    random: Random,
    unflushed: u32,
    /// What each slot is doing, or did last.
    doing: Vec<Request>,
}

impl Source {
    /// The requests of `workload` for a disk of `size` bytes.
    pub(super) fn new(workload: Workload, size: u64) -> Source {
        Source {
            workload,
            blocks: size / u64::from(workload.stride),
            next: 0,
            random: Random::new(size ^ u64::from(workload.slots())),
            unflushed: 0,
            doing: vec![Request::Flush; usize::from(workload.slots())],
        }
    }

    /// The next request of `slot`, whose last one has ended.
    pub(super) fn next(&mut self, slot: u16) -> Request {
        let flush = self.workload.flush_every;
        let request = if flush > 0 && self.unflushed >= flush {
            self.unflushed = 0;
            Request::Flush
        } else {
            match self.workload.access {
                Access::Read => Request::Read(self.place()),
                Access::Write => self.write(),
                Access::Mixed if self.random.below(10) < READS_OF_TEN => {
                    Request::Read(self.place())
                }
                Access::Mixed => self.write(),
                Access::Discard => match self.doing(slot) {
                    Request::Write(place) => Request::Discard(place),
                    _ => self.write(),
                },
            }
        };
        if let Some(doing) = self.doing.get_mut(usize::from(slot)) {
            *doing = request;
        }
        request
    }

    /// What `slot` was last given.
    pub(super) fn doing(&self, slot: u16) -> Request {
        self.doing.get(usize::from(slot)).copied().unwrap_or(Request::Flush)
    }

    /// Whether a request counts among the workload's, as flushes and the writes before discards do not.
    pub(super) fn counts(&self, request: Request) -> bool {
        match request {
            Request::Flush => false,
            Request::Write(_) => self.workload.access != Access::Discard,
            Request::Read(_) | Request::Discard(_) => true,
        }
    }

    fn write(&mut self) -> Request {
        self.unflushed += 1;
        Request::Write(self.place())
    }

    fn place(&mut self) -> u64 {
        let block = match self.workload.order {
            Order::Random => self.random.below(self.blocks),
            Order::Sequential => {
                self.next += 1;
                (self.next - 1) % self.blocks.max(1)
            }
        };
        block * u64::from(self.workload.stride)
    }
}

#[cfg(test)]
#[path = "workload_tests.rs"]
mod workload_tests;
