// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engine's one door to the world, [`Io`], and the operations in flight behind it.

use std::ops::Range;
use std::task::Poll;
use std::time::Duration;

use extentd::engine::io::{Buf, Target};
use extentd::engine::message::WorkerId;
use extentd::engine::units::FileRange;
use extentd::engine::{Completion, Io, Op, OpId};

use super::disk::{Stamp, ZERO};
use super::hazard::Hazard;
use super::host::{Copies, ENOSPC};
use super::layout::NOWHERE;
use super::pagecache::PAGE;
use super::scenario::sectors;
use super::world::{Event, World};

/// An I/O error, negated.
pub(super) const EIO: i32 = -5;

/// The filesystem cannot do that, negated.
pub(super) const EOPNOTSUPP: i32 = -95;

/// The kernel does not know that system call, negated.
const ENOSYS: i32 = -38;

/// Not aligned for direct I/O, negated.
const EINVAL: i32 = -22;

/// What an operation is to the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    RawRead,
    RawWrite,
    FileRead,
    FileWrite,
    FileZeroes,
    SyncImage,
    SyncDevice,
}

impl Class {
    pub(super) const fn is_raw(self) -> bool {
        matches!(self, Self::RawRead | Self::RawWrite)
    }

    /// Whether the file is written, and its layout perhaps changed.
    pub(super) const fn writes_file(self) -> bool {
        matches!(self, Self::FileWrite | Self::FileZeroes)
    }

    /// Steps before the end.
    const fn steps(self) -> u8 {
        match self {
            Self::RawRead | Self::RawWrite | Self::FileRead | Self::FileZeroes => 2,
            Self::FileWrite => 3,
            Self::SyncImage | Self::SyncDevice => 1,
        }
    }
}

/// An operation in flight.
#[derive(Clone, Debug)]
pub(super) struct InFlight {
    pub(super) life: u32,
    pub(super) worker: WorkerId,
    pub(super) id: OpId,
    pub(super) class: Class,
    pub(super) buf: Option<Buf>,
    /// Sectors of the device if raw, else of the file.
    pub(super) sectors: Range<usize>,
    /// Blocks of the file.
    pub(super) blocks: Vec<usize>,
    /// Sectors that will be moved.
    pub(super) moved: usize,
    pub(super) error: i32,
    pub(super) step: u8,
    /// The second half reaches the disk first.
    pub(super) swapped: bool,
    /// Falls back to the page cache.
    pub(super) buffered: bool,
    /// The kernel syncs and drops what fell back before it answers.
    pub(super) tidy: bool,
    pub(super) copies: Copies,
    /// The memory, pinned, once the daemon that owned it is dead.
    pub(super) pinned: Option<Vec<Stamp>>,
    /// A ghost's further delay.
    pub(super) hold: u64,
}

impl InFlight {
    /// Whether the kernel is at work on the file for it: what changes the layout waits.
    pub(super) fn holds_layout(&self) -> bool {
        (self.class == Class::FileRead || self.class.writes_file()) && self.step > 0
    }
}

/// One worker's door.
pub(super) struct Port<'a> {
    pub(super) world: &'a mut World,
    pub(super) worker: WorkerId,
}

impl Io for Port<'_> {
    fn submit(&mut self, id: OpId, op: Op) -> Poll<i32> {
        let world = &mut *self.world;
        world.trace(|| format!("w{} submit {} {op:?}", self.worker.0, id.0));
        match op {
            Op::ConfirmLease => {
                let ours = world.scenario.identity() || world.lease.is_undisturbed();
                Poll::Ready(i32::from(ours))
            }
            Op::CachedPages(range) => Poll::Ready(world.cached_pages(range)),
            Op::Zero(buf) => {
                for i in 0..sectors(u64::from(buf.len())) {
                    world.memory_set(self.worker, buf, i, ZERO);
                }
                Poll::Ready(0)
            }
            Op::Copy { from, to } => {
                if from.len() != to.len() {
                    world.fail(format!("copy of unequal lengths: {op:?}"));
                }
                for i in 0..sectors(u64::from(to.len())) {
                    let stamp = world.memory_get(self.worker, from, i);
                    world.memory_set(self.worker, to, i, stamp);
                }
                Poll::Ready(0)
            }
            _ => world.start(self.worker, id, op),
        }
    }

    fn reap(&mut self) -> Option<Completion> {
        self.world.ended.get_mut(&self.worker)?.pop_front()
    }

    fn now(&self) -> Duration {
        Duration::from_micros(self.world.now)
    }
}

