// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations in flight: a fixed table, and what follows when one completes. A short transfer goes
//! on with its rest (R11), a read-modify-write with its write, a failure to the request.

use std::task::Poll;

use super::io::{BounceSlot, Buf, Io, Op, OpId, Tag, Target};
use super::message::ToKeeper;
use super::pace::Lane;
use super::plan::{Access, Piece, Route};
use super::units::{DeviceOffset, FileRange};
use super::worker::Worker;

/// The filesystem cannot do that; the core knows no libc.
pub(super) const EOPNOTSUPP: i32 = 95;

/// How often an operation is tried again that the kernel says to try again.
const RETRIES: u8 = 64;

/// An operation in flight and what it belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Running {
    /// A piece of a request.
    Piece(PieceOp),
    /// A sync: the image now, or already the device.
    Sync { image: bool, device: Option<DeviceOffset> },
}

/// A piece on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct PieceOp {
    tag: Tag,
    piece: Piece,
    write: bool,
    /// It writes zeros: no guest's bytes.
    zeroes: bool,
    /// Where the guest's bytes of the piece begin in its request's data.
    at: u64,
    bounce: Option<BounceSlot>,
    /// The first half of a read-modify-write.
    read_first: bool,
    /// Bytes of `unit` transferred in this half.
    done: u32,
    retries: u8,
}

impl Running {
    pub(super) const fn new(tag: Tag, piece: Piece, access: Access) -> Self {
        let at = piece.range.start - access.base;
        Self::Piece(PieceOp {
            tag,
            piece,
            write: access.write,
            zeroes: access.zeroes,
            at,
            bounce: None,
            read_first: false,
            done: 0,
            retries: 0,
        })
    }

    pub(super) const fn sync(image: bool, device: Option<DeviceOffset>) -> Self {
        Self::Sync { image, device }
    }

    /// Whether it is a piece of request `tag` that moves some of `unit`.
    pub(super) fn meets(&self, tag: Tag, unit: FileRange) -> bool {
        matches!(self, Self::Piece(op) if op.tag == tag && op.piece.unit.overlaps(&unit))
    }

    pub(super) const fn piece(&self) -> Option<&Piece> {
        match self {
            Self::Piece(op) => Some(&op.piece),
            Self::Sync { .. } => None,
        }
    }
}

/// A length the planner has bounded to 1 GiB.
fn length(range: FileRange) -> u32 {
    u32::try_from(range.len()).unwrap_or(u32::MAX)
}

impl PieceOp {
    const fn guest(&self) -> Buf {
        // Bounded by the planner, see `length`.
        #[allow(clippy::cast_possible_truncation)]
        Buf::Guest { tag: self.tag, at: self.at, len: self.piece.range.len() as u32 }
    }

    /// The part of the bounce buffer that holds the guest's bytes.
    fn window(&self, slot: BounceSlot) -> Buf {
        let skip = FileRange::new(self.piece.unit.start, self.piece.range.start);
        Buf::Bounce { slot, at: length(skip), len: length(self.piece.range) }
    }

    fn target(&self) -> Target {
        match self.piece.route {
            Route::Device(at) => Target::Device(at),
            Route::File | Route::Zero => Target::Image(self.piece.unit.start),
        }
    }

    const fn device(&self) -> Option<DeviceOffset> {
        match self.piece.route {
            Route::Device(at) => Some(at),
            Route::File | Route::Zero => None,
        }
    }

    const fn lane(&self) -> Lane {
        Lane::of(self.write, self.zeroes && !self.piece.bounce)
    }

    /// Zeros that need no memory.
    const fn by_reference(&self) -> bool {
        self.zeroes && self.bounce.is_none()
    }

    /// What is left of the current half.
    fn op(&self) -> Op {
        if self.by_reference() {
            return Op::Zeroes(self.target(), length(self.piece.unit));
        }
        let buf = match self.bounce {
            Some(slot) => Buf::Bounce { slot, at: 0, len: length(self.piece.unit) },
            None => self.guest(),
        };
        let (target, buf) = (self.target().plus(u64::from(self.done)), buf.skip(self.done));
        if self.write && !self.read_first { Op::Write(target, buf) } else { Op::Read(target, buf) }
    }

