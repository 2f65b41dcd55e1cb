// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A descriptor chain, taken apart: header, data, status byte (virtio 1.3, 2.7 and 5.2.6).
//!
//! The driver may cut a request into descriptors as it likes, so only the order counts: bytes the
//! device reads (16 of header, then data), then bytes it writes (data, then one of status). Every
//! descriptor is read from guest memory once for that.

use std::mem::size_of;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

use super::Memory;
use crate::engine::request::Header;
use crate::engine::units::SECTOR;

/// Descriptors in one chain, at most. More than is advertised, because drivers exceed that; what
/// is left is what one vectored read takes.
pub const MAX_DESCRIPTORS: u32 = 1024;

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: usize = size_of::<Descriptor>();

/// A piece of guest memory: where, and how many bytes (never 0).
pub type Piece = (GuestAddress, u32);

/// Why a chain could not be understood. Its request is returned with nothing written, since it
/// is not known where its status byte would be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Malformed {
    /// A descriptor index not below the table's size.
    #[error("descriptor index {index} in a table of {entries}")]
    Index {
        /// The index.
        index: u16,
        /// The table's size.
        entries: u32,
    },
    /// The table is not in guest memory.
    #[error("descriptor table entry outside of guest memory")]
    Unreadable,
    /// The chain has a loop, or is longer than its table or than [`MAX_DESCRIPTORS`].
    #[error("chain too long")]
    TooLong,
    /// An indirect table that is empty, of broken size, inside another, or not alone.
    #[error("bad indirect descriptor")]
    Indirect,
    /// A device-readable descriptor behind a device-writable one.
    #[error("readable descriptor after a writable one")]
    Order,
    /// More than 2^32 bytes (virtio 1.3, 2.7.5.2).
    #[error("chain of more than 4 GiB")]
    TooBig,
    /// No byte the device may write.
    #[error("no status byte")]
    NoStatus,
}

/// A table of descriptors: a queue's own, or an indirect one.
#[derive(Debug)]
pub struct Table<'a> {
    memory: &'a Memory,
    start: GuestAddress,
    entries: u32,
    /// The whole table at once, unless it spans memory regions.
    slice: Option<VolatileSlice<'a>>,
}

impl<'a> Table<'a> {
    /// The table of `entries` descriptors at `start`.
    #[must_use]
    pub fn new(memory: &'a Memory, start: GuestAddress, entries: u32) -> Self {
        let bytes = usize::try_from(entries).unwrap_or(0).saturating_mul(DESCRIPTOR_BYTES);
        let slice = GuestMemoryBackend::get_slice(memory, start, bytes).ok();
        Self { memory, start, entries, slice }
    }

    fn descriptor(&self, index: u16) -> Result<Descriptor, Malformed> {
        if u32::from(index) >= self.entries {
            return Err(Malformed::Index { index, entries: self.entries });
        }
        let at = usize::from(index) * DESCRIPTOR_BYTES;
        if let Some(slice) = &self.slice {
            let entry = slice.get_ref::<Descriptor>(at).map_err(|_| Malformed::Unreadable)?;
            return Ok(entry.load());
        }
        let at = u64::from(index) * DESCRIPTOR_BYTES as u64;
        let address = self.start.checked_add(at).ok_or(Malformed::Unreadable)?;
        self.memory.read_obj(address).map_err(|_| Malformed::Unreadable)
    }

    /// Where on the disk the request at `head` begins, in bytes, if that is easily seen: a guess that nothing but time may depend
    /// on. Only [`Chain::parse`] says what is asked for, and the guest may have written something else there until then.
    #[must_use]
    pub fn glimpse(&self, head: u16) -> Option<u64> {
        /// Where the sector stands in the header (virtio 1.3, 5.2.6).
        const PLACE: u64 = 8;
        let mut first = self.descriptor(head).ok()?;
        if u32::from(first.flags()) & VRING_DESC_F_INDIRECT != 0 {
            first = self.memory.read_obj(first.addr()).ok()?;
        }
        let sector: u64 = self.memory.read_obj(first.addr().checked_add(PLACE)?).ok()?;
        u64::from_le(sector).checked_mul(SECTOR)
    }
}

/// What a chain is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parts {
    /// The header; `None` if there are fewer than 16 readable bytes, or not in guest memory.
    pub header: Option<Header>,
    /// Where the status byte goes. Not checked against guest memory.
    pub status: GuestAddress,
    /// Bytes of data the device may read.
    pub readable: u64,
    /// Bytes of data the device may write.
    pub writable: u64,
}

/// Takes chains apart; its buffers are used again for each.
#[derive(Debug, Default)]
pub struct Chain {
    readable: Vec<Piece>,
    /// Pieces of `readable` that were all header.
    skip: usize,
    writable: Vec<Piece>,
}

