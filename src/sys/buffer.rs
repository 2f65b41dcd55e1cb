// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that I/O goes to and comes from: the guest's, named by request, and the bounce pool.
//!
//! The guest changes its memory whenever it likes, so nothing here ever makes a reference or a
//! slice of it: pieces of memory are pointer and length, handed to the kernel or to `ptr::copy`.

mod bounce;

use std::ptr;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::engine::Tag;
use crate::engine::io::Buf;
pub(super) use bounce::BouncePool;

/// The guest's memory, as the frontend mapped it into this process.
pub type Memory = GuestMemoryMmap<()>;

/// Pieces a request's table keeps room for once it is done. A guest that sends longer lists pays
/// for them with allocations; it does not make us hold the memory for ever.
const KEEP_PIECES: usize = 256;

/// Pieces that the tables of all requests that are done keep room for together.
const KEEP_ALL: usize = 1 << 15;

/// The most requests one table serves: 64 queues of the largest size extentd allows and more.
const MAX_REQUESTS: usize = 1 << 17;

/// Why a request's data cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadAddress {
    /// A descriptor points outside the guest's memory.
    #[error("descriptor at {addr:#x}, {len} bytes, is not inside the guest's memory")]
    Outside {
        /// The descriptor's guest physical address.
        addr: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// The tag is beyond what any worker has requests for.
    #[error("request tag {tag} is out of range")]
    NoSuchTag {
        /// The tag.
        tag: u32,
    },
    /// I/O of an earlier request with the same tag is still in flight.
    #[error("request tag {tag} has I/O in flight")]
    InFlight {
        /// The tag.
        tag: u32,
    },
    /// Other requests have their data in another memory.
    #[error("requests of the memory before are not done")]
    OtherMemory,
}

/// A run of bytes in this process's address space. Plain numbers: whoever hands one out says how
/// long the memory stays.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// First byte.
    pub(super) base: *mut u8,
    /// Bytes; never 0 in what [`Spans`] yields.
    pub(super) len: usize,
}

impl Span {
    /// What is left after the first `bytes`, if anything is.
    fn after(self, bytes: usize) -> Option<Self> {
        let len = self.len.checked_sub(bytes).filter(|left| *left > 0)?;
        Some(Self { base: self.base.wrapping_add(bytes), len })
    }

    /// At most its first `bytes`.
    fn first(self, bytes: u64) -> Self {
        let len = usize::try_from(bytes).map_or(self.len, |bytes| self.len.min(bytes));
        Self { len, ..self }
    }
}

/// The spans that make up a [`Buf`], in order; together exactly as long as it.
#[derive(Clone, Debug)]
pub(super) struct Spans<'a> {
    head: Option<Span>,
    rest: std::slice::Iter<'a, Piece>,
    left: u64,
}

impl Spans<'_> {
    /// The span that is the whole buffer, if one is.
    pub(super) fn single(&self) -> Option<Span> {
        self.head.filter(|_| self.left == 0)
    }
}

impl Iterator for Spans<'_> {
    type Item = Span;

    fn next(&mut self) -> Option<Span> {
        if let Some(head) = self.head.take() {
            return Some(head);
        }
        if self.left == 0 {
            return None;
        }
        let span = self.rest.next()?.span.first(self.left);
        self.left -= span.len as u64;
        Some(span)
    }
}

/// A host-contiguous part of a request's data.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Where it starts in the request's data.
    start: u64,
    span: Span,
}

#[derive(Debug, Default)]
struct Request {
    /// The pieces are in the table's memory, which stays mapped for them.
    set: bool,
    pieces: Vec<Piece>,
    len: u64,
    in_flight: u32,
}

impl Request {
    /// Appends, joining what is contiguous in this process to one piece.
    fn push(&mut self, span: Span) {
        if span.len == 0 {
            return;
        }
        let start = self.len;
        self.len += span.len as u64;
        if let Some(Piece { span: last, .. }) = self.pieces.last_mut()
            && last.base.wrapping_add(last.len) == span.base
        {
            last.len += span.len;
            return;
        }
        self.pieces.push(Piece { start, span });
    }

    fn spans(&self, at: u64, len: u32) -> Option<Spans<'_>> {
        let left = u64::from(len);
        if at.checked_add(left)? > self.len {
            return None;
        }
        if left == 0 {
            return Some(Spans { head: None, rest: [].iter(), left });
        }
        // The first piece starts at 0, so there is always one at or before `at`.
        let first = self.pieces.partition_point(|piece| piece.start <= at).checked_sub(1)?;
        let (piece, rest) = self.pieces.get(first..)?.split_first()?;
        let skip = usize::try_from(at - piece.start).ok()?;
        let head = piece.span.after(skip)?.first(left);
        Some(Spans { head: Some(head), rest: rest.iter(), left: left - head.len as u64 })
    }
}

