// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtqueue, as its worker sees it (virtio 1.3, 2.7).
//!
//! The ring's place, size and available index are in the crate's `VringState`, under its lock,
//! because the daemon thread sets and reports them; what is here, the used index among it, belongs
//! to the worker alone. The lock is taken for each batch that is taken, published or looked for,
//! and held for a few loads and stores.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vhost_user_backend::{VringRwLock, VringState, VringT};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::QueueT;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryAtomic, Le16, Le64};

use super::Memory;
use super::cells::{Cells, load};
use super::notify::{Notifier, Signal};
use super::overlap::Layout;
use crate::engine::counters::Counter;

/// The crate's view of guest memory.
pub(crate) type AtomicMemory = GuestMemoryAtomic<Memory>;

/// The crate's state of a virtqueue.
pub(crate) type Vring = VringRwLock<AtomicMemory>;

/// Chains taken from one queue in one go, so that the queues of a thread share it, and before the kernel is given them: a disk
/// that has run dry waits for at most a quarter of what a guest has offered to be understood. More than this with more than four
/// times as many offered or in flight: each time the kernel is given some it may have to wake whoever serves the disk.
pub(crate) const BATCH: u16 = 8;

/// Chains taken from one queue in one go, at most.
const MOST: u16 = 64;

/// Requests of a queue that must still be in flight for a signal to be put off.
const BUSY: u32 = 16;

/// The same for one that is put off even while the worker sleeps, briefly.
const DEEP: u32 = 64;

/// Rounds of its worker that a signal is put off for, at most.
const PUT_OFF: u8 = 4;

/// One queue's counts.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Chains taken.
    pub requests: Counter,
    /// Chains that could not be understood.
    pub malformed: Counter,
    /// Times the guest was signalled.
    pub calls: Counter,
}

/// Where a batch of chains is to be found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// The queue's descriptor table.
    pub(crate) table: GuestAddress,
    /// Its size in descriptors.
    pub(crate) size: u16,
}

/// Why a queue is served no more until the driver or the frontend sets it up anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// A ring is not in guest memory.
    #[error("a ring lies outside of guest memory")]
    Outside,
    /// More chains are said to be available than there are descriptors.
    #[error("the available index runs ahead of the ring")]
    Ahead,
    /// What we write would be what we read.
    #[error("descriptor table, available ring and used ring lie over each other")]
    Overlap,
}

/// One queue of a worker.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    /// Its number on the device.
    pub(crate) index: u16,
    /// The guest's doorbell.
    pub(crate) kick: Option<Notifier>,
    /// How the guest is signalled.
    pub(crate) call: Signal,
    /// How the frontend is told of a malformed chain.
    pub(crate) err: Option<Notifier>,
    /// Requests taken and not yet published.
    pub(crate) in_flight: u32,
    /// Nothing is taken: the frontend is disabling the ring.
    pub(crate) paused: bool,
    /// Nothing is taken: a ring is nonsense.
    pub(crate) broken: bool,
    /// The guest was asked to kick at the next chain, and none has been taken since.
    armed: bool,
    /// The used index the guest was last told of, if it has not been told of all that is published.
    untold: Option<u16>,
    /// Rounds that this has been put off for.
    put_off: u8,
    /// Something was published since [`outlasts_nap`](Self::outlasts_nap) was asked.
    fresh: bool,
    /// Where its parts were found to lie apart.
    apart: Option<Layout>,
    /// The last [`take`](Self::take) left chains that could have been taken.
    more: bool,
    /// Finished and not yet published: head index and bytes written.
    used: Vec<(u16, u32)>,
    /// Where the used ring is that was started; none has been since [`restart`](Self::restart).
    started: Option<u64>,
    /// The used index it began with, until [`begun`](Self::begun) has told it.
    begun: Option<u16>,
    /// It has begun at least once.
    served: bool,
    /// The next used element's index. The crate's own count is not it: the crate reads that from
    /// guest memory at SET_VRING_ADDR, when an old driver's index may still be there, or, in a
    /// running ring, while we publish.
    next_used: u16,
    /// What it counts.
    pub(crate) counters: Arc<QueueCounters>,
}

impl Queue {
    /// The queue numbered `index`.
    pub(crate) fn new(index: u16, counters: Arc<QueueCounters>) -> Self {
        Self { index, counters, ..Self::default() }
    }

    /// Whether chains may be taken, as far as the worker knows. Without a kick fd the crate does not
    /// start a ring, so the rings that a driver leaves alone cost nothing.
    pub(crate) fn is_open(&self) -> bool {
        self.kick.is_some() && !self.paused && !self.broken
    }

