// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random guest I/O over several queues, every read compared with a model.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::thread;

use super::model::Model;
use super::queue::{Queue, Request, Shape};
use super::random::Random;

/// What a workload did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Reads compared.
    pub reads: u64,
    /// Writes acknowledged.
    pub writes: u64,
    /// Flushes acknowledged.
    pub flushes: u64,
    /// Discards and zeroing acknowledged.
    pub zeroes: u64,
}

/// How a workload behaves.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Seed of its choices.
    pub seed: u64,
    /// Requests per queue.
    pub requests: u64,
    /// Requests in flight per queue.
    pub depth: usize,
    /// The largest request in sectors.
    pub max_sectors: u64,
    /// Whether it may write.
    pub write: bool,
    /// Whether data may lie at any address in pieces of any length.
    pub odd_memory: bool,
    /// Whether discards and zeroing are among the writes, and then the bytes of a block of the filesystem: a discard leaves
    /// what it does not cover of a block as it was. The frontend must have asked for both features.
    pub discard: Option<u64>,
    /// Bytes of the stripes that the queues own in turn. Queues never write each other's, so that the model is exact.
    pub stripe: u64,
}

/// The seed of tests that do not choose one: `$RIG_SEED`, so that a loop over seeds needs no change of the tests.
fn seed() -> u64 {
    std::env::var("RIG_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

impl Default for Workload {
    fn default() -> Workload {
        Workload {
            seed: seed(),
            requests: 600,
            depth: 16,
            max_sectors: 64,
            write: true,
            odd_memory: true,
            discard: None,
            stripe: 48 << 10,
        }
    }
}

enum Access {
    Read,
    Write(Vec<u8>),
    Zero { unmap: bool },
    Discard,
}

struct Pending {
    range: Range<u64>,
    access: Access,
}

impl Workload {
    /// Runs it on all `queues` at once; `model` holds the disk's bytes before and after.
    pub fn run(&self, queues: &mut [Queue], model: &mut Model) -> io::Result<Tally> {
        let count = queues.len() as u64;
        let start = &*model;
        let results: Vec<io::Result<(Tally, Model)>> = thread::scope(|scope| {
            let threads: Vec<_> = queues
                .iter_mut()
                .enumerate()
                .map(|(index, queue)| {
                    let own = start.clone();
                    scope.spawn(move || Runner::new(self, index as u64, count, own).run(queue))
                })
                .collect();
            let join = |t: thread::ScopedJoinHandle<'_, _>| {
                t.join().unwrap_or_else(|_| Err(io::Error::other("panicked")))
            };
            threads.into_iter().map(join).collect()
        });
        let mut total = Tally::default();
        for (index, result) in results.into_iter().enumerate() {
            let (tally, own) = result?;
            total.reads += tally.reads;
            total.writes += tally.writes;
            total.flushes += tally.flushes;
            total.zeroes += tally.zeroes;
            let size = model.size();
            for stripe in (index as u64..size.div_ceil(self.stripe)).step_by(queues.len()) {
                let range = stripe * self.stripe..((stripe + 1) * self.stripe).min(size);
                let bytes = usize::try_from(range.start).ok().zip(usize::try_from(range.end).ok());
                let bytes = bytes.and_then(|(a, b)| own.bytes().get(a..b)).unwrap_or_default();
                model.write(range.start, bytes)?;
            }
        }
        Ok(total)
    }
}

struct Runner<'a> {
    load: &'a Workload,
    random: Random,
    model: Model,
    index: u64,
    count: u64,
    pending: BTreeMap<u64, Pending>,
    tally: Tally,
}

