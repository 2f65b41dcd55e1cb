// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::*;

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const BOTH: u64 = FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;

/// A session whose driver has acknowledged `acked`.
fn session(device: &CacheMode, acked: u64) -> SessionMode {
    let session = SessionMode::new();
    session.features(device, acked);
    session
}

/// A frontend that begins: told the default, its ring new.
fn new_frontend(device: &CacheMode, acked: u64) -> SessionMode {
    let session = session(device, acked);
    session.ask(device, 0, 60);
    session.start(device, 0, 0);
    device.ended(0, 7);
    session
}

/// A frontend that connects again.
fn again(device: &CacheMode, acked: u64) -> SessionMode {
    let session = session(device, acked);
    session.index(device, 0, 7);
    session.start(device, 0, 7);
    session
}

#[test]
fn a_new_frontend_gets_the_default() {
    for default in [true, false] {
        let device = CacheMode::new(default);
        let session = session(&device, BOTH);
        assert_eq!(session.ask(&device, 32, 1), u8::from(default));
        assert_eq!(session.write_through(), !default, "before its first request");
        session.start(&device, 0, 0);
        assert_eq!(session.write_through(), !default);
        device.ended(0, 7);
        assert_eq!(again(&device, BOTH).write_through(), !default, "when it connects again");
    }
}

#[test]
fn without_flush_every_write_is_durable() {
    let device = CacheMode::new(true);
    let session = new_frontend(&device, BOTH & !FLUSH);
    assert!(session.write_through());
    assert_eq!(session.ask(&device, 0, 60), 0);
    session.set(&device, true);
    assert!(session.write_through());
}

#[test]
fn what_the_driver_sets_outlives_the_session() {
    let device = CacheMode::new(true);
    let first = new_frontend(&device, BOTH);
    assert_eq!(first.set(&device, false), Changed { mode: true, guessed: false });
    assert!(again(&device, BOTH).write_through());
    let third = again(&device, BOTH);
    third.set(&device, true);
    assert!(!third.write_through() && !again(&device, BOTH).write_through());
}

#[test]
fn one_that_only_looks_changes_nothing() {
    let device = CacheMode::new(true);
    new_frontend(&device, BOTH).set(&device, false);
    assert_eq!(session(&device, 0).ask(&device, 0, 60), 1);
    assert_eq!(session(&device, 0).ask(&device, 0, 8), 0, "not asked for writeback");
    assert!(again(&device, BOTH).write_through());
    // One that stays is a new frontend.
    assert!(!new_frontend(&device, BOTH).write_through());
    assert!(!again(&device, BOTH).write_through());
}

#[test]
fn a_driver_that_was_told_by_somebody_else_may_believe_in_write_through() {
    let device = CacheMode::new(true);
    let fresh = session(&device, BOTH);
    fresh.index(&device, 0, 7);
    assert!(fresh.write_through());
    assert!(fresh.start(&device, 0, 7).guessed);
    assert!(!fresh.start(&device, 1, 9).guessed, "said once");
    assert_eq!(fresh.ask(&device, 0, 60), 0, "it is told what holds");
    assert!(again(&device, BOTH).write_through());
    fresh.set(&device, true);
    device.ended(0, 7);
    assert!(!fresh.write_through() && !again(&device, BOTH).write_through());
}

/// Its guest is reset, and the frontend goes on telling it what its last driver had set.
#[test]
fn a_guess_outlives_a_reset() {
    let device = CacheMode::new(true);
    let fresh = again(&device, BOTH);
    fresh.index(&device, 0, 0);
    fresh.start(&device, 0, 0);
    assert!(fresh.write_through());
    let next = session(&device, BOTH);
    next.start(&device, 0, 0);
    assert!(next.write_through());
}

#[test]
fn a_frontend_that_never_asks_is_new_if_its_rings_are() {
    for default in [true, false] {
        let device = CacheMode::new(default);
        let fresh = session(&device, BOTH);
        fresh.index(&device, 0, 0);
        fresh.start(&device, 0, 0);
        assert_eq!(fresh.write_through(), !default);
        fresh.start(&device, 1, 5);
        assert!(fresh.write_through());
    }
}

/// cloud-hypervisor does not ask when it restores a VM: only where the ring goes on tells it from one that connects again.
#[test]
fn a_ring_that_goes_on_elsewhere_is_another_drivers() {
    let device = CacheMode::new(true);
    new_frontend(&device, BOTH).set(&device, false);
    new_frontend(&device, BOTH);
    // Connected again, its guest has offered more meanwhile.
    let same = session(&device, BOTH);
    same.index(&device, 0, 9);
    same.start(&device, 0, 7);
    assert!(!same.write_through());
    device.ended(0, 30);
    let restored = again(&device, BOTH);
    assert!(restored.write_through(), "the first one's driver");
    restored.set(&device, true);
    assert!(!restored.write_through());
}

/// Where another driver's rings ended says nothing.
#[test]
fn rings_of_a_driver_before_are_forgotten() {
    for sets in [false, true] {
        rings_are_forgotten(sets);
    }
}

/// The next driver may set its mode before its first request.
fn rings_are_forgotten(sets: bool) {
    let device = CacheMode::new(true);
    new_frontend(&device, BOTH).set(&device, false);
    device.ended(1, 5);
    let next = session(&device, BOTH);
    next.ask(&device, 0, 60);
    if sets {
        next.set(&device, true);
    }
    next.start(&device, 0, 0);
    device.ended(0, 7);
    let restored = session(&device, BOTH);
    assert!(restored.start(&device, 1, 5).guessed);
    assert!(restored.write_through());
    let reset = session(&device, BOTH);
    reset.start(&device, 0, 0);
    assert!(reset.write_through(), "told by whom nobody knows");
}

/// A driver that did not negotiate CONFIG_WCE flushes.
#[test]
fn a_driver_that_reads_no_mode_has_the_default() {
    for default in [true, false] {
        let device = CacheMode::new(default);
        assert_eq!(again(&device, FLUSH).write_through(), !default);
        assert!(again(&device, BOTH).write_through());
    }
}

/// Migrated or restored: the frontend has asked, the driver has not.
#[test]
fn a_new_frontend_with_an_old_driver() {
    for late in [false, true] {
        let device = CacheMode::new(true);
        let session = session(&device, BOTH);
        session.ask(&device, 0, 60);
        session.start(&device, 0, 0);
        assert!(!session.write_through());
        let changed =
            if late { session.start(&device, 1, 3) } else { session.index(&device, 1, 3) };
        assert_eq!(changed, Changed { mode: true, guessed: true });
        assert!(session.write_through() && again(&device, BOTH).write_through());
    }
}

/// Stopped and continued in the same session: the index is our own.
#[test]
fn a_ring_that_goes_on_says_nothing() {
    let device = CacheMode::new(true);
    let session = new_frontend(&device, BOTH);
    session.index(&device, 0, 500);
    session.start(&device, 0, 500);
    assert!(!session.write_through());
    session.set(&device, true);
    session.start(&device, 1, 4);
    assert!(!session.write_through(), "the driver has said so");
}
