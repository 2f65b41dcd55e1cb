// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver that believes in write-through never flushes, whatever has happened to us meanwhile:
//! its frontend connected again, somebody else looked at the device, or this daemon is not the one
//! that told it.

#![allow(clippy::unwrap_used, clippy::panic)]

use integration::rig::frontend::{self, Frontend, kind};
use integration::rig::wait::PATIENCE;
use integration::rig::{Backing, Bed, FaultDisk, Rig, Setup};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
/// All that Linux acknowledges of this.
const FEATURES: u64 = frontend::VERSION_1 | frontend::FLUSH | frontend::CONFIG_WCE;
const WRITES: usize = 20;
/// Queues of the frontends here.
const RINGS: u16 = 2;

fn served(rig: &Rig) -> (FaultDisk, Bed) {
    let disk = FaultDisk::mount(64 * MIB, &rig.dir("disk").unwrap()).unwrap();
    let setup = Setup { backing: Backing::File(disk.path()), ..Setup::default() };
    let bed = Bed::make(rig, PROGRAM, &setup, &["--num-queues=2", "--threads=2"]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    (disk, bed)
}

/// A frontend whose rings are all enabled and go on at `index`; it asks for its configuration if it
/// is new.
fn connect(bed: &Bed, new: bool, index: u16) -> Frontend {
    let mut front = Frontend::connect(bed.daemon.socket(), RINGS, 64).unwrap();
    front.negotiate(FEATURES).unwrap();
    if new {
        front.config(0, 60).unwrap();
    }
    front.share_memory().unwrap();
    for place in 0..usize::from(RINGS) {
        let ring = front.ring_mut(place).unwrap();
        ring.start_at(index, index);
        ring.set_avail_index(index).unwrap();
        let used = ring.used() + 2;
        ring.write_bytes(&index.to_le_bytes(), used).unwrap();
        front.set_up(place, index).unwrap();
        front.set_kick(place).unwrap();
        front.set_call(place).unwrap();
        front.enable(place, true).unwrap();
    }
    front
}

fn set_writeback(front: &mut Frontend, on: u8) {
    front.wire.set_config(32, VhostUserConfigFlags::WRITABLE, &[on]).unwrap();
}

fn write(front: &mut Frontend, index: usize) {
    let ring = front.ring_mut(index).unwrap();
    ring.prepare(0, kind::OUT, 8, 4096, false).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    assert_eq!(ring.wait_used(PATIENCE).unwrap().id, 0);
    assert_eq!(ring.status(0).unwrap(), 0);
}

/// Whether each write is on the disk when it is complete. (The host's filesystem flushes on its
/// own, now and then.)
fn through(disk: &FaultDisk, front: &mut Frontend, index: usize) -> bool {
    let flushed = (0..WRITES).filter(|_| {
        let before = disk.counts().flushes;
        write(front, index);
        disk.counts().flushes > before
    });
    match flushed.count() {
        WRITES => true,
        some if some < WRITES * 3 / 4 => false,
        some => panic!("{some} of {WRITES} writes were flushed"),
    }
}

#[test]
fn a_frontend_that_connects_again_has_the_mode_that_its_driver_set() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, bed) = served(&rig);
    let mut front = connect(&bed, true, 0);
    assert!(!through(&disk, &mut front, 0));
    set_writeback(&mut front, 0);
    assert!(through(&disk, &mut front, 0));
    drop(front);
    let mut front = connect(&bed, false, 40);
    assert!(through(&disk, &mut front, 0), "forgotten with the session");
    // The guest is reset, and its frontend goes on telling it what was set.
    front.wire.reset_device().unwrap();
    drop(front);
    // Somebody reads the capacity meanwhile.
    let mut probe = Frontend::connect(bed.daemon.socket(), 1, 64).unwrap();
    probe.negotiate(FEATURES).unwrap();
    assert_eq!(probe.config(32, 1).unwrap(), [1]);
    drop(probe);
    let mut front = connect(&bed, false, 0);
    assert!(through(&disk, &mut front, 1), "forgotten for one that looked");
    set_writeback(&mut front, 1);
    assert!(!through(&disk, &mut front, 0));
    set_writeback(&mut front, 0);
    drop(front);
    // Another VM.
    let mut front = connect(&bed, true, 0);
    assert_eq!(front.config(32, 1).unwrap(), [1]);
    assert!(!through(&disk, &mut front, 0), "kept for somebody else");
}

#[test]
fn a_driver_that_another_daemon_told_its_mode_gets_write_through() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, mut bed) = served(&rig);
    drop(connect(&bed, true, 0));
    bed.daemon.sigterm().unwrap();
    bed.restart(&["--num-queues=2", "--threads=2"]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut front = connect(&bed, false, 9);
    assert!(through(&disk, &mut front, 0), "a fresh daemon and a ring that was running");
    assert!(bed.daemon.log().contains("may rely on write-through"), "{}", bed.daemon.log());
    drop(front);
    let mut front = connect(&bed, false, 90);
    assert!(through(&disk, &mut front, 1));
    set_writeback(&mut front, 1);
    assert!(!through(&disk, &mut front, 1), "told otherwise");
    drop(front);
    // Where its ring has got to.
    assert!(!through(&disk, &mut connect(&bed, false, 130), 1));
}

/// cloud-hypervisor restores a VM without asking for the configuration, as if it connected again.
#[test]
fn a_restored_driver_does_not_get_what_another_vm_was_told() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, bed) = served(&rig);
    let mut front = connect(&bed, true, 0);
    set_writeback(&mut front, 0);
    assert!(through(&disk, &mut front, 0));
    drop(front);
    let mut front = connect(&bed, true, 0);
    assert!(!through(&disk, &mut front, 0) && !through(&disk, &mut front, 0));
    drop(front);
    let mut front = connect(&bed, false, 20);
    assert!(through(&disk, &mut front, 0), "the first VM's driver never flushes");
}

/// Restored or migrated: the frontend is new and asks, its driver is not and was told elsewhere.
#[test]
fn a_driver_that_comes_with_a_new_frontend_gets_write_through() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, bed) = served(&rig);
    assert!(through(&disk, &mut connect(&bed, true, 9), 0));
}