    /// What has to be planned again if the piece cannot go on. A bounced one starts over.
    fn rest(&self) -> FileRange {
        let range = self.piece.range;
        let done = if self.bounce.is_some() { 0 } else { u64::from(self.done) };
        FileRange::new(range.start + done, range.end)
    }
}

/// The operations of a worker.
#[derive(Debug)]
pub(super) struct OpTable {
    slots: Vec<Option<Running>>,
    free: Vec<OpId>,
    /// Operations that were done when they were submitted.
    ready: Vec<(OpId, i32)>,
}

impl OpTable {
    pub(super) fn new(count: u32) -> Self {
        Self {
            slots: (0..count).map(|_| None).collect(),
            free: (0..count).rev().map(OpId).collect(),
            ready: Vec::new(),
        }
    }

    pub(super) const fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Running> {
        self.slots.iter().flatten()
    }

    /// An operation that was done when it was submitted. They are worked off one after the
    /// other, not where they arise: a long request of such pieces must not recurse.
    pub(super) fn pop_ready(&mut self) -> Option<(OpId, i32)> {
        self.ready.pop()
    }

    pub(super) const fn any_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    fn put(&mut self, id: OpId, running: Running) {
        if let Some(slot) = self.slots.get_mut(id.0 as usize) {
            *slot = Some(running);
        }
    }

    fn take(&mut self, id: OpId) -> Option<Running> {
        self.slots.get_mut(id.0 as usize)?.take()
    }
}

impl Worker {
    /// Starts an operation; the caller has seen that there is room and a bounce buffer.
    pub(super) fn launch(&mut self, io: &mut impl Io, mut running: Running) {
        let Some(id) = self.ops.free.pop() else { return };
        if let Running::Piece(op) = &running
            && op.device().is_some()
        {
            self.pace(op.lane()).started(io.lately(), op.piece.unit.len());
        }
        if let Running::Piece(op) = &mut running
            && op.piece.bounce
        {
            op.bounce = self.bounce.pop();
            op.read_first = op.write && op.piece.partial();
            if op.write && !op.read_first {
                fill(io, op);
            }
        }
        self.start(io, id, running);
    }

    fn start(&mut self, io: &mut impl Io, id: OpId, running: Running) {
        let op = match &running {
            Running::Piece(op) => op.op(),
            Running::Sync { image: true, .. } => Op::SyncImage,
            Running::Sync { image: false, device: Some(at) } => {
                Op::SyncDevice(*at, self.geometry.dev_block)
            }
            Running::Sync { image: false, device: None } => {
                self.ops.free.push(id);
                return self.say(ToKeeper::Synced(0));
            }
        };
        self.ops.put(id, running);
        if let Poll::Ready(result) = io.submit(id, op) {
            self.ops.ready.push((id, result));
        }
    }

    /// An operation ended with the kernel's word `result`.
    pub(super) fn completed(&mut self, io: &mut impl Io, id: OpId, result: i32) {
        match self.ops.take(id) {
            None => debug_assert!(false, "{id:?} completed twice"),
            Some(Running::Sync { image, device }) => self.sync_step(io, id, image, device, result),
            Some(Running::Piece(op)) => self.piece_step(io, id, op, result),
        }
        if self.draining() {
            self.answer_parks();
        }
    }

    fn sync_step(
        &mut self,
        io: &mut impl Io,
        id: OpId,
        image: bool,
        device: Option<DeviceOffset>,
        result: i32,
    ) {
        if result == NOT_STARTED {
            self.start(io, id, Running::sync(image, device));
        } else if result < 0 {
            self.ops.free.push(id);
            self.say(ToKeeper::Synced(result.saturating_neg()));
        } else {
            let device = if image { device } else { None };
            self.start(io, id, Running::sync(false, device));
        }
    }

