// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::GuestAddressSpace;

use super::*;

const SIZE: u16 = 8;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

struct Rig {
    memory: Arc<Memory>,
    vring: Vring,
    queue: Queue,
    next: u16,
}

fn rig(event_idx: bool) -> Rig {
    rig_in(event_idx, &[(GuestAddress(0), 0x10000)])
}

fn rig_in(event_idx: bool, regions: &[(GuestAddress, usize)]) -> Rig {
    let memory = Memory::from_ranges(regions).unwrap();
    let atomic = AtomicMemory::new(memory);
    let memory = atomic.memory().into_inner();
    let vring = Vring::new(atomic, 256).unwrap();
    vring.set_queue_size(SIZE);
    vring.set_queue_info(0, AVAIL, USED).unwrap();
    vring.set_queue_event_idx(event_idx);
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    Rig { memory, vring, queue: Queue::new(0, Arc::default()), next: 0 }
}

impl Rig {
    fn offer(&mut self, heads: &[u16]) {
        for head in heads {
            let at = AVAIL + 4 + 2 * u64::from(self.next % SIZE);
            self.memory.write_obj(*head, GuestAddress(at)).unwrap();
            self.next = self.next.wrapping_add(1);
        }
        self.set_avail(self.next);
    }

    fn set_avail(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(AVAIL + 2)).unwrap();
    }

    fn set_used_event(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(AVAIL + 4 + 2 * u64::from(SIZE))).unwrap();
    }

    fn used_index(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn take(&mut self) -> Result<Vec<u16>, Broken> {
        let mut heads = Vec::new();
        self.queue.take(&self.vring, &self.memory, &mut heads).map(|_| heads)
    }

    fn publish(&mut self, heads: &[u16]) -> u64 {
        let before = self.queue.counters.calls.get();
        heads.iter().for_each(|head| self.queue.done(*head, 1));
        self.queue.publish(&self.vring, &self.memory).unwrap();
        self.queue.notify(&self.vring, &self.memory, true).unwrap();
        self.queue.counters.calls.get() - before
    }

    /// One round of the worker's in which `count` requests are done: how often it signalled.
    fn round(&mut self, count: u16) -> u64 {
        let before = self.queue.counters.calls.get();
        (0..count).for_each(|_| self.queue.done(0, 1));
        self.queue.publish(&self.vring, &self.memory).unwrap();
        self.queue.notify(&self.vring, &self.memory, false).unwrap();
        self.queue.counters.calls.get() - before
    }
}

fn with_call(mut rig: Rig) -> Rig {
    let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    rig.queue.call.aim(Some(&Notifier::new(fd).unwrap())).unwrap();
    rig
}

#[test]
fn chains_are_taken_once_and_only_from_a_ring_that_is_ready_and_enabled() {
    let mut rig = rig(false);
    rig.offer(&[3, 1, 2]);
    rig.vring.set_enabled(false);
    assert!(rig.take().unwrap().is_empty());
    rig.vring.set_enabled(true);
    rig.vring.set_queue_ready(false);
    assert!(rig.take().unwrap().is_empty());
    rig.vring.set_queue_ready(true);
    assert_eq!(rig.take().unwrap(), [3, 1, 2]);
    assert!(rig.take().unwrap().is_empty());
    assert_eq!(rig.vring.queue_next_avail(), 3);
}

#[test]
fn no_more_is_in_flight_than_the_ring_has_descriptors() {
    let mut rig = rig(false);
    rig.offer(&[0; 8]);
    assert_eq!(rig.take().unwrap().len(), 8);
    // The guest hands out the same heads again before they came back.
    rig.offer(&[0; 8]);
    assert!(rig.take().unwrap().is_empty());
    assert!(!rig.queue.arm(&rig.vring, &rig.memory).unwrap(), "a full queue must not spin");
    rig.publish(&[0, 0]);
    assert_eq!(rig.take().unwrap().len(), 2);
}

#[test]
fn an_index_that_runs_ahead_breaks_the_queue() {
    let mut rig = rig(false);
    rig.set_avail(9);
    assert_eq!(rig.take(), Err(Broken::Ahead));
    assert_eq!(rig.queue.in_flight, 0);
}

