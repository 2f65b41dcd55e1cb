// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The explorer of itself: it finds every order, and each rule that it watches is missed when it is gone.

use super::*;

fn script(name: &str) -> &'static Script {
    SCRIPTS.iter().find(|script| script.name == name).unwrap()
}

#[test]
fn scripts_hold_and_their_interleavings_are_always_as_many() {
    let first = explore(script("raw write, break"), None).unwrap();
    assert!(first.interleavings > first.states as u128, "{first:?}");
    assert_eq!(explore(script("raw write, break"), None).unwrap(), first);
}

#[test]
fn raw_io_that_nothing_waits_for_is_caught() {
    let caught = explore(script("raw write, break"), Some(Mutant::NoDrain)).unwrap_err();
    assert!(caught.what.contains("R2"), "{caught:?}");
}

#[test]
fn a_discard_that_waits_for_nothing_kills_the_canary() {
    let caught = explore(script("discard beside raw I/O"), Some(Mutant::NoDrain)).unwrap_err();
    assert!(caught.what.contains("Canary"), "{caught:?}");
}

#[test]
fn a_map_older_than_a_write_is_caught() {
    let caught =
        explore(script("copy on write beside a load"), Some(Mutant::NoGeneration)).unwrap_err();
    assert!(caught.what.contains("raw read"), "{caught:?}");
    assert!(
        !trace(script("copy on write beside a load"), Some(Mutant::NoGeneration), &caught.path)
            .is_empty()
    );
}

#[test]
fn flushes_without_their_fdatasync_and_odd_punches_are_caught() {
    let caught = |mutant| SCRIPTS.iter().any(|script| explore(script, Some(mutant)).is_err());
    assert!(caught(Mutant::NoMetadataFsync));
    assert!(caught(Mutant::PunchUnrounded));
}
