// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One worker thread: its queues, its requests, its ring, its mailbox.
//!
//! The thread is vhost-user-backend's and sleeps in its epoll loop. Whatever wakes it, it goes
//! round ([`Worker::run`]) until there is nothing left to do: hear the mailbox, take chains, enter
//! the ring once, answer what has completed, signal each guest queue once. It never blocks, and
//! only it touches what is in here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use vhost_user_backend::VringEpollHandler;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::Memory;
use super::backend::Backend;
use super::chain::{Chain, Piece};
use super::mailbox::Mailbox;
use super::notify::{Heard, Notifier};
use super::queue::{Broken, Queue, Quiet, Vring};
use super::requests::Requests;
use crate::engine;
use crate::engine::message::{ToWorker, WorkerId};
use crate::engine::request::{Kind, Status};
use crate::engine::{Io, Tag};
use crate::inbox::Event;

#[path = "worker_orders.rs"]
mod orders;
#[path = "worker_take.rs"]
mod take;

use orders::Order;

/// What a worker needs of its ring beyond [`Io`].
pub(crate) trait Disk: Io {
    /// Readable when completions are there.
    fn event_fd(&self) -> RawFd;
    /// Takes back what made it readable.
    fn hear(&self);
    /// Hands what is queued to the kernel, without waiting.
    fn enter(&mut self) -> io::Result<()>;
    /// Completions need not signal while the thread is awake.
    fn mute(&mut self);
    /// Completions signal again; false if there is something to reap already.
    fn listen(&mut self) -> bool;
    /// Operations not yet reaped.
    fn in_flight(&self) -> u32;
    /// The request's data are these pieces. `None` if one is not guest memory; else whether they
    /// can be used without bouncing.
    fn attach(&mut self, tag: Tag, memory: &Arc<Memory>, pieces: &[Piece]) -> Option<bool>;
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

/// The tokens of a thread's own fds in its epoll set, above those the crate keeps for itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tokens {
    first: u16,
}

impl Tokens {
    /// On a device with `num_queues` queues.
    pub(crate) fn new(num_queues: u16) -> Self {
        Self { first: num_queues.saturating_add(1) }
    }

    /// The mailbox.
    pub(crate) fn mailbox(self) -> u16 {
        self.first
    }

    fn disk(self) -> u16 {
        self.first + 1
    }

    fn kick(self, queue: usize) -> u16 {
        self.first + 2 + u16::try_from(queue).unwrap_or(0)
    }

    fn queue(self, token: u16) -> Option<usize> {
        token.checked_sub(self.first + 2).map(usize::from)
    }
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
}

/// A worker thread's state; lives and dies on that thread.
pub(crate) struct Worker<D> {
    id: WorkerId,
    backend: Arc<Backend>,
    handler: Arc<Handler>,
    mailbox: Mailbox<Mail>,
    tokens: Tokens,
    queues: Vec<Queue>,
    engine: engine::Worker,
    counters: Arc<engine::counters::Counters>,
    requests: Requests,
    /// The guest memory of every request in flight: changed only when there is none.
    memory: Arc<Memory>,
    /// Gone once the worker is quiesced.
    disk: Option<D>,
    chain: Chain,
    heads: Vec<u16>,
    /// The ranges of the DISCARD or WRITE_ZEROES just read.
    ranges: Vec<Kind>,
    orders: Vec<Order>,
    quiescing: bool,
    write_through: Option<bool>,
    malformed: Quiet,
    broken: Quiet,
}

impl<D: Disk> Worker<D> {
    /// Puts a worker together, on its thread.
    ///
    /// # Errors
    /// The ring's event fd cannot be watched.
    pub(crate) fn new(parts: Parts<D>) -> io::Result<Self> {
        let tokens = Tokens::new(parts.backend.num_queues());
        let token = u64::from(tokens.disk());
        parts.handler.register_listener(parts.disk.event_fd(), EventSet::IN, token)?;
        Ok(Self {
            id: parts.id,
            backend: parts.backend,
            handler: parts.handler,
            mailbox: parts.mailbox,
            tokens,
            queues: parts.queues,
            engine: parts.engine,
            counters: parts.counters,
            requests: Requests::new(parts.max_requests),
            memory: parts.memory,
            disk: Some(parts.disk),
            chain: Chain::default(),
            heads: Vec::new(),
            ranges: Vec::new(),
            orders: Vec::new(),
            quiescing: false,
            write_through: None,
            malformed: Quiet::default(),
            broken: Quiet::default(),
        })
    }

    /// Something happened: `token` says which fd was readable, if it was one of ours.
    pub(crate) fn event(&mut self, token: u16, vrings: &[Vring]) {
        if token == self.tokens.disk() {
            if let Some(disk) = &self.disk {
                disk.hear();
            }
        } else if token == self.tokens.mailbox() {
            // Whether it looks rung or not: a post rings in two steps, and one that we saw between
            // them, awake, rings for mail that we have read.
            self.read_mail();
        } else if let Some(queue) = self.tokens.queue(token) {
            self.hear_kick(queue);
        }
        self.run(vrings);
    }

