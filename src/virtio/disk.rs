// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon's [`Disk`]: the io_uring ring.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::Memory;
use super::chain::Piece;
use super::worker::Disk;
use crate::engine::{Completion, Io, Op, OpId, Tag};
use crate::sys::uring::Ring;

/// A ring, and the alignment its image needs of guest memory.
#[derive(Debug)]
pub(crate) struct RingDisk {
    pub(crate) ring: Ring,
    pub(crate) mem_align: u32,
}

impl Io for RingDisk {
    fn submit(&mut self, id: OpId, op: Op) -> std::task::Poll<i32> {
        self.ring.submit(id, op)
    }

    fn reap(&mut self) -> Option<Completion> {
        self.ring.reap()
    }

    fn now(&self) -> std::time::Duration {
        self.ring.now()
    }
}

impl Disk for RingDisk {
    fn event_fd(&self) -> RawFd {
        self.ring.event_fd()
    }

    fn hear(&self) {
        self.ring.hear();
    }

    fn enter(&mut self) -> io::Result<()> {
        self.ring.enter()
    }

    fn mute(&mut self) {
        self.ring.mute();
    }

    fn listen(&mut self) -> bool {
        self.ring.listen()
    }

    fn in_flight(&self) -> u32 {
        self.ring.in_flight()
    }

    fn attach(&mut self, tag: Tag, memory: &Arc<Memory>, pieces: &[Piece]) -> Option<bool> {
        self.ring.guests().set(tag, Arc::clone(memory), pieces, self.mem_align).ok()
    }

    fn detach(&mut self, tag: Tag) {
        self.ring.guests().clear(tag);
    }
}
