// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One frontend's connection, from accept to the last closed fd (R23).
//!
//! Everything in it is new: crate daemon, worker threads, rings, relay. The main loop starts it
//! with an accepted socket, passes the keeper's messages on, and ends it in two steps:
//! [`Session::quiesce`], and when every worker has posted [`Event::Quiesced`],
//! [`Session::finish`].

use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, mpsc::Sender};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::epoll::EventSet;

use super::Memory;
use super::backend::{Backend, Seat, Thread};
use super::cache_mode::CacheMode;
use super::features::Topology;
use super::limits::{Account, MemoryLimits};
use super::mailbox::{Mailbox, mailbox};
use super::queue::QueueCounters;
use super::relay::Relay;
use super::spin::Polling;
use super::worker::{Mail, mailbox_token};
use crate::engine::counters::Counters;
use crate::engine::message::{ToWorker, WorkerId};
use crate::engine::request::Limits;
use crate::engine::shared::Shared;
use crate::engine::{Geometry, Rules};
use crate::inbox::{Event, Poster};
use crate::sys::fd::Forgotten;
use crate::sys::inspect::Inspections;
use crate::sys::lease;

/// Queues of a device, at most: the crate names the queues of a thread by the bits of a `u64`.
pub const MAX_QUEUES: u16 = 64;

/// Where the image's bytes are. Rings register these, so that the image's description (and the
/// lease and the lock on it) outlive every request (R1a).
pub trait Files: Send + Sync {
    /// The image's one open file description.
    fn image_fd(&self) -> BorrowedFd<'_>;
    /// The block device below it, for raw access.
    fn device_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// What sessions of one device are made of.
pub struct DeviceConfig {
    /// The image and its device.
    pub files: Arc<dyn Files>,
    /// Sizes and alignments.
    pub geometry: Geometry,
    /// What the guest may do.
    pub limits: Limits,
    /// What the guest is told about the device.
    pub topology: Topology,
    /// The lease of the image that raw access depends on, if it does.
    pub lease: Option<lease::Kind>,
    /// All of them.
    pub rules: Rules,
    /// Where the keeper publishes mode and map.
    pub shared: Arc<Shared>,
    /// Queues offered: 1 to [`MAX_QUEUES`].
    pub num_queues: u16,
    /// Largest ring accepted, in descriptors: a power of two up to 32768.
    pub queue_size: u16,
    /// Worker threads: 1 to `num_queues`.
    pub threads: u16,
    /// The answer to GET_ID; its first 20 bytes count.
    pub serial: String,
    /// How long workers look before they sleep (`--poll-us`).
    pub polling: Polling,
    /// Guest memory is registered with the rings (`--pin-memory`).
    pub pin_memory: bool,
    /// FLUSH holds later requests back (`--barrier=strict`).
    pub strict: bool,
    /// What its drivers were told of their write cache.
    pub cache: CacheMode,
    /// What a frontend's memory may take.
    pub memory_limits: MemoryLimits,
    /// Looks at the descriptors that frontends send.
    pub inspections: Arc<Inspections>,
    /// The main loop.
    pub inbox: Poster,
}

impl std::fmt::Debug for DeviceConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceConfig").field("serial", &self.serial).finish_non_exhaustive()
    }
}

/// What one queue has done.
#[derive(Clone, Debug)]
pub struct QueueStatus {
    /// Its number.
    pub index: u16,
    /// Its counts.
    pub counters: Arc<QueueCounters>,
}

type Daemon = VhostUserDaemon<Arc<Backend>>;

/// A running session.
pub struct Session {
    backend: Arc<Backend>,
    daemon: Option<Daemon>,
    relay: Option<JoinHandle<()>>,
    exit: Arc<OwnedFd>,
    /// The frontend's connection, of which this process has no other descriptor. It is closed with
    /// the session, when the last request has been published: the used index that a frontend finds
    /// when its connection ends is where it goes on from, and what was published later would be
    /// answered twice.
    front: Arc<UnixStream>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("backend", &self.backend).finish_non_exhaustive()
    }
}

