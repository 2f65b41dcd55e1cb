// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What vhost-user-backend asks of a device, for one session.
//!
//! Its daemon thread calls everything here but `handle_event`, under its own lock, so these calls
//! only hand mail to the workers and, where the protocol says that nothing may be in flight any
//! more, wait for them. `handle_event` is the workers' end: each crate thread keeps its
//! `Worker` to itself, in a thread-local.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::Memory;
use super::cache_mode::{Changed, SessionMode};
use super::disk::RingDisk;
use super::features;
use super::limits::MemoryLimits;
use super::mailbox::{Mailbox, Slot};
use super::queue::{AtomicMemory, Queue, QueueCounters, Vring};
use super::session::DeviceConfig;
use super::worker::{Handler, Mail, Parts, Worker, watches};
use crate::engine;
use crate::engine::counters::Counters;
use crate::engine::message::WorkerId;
use crate::engine::request::Limits;
use crate::inbox::Event;
use crate::sys::fault::GuestRegions;
use crate::sys::fd::Forgotten;
use crate::sys::inspect::Inspections;
use crate::sys::uring::Ring;

#[path = "backend_drain.rs"]
mod drain;

/// The answer to GET_ID.
pub(crate) type Id = [u8; 20];

thread_local! {
    /// The worker of this thread, if it is one of the crate's.
    static WORKER: RefCell<Option<Worker<RingDisk>>> = const { RefCell::new(None) };
}

/// What a worker thread needs to begin.
pub(crate) struct Seat {
    /// The device it works for.
    pub(crate) backend: Arc<Backend>,
    /// The thread's epoll loop.
    pub(crate) handler: Arc<Handler>,
    /// Its mailbox.
    pub(crate) mailbox: Mailbox<Mail>,
    /// Told how it went.
    pub(crate) ready: Sender<io::Result<()>>,
}

/// One worker thread, from outside.
#[derive(Debug)]
pub(crate) struct Thread {
    /// Its number for the keeper.
    pub(crate) id: WorkerId,
    /// Its mailbox.
    pub(crate) slot: Slot<Mail>,
    /// What its engine counts.
    pub(crate) counters: Arc<Counters>,
    /// What its queues count, in their order on the thread.
    pub(crate) queues: Vec<Arc<QueueCounters>>,
}

/// The crate threads' exit events.
#[derive(Debug, Default)]
struct Exits {
    /// Not handed out yet, the last thread's first.
    made: Vec<(EventConsumer, EventNotifier)>,
    /// Handed out and forgotten.
    forgotten: Vec<Forgotten>,
}

/// One session's device.
pub struct Backend {
    config: Arc<DeviceConfig>,
    threads: Vec<Thread>,
    seats: Mutex<Vec<Option<Seat>>>,
    exits: Mutex<Exits>,
    id: Id,
    /// The guest's memory, parts of which may turn out to be missing.
    regions: Arc<GuestRegions>,
    /// Names the device in the log, if the process has several.
    pub(crate) span: tracing::Span,
    mode: SessionMode,
    /// Whether a ring has been started since the device was last new.
    started: AtomicBool,
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl Backend {
    /// The device of a new session; `threads` are its workers, queue `i` on thread `i mod N`.
    ///
    /// # Errors
    /// An eventfd cannot be made.
    pub(crate) fn new(config: Arc<DeviceConfig>, threads: Vec<Thread>) -> io::Result<Self> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let exit = |_| new_event_consumer_and_notifier(flags);
        let made = threads.iter().map(exit).collect::<io::Result<_>>()?;
        let mut id = Id::default();
        id.iter_mut().zip(config.serial.bytes()).for_each(|(to, from)| *to = from);
        Ok(Self {
            seats: Mutex::new(threads.iter().map(|_| None).collect()),
            threads,
            exits: Mutex::new(Exits { made, forgotten: Vec::new() }),
            id,
            regions: Arc::new(GuestRegions::new()?),
            span: tracing::Span::current(),
            mode: SessionMode::new(),
            started: AtomicBool::new(false),
            config,
        })
    }

