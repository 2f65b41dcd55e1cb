// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mailbox, and what waits for requests to end (R22).

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::{Disk, Mail, Worker};
use crate::inbox::Event;
use crate::virtio::Memory;
use crate::virtio::notify::Notifier;

/// Something to be done, and answered, once nothing is in flight.
#[derive(Debug)]
pub(super) struct Order {
    /// On this queue; on none, if `None`.
    queue: Option<usize>,
    then: Then,
    done: Sender<()>,
}

#[derive(Debug)]
enum Then {
    Nothing,
    /// Forget the queue's fds, as the crate does.
    Forget(usize),
    /// Use other guest memory.
    Memory(Arc<Memory>),
}

impl<D: Disk> Worker<D> {
    /// Reads the mail if the bell was rung. True if it was.
    pub(super) fn hear_mail(&mut self) -> bool {
        let rung = self.mailbox.rung();
        if rung {
            self.read_mail();
        }
        rung
    }

    pub(super) fn read_mail(&mut self) {
        self.mailbox.hear();
        while let Some(mail) = self.mailbox.next() {
            self.open(mail);
        }
    }

    fn open(&mut self, mail: Mail) {
        match mail {
            Mail::Engine(message) => {
                if let Some(disk) = &mut self.disk {
                    self.engine.message(disk, message);
                }
            }
            Mail::Kick(queue, kick) => {
                self.set_kick(queue, kick);
                self.begin_anew(queue);
            }
            Mail::CacheMode => self.adopt_write_through(),
            Mail::Call(queue, call) => self.set_call(queue, call),
            Mail::Err(queue, err) => {
                if let Some(queue) = self.queues.get_mut(queue) {
                    queue.err = err;
                }
            }
            Mail::Pause(queue, done) => {
                if let Some(queue) = self.queues.get_mut(queue) {
                    queue.paused = true;
                }
                self.orders.push(Order { queue: Some(queue), then: Then::Nothing, done });
            }
            Mail::Resume(queue) => {
                if let Some(queue) = self.queues.get_mut(queue) {
                    queue.paused = false;
                }
                self.begin_anew(queue);
            }
            Mail::Stop(queue, done) => {
                self.orders.push(Order { queue: Some(queue), then: Then::Forget(queue), done });
            }
            Mail::Memory(memory, done) => {
                self.orders.push(Order { queue: None, then: Then::Memory(memory), done });
            }
            Mail::Drain(done) => {
                self.orders.push(Order { queue: None, then: Then::Nothing, done });
            }
            Mail::Describe(queue, reply) => {
                let answer = (self.in_flight(queue), self.oldest_age(queue));
                // Whoever asked may have stopped waiting.
                let _ = reply.send(answer);
            }
            Mail::Quiesce => self.quiescing = true,
        }
    }

    /// Whether no chain is to be taken from any queue.
    pub(super) fn holds_everything(&self) -> bool {
        self.quiescing || self.disk.is_none() || self.orders.iter().any(|o| o.queue.is_none())
    }

    /// Carries out the orders that nothing is in flight for any more. True if there were any.
    pub(super) fn settle(&mut self) -> bool {
        let mut settled = false;
        let mut index = 0;
        while let Some(order) = self.orders.get(index) {
            if self.in_flight(order.queue) > 0 {
                index += 1;
                continue;
            }
            let order = self.orders.remove(index);
            self.carry_out(order.then);
            // Whoever ordered it may have stopped waiting.
            let _ = order.done.send(());
            settled = true;
        }
        self.settle_quiesce() || settled
    }

    fn carry_out(&mut self, then: Then) {
        match then {
            Then::Nothing => {}
            Then::Forget(place) => {
                self.set_kick(place, None);
                self.begin_anew(place);
                if let Some(queue) = self.queues.get_mut(place) {
                    // What it was aimed at is let go of; that cannot fail.
                    let _ = queue.call.aim(None);
                    queue.err = None;
                }
            }
            Then::Memory(memory) => {
                if let Some(disk) = &mut self.disk {
                    disk.adopt(&memory);
                }
                self.memory = memory;
                (0..self.queues.len()).for_each(|place| self.begin_anew(place));
            }
        }
    }

    /// When everything has been answered the ring goes, here, on the thread it belongs to.
    fn settle_quiesce(&mut self) -> bool {
        let idle = |disk: &D| self.engine.in_flight() == 0 && disk.in_flight() == 0;
        let drained = self.quiescing && self.in_flight(None) == 0;
        if !drained || !self.disk.as_ref().is_some_and(idle) {
            return false;
        }
        self.disk = None;
        for queue in &self.queues {
            if let Some(index) = queue.ended() {
                self.backend.ring_ended(queue.index, index);
            }
        }
        // Mail comes by the crate's epoll set again.
        self.leave();
        // R13: what was written since the last flush is still owed to the next session's.
        self.engine.retire();
        self.post_messages();
        self.backend.post(Event::Quiesced(self.id));
        true
    }

    /// A new signal is rung once: the frontend may have missed one that was due while there was
    /// none, or that went to the one before it. Drivers take spurious ones.
    fn set_call(&mut self, place: usize, call: Option<Notifier>) {
        let Some(queue) = self.queues.get_mut(place) else { return };
        match queue.call.aim(call.as_ref()) {
            Ok(()) => queue.signal(),
            // A guest that hears of nothing would hang without a word.
            Err(error) => {
                let reason =
                    format!("queue {}: its guest cannot be signalled: {error}", queue.index);
                self.backend.post(Event::SessionEnded(Some(reason)));
            }
        }
    }

    fn begin_anew(&mut self, place: usize) {
        if let Some(queue) = self.queues.get_mut(place) {
            queue.broken = false;
            queue.disarm();
            queue.restart();
        }
    }

    fn in_flight(&self, queue: Option<usize>) -> u32 {
        match queue {
            Some(place) => self.queues.get(place).map_or(0, |queue| queue.in_flight),
            None => self.queues.iter().map(|queue| queue.in_flight).sum(),
        }
    }

    fn oldest_age(&self, queue: Option<usize>) -> Duration {
        let now = self.disk.as_ref().map(|disk| disk.now());
        let age = |since| now.map(|now| now.saturating_sub(since));
        self.requests.oldest(queue).and_then(age).unwrap_or_default()
    }
}