    /// Goes round until there is nothing to do and everything that may come will wake us.
    fn run(&mut self, vrings: &[Vring]) {
        if let Some(disk) = &mut self.disk {
            disk.mute();
        }
        loop {
            let heard = self.hear_mail();
            let taken = self.take_all(vrings);
            let answered = self.move_on(vrings);
            let settled = self.settle();
            let busy = heard || taken || answered || settled || self.arm(vrings);
            if !busy && self.listen() {
                return;
            }
        }
    }

    /// Enters the ring, answers what is finished, passes on what the keeper must know.
    fn move_on(&mut self, vrings: &[Vring]) -> bool {
        if let Some(disk) = &mut self.disk {
            if let Err(error) = disk.enter() {
                tracing::error!(worker = self.id.0, %error, "io_uring refuses to work");
            }
            self.engine.reap(disk);
            // What the completions led to must not wait for the next event.
            if let Err(error) = disk.enter() {
                tracing::error!(worker = self.id.0, %error, "io_uring refuses to work");
            }
        }
        while let Some((tag, status)) = self.engine.poll_done() {
            self.answer_pending(tag, status);
        }
        self.post_messages();
        let mut published = false;
        let memory = Arc::clone(&self.memory);
        for (place, vring) in vrings.iter().enumerate() {
            match self.queues.get_mut(place).map(|queue| queue.publish(vring, &memory)) {
                Some(Ok(any)) => published |= any,
                Some(Err(why)) => self.break_queue(place, why),
                None => {}
            }
        }
        published
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
            self.answer(queue, head, pending.status, status, pending.written);
        }
    }

    /// Writes a status byte and hands the chain back with the next batch.
    ///
    /// `written` is told whatever the status is, as QEMU does: drivers that bounce copy that many
    /// bytes, and must get the status.
    fn answer(&mut self, place: usize, head: u16, at: GuestAddress, status: Status, written: u32) {
        let reached = self.memory.write_obj(status.byte(), at).is_ok();
        if let Some(queue) = self.queues.get_mut(place) {
            queue.done(head, if reached { written } else { 0 });
        }
    }

    /// Asks every queue for a kick at its next chain; true if one is there already.
    fn arm(&mut self, vrings: &[Vring]) -> bool {
        if self.holds_everything() {
            return false;
        }
        let memory = Arc::clone(&self.memory);
        let mut more = false;
        for (place, vring) in vrings.iter().enumerate() {
            let Some(queue) = self.queues.get_mut(place) else { continue };
            if !queue.is_open() {
                continue;
            }
            match queue.arm(vring, &memory) {
                Ok(waiting) => more |= waiting,
                Err(why) => self.break_queue(place, why),
            }
        }
        more
    }

    /// Whether we may sleep as far as the ring is concerned.
    fn listen(&mut self) -> bool {
        let quiet = self.disk.as_mut().is_none_or(Disk::listen);
        if !quiet && let Some(disk) = &mut self.disk {
            disk.mute();
        }
        quiet
    }

    fn hear_kick(&mut self, place: usize) {
        let kick = self.queues.get(place).and_then(|queue| queue.kick.as_ref());
        if kick.is_some_and(|kick| kick.hear() == Heard::Broken) {
            tracing::warn!(queue = place, "kick fd is broken, no longer watched");
            self.set_kick(place, None);
        }
    }

    /// Watches another doorbell. The old one must leave the epoll set by hand: the frontend holds
    /// the same description, so closing our fd would not remove it.
    fn set_kick(&mut self, place: usize, kick: Option<Notifier>) {
        let token = u64::from(self.tokens.kick(place));
        let Some(queue) = self.queues.get_mut(place) else { return };
        if let Some(old) = queue.kick.take() {
            let old = old.as_fd().as_raw_fd();
            let _ = self.handler.unregister_listener(old, EventSet::IN, token);
        }
        let Some(kick) = kick else { return };
        let fd = kick.as_fd().as_raw_fd();
        match self.handler.register_listener(fd, EventSet::IN, token) {
            Ok(()) => queue.kick = Some(kick),
            Err(error) => tracing::warn!(queue = queue.index, %error, "kick fd cannot be watched"),
        }
    }

    fn break_queue(&mut self, place: usize, why: Broken) {
        let Some(queue) = self.queues.get_mut(place) else { return };
        if !queue.broken {
            queue.broken = true;
            if let Some(err) = &queue.err {
                err.signal();
            }
            if let Some(times) = self.broken.tell() {
                let queue = queue.index;
                tracing::warn!(queue, times, %why, "queue stopped until it is set up anew");
            }
        }
    }
}