    /// Its worker threads.
    pub(crate) fn threads(&self) -> &[Thread] {
        &self.threads
    }

    /// The number of its queues.
    pub(crate) fn num_queues(&self) -> u16 {
        self.config.num_queues
    }

    /// What the guest may do.
    pub(crate) fn limits(&self) -> &Limits {
        &self.config.limits
    }

    /// The answer to GET_ID.
    pub(crate) fn id(&self) -> &Id {
        &self.id
    }

    /// What the guest's memory may take.
    pub(crate) fn memory_limits(&self) -> MemoryLimits {
        self.config.memory_limits
    }

    /// What looks at the descriptors of the device's frontends.
    pub(crate) fn inspections(&self) -> Arc<Inspections> {
        Arc::clone(&self.config.inspections)
    }

    /// The guest's memory, which tells when a part of it is missing.
    pub(crate) fn regions(&self) -> &Arc<GuestRegions> {
        &self.regions
    }

    /// Whether writes complete only when durable (R15).
    pub(crate) fn write_through(&self) -> bool {
        self.mode.write_through()
    }

    /// Posts to the main loop.
    pub(crate) fn post(&self, event: Event) {
        self.config.inbox.post(event);
    }

    /// Lets a worker thread begin: it takes its seat when it is woken next.
    pub(crate) fn seat(&self, thread: usize, seat: Seat) {
        let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(place), Some(thread)) = (seats.get_mut(thread), self.threads.get(thread)) {
            *place = Some(seat);
            thread.slot.ring();
        }
    }

    /// What the crate has forgotten to close; to be taken once it is gone.
    pub(crate) fn take_exits(&self) -> Vec<Forgotten> {
        let mut exits = self.exits.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut exits.forgotten)
    }

    /// Gives a worker its thread. `None` if there is none (any more) to begin.
    fn take_seat(&self, thread: usize) -> Option<Worker<RingDisk>> {
        let seat = {
            let mut seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
            seats.get_mut(thread)?.take()?
        };
        let (worker, result) = match seat.backend.begin(thread, seat.handler, seat.mailbox) {
            Ok(worker) => (Some(worker), Ok(())),
            Err(error) => (None, Err(error)),
        };
        // The session has stopped waiting only if it failed already.
        let _ = seat.ready.send(result);
        worker
    }

    /// Makes the worker, and its ring, on its own thread.
    fn begin(
        self: &Arc<Self>,
        index: usize,
        handler: Arc<Handler>,
        mailbox: Mailbox<Mail>,
    ) -> io::Result<Worker<RingDisk>> {
        let config = &self.config;
        let thread = self.threads.get(index).ok_or(io::ErrorKind::NotFound)?;
        let step = self.threads.len();
        let numbers = (index..usize::from(config.num_queues)).step_by(step);
        let queues: Vec<Queue> = numbers
            .zip(&thread.queues)
            .map(|(number, counters)| {
                Queue::new(u16::try_from(number).unwrap_or(u16::MAX), Arc::clone(counters))
            })
            .collect();
        let count = u32::try_from(queues.len()).unwrap_or(u32::MAX);
        let max_requests = count.saturating_mul(u32::from(config.queue_size));
        let (image, device) = (config.files.image_fd(), config.files.device_fd());
        let watches = watches(queues.len());
        let mut ring = Ring::new(image, device, &config.geometry, config.lease, watches)?;
        ring.guard(&self.regions);
        let mut engine = engine::Worker::new(
            config.geometry,
            config.rules,
            Arc::clone(&config.shared),
            Arc::clone(&thread.counters),
            max_requests,
        );
        if config.strict {
            engine.set_strict();
        }
        Worker::new(Parts {
            id: thread.id,
            backend: Arc::clone(self),
            handler,
            mailbox,
            queues,
            engine,
            counters: Arc::clone(&thread.counters),
            max_requests,
            memory: Arc::new(Memory::new()),
            disk: RingDisk::new(ring, config, step),
            polling: config.polling,
        })
    }

    fn mode_changed(&self, changed: Changed) {
        if changed.guessed {
            let _named = self.span.enter();
            tracing::info!(
                "the driver was told its cache mode by an earlier server, and may rely on \
                 write-through: it gets that until it sets the mode (cache_type in Linux) or its \
                 VMM is started anew"
            );
        }
        if changed.mode {
            // At once: it makes what was written before durable (R15).
            self.threads.iter().for_each(|thread| thread.slot.post(Mail::CacheMode));
        }
    }

    /// The device is as new: another driver takes over.
    ///
    /// The cache mode stays: after a reset it may be either (virtio 1.3, 5.2.5), but the guest must
    /// be told which, and QEMU does not ask us again: it tells what was last set through it (ADR
    /// 0011).
    fn renew(&self) {
        self.started.store(false, Ordering::Release);
        self.post(Event::DeviceReset);
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.config.num_queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.config.queue_size)
    }

    fn features(&self) -> u64 {
        features::offered(&self.config.limits)
    }

    fn acked_features(&self, features: u64) {
        self.mode_changed(self.mode.features(&self.config.cache, features));
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        features::protocol()
    }

    fn reset_device(&self) {
        self.drain_all("RESET_DEVICE", Mail::Drain);
        self.renew();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The crate has told its queues already, and the workers ask those.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = &self.config;
        let byte = self.mode.ask(&config.cache, offset, size);
        features::config(&config.limits, &config.topology, config.num_queues, byte, offset, size)
    }

    /// Takes the `writeback` byte and nothing else. An error would end the session, so there is none.
    ///
    /// Whether the driver may set it is for the frontend to know: a driver that sets it before
    /// DRIVER_OK does so before its features are acknowledged here, and has it from then on.
    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let _named = self.span.enter();
        let place = features::WRITEBACK_OFFSET.checked_sub(offset);
        let byte = place.and_then(|place| bytes.get(usize::try_from(place).ok()?));
        match byte {
            Some(byte) => {
                self.mode_changed(self.mode.set(&self.config.cache, *byte != 0));
                let write_through = self.write_through();
                tracing::debug!(write_through, "the driver set the cache mode");
            }
            None => tracing::debug!(offset, size = bytes.len(), "configuration write ignored"),
        }
        Ok(())
    }

    /// The crate has put the new memory in place already. The workers go over to it once nothing
    /// of the old is in use, and this returns then (R22).
    fn update_memory(&self, memory: AtomicMemory) -> io::Result<()> {
        let memory = memory.memory();
        self.regions.add(&memory)?;
        // Each worker gets a list of its own: they count references to it with every request, and
        // would take the counter's cache line from each other.
        self.drain_all("memory change", |done| {
            Mail::Memory(Arc::new(Memory::clone(&memory)), done)
        });
        self.regions.keep(&memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let threads = self.threads.len();
        let mask = |thread| {
            (thread..usize::from(self.config.num_queues)).step_by(threads).fold(0, |mask, queue| {
                mask | 1u64.checked_shl(u32::try_from(queue).unwrap_or(u32::MAX)).unwrap_or(0)
            })
        };
        (0..threads).map(mask).collect()
    }

    /// Always a pair: without one the crate waits for its threads forever.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let mut exits = self.exits.lock().unwrap_or_else(PoisonError::into_inner);
        let (consumer, notifier) = exits.made.pop()?;
        exits.forgotten.push(Forgotten::remember(&consumer));
        Some((consumer, notifier))
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        self.drain_queue("GET_VRING_BASE", queue, Mail::Stop, &|| true);
        Ok(())
    }

    fn handle_event(
        &self,
        _token: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        let _named = self.span.enter();
        WORKER.with_borrow_mut(|worker| {
            if worker.is_none() {
                *worker = self.take_seat(thread);
            }
            if let Some(worker) = worker {
                worker.event(vrings);
            }
        });
        // An error would end the thread without a word.
        Ok(())
    }
}
