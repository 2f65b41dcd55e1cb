// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frontends that come, go, and do things in orders no well-behaved one does.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use integration::rig::command::close;
use integration::rig::frontend::{self, Frontend, kind};
use integration::rig::wait::{PATIENCE, until};
use integration::rig::workload::Workload;
use integration::rig::{Bed, ClientOptions, Rig, Setup};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const FEATURES: u64 = frontend::VERSION_1 | frontend::EVENT_IDX | frontend::FLUSH;

/// Reads the image's first block on a ring that is set up.
fn read_block(bed: &Bed, front: &mut Frontend, index: usize) {
    let ring = front.ring_mut(index).unwrap();
    ring.prepare(0, kind::IN, 0, 4096, true).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    let used = ring.wait_used(PATIENCE).unwrap();
    assert_eq!((used.id, used.len, ring.status(0).unwrap()), (0, 4097, 0));
    bed.model.check(0, &ring.read_bytes(ring.data(0), 4096).unwrap()).unwrap();
}

fn connected(bed: &Bed, rings: u16) -> Frontend {
    let mut front = Frontend::connect(bed.daemon.socket(), rings, 64).unwrap();
    front.negotiate(FEATURES).unwrap();
    front.share_memory().unwrap();
    front
}

/// It keeps its process and its connection, so that the relay, which waits for room to send, sees no end of it.
#[test]
fn a_frontend_that_closes_its_end_and_does_not_read_makes_room_for_the_next() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut stuck = UnixStream::connect(bed.daemon.socket()).unwrap();
    stuck.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    // GET_FEATURES, version 1, no payload: its answer is longer.
    let request: Vec<u8> = [1_u32, 1, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    let full = (0..1_000_000).find_map(|_| stuck.write_all(&request).err());
    assert_eq!(full.unwrap().kind(), std::io::ErrorKind::WouldBlock);
    stuck.shutdown(std::net::Shutdown::Write).unwrap();
    let (done, served) = std::sync::mpsc::channel();
    let socket = bed.daemon.socket().to_owned();
    std::thread::spawn(move || done.send(Frontend::start(&socket, 1, 64, FEATURES)));
    let mut front = served.recv_timeout(PATIENCE).expect("the next one waits").unwrap();
    read_block(&bed, &mut front, 0);
    drop(stuck);
}

#[test]
fn a_kick_before_the_ring_is_enabled_is_not_lost() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = connected(&bed, 1);
    front.set_up(0, 0).unwrap();
    front.set_call(0).unwrap();
    front.set_kick(0).unwrap();
    let ring = front.ring_mut(0).unwrap();
    ring.prepare(0, kind::IN, 0, 4096, true).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(ring.used_index().unwrap(), 0, "served before it was enabled");
    front.enable(0, true).unwrap();
    assert_eq!(front.ring_mut(0).unwrap().wait_used(PATIENCE).unwrap().id, 0);
}

/// A kick that is already in the eventfd when it arrives, for requests that are already in the ring.
#[test]
fn a_kick_before_its_eventfd_is_known_is_not_lost() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = connected(&bed, 1);
    let ring = front.ring_mut(0).unwrap();
    ring.prepare(0, kind::IN, 0, 4096, true).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    front.set_up(0, 0).unwrap();
    front.set_call(0).unwrap();
    front.set_kick(0).unwrap();
    front.enable(0, true).unwrap();
    assert_eq!(front.ring_mut(0).unwrap().wait_used(PATIENCE).unwrap().id, 0);
}

/// QEMU enables rings before it sends the call eventfd: what completed meanwhile must be signalled when it comes.
#[test]
fn a_late_call_eventfd_is_signalled() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = connected(&bed, 1);
    front.set_up(0, 0).unwrap();
    front.set_kick(0).unwrap();
    front.enable(0, true).unwrap();
    let ring = front.ring_mut(0).unwrap();
    ring.prepare(0, kind::IN, 0, 4096, true).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    let done = || (ring.used_index().unwrap() == 1).then_some(());
    until("the completion", PATIENCE, done).unwrap();
    front.set_call(0).unwrap();
    assert!(
        front.ring(0).unwrap().called(PATIENCE).unwrap(),
        "the late call eventfd was not signalled"
    );
    front.ring_mut(0).unwrap().take_used().unwrap().unwrap();
    read_block(&bed, &mut front, 0);
}

