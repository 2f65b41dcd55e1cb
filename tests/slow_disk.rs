// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A slow and failing disk under the image: kills, ends and errors with requests in flight.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use integration::rig::fault_disk::{Operation, Rule};
use integration::rig::frontend::{self, Frontend, kind};
use integration::rig::model::Model;
use integration::rig::wait::{PATIENCE, until};
use integration::rig::workload::Workload;
use integration::rig::{
    Backing, Bed, Client, ClientOptions, Daemon, FaultDisk, LoopDisk, Queue, Request, Rig, Setup,
    Shape, Status,
};
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
/// How long a killed daemon's last write takes.
const GHOST_TIME: Duration = Duration::from_secs(2);
/// Long enough for what does not wait to show that.
const MOMENT: Duration = Duration::from_millis(500);
/// After this a signal is not taken for part of the one before it.
const SECOND_ORDER: Duration = Duration::from_millis(1500);
const GHOST: [u8; 4096] = [0x67; 4096];
const NEWER: [u8; 4096] = [0x6e; 4096];

fn slow_disk(rig: &Rig) -> (FaultDisk, Setup) {
    let slow = FaultDisk::mount(64 * MIB, &rig.dir("slow").unwrap()).unwrap();
    let setup = Setup { backing: Backing::File(slow.path()), ..Setup::default() };
    (slow, setup)
}

/// Submits a write that the disk recognises, and holds until it is healed.
fn write_slowly(slow: &FaultDisk, queue: &mut Queue, offset: u64) {
    let before = slow.counts().hit;
    slow.add(Rule::hold(Operation::Write).starting(&GHOST).times(1));
    queue.submit(Request::Write { offset, data: &GHOST }, &Shape::whole(), 1).unwrap();
    queue.kick().unwrap();
    until("the slow write", PATIENCE, || (slow.counts().hit > before).then_some(())).unwrap();
}

/// Does what has to wait for the disk, which goes on after `time` only; says whether it waited.
fn while_held<T>(slow: &FaultDisk, time: Duration, act: impl FnOnce() -> T) -> (T, bool) {
    let healed = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(time);
            healed.store(true, Ordering::SeqCst);
            slow.heal();
        });
        (act(), healed.load(Ordering::SeqCst))
    })
}

/// The daemon is killed with a 2 s write in flight and started again at once: the ghost must not win.
fn newer_write_survives(options: &[&str]) {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, options).unwrap();
    if options.is_empty() {
        bed.await_direct(PATIENCE).unwrap();
    }
    let mut client = bed.connect(1).unwrap();
    write_slowly(&slow, client.queue(0).unwrap(), 40960);
    bed.daemon.sigkill().unwrap();
    let (mut next, _) = while_held(&slow, GHOST_TIME, || {
        // Not waiting for its end: the socket is still a live one now and then.
        bed.restart(options).unwrap();
        let mut next = bed.connect(1).unwrap();
        next.write_at(40960, &NEWER).unwrap();
        next
    });
    bed.model.write(40960, &NEWER).unwrap();
    until("the ghost's landing", PATIENCE, || (slow.counts().in_flight == 0).then_some(()))
        .unwrap();
    assert!(next.read_at(40960, 4096).unwrap() == NEWER, "the killed daemon's write came last");
    bed.model.check(0, &next.read_at(0, 128 << 10).unwrap()).unwrap();
    drop((client, next));
    bed.finish().unwrap();
}

#[test]
fn sigkill_with_a_write_in_flight_and_the_newer_write_survives() {
    newer_write_survives(&[]);
}

#[test]
fn sigkill_with_a_write_in_flight_in_filesystem_mode() {
    newer_write_survives(&["--mode", "filesystem"]);
}

#[test]
fn sigkill_with_a_write_in_flight_to_a_block_device() {
    let Some(rig) = Rig::enter() else { return };
    let slow = FaultDisk::mount(64 * MIB, &rig.dir("slow").unwrap()).unwrap();
    let disk = LoopDisk::attach(0, 512, &Backing::File(slow.path())).unwrap();
    let run = rig.dir("run").unwrap();
    let start_daemon = || Daemon::start(Path::new(PROGRAM), &run, disk.path(), &[]).unwrap();
    let first = start_daemon();
    let mut client = Client::connect(first.socket(), &ClientOptions::default()).unwrap();
    write_slowly(&slow, client.queue(0).unwrap(), 40960);
    first.sigkill().unwrap();
    let ((mut next, second), _) = while_held(&slow, GHOST_TIME, || {
        let second = start_daemon();
        // By one that still dies, or that cannot be seen any more.
        assert!(second.log().contains("locked by another process"), "{}", second.log());
        let mut next = Client::connect(second.socket(), &ClientOptions::default()).unwrap();
        next.write_at(40960, &NEWER).unwrap();
        (next, second)
    });
    until("the ghost's landing", PATIENCE, || (slow.counts().in_flight == 0).then_some(()))
        .unwrap();
    assert!(next.read_at(40960, 4096).unwrap() == NEWER, "the killed daemon's write came last");
    drop((next, second));
}

