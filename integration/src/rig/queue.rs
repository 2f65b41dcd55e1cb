// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtqueue of the well-behaved frontend.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_driver::{EventFd, QueueNotifier, VirtioBlkQueue, iovec};
use vm_memory::VolatileMemory;

use super::client::{ClientOptions, Shared};
use super::random::Random;
use super::wait;

/// Room in a slot for the gaps of its pieces.
const SLACK: usize = 16 << 10;
const MAX_PIECES: usize = 6;

/// A request to the disk; offsets are bytes and multiples of 512.
#[derive(Debug, Clone, Copy)]
pub enum Request<'a> {
    /// Reads so many bytes.
    Read {
        /// The first byte.
        offset: u64,
        /// How many.
        len: usize,
    },
    /// Writes the bytes.
    Write {
        /// The first byte.
        offset: u64,
        /// What to write.
        data: &'a [u8],
    },
    /// Tells that the bytes are not needed.
    Discard {
        /// The first byte.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Makes the bytes zero.
    WriteZeroes {
        /// The first byte.
        offset: u64,
        /// How many.
        len: u64,
        /// Whether their space may be given up.
        unmap: bool,
    },
    /// Makes every completed write durable.
    Flush,
}

/// How a request's data lies in guest memory: pieces in order, each after a gap.
#[derive(Debug, Clone, Default)]
pub struct Shape(Vec<(usize, usize)>);

impl Shape {
    /// One page-aligned piece.
    pub fn whole() -> Shape {
        Shape::default()
    }

    /// Up to six pieces of whole sectors, at addresses that are multiples of `align`.
    pub fn sectors(random: &mut Random, len: usize, align: usize) -> Shape {
        Shape::cut(random, len, 512, align)
    }

    /// Up to six pieces of any length at any address, as the specification allows.
    pub fn odd(random: &mut Random, len: usize) -> Shape {
        Shape::cut(random, len, 1, 1)
    }

    fn cut(random: &mut Random, len: usize, unit: usize, align: usize) -> Shape {
        let units = len / unit;
        let mut cuts: Vec<usize> =
            (0..random.index(MAX_PIECES)).map(|_| random.index(units.max(1)) * unit).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.dedup();
        let gaps = (2048 / align).max(1);
        let lengths = cuts.iter().zip(cuts.iter().skip(1)).map(|(from, to)| to - from);
        Shape(lengths.map(|len| (random.index(gaps) * align, len)).collect())
    }

    /// Offsets and lengths in the slot for `len` bytes of data.
    fn pieces(&self, len: usize) -> Vec<(usize, usize)> {
        if self.0.is_empty() {
            return vec![(0, len)];
        }
        let mut at = 0;
        let mut pieces = Vec::with_capacity(self.0.len());
        for &(gap, len) in &self.0 {
            // Pieces start on a fresh 512 bytes plus their gap, so that the gap alone decides their alignment.
            at = usize::next_multiple_of(at, 512) + gap;
            pieces.push((at, len));
            at += len;
        }
        pieces
    }
}

/// A completed request.
#[derive(Debug)]
pub struct Done {
    /// The caller's name for it.
    pub token: u64,
    /// What was read (nothing for other requests), or the status as an error.
    pub result: io::Result<Vec<u8>>,
}

pub(super) struct InFlight {
    slot: usize,
    token: u64,
    pieces: Vec<(usize, usize)>,
    read: bool,
}

/// One queue, to be used by one thread.
pub struct Queue {
    ring: VirtioBlkQueue<'static, InFlight>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    free: Vec<usize>,
    in_flight: usize,
    slot_size: usize,
    base: usize,
    limit: Duration,
    /// Last: the ring lies in its memory.
    shared: Arc<Shared>,
}

impl Queue {
    /// Bytes of guest memory a queue needs for its data.
    pub(super) fn memory_needed(options: &ClientOptions) -> usize {
        (options.max_request + SLACK).next_multiple_of(4096) * options.depth
    }

    pub(super) fn new(
        index: usize,
        mut ring: VirtioBlkQueue<'static, InFlight>,
        shared: Arc<Shared>,
        base: usize,
        options: &ClientOptions,
    ) -> io::Result<Queue> {
        ring.set_used_notif_enabled(true);
        let (notifier, call) = shared
            .with(|transport| {
                (transport.get_submission_notifier(index), transport.get_completion_fd(index))
            })
            .ok_or(io::ErrorKind::NotConnected)?;
        let slot_size = (options.max_request + SLACK).next_multiple_of(4096);
        let free = (0..options.depth).rev().collect();
        Ok(Queue {
            ring,
            notifier,
            call,
            free,
            in_flight: 0,
            slot_size,
            base,
            limit: options.limit,
            shared,
        })
    }