impl World {
    /// `cachestat` of a range of the file, where the kernel has it.
    fn cached_pages(&mut self, range: FileRange) -> i32 {
        if !self.scenario.cachestat {
            return ENOSYS;
        }
        let pages = self.host.cache.pages_in(&(sectors(range.start)..sectors(range.end)));
        self.hit(if pages > 0 { Hazard::PagesLeft } else { Hazard::NoPagesLeft });
        i32::try_from(pages).unwrap_or(i32::MAX)
    }

    fn start(&mut self, worker: WorkerId, id: OpId, op: Op) -> Poll<i32> {
        let (class, place, buf, len) = match op {
            Op::Read(Target::Device(at), buf) => (Class::RawRead, at.0, Some(buf), buf.len()),
            Op::Write(Target::Device(at), buf) => (Class::RawWrite, at.0, Some(buf), buf.len()),
            Op::Zeroes(Target::Device(at), len) => (Class::RawWrite, at.0, None, len),
            Op::Read(Target::Image(at), buf) => (Class::FileRead, at, Some(buf), buf.len()),
            Op::Write(Target::Image(at), buf) => (Class::FileWrite, at, Some(buf), buf.len()),
            Op::Zeroes(Target::Image(at), len) => (Class::FileZeroes, at, None, len),
            Op::SyncDevice(at, _) => (Class::SyncDevice, at.0, None, 0),
            _ => (Class::SyncImage, 0, None, 0),
        };
        if let Op::Zeroes(target, _) = op {
            if !self.scenario.zeroes[usize::from(matches!(target, Target::Device(_)))] {
                self.hit(Hazard::NoZeroes);
                return Poll::Ready(EOPNOTSUPP);
            }
            self.hit(Hazard::Zeroes);
        }
        let first = sectors(place);
        let count = sectors(u64::from(len));
        let mut flight = InFlight {
            life: self.life,
            worker,
            id,
            class,
            buf,
            sectors: first..first + count,
            blocks: Vec::new(),
            moved: count,
            error: 0,
            step: 0,
            swapped: self.rng.chance(500),
            buffered: false,
            tidy: self.rng.chance(300),
            copies: Copies::new(),
            pinned: None,
            hold: 0,
        };
        flight.blocks = match class {
            _ if class.is_raw() => self.file_blocks(&flight.sectors),
            Class::SyncImage | Class::SyncDevice => Vec::new(),
            _ => self.host.blocks_of(&flight.sectors).collect(),
        };
        self.check_submit(&flight, place, u64::from(len));
        if self.is_odd_end(&flight, place) {
            return Poll::Ready(EINVAL);
        }
        if self.scenario.errors > 0 && self.rng.chance(self.scenario.errors / 4) {
            self.hit(Hazard::IoError);
            self.note_error();
            return Poll::Ready(EIO);
        }
        if let Some(result) = self.try_again(class) {
            return Poll::Ready(result);
        }
        self.draw_faults(&mut flight);
        self.raw += u64::from(class.is_raw());
        let key = self.next_key;
        self.next_key += 1;
        self.ops.insert(key, flight);
        self.hand_over(key, worker);
        Poll::Pending
    }

    /// Chooses errors, short transfers and the way through the page cache.
    fn draw_faults(&mut self, flight: &mut InFlight) {
        let align = sectors(u64::from(if flight.class.is_raw() {
            self.scenario.geometry.dev_block
        } else {
            self.scenario.geometry.file_align
        }));
        let units = flight.moved / align;
        if flight.class == Class::FileWrite {
            let blocks = &flight.blocks;
            let fresh = blocks.iter().any(|b| self.host.layout.block(*b).place == NOWHERE);
            let shared = blocks.iter().any(|b| self.host.layout.block(*b).shared);
            if fresh && self.rng.chance(self.scenario.no_space) {
                flight.error = ENOSPC;
                self.hit(Hazard::NoSpace);
            }
            if shared {
                self.hit(Hazard::CopyOnWrite);
            }
            let more = if fresh || shared { 1 } else { 4 };
            flight.buffered = self.rng.chance(self.scenario.fallback / more);
        } else if flight.class == Class::FileRead {
            flight.buffered = self.rng.chance(self.scenario.buffered_reads);
        }
        if flight.buf.is_none() {
            if self.rng.chance(self.scenario.errors) {
                flight.error = EIO;
                flight.moved = 0;
                self.hit(Hazard::IoError);
            }
        } else if self.rng.chance(self.scenario.errors) {
            flight.error = EIO;
            flight.moved = align * self.rng.index(units + 1);
            self.hit(Hazard::IoError);
        } else if units > 1 && self.rng.chance(self.scenario.shorts) {
            flight.moved = align * (1 + self.rng.index(units - 1));
            self.hit(Hazard::ShortTransfer);
        }
        if flight.class == Class::FileWrite && flight.moved < flight.sectors.len() {
            self.stop_at_block(flight);
            if flight.error == 0 && !flight.moved.is_multiple_of(self.scenario.unit()) {
                self.hit(Hazard::ShortInsideBlock);
            }
        }
        if flight.error != 0 {
            self.note_error();
        }
        if flight.error == ENOSPC {
            flight.moved = 0;
        }
    }

