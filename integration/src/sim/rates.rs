// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How rare things are: CI runs other seeds each time, so every hazard and every mutant has to turn
//! up in any of its shares.

use std::ops::Range;

use super::mutant::Mutant;
use super::run_until;

/// What CI runs at a time.
const SHARE: u64 = 10_000;
/// How often a thing must turn up in a share on average, so that a share without it is out of the
/// question: where ten are expected, one in 22 000 shares has none.
const ENOUGH: u64 = 10;

/// Tells in how many of `seeds` each hazard is met and each mutant caught; whether it is often
/// enough.
pub(super) fn tell(seeds: &Range<u64>) -> bool {
    let total = run_until(seeds.clone(), None, |_| false);
    let mut enough = total.failures == 0;
    let mut line = |name: &str, count: u64| {
        let share = count * SHARE / total.seeds.max(1);
        let rare = if share < ENOUGH { "  RARE" } else { "" };
        enough &= share >= ENOUGH;
        println!("{share:>9}  {name}{rare}");
    };
    for (name, count) in total.met.iter() {
        line(name, count);
    }
    for mutant in Mutant::ALL {
        let caught = run_until(seeds.clone(), Some(*mutant), |_| false).failures;
        line(&format!("mutant {mutant:?}"), caught);
    }
    println!("sim rates: seeds={} per={SHARE} violations={}", total.seeds, total.failures);
    enough
}
