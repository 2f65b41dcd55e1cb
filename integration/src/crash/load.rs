// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest: one thread a queue, as wild as it may be, until the device is gone.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ledger::{Floor, Ledger};
use super::operations::{Action, Operation};
use crate::rig::fault_disk::FaultDisk;
use crate::rig::model::SECTOR;
use crate::rig::queue::{Done, Queue, Request, Shape};
use crate::rig::random::Random;

/// Requests in flight on a queue.
pub(super) const DEPTH: usize = 12;

/// How long a guest whose disk has lost its power hopes for answers.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What the queues of a guest have in common.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    pub(super) ledger: &'a Mutex<Ledger>,
    pub(super) disk: &'a FaultDisk,
    pub(super) features: u64,
    /// Writes are durable when they are complete.
    pub(super) write_through: bool,
    /// First sector of the part that is written most.
    pub(super) hot: u64,
    /// The daemon is no more.
    pub(super) killed: &'a AtomicBool,
}

/// A request whose answer is awaited.
#[derive(Debug, Clone)]
struct Pending {
    action: Action,
    sectors: Range<u64>,
    /// For a flush: how many operations had completed when it was sent.
    mark: u64,
}

/// What came of one queue.
#[derive(Debug, Default)]
pub(super) struct Ended {
    /// The sectors that were being changed at the end.
    pub(super) unanswered: Vec<Range<u64>>,
    /// Completed flushes.
    pub(super) flushes: u64,
}

impl Guest<'_> {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drives `queue` until the power or the daemon goes. An error before that is an error.
    pub(super) fn run(&self, queue: &mut Queue, seed: u64) -> io::Result<Ended> {
        let mut random = Random::new(seed);
        let mut pending = BTreeMap::new();
        let mut ended = Ended::default();
        let mut token = 0;
        while !self.killed.load(Ordering::SeqCst) && self.disk.has_power() {
            while queue.in_flight() < DEPTH {
                token += 1;
                if !self.submit(queue, &mut pending, token, &mut random)? {
                    break;
                }
            }
            queue.kick()?;
            for done in queue.wait_at_most(Duration::from_millis(20))? {
                self.finish(&mut pending, done, &mut ended)?;
            }
        }
        self.last_words(queue, &mut pending, &mut ended)?;
        let changed = pending.into_values().filter(|request| request.action.content().is_some());
        ended.unanswered = changed.map(|request| request.sectors).collect();
        Ok(ended)
    }

    /// A flush that claims to have succeeded without power would be a lie: asks for one. Of a killed daemon only the answers
    /// that it had given are there to be had.
    fn last_words(
        &self,
        queue: &mut Queue,
        pending: &mut BTreeMap<u64, Pending>,
        ended: &mut Ended,
    ) -> io::Result<()> {
        let end = Instant::now() + LAST_WORDS;
        if !self.killed.load(Ordering::SeqCst) && self.features & FLUSH != 0 {
            self.send(queue, pending, u64::MAX, Action::Flush, 0..0)?;
            queue.kick()?;
        }
        loop {
            let killed = self.killed.load(Ordering::SeqCst);
            let limit = if killed { Duration::ZERO } else { Duration::from_millis(20) };
            for done in queue.wait_at_most(limit)? {
                self.finish(pending, done, ended)?;
            }
            if killed || queue.in_flight() == 0 || Instant::now() > end {
                return Ok(());
            }
        }
    }

    /// One more request, if there is room for it and nobody is at its sectors.
    fn submit(
        &self,
        queue: &mut Queue,
        pending: &mut BTreeMap<u64, Pending>,
        token: u64,
        random: &mut Random,
    ) -> io::Result<bool> {
        let operation = Operation::choose(self.features, random);
        let sectors = operation.range(self.ledger().len(), self.hot, random);
        if operation.action == Action::Flush {
            return self.send(queue, pending, token, Action::Flush, 0..0);
        }
        if sectors.is_empty() || !self.ledger().claim(&sectors) {
            return Ok(false);
        }
        let went = self.send(queue, pending, token, operation.action, sectors.clone())?;
        if !went {
            self.ledger().release(&sectors);
        }
        Ok(went)
    }

    fn send(
        &self,
        queue: &mut Queue,
        pending: &mut BTreeMap<u64, Pending>,
        token: u64,
        action: Action,
        sectors: Range<u64>,
    ) -> io::Result<bool> {
        if queue.in_flight() >= DEPTH {
            return Ok(false);
        }
        let (offset, len) = (sectors.start * SECTOR as u64, (sectors.end - sectors.start));
        let bytes = len * SECTOR as u64;
        // The version first: from now on the disk may hold it.
        let (version, mark) = {
            let mut ledger = self.ledger();
            let version = action.content().map(|content| ledger.issue(&sectors, content));
            (version.unwrap_or(0), ledger.done())
        };
        let data = match action {
            Action::Write => Ledger::data(&sectors, version),
            _ => Vec::new(),
        };
        let request = match action {
            Action::Read => {
                Request::Read { offset, len: usize::try_from(bytes).map_err(io::Error::other)? }
            }
            Action::Write => Request::Write { offset, data: &data },
            Action::Discard => Request::Discard { offset, len: bytes },
            Action::Zero { unmap } => Request::WriteZeroes { offset, len: bytes, unmap },
            Action::Flush => Request::Flush,
        };
        match queue.submit(request, &Shape::whole(), token) {
            Ok(()) => {
                pending.insert(token, Pending { action, sectors, mark });
                Ok(true)
            }
            // Never sent: a version that is nowhere does no harm.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn finish(
        &self,
        pending: &mut BTreeMap<u64, Pending>,
        done: Done,
        ended: &mut Ended,
    ) -> io::Result<()> {
        let Some(request) = pending.get(&done.token) else {
            return Err(io::Error::other(format!("request {} was answered twice", done.token)));
        };
        let bytes = match done.result {
            Ok(bytes) => bytes,
            Err(_) if !self.disk.has_power() => return Ok(()),
            Err(error) => {
                let what = format!("{:?} of {:?}: {error}", request.action, request.sectors);
                return Err(io::Error::other(what));
            }
        };
        let mut ledger = self.ledger();
        match request.action {
            Action::Flush => {
                ended.flushes += 1;
                ledger.flushed(request.mark);
            }
            Action::Read => {
                let faults = ledger.faults(request.sectors.start, &bytes, Floor::Completed);
                if let Some(fault) = faults.first() {
                    return Err(io::Error::other(format!("read under load: {fault}")));
                }
            }
            Action::Write | Action::Discard | Action::Zero { .. } => {
                ledger.complete(&request.sectors, self.write_through);
            }
        }
        ledger.release(&request.sectors);
        drop(ledger);
        pending.remove(&done.token);
        Ok(())
    }
}

/// The feature bit of FLUSH.
pub(super) const FLUSH: u64 = virtio_driver::VirtioBlkFeatureFlags::FLUSH.bits();
