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
        // The first byte and the last: an extent that is taken to reach one further has wrong places.
        for inside in [0, 17, BLOCK - 1] {
            let at = block * BLOCK + inside;
            let found = map.lookup(at, &mut hint);
            assert!(found.is_none_or(|e| e.range.start <= at && at < e.range.end));
            let place = |e: Extent| if e.has_place() { e.place(at).0 - inside } else { 0 };
            let seen = found.map(|e| (e.state, place(e)));
            let expected = oracle.get(&block).map(|(state, place)| (*state, place * BLOCK));
            assert_eq!(seen, expected, "block {block}, byte {inside}");
        }
    }
    // Bytes it knows, bytes in gaps, bytes behind its end: all it may do is read.
    let bytes: Vec<u64> = (0..=blocks).map(|block| block * BLOCK).chain([u64::MAX]).collect();
    map.foresee(&bytes);
    let list: Vec<Extent> = map.iter().collect();
    assert_eq!(list.len(), map.len());
    let mapped = oracle.values().filter(|(state, _)| *state == State::Mapped).count() as u64;
    assert_eq!(map.mapped_bytes(), mapped * BLOCK);
    assert_eq!(map.leaf_count(), map.leaves_from(0).count());
    for branch in &map.branches {
        assert_eq!(branch.start, branch.leaves[0].start);
        assert_eq!(branch.end, branch.leaves[branch.leaves.len() - 1].end);
        assert!(branch.leaves.len() <= BRANCH);
        for leaf in branch.leaves.iter() {
            let extents: Vec<Extent> = leaf.extents().collect();
            assert!((1..=LEAF).contains(&extents.len()));
            let ends = (extents[0].range.start, extents[extents.len() - 1].range.end);
            assert_eq!((leaf.start, leaf.end), ends);
        }
    }
    for pair in list.windows(2) {
        assert!(pair[0].range.end <= pair[1].range.start, "overlap: {pair:?}");
        assert!(!pair[0].joins(&pair[1]), "not merged: {pair:?}");
    }
}

/// What any extent of `range` is, by the slow way.
fn slow_overlap(map: &ExtentMap, range: FileRange) -> Vec<Extent> {
    map.iter().filter(|extent| extent.range.overlaps(&range)).collect()
}

/// Where things begin: next to each other, far apart, or as far as numbers go.
fn starts() -> impl Strategy<Value = Vec<u64>> {
    let start = prop_oneof![0u64..600, 0u64..1 << 40, u64::MAX - 600..u64::MAX, any::<u64>()];
    prop::collection::btree_set(start, 1..300).prop_map(|starts| starts.into_iter().collect())
}

