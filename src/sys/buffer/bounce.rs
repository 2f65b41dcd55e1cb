// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bounce pool: memory for what cannot go straight from or to the guest's.

use std::{io, ptr};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::Span;
use crate::engine::io::BounceSlot;

/// A fixed pool of page-aligned buffers; a page costs memory once it has been used.
#[derive(Debug)]
pub(in crate::sys) struct BouncePool {
    base: ptr::NonNull<u8>,
    slot_bytes: usize,
    len: usize,
}

impl BouncePool {
    /// Address space for `slots` buffers of `slot_bytes` bytes.
    ///
    /// # Errors
    ///
    /// `EOVERFLOW` if it does not fit the address space, else what `mmap` said.
    pub(in crate::sys) fn new(slots: u32, slot_bytes: u32) -> io::Result<Self> {
        let slot_bytes = usize::try_from(slot_bytes).map_err(|_| Errno::OVERFLOW)?;
        let slots = usize::try_from(slots).map_err(|_| Errno::OVERFLOW)?;
        let len = slots.checked_mul(slot_bytes).ok_or(Errno::OVERFLOW)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory
        // that is already in use.
        let base = unsafe {
            mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)
        }?;
        let base = ptr::NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        let pool = Self { base, slot_bytes, len };
        // A huge page would make the first use of one buffer cost 2 MiB. A kernel without huge
        // pages refuses the advice and needs none.
        // SAFETY: base..base + len is the mapping just made, which `pool` owns; the advice does
        // not change its contents.
        let _ = unsafe { madvise(pool.base.as_ptr().cast(), len, Advice::LinuxNoHugepage) };
        Ok(pool)
    }

    /// Bytes `at..at + len` of `slot`; `None` if there are no such bytes.
    pub(super) fn span(&self, slot: BounceSlot, at: u32, len: u32) -> Option<Span> {
        let at = usize::try_from(at).ok()?;
        let len = usize::try_from(len).ok()?;
        if at.checked_add(len)? > self.slot_bytes {
            return None;
        }
        let slot_at = usize::try_from(slot.0).ok()?.checked_mul(self.slot_bytes)?;
        if slot_at >= self.len {
            return None;
        }
        Some(Span { base: self.base.as_ptr().wrapping_add(slot_at + at), len })
    }

    /// Keeps it mapped for as long as the process lives.
    pub(super) fn leak(&mut self) {
        self.len = 0;
    }
}

impl Drop for BouncePool {
    fn drop(&mut self) {
        if self.len == 0 {
            return; // Leaked.
        }
        // SAFETY: base..base + len is this pool's own mapping. The ring that owns the pool drops
        // it only when no operation of its is in flight any more, and nobody else has pointers.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}
