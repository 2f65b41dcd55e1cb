// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frontends: one session at a time, and an orderly end of each before the next begins (R23).

use std::collections::BTreeSet;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use crate::control::status::{QueueThread, Requests, Segments};
use crate::engine::counters::Counters;
use crate::engine::message::{ToWorker, WorkerId};
use crate::virtio::session::{DeviceConfig, Session};

use super::door::Door;
use super::poll::Poll;

/// A drain longer than this is logged (R22), …
const DRAIN_QUIET: Duration = Duration::from_millis(500);
/// … and again this often.
const DRAIN_REPEAT: Duration = Duration::from_secs(30);

/// Where frontends come from, and the one that is served.
#[derive(Debug)]
pub(super) struct Front {
    device: Arc<DeviceConfig>,
    /// `None` for a connected socket: its session is the only one.
    door: Option<Door>,
    slot: Slot,
    next_worker: u32,
    sessions: u64,
    /// What the sessions that are over have counted.
    requests: Requests,
    segments: Segments,
}

#[derive(Debug)]
enum Slot {
    Free,
    Active {
        session: Session,
        workers: BTreeSet<WorkerId>,
    },
    Draining {
        session: Session,
        workers: BTreeSet<WorkerId>,
        waiting: BTreeSet<WorkerId>,
        since: Duration,
        say_at: Duration,
    },
}

/// Counts of all sessions, and the present one's by queue thread.
#[derive(Debug)]
pub(super) struct Counts {
    pub(super) requests: Requests,
    pub(super) segments: Segments,
    pub(super) queues: Vec<QueueThread>,
}

impl Front {
    pub(super) fn new(device: Arc<DeviceConfig>, door: Option<Door>) -> Self {
        Self {
            device,
            door,
            slot: Slot::Free,
            next_worker: 0,
            sessions: 0,
            requests: Requests::default(),
            segments: Segments::default(),
        }
    }

    /// Lets frontends in.
    pub(super) fn open(&mut self, poll: &Poll) -> io::Result<()> {
        self.door.as_mut().map_or(Ok(()), |door| door.open(poll))
    }

    /// Lets nobody in any more; those that come wait in the backlog.
    pub(super) fn close(&mut self, poll: &Poll) {
        if let Some(door) = &mut self.door {
            door.close(poll);
        }
    }

    /// Somebody connects. Returns the workers of a new session: the keeper must know them before
    /// it hears of them.
    pub(super) fn accept(&mut self, poll: &Poll, now: Duration) -> BTreeSet<WorkerId> {
        if let Slot::Active { session, .. } = &self.slot
            && session.hung_up()
        {
            // The session that is there is over and only does not know it yet: the next frontend
            // waits for its end, it is not refused. One that has closed its end but does not read would
            // not know it before its process goes, as its relay waits for room to send.
            self.end(poll, now);
            return BTreeSet::new();
        }
        if matches!(self.slot, Slot::Draining { .. }) {
            // Told of in the same batch of events as the end of the session before.
            return BTreeSet::new();
        }
        let Some(stream) = self.door.as_mut().and_then(|door| door.accept(poll, now)) else {
            return BTreeSet::new();
        };
        match self.slot {
            Slot::Free => self.begin(stream).unwrap_or_else(|error| {
                // The kernel counts the rings of a user without CAP_IPC_LOCK as locked memory.
                let hint = match error.kind() {
                    io::ErrorKind::OutOfMemory => "; raise the limit of locked memory (ulimit -l)",
                    _ => "",
                };
                warn!("no session could be started for a frontend: {error}{hint}");
                BTreeSet::new()
            }),
            Slot::Active { .. } | Slot::Draining { .. } => {
                warn!("a second frontend connected while one is active; it was turned away");
                BTreeSet::new()
            }
        }
    }

    /// Begins a session; returns its workers.
    pub(super) fn begin(&mut self, stream: UnixStream) -> io::Result<BTreeSet<WorkerId>> {
        let first = WorkerId(self.next_worker);
        // Also those of a session that fails to start are not used again.
        self.next_worker = self.next_worker.saturating_add(self.device.threads.into());
        let session = Session::start(stream, Arc::clone(&self.device), first)?;
        info!("frontend connected");
        self.sessions += 1;
        let workers: BTreeSet<WorkerId> = session.workers().collect();
        self.slot = Slot::Active { session, workers: workers.clone() };
        Ok(workers)
    }