#[test]
fn sigterm_drains_what_is_in_flight() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let mut client = bed.connect(1).unwrap();
    write_slowly(&slow, client.queue(0).unwrap(), 40960);
    bed.model.write(40960, &GHOST).unwrap();
    let socket: PathBuf = bed.daemon.socket().into();
    let (status, waited) = while_held(&slow, MOMENT, || bed.daemon.sigterm().unwrap());
    assert!(status.success() && waited, "{status}; {}", bed.daemon.log());
    // The guest has its answer, which a process that merely dies does not give.
    let done = client.queue(0).unwrap().drain().unwrap();
    assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
    assert!(!socket.exists(), "the socket is left behind");
    drop(client);
    bed.restart(&[]).unwrap();
    bed.finish().unwrap();
}

/// `timeout` of coreutils signals its child and its child's process group.
#[test]
fn two_sigterms_in_a_row_are_one_order() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let mut client = bed.connect(1).unwrap();
    write_slowly(&slow, client.queue(0).unwrap(), 40960);
    bed.model.write(40960, &GHOST).unwrap();
    let (status, waited) = while_held(&slow, MOMENT, || {
        bed.daemon.signal(Signal::TERM).unwrap();
        // So that the first one is not pending any more, and the second is a signal of its own.
        thread::sleep(Duration::from_millis(1));
        bed.daemon.signal(Signal::TERM).unwrap();
        bed.daemon.wait(PATIENCE).unwrap()
    });
    assert!(status.success() && waited, "{status}; {}", bed.daemon.log());
    let done = client.queue(0).unwrap().drain().unwrap();
    assert!(done.len() == 1 && done[0].result.is_ok(), "{done:?}");
    assert!(!bed.daemon.log().contains("told to stop twice"), "{}", bed.daemon.log());
    drop(client);
    bed.restart(&[]).unwrap();
    bed.finish().unwrap();
}

/// A second order leaves the regular end some time.
#[test]
fn a_disk_that_answers_soon_after_a_second_sigterm_is_waited_for() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let mut client = bed.connect(1).unwrap();
    write_slowly(&slow, client.queue(0).unwrap(), 40960);
    bed.model.write(40960, &GHOST).unwrap();
    bed.daemon.signal(Signal::TERM).unwrap();
    thread::sleep(SECOND_ORDER);
    bed.daemon.signal(Signal::TERM).unwrap();
    slow.heal();
    assert!(bed.daemon.wait(PATIENCE).unwrap().success(), "{}", bed.daemon.log());
    let done = client.queue(0).unwrap().drain().unwrap();
    assert!(done.len() == 1 && done[0].result.is_ok(), "{done:?}");
    drop(client);
    bed.restart(&[]).unwrap();
    bed.finish().unwrap();
}

/// Told twice, it does not wait for a disk that does not answer.
#[test]
fn a_second_sigterm_ends_it_whatever_is_stuck() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let mut client = bed.connect(1).unwrap();
    write_slowly(&slow, client.queue(0).unwrap(), 40960);
    bed.model.write(40960, &GHOST).unwrap();
    bed.daemon.signal(Signal::TERM).unwrap();
    until("the first", PATIENCE, || bed.daemon.log().contains("told to stop").then_some(()))
        .unwrap();
    thread::sleep(SECOND_ORDER);
    bed.daemon.signal(Signal::TERM).unwrap();
    until("the second", PATIENCE, || bed.daemon.log().contains("told to stop twice").then_some(()))
        .unwrap();
    // Before the disk answers: the write is the kernel's now, with the lease and the lock (R1a).
    assert_eq!(bed.daemon.wait(PATIENCE).unwrap().code(), Some(1));
    let log = bed.daemon.log();
    assert!(log.contains("What was still waited for: requests in flight ("), "{log}");
    slow.heal();
    drop(client);
    bed.restart(&[]).unwrap();
    bed.finish().unwrap();
}