impl<'a> Runner<'a> {
    fn new(load: &'a Workload, index: u64, count: u64, model: Model) -> Runner<'a> {
        let random = Random::new(load.seed.wrapping_mul(1009).wrapping_add(index));
        Runner {
            load,
            random,
            model,
            index,
            count,
            pending: BTreeMap::new(),
            tally: Tally::default(),
        }
    }

    fn run(mut self, queue: &mut Queue) -> io::Result<(Tally, Model)> {
        let mut token = 0;
        while token < self.load.requests || queue.in_flight() > 0 {
            while token < self.load.requests && queue.in_flight() < self.load.depth {
                if !self.submit(queue, token)? {
                    break;
                }
                token += 1;
            }
            queue.kick()?;
            for done in queue.wait()? {
                self.complete(done.token, done.result)?;
            }
        }
        Ok((self.tally, self.model))
    }

    /// A range of whole sectors in one of this queue's stripes.
    fn choose(&mut self) -> Range<u64> {
        let size = self.model.size();
        let stripes = size.div_ceil(self.load.stripe);
        let own = (stripes.saturating_sub(self.index)).div_ceil(self.count).max(1);
        let start =
            (self.random.below(own) * self.count + self.index).min(stripes - 1) * self.load.stripe;
        let sectors = (size - start).min(self.load.stripe) / 512;
        // Often a whole 4 KiB block, as filesystems write; else anything.
        let (first, len) = if self.random.one_in(2) && sectors >= 8 {
            (self.random.below(sectors / 8) * 8, 8)
        } else {
            let first = self.random.below(sectors);
            (first, 1 + self.random.below(self.load.max_sectors.min(sectors - first)))
        };
        let len = len.min(sectors - first);
        start + first * 512..start + (first + len) * 512
    }

    fn submit(&mut self, queue: &mut Queue, token: u64) -> io::Result<bool> {
        if self.random.one_in(64) {
            return accepted(queue.submit(Request::Flush, &Shape::whole(), token));
        }
        let range = self.choose();
        let clash = |p: &Pending| p.range.start < range.end && range.start < p.range.end;
        if self.pending.values().any(clash) {
            return Ok(false);
        }
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let shape = match self.random.below(3) {
            0 => Shape::whole(),
            1 if self.load.odd_memory => Shape::odd(&mut self.random, len),
            _ => Shape::sectors(&mut self.random, len, 512),
        };
        let access = self.access(len);
        let (offset, bytes) = (range.start, range.end - range.start);
        let request = match &access {
            Access::Read => Request::Read { offset, len },
            Access::Write(data) => Request::Write { offset, data },
            Access::Zero { unmap } => Request::WriteZeroes { offset, len: bytes, unmap: *unmap },
            Access::Discard => Request::Discard { offset, len: bytes },
        };
        let shape =
            if matches!(access, Access::Read | Access::Write(_)) { shape } else { Shape::whole() };
        let went = accepted(queue.submit(request, &shape, token))?;
        if went {
            self.pending.insert(token, Pending { range, access });
        }
        Ok(went)
    }

    fn access(&mut self, len: usize) -> Access {
        if !self.load.write || !self.random.one_in(2) {
            return Access::Read;
        }
        // Not half of all, or there would soon be little but zeros.
        match self.load.discard {
            Some(_) if self.random.one_in(4) => match self.random.below(3) {
                0 => Access::Discard,
                unmap => Access::Zero { unmap: unmap == 1 },
            },
            _ => Access::Write(self.random.bytes(len)),
        }
    }

    fn complete(&mut self, token: u64, result: io::Result<Vec<u8>>) -> io::Result<()> {
        let bytes = result?;
        match self.pending.remove(&token) {
            None => self.tally.flushes += 1,
            Some(Pending { range, access: Access::Read }) => {
                self.tally.reads += 1;
                self.model.check(range.start, &bytes)?;
            }
            Some(Pending { range, access: Access::Write(data) }) => {
                self.tally.writes += 1;
                self.model.write(range.start, &data)?;
            }
            Some(Pending { range, access: Access::Zero { .. } }) => {
                self.tally.zeroes += 1;
                self.model.zero(range)?;
            }
            Some(Pending { range, access: Access::Discard }) => {
                self.tally.zeroes += 1;
                self.model.discard(range, self.load.discard.unwrap_or(1))?;
            }
        }
        Ok(())
    }
}

fn accepted(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        done => done.map(|()| true),
    }
}
