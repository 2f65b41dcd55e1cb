// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sessions that end with requests in flight. A frontend takes the used index it finds when its
//! connection ends for the place to go on from: whatever is published after that is answered twice.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::Duration;

use integration::rig::fault_disk::{Operation, Rule};
use integration::rig::frontend::{self, Frontend, kind};
use integration::rig::wait::{PATIENCE, until};
use integration::rig::{Backing, Bed, FaultDisk, Rig, Setup};
use rustix::process::Signal;
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
const FEATURES: u64 = frontend::VERSION_1 | frontend::EVENT_IDX | frontend::FLUSH;
/// What a held write begins with.
const HELD: [u8; 4096] = [0x68; 4096];
/// Writes in flight on each of two queues.
const WRITES: u16 = 6;
/// Long enough for what does not wait to show that.
const MOMENT: Duration = Duration::from_millis(400);

/// Something that makes extentd end the session.
type End = fn(&Bed, &mut Frontend);

fn used(front: &Frontend) -> [u16; 2] {
    [0, 1].map(|index| front.ring(index).unwrap().used_index().unwrap())
}

/// Ends a session with writes held by the disk: the frontend must not see that before the last one
/// is published, and nothing is published once it has seen it.
fn published_before_the_hang_up(end: End) {
    let Some(rig) = Rig::enter() else { return };
    let slow = FaultDisk::mount(64 * MIB, &rig.dir("slow").unwrap()).unwrap();
    let setup = Setup { backing: Backing::File(slow.path()), ..Setup::default() };
    let bed = Bed::make(&rig, PROGRAM, &setup, &["--num-queues=2", "--threads=2"]).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), 2, 64, FEATURES).unwrap();
    front.wire.set_hdr_flags(VhostUserHeaderFlag::empty());
    slow.add(Rule::hold(Operation::Write).starting(&HELD));
    for index in [0, 1] {
        let ring = front.ring_mut(index).unwrap();
        for head in (0..WRITES).map(|number| number * 4) {
            ring.write_bytes(&HELD, ring.data(head)).unwrap();
            let sector = index as u64 * 8192 + u64::from(head) * 16;
            ring.prepare(head, kind::OUT, sector, 4096, false).unwrap();
            ring.publish(head).unwrap();
        }
        ring.kick().unwrap();
    }
    let all = u64::from(2 * WRITES);
    until("the held writes", PATIENCE, || (slow.counts().in_flight >= all).then_some(())).unwrap();
    end(&bed, &mut front);
    let early = front.wait_hang_up(MOMENT).unwrap();
    let before = used(&front);
    slow.heal();
    assert!(front.wait_hang_up(PATIENCE).unwrap(), "no hang-up; log: {}", bed.daemon.log());
    let at_the_end = used(&front);
    thread::sleep(MOMENT);
    let after = used(&front);
    assert!(!early, "hung up with writes in flight, used indices {before:?}, {after:?} later");
    assert_eq!((at_the_end, after), ([WRITES; 2], [WRITES; 2]), "at the hang-up and later");
}

/// A message that does not exist: the crate ends its side.
#[test]
fn by_an_unknown_message() {
    published_before_the_hang_up(|_, front| front.send_raw(99, &[], &[]).unwrap());
}

/// A message whose length no message has: our side notices.
#[test]
fn by_a_message_too_long() {
    published_before_the_hang_up(|_, front| front.send_raw(1, &[0; 8192], &[]).unwrap());
}

/// A ring that does not exist: the crate's handler refuses it.
#[test]
fn by_a_ring_that_does_not_exist() {
    published_before_the_hang_up(|_, front| {
        let payload = [[200_u8, 0, 0, 0], [64, 0, 0, 0]].concat();
        front.send_raw(FrontendReq::SET_VRING_NUM as u32, &payload, &[]).unwrap();
    });
}

/// A call descriptor that is no eventfd.
#[test]
fn by_a_bad_descriptor() {
    published_before_the_hang_up(|_, front| {
        let file = File::open("/dev/zero").unwrap();
        let call = FrontendReq::SET_VRING_CALL as u32;
        front.send_raw(call, &0_u64.to_ne_bytes(), &[file.as_fd()]).unwrap();
    });
}

/// Memory behind the end of its file.
#[test]
fn by_memory_that_is_not_there() {
    published_before_the_hang_up(|_, front| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 1 << 40,
            memory_size: 8 << 20,
            userspace_addr: 1 << 41,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        let _ = front.wire.add_mem_region(&region);
    });
}

#[test]
fn by_sigterm() {
    published_before_the_hang_up(|bed, _| bed.daemon.signal(Signal::TERM).unwrap());
}
