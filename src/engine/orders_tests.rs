// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A worker beside the orders that it has heard, and those that it has not: nothing starts before `Begin`, behind another queue's
//! flush (`--barrier=strict`), or on the word of a map whose lease was not checked lately.

use super::*;
use crate::engine::message::{Drain, ParkId, PointId, ToKeeper};

/// A worker over a file of 16 blocks that is all in `state`, and that has had no message yet.
fn alone(state: State) -> (Worker, Sink) {
    let geometry = Geometry {
        file_size: 16 * BLOCK,
        fs_block: 4096,
        file_align: 512,
        dev_block: 512,
        write_block: 512,
        mem_align: 512,
        bounce_bytes: 8192,
        bounce_slots: 2,
        ops: 8,
        zeroes_bytes: 4 << 20,
        punch_bytes: 256 << 20,
        lease_fresh: Some(Duration::from_secs(10)),
        raw: crate::engine::RawLimits::default(),
    };
    let shared = Arc::new(Shared::new());
    let mut map = crate::engine::extent::ExtentMap::new();
    let device = DeviceOffset(1 << 20);
    map.replace(
        range(0, 16),
        &[crate::engine::extent::Extent { range: range(0, 16), device, state }],
    );
    shared.publish(View { mode: Mode::Direct, map });
    (Worker::new(geometry, Rules::default(), shared, Arc::default(), 8), Sink::default())
}

fn write(worker: &mut Worker, sink: &mut Sink, tag: u32) {
    let kind = Kind::Write(range(u64::from(tag), 1));
    worker.accept(sink, Tag(tag), Request { kind, mem_aligned: true });
}

fn land(worker: &mut Worker, sink: &mut Sink) {
    sink.1 = true;
    worker.reap(sink);
}

#[test]
fn no_request_starts_before_the_worker_is_told_to_begin() {
    let (mut worker, mut sink) = alone(State::Mapped);
    write(&mut worker, &mut sink, 0);
    let order = ToWorker::Park(ParkId(3), FileRange::new(0, BLOCK), Drain::Raw);
    worker.message(&mut sink, order);
    assert!(sink.0.is_empty() && worker.poll_done().is_none());
    assert_eq!(worker.poll_message(), Some(ToKeeper::Parked(ParkId(3))));
    worker.message(&mut sink, ToWorker::Begin);
    assert!(sink.0.is_empty(), "the order that stood is kept");
    worker.message(&mut sink, ToWorker::Release(ParkId(3)));
    assert_eq!(sink.0.len(), 1);
}

#[test]
fn a_strict_flush_of_another_queue_holds_back_what_comes_after_its_point() {
    for strict in [false, true] {
        let (mut worker, mut sink) = alone(State::Mapped);
        if strict {
            worker.set_strict();
        }
        worker.message(&mut sink, ToWorker::Begin);
        write(&mut worker, &mut sink, 0);
        worker.message(&mut sink, ToWorker::Point(PointId(1)));
        write(&mut worker, &mut sink, 1);
        assert_eq!(sink.0.len(), if strict { 1 } else { 2 }, "strict: {strict}");
        land(&mut worker, &mut sink);
        // The point is reached, the flush is not over: what it waits for is the sync on another worker.
        assert_eq!(sink.0.len(), if strict { 0 } else { 1 });
        let point = std::iter::from_fn(|| worker.poll_message());
        assert_eq!(point.filter(|m| matches!(m, ToKeeper::PointReached { .. })).count(), 1);
        worker.message(&mut sink, ToWorker::Passed);
        assert_eq!(sink.0.len(), 1);
        land(&mut worker, &mut sink);
        assert_eq!(std::iter::from_fn(|| worker.poll_done()).count(), 2);
    }
}

/// R2a: another process may have filled the hole while this process was stopped.
#[test]
fn zeros_are_not_answered_under_a_lease_that_was_lost_in_our_sleep() {
    for state in [State::Hole, State::Unwritten] {
        let mut rig = Rig::new([state; 16], Start::Eligible);
        assert_eq!(rig.read(range(3, 1)), vec![0; BLOCK as usize]);
        rig.world.lease = false;
        rig.world.clock += Duration::from_secs(11);
        rig.world.states[3] = State::Mapped;
        let there = rig.world.file_byte(3 * BLOCK + 1);
        assert_ne!(there, 0, "what the opener has written");
        assert_eq!(rig.read(range(3, 1))[1], there, "{state:?}");
        assert_eq!(rig.reports.last(), Some(&Report::Filesystem(Why::LeaseLost)));
    }
}