impl Session {
    /// Serves `stream`. Its workers are numbered from `first_worker` on; they run when this
    /// returns, but no message of the frontend's has reached them yet.
    ///
    /// # Errors
    /// A thread, a ring or an fd cannot be made; nothing is left behind then.
    pub fn start(
        stream: UnixStream,
        config: Arc<DeviceConfig>,
        first_worker: WorkerId,
    ) -> io::Result<Self> {
        let (threads, mailboxes) = make_threads(&config, first_worker)?;
        let inbox = config.inbox.clone();
        let backend = Arc::new(Backend::new(config, threads)?);
        let exit = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let memory = GuestMemoryAtomic::new(Memory::new());
        let daemon = Daemon::new("vhost-user".to_owned(), Arc::clone(&backend), memory);
        let daemon = match daemon {
            Ok(daemon) => daemon,
            Err(error) => {
                // It has forgotten those of its threads that run already, and only this ends them.
                for exit in backend.take_exits().into_iter().map(Forgotten::reclaim) {
                    // Only a counter at its maximum can fail here.
                    let _ = rustix::io::write(exit, &1u64.to_ne_bytes());
                }
                return Err(io::Error::other(error.to_string()));
            }
        };
        let front = Arc::new(stream);
        let mut session = Self { backend, daemon: Some(daemon), relay: None, exit, front };
        match session.begin(mailboxes, inbox) {
            Ok(()) => Ok(session),
            Err(error) => {
                session.quiesce();
                session.finish();
                Err(error)
            }
        }
    }

    /// Its workers' numbers.
    pub fn workers(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.backend.threads().iter().map(|thread| thread.id)
    }

    /// What its workers count, in their order.
    #[must_use]
    pub fn counters(&self) -> Vec<Arc<Counters>> {
        self.backend.threads().iter().map(|thread| Arc::clone(&thread.counters)).collect()
    }

    /// What its queues count, in their order.
    #[must_use]
    pub fn queues(&self) -> Vec<QueueStatus> {
        let threads = self.backend.threads();
        let of = |index: u16| {
            let thread = threads.get(usize::from(index) % threads.len().max(1))?;
            let counters = thread.queues.get(usize::from(index) / threads.len().max(1))?;
            Some(QueueStatus { index, counters: Arc::clone(counters) })
        };
        (0..self.backend.num_queues()).filter_map(of).collect()
    }

    /// Passes a message of the keeper's on. One to a worker of another session goes nowhere.
    pub fn send(&self, to: WorkerId, message: ToWorker) {
        if let Some(thread) = self.backend.threads().iter().find(|thread| thread.id == to) {
            thread.slot.post(Mail::Engine(message));
        }
    }

    /// Takes no more requests; each worker drops its ring and posts [`Event::Quiesced`] when it
    /// has answered those it has. Does not wait.
    pub fn quiesce(&self) {
        for thread in self.backend.threads() {
            thread.slot.post(Mail::Quiesce);
        }
    }

    /// Whether the frontend has closed its end.
    #[must_use]
    pub fn hung_up(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.front.as_fd(), PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let end = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        rustix::event::poll(&mut fds, Some(&now)).is_ok()
            && fds.iter().any(|fd| fd.revents().intersects(end))
    }

    /// Ends it: joins every thread and closes every fd. To be called once every worker is
    /// quiesced; before that it would wait for the requests in flight.
    pub fn finish(mut self) {
        self.end();
    }

