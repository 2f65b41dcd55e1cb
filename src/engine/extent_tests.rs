// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The extent map against a slow oracle: one entry per block.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const BLOCK: u64 = 4096;

/// Per block: state and device block, for states that have a place.
type Oracle = BTreeMap<u64, (State, u64)>;

fn extent(start: u64, len: u64, device: u64, state: State) -> Extent {
    Extent {
        range: FileRange::new(start * BLOCK, (start + len) * BLOCK),
        device: DeviceOffset(device * BLOCK),
        state,
    }
}

fn state() -> impl Strategy<Value = State> {
    prop_oneof![
        Just(State::Mapped),
        Just(State::Hole),
        Just(State::Unwritten),
        Just(State::Shared),
        Just(State::Opaque)
    ]
}

fn check(map: &ExtentMap, oracle: &Oracle, blocks: u64) {
    let mut hint = Hint::default();
    // Backwards first, so that the hint is wrong half of the time.
    for block in (0..blocks).rev().chain(0..blocks) {
        let at = block * BLOCK + 17;
        let found = map.lookup(at, &mut hint);
        let seen =
            found.map(|e| (e.state, if e.has_place() { (e.place(at).0 - 17) / BLOCK } else { 0 }));
        assert_eq!(seen, oracle.get(&block).copied(), "block {block}");
    }
    let list: Vec<Extent> = map.iter().collect();
    assert_eq!(list.len(), map.len());
    for pair in list.windows(2) {
        assert!(pair[0].range.end <= pair[1].range.start, "overlap: {pair:?}");
        assert!(!pair[0].joins(&pair[1]), "not merged: {pair:?}");
    }
}

proptest! {
    #[test]
    fn replaces_and_removes_like_the_oracle(
        steps in prop::collection::vec(
            (0u64..900, 1u64..40, prop::collection::vec((1u64..4, state(), 0u64..3), 0..12)),
            1..60,
        )
    ) {
        let mut map = ExtentMap::new();
        let mut oracle = Oracle::new();
        for (start, len, pieces) in steps {
            let range = FileRange::new(start * BLOCK, (start + len) * BLOCK);
            let mut extents = Vec::new();
            let mut at = start;
            for (count, state, jump) in pieces {
                extents.push(extent(at, count, at + jump * 10_000, state));
                at += count;
            }
            map.replace(range, &extents);
            for block in start..start + len {
                oracle.remove(&block);
            }
            for e in &extents {
                for block in e.range.start / BLOCK..e.range.end / BLOCK {
                    if block < start + len {
                        let place = if e.has_place() { e.place(block * BLOCK).0 / BLOCK } else { 0 };
                        oracle.insert(block, (e.state, place));
                    }
                }
            }
            check(&map, &oracle, 1000);
        }
    }

    #[test]
    fn gaps_are_what_the_oracle_lacks(
        cached in prop::collection::vec((0u64..200, 1u64..9), 0..20),
        from in 0u64..200, len in 1u64..60,
    ) {
        let mut map = ExtentMap::new();
        let mut have = vec![false; 400];
        for (start, count) in cached {
            let e = extent(start, count, start, State::Mapped);
            map.replace(e.range, &[e]);
            have[start as usize..(start + count) as usize].fill(true);
        }
        let first = (from..from + len).find(|b| !have[*b as usize]);
        let gap = map.first_gap(FileRange::new(from * BLOCK, (from + len) * BLOCK));
        prop_assert_eq!(gap.map(|g| g.start / BLOCK), first);
        if let Some(gap) = gap {
            let end = gap.end / BLOCK;
            prop_assert!((gap.start / BLOCK..end).all(|b| !have[b as usize]));
            prop_assert!(end == from + len || have[end as usize]);
        }
    }
}

#[test]
fn a_million_alternating_extents_stay_within_the_cap_after_eviction() {
    let mut map = ExtentMap::new();
    for batch in 0..400u64 {
        let list: Vec<Extent> = (0..250)
            .map(|i| extent(batch * 250 + i, 1, (batch * 250 + i) * 2, State::Mapped))
            .collect();
        let range = FileRange::new(batch * 250 * BLOCK, (batch + 1) * 250 * BLOCK);
        map.replace(range, &list);
        for victim in map.victims(10_000, &[range]) {
            assert!(!victim.overlaps(&range));
            map.remove(victim);
        }
        assert!(map.len() <= 10_000);
        assert!(map.first_gap(range).is_none());
    }
}
