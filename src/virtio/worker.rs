// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One worker thread: its queues, its requests, its ring, its mailbox.
//!
//! The thread is vhost-user-backend's. Once it has been woken for the first time it stays here
//! ([`Worker::run`]) and sleeps in its ring, which wakes it for completions, kicks and mail alike, and for whatever
//! happens in the crate's epoll set: then it goes back there. Each time it goes round: hear the mailbox, answer what has
//! completed, take chains, signal each guest queue once or put that off, and hand the kernel everything in the system
//! call in which it sleeps. It never blocks, and only it touches what is in here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::Duration;

use vhost_user_backend::VringEpollHandler;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::Memory;
use super::backend::Backend;
use super::chain::{Chain, Piece};
use super::mailbox::Mailbox;
use super::notify::{Notifier, Signal};
use super::queue::{Broken, Queue, Vring};
use super::requests::Requests;
use super::spin::{Polling, Spin};
use crate::engine;
use crate::engine::message::{ToWorker, WorkerId};
use crate::engine::request::{Kind, Status};
use crate::engine::{Io, Tag};
use crate::inbox::Event;
use crate::sys::uring::{Hear, Sleep};

#[path = "worker_orders.rs"]
mod orders;
#[path = "worker_rest.rs"]
mod rest;
#[path = "worker_take.rs"]
mod take;

use orders::Order;

/// What a worker needs of its ring beyond [`Io`].
pub(crate) trait Disk: Io {
    /// Lets the signals of `fd` end [`wait`](Self::wait); see [`Ring::watch`].
    ///
    /// [`Ring::watch`]: crate::sys::uring::Ring::watch
    fn watch(&mut self, place: usize, fd: Option<RawFd>, hear: Hear) -> io::Result<()>;
    /// Whether there were such signals.
    fn heard_at(&mut self, place: usize) -> bool;
    /// Hands what is queued to the kernel, without waiting.
    fn enter(&mut self) -> io::Result<()>;
    /// Hands what is queued to the kernel and sleeps until there is something to do.
    fn wait(&mut self, sleep: Sleep) -> io::Result<()>;
    /// Whether several completions are likely to come soon: the ring has been given so many operations, and such sleeps have
    /// paid off. What it holds back until the last moment does not count yet.
    fn is_deep(&self) -> bool;
    /// Whether something has completed. No system call as a rule.
    fn has_completions(&mut self) -> bool;
    /// Operations not yet reaped.
    fn in_flight(&self) -> u32;
    /// The request's data are these pieces. `None` if one is not guest memory; else whether they
    /// can be used without bouncing.
    fn attach(&mut self, tag: Tag, memory: &Arc<Memory>, pieces: &[Piece]) -> Option<bool>;
    /// Whether requests are in so many pieces of memory that no more are to be taken until some are done.
    fn is_crowded(&mut self) -> bool;
    /// This is the guest's memory from now on; nothing is in flight.
    fn adopt(&mut self, memory: &Arc<Memory>);
    /// Lets go of the request's data.
    fn detach(&mut self, tag: Tag);
}

/// What a worker thread can be told. Queues are named by their place in the worker.
#[derive(Debug)]
pub(crate) enum Mail {
    /// From the keeper.
    Engine(ToWorker),
    /// The queue's doorbell, from now on.
    Kick(usize, Option<Notifier>),
    /// The queue's signal, from now on.
    Call(usize, Option<Notifier>),
    /// The queue's error signal, from now on.
    Err(usize, Option<Notifier>),
    /// The driver has set the cache mode.
    CacheMode,
    /// The ring is about to be disabled: take nothing more from it, and say when it is drained.
    Pause(usize, Sender<()>),
    /// The ring is about to be enabled.
    Resume(usize),
    /// The ring has been stopped: drain it, then forget its fds.
    Stop(usize, Sender<()>),
    /// Drain everything, then use this memory.
    Memory(Arc<Memory>, Sender<()>),
    /// Drain everything.
    Drain(Sender<()>),
    /// How many requests of a queue (of all, if `None`) are in flight, and the oldest one's age.
    Describe(Option<usize>, Sender<(u32, Duration)>),
    /// Take nothing more, drain everything, drop the ring, post [`Event::Quiesced`].
    Quiesce,
}

/// The crate's epoll loop of a thread.
pub(crate) type Handler = VringEpollHandler<Arc<Backend>>;

/// The token of a mailbox in its thread's epoll set, above those the crate keeps for itself.
pub(crate) fn mailbox_token(num_queues: u16) -> u64 {
    u64::from(num_queues) + 1
}

/// What a worker watches: the crate's epoll set, its mailbox, the doorbells of its queues.
const CRATE: usize = 0;
const MAILBOX: usize = 1;
const FIRST_KICK: usize = 2;

