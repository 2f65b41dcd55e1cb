// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The simulator of itself: same seed, same run; a few seeds hold; each mutant is caught.

use super::*;

#[test]
fn a_seed_is_a_run() {
    for seed in [3, 36, 81] {
        let (first, second) = (run(seed, None, true), run(seed, None, true));
        assert_eq!(first.violation, None);
        assert_eq!(first.trace, second.trace);
        assert_eq!(first.events, run(seed, None, false).events);
    }
}

#[test]
fn seeds_hold() {
    let total = run_many(0..150, None);
    assert_eq!(total.failed, None);
    assert!(total.answered > 10_000, "{} requests", total.answered);
}

#[test]
fn mutants_are_caught() {
    for mutant in Mutant::ALL {
        assert!(run_many(0..6_000, Some(*mutant)).failed.is_some(), "{mutant:?}");
    }
}