/// By [`Tag`]: where each request's data lies, and the guard that keeps it mapped.
///
/// A tag is set when its request is taken from the virtqueue and cleared when it has been
/// answered, by which time none of its I/O is in flight any more (R22). The ring counts what it
/// has in flight per tag; neither [`set`](Self::set) nor [`clear`](Self::clear) lets go of memory
/// the kernel may still touch.
#[derive(Debug)]
pub struct GuestBuffers {
    requests: Vec<Request>,
    /// What all tags that are set have their data in, as long as there is one: taken and let go of once for many
    /// requests, since counting is an exchange with other CPUs.
    memory: Option<Arc<Memory>>,
    /// How many tags are set.
    set: usize,
    /// How many pieces they have together.
    pieces: usize,
    /// How many pieces the tags that are not set have room for.
    kept: usize,
}

impl GuestBuffers {
    /// A table with room for tags below `max_requests`, none of them set. A larger tag makes it
    /// grow once.
    #[must_use]
    pub fn new(max_requests: u32) -> Self {
        let requests = (0..max_requests).map(|_| Request::default()).collect();
        Self { requests, memory: None, set: 0, pieces: 0, kept: 0 }
    }

    /// Says that request `tag`'s data are these `(address, bytes)` pieces of `memory`, in order,
    /// and keeps `memory` mapped until [`clear`](Self::clear) or the next `set`. Whether the data
    /// can be used without bouncing is the answer: true if every part of it that is contiguous in
    /// this process begins and ends at a multiple of `mem_align` (a power of two, in bytes).
    ///
    /// # Errors
    ///
    /// [`BadAddress`]; the tag is not set then.
    pub fn set(
        &mut self,
        tag: Tag,
        memory: &Arc<Memory>,
        pieces: &[(GuestAddress, u32)],
        mem_align: u32,
    ) -> Result<bool, BadAddress> {
        self.make_room(tag);
        if self.request(tag).is_some_and(|request| request.in_flight > 0) {
            return Err(BadAddress::InFlight { tag: tag.0 });
        }
        self.clear(tag);
        if self.memory.as_ref().is_some_and(|held| !Arc::ptr_eq(held, memory)) {
            return Err(BadAddress::OtherMemory);
        }
        let Some(request) = self.request_mut(tag) else {
            return Err(BadAddress::NoSuchTag { tag: tag.0 });
        };
        let room = request.pieces.capacity();
        for &(addr, len) in pieces {
            let outside = BadAddress::Outside { addr: addr.0, len };
            let bytes = usize::try_from(len).map_err(|_| outside)?;
            if let Ok(slice) = memory.get_slice(addr, bytes) {
                let base = slice.ptr_guard_mut().as_ptr();
                request.push(Span { base, len: slice.len() });
                continue;
            }
            // A descriptor may run on from one region into the next one.
            for slice in memory.get_slices(addr, bytes) {
                let Ok(slice) = slice else {
                    self.kept -= room;
                    self.empty(tag);
                    return Err(outside);
                };
                let base = slice.ptr_guard_mut().as_ptr();
                request.push(Span { base, len: slice.len() });
            }
        }
        request.set = true;
        let mask = usize::try_from(mem_align).map_or(usize::MAX, |align| align.saturating_sub(1));
        let fit = |piece: &Piece| (piece.span.base.addr() | piece.span.len) & mask == 0;
        let fit = request.pieces.iter().all(fit);
        let pieces = request.pieces.len();
        self.kept -= room;
        self.pieces += pieces;
        self.set += 1;
        self.memory.get_or_insert_with(|| Arc::clone(memory));
        Ok(fit)
    }

    /// How many pieces of memory the requests have their data in.
    #[must_use]
    pub const fn pieces(&self) -> usize {
        self.pieces
    }