#[test]
fn a_frontend_gone_with_io_in_flight_and_the_next_at_once() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let mut client = bed.connect(2).unwrap();
    write_slowly(&slow, client.queue(1).unwrap(), 40960);
    drop(client);
    let (mut next, waited) = while_held(&slow, MOMENT, || {
        let mut next = bed.connect(2).unwrap();
        next.write_at(40960, &NEWER).unwrap();
        next
    });
    assert!(waited, "the next session began with I/O of the last one in flight");
    bed.model.write(40960, &NEWER).unwrap();
    let load = Workload { requests: 200, ..Workload::default() };
    load.run(next.queues(), &mut bed.model).unwrap();
    drop(next);
    bed.finish().unwrap();
}

/// A group commit needs every thread's answer, also of one that has nothing to do any more when the frontend goes.
#[test]
fn a_frontend_gone_with_flushes_queued_and_the_next_at_once() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let bed = Bed::make(&rig, PROGRAM, &setup, &["--num-queues=2", "--threads=2"]).unwrap();
    let mut client = bed.connect(2).unwrap();
    client.write_at(0, &NEWER).unwrap();
    slow.add(Rule::hold(Operation::Flush).times(1));
    let queue = client.queue(0).unwrap();
    // The second one shares the commit after the first one's, which begins when the other thread is long done.
    for (token, asked) in [(0, 1), (1, 2)] {
        queue.submit(Request::Flush, &Shape::whole(), token).unwrap();
        queue.kick().unwrap();
        until("the slow flush", PATIENCE, || (slow.counts().hit > 0).then_some(())).unwrap();
        let heard = |status: &Status| status.number("flush/requests") == asked;
        bed.daemon.await_status("the flush", PATIENCE, heard).unwrap();
    }
    drop(client);
    let (mut next, _) = while_held(&slow, MOMENT, || bed.connect(2).unwrap());
    next.write_at(4096, &NEWER).unwrap();
    next.flush().unwrap();
}

#[test]
fn get_vring_base_answers_after_what_is_in_flight() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let features = frontend::VERSION_1 | frontend::EVENT_IDX;
    let mut front = Frontend::start(bed.daemon.socket(), 2, 64, features).unwrap();
    slow.add(Rule::hold(Operation::Write).starting(&GHOST).times(1));
    let ring = front.ring_mut(0).unwrap();
    ring.write_bytes(&GHOST, ring.data(0)).unwrap();
    ring.prepare(0, kind::OUT, 80, 4096, false).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    until("the slow write", PATIENCE, || (slow.counts().hit > 0).then_some(())).unwrap();
    assert_eq!(while_held(&slow, MOMENT, || front.stop(0).unwrap()), (1, true));
    let ring = front.ring_mut(0).unwrap();
    assert!(ring.called(Duration::ZERO).unwrap(), "stopped without a call");
    assert_eq!(ring.take_used().unwrap().map(|used| used.id), Some(0));
    assert_eq!(ring.status(0).unwrap(), 0);
    bed.model.write(40960, &GHOST).unwrap();

    // The other ring goes on, and this one can be started again where it stopped.
    for (index, base) in [(1, None), (0, Some(1))] {
        if let Some(base) = base {
            front.set_up(index, base).unwrap();
            front.set_kick(index).unwrap();
            front.set_call(index).unwrap();
            front.enable(index, true).unwrap();
        }
        let ring = front.ring_mut(index).unwrap();
        ring.prepare(4, kind::IN, 80, 4096, true).unwrap();
        ring.publish(4).unwrap();
        ring.kick().unwrap();
        assert_eq!(ring.wait_used(PATIENCE).unwrap().id, 4);
        assert!(ring.read_bytes(ring.data(4), 4096).unwrap() == GHOST);
    }
    drop(front);
    bed.finish().unwrap();
}

/// A reader that comes while a raw write is in flight waits for it, sees it, and leaves nothing stale behind.
#[test]
fn a_lease_break_waits_for_the_write_in_flight() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(2).unwrap();
    write_slowly(&slow, client.queue(0).unwrap(), 40960);
    bed.model.write(40960, &GHOST).unwrap();
    let bytes = thread::scope(|scope| {
        let reader = scope.spawn(|| bed.host_bytes().unwrap());
        let breaking = |status: &Status| status.text("lease") == "breaking";
        bed.daemon.await_status("the lease break", PATIENCE, breaking).unwrap();
        // The guest goes on all the while: not raw, and what it asks for now waits for that with the reader.
        let queue = client.queue(1).unwrap();
        queue.submit(Request::Write { offset: MIB, data: &NEWER }, &Shape::whole(), 2).unwrap();
        queue.kick().unwrap();
        thread::sleep(MOMENT);
        assert!(!reader.is_finished(), "the reader got in during the write");
        slow.heal();
        assert!(queue.drain().unwrap().iter().all(|done| done.result.is_ok()));
        reader.join().unwrap()
    });
    // What the guest wrote meanwhile the reader may have seen or not; what was in flight before it came, it must.
    bed.model.check(0, bytes.get(..1 << 20).unwrap()).unwrap();
    bed.model.write(MIB, &NEWER).unwrap();
    assert_eq!(client.queue(0).unwrap().drain().unwrap().len(), 1);
    bed.await_direct(PATIENCE).unwrap();
    drop(client);
    bed.finish().unwrap();
}

