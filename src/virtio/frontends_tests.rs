// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What frontends are known to do, one by one.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;

use super::testing::*;
use super::testing_guest::*;

const INDIRECT: u16 = 4;

/// The crate's own mask has no queue above 31.
#[test]
fn all_queues_are_served_on_three_threads() {
    let (server, file) = Server::of_file(64, 3);
    let mut guest = Guest::new(server.connect(), 64, 0);
    guest.start();
    for queue in 0..64 {
        let at = queue as u64 * 8192;
        guest.read(queue, 0, at, 4096);
        assert_eq!(guest.wait(queue), (0, 4097), "queue {queue}");
        let mut expected = [0; 4096];
        file.read_exact_at(&mut expected, at).unwrap();
        assert_eq!(guest.data(0)[..4096], expected, "queue {queue}");
    }
}

/// cloud-hypervisor, when it has lost its backend: it remembers what was offered and does not ask again.
#[test]
fn a_frontend_that_comes_again_asks_for_nothing() {
    let (server, _file) = Server::of_file(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    let offered = guest.front.get_protocol_features().unwrap();
    drop(guest);
    server.ended();
    let mut guest = Guest::connect_with(server.connect(), 1, |front: &mut Frontend| {
        front.set_protocol_features(offered & VhostUserProtocolFeatures::all()).unwrap();
    });
    guest.negotiate(0);
    guest.start();
    guest.read(0, 0, 0, 512);
    assert_eq!(guest.wait(0), (0, 513));
}

/// Windows' viostor makes more segments than `seg_max` says.
#[test]
fn more_segments_than_were_asked_for_are_served() {
    const SEGMENTS: u16 = 400;
    let (server, file) = Server::of_file(1, 1);
    let mut guest = Guest::new(server.connect(), 1, 0);
    guest.start();
    let head = guest.prepare(0, 0, READ_KIND, 0, 512);
    assert!(u32::from(SEGMENTS) > super::features::SEG_MAX);
    // The descriptors of request 0, with more data in between, in a table of their own.
    let table = Guest::data_at(16);
    let [header, _, status] = [0, 1, 2].map(|index| guest.descriptor(0, index));
    let mut all = vec![Descriptor::new(header.addr().0, 16, NEXT, 1)];
    for nth in 0..SEGMENTS {
        // Apart from each other, so that none can be merged with the next.
        let at = Guest::data_at(0).0 + u64::from(nth) * 1024;
        all.push(Descriptor::new(at, 512, NEXT | WRITE, nth + 2));
    }
    all.push(Descriptor::new(status.addr().0, 1, WRITE, 0));
    for (place, descriptor) in (table.0..).step_by(16).zip(&all) {
        guest.memory.write_obj(*descriptor, vm_memory::GuestAddress(place)).unwrap();
    }
    let bytes = 16 * u32::try_from(all.len()).unwrap();
    guest.describe(0, head, Descriptor::new(table.0, bytes, INDIRECT, 0));
    guest.offer(0, head);
    guest.kick(0);
    assert_eq!(guest.wait(0), (0, 512 * u32::from(SEGMENTS) + 1));
    assert_eq!(guest.status(0), 0);
    let mut expected = vec![0; 512 * usize::from(SEGMENTS)];
    file.read_exact_at(&mut expected, 0).unwrap();
    for (nth, sector) in expected.chunks(512).enumerate() {
        let mut seen = [0; 512];
        let at = vm_memory::GuestAddress(Guest::data_at(0).0 + nth as u64 * 1024);
        guest.memory.read_slice(&mut seen, at).unwrap();
        assert_eq!(seen, *sector, "segment {nth}");
    }
}

/// The crate stops the rings at RESET_DEVICE and waits for nothing.
#[test]
fn a_reset_waits_for_what_is_in_flight() {
    let (server, mut pipe) = Server::of_pipe(2, 2);
    let mut guest = Guest::new(server.connect(), 2, 0);
    guest.start();
    guest.read(1, 0, 0, 4096);
    std::thread::sleep(Duration::from_millis(50));
    let (done, reset) = mpsc::channel();
    std::thread::scope(|scope| {
        let front = &mut guest.front;
        scope.spawn(move || {
            front.reset_device().unwrap();
            done.send(()).unwrap();
        });
        reset.recv_timeout(Duration::from_millis(300)).unwrap_err();
        pipe.write_all(&[5; 4096]).unwrap();
        reset.recv_timeout(PATIENCE).unwrap();
    });
    assert_eq!(guest.used(1), Some((0, 4097)));
}