    pub(super) fn send(&self, to: WorkerId, message: ToWorker) {
        match &self.slot {
            Slot::Active { session, .. } | Slot::Draining { session, .. } => {
                session.send(to, message);
            }
            // The worker has ended; there is nobody to tell.
            Slot::Free => {}
        }
    }

    /// Whether a worker belongs to the present session.
    pub(super) fn knows(&self, id: WorkerId) -> bool {
        match &self.slot {
            Slot::Active { workers, .. } | Slot::Draining { workers, .. } => workers.contains(&id),
            Slot::Free => false,
        }
    }

    /// The session is to end: no more requests, and those it has are carried out. The frontend sees
    /// the end in [`finish`](Self::finish), when they have been published.
    pub(super) fn end(&mut self, poll: &Poll, now: Duration) {
        match std::mem::replace(&mut self.slot, Slot::Free) {
            Slot::Active { session, workers } => {
                self.close(poll);
                session.quiesce();
                let (waiting, say_at) = (workers.clone(), now + DRAIN_QUIET);
                self.slot = Slot::Draining { session, workers, waiting, since: now, say_at };
            }
            // Told twice: by the frontend and by a signal.
            other => self.slot = other,
        }
    }

    /// A worker has drained.
    pub(super) fn quiesced(&mut self, id: WorkerId) {
        if let Slot::Draining { waiting, .. } = &mut self.slot {
            waiting.remove(&id);
        }
    }

    /// Ends a session that has drained; says whether there was one.
    pub(super) fn finish(&mut self) -> bool {
        if !matches!(&self.slot, Slot::Draining { waiting, .. } if waiting.is_empty()) {
            return false;
        }
        let Slot::Draining { session, .. } = std::mem::replace(&mut self.slot, Slot::Free) else {
            return false;
        };
        let counters = session.counters();
        session.finish();
        for counters in counters {
            self.requests.add(&Requests::of(&counters));
            self.segments.add(&Segments::of(&counters));
        }
        info!("frontend gone");
        true
    }

    /// Whether nobody is served.
    pub(super) fn is_free(&self) -> bool {
        matches!(self.slot, Slot::Free)
    }

    /// Whether there will be another session.
    pub(super) fn is_last(&self) -> bool {
        self.door.is_none()
    }

    pub(super) fn sessions(&self) -> u64 {
        self.sessions
    }

    /// For `status`.
    pub(super) fn state(&self) -> &'static str {
        match self.slot {
            Slot::Free => "none",
            Slot::Active { .. } => "connected",
            Slot::Draining { .. } => "draining",
        }
    }

    /// For `status`.
    pub(super) fn counts(&self) -> Counts {
        let mut counts =
            Counts { requests: self.requests, segments: self.segments, queues: Vec::new() };
        if let Slot::Active { session, workers, .. } | Slot::Draining { session, workers, .. } =
            &self.slot
        {
            for ((index, worker), counters) in workers.iter().enumerate().zip(session.counters()) {
                let thread = self.thread(index, *worker, &counters);
                counts.requests.add(&thread.requests);
                counts.segments.add(&thread.segments);
                counts.queues.push(thread);
            }
        }
        counts
    }

    /// Bytes of raw I/O that a drain of all queues waits for.
    pub(super) fn draining(&self) -> u64 {
        match &self.slot {
            Slot::Active { session, .. } | Slot::Draining { session, .. } => {
                session.counters().iter().map(|counters| counters.draining.get()).sum()
            }
            Slot::Free => 0,
        }
    }

    /// Queue *i* is served by thread *i* mod N.
    fn thread(&self, index: usize, worker: WorkerId, counters: &Counters) -> QueueThread {
        let step = usize::from(self.device.threads).max(1);
        QueueThread {
            worker: worker.0,
            queues: (0..self.device.num_queues).skip(index).step_by(step).collect(),
            requests: Requests::of(counters),
            segments: Segments::of(counters),
        }
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        let drain = match &self.slot {
            Slot::Draining { say_at, .. } => Some(*say_at),
            _ => None,
        };
        [drain, self.door.as_ref().and_then(Door::deadline)].into_iter().flatten().min()
    }

    pub(super) fn tick(&mut self, poll: &Poll, now: Duration) {
        if let Some(door) = &mut self.door {
            door.tick(poll, now);
        }
        if let Slot::Draining { since, say_at, waiting, .. } = &mut self.slot
            && *say_at <= now
        {
            *say_at = now + DRAIN_REPEAT;
            let seconds = now.saturating_sub(*since).as_secs_f32();
            warn!("still waiting for I/O of {} queue threads after {seconds:.1} s", waiting.len());
        }
    }
}