#[test]
fn a_ring_outside_of_memory_breaks_the_queue() {
    let mut rig = rig(false);
    rig.vring.set_queue_info(0, 0xffff_f000, USED).unwrap();
    assert_eq!(rig.take(), Err(Broken::Outside));
    // A head that is no descriptor is not handed back; one that is needs a used ring.
    rig.vring.set_queue_info(0, AVAIL, 0xffff_f000).unwrap();
    rig.queue.in_flight = 1;
    rig.queue.done(0, 1);
    assert_eq!(rig.queue.publish(&rig.vring, &rig.memory), Err(Broken::Outside));
    assert_eq!(rig.queue.in_flight, 0, "a drain must end");
}

#[test]
fn a_signal_that_could_not_be_sent_is_sent_later() {
    let mut rig = with_call(rig(true));
    rig.queue.in_flight = 8;
    rig.queue.call.refused = 2;
    assert_eq!(rig.publish(&[1, 2]), 0);
    assert!(rig.queue.call.is_owed());
    // What is published meanwhile the guest does not want to hear of.
    rig.set_used_event(6);
    assert_eq!(rig.publish(&[3]), 0);
    assert!(rig.queue.call.is_owed());
    assert_eq!(rig.publish(&[]), 1);
    assert!(!rig.queue.call.is_owed());
    assert_eq!(rig.publish(&[]), 0, "once");
    // One that is due to a new eventfd is not asked for.
    rig.queue.call.refused = 1;
    rig.queue.signal();
    assert_eq!(rig.publish(&[]), 1);
    // With no eventfd any more, nothing is owed.
    rig.queue.call.refused = 1;
    rig.queue.signal();
    rig.queue.call.aim(None).unwrap();
    assert!(!rig.queue.call.is_owed());
}

#[test]
fn one_signal_a_batch_and_none_that_is_not_wanted() {
    let mut rig = with_call(rig(false));
    rig.queue.in_flight = 8;
    assert_eq!(rig.publish(&[1, 2, 3]), 1);
    rig.memory.write_obj(1u16, GuestAddress(AVAIL)).unwrap(); // VRING_AVAIL_F_NO_INTERRUPT
    assert_eq!(rig.publish(&[4]), 0);
    assert_eq!(rig.used_index(), 4);
}

#[test]
fn a_signal_is_put_off_while_the_disk_is_busy_but_not_for_long() {
    let mut rig = with_call(rig(false));
    rig.queue.in_flight = 100;
    assert_eq!([1, 0, 0, 0, 0, 1].map(|done| rig.round(done)), [0, 0, 0, 0, 1, 0], "4 rounds");
    assert_eq!(rig.used_index(), 2, "who polls sees all at once");
    rig.queue.notify(&rig.vring, &rig.memory, true).unwrap();
    assert_eq!(rig.round(19), 0, "of 98, 79 are left: more than four times as many");
    rig.queue.notify(&rig.vring, &rig.memory, true).unwrap();
    assert_eq!(rig.round(16), 1, "of 79, 63 are left: less than four times as many");
    rig.queue.in_flight = 16;
    assert_eq!(rig.round(1), 1, "15 are left");
}

#[test]
fn a_signal_that_is_put_off_outlasts_naps_as_long_as_they_bring_something_and_no_more_than_four() {
    let mut rig = with_call(rig(false));
    rig.queue.in_flight = 200;
    let nap = |rig: &mut Rig| (rig.round(1), rig.queue.outlasts_nap());
    let naps: Vec<_> = (0..5).map(|_| nap(&mut rig)).collect();
    assert_eq!(naps, [(0, true), (0, true), (0, true), (0, true), (1, false)]);
    rig.queue.in_flight = 200;
    assert!(!rig.queue.outlasts_nap(), "nothing is put off");
    assert_eq!(rig.round(2), 0);
    assert!(rig.queue.outlasts_nap());
    assert!(!rig.queue.outlasts_nap(), "nothing more was done meanwhile");
    assert_eq!(rig.round(2), 0);
    assert!(rig.queue.outlasts_nap());
    assert_eq!(rig.publish(&[0]), 1);
    assert!(!rig.queue.outlasts_nap(), "it was told");
    rig.queue.in_flight = 65;
    assert_eq!(rig.round(2), 0);
    assert!(!rig.queue.outlasts_nap(), "63 are left");
}