    /// Requests submitted and not yet returned by [`Queue::wait`] or [`Queue::collect`].
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Puts a request on the ring without telling the device. `WouldBlock`: the queue is full.
    pub fn submit(&mut self, request: Request<'_>, shape: &Shape, token: u64) -> io::Result<()> {
        let len = match request {
            Request::Read { len, .. } => len,
            Request::Write { data, .. } => data.len(),
            Request::Discard { .. } | Request::WriteZeroes { .. } | Request::Flush => 0,
        };
        let pieces = shape.pieces(len);
        if pieces.last().is_some_and(|(at, len)| at + len > self.slot_size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the request is larger than a slot",
            ));
        }
        let slot = self.free.pop().ok_or(io::ErrorKind::WouldBlock)?;
        let start = self.base + slot * self.slot_size;
        let address = self.shared.memory.as_ptr() as usize + start;
        let vectors: Vec<iovec> = pieces
            .iter()
            .map(|(at, len)| iovec { iov_base: (address + at) as *mut c_void, iov_len: *len })
            .collect();
        if let Request::Write { data, .. } = request {
            self.scatter(start, &pieces, data)?;
        }
        let read = matches!(request, Request::Read { .. });
        let context = InFlight { slot, token, pieces, read };
        let result = match request {
            Request::Read { offset, .. } => {
                // SAFETY: `vectors` lives across the call, which copies it; what it names lies in `shared.memory`, mapped as
                // long as this queue exists, and in a slot no other request has until this one completes.
                unsafe { self.ring.readv(offset, vectors.as_ptr(), vectors.len(), context) }
            }
            Request::Write { offset, .. } => {
                // SAFETY: as for the read above.
                unsafe { self.ring.writev(offset, vectors.as_ptr(), vectors.len(), context) }
            }
            Request::Discard { offset, len } => self.ring.discard(offset, len, context),
            Request::WriteZeroes { offset, len, unmap } => {
                self.ring.write_zeroes(offset, len, unmap, context)
            }
            Request::Flush => self.ring.flush(context),
        };
        match result {
            Ok(()) => {
                self.in_flight += 1;
                Ok(())
            }
            Err(error) => {
                self.free.push(slot);
                // The driver has no kind of its own for "no descriptors left".
                let full = error.to_string().contains("free descriptors");
                Err(if full { io::ErrorKind::WouldBlock.into() } else { error })
            }
        }
    }

    /// Tells the device, if it wants to be told.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.ring.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    /// What has completed, without waiting.
    pub fn collect(&mut self) -> io::Result<Vec<Done>> {
        let finished: Vec<(InFlight, i32)> =
            self.ring.completions().map(|c| (c.context, c.ret)).collect();
        let mut done = Vec::with_capacity(finished.len());
        for (request, ret) in finished {
            let start = self.base + request.slot * self.slot_size;
            let result = match ret {
                0 if request.read => self.gather(start, &request.pieces),
                0 => Ok(Vec::new()),
                error => Err(io::Error::from_raw_os_error(-error)),
            };
            self.free.push(request.slot);
            self.in_flight -= 1;
            done.push(Done { token: request.token, result });
        }
        Ok(done)
    }

    /// Waits for at least one completion. A hang, and a completion without a call, are errors.
    pub fn wait(&mut self) -> io::Result<Vec<Done>> {
        let deadline = Instant::now() + self.limit;
        loop {
            let done = self.collect()?;
            if !done.is_empty() {
                return Ok(done);
            }
            if self.in_flight == 0 {
                return Err(io::Error::other("nothing is in flight"));
            }
            // SAFETY: the descriptor is open as long as `self.call`, which outlives this borrow.
            let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
            if wait::readable(call, deadline.saturating_duration_since(Instant::now()))? {
                self.call.read()?;
            } else if self.collect()?.is_empty() {
                let what =
                    format!("{} requests not answered within {:?}", self.in_flight, self.limit);
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            } else {
                return Err(io::Error::other(
                    "requests completed, but the call eventfd was not signalled",
                ));
            }
        }
    }

    /// What completes within `limit`, if anything does; for a device that may be gone.
    pub fn wait_at_most(&mut self, limit: Duration) -> io::Result<Vec<Done>> {
        let done = self.collect()?;
        if !done.is_empty() {
            return Ok(done);
        }
        // SAFETY: the descriptor is open as long as `self.call`, which outlives this borrow.
        let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        if wait::readable(call, limit)? {
            self.call.read()?;
        }
        self.collect()
    }

    /// Waits until nothing is in flight.
    pub fn drain(&mut self) -> io::Result<Vec<Done>> {
        let mut done = Vec::new();
        while self.in_flight > 0 {
            done.extend(self.wait()?);
        }
        Ok(done)
    }

    /// One request from submission to completion; nothing else may be in flight.
    pub fn once(&mut self, request: Request<'_>, shape: &Shape) -> io::Result<Vec<u8>> {
        if self.in_flight > 0 {
            return Err(io::Error::other("other requests are in flight"));
        }
        self.submit(request, shape, 0)?;
        self.kick()?;
        let mut done = self.wait()?;
        done.pop().ok_or(io::ErrorKind::UnexpectedEof)?.result
    }

    /// Reads `len` bytes at `offset`.
    pub fn read_at(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.once(Request::Read { offset, len }, &Shape::whole())
    }

    /// Writes `data` at `offset`.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.once(Request::Write { offset, data }, &Shape::whole()).map(drop)
    }

    /// Flushes.
    pub fn flush(&mut self) -> io::Result<()> {
        self.once(Request::Flush, &Shape::whole()).map(drop)
    }

    fn scatter(&self, start: usize, pieces: &[(usize, usize)], data: &[u8]) -> io::Result<()> {
        let mut rest = data;
        for (at, len) in pieces {
            let (piece, tail) = rest.split_at_checked(*len).ok_or(io::ErrorKind::InvalidInput)?;
            let slice = self.shared.memory.get_slice(start + at, *len).map_err(io::Error::other)?;
            slice.copy_from(piece);
            rest = tail;
        }
        Ok(())
    }

    fn gather(&self, start: usize, pieces: &[(usize, usize)]) -> io::Result<Vec<u8>> {
        let mut data = Vec::new();
        for (at, len) in pieces {
            let slice = self.shared.memory.get_slice(start + at, *len).map_err(io::Error::other)?;
            let mut piece = vec![0_u8; *len];
            slice.copy_to(&mut piece);
            data.append(&mut piece);
        }
        Ok(data)
    }
}