    fn piece_step(&mut self, io: &mut impl Io, id: OpId, mut op: PieceOp, result: i32) {
        if op.write && !op.read_first {
            self.wrote(op.device());
        }
        let left = length(op.piece.unit) - op.done;
        match u32::try_from(result) {
            Ok(_) if op.by_reference() => return self.half_done(io, id, op),
            Err(_) if again(result) && op.retries < RETRIES => {
                op.retries += 1;
                // Raw operations come back so as well when their lease has to be looked at again.
                self.forget_confirmation(op.device().is_some());
            }
            Err(_) if op.by_reference() => {
                // What writing them says is the answer: the kernel refuses this for reasons of its own, such as
                // pages of the device that it has yet to let go of.
                self.give_back(io, id, &op, false);
                return self.bounce_zeroes(io, op.tag, op.piece.range);
            }
            Ok(bytes) if bytes == left => return self.half_done(io, id, op),
            Ok(bytes) if bytes > 0 && bytes < left && self.moved_on(&mut op, bytes) => {}
            // An error, nothing at all, or more than was asked for.
            _ => return self.piece_end(io, id, &op, false),
        }
        self.go_on(io, id, op);
    }

    /// Takes in `bytes` of a transfer that ended early. A write goes on at a whole block of what
    /// caches its target, the device's page cache (ADR 0004) or the file's (R10a), and gives up if
    /// it never gets that far.
    fn moved_on(&self, op: &mut PieceOp, bytes: u32) -> bool {
        let before = op.done;
        op.done += bytes;
        if op.write && !op.read_first {
            // A unit begins with a whole block of either.
            let raw = op.device().is_some();
            op.done -=
                op.done % if raw { self.geometry.write_block } else { self.geometry.fs_block };
        }
        op.retries += u8::from(op.done == before);
        op.done > before || op.retries < RETRIES
    }

    /// Submits the rest of a half, if the lease still allows it.
    fn go_on(&mut self, io: &mut impl Io, id: OpId, op: PieceOp) {
        // It may be here because the time that was told last was too long ago.
        let now = io.now();
        if op.device().is_some() && !self.lease_ours(io, now) {
            self.give_back(io, id, &op, false);
            return self.piece_again(io, op.tag, op.rest());
        }
        self.start(io, id, Running::Piece(op));
    }

    fn half_done(&mut self, io: &mut impl Io, id: OpId, mut op: PieceOp) {
        if op.read_first {
            op.read_first = false;
            op.done = 0;
            fill(io, &op);
            return self.go_on(io, id, op);
        }
        if let (false, Some(slot)) = (op.write, op.bounce) {
            let _ = io.submit(OpId(u32::MAX), Op::Copy { from: op.window(slot), to: op.guest() });
        }
        self.piece_end(io, id, &op, true);
    }

    fn piece_end(&mut self, io: &mut impl Io, id: OpId, op: &PieceOp, ok: bool) {
        self.give_back(io, id, op, ok);
        self.piece_done(io, op.tag, ok);
    }

    fn give_back(&mut self, io: &impl Io, id: OpId, op: &PieceOp, ok: bool) {
        self.ops.free.push(id);
        self.bounce.extend(op.bounce);
        if op.device().is_some() {
            self.pace(op.lane()).ended(io.lately(), op.piece.unit.len(), ok);
        }
    }
}

/// Answers `range` of a read that begins at `base` with zeros.
pub(super) fn zero(io: &mut impl Io, tag: Tag, range: FileRange, base: u64) {
    let buf = Buf::Guest { tag, at: range.start - base, len: length(range) };
    let _ = io.submit(OpId(u32::MAX), Op::Zero(buf));
}

/// Puts the guest's bytes, or zeros, into the bounce buffer.
fn fill(io: &mut impl Io, op: &PieceOp) {
    if let Some(slot) = op.bounce {
        let window = op.window(slot);
        let fill =
            if op.zeroes { Op::Zero(window) } else { Op::Copy { from: op.guest(), to: window } };
        let _ = io.submit(OpId(u32::MAX), fill);
    }
}

/// ECANCELED, which only the [`Io`] itself says: the operation was not started. A flush may be asked for
/// again only then: an error of a flush is told once (R16).
const NOT_STARTED: i32 = -125;

/// Errors that say: the same again.
const fn again(result: i32) -> bool {
    // EINTR and EAGAIN; the core knows no libc.
    matches!(result, -4 | -11 | NOT_STARTED)
}