#[test]
fn a_batch_is_a_quarter_of_what_the_guest_has_open_within_bounds() {
    let of = |in_flight, waiting| batch(in_flight, waiting);
    assert_eq!([of(0, 1), of(0, 32), of(28, 4), of(64, 32), of(100, 28)], [8, 8, 8, 24, 32]);
    assert_eq!([of(0, u16::MAX), of(u32::MAX, u16::MAX)], [64, 64]);
}

#[test]
fn a_batch_that_leaves_chains_is_followed_by_another_before_the_guest_is_signalled() {
    let mut rig = with_call(rig(false));
    rig.vring.set_queue_size(64);
    let offered = BATCH + 1;
    for slot in 0..offered {
        rig.memory.write_obj(slot, GuestAddress(AVAIL + 4 + 2 * u64::from(slot))).unwrap();
    }
    rig.set_avail(offered);
    assert_eq!(rig.take().unwrap().len(), usize::from(BATCH));
    assert!(rig.queue.is_behind());
    assert_eq!(rig.round(BATCH), 0, "all of them were answered at once");
    assert_eq!(rig.take().unwrap(), [BATCH]);
    assert!(!rig.queue.is_behind());
    assert_eq!(rig.round(1), 1);
    // Exactly a batch is nothing to come back for, and a worker that takes nothing does not put off what a drain waits for.
    rig.set_avail(offered + BATCH);
    assert_eq!(rig.take().unwrap().len(), usize::from(BATCH));
    assert!(!rig.queue.is_behind());
    assert_eq!(rig.round(BATCH), 1);
    rig.set_avail(offered + 3 * BATCH);
    assert_eq!(rig.take().unwrap().len(), usize::from(BATCH));
    rig.queue.pass();
    assert_eq!(rig.round(BATCH), 1);
}

#[test]
fn with_nothing_in_flight_the_guest_has_been_told() {
    let mut rig = with_call(rig(true));
    rig.queue.in_flight = 40;
    assert_eq!(rig.round(1), 0);
    rig.queue.in_flight = 1;
    // The event is among what was put off, not in the last batch.
    rig.set_used_event(0);
    assert_eq!(rig.round(1), 1);
    assert_eq!(rig.round(0), 0, "once");
}

#[test]
fn a_driver_that_has_seen_what_was_put_off_is_left_alone() {
    let mut rig = with_call(rig(true));
    rig.queue.in_flight = 40;
    rig.set_used_event(0);
    assert_eq!(rig.round(1), 0);
    rig.set_used_event(1);
    rig.queue.notify(&rig.vring, &rig.memory, true).unwrap();
    assert_eq!(rig.queue.counters.calls.get(), 0);
}

#[test]
fn event_idx_decides_over_the_whole_batch_and_across_the_wrap() {
    for start in [0u16, 65530] {
        let mut rig = with_call(rig(true));
        rig.queue.next_used = start;
        rig.set_used_event(start.wrapping_add(2));
        assert_eq!(rig.publish(&[0, 1]), 0, "before the event");
        assert_eq!(rig.publish(&[2, 3, 4]), 1, "the event is inside");
        assert_eq!(rig.publish(&[5]), 0, "past the event");
        rig.set_used_event(start.wrapping_add(6));
        assert_eq!(rig.publish(&[6]), 1, "the event is the last one");
    }
}

#[test]
fn firmware_without_event_idx_leaves_no_trace() {
    let mut rig = with_call(rig(false));
    rig.memory.write_obj(1u16, GuestAddress(AVAIL)).unwrap();
    // 65534 completions; virtio_queue's own count of them would be at -2 now.
    for _ in 0..32767 {
        rig.publish(&[0, 0]);
    }
    rig.vring.set_queue_event_idx(true);
    rig.set_used_event(65534);
    assert_eq!(rig.publish(&[0, 0, 0, 0]), 1);
}