/// Where an old guest's ring was, SET_VRING_ADDR finds its used index; the new driver's ring begins
/// at 0.
#[test]
fn a_ring_that_is_zeroed_before_it_is_enabled_begins_at_its_beginning() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = connected(&bed, 1);
    let ring = front.ring(0).unwrap();
    let index = ring.used() + 2;
    ring.write_bytes(&5_u16.to_le_bytes(), index).unwrap();
    front.set_up(0, 0).unwrap();
    front.set_kick(0).unwrap();
    front.set_call(0).unwrap();
    front.ring(0).unwrap().write_bytes(&[0; 2], index).unwrap();
    front.enable(0, true).unwrap();
    read_block(&bed, &mut front, 0);
    assert_eq!(front.ring(0).unwrap().used_index().unwrap(), 1);
    // The same with a ring that has been used: it is disabled, and begins anew.
    front.enable(0, false).unwrap();
    front.ring_mut(0).unwrap().write_bytes(&7_u16.to_le_bytes(), index).unwrap();
    front.set_up(0, 0).unwrap();
    front.renew_rings().unwrap();
    front.set_kick(0).unwrap();
    front.set_call(0).unwrap();
    front.enable(0, true).unwrap();
    read_block(&bed, &mut front, 0);
    assert_eq!(front.ring(0).unwrap().used_index().unwrap(), 1);
}

#[test]
fn a_disabled_ring_rests_and_goes_on_when_enabled() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), 2, 64, FEATURES).unwrap();
    read_block(&bed, &mut front, 0);
    front.enable(0, false).unwrap();
    let ring = front.ring_mut(0).unwrap();
    ring.prepare(8, kind::IN, 0, 4096, true).unwrap();
    ring.publish(8).unwrap();
    ring.kick().unwrap();
    read_block(&bed, &mut front, 1);
    assert_eq!(front.ring(0).unwrap().used_index().unwrap(), 1, "served while disabled");
    front.enable(0, true).unwrap();
    assert_eq!(front.ring_mut(0).unwrap().wait_used(PATIENCE).unwrap().id, 8);
}

/// The memory table is sent again, as QEMU does at every change, while the rings are in use.
#[test]
fn the_memory_table_changes_while_rings_run() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    for _ in 0..20 {
        let ring = front.ring_mut(0).unwrap();
        for head in [0, 4, 8, 12] {
            ring.prepare(head, kind::IN, 0, 4096, true).unwrap();
            ring.publish(head).unwrap();
        }
        ring.kick().unwrap();
        front.share_memory().unwrap();
        let ring = front.ring_mut(0).unwrap();
        let mut heads: Vec<u32> = (0..4).map(|_| ring.wait_used(PATIENCE).unwrap().id).collect();
        heads.sort_unstable();
        assert_eq!(heads, [0, 4, 8, 12]);
    }
    read_block(&bed, &mut front, 0);
}

#[test]
fn a_device_reset_leaves_a_usable_device() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    read_block(&bed, &mut front, 0);
    front.wire.reset_device().unwrap();
    // A reset device has no features and no rings: the driver starts over, with rings of its own.
    front.wire.set_features(front.features).unwrap();
    front.renew_rings().unwrap();
    front.set_up(0, 0).unwrap();
    front.set_kick(0).unwrap();
    front.set_call(0).unwrap();
    front.enable(0, true).unwrap();
    read_block(&bed, &mut front, 0);
}

#[test]
fn a_second_frontend_is_refused_at_once() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut client = bed.connect(2).unwrap();
    for _ in 0..3 {
        let mut second = UnixStream::connect(bed.daemon.socket()).unwrap();
        second.set_read_timeout(Some(PATIENCE)).unwrap();
        let end = second.read(&mut [0; 16]);
        let closed = matches!(&end, Ok(0))
            || end.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset);
        assert!(closed, "{end:?}");
    }
    Workload { requests: 100, ..Workload::default() }.run(client.queues(), &mut bed.model).unwrap();
    drop(client);
    let next = bed.connect(1).unwrap();
    drop(next);
    bed.finish().unwrap();
}

