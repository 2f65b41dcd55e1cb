// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting until nothing is in flight (R22), and what the relay tells.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::{Backend, Thread};
use crate::virtio::notify::Notifier;
use crate::virtio::relay::{Hooks, VringFd};
use crate::virtio::worker::Mail;

/// How long a drain may take before it is worth a line, and how often it is then (R22).
const DRAIN_PATIENCE: Duration = Duration::from_millis(500);
const DRAIN_REPEAT: Duration = Duration::from_secs(30);

/// How often somebody who waits for a drain looks whether that still makes sense.
const DRAIN_STEP: Duration = Duration::from_millis(100);

/// Mail that a worker may have waiting before its frontend has to wait with another descriptor. It has three for each queue.
pub(in crate::virtio) const MOST_UNREAD: usize = 1024;
/// How often it looks whether there is room.
const FULL_WAIT: Duration = Duration::from_millis(2);

impl Backend {
    /// The thread a queue is on, and its place there.
    fn place(&self, queue: usize) -> Option<(&Thread, usize)> {
        let threads = self.threads.len();
        let thread = self.threads.get(queue.checked_rem(threads)?)?;
        (queue < usize::from(self.config.num_queues)).then_some((thread, queue / threads))
    }

    /// Waits for a worker to say that it has drained; gives up when `alive` says so.
    fn await_drain(
        &self,
        what: &str,
        thread: &Thread,
        queue: Option<usize>,
        done: &Receiver<()>,
        alive: &dyn Fn() -> bool,
    ) {
        let begun = Instant::now();
        let mut next = DRAIN_PATIENCE;
        loop {
            match done.recv_timeout(DRAIN_STEP) {
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) if !alive() => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if begun.elapsed() >= next {
                next += DRAIN_REPEAT;
                let (reply, answer) = mpsc::channel();
                thread.slot.post(Mail::Describe(queue, reply));
                let (requests, oldest) = answer.recv_timeout(DRAIN_STEP).unwrap_or_default();
                let _named = self.span.enter();
                tracing::warn!(what, requests, ?oldest, "waiting for requests in flight");
            }
        }
    }

    /// Orders the queue's worker to drain it, and waits.
    pub(super) fn drain_queue(
        &self,
        what: &str,
        queue: u32,
        mail: impl Fn(usize, Sender<()>) -> Mail,
        alive: &dyn Fn() -> bool,
    ) {
        let place = usize::try_from(queue).ok().and_then(|queue| self.place(queue));
        if let Some((thread, place)) = place {
            let (sender, done) = mpsc::channel();
            thread.slot.post(mail(place, sender));
            self.await_drain(what, thread, Some(place), &done, alive);
        }
    }

    /// Orders every worker to drain, and waits for all of them.
    pub(super) fn drain_all(&self, what: &str, mail: impl Fn(Sender<()>) -> Mail) {
        let order = |thread: &Thread| {
            let (sender, done) = mpsc::channel();
            thread.slot.post(mail(sender));
            done
        };
        let waits: Vec<_> = self.threads.iter().map(order).collect();
        for (thread, done) in self.threads.iter().zip(&waits) {
            self.await_drain(what, thread, None, done, &|| true);
        }
    }
}

/// What workers say of their rings.
impl Backend {
    /// A worker has taken the first chain of a ring, whose used index is `index`.
    pub(crate) fn ring_started(&self, queue: u16, index: u16) {
        self.mode_changed(self.mode.start(&self.config.cache, queue, index));
    }

    /// A worker has published the last request of a queue.
    pub(crate) fn ring_ended(&self, queue: u16, index: u16) {
        self.config.cache.ended(queue, index);
    }
}

impl Hooks for Backend {
    fn vring_fd(&self, queue: u64, which: VringFd, fd: Option<Notifier>, alive: &dyn Fn() -> bool) {
        let Some((thread, place)) = usize::try_from(queue).ok().and_then(|q| self.place(q)) else {
            return;
        };
        // A worker may be held up, and the descriptors that wait for it are the process's.
        while thread.slot.unread() >= MOST_UNREAD {
            if !alive() {
                return;
            }
            std::thread::sleep(FULL_WAIT);
        }
        thread.slot.post(match which {
            VringFd::Kick => {
                self.started.store(true, Ordering::Release);
                Mail::Kick(place, fd)
            }
            VringFd::Call => Mail::Call(place, fd),
            VringFd::Err => Mail::Err(place, fd),
        });
    }

    fn disable(&self, queue: u32, alive: &dyn Fn() -> bool) {
        self.drain_queue("SET_VRING_ENABLE 0", queue, Mail::Pause, alive);
    }

    fn enable(&self, queue: u32) {
        if let Some((thread, place)) = usize::try_from(queue).ok().and_then(|q| self.place(q)) {
            thread.slot.post(Mail::Resume(place));
        }
    }

    /// An index that is not 0 may be all that is known of a driver that began before its frontend
    /// did.
    ///
    /// A first queue that begins at 0 again belongs to a new driver: one that was only paused
    /// goes on where it was.
    fn set_base(&self, queue: u32, base: u32) {
        if let (Ok(queue), Ok(base)) = (u16::try_from(queue), u16::try_from(base)) {
            self.mode_changed(self.mode.index(&self.config.cache, queue, base));
        }
        if (queue, base) == (0, 0) && self.started.load(Ordering::Acquire) {
            self.renew();
        }
    }
}