#[test]
fn arming_notices_what_came_in_between() {
    let mut rig = rig(true);
    assert!(!rig.queue.arm(&rig.vring, &rig.memory).unwrap());
    rig.offer(&[0]);
    assert_eq!(rig.take().unwrap(), [0]);
    rig.offer(&[1]);
    assert!(rig.queue.arm(&rig.vring, &rig.memory).unwrap());
    let event = USED + 4 + 8 * u64::from(SIZE);
    assert_eq!(rig.memory.read_obj::<u16>(GuestAddress(event)).unwrap(), 1);
}

#[test]
fn rings_may_span_memory_regions() {
    let ends = [0, AVAIL + 10, USED + 4 + 8 * 3 + 4, 0x10000];
    let regions: Vec<_> = ends
        .windows(2)
        .map(|ends| (GuestAddress(ends[0]), usize::try_from(ends[1] - ends[0]).unwrap()))
        .collect();
    let (mut split, mut whole) = (rig_in(false, &regions), rig(false));
    for heads in [&[1, 2, 3][..], &[4, 5, 6, 7, 0], &[3, 1, 4]] {
        for rig in [&mut split, &mut whole] {
            rig.offer(heads);
            assert_eq!(rig.take().unwrap(), heads);
            rig.publish(heads);
        }
        let ring = |rig: &Rig| {
            let mut bytes = [0; 68];
            rig.memory.read_slice(&mut bytes, GuestAddress(USED)).unwrap();
            bytes.to_vec()
        };
        assert_eq!(ring(&split), ring(&whole));
    }
    assert_eq!((split.used_index(), whole.used_index()), (11, 11));
}

/// An old guest's leftovers: the used index that is there when the frontend names the ring's place
/// says nothing, the one that is there when the driver offers its first chain does.
#[test]
fn the_used_index_is_read_when_the_ring_starts() {
    let mut rig = rig(false);
    rig.vring.set_queue_next_used(5);
    rig.offer(&[3]);
    assert_eq!(rig.take().unwrap(), [3]);
    rig.publish(&[3]);
    let first: u32 = rig.memory.read_obj(GuestAddress(USED + 4)).unwrap();
    assert_eq!((first, rig.used_index()), (3, 1));
}

/// QEMU says where a running ring is when a migration begins. The crate then stores the used index
/// it has read a moment before, in which something may have been published.
#[test]
fn a_running_ring_goes_on_whatever_the_crate_stores() {
    let mut rig = rig(false);
    rig.offer(&[3, 4, 5]);
    rig.take().unwrap();
    rig.publish(&[3, 4]);
    rig.vring.set_queue_next_used(1);
    rig.queue.restart();
    rig.publish(&[5]);
    let last: u32 = rig.memory.read_obj(GuestAddress(USED + 4 + 2 * 8)).unwrap();
    assert_eq!((last, rig.used_index()), (5, 3));
}

#[test]
fn a_ring_that_is_started_anew_begins_at_the_used_index_in_memory() {
    let mut rig = rig(false);
    for (start, restarts) in [(7_u16, true), (65535, true), (3, false)] {
        rig.offer(&[1]);
        let before = rig.used_index();
        rig.memory.write_obj(start, GuestAddress(USED + 2)).unwrap();
        if restarts {
            rig.queue.restart();
        }
        rig.take().unwrap();
        rig.publish(&[1]);
        let expected = if restarts { start } else { before };
        assert_eq!(rig.used_index(), expected.wrapping_add(1));
    }
}

/// Another used ring has another index, also if nobody said that the ring starts.
#[test]
fn a_used_ring_that_was_moved_is_read_anew() {
    let mut rig = rig(false);
    rig.offer(&[1]);
    rig.take().unwrap();
    rig.publish(&[1]);
    let moved = USED + 0x1000;
    rig.memory.write_obj(9u16, GuestAddress(moved + 2)).unwrap();
    rig.vring.set_queue_info(0, AVAIL, moved).unwrap();
    rig.offer(&[2]);
    rig.take().unwrap();
    rig.publish(&[2]);
    assert_eq!(rig.memory.read_obj::<u16>(GuestAddress(moved + 2)).unwrap(), 10);
}