    /// Whether no tag is set.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        self.set == 0
    }

    /// Forgets request `tag` and lets go of its memory.
    ///
    /// All its operations must have completed. If one has not, that is a bug of the caller's, and
    /// the memory stays as it is: better held too long than unmapped under the kernel's hands.
    pub fn clear(&mut self, tag: Tag) {
        let Some(request) = self.request_mut(tag) else { return };
        debug_assert_eq!(request.in_flight, 0, "{tag:?} cleared with I/O in flight");
        if request.in_flight > 0 {
            return;
        }
        if std::mem::take(&mut request.set) {
            let pieces = request.pieces.len();
            self.empty(tag);
            self.pieces -= pieces;
            self.set -= 1;
            if self.set == 0 {
                self.memory = None;
            }
        }
    }

    /// Forgets the pieces of a request that is not set. Room for them is kept within bounds, so that long lists cost
    /// memory only while there are some.
    fn empty(&mut self, tag: Tag) {
        let kept = self.kept;
        let Some(request) = self.request_mut(tag) else { return };
        request.pieces.clear();
        request.len = 0;
        let room = request.pieces.capacity();
        if room > KEEP_PIECES || kept + room > KEEP_ALL {
            request.pieces = Vec::new();
        } else {
            self.kept += room;
        }
    }

    /// Counts an operation in flight on `tag`'s data.
    pub(super) fn pin(&mut self, tag: Tag) {
        if let Some(request) = self.request_mut(tag) {
            request.in_flight += 1;
        }
    }

    /// Takes back one [`pin`](Self::pin).
    pub(super) fn unpin(&mut self, tag: Tag) {
        if let Some(request) = self.request_mut(tag) {
            debug_assert_ne!(request.in_flight, 0, "{tag:?} unpinned too often");
            request.in_flight = request.in_flight.saturating_sub(1);
        }
    }

    /// Lets go of nothing, ever: for when the kernel may still write there and cannot be waited
    /// for.
    fn leak(&mut self) {
        std::mem::forget(self.memory.take());
    }

    fn make_room(&mut self, tag: Tag) {
        if let Ok(index) = usize::try_from(tag.0)
            && (self.requests.len()..MAX_REQUESTS).contains(&index)
        {
            self.requests.resize_with(index + 1, Request::default);
        }
    }

    fn request(&self, tag: Tag) -> Option<&Request> {
        self.requests.get(usize::try_from(tag.0).ok()?)
    }

    fn request_mut(&mut self, tag: Tag) -> Option<&mut Request> {
        self.requests.get_mut(usize::try_from(tag.0).ok()?)
    }
}

/// All memory a ring's operations may name.
#[derive(Debug)]
pub(super) struct Buffers {
    pub(super) guests: GuestBuffers,
    pub(super) bounce: BouncePool,
}

impl Buffers {
    /// Keeps all of it mapped for as long as the process lives: the kernel may still use it and
    /// cannot be waited for.
    pub(super) fn leak(&mut self) {
        self.guests.leak();
        self.bounce.leak();
    }

    /// Where `buf` lies; `None` if a byte of it is outside what it names. The memory stays as long
    /// as the tag stays set, or the pool lives.
    pub(super) fn spans(&self, buf: Buf) -> Option<Spans<'_>> {
        match buf {
            Buf::Guest { tag, at, len } => self.guests.request(tag)?.spans(at, len),
            Buf::Bounce { slot, at, len } => {
                let head = self.bounce.span(slot, at, len)?;
                let head = Some(head).filter(|span| span.len > 0);
                Some(Spans { head, rest: [].iter(), left: 0 })
            }
        }
    }

    /// Zeroes `buf`; `None`, and nothing is touched, if it is not valid.
    pub(super) fn zero(&mut self, buf: Buf) -> Option<()> {
        for span in self.spans(buf)? {
            // SAFETY: `spans` checked that the span lies inside the guest memory that the tag's
            // guard keeps mapped, or inside the pool; `self` is borrowed, so neither goes away. The
            // guest may write there meanwhile: no reference is made, and any bytes will do.
            unsafe { ptr::write_bytes(span.base, 0, span.len) };
        }
        Some(())
    }

    /// Copies `from` to `to`; `None`, and nothing is touched, if one is not valid or they differ
    /// in length. A hostile guest's buffers may overlap: the bytes are then whatever they are.
    pub(super) fn copy(&mut self, from: Buf, to: Buf) -> Option<()> {
        if from.len() != to.len() {
            return None;
        }
        let mut sources = self.spans(from)?;
        let mut targets = self.spans(to)?;
        let (mut source, mut target) = (sources.next(), targets.next());
        while let (Some(src), Some(dst)) = (source, target) {
            let bytes = src.len.min(dst.len);
            // SAFETY: both are at least `bytes` long and lie inside memory that `self` keeps mapped
            // (see `zero`); `ptr::copy` allows them to overlap.
            unsafe { ptr::copy(src.base, dst.base, bytes) };
            source = src.after(bytes).or_else(|| sources.next());
            target = dst.after(bytes).or_else(|| targets.next());
        }
        Some(())
    }
}

#[cfg(test)]
#[path = "buffer_tests.rs"]
mod tests;