    /// Takes a batch of chain heads, if the ring is started and enabled. In flight are never
    /// more than the ring has descriptors (R21).
    pub(crate) fn take(
        &mut self,
        vring: &Vring,
        memory: &Memory,
        heads: &mut Vec<u16>,
    ) -> Result<Place, Broken> {
        let mut state = vring.get_mut();
        let place = place(&state);
        if !state.get_queue().ready() || !state.is_enabled() {
            return Ok(place);
        }
        let layout = Layout::of(state.get_queue());
        if self.apart != Some(layout) {
            if layout.overlaps(memory) {
                return Err(Broken::Overlap);
            }
            self.apart = Some(layout);
        }
        let queue = state.get_queue_mut();
        let available = queue.avail_idx(memory, Ordering::Acquire).map_err(|_| Broken::Outside)?;
        let next = queue.next_avail();
        let waiting = available.0.wrapping_sub(next);
        if waiting > place.size {
            return Err(Broken::Ahead);
        }
        let room = u32::from(place.size).saturating_sub(self.in_flight);
        let batch = batch(self.in_flight, waiting);
        let count = waiting.min(batch).min(u16::try_from(room).unwrap_or(u16::MAX));
        self.more = count == batch && waiting > count;
        if count == 0 {
            return Ok(place);
        }
        self.start(queue.used_ring(), memory)?;
        if self.armed {
            self.armed = false;
            queue.disable_notification(memory).map_err(|_| Broken::Outside)?;
        }
        let ring = Cells::new(memory, queue.avail_ring(), place.size);
        for offset in 0..count {
            let head: Le16 = ring.read(next.wrapping_add(offset)).ok_or(Broken::Outside)?;
            heads.push(head.into());
        }
        queue.set_next_avail(next.wrapping_add(count));
        self.in_flight += u32::from(count);
        self.counters.requests.add(u64::from(count));
        Ok(place)
    }

    /// A ring starts with the first chain that is taken from it: by then its driver has initialised
    /// the used index. One that has chains in flight goes on where it is.
    fn start(&mut self, ring: u64, memory: &Memory) -> Result<(), Broken> {
        if self.started != Some(ring) && self.in_flight == 0 {
            self.next_used = load(memory, ring, 2).ok_or(Broken::Outside)?;
            self.started = Some(ring);
            self.begun = Some(self.next_used);
            self.served = true;
        }
        Ok(())
    }

    /// The ring may begin anew, where and however its driver wants.
    pub(crate) fn restart(&mut self) {
        self.started = None;
    }

    /// The used index that the ring was started with, once each time it is.
    pub(crate) fn begun(&mut self) -> Option<u16> {
        self.begun.take()
    }

    /// The used index that was published last; `None` if no ring has been started.
    pub(crate) fn ended(&self) -> Option<u16> {
        self.served.then_some(self.next_used)
    }

    /// Nothing is to be taken this round, whatever the guest has offered.
    pub(crate) fn pass(&mut self) {
        self.more = false;
    }

    /// Whether the last [`take`](Self::take) is to be followed by another one at once.
    pub(crate) fn is_behind(&self) -> bool {
        self.more
    }

    /// Whether a chain is waiting that may be taken.
    pub(crate) fn has_more(&self, vring: &Vring, memory: &Memory) -> bool {
        if !self.is_open() {
            return false;
        }
        let state = vring.get_ref();
        let queue = state.get_queue();
        queue.ready()
            && state.is_enabled()
            && self.in_flight < u32::from(queue.size())
            && queue.avail_idx(memory, Ordering::Acquire).is_ok_and(|at| at.0 != queue.next_avail())
    }

    /// Asks the guest for a kick at its next chain; true if one is there already.
    pub(crate) fn arm(&mut self, vring: &Vring, memory: &Memory) -> Result<bool, Broken> {
        if self.armed {
            return Ok(false);
        }
        let mut state = vring.get_mut();
        if !state.get_queue().ready() || !state.is_enabled() {
            return Ok(false);
        }
        self.armed = true;
        let size = state.get_queue().size();
        let more = state.get_queue_mut().enable_notification(memory);
        let full = self.in_flight >= u32::from(size);
        // A full queue is looked at again when something completes.
        more.map(|more| more && !full).map_err(|_| Broken::Outside)
    }

    /// What was known of the ring's notification state and its place no longer holds.
    pub(crate) fn disarm(&mut self) {
        self.armed = false;
        self.apart = None;
    }

    /// A chain is done: it goes back to the guest with the next [`publish`](Self::publish).
    pub(crate) fn done(&mut self, head: u16, written: u32) {
        self.used.push((head, written));
    }

    /// Gives what is done back to the guest. It is told by [`notify`](Self::notify).
    pub(crate) fn publish(&mut self, vring: &Vring, memory: &Memory) -> Result<(), Broken> {
        if self.used.is_empty() {
            return Ok(());
        }
        let count = self.used.len();
        let old = self.put_used(&vring.get_ref(), memory);
        self.used.clear();
        self.in_flight = self.in_flight.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        self.untold.get_or_insert(old?);
        self.fresh = true;
        Ok(())
    }

