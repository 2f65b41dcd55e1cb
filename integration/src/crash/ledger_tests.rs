// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the ledger takes for a loss, and what not.

use super::*;

fn ledger() -> Ledger {
    let mut ledger = Ledger::default();
    ledger.renew(8);
    ledger
}

/// Writes sector 3; completed or not.
fn write(ledger: &mut Ledger, done: bool) -> Vec<u8> {
    assert!(ledger.claim(&(3..4)));
    let version = ledger.issue(&(3..4), Content::Stamp);
    if done {
        ledger.complete(&(3..4), false);
    }
    ledger.release(&(3..4));
    Ledger::data(&(3..4), version)
}

fn right(ledger: &Ledger, bytes: &[u8], floor: Floor) -> bool {
    ledger.faults(3, bytes, floor).is_empty()
}

#[test]
fn what_a_flush_covers_may_not_go() {
    let mut ledger = ledger();
    let zeros = vec![0; SECTOR];
    let first = write(&mut ledger, true);
    let mark = ledger.done();
    let second = write(&mut ledger, true);
    let third = write(&mut ledger, false);
    for bytes in [&zeros, &first, &second, &third] {
        assert!(right(&ledger, bytes, Floor::Durable));
    }
    ledger.flushed(mark);
    assert!(!right(&ledger, &zeros, Floor::Durable));
    assert!(right(&ledger, &first, Floor::Durable));
    // After a kill nothing completed may be missing.
    assert!(!right(&ledger, &first, Floor::Completed));
    assert!(right(&ledger, &second, Floor::Completed) && right(&ledger, &third, Floor::Completed));
}

#[test]
fn only_what_was_written_there_is_right() {
    let mut ledger = ledger();
    let mut bytes = write(&mut ledger, true);
    for wrong in [
        Ledger::data(&(4..5), 1),
        Ledger::data(&(3..4), 2),
        POISON.repeat(SECTOR / POISON.len()),
        vec![7; SECTOR],
    ] {
        assert!(!right(&ledger, &wrong, Floor::Durable));
    }
    bytes.iter_mut().skip(500).for_each(|byte| *byte = 0);
    assert!(!right(&ledger, &bytes, Floor::Durable), "half a sector");
}

#[test]
fn what_was_seen_after_a_cut_stays() {
    let mut ledger = ledger();
    let first = write(&mut ledger, true);
    let second = write(&mut ledger, true);
    let mut image = vec![0; 3 * SECTOR];
    image.extend(&first);
    image.resize(8 * SECTOR, 0);
    assert_eq!(ledger.settle(&image, Floor::Durable), []);
    assert!(!right(&ledger, &second, Floor::Durable), "it came back");
    assert!(!right(&ledger, &vec![0; SECTOR], Floor::Durable));
}

#[test]
fn what_was_seen_after_a_kill_needs_a_flush() {
    let mut ledger = ledger();
    let zeros = vec![0; SECTOR];
    let late = write(&mut ledger, false);
    let mut image = vec![0; 3 * SECTOR];
    image.extend(&late);
    image.resize(8 * SECTOR, 0);
    assert_eq!(ledger.settle(&image, Floor::Completed), []);
    assert!(!right(&ledger, &zeros, Floor::Completed), "it went again");
    assert!(right(&ledger, &zeros, Floor::Durable));
    ledger.flushed(ledger.done());
    assert!(!right(&ledger, &zeros, Floor::Durable));
}

#[test]
fn a_discard_promises_zeros_in_whole_blocks() {
    let mut ledger = Ledger::default();
    ledger.renew(16);
    let version = ledger.issue(&(0..16), Content::Stamp);
    ledger.complete(&(0..16), true);
    ledger.issue(&(3..16), Content::Discarded);
    ledger.complete(&(3..16), false);
    let old = Ledger::data(&(0..16), version);
    let zeros = vec![0; 13 * SECTOR];
    let tail = |sector: usize| old.get(sector * SECTOR..).unwrap();
    let wrong = |ledger: &Ledger, start: u64, bytes: &[u8]| -> Vec<u64> {
        ledger.faults(start, bytes, Floor::Durable).iter().map(|fault| fault.sector).collect()
    };
    assert!(wrong(&ledger, 3, tail(3)).is_empty(), "not flushed yet");
    ledger.flushed(ledger.done());
    assert!(wrong(&ledger, 3, &zeros).is_empty());
    // The first block is only in part the discard's.
    assert_eq!(wrong(&ledger, 3, tail(3)), (8..16).collect::<Vec<_>>());
}