proptest! {
    #[test]
    fn a_place_is_found_however_skewed_the_lengths_are(starts in starts(), more in any::<u64>(), ats in prop::collection::vec(any::<u64>(), 20)) {
        let last = starts[starts.len() - 1];
        let range = FileRange::new(starts[0], last.saturating_add(more));
        // Where each begins, the byte before that, and anywhere.
        let edges = starts.iter().flat_map(|at| [*at, at.saturating_sub(1), at.saturating_add(1)]);
        for at in edges.chain(ats).chain([0, range.end, range.end.saturating_sub(1), u64::MAX]) {
            let found = place(&starts, range, at, |start| *start);
            let expected = range.has(at).then(|| starts.partition_point(|start| *start <= at) - 1);
            prop_assert_eq!(found, expected, "{} of {:?}", at, range);
        }
    }

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
            let around = FileRange::new(range.start.saturating_sub(5 * BLOCK), range.end + BLOCK);
            prop_assert_eq!(map.overlapping(around).collect::<Vec<_>>(), slow_overlap(&map, around));
        }
    }

    /// Whole leaves go, of all but what is kept, and in the end all have had their turn.
    #[test]
    fn victims_spare_what_is_kept_and_bring_the_map_under_its_cap(
        count in 1u64..300, cap in 0usize..300, kept in prop::collection::vec((0u64..300, 1u64..9), 0..4),
    ) {
        let mut map = ExtentMap::new();
        for block in 0..count {
            // Gaps as well: leaves that do not touch each other.
            let e = extent(block * 3 / 2, 1, block * 2, State::Mapped);
            map.replace(e.range, &[e]);
        }
        let keep: Vec<FileRange> =
            kept.iter().map(|(at, len)| FileRange::new(at * BLOCK, (at + len) * BLOCK)).collect();
        let spared = map.leaves_from(0).filter(|l| keep.iter().any(|k| l.range().overlaps(k)));
        let spared: usize = spared.map(|leaf| leaf.extents().count()).sum();
        let before = map.len();
        let victims = map.victims(cap, &keep);
        prop_assert!(victims.len() <= 2 * keep.len() + 2, "{victims:?}");
        for victim in &victims {
            prop_assert!(!keep.iter().any(|keep| victim.overlaps(keep)));
            map.remove(*victim);
        }
        prop_assert!(map.len() <= cap.max(spared));
        prop_assert!(before <= cap || before - map.len() < before - cap + LEAF, "too much went");
    }

    #[test]
    fn eviction_goes_round(caps in prop::collection::vec(1usize..40, 1..40)) {
        let mut map = ExtentMap::new();
        let list: Vec<Extent> = (0..400).map(|i| extent(i, 1, i * 2, State::Mapped)).collect();
        map.replace(FileRange::new(0, 400 * BLOCK), &list);
        let mut last = 0;
        for few in caps.into_iter() {
            let victims = map.victims(map.len().saturating_sub(few), &[]);
            let Some(first) = victims.first() else { break };
            // Nothing is loaded again here, so what goes next lies behind what went before.
            prop_assert!(first.start >= last, "{victims:?} after {last}");
            last = victims[victims.len() - 1].end;
            victims.into_iter().for_each(|victim| map.remove(victim));
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

#[test]
fn a_place_that_is_no_sector_is_never_addressed() {
    let mut map = ExtentMap::new();
    let range = FileRange::new(0, BLOCK);
    map.replace(range, &[Extent { range, device: DeviceOffset(1234), state: State::Mapped }]);
    assert_eq!(map.lookup(0, &mut Hint::default()).map(|e| e.state), Some(State::Opaque));
    assert_eq!(map.mapped_bytes(), 0);
}

/// A copy keeps what it was made of, whatever becomes of the original.
#[test]
fn a_copy_does_not_change() {
    let mut map = ExtentMap::new();
    let list: Vec<Extent> = (0..100).map(|i| extent(i, 1, i * 2, State::Mapped)).collect();
    map.replace(FileRange::new(0, 100 * BLOCK), &list);
    let copy = map.clone();
    for block in 0..100 {
        let e = extent(block, 1, 1000 - block * 2, State::Shared);
        map.replace(e.range, &[e]);
    }
    assert_eq!(copy.iter().collect::<Vec<_>>(), list);
    assert!(map.iter().all(|e| e.state == State::Shared));
}

/// A change among many leaves others as they are, in the same memory.
#[test]
fn a_change_rewrites_few_leaves() {
    let mut map = ExtentMap::new();
    let list: Vec<Extent> = (0..1000).map(|i| extent(i, 1, i * 2, State::Mapped)).collect();
    map.replace(FileRange::new(0, 1000 * BLOCK), &list);
    let copy = map.clone();
    let e = extent(500, 1, 5000, State::Opaque);
    map.replace(e.range, &[e]);
    let shared = copy
        .branches
        .iter()
        .filter(|old| map.branches.iter().any(|new| Arc::ptr_eq(&old.leaves, &new.leaves)))
        .count();
    assert!(copy.branches.len() - shared <= 4, "{shared} of {}", copy.branches.len());
}
