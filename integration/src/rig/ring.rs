// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A split virtqueue made by hand: nothing stops its user from putting nonsense in it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::wait;

/// The descriptor continues at its `next`.
pub const NEXT: u16 = 1;
/// The device writes the buffer.
pub const WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const INDIRECT: u16 = 4;

/// `struct virtq_desc`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next descriptor's index.
    pub next: u16,
}

// SAFETY: plain integers without padding (8 + 4 + 2 + 2 bytes), so every byte pattern is a value and every byte is initialised.
unsafe impl ByteValued for Descriptor {}

/// Guest memory given to each ring: its parts, then room for headers and data.
pub const RING_MEMORY: u64 = 4 << 20;
const AVAIL: u64 = 64 << 10;
const USED: u64 = 128 << 10;
/// Headers and status bytes, one 32-byte place per descriptor.
const HEADERS: u64 = 256 << 10;
const DATA: u64 = 1 << 20;
/// The data place of each descriptor.
pub const SLOT: u64 = 16 << 10;

/// One element of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// The chain's head.
    pub id: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// A ring in the memory at `base`, with its eventfds.
#[derive(Debug)]
pub struct Ring {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    /// Where the device is told of new chains.
    pub kick: EventFd,
    /// Where the device tells of used ones.
    pub call: EventFd,
    /// The device says what went wrong here.
    pub err: EventFd,
    next_avail: u16,
    next_used: u16,
}

impl Ring {
    pub(super) fn new(memory: GuestMemoryMmap, base: u64, size: u16) -> io::Result<Ring> {
        let (kick, call, err) =
            (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        Ok(Ring { memory, base, size, kick, call, err, next_avail: 0, next_used: 0 })
    }

    /// Descriptors in its table.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest address of the descriptor table.
    pub fn table(&self) -> u64 {
        self.base
    }

    /// Guest address of the available ring.
    pub fn avail(&self) -> u64 {
        self.base + AVAIL
    }

    /// Guest address of the used ring.
    pub fn used(&self) -> u64 {
        self.base + USED
    }

    /// Guest address for the header of chain `head`; the status byte has its place 16 bytes after it.
    pub fn header(&self, head: u16) -> u64 {
        self.base + HEADERS + u64::from(head) * 32
    }

    /// Guest address of [`SLOT`] bytes for the data of chain `head` (below 192).
    pub fn data(&self, head: u16) -> u64 {
        self.base + DATA + u64::from(head) * SLOT
    }

    /// The index the next published chain gets.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Both indices, as if the ring had started there.
    pub fn start_at(&mut self, avail: u16, used: u16) {
        (self.next_avail, self.next_used) = (avail, used);
    }

    /// Writes descriptor `index`.
    pub fn describe(&self, index: u16, descriptor: Descriptor) -> io::Result<()> {
        self.put(descriptor, self.base + u64::from(index) * 16)
    }

    /// Writes a request's header.
    pub fn write_header(&self, head: u16, kind: u32, sector: u64) -> io::Result<()> {
        let at = self.header(head);
        self.put(kind, at)?;
        self.put(0_u32, at + 4)?;
        self.put(sector, at + 8)?;
        self.put(0xff_u8, at + 16)
    }

    /// The status byte of chain `head`: 0xff until the device writes it.
    pub fn status(&self, head: u16) -> io::Result<u8> {
        self.memory.read_obj(GuestAddress(self.header(head) + 16)).map_err(io::Error::other)
    }

    /// Describes header, data (if any) and status in descriptors `head`, `head + 1`, `head + 2`, the usual way.
    pub fn prepare(
        &self,
        head: u16,
        kind: u32,
        sector: u64,
        data: u32,
        from_device: bool,
    ) -> io::Result<()> {
        self.write_header(head, kind, sector)?;
        let status = Descriptor { addr: self.header(head) + 16, len: 1, flags: WRITE, next: 0 };
        self.describe(
            head,
            Descriptor { addr: self.header(head), len: 16, flags: NEXT, next: head + 1 },
        )?;
        if data == 0 {
            return self.describe(head + 1, status);
        }
        let flags = if from_device { NEXT | WRITE } else { NEXT };
        self.describe(
            head + 1,
            Descriptor { addr: self.data(head), len: data, flags, next: head + 2 },
        )?;
        self.describe(head + 2, status)
    }

    /// Makes chain `head` available, without a kick.
    pub fn publish(&mut self, head: u16) -> io::Result<()> {
        let slot = u64::from(self.next_avail % self.size);
        self.put(head, self.avail() + 4 + slot * 2)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_index(self.next_avail)
    }

    /// Writes the available index as it is given.
    pub fn set_avail_index(&self, index: u16) -> io::Result<()> {
        self.memory
            .store(index, GuestAddress(self.avail() + 2), Ordering::SeqCst)
            .map_err(io::Error::other)
    }

    /// Kicks, whether the device asked for it or not.
    pub fn kick(&self) -> io::Result<()> {
        self.kick.write(1)
    }

    /// The used index in memory.
    pub fn used_index(&self) -> io::Result<u16> {
        self.memory.load(GuestAddress(self.used() + 2), Ordering::SeqCst).map_err(io::Error::other)
    }

    /// The next used element, if there is one.
    pub fn take_used(&mut self) -> io::Result<Option<Used>> {
        if self.used_index()? == self.next_used {
            return Ok(None);
        }
        let at = self.used() + 4 + u64::from(self.next_used % self.size) * 8;
        let id = self.memory.read_obj(GuestAddress(at)).map_err(io::Error::other)?;
        let len = self.memory.read_obj(GuestAddress(at + 4)).map_err(io::Error::other)?;
        self.next_used = self.next_used.wrapping_add(1);
        // With EVENT_IDX: tell me of the next one.
        self.put(self.next_used, self.avail() + 4 + u64::from(self.size) * 2)?;
        Ok(Some(Used { id, len }))
    }

    /// Waits for the next used element *and* for the call that announces it.
    pub fn wait_used(&mut self, limit: Duration) -> io::Result<Used> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(used) = self.take_used()? {
                return Ok(used);
            }
            if !self.called(deadline.saturating_duration_since(Instant::now()))? {
                let lost = self.take_used()?.is_some();
                let what = if lost { "used without a call" } else { "not answered" };
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
        }
    }

    /// Waits for a call and consumes it.
    pub fn called(&self, limit: Duration) -> io::Result<bool> {
        let ready = wait::readable(self.call_fd(), limit)?;
        if ready {
            self.call.read()?;
        }
        Ok(ready)
    }

    /// The eventfd of the calls.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is `self.call`'s, which outlives this borrow.
        unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) }
    }

    /// Writes bytes into guest memory.
    pub fn write_bytes(&self, bytes: &[u8], addr: u64) -> io::Result<()> {
        self.memory.write_slice(bytes, GuestAddress(addr)).map_err(io::Error::other)
    }

    /// Reads bytes from guest memory.
    pub fn read_bytes(&self, addr: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(addr)).map_err(io::Error::other)?;
        Ok(bytes)
    }

    fn put<T: ByteValued>(&self, value: T, addr: u64) -> io::Result<()> {
        self.memory.write_obj(value, GuestAddress(addr)).map_err(io::Error::other)
    }
}
