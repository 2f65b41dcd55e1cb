// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pure core on one thread: a chain is taken apart and checked, planned, carried out by a disk that has always done
//! everything already, and answered. No kernel, no clock, no other thread: what it costs is the same each time.

use std::collections::VecDeque;
use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use clap::ValueEnum;
use extentd::engine::counters::Counters;
use extentd::engine::extent::{Extent, ExtentMap, Hint, State};
use extentd::engine::message::ToWorker;
use extentd::engine::request::{self, Kind, Limits, Parsed, Request, Status};
use extentd::engine::shared::{Mode, Shared, View};
use extentd::engine::units::{DeviceOffset, FileRange};
use extentd::engine::{Completion, Geometry, Io, Op, OpId, Rules, Tag, Worker};
use extentd::sys::buffer::GuestBuffers;
use extentd::virtio::Memory;
use extentd::virtio::chain::{Chain, Table};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use crate::rig::Random;

const BLOCK: u64 = 4096;
/// Blocks of the image; of a map in pieces, each block is an extent.
const BLOCKS: u64 = 1 << 20;
/// Chains taken in one go, as of a queue with so many in flight.
const BATCH: u16 = 32;
/// Data pieces of a long request.
const PIECES: u16 = 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Where things are in guest memory: the descriptor table, then headers and status bytes, then data.
const HEADERS: u64 = 1 << 20;
const STATUS: u64 = HEADERS + (64 << 10);
const DATA: u64 = 2 << 20;
const MEMORY: usize = 16 << 20;

/// What is asked of the core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// 4 KiB reads one after the other in one extent: the hint answers.
    ReadHit,
    /// 4 KiB reads anywhere in a map of 2^20 extents.
    ReadRandom,
    /// 4 KiB writes in one extent.
    Write,
    /// 128 KiB reads into 32 pieces of guest memory.
    ReadVectored,
    /// 128 KiB reads of 32 extents: 32 operations each.
    ReadScattered,
    /// No request at all: a lookup anywhere in a map of 2^20 extents.
    Lookup,
}

impl Case {
    fn in_pieces(self) -> bool {
        matches!(self, Case::ReadRandom | Case::ReadScattered | Case::Lookup)
    }

    /// Blocks of a request.
    fn blocks(self) -> u64 {
        match self {
            Case::ReadVectored | Case::ReadScattered => u64::from(PIECES),
            _ => 1,
        }
    }

    /// Descriptors its data are in.
    fn pieces(self) -> u16 {
        if self == Case::ReadVectored { PIECES } else { 1 }
    }
}

/// A disk that has done everything at once.
#[derive(Debug)]
struct Ready {
    done: VecDeque<Completion>,
    now: Duration,
}

impl Io for Ready {
    fn submit(&mut self, id: OpId, op: Op) -> Poll<i32> {
        match black_box(op) {
            Op::Read(_, buf) | Op::Write(_, buf) => {
                let result = i32::try_from(buf.len()).unwrap_or(-1);
                self.done.push_back(Completion { id, result });
                Poll::Pending
            }
            Op::ConfirmLease => Poll::Ready(1),
            _ => Poll::Ready(0),
        }
    }

    fn reap(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn now(&self) -> Duration {
        self.now
    }
}

/// A worker with everything a request needs on its way.
pub struct Core {
    case: Case,
    memory: Arc<Memory>,
    limits: Limits,
    chain: Chain,
    buffers: GuestBuffers,
    worker: Worker,
    disk: Ready,
    map: ExtentMap,
    random: Random,
    next: u64,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("case", &self.case).finish_non_exhaustive()
    }
}

