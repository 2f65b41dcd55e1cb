// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory that a ring's operations need not look up: the kernel has looked its pages up once and holds on to
//! them (`--pin-memory`).
//!
//! It holds on to the *pages*: were they taken out of the guest's memory meanwhile, as a balloon does, operations would go
//! on using the old ones. So nobody is given this who has not asked for it.

use std::io;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Ring;
use crate::sys::buffer::{Memory, Span};

/// The most bytes that the kernel takes as one buffer.
const PART: usize = 1 << 30;

/// The memory that is registered with a ring, and where it lies in this process.
#[derive(Debug)]
pub(super) struct Pinned {
    /// Keeps it mapped: other memory at the same addresses would be taken for it.
    _memory: Arc<Memory>,
    /// Each is a buffer of the kernel's, numbered from 0.
    parts: Vec<Span>,
}

impl Pinned {
    /// The number of the buffer that `span` lies in.
    pub(super) fn buffer_of(&self, span: Span) -> Option<u16> {
        let number = self.parts.iter().position(|part| is_inside(part, span));
        number.and_then(|number| u16::try_from(number).ok())
    }

    /// The number of the buffer that all of a list lie in. None of them is empty, or the kernel would refuse them.
    pub(super) fn buffer_of_all(&self, list: &[libc::iovec]) -> Option<u16> {
        let span = |iovec: &libc::iovec| Span { base: iovec.iov_base.cast(), len: iovec.iov_len };
        let number = self.buffer_of(list.first().map(span)?)?;
        let part = self.parts.get(usize::from(number))?;
        let all = list.iter().map(span).all(|span| span.len > 0 && is_inside(part, span));
        all.then_some(number)
    }
}

fn is_inside(part: &Span, span: Span) -> bool {
    let skip = span.base.addr().checked_sub(part.base.addr());
    skip.and_then(|skip| skip.checked_add(span.len)).is_some_and(|end| end <= part.len)
}

/// A mapped region in pieces that the kernel takes as buffers.
fn parts(base: *mut u8, len: usize) -> impl Iterator<Item = Span> {
    (0..len)
        .step_by(PART)
        .map(move |at| Span { base: base.wrapping_add(at), len: PART.min(len - at) })
}

impl Ring {
    /// Pins `memory` in place of what was pinned before: operations on it cost less from then on. Nothing of the guest's may
    /// be in flight. It takes as long as looking up every page of it.
    ///
    /// # Errors
    ///
    /// The kernel does not pin it: `ENOMEM` if RLIMIT_MEMLOCK is too small, `EOPNOTSUPP` if it is older than 6.15. Nothing is
    /// pinned then, and everything works as without.
    pub fn pin(&mut self, memory: &Arc<Memory>) -> io::Result<()> {
        // Before 6.13 memory is let go only when every older operation has ended, polls among them, which do not end.
        // That kernel cannot be told from its ring; the next one that can be is this one.
        if !self.no_iowait {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        self.unpin()?;
        let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let mut spans = Vec::new();
        for region in memory.iter() {
            let len = usize::try_from(region.len()).map_err(invalid)?;
            let slice = region.as_volatile_slice().map_err(io::Error::other)?;
            spans.extend(parts(slice.ptr_guard_mut().as_ptr(), len));
        }
        if spans.is_empty() {
            return Ok(());
        }
        let iovec = |span: &Span| libc::iovec { iov_base: span.base.cast(), iov_len: span.len };
        let buffers: Vec<libc::iovec> = spans.iter().map(iovec).collect();
        // SAFETY: the buffers are all of the mappings of `memory`, which stay as long as they are registered: the reference
        // below goes only after `unregister_buffers`, or with the ring. That the guest writes there
        // meanwhile is no more than it does in any memory that the kernel reads for us.
        unsafe { self.uring.0.submitter().register_buffers(&buffers) }?;
        self.pinned = Some(Pinned { _memory: Arc::clone(memory), parts: spans });
        Ok(())
    }

    /// Lets go of what is pinned. If the kernel does not, it stays in use here as well.
    pub(super) fn unpin(&mut self) -> io::Result<()> {
        if self.pinned.is_some() {
            self.uring.0.submitter().unregister_buffers()?;
            self.pinned = None;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_cut_at_what_the_kernel_takes() {
        let lengths = |len| parts(std::ptr::null_mut(), len).map(|p| p.len).collect::<Vec<_>>();
        assert_eq!(lengths(0), [0; 0]);
        assert_eq!(lengths(PART), [PART]);
        assert_eq!(lengths(2 * PART + 4096), [PART, PART, 4096]);
    }

    #[test]
    fn spans_belong_to_the_buffer_that_holds_all_of_them() {
        let span = |at: usize, len| Span { base: std::ptr::without_provenance_mut(at), len };
        let pinned = Pinned {
            _memory: Arc::default(),
            parts: vec![span(100, 10), span(110, 10), span(50, 5)],
        };
        for (at, len, buffer) in [
            (100, 10, Some(0)),
            (109, 1, Some(0)),
            (110, 1, Some(1)),
            (52, 3, Some(2)),
            (109, 2, None),
            (99, 1, None),
            (120, 1, None),
            (usize::MAX, 1, None),
        ] {
            assert_eq!(pinned.buffer_of(span(at, len)), buffer, "{at} {len}");
        }
        let iovec =
            |at, iov_len| libc::iovec { iov_base: std::ptr::without_provenance_mut(at), iov_len };
        for (list, buffer) in [
            (&[iovec(110, 4), iovec(119, 1), iovec(115, 2)][..], Some(1)),
            (&[iovec(110, 4), iovec(109, 1)], None),
            (&[iovec(110, 4), iovec(115, 0)], None),
            (&[iovec(110, 4), iovec(119, 2)], None),
            (&[], None),
        ] {
            assert_eq!(pinned.buffer_of_all(list), buffer);
        }
    }
}