impl Chain {
    /// Takes the chain at `head` apart.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn parse(&mut self, table: &Table<'_>, head: u16) -> Result<Parts, Malformed> {
        self.readable.clear();
        self.writable.clear();
        self.skip = 0;
        let first = table.descriptor(head)?;
        if first.flags() & flag(VRING_DESC_F_INDIRECT) != 0 {
            let indirect = indirect(table.memory, &first)?;
            self.walk(&indirect, indirect.descriptor(0)?)?;
        } else {
            self.walk(table, first)?;
        }
        let status = self.split_status().ok_or(Malformed::NoStatus)?;
        let header = self.split_header(table.memory);
        Ok(Parts {
            header,
            status,
            readable: total(self.readable_data()),
            writable: total(&self.writable),
        })
    }

    /// The data the device may read, in order: what stands behind the header.
    #[must_use]
    pub fn readable_data(&self) -> &[Piece] {
        self.readable.get(self.skip..).unwrap_or_default()
    }

    /// The data the device may write, in order: all but the status byte.
    #[must_use]
    pub fn writable_data(&self) -> &[Piece] {
        &self.writable
    }

    /// Collects the pieces of a chain that begins with `descriptor` and goes on in `table`.
    ///
    /// An indirect descriptor is understood only where it is the whole chain, which is the only
    /// way drivers use one (virtio 1.3, 2.7.5.3.1).
    fn walk(&mut self, table: &Table<'_>, mut descriptor: Descriptor) -> Result<(), Malformed> {
        let mut left = table.entries.min(MAX_DESCRIPTORS);
        let mut bytes = 0u32;
        loop {
            left = left.checked_sub(1).ok_or(Malformed::TooLong)?;
            if descriptor.flags() & flag(VRING_DESC_F_INDIRECT) != 0 {
                return Err(Malformed::Indirect);
            }
            bytes = bytes.checked_add(descriptor.len()).ok_or(Malformed::TooBig)?;
            self.push(&descriptor)?;
            if descriptor.flags() & flag(VRING_DESC_F_NEXT) == 0 {
                return Ok(());
            }
            descriptor = table.descriptor(descriptor.next())?;
        }
    }

    fn push(&mut self, descriptor: &Descriptor) -> Result<(), Malformed> {
        let piece = (descriptor.addr(), descriptor.len());
        let writable = descriptor.flags() & flag(VRING_DESC_F_WRITE) != 0;
        if !writable && !self.writable.is_empty() {
            return Err(Malformed::Order);
        }
        if piece.1 != 0 {
            if writable { self.writable.push(piece) } else { self.readable.push(piece) }
        }
        Ok(())
    }

    /// Cuts the last writable byte off.
    fn split_status(&mut self) -> Option<GuestAddress> {
        let (start, len) = self.writable.last_mut()?;
        *len = len.checked_sub(1)?;
        let status = start.checked_add(u64::from(*len))?;
        if *len == 0 {
            self.writable.pop();
        }
        Some(status)
    }

    /// Cuts the first 16 readable bytes off and reads them.
    fn split_header(&mut self, memory: &Memory) -> Option<Header> {
        let mut header = [0u8; Header::BYTES];
        let mut rest = header.as_mut_slice();
        for (start, len) in &mut self.readable {
            let take = rest.len().min(usize::try_from(*len).ok()?);
            let (now, later) = std::mem::take(&mut rest).split_at_mut(take);
            read(memory, *start, now)?;
            rest = later;
            let taken = u32::try_from(take).ok()?;
            *len -= taken;
            *start = start.checked_add(u64::from(taken))?;
            if *len == 0 {
                self.skip += 1;
            }
            if rest.is_empty() {
                break;
            }
        }
        rest.is_empty().then(|| Header::of(header))
    }
}

/// Reads guest memory into `bytes`.
fn read(memory: &Memory, start: GuestAddress, bytes: &mut [u8]) -> Option<()> {
    if let Ok(whole) = <&mut [u8; Header::BYTES]>::try_from(&mut *bytes)
        && let Ok(slice) = GuestMemoryBackend::get_slice(memory, start, Header::BYTES)
    {
        // Nearly every driver has the header in a descriptor of its own: one load.
        *whole = slice.get_ref(0).ok()?.load();
        return Some(());
    }
    memory.read_slice(bytes, start).ok()
}

/// The table an indirect descriptor refers to.
fn indirect<'a>(memory: &'a Memory, descriptor: &Descriptor) -> Result<Table<'a>, Malformed> {
    let bytes = usize::try_from(descriptor.len()).map_err(|_| Malformed::Indirect)?;
    let alone = descriptor.flags() & flag(VRING_DESC_F_NEXT) == 0;
    if bytes == 0 || bytes % DESCRIPTOR_BYTES != 0 || !alone {
        return Err(Malformed::Indirect);
    }
    let entries = u32::try_from(bytes / DESCRIPTOR_BYTES).map_err(|_| Malformed::Indirect)?;
    Ok(Table::new(memory, descriptor.addr(), entries))
}

fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|(_, len)| u64::from(*len)).sum()
}

/// A flag of the bindings, in the width of a descriptor's field: they are 1, 2 and 4.
#[allow(clippy::cast_possible_truncation)]
const fn flag(bits: u32) -> u16 {
    bits as u16
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