impl Core {
    /// A worker in direct mode, with the map that `case` is about.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(case: Case) -> io::Result<Core> {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(io::Error::other)?;
        let shared = Arc::new(Shared::new());
        let map = map(case.in_pieces());
        shared.publish(View { mode: Mode::Direct, map: map.clone() });
        let geometry = geometry();
        let counters = Arc::new(Counters::default());
        let mut core = Core {
            case,
            memory: Arc::new(memory),
            limits: Limits {
                base: 0,
                capacity: BLOCKS * BLOCK,
                block_size: 512,
                read_only: false,
                unmap: true,
            },
            chain: Chain::default(),
            buffers: GuestBuffers::new(u32::from(BATCH)),
            worker: Worker::new(geometry, Rules::default(), shared, counters, u32::from(BATCH)),
            disk: Ready { done: VecDeque::with_capacity(1024), now: Duration::from_secs(1) },
            map,
            random: Random::new(7),
            next: 0,
        };
        core.worker.message(&mut core.disk, ToWorker::Begin);
        (0..BATCH).try_for_each(|slot| core.describe(slot))?;
        Ok(core)
    }

    /// Carries out `requests`, or looks that often.
    ///
    /// # Errors
    /// One did not end as it should, or none was carried out at all.
    pub fn run(&mut self, requests: u32) -> io::Result<()> {
        if self.case == Case::Lookup {
            return self.look(requests);
        }
        let mut left = requests;
        while left > 0 {
            let batch = u16::try_from(left).unwrap_or(BATCH).min(BATCH);
            self.batch(batch)?;
            left -= u32::from(batch);
        }
        Ok(())
    }

    fn look(&mut self, times: u32) -> io::Result<()> {
        let mut hint = Hint::default();
        for _ in 0..times {
            let at = self.random.below(BLOCKS) * BLOCK;
            black_box(self.map.lookup(at, &mut hint)).ok_or_else(|| failed("lookup"))?;
        }
        Ok(())
    }

    fn batch(&mut self, count: u16) -> io::Result<()> {
        let memory = Arc::clone(&self.memory);
        let table = Table::new(&memory, GuestAddress(0), u32::from(self.head(BATCH)));
        for slot in 0..count {
            self.aim(slot)?;
            self.arrive(&table, slot)?;
        }
        let mut ended = 0;
        // What the bound on raw I/O holds back at first starts when the rest has ended (R2b).
        while !self.disk.done.is_empty() {
            self.worker.reap(&mut self.disk);
            while let Some((tag, status)) = self.worker.poll_done() {
                if status != Status::Ok {
                    return Err(failed("a request"));
                }
                self.buffers.clear(tag);
                ended += 1;
            }
        }
        if ended == count { Ok(()) } else { Err(failed("a batch")) }
    }

    /// What the worker thread does with a chain it has taken.
    fn arrive(&mut self, table: &Table<'_>, slot: u16) -> io::Result<()> {
        let tag = Tag(u32::from(slot));
        let parts = self.chain.parse(table, self.head(slot)).map_err(io::Error::other)?;
        let header = parts.header.ok_or_else(|| failed("a header"))?;
        let parsed = request::parse(header, parts.readable, parts.writable, &self.limits);
        let Parsed::Io(kind) = parsed else { return Err(failed("the parser")) };
        let data = match kind {
            Kind::Read(_) => self.chain.writable_data(),
            _ => self.chain.readable_data(),
        };
        let set = self.buffers.set(tag, &self.memory, data, 512);
        let mem_aligned = set.map_err(io::Error::other)?;
        self.worker.accept(&mut self.disk, tag, Request { kind, mem_aligned });
        Ok(())
    }

    /// The first descriptor of a slot.
    fn head(&self, slot: u16) -> u16 {
        slot * (self.case.pieces() + 2)
    }

    /// What the guest does once: the descriptors, which stay as they are, and the kind.
    fn describe(&self, slot: u16) -> io::Result<()> {
        let (head, pieces) = (self.head(slot), self.case.pieces());
        let write = self.case == Case::Write;
        let kind = if write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
        let header = GuestAddress(HEADERS + 16 * u64::from(slot));
        self.put(kind, header)?;
        self.put(Descriptor::new(header.0, 16, NEXT, head + 1), descriptor(head))?;
        let bytes = self.case.blocks() * BLOCK / u64::from(pieces);
        let length = u32::try_from(bytes).map_err(io::Error::other)?;
        for piece in 0..pieces {
            // A hole after each: contiguous ones would be joined to one.
            let place = u64::from(slot) * u64::from(pieces) + u64::from(piece);
            let at = DATA + place * (bytes + BLOCK);
            let flags = if write { NEXT } else { NEXT | WRITE };
            let index = head + 1 + piece;
            self.put(Descriptor::new(at, length, flags, index + 1), descriptor(index))?;
        }
        let status = Descriptor::new(STATUS + u64::from(slot), 1, WRITE, 0);
        self.put(status, descriptor(head + 1 + pieces))
    }

    /// Where the next request goes.
    fn aim(&mut self, slot: u16) -> io::Result<()> {
        let places = BLOCKS / self.case.blocks();
        let place = if self.case.in_pieces() { self.random.below(places) } else { self.next };
        self.next = (self.next + 1) % places;
        let sector = place * self.case.blocks() * (BLOCK / 512);
        self.put(sector, GuestAddress(HEADERS + 16 * u64::from(slot) + 8))
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, at: GuestAddress) -> io::Result<()> {
        self.memory.write_obj(value, at).map_err(io::Error::other)
    }
}

fn descriptor(index: u16) -> GuestAddress {
    GuestAddress(16 * u64::from(index))
}

fn failed(what: &str) -> io::Error {
    io::Error::other(format!("{what} did not end as it should"))
}

/// One extent, or one for each block, none of which joins the next.
fn map(in_pieces: bool) -> ExtentMap {
    /// Extents of one answer of FIEMAP.
    const ANSWER: u64 = 512;
    let mut map = ExtentMap::new();
    if !in_pieces {
        let range = FileRange::new(0, BLOCKS * BLOCK);
        let extent = Extent { range, device: DeviceOffset(BLOCK), state: State::Mapped };
        map.replace(range, &[extent]);
        return map;
    }
    let mut first = 0;
    while first < BLOCKS {
        let end = BLOCKS.min(first + ANSWER);
        let list: Vec<Extent> = (first..end).map(single).collect();
        map.replace(FileRange::new(first * BLOCK, end * BLOCK), &list);
        first = end;
    }
    map
}

/// An extent of one block that joins neither of its neighbours.
pub(super) fn single(block: u64) -> Extent {
    Extent {
        range: FileRange::new(block * BLOCK, (block + 1) * BLOCK),
        device: DeviceOffset((block * 2 + 1) * BLOCK),
        state: State::Mapped,
    }
}

fn geometry() -> Geometry {
    Geometry {
        file_size: BLOCKS * BLOCK,
        fs_block: 4096,
        file_align: 512,
        dev_block: 512,
        write_block: 512,
        mem_align: 512,
        bounce_bytes: 64 << 10,
        bounce_slots: 8,
        ops: 1024,
        zeroes_bytes: 4 << 20,
        punch_bytes: 256 << 20,
        lease_fresh: Some(Duration::from_secs(10)),
        raw: extentd::engine::RawLimits::default(),
    }
}