    /// Brings up the workers, then the connection.
    fn begin(&mut self, mailboxes: Vec<Mailbox<Mail>>, inbox: Poster) -> io::Result<()> {
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        // Only now: later this would wait for a `stop_vring` that waits for the disk.
        let handlers = daemon.get_epoll_handlers();
        let token = mailbox_token(self.backend.num_queues());
        let mut waits: Vec<Receiver<io::Result<()>>> = Vec::new();
        let threads = self.backend.threads().iter().zip(handlers).zip(mailboxes);
        for (index, ((thread, handler), mailbox)) in threads.enumerate() {
            let (ready, wait): (Sender<_>, _) = mpsc::channel();
            handler.register_listener(thread.slot.as_raw_fd(), EventSet::IN, token)?;
            let backend = Arc::clone(&self.backend);
            self.backend.seat(index, Seat { backend, handler, mailbox, ready });
            waits.push(wait);
        }
        for wait in waits {
            wait.recv().map_err(|_| io::Error::other("a worker thread ended"))??;
        }
        let back = connect(daemon)?;
        let (exit, memory) = (Arc::clone(&self.exit), Arc::clone(self.backend.regions()));
        let (front, inspections) = (Arc::clone(&self.front), self.backend.inspections());
        let account = Account::new(self.backend.memory_limits());
        let relay = Relay { front, back, exit, memory, inspections, account };
        let backend = Arc::clone(&self.backend);
        let run = move || {
            let _named = backend.span.enter();
            let reason = relay.run(&*backend).err().map(|error| error.to_string());
            inbox.post(Event::SessionEnded(reason));
        };
        self.relay = Some(std::thread::Builder::new().name("relay".to_owned()).spawn(run)?);
        Ok(())
    }

    fn end(&mut self) {
        // Only a counter at its maximum can fail here, and nobody else writes this one.
        let _ = rustix::io::write(&self.exit, &1u64.to_ne_bytes());
        if let Some(relay) = self.relay.take() {
            // With it goes the crate's connection, and so its daemon thread.
            let _ = relay.join();
        }
        if let Some(mut daemon) = self.daemon.take() {
            log_end(daemon.wait());
            drop(daemon);
        }
        for forgotten in self.backend.take_exits() {
            drop(forgotten.reclaim());
        }
    }
}

impl Drop for Session {
    /// Whoever forgot [`finish`](Self::finish) waits here.
    fn drop(&mut self) {
        if self.daemon.is_some() {
            self.quiesce();
            self.end();
        }
    }
}

/// The session's threads as seen from outside, and their mailboxes.
fn make_threads(
    config: &DeviceConfig,
    first: WorkerId,
) -> io::Result<(Vec<Thread>, Vec<Mailbox<Mail>>)> {
    let (queues, count) = (config.num_queues, config.threads);
    if queues == 0 || queues > MAX_QUEUES || count == 0 || count > queues {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "bad number of queues or threads"));
    }
    let mut threads = Vec::new();
    let mut mailboxes = Vec::new();
    for index in 0..count {
        let (mailbox, slot) = mailbox()?;
        mailboxes.push(mailbox);
        threads.push(Thread {
            id: WorkerId(first.0.wrapping_add(u32::from(index))),
            slot,
            counters: Arc::default(),
            queues: (index..queues).step_by(usize::from(count)).map(|_| Arc::default()).collect(),
        });
    }
    Ok((threads, mailboxes))
}

/// Connects to the crate's daemon, which takes no connected stream: through a listener in a
/// directory that nobody else can enter, gone before this returns.
fn connect(daemon: &mut Daemon) -> io::Result<UnixStream> {
    let directory = PrivateDirectory::new()?;
    let path = directory.0.join("s");
    let listener = UnixListener::bind(&path)?;
    let stream = UnixStream::connect(&path)?;
    let started = daemon.start(&mut Listener::from(listener));
    started.map_err(|error| io::Error::other(error.to_string()))?;
    Ok(stream)
}

/// A directory of our own, removed with what is in it.
struct PrivateDirectory(PathBuf);

impl PrivateDirectory {
    fn new() -> io::Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let parent = std::env::temp_dir();
        loop {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("extentd-{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                // Left behind by a killed process of the same number, or put there to annoy.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        // Best effort: an empty directory more in /tmp is no reason to fail a session.
        let _ = std::fs::remove_file(self.0.join("s"));
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// How the crate's daemon thread ended. A connection that went away is the usual end.
fn log_end(result: Result<(), DaemonError>) {
    use VhostUserError::{Disconnected, PartialMessage, SocketBroken};
    match result {
        Ok(())
        | Err(DaemonError::HandleRequest(Disconnected | PartialMessage | SocketBroken(_))) => {}
        Err(error) => tracing::warn!(%error, "vhost-user session ended with an error"),
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
