// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that rewrites 4 KiB blocks with ever newer versions, and what a host reader may see of it meanwhile.

use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::model::{BLOCK, stamp, versions};
use super::queue::{Queue, Request, Shape};
use super::random::Random;

/// The versions of every block: the newest the guest was told is written, and the newest it has asked for.
#[derive(Debug)]
pub struct Stamps {
    written: Vec<AtomicU64>,
    asked: Vec<AtomicU64>,
}

impl Stamps {
    /// `blocks` blocks at version 0.
    pub fn new(blocks: u64) -> Stamps {
        let zero = || (0..blocks).map(|_| AtomicU64::new(0)).collect();
        Stamps { written: zero(), asked: zero() }
    }

    /// The image at version 0.
    pub fn image(&self) -> Vec<u8> {
        (0..self.written.len() as u64).flat_map(|block| stamp(block, 0)).collect()
    }

    /// The newest versions known to be written now.
    pub fn written(&self) -> Vec<u64> {
        self.written.iter().map(|v| v.load(Ordering::SeqCst)).collect()
    }

    /// The newest versions asked for so far.
    pub fn asked(&self) -> Vec<u64> {
        self.asked.iter().map(|v| v.load(Ordering::SeqCst)).collect()
    }

    /// Checks bytes seen between the moments `oldest` ([`Stamps::written`] before) and `newest` ([`Stamps::asked`] after).
    pub fn check(bytes: &[u8], oldest: &[u64], newest: &[u64]) -> io::Result<()> {
        let bounds = oldest.iter().zip(newest);
        for ((block, bytes), (oldest, newest)) in bytes.chunks(BLOCK).enumerate().zip(bounds) {
            let valid: RangeInclusive<u64> = *oldest..=*newest;
            let seen = versions(block as u64, bytes)?;
            if let Some(wrong) = seen.iter().find(|version| !valid.contains(version)) {
                let what =
                    format!("block {block}: version {wrong} of {seen:?}, valid were {valid:?}");
                return Err(io::Error::other(what));
            }
        }
        Ok(())
    }

    /// Writes on all `queues` until `stop`; returns the number of writes. Any error of the guest's I/O is returned at once.
    pub fn write(&self, queues: &mut [Queue], depth: usize, stop: &AtomicBool) -> io::Result<u64> {
        let count = queues.len();
        thread::scope(|scope| {
            let threads: Vec<_> = queues
                .iter_mut()
                .enumerate()
                .map(|(index, queue)| {
                    scope.spawn(move || self.write_one(queue, index, count, depth, stop))
                })
                .collect();
            let mut total = 0;
            for thread in threads {
                total += thread.join().map_err(|_| io::Error::other("a writer panicked"))??;
            }
            Ok(total)
        })
    }

    /// The blocks `index`, `index + count`, … are this queue's.
    fn write_one(
        &self,
        queue: &mut Queue,
        index: usize,
        count: usize,
        depth: usize,
        stop: &AtomicBool,
    ) -> io::Result<u64> {
        let mut random = Random::new(index as u64 + 77);
        let own = (self.asked.len() - index).div_ceil(count);
        let mut total = 0;
        while !stop.load(Ordering::Relaxed) || queue.in_flight() > 0 {
            while !stop.load(Ordering::Relaxed) && queue.in_flight() < depth {
                let block = random.index(own) * count + index;
                let (Some(asked), Some(written)) = (self.asked.get(block), self.written.get(block))
                else {
                    continue;
                };
                let version = asked.load(Ordering::SeqCst);
                if version != written.load(Ordering::SeqCst) {
                    continue;
                }
                asked.store(version + 1, Ordering::SeqCst);
                let data = stamp(block as u64, version + 1);
                let request = Request::Write { offset: (block * BLOCK) as u64, data: &data };
                queue.submit(request, &Shape::whole(), block as u64)?;
            }
            queue.kick()?;
            for done in queue.wait()? {
                done.result?;
                let block = usize::try_from(done.token).map_err(io::Error::other)?;
                if let Some(written) = self.written.get(block) {
                    written.fetch_add(1, Ordering::SeqCst);
                }
                total += 1;
            }
        }
        Ok(total)
    }
}