    /// Signals the guest, once for all that was published since it was told last, if it wants to know.
    ///
    /// Unless it has to be `now`, that is put off for some rounds while there is plenty to do besides: more than four times as
    /// many requests as the guest would hear of, or chains that were waiting when a batch had been taken.
    /// To be woken for each few of its requests costs it, and us, more than they do. It is never put off with nothing in flight and nothing being taken: whoever waits for a drain finds the guest told.
    pub(crate) fn notify(
        &mut self,
        vring: &Vring,
        memory: &Memory,
        now: bool,
    ) -> Result<(), Broken> {
        if self.call.is_owed() {
            // It tells of all that was published meanwhile.
            (self.untold, self.put_off) = (None, 0);
            self.signal();
            return Ok(());
        }
        let Some(old) = self.untold else { return Ok(()) };
        let state = vring.get_ref();
        let queue = state.get_queue();
        let news = u32::from(self.next_used.wrapping_sub(old));
        let busy = self.more || self.in_flight >= BUSY && self.in_flight > 4 * news;
        if busy && !now && self.put_off < PUT_OFF {
            self.put_off += 1;
            return Ok(());
        }
        (self.untold, self.put_off) = (None, 0);
        let wanted = wants_signal(queue, memory, old, self.next_used).ok_or(Broken::Outside)?;
        drop(state);
        if wanted {
            self.signal();
        }
        Ok(())
    }

    /// Whether a signal that is put off may stay so while the worker sleeps, if that is brief: with plenty in flight, and if
    /// something was published since the last nap. What completes next then comes with it, or the guest is told when
    /// the nap is over. As a round ends with each, a signal is late by [`PUT_OFF`] naps at the most.
    pub(crate) fn outlasts_nap(&mut self) -> bool {
        std::mem::take(&mut self.fresh) && self.untold.is_some() && self.in_flight >= DEEP
    }

    /// Signals the guest, if it gave us a way to. What fails [`notify`](Self::notify) tries again.
    pub(crate) fn signal(&mut self) {
        if self.call.send() {
            self.counters.calls.add(1);
        }
    }

    /// Puts what is done into the used ring; the index it had before.
    fn put_used(
        &mut self,
        state: &VringState<AtomicMemory>,
        memory: &Memory,
    ) -> Result<u16, Broken> {
        let queue = state.get_queue();
        let (old, size) = (self.next_used, queue.size());
        let ring = Cells::new(memory, queue.used_ring(), size);
        let mut next = old;
        // A head that is no descriptor's index was answered by breaking the chain; it cannot be
        // handed back either.
        for (head, written) in self.used.iter().filter(|(head, _)| *head < size) {
            // `id` and `len`, 32 bits each (virtio 1.3, 2.7.8).
            let element = u64::from(*written) << 32 | u64::from(*head);
            ring.write(next, Le64::from(element)).ok_or(Broken::Outside)?;
            next = next.wrapping_add(1);
        }
        // The crate's own way stores the index with each element: with the guest looking at it all the
        // time, its cache line would change owners that often.
        let index = GuestAddress(queue.used_ring()).checked_add(2).ok_or(Broken::Outside)?;
        memory.store(next.to_le(), index, Ordering::Release).map_err(|_| Broken::Outside)?;
        self.next_used = next;
        Ok(old)
    }
}

/// Whether the guest wants to hear of what was put into the used ring from index `old` to `new`.
///
/// `virtio_queue` has this too, but it counts what was added since it last asked, in 16 bits and
/// without EVENT_IDX for good: after a firmware without EVENT_IDX it may miss a signal.
fn wants_signal(queue: &virtio_queue::Queue, memory: &Memory, old: u16, new: u16) -> Option<bool> {
    if new == old {
        return Some(false);
    }
    // The used index must be visible before the guest's wish is read (virtio 1.3, 2.7.7.2).
    fence(Ordering::SeqCst);
    if queue.event_idx_enabled() {
        let event: u16 = load(memory, queue.avail_ring(), 4 + 2 * u64::from(queue.size()))?;
        let behind = new.wrapping_sub(event).wrapping_sub(1);
        return Some(behind < new.wrapping_sub(old));
    }
    let flags: u16 = load(memory, queue.avail_ring(), 0)?;
    Some(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

/// How many chains are taken in one go.
fn batch(in_flight: u32, waiting: u16) -> u16 {
    let open = in_flight.saturating_add(waiting.into());
    u16::try_from(open / 4).unwrap_or(MOST).clamp(BATCH, MOST)
}

fn place(state: &VringState<AtomicMemory>) -> Place {
    let queue = state.get_queue();
    Place { table: GuestAddress(queue.desc_table()), size: queue.size() }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