/// How many descriptors a worker with `queues` queues watches.
pub(crate) const fn watches(queues: usize) -> usize {
    FIRST_KICK + queues
}

/// What a worker is made of.
pub(crate) struct Parts<D> {
    pub(crate) id: WorkerId,
    pub(crate) backend: Arc<Backend>,
    pub(crate) handler: Arc<Handler>,
    pub(crate) mailbox: Mailbox<Mail>,
    pub(crate) queues: Vec<Queue>,
    pub(crate) engine: engine::Worker,
    pub(crate) counters: Arc<engine::counters::Counters>,
    pub(crate) max_requests: u32,
    pub(crate) memory: Arc<Memory>,
    pub(crate) disk: D,
    pub(crate) polling: Polling,
}

/// A worker thread's state; lives and dies on that thread.
pub(crate) struct Worker<D> {
    id: WorkerId,
    backend: Arc<Backend>,
    handler: Arc<Handler>,
    mailbox: Mailbox<Mail>,
    queues: Vec<Queue>,
    engine: engine::Worker,
    counters: Arc<engine::counters::Counters>,
    requests: Requests,
    /// The guest memory of every request in flight: changed only when there is none.
    memory: Arc<Memory>,
    /// Gone once the worker is quiesced.
    disk: Option<D>,
    spin: Spin,
    chain: Chain,
    heads: Vec<u16>,
    /// Where on the disk the requests of a batch seem to begin.
    ahead: Vec<u64>,
    /// The ranges of the DISCARD or WRITE_ZEROES just read.
    ranges: Vec<Kind>,
    orders: Vec<Order>,
    quiescing: bool,
    write_through: Option<bool>,
    /// For the queues' error signals, which are rare: one for all.
    errs: Signal,
}

impl<D: Disk> Worker<D> {
    /// Puts a worker together, on its thread. From here on its mailbox rings in the ring.
    ///
    /// # Errors
    /// The mailbox or the crate's epoll set cannot be watched.
    pub(crate) fn new(mut parts: Parts<D>) -> io::Result<Self> {
        let (bell, token) = (parts.mailbox.as_raw_fd(), mailbox_token(parts.backend.num_queues()));
        parts.disk.watch(CRATE, Some(parts.handler.as_raw_fd()), Hear::Level)?;
        parts.disk.watch(MAILBOX, Some(bell), Hear::Each)?;
        parts.handler.unregister_listener(bell, EventSet::IN, token)?;
        Ok(Self {
            id: parts.id,
            backend: parts.backend,
            handler: parts.handler,
            mailbox: parts.mailbox,
            queues: parts.queues,
            engine: parts.engine,
            counters: parts.counters,
            requests: Requests::new(parts.max_requests),
            memory: parts.memory,
            disk: Some(parts.disk),
            spin: Spin::new(parts.polling),
            chain: Chain::default(),
            heads: Vec::new(),
            ahead: Vec::new(),
            ranges: Vec::new(),
            orders: Vec::new(),
            quiescing: false,
            write_through: None,
            errs: Signal::default(),
        })
    }

    /// The crate's epoll set had something, perhaps our mail.
    pub(crate) fn event(&mut self, vrings: &[Vring]) {
        if self.disk.is_some() {
            // See `leave`.
            let _ = self.handler.unregister_listener(
                self.mailbox.as_raw_fd(),
                EventSet::IN,
                mailbox_token(self.backend.num_queues()),
            );
        } else {
            // The mailbox is back in the set, and heard by its level. Whether it looks rung or not: a post
            // rings in two steps, and one that we saw between them, awake, rings for mail that we have read.
            self.mailbox.silence();
            self.read_mail();
        }
        self.run(vrings);
    }

    /// Goes round until the crate has something to do or the ring is gone, and sleeps in between.
    fn run(&mut self, vrings: &[Vring]) {
        loop {
            let heard = self.hear_mail();
            self.answer_all(vrings);
            let full = self.take_all(vrings);
            self.answer_all(vrings);
            if !self.spin.look().is_zero() {
                // There is no sleep whose system call this could go with. And who is woken below may take this CPU: then the disk has
                // something to do meanwhile.
                self.enter();
            }
            self.notify_all(vrings, false);
            let settled = self.settle();
            let Some(disk) = &mut self.disk else {
                if heard || settled {
                    continue;
                }
                return;
            };
            if disk.heard_at(CRATE) && self.leave() {
                self.notify_all(vrings, true);
                return self.enter();
            }
            if heard || full || settled || self.look(vrings) || self.arm(vrings) {
                self.enter();
            } else {
                self.sleep(vrings);
            }
        }
    }