#[test]
fn a_failed_request_fails_alone() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let mut client = bed.connect(1).unwrap();
    slow.add(Rule::fail(Operation::Write).starting(&GHOST));
    let queue = client.queue(0).unwrap();
    for token in 0..8 {
        let data = if token == 3 { &GHOST } else { &NEWER };
        queue
            .submit(Request::Write { offset: token * 8192, data }, &Shape::whole(), token)
            .unwrap();
    }
    queue.kick().unwrap();
    for done in queue.drain().unwrap() {
        assert_eq!(done.result.is_err(), done.token == 3, "{done:?}");
    }
    for block in 0..8 {
        bed.model.write(block * 8192, if block == 3 { &GHOST } else { &NEWER }).unwrap();
    }
    slow.heal();
    client.write_at(3 * 8192, &GHOST).unwrap();
    assert!(client.read_at(3 * 8192, 4096).unwrap() == GHOST);
    assert_eq!(bed.daemon.status().unwrap().number("requests/errors"), 1);
    drop(client);
    bed.finish().unwrap();
}

#[test]
fn a_failed_flush_is_not_forgotten_until_the_session_ends() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let mut client = bed.connect(2).unwrap();
    client.write_at(0, &NEWER).unwrap();
    client.flush().unwrap();
    client.write_at(0, &NEWER).unwrap();
    slow.add(Rule::fail(Operation::Flush).times(1));
    assert!(client.flush().is_err());
    slow.heal();
    assert!(client.flush().is_err(), "the failed flush is forgotten");
    assert!(client.queue(1).unwrap().flush().is_err(), "on the other queue too");
    // Reads and writes go on.
    client.write_at(4096, &NEWER).unwrap();
    assert!(client.read_at(4096, 4096).unwrap() == NEWER);
    drop(client);
    let mut next = bed.connect(1).unwrap();
    next.write_at(0, &NEWER).unwrap();
    next.flush().unwrap();
    bed.model.write(0, &NEWER).unwrap();
    bed.model.write(4096, &NEWER).unwrap();
    drop(next);
    bed.finish().unwrap();
}

/// A flush waits for the writes accepted before it on every queue.
#[test]
fn a_flush_waits_for_the_other_queues_writes() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let mut client = bed.connect(2).unwrap();
    write_slowly(&slow, client.queue(1).unwrap(), 40960);
    let flushes = slow.counts().flushes;
    let (result, waited) = while_held(&slow, MOMENT, || client.flush());
    result.unwrap();
    assert!(waited, "it did not wait");
    assert!(slow.counts().flushes > flushes, "no flush reached the disk");
    assert_eq!(client.queue(1).unwrap().drain().unwrap().len(), 1);
}

/// Requests reach the disk in parallel, and a slow one holds no other up.
#[test]
fn a_slow_request_holds_no_other_up() {
    let Some(rig) = Rig::enter() else { return };
    let (slow, setup) = slow_disk(&rig);
    let bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    let mut client = bed.connect(1).unwrap();
    let mut model = Model::new(bed.model.bytes().to_vec());
    write_slowly(&slow, client.queue(0).unwrap(), 40960);
    let queue = client.queue(0).unwrap();
    for token in 10..26 {
        let offset = (token - 10) * 8192 + MIB;
        queue.submit(Request::Write { offset, data: &NEWER }, &Shape::whole(), token).unwrap();
        model.write(offset, &NEWER).unwrap();
    }
    queue.kick().unwrap();
    let mut done = 0;
    while done < 16 {
        for request in queue.wait().unwrap() {
            assert!(request.token >= 10 && request.result.is_ok());
            done += 1;
        }
    }
    slow.heal();
    assert_eq!(queue.drain().unwrap().len(), 1);
    model.write(40960, &GHOST).unwrap();
    model.check(0, &client.read_at(0, 128 << 10).unwrap()).unwrap();
    model.check(MIB, &client.read_at(MIB, 256 << 10).unwrap()).unwrap();
}