/// fio connects just to read the capacity; guests reboot; VMMs restart.
#[test]
fn fifty_sessions_leak_nothing() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut first = 0;
    let mut threads = 0;
    let count_threads = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
    for session in 0..50 {
        match session % 5 {
            // A probe that says nothing, and one that asks for the configuration only.
            0 => close(UnixStream::connect(bed.daemon.socket()).unwrap()),
            1 => {
                let mut front = Frontend::connect(bed.daemon.socket(), 1, 64).unwrap();
                front.negotiate(FEATURES).unwrap();
                assert_eq!(front.config(0, 60).unwrap().len(), 60);
            }
            2 => {
                let mut front = Frontend::start(bed.daemon.socket(), 2, 64, FEATURES).unwrap();
                read_block(&bed, &mut front, 1);
                front.stop(0).unwrap();
                front.stop(1).unwrap();
            }
            _ => {
                let mut client = bed.connect(3).unwrap();
                let load = Workload { requests: 20, seed: session, ..Workload::default() };
                load.run(client.queues(), &mut bed.model).unwrap();
            }
        }
        if session == 4 {
            std::thread::sleep(Duration::from_millis(500));
            first = bed.daemon.open_files().unwrap();
            threads = count_threads(bed.daemon.pid());
        }
    }
    let settled = || {
        let now = (bed.daemon.open_files().unwrap(), count_threads(bed.daemon.pid()));
        (now.0 <= first && now.1 <= threads).then_some(())
    };
    let result = until("files and threads of ended sessions gone", PATIENCE, settled);
    let now = (bed.daemon.open_files().unwrap(), count_threads(bed.daemon.pid()));
    result.unwrap_or_else(|error| {
        panic!("{error}: files and threads {:?}, now {now:?}", (first, threads))
    });
    bed.finish().unwrap();
}

#[test]
fn the_configuration_space_can_be_read_in_any_size() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &["--serial", "a serial"]).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    let whole = front.config(0, 60).unwrap();
    assert_eq!(whole.get(..8).unwrap(), (bed.model.size() / 512).to_le_bytes());
    for len in [1, 8, 24, 60, 96, 255] {
        let part = front.config(0, len).unwrap();
        let same = usize::try_from(len).unwrap().min(60);
        assert_eq!(part.get(..same), whole.get(..same));
    }
    assert_eq!(front.config(20, 4).unwrap().as_slice(), whole.get(20..24).unwrap());

    let ring = front.ring_mut(0).unwrap();
    ring.prepare(0, kind::GET_ID, 0, 20, true).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    ring.wait_used(PATIENCE).unwrap();
    assert_eq!(ring.status(0).unwrap(), 0);
    assert_eq!(ring.read_bytes(ring.data(0), 9).unwrap(), b"a serial\0");
}

/// Firecracker and SeaBIOS: one queue, 512-byte requests, no EVENT_IDX.
#[test]
fn a_frontend_with_the_fewest_features() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let options = ClientOptions { features: frontend::VERSION_1, ..ClientOptions::default() };
    let mut client = integration::rig::Client::connect(bed.daemon.socket(), &options).unwrap();
    assert_eq!(client.features() & frontend::FLUSH, 0);
    let load = Workload { requests: 300, max_sectors: 1, ..Workload::default() };
    load.run(client.queues(), &mut bed.model).unwrap();
    drop(client);
    bed.finish().unwrap();
}

#[test]
fn the_cache_mode_can_be_switched() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &["--cache", "writethrough"]).unwrap();
    let mut front =
        Frontend::start(bed.daemon.socket(), 1, 64, FEATURES | frontend::CONFIG_WCE).unwrap();
    assert_ne!(front.features & frontend::CONFIG_WCE, 0);
    assert_eq!(front.config(32, 1).unwrap(), [0]);
    for (mode, head) in [(1_u8, 0), (0, 4), (1, 8)] {
        let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
        front.wire.set_config(32, flags, &[mode]).unwrap();
        assert_eq!(front.config(32, 1).unwrap(), [mode]);
        let ring = front.ring_mut(0).unwrap();
        ring.write_bytes(&[mode + 1; 4096], ring.data(head)).unwrap();
        ring.prepare(head, kind::OUT, 8, 4096, false).unwrap();
        ring.publish(head).unwrap();
        ring.kick().unwrap();
        assert_eq!(ring.wait_used(PATIENCE).unwrap().id, u32::from(head));
        assert_eq!(ring.status(head).unwrap(), 0);
    }
    // Nonsense is refused or ignored, and the session goes on.
    let _ = front.wire.get_features().unwrap();
    read_block(&bed, &mut front, 0);
}
