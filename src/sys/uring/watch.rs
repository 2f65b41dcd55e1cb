// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors that wake a ring's thread besides its operations: doorbells, for the most part.
//!
//! They are polled by the ring itself, so that one system call sleeps for everything. Being polled
//! takes nothing from a descriptor: whoever reads it finds what was signalled.

use std::io;
use std::os::fd::RawFd;

use io_uring::types::{CancelBuilder, Fixed};
use io_uring::{cqueue, opcode};

use super::enter::BREATH;
use super::setup::{FIRST_WATCHED, NO_FILE};
use super::{Queued, Ring};

/// Marks the `user_data` of a watch; operations' are below 2^32.
const WATCH: u64 = 1 << 63;
/// Where the generation stands in it, above the place.
const GENERATION: u32 = 32;
/// The kernel's POLLIN.
const POLL_IN: u32 = 1;

/// How a descriptor is heard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Hear {
    /// At each signal: fit for an eventfd that nobody reads.
    #[default]
    Each,
    /// As long as it is readable: again and again until somebody has read it.
    Level,
}

/// A place for a watched descriptor.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Whether the fixed file is there.
    open: bool,
    hear: Hear,
    /// Whether the kernel polls it, or is going to.
    armed: bool,
    /// Goes up with each descriptor: the kernel may still speak of the one before.
    generation: u32,
    /// It was signalled.
    heard: bool,
}

impl Watch {
    fn user_data(&self, place: usize) -> u64 {
        let generation = u64::from(self.generation & (u32::MAX >> 1)) << GENERATION;
        WATCH | generation | place as u64
    }
}

/// Whether a completion is a watch's.
pub(super) fn is_watch(entry: &cqueue::Entry) -> bool {
    entry.user_data() & WATCH != 0
}

impl Ring {
    /// Makes `fd` the descriptor whose signals end [`wait`](Self::wait), at `place` (below the number given
    /// to [`new`](Self::new)); with `None`, nothing is watched there any more.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there is no such place; else what the kernel said. Nothing is watched there then.
    pub fn watch(&mut self, place: usize, fd: Option<RawFd>, hear: Hear) -> io::Result<()> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        // What is queued names places, and means the files that are in them now.
        self.submit_queued();
        self.disarm(place);
        let watch = self.watches.get_mut(place).ok_or_else(invalid)?;
        watch.generation = watch.generation.wrapping_add(1);
        (watch.open, watch.heard, watch.hear) = (false, false, hear);
        let at = u32::try_from(FIRST_WATCHED + place).map_err(|_| invalid())?;
        let raw = fd.unwrap_or(NO_FILE);
        self.uring.0.submitter().register_files_update(at, &[raw])?;
        // Kernels before 6.13 let go of files in the order they were replaced in, and so of none as long as
        // an older poll goes on. So all of them begin anew.
        (0..self.watches.len()).for_each(|place| self.disarm(place));
        let watch = self.watches.get_mut(place).ok_or_else(invalid)?;
        watch.open = fd.is_some();
        self.uneasy = true;
        Ok(())
    }

    /// Whether the descriptor at `place` was signalled since this was last asked.
    pub fn heard_at(&mut self, place: usize) -> bool {
        self.watches.get_mut(place).is_some_and(|watch| std::mem::take(&mut watch.heard))
    }

    /// Queues a poll for every watch that has none.
    pub(super) fn arm_watches(&mut self) {
        if self.broken.is_some() || !std::mem::take(&mut self.uneasy) {
            return;
        }
        for place in 0..self.watches.len() {
            let Some(watch) = self.watches.get(place).filter(|w| w.open && !w.armed) else {
                continue;
            };
            let Ok(at) = u32::try_from(FIRST_WATCHED + place) else { continue };
            let entry = opcode::PollAdd::new(Fixed(at), POLL_IN)
                .multi(watch.hear == Hear::Each)
                .build()
                .user_data(watch.user_data(place));
            if self.push(&entry).is_err() {
                self.uneasy = true;
                return;
            }
            self.queued.push_back(Queued::Watch);
            if let Some(watch) = self.watches.get_mut(place) {
                watch.armed = true;
            }
        }
    }

    /// The kernel says that a watched descriptor was signalled, or that it polls it no more.
    pub(super) fn heard(&mut self, entry: &cqueue::Entry) {
        let more = cqueue::more(entry.flags());
        if !more {
            self.polls = self.polls.saturating_sub(1);
        }
        let place = usize::try_from(entry.user_data() & u64::from(u32::MAX)).unwrap_or(usize::MAX);
        let Some(watch) = self.watches.get_mut(place) else { return };
        if watch.user_data(place) != entry.user_data() {
            return;
        }
        watch.heard = true;
        if !more {
            watch.armed = false;
            self.uneasy = true;
        }
    }

    /// Takes a poll back from the kernel. It says so by an entry of its own, later: one of a generation that is gone.
    fn disarm(&mut self, place: usize) {
        let Some(watch) = self.watches.get_mut(place).filter(|watch| watch.armed) else { return };
        watch.armed = false;
        let which = CancelBuilder::user_data(watch.user_data(place));
        watch.generation = watch.generation.wrapping_add(1);
        // On kernels before 6.0 it goes on until the ring is closed, and is no longer listened to.
        let _ = self.uring.0.submitter().register_sync_cancel(None, which);
    }

    /// Takes all polls back, and whatever else is in flight; whether none is left. For a ring that is idle.
    pub(super) fn disarm_all(&mut self) -> bool {
        /// Cancelled polls end with the next enter; this many are more than enough.
        const TRIES: u32 = 16;
        let _ = self.uring.0.submitter().register_sync_cancel(None, CancelBuilder::any());
        self.watches.iter_mut().for_each(|watch| watch.armed = false);
        for _ in 0..TRIES {
            while let Some(entry) = self.next_entry() {
                self.accept(&entry);
            }
            if self.polls == 0 {
                return true;
            }
            let _ = self.call(0, 1, Some(BREATH));
        }
        false
    }
}
