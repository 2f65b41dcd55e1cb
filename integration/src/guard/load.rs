// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests in batches: so many submitted, one kick, all of them awaited.

use std::io;

use crate::rig::{Queue, Random, Request, Shape};

/// Which requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pattern {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Both in turn.
    Mixed,
    /// Both in turn, each in several pieces of memory.
    Pieces,
    /// Writes, one place after the other.
    Fill,
    /// A write of 4 KiB and a flush; the flush counts.
    Flush,
}

/// A load.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pattern: Pattern,
    /// Bytes of a request.
    block: usize,
    /// Requests in flight.
    pub(super) depth: u64,
}

impl Load {
    pub(super) const fn new(pattern: Pattern, block: usize, depth: u64) -> Load {
        Load { pattern, block, depth }
    }

    /// Carries out `requests` of them anywhere on a disk of `size` bytes.
    pub(super) fn run(&self, queue: &mut Queue, size: u64, requests: u64) -> io::Result<()> {
        self.batches(queue, size, requests, |_| Ok(()))
    }

    /// The same; `after` is called after each batch, when nothing is in flight, with how many batches have ended.
    pub(super) fn batches(
        &self,
        queue: &mut Queue,
        size: u64,
        requests: u64,
        mut after: impl FnMut(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut random = Random::new(self.depth + self.block as u64);
        let data = random.bytes(self.block.max(4096));
        let places = size / data.len() as u64;
        let mut next = 0;
        for batch in 0..requests / self.depth {
            for _ in 0..self.depth {
                let place = if self.pattern == Pattern::Fill { next } else { random.below(places) };
                let offset = place * data.len() as u64;
                self.submit(queue, offset, &data, next.is_multiple_of(2), &mut random)?;
                next += 1;
            }
            queue.kick()?;
            queue.drain()?.into_iter().try_for_each(|done| done.result.map(drop))?;
            after(batch + 1)?;
        }
        Ok(())
    }

    fn submit(
        &self,
        queue: &mut Queue,
        offset: u64,
        data: &[u8],
        even: bool,
        random: &mut Random,
    ) -> io::Result<()> {
        let (read, write) =
            (Request::Read { offset, len: data.len() }, Request::Write { offset, data });
        let shape = match self.pattern {
            Pattern::Pieces => Shape::sectors(random, data.len(), 512),
            _ => Shape::whole(),
        };
        let request = match self.pattern {
            Pattern::Flush => {
                queue.write_at(offset, data)?;
                Request::Flush
            }
            Pattern::Read => read,
            Pattern::Mixed | Pattern::Pieces if even => read,
            Pattern::Write | Pattern::Mixed | Pattern::Pieces | Pattern::Fill => write,
        };
        queue.submit(request, &shape, 0)
    }
}
