// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon's [`Disk`]: the io_uring ring.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::Memory;
use super::chain::Piece;
use super::session::DeviceConfig;
use super::worker::Disk;
use crate::engine::{Completion, Io, Op, OpId, Tag};
use crate::sys::buffer::BadAddress;
use crate::sys::uring::{Hear, Ring, Sleep};

/// Pieces of guest memory that a session's requests may be in: 6 MiB of lists, for what would be 1 GiB of whole pages.
const SESSION_PIECES: usize = 1 << 18;
/// The least of one thread: several of the longest chains.
const LEAST_PIECES: usize = 1 << 13;

/// A ring, and the alignment its image needs of guest memory.
#[derive(Debug)]
pub(crate) struct RingDisk {
    pub(crate) ring: Ring,
    pub(crate) mem_align: u32,
    /// `--pin-memory`.
    pin: bool,
    /// Pieces of guest memory that requests may be in before no more are taken.
    pieces: usize,
}

impl RingDisk {
    /// The disk of one of a session's `threads` threads.
    pub(crate) fn new(ring: Ring, config: &DeviceConfig, threads: usize) -> Self {
        Self {
            ring,
            mem_align: config.geometry.mem_align,
            pin: config.pin_memory,
            pieces: (SESSION_PIECES / threads.max(1)).max(LEAST_PIECES),
        }
    }
}

impl Io for RingDisk {
    fn submit(&mut self, id: OpId, op: Op) -> std::task::Poll<i32> {
        self.ring.submit(id, op)
    }

    fn reap(&mut self) -> Option<Completion> {
        let completion = self.ring.reap()?;
        // The guest hears of an I/O error only; who can make room must hear of it too (R16).
        if matches!(completion.result.saturating_neg(), libc::ENOSPC | libc::EDQUOT) {
            tracing::warn!("no space left for what the guest writes: it gets I/O errors");
        }
        Some(completion)
    }

    fn now(&self) -> std::time::Duration {
        self.ring.now()
    }

    fn lately(&self) -> std::time::Duration {
        self.ring.lately()
    }
}

impl Disk for RingDisk {
    fn watch(&mut self, place: usize, fd: Option<RawFd>, hear: Hear) -> io::Result<()> {
        self.ring.watch(place, fd, hear)
    }

    fn heard_at(&mut self, place: usize) -> bool {
        self.ring.heard_at(place)
    }

    fn enter(&mut self) -> io::Result<()> {
        self.ring.enter()
    }

    fn wait(&mut self, sleep: Sleep) -> io::Result<()> {
        self.ring.wait(sleep)
    }

    fn is_deep(&self) -> bool {
        self.ring.gathered() > 1
    }

    fn has_completions(&mut self) -> bool {
        self.ring.has_completions()
    }

    fn in_flight(&self) -> u32 {
        self.ring.in_flight()
    }

    fn attach(&mut self, tag: Tag, memory: &Arc<Memory>, pieces: &[Piece]) -> Option<bool> {
        match self.ring.guests().set(tag, memory, pieces, self.mem_align) {
            Ok(fit) => Some(fit),
            // The guest's fault, which it hears of.
            Err(BadAddress::Outside { .. }) => None,
            Err(error) => {
                tracing::error!(%error, "a request failed: a bug of extentd's, please report it");
                None
            }
        }
    }

    fn is_crowded(&mut self) -> bool {
        self.ring.guests().pieces() >= self.pieces
    }

    fn adopt(&mut self, memory: &Arc<Memory>) {
        debug_assert!(self.ring.guests().is_idle(), "new memory with requests of the old one");
        if !self.pin {
            return;
        }
        if let Err(error) = self.ring.pin(memory) {
            let fix = match error.raw_os_error() {
                Some(libc::ENOMEM) => {
                    ": raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=) above its size times --threads"
                }
                Some(libc::EOPNOTSUPP) => {
                    ": that takes Linux 6.15, and memory that is not a filesystem's"
                }
                _ => "",
            };
            tracing::warn!(%error, "--pin-memory: the guest's memory is not pinned{fix}");
        }
    }

    fn detach(&mut self, tag: Tag) {
        self.ring.guests().clear(tag);
    }
}
