// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::fs::File;
use std::io::{PipeWriter, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;

use super::super::testing::*;
use super::super::testing_guest::*;
use super::Session;
use crate::engine::message::WorkerId;
use crate::inbox::Event;

const EVENT_IDX: u64 = 1 << 29;
const FLUSH: u64 = 1 << 9;

fn content(file: &File, at: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes
}

fn fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn reads_writes_flushes_and_ids_on_every_queue() {
    for without in [0, EVENT_IDX, FLUSH] {
        let (server, file) = Server::of_file(5, 2);
        let mut guest = Guest::new(server.connect(), 5, without);
        guest.start();
        for queue in 0..5 {
            let at = queue as u64 * 1_000_448;
            guest.read(queue, 0, at, 8192);
            assert_eq!(guest.wait(queue), (0, 8193));
            assert_eq!(guest.status(0), 0);
            assert_eq!(guest.data(0)[..8192], content(&file, at, 8192));
            guest.memory.write_slice(&[queue as u8 + 1; 4096], Guest::data_at(1)).unwrap();
            guest.request(queue, 1, WRITE_KIND, at + 4096, 4096);
            guest.kick(queue);
            assert_eq!(guest.wait(queue), (3, 1));
            guest.request(queue, 2, FLUSH_KIND, 0, 0);
            guest.kick(queue);
            assert_eq!(guest.wait(queue), (6, 1));
            assert_eq!([guest.status(1), guest.status(2)], [0, 0]);
            assert_eq!(content(&file, at + 4096, 4096), [queue as u8 + 1; 4096]);
            guest.request(queue, 3, GET_ID_KIND, 0, 20);
            guest.kick(queue);
            assert_eq!(guest.wait(queue), (9, 21));
            assert_eq!(&guest.data(3)[..20], b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        }
        drop(guest);
        assert_eq!(server.ended(), None);
    }
}

#[test]
fn bad_requests_get_an_error_status() {
    let (server, _file) = Server::of_file(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.start();
    guest.request(0, 0, READ_KIND, CAPACITY, 512);
    guest.request(0, 1, READ_KIND, 0, 100);
    guest.request(0, 2, 99, 0, 512);
    guest.request(0, 3, READ_KIND, u64::MAX - 511, 512);
    guest.kick(0);
    for _ in 0..4 {
        guest.wait(0);
    }
    assert_eq!([0, 1, 2, 3].map(|request| guest.status(request)), [1, 1, 2, 1]);
}

#[test]
fn zeroes_and_discards_of_several_ranges() {
    let (server, file) = Server::of_file(1, 1);
    file.write_all_at(&[7; 1 << 20], 0).unwrap();
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.start();
    let segments = |list: &[(u64, u32, u32)]| -> Vec<u8> {
        let bytes = |&(sector, count, flags): &(u64, u32, u32)| {
            [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        list.iter().flat_map(bytes).collect()
    };
    let mut ask = |request: u16, kind: u32, list: &[(u64, u32, u32)]| {
        let data = segments(list);
        guest.memory.write_slice(&data, Guest::data_at(request)).unwrap();
        guest.request(0, request, kind, 0, u32::try_from(data.len()).unwrap());
        guest.kick(0);
        assert_eq!(guest.wait(0).1, 1);
        guest.status(request)
    };
    assert_eq!(ask(0, ZEROES_KIND, &[(1, 9, 0), (64, 64, 1)]), 0);
    assert_eq!(ask(1, DISCARD_KIND, &[(256, 32, 0), (512, 8, 0)]), 0);
    assert_eq!(ask(2, ZEROES_KIND, &[(0, 8, 2)]), 2);
    assert_eq!(ask(3, DISCARD_KIND, &[(0, 8, 1)]), 2);
    assert_eq!(ask(4, DISCARD_KIND, &[(0, 8, 0), (CAPACITY / 512, 1, 0)]), 1);
    assert_eq!(ask(5, ZEROES_KIND, &[]), 1);
    let content = content(&file, 0, 1 << 20);
    // Nothing is punched in this world: zeros are written, a discard changes nothing.
    let zero = |sector: usize| matches!(sector, 1..10 | 64..128);
    for (sector, bytes) in content.chunks(512).enumerate() {
        let expected = if zero(sector) { 0 } else { 7 };
        assert!(bytes.iter().all(|&byte| byte == expected), "sector {sector}");
    }
}

#[test]
fn a_malformed_chain_is_returned_unwritten_and_told_by_the_err_fd() {
    let (server, _file) = Server::of_file(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.start();
    guest.describe(0, 7, Descriptor::new(0, 16, NEXT, 7));
    guest.offer(0, 7);
    guest.kick(0);
    assert_eq!(guest.wait(0), (7, 0));
    assert!(wait_for(&guest.queues[0].err, Instant::now() + PATIENCE));
    // A head that is no descriptor cannot be returned; the queue goes on.
    guest.offer(0, 1000);
    guest.read(0, 0, 0, 512);
    assert_eq!(guest.wait(0), (0, 513));
}

#[test]
fn a_queue_whose_index_runs_ahead_is_left_alone_until_it_is_set_up_anew() {
    let (server, _file) = Server::of_file(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.start();
    guest.run_ahead(0);
    guest.kick(0);
    assert!(wait_for(&guest.queues[0].err, Instant::now() + PATIENCE));
    assert!(guest.used(0).is_none());
    let base = guest.front.get_vring_base(0).unwrap();
    assert_eq!(base, 0);
}

#[test]
fn many_requests_in_flight_are_answered_once_each() {
    let (server, file) = Server::of_file(2, 1);
    let mut guest = Guest::new(server.connect(), 2, 0);
    guest.start();
    for round in 0..200u64 {
        for request in 0..20 {
            let at = (round * 20 + u64::from(request)) % 512 * 4096;
            guest.request((request % 2).into(), request, READ_KIND, at, 4096);
        }
        guest.kick(0);
        guest.kick(1);
        let mut seen = [false; 20];
        for turn in 0..20 {
            let (head, len) = guest.wait(turn % 2);
            assert_eq!(len, 4097);
            assert!(!std::mem::replace(&mut seen[head as usize / 3], true));
        }
        for request in 0..20u16 {
            let at = (round * 20 + u64::from(request)) % 512 * 4096;
            assert_eq!(guest.data(request)[..4096], content(&file, at, 4096));
        }
    }
}

/// Gives the device the bytes it waits for after a moment, and says when it has.
fn release_late(mut pipe: PipeWriter, len: usize) -> (JoinHandle<PipeWriter>, Arc<AtomicBool>) {
    let released = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&released);
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        told.store(true, Ordering::SeqCst);
        pipe.write_all(&vec![5; len]).unwrap();
        pipe
    });
    (release, released)
}

/// A signal that was put off, since the disk had plenty to do besides, goes out when the worker falls asleep.
#[test]
fn the_guest_hears_of_two_requests_while_others_hang() {
    let (server, mut pipe) = Server::of_pipe(2, 1);
    let mut guest = Guest::new(server.connect(), 2, 0);
    guest.start();
    for request in 0..20 {
        guest.read(0, request, 0, 512);
    }
    std::thread::sleep(Duration::from_millis(50));
    while guest.queues[0].call.read().is_ok() {}
    // 18 are left, then 16: the next two would not be put off.
    for _ in 0..2 {
        pipe.write_all(&[5; 2 * 512]).unwrap();
        let told = (0..2).map(|_| guest.wait(0).1).collect::<Vec<_>>();
        assert_eq!(told, [513, 513]);
    }
    pipe.write_all(&[5; 16 * 512]).unwrap();
    assert_eq!(guest.front.get_vring_base(0).unwrap(), 20);
    assert_eq!((0..16).filter_map(|_| guest.used(0)).count(), 16);
}

/// With so many in flight that the worker sleeps with a signal put off, it goes out after a nap.
#[test]
fn the_guest_hears_of_two_requests_while_very_many_hang() {
    let (server, mut pipe) = Server::of_pipe(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.start();
    for request in 0..80 {
        guest.read(0, request, 0, 512);
    }
    std::thread::sleep(Duration::from_millis(50));
    while guest.queues[0].call.read().is_ok() {}
    for _ in 0..3 {
        pipe.write_all(&[5; 2 * 512]).unwrap();
        for _ in 0..2 {
            while guest.used(0).is_none() {
                assert!(wait_for(&guest.queues[0].call, Instant::now() + PATIENCE), "no call");
            }
        }
        // It may have been told of each, or of both at once: of the last one in any case.
        while guest.queues[0].call.read().is_ok() {}
    }
    pipe.write_all(&[5; 74 * 512]).unwrap();
    assert_eq!(guest.front.get_vring_base(0).unwrap(), 80);
    assert_eq!((0..74).filter_map(|_| guest.used(0)).count(), 74);
}

#[test]
fn get_vring_base_waits_for_what_is_in_flight_and_signals_first() {
    let (server, pipe) = Server::of_pipe(2, 1);
    let mut guest = Guest::new(server.connect(), 2, 0);
    guest.start();
    guest.read(0, 0, 0, 4096);
    std::thread::sleep(Duration::from_millis(50));
    while guest.queues[0].call.read().is_ok() {}
    let (release, released) = release_late(pipe, 4096);
    assert_eq!(guest.front.get_vring_base(0).unwrap(), 1);
    assert!(released.load(Ordering::SeqCst), "it did not wait");
    assert!(guest.queues[0].call.read().is_ok(), "signalled before the reply");
    assert_eq!(guest.used(0), Some((0, 4097)));
    assert_eq!((guest.status(0), guest.data(0)[0]), (0, 5));
    // A stopped ring is left alone; a ring set up again goes on.
    guest.read(0, 1, 0, 512);
    assert!(stays_silent(&guest.queues[0].call));
    guest.set_ring(0, 1);
    guest.front.set_vring_kick(0, &guest.queues[0].kick).unwrap();
    guest.front.set_vring_call(0, &guest.queues[0].call).unwrap();
    let mut pipe = release.join().unwrap();
    pipe.write_all(&[6; 512]).unwrap();
    assert_eq!(guest.wait(0), (3, 513));
}

#[test]
fn disabling_a_ring_drains_it_and_enabling_finds_what_was_kicked_meanwhile() {
    let (server, pipe) = Server::of_pipe(2, 2);
    let mut guest = Guest::new(server.connect(), 2, 0);
    guest.start();
    guest.read(0, 0, 0, 4096);
    std::thread::sleep(Duration::from_millis(50));
    let (release, released) = release_late(pipe, 4096);
    guest.front.set_vring_enable(0, false).unwrap();
    assert!(released.load(Ordering::SeqCst), "it did not wait");
    assert_eq!(guest.used(0), Some((0, 4097)));
    let mut pipe = release.join().unwrap();
    pipe.write_all(&[6; 512]).unwrap();
    while guest.queues[0].call.read().is_ok() {}
    guest.read(0, 1, 0, 512);
    assert!(stays_silent(&guest.queues[0].call));
    assert_eq!(guest.status(1), UNTOUCHED);
    guest.front.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.wait(0), (3, 513));
}

#[test]
fn a_kick_before_enable_and_a_call_fd_that_comes_late_lose_nothing() {
    let (server, _file) = Server::of_file(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.set_ring(0, 0);
    guest.front.set_vring_kick(0, &guest.queues[0].kick).unwrap();
    guest.read(0, 0, 0, 512);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.status(0), UNTOUCHED);
    guest.front.set_vring_enable(0, true).unwrap();
    let end = Instant::now() + PATIENCE;
    while guest.status(0) == UNTOUCHED && Instant::now() < end {
        std::thread::yield_now();
    }
    assert!(guest.queues[0].call.read().is_err());
    guest.front.set_vring_call(0, &guest.queues[0].call).unwrap();
    assert_eq!(guest.wait(0), (0, 513));
}

#[test]
fn memory_goes_only_when_nothing_uses_it() {
    let (server, pipe) = Server::of_pipe(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.start();
    guest.read(0, 0, 0, 4096);
    std::thread::sleep(Duration::from_millis(50));
    let (release, released) = release_late(pipe, 4096 + 512);
    let region = guest.region();
    guest.front.remove_mem_region(&region).unwrap();
    assert!(released.load(Ordering::SeqCst), "it did not wait");
    assert_eq!(guest.used(0), Some((0, 4097)));
    // No memory, no rings: the queue breaks, the session goes on, and so does the queue then.
    while guest.queues[0].call.read().is_ok() {}
    guest.read(0, 1, 0, 512);
    assert!(stays_silent(&guest.queues[0].call));
    assert!(guest.used(0).is_none());
    guest.front.add_mem_region(&region).unwrap();
    assert_eq!(guest.wait(0), (3, 513));
    release.join().unwrap();
}

#[test]
fn a_disconnect_waits_for_what_is_in_flight_and_the_next_frontend_is_served() {
    let (server, mut pipe) = Server::of_pipe(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.start();
    guest.read(0, 0, 0, 4096);
    std::thread::sleep(Duration::from_millis(50));
    let Guest { front, memory, .. } = guest;
    drop(front);
    let second = server.connect();
    assert!(server.seen.recv_timeout(Duration::from_millis(200)).is_err());
    pipe.write_all(&[5; 4096 + 512]).unwrap();
    assert_eq!(server.ended(), None);
    assert_eq!(memory.read_obj::<u8>(Guest::data_at(0)).unwrap(), 5);
    let mut guest = Guest::new(second, 1, 0);
    guest.start();
    guest.read(0, 0, 0, 512);
    assert_eq!(guest.wait(0), (0, 513));
}

#[test]
fn a_reset_is_told_and_so_is_a_new_driver() {
    let (server, _file) = Server::of_file(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.start();
    // Stopped and continued: no new driver.
    guest.read(0, 0, 0, 512);
    guest.wait(0);
    let base = guest.front.get_vring_base(0).unwrap();
    guest.set_ring(0, u16::try_from(base).unwrap());
    guest.front.reset_device().unwrap();
    assert_eq!(server.seen.recv_timeout(PATIENCE).unwrap(), Seen::Reset);
    guest.front.set_features(guest.front.get_features().unwrap()).unwrap();
    guest.start();
    guest.set_ring(0, 0);
    assert_eq!(server.seen.recv_timeout(PATIENCE).unwrap(), Seen::Reset);
}

#[test]
fn the_driver_sets_the_cache_mode_and_nothing_else() {
    let (server, _file) = Server::of_file(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    let flags = VhostUserConfigFlags::WRITABLE;
    let config = |front: &mut Frontend| front.get_config(0, 60, flags, &[0; 60]).unwrap().1;
    let before = config(&mut guest.front);
    assert_eq!(before[32], 1);
    guest.front.set_config(32, flags, &[0]).unwrap();
    guest.front.set_config(0, flags, &[9; 8]).unwrap();
    let mut expected = before;
    expected[32] = 0;
    assert_eq!(config(&mut guest.front), expected);
    guest.start();
    guest.request(0, 0, WRITE_KIND, 0, 4096);
    guest.kick(0);
    assert_eq!(guest.wait(0), (0, 1));
}

/// QEMU takes what the driver sets before its features are known to us (FreeBSD's does), and after
/// a reset it goes on telling the guest what was set before it.
#[test]
fn the_cache_mode_stays_what_the_guest_is_told() {
    let (server, _file) = Server::of_file(1, 1);
    let flags = VhostUserConfigFlags::WRITABLE;
    let mode = |front: &mut Frontend| front.get_config(32, 1, flags, &[0]).unwrap().1[0];
    let mut guest = Guest::connect(server.connect(), 1);
    guest.front.set_config(32, flags, &[0]).unwrap();
    guest.negotiate(0);
    assert_eq!(mode(&mut guest.front), 0);
    guest.start();
    guest.read(0, 0, 0, 512);
    guest.wait(0);
    guest.front.get_vring_base(0).unwrap();
    guest.set_ring(0, 0);
    assert_eq!(server.seen.recv_timeout(PATIENCE).unwrap(), Seen::Reset);
    assert_eq!(mode(&mut guest.front), 0);
    guest.front.reset_device().unwrap();
    assert_eq!(mode(&mut guest.front), 0);
}

/// How often the workers of this process have run.
fn worker_runs() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let runs = |status: String| -> Option<u64> {
        status.starts_with("Name:\tvring_worker").then_some(())?;
        let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let count = |name: &str| line(name)?.trim().parse::<u64>().ok();
        Some(count("voluntary_ctxt_switches:")? + count("nonvoluntary_ctxt_switches:")?)
    };
    let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status"));
    tasks.filter_map(|task| runs(status(task.unwrap()).ok()?)).sum()
}

/// A bell is rung in two steps. One that a worker saw between them rings for mail that has been
/// read, and must not keep the thread awake: neither in its ring nor, later, in the crate's epoll set.
#[test]
fn a_bell_that_rings_late_is_silenced() {
    let (config, inbox) = device(tempfile::tempfile().unwrap().into(), 1, 1);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let session = Session::start(theirs, config, WorkerId(0)).unwrap();
    let late = || {
        std::thread::sleep(Duration::from_millis(50));
        session.backend.threads()[0].slot.bell().write(1).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let before = worker_runs();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(worker_runs(), before);
        assert!(before > 0);
    };
    late();
    session.quiesce();
    let quiesced = || std::iter::from_fn(|| inbox.next()).any(|e| matches!(e, Event::Quiesced(_)));
    let end = Instant::now() + PATIENCE;
    while !quiesced() {
        assert!(Instant::now() < end);
    }
    late();
}

/// The crate is woken for a ring that was enabled, and finds that it was stopped again: it does not call the
/// worker then, which has to hear its mail all the same.
#[test]
fn a_ring_that_is_stopped_as_soon_as_it_is_enabled_is_drained() {
    let (server, _file) = Server::of_file(4, 1);
    let mut guest = Guest::new(server.connect(), 4, 0);
    guest.start();
    for round in 0..500_u16 {
        let queue = usize::from(round % 4);
        // No answer is waited for between the two.
        guest.front.set_hdr_flags(VhostUserHeaderFlag::empty());
        guest.front.set_vring_enable(queue, false).unwrap();
        guest.front.set_vring_enable(queue, true).unwrap();
        let base = guest.front.get_vring_base(queue).unwrap();
        guest.front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        guest.set_ring(queue, u16::try_from(base).unwrap());
        guest.front.set_vring_kick(queue, &guest.queues[queue].kick).unwrap();
        guest.front.set_vring_call(queue, &guest.queues[queue].call).unwrap();
        guest.front.set_vring_enable(queue, true).unwrap();
    }
    guest.read(0, 0, 0, 512);
    guest.wait(0);
}

#[test]
fn nonsense_ends_the_session_with_a_reason() {
    let (server, _file) = Server::of_file(1, 1);
    let mut stream = server.connect();
    stream.write_all(&[0xff; 12]).unwrap();
    assert!(server.ended().unwrap().contains("payload"));
    let guest = Guest::new(server.connect(), 1, 0);
    guest.front.set_vring_num(7, 1).unwrap_err();
    assert!(server.ended().unwrap().contains("protocol"));
}

/// Alone in its process under nextest; with the other tests in one, their fds come and go.
#[test]
fn fifty_sessions_leave_nothing_behind() {
    let test = || {
        let (server, _file) = Server::of_file(8, 4);
        let session = || {
            let mut guest = Guest::new(server.connect(), 8, 0);
            guest.start();
            guest.read(3, 0, 0, 512);
            guest.wait(3);
            drop(guest);
            server.ended();
            // The next connection is taken only when this one is gone.
            drop(server.connect());
            server.ended();
        };
        session();
        let before = fds();
        (0..50).for_each(|_| session());
        // The last session may still be on its way out; a leak of fifty stays.
        let started = Instant::now();
        while fds() > before + 2 && started.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(10));
        }
        (before, fds())
    };
    if std::env::var_os("NEXTEST").is_none() {
        return run_alone("fifty_sessions_leave_nothing_behind");
    }
    let (before, after) = test();
    assert!(after <= before + 2, "{before} fds before, {after} after");
}

/// Descriptors run out at every place of the start, one after the other.
#[test]
fn a_session_that_cannot_start_leaves_nothing_behind() {
    if std::env::var_os("NEXTEST").is_none() {
        return run_alone("a_session_that_cannot_start_leaves_nothing_behind");
    }
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let (config, _inbox) = device(tempfile::tempfile().unwrap().into(), 8, 4);
    let before = (fds(), threads());
    let usual = getrlimit(Resource::Nofile);
    let failures = (1..500u64)
        .take_while(|spare| {
            let (_ours, theirs) = UnixStream::pair().unwrap();
            let current = Some(before.0 as u64 + spare);
            setrlimit(Resource::Nofile, Rlimit { current, ..usual }).unwrap();
            let result = Session::start(theirs, Arc::clone(&config), WorkerId(0));
            setrlimit(Resource::Nofile, usual).unwrap();
            result.is_err()
        })
        .count();
    assert!((20..400).contains(&failures), "{failures}");
    let end = Instant::now() + PATIENCE;
    while (fds(), threads()) != before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!((fds(), threads()), before, "descriptors and threads");
}

fn run_alone(test: &str) {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let name = format!("virtio::session::tests::{test}");
    let status = command.args(["--exact", &name]).env("NEXTEST", "1").status().unwrap();
    assert!(status.success());
}

/// A worker that is held up reads none of its mail, and each piece may have a descriptor.
#[test]
fn a_frontend_waits_when_its_worker_reads_no_mail() {
    use crate::virtio::relay::{Hooks, VringFd};
    const SENT: usize = 5000;
    let (config, _inbox) = device(tempfile::tempfile().unwrap().into(), 2, 1);
    let (threads, mailboxes) = super::make_threads(&config, WorkerId(0)).unwrap();
    let backend = super::Backend::new(config, threads).unwrap();
    let waited = AtomicBool::new(false);
    let alive = || !waited.swap(true, Ordering::SeqCst);
    (0..SENT).for_each(|_| backend.vring_fd(1, VringFd::Call, None, &alive));
    assert!(waited.load(Ordering::SeqCst));
    let unread = backend.threads()[0].slot.unread();
    assert!((6..=1024).contains(&unread), "{unread}");
    // As soon as the worker reads, it goes on.
    let mailbox = mailboxes.into_iter().next().unwrap();
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        (mailbox.next().is_some(), mailbox)
    });
    backend.vring_fd(0, VringFd::Call, None, &|| true);
    assert!(reader.join().unwrap().0);
    assert_eq!(backend.threads()[0].slot.unread(), unread);
}