    /// A file write that ends early inside a block fills the block up, which the kernel does only
    /// when nobody else writes it; and a failed one converts whole blocks or none. One that falls back
    /// to the page cache copies page by page (`generic_perform_write`), and its memory is there: it
    /// ends with a page.
    fn stop_at_block(&self, flight: &mut InFlight) {
        let end = flight.sectors.start + flight.moved;
        let block = end / self.host.spb;
        let alone =
            !self.ops.values().any(|o| o.class == Class::FileWrite && o.blocks.contains(&block));
        let unit = if flight.buffered { PAGE } else { self.host.spb };
        let whole = (end - end % unit).saturating_sub(flight.sectors.start);
        if flight.error != 0 {
            flight.moved = whole;
        } else if !alone || flight.buffered {
            flight.moved = if whole > 0 { whole } else { flight.sectors.len() };
        }
    }

    pub(super) fn op_delay(&mut self) -> u64 {
        let high = if self.rng.chance(self.scenario.slow) { 40_000 } else { 1_500 };
        self.delay(20, high)
    }

    /// An operation goes on: one of its steps, or its end.
    pub(super) fn step(&mut self, key: u64) {
        let Some(mut flight) = self.ops.remove(&key) else { return };
        if flight.hold > 0 {
            let hold = std::mem::take(&mut flight.hold);
            self.ops.insert(key, flight);
            self.after(hold, Event::Step(key));
            return;
        }
        if flight.step == flight.class.steps() {
            self.end_op(key, &flight);
            return;
        }
        match flight.class {
            Class::RawRead | Class::RawWrite => self.raw_step(key, &flight),
            Class::FileRead => self.file_read_step(&mut flight),
            Class::FileWrite => self.file_write_step(key, &mut flight),
            Class::FileZeroes => self.file_zeroes_step(&mut flight),
            Class::SyncImage if flight.error == 0 => {
                self.host.fsync();
                if std::mem::take(&mut self.host.kept_stale) {
                    flight.error = EIO;
                }
            }
            Class::SyncDevice if flight.error == 0 => self.host.flush_disk(),
            Class::SyncImage | Class::SyncDevice => {}
        }
        flight.step += 1;
        self.ops.insert(key, flight);
        let delay = self.op_delay() / 2 + 1;
        self.after(delay, Event::Step(key));
    }

    fn end_op(&mut self, key: u64, flight: &InFlight) {
        self.host.disk.acknowledge(key);
        if flight.life != self.life || !self.alive {
            self.trace(|| format!("ghost of w{} ends: {:?}", flight.worker.0, flight.class));
            self.ghost_ended();
            return;
        }
        // What needs no memory says 0 when all of it is done.
        let bytes = if flight.buf.is_some() { flight.moved * 512 } else { 0 };
        let moved = i32::try_from(bytes).unwrap_or(i32::MAX);
        let result = if flight.error == 0 { moved } else { flight.error };
        self.trace(|| format!("w{} end {} = {result}", flight.worker.0, flight.id.0));
        self.deliver(flight.worker, Completion { id: flight.id, result });
    }

    /// A worker gets a completion.
    pub(super) fn deliver(&mut self, worker: WorkerId, done: Completion) {
        let Some(ended) = self.ended.get_mut(&worker) else { return };
        ended.push_back(done);
        if ended.len() == 1 {
            let delay = self.delay(1, 60);
            self.daemon_after(delay, Event::Reap(worker));
        }
    }
}
