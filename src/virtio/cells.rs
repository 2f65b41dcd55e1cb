// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fields of a split virtqueue's rings in guest memory (virtio 1.3, 2.7.6 and 2.7.8).

use std::marker::PhantomData;
use std::sync::atomic::Ordering;

use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice,
};

use super::Memory;

/// Bytes of the flags and the index that both rings begin with.
const RING_FIELDS: usize = 4;

/// The entries of an available or used ring, which stand behind two 16-bit fields. The guest's
/// address of it is looked up once for all of them, unless it spans memory regions.
pub(crate) struct Cells<'a, T> {
    memory: &'a Memory,
    start: u64,
    size: u16,
    slice: Option<VolatileSlice<'a>>,
    entry: PhantomData<T>,
}

impl<'a, T: ByteValued> Cells<'a, T> {
    /// The ring at `start`, whose `size` is a power of two.
    pub(crate) fn new(memory: &'a Memory, start: u64, size: u16) -> Self {
        let bytes = RING_FIELDS + usize::from(size) * size_of::<T>();
        let slice = GuestMemoryBackend::get_slice(memory, GuestAddress(start), bytes).ok();
        Self { memory, start, size, slice, entry: PhantomData }
    }

    /// Where the entry for ring index `index` is, counted from the ring's beginning.
    fn place(&self, index: u16) -> usize {
        RING_FIELDS + usize::from(index & self.size.wrapping_sub(1)) * size_of::<T>()
    }

    fn address(&self, index: u16) -> Option<GuestAddress> {
        GuestAddress(self.start).checked_add(self.place(index) as u64)
    }

    /// The entry for ring index `index`; `None` if it is not in guest memory.
    pub(crate) fn read(&self, index: u16) -> Option<T> {
        match &self.slice {
            Some(slice) => Some(slice.get_ref::<T>(self.place(index)).ok()?.load()),
            None => self.memory.read_obj(self.address(index)?).ok(),
        }
    }

    /// Stores it; `None` if it is not in guest memory.
    pub(crate) fn write(&self, index: u16, entry: T) -> Option<()> {
        match &self.slice {
            Some(slice) => slice.get_ref::<T>(self.place(index)).ok()?.store(entry),
            None => self.memory.write_obj(entry, self.address(index)?).ok()?,
        }
        Some(())
    }
}

/// The 16-bit field at `base + offset`; `None` if it is not in guest memory.
pub(crate) fn load(memory: &Memory, base: u64, offset: u64) -> Option<u16> {
    let address = GuestAddress(base).checked_add(offset)?;
    memory.load::<u16>(address, Ordering::Acquire).ok().map(u16::from_le)
}