    /// Makes the crate come back to us, and says whether it will. It need not have anything for us by now: what it was
    /// woken for may have been taken back meanwhile. So the bell goes into its epoll set: nobody reads it while there is
    /// a ring, and it has been rung at least once, so it is heard there at once.
    fn leave(&self) -> bool {
        let (bell, token) = (self.mailbox.as_raw_fd(), mailbox_token(self.backend.num_queues()));
        let result = self.handler.register_listener(bell, EventSet::IN, token);
        if let Err(error) = &result {
            tracing::error!(worker = self.id.0, %error, "the mailbox cannot be watched");
        }
        result.is_ok()
    }

    /// Signals the guest for what was published, or puts that off unless it has to be `now`.
    fn notify_all(&mut self, vrings: &[Vring], now: bool) {
        self.for_each(vrings, |queue, vring, memory| queue.notify(vring, memory, now));
    }

    /// Does something with every queue, and breaks those where it cannot be done.
    fn for_each(
        &mut self,
        vrings: &[Vring],
        mut act: impl FnMut(&mut Queue, &Vring, &Memory) -> Result<(), Broken>,
    ) {
        for (place, vring) in vrings.iter().enumerate() {
            let Some(queue) = self.queues.get_mut(place) else { continue };
            if let Err(why) = act(queue, vring, &self.memory) {
                self.break_queue(place, why);
            }
        }
    }

    fn call(&mut self, call: impl FnOnce(&mut D) -> io::Result<()>) {
        if let Some(Err(error)) = self.disk.as_mut().map(call) {
            tracing::error!(worker = self.id.0, %error, "io_uring refuses to work");
        }
    }

    /// Reads completions, answers what is finished, passes on what the keeper must know.
    fn answer_all(&mut self, vrings: &[Vring]) {
        if let Some(disk) = &mut self.disk {
            self.engine.reap(disk);
        }
        let mut answered = 0;
        while let Some((tag, status)) = self.engine.poll_done() {
            self.answer_pending(tag, status);
            answered += 1;
        }
        if answered > 0
            && let Some(disk) = &self.disk
        {
            self.spin.completed(disk.lately(), answered);
        }
        self.post_messages();
        self.for_each(vrings, Queue::publish);
    }

    fn post_messages(&mut self) {
        while let Some(message) = self.engine.poll_message() {
            self.backend.post(Event::Worker(self.id, message));
        }
    }

    fn answer_pending(&mut self, tag: Tag, status: Status) {
        if let Some(disk) = &mut self.disk {
            disk.detach(tag);
        }
        if let Some(pending) = self.requests.leave(tag) {
            let (queue, head) = (pending.queue, pending.head);
            // A read may have gone to memory that is not there.
            let status = if self.memory_is_lost() { Status::IoError } else { status };
            self.answer(queue, head, pending.status, status, pending.written);
        }
    }

    /// Whether what was read of guest memory may be zeros that the guest never wrote.
    fn memory_is_lost(&self) -> bool {
        self.backend.regions().are_lost()
    }

    /// Writes a status byte and hands the chain back with the next batch.
    ///
    /// `written` is told whatever the status is, as QEMU does: drivers that bounce copy that many
    /// bytes, and must get the status.
    fn answer(&mut self, place: usize, head: u16, at: GuestAddress, status: Status, written: u32) {
        let reached = self.memory.store(status.byte(), at, Ordering::Relaxed).is_ok();
        if let Some(queue) = self.queues.get_mut(place) {
            queue.done(head, if reached { written } else { 0 });
        }
    }

    /// Watches another doorbell. What the old one was rung for is looked for in the ring anyway; it is read
    /// so that whoever has the other end does not take it for a kick that nobody heard.
    fn set_kick(&mut self, place: usize, kick: Option<Notifier>) {
        let Some(queue) = self.queues.get_mut(place) else { return };
        let Some(disk) = &mut self.disk else {
            queue.kick = None;
            return;
        };
        let fd = kick.as_ref().map(|kick| kick.as_fd().as_raw_fd());
        let watched = disk.watch(FIRST_KICK + place, fd, Hear::Each);
        if let Some(old) = queue.kick.take() {
            old.hear();
        }
        match watched {
            Ok(()) => queue.kick = kick,
            Err(error) => tracing::warn!(queue = queue.index, %error, "kick fd cannot be watched"),
        }
    }

    fn break_queue(&mut self, place: usize, why: Broken) {
        let Some(queue) = self.queues.get_mut(place) else { return };
        if !queue.broken {
            queue.broken = true;
            let queue = queue.index;
            self.complain(place);
            // Rings that are missing are told of once, by the session's end.
            if !self.memory_is_lost() {
                tracing::warn!(queue, %why, "queue stopped until it is set up anew");
            }
        }
    }

    /// Tells the frontend that something is wrong with a queue. If that cannot be done, the line in
    /// the log has to do.
    fn complain(&mut self, place: usize) {
        let err = self.queues.get(place).and_then(|queue| queue.err.as_ref());
        if err.is_some() && self.errs.aim(err).is_ok() {
            self.errs.send();
        }
    }
}
