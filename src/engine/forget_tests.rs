// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! File writes that leave nothing in the page cache: what the map knows of them is forgotten, and loaded again with much else (ADR 0006).

use proptest::prelude::*;

use super::*;

const ALL: FileRange = FileRange::new(0, BLOCKS * BLOCK);

/// In direct mode, with this cached of all blocks.
fn knowing(state: State, change: impl FnOnce(&mut KeeperConfig)) -> Small {
    let mut small = Small::direct(change);
    small.need(0, blocks(0, 1));
    small.map(state, Proof::None);
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(0))]);
    small
}

fn states(small: &Small, first: u64, count: u64) -> Vec<Option<State>> {
    (first..first + count).map(|i| small.seen(i)).collect()
}

/// Writes blocks through the file that leave no page behind.
fn fill(small: &mut Small, range: FileRange) {
    small.lock(1, range);
    assert_eq!(small.take(A), [ToWorker::Locked(Tag(1))]);
    small.unlock_uncached(1);
    assert_eq!(small.take(A)[0], ToWorker::Settled(Tag(1)));
}

#[test]
fn a_written_hole_is_forgotten_before_the_guest_is_told_and_no_fiemap_is_waited_for() {
    for state in [State::Hole, State::Unwritten] {
        let mut small = knowing(state, |_| ());
        small.lock(1, blocks(4, 2));
        small.take(A);
        small.keeper.message(
            small.now,
            A,
            ToKeeper::Unlock { tag: Tag(1), wrote_file: true, uncached: true },
        );
        let action = small.keeper.poll_action();
        assert_eq!(action, Some(Action::Send(A, ToWorker::Settled(Tag(1)))));
        // It has not been delivered yet, and whoever looks sees no hole any more.
        assert_eq!(states(&small, 3, 4), [Some(state), None, None, Some(state)]);
        assert_eq!(small.keeper.poll_action(), None);
    }
}

#[test]
fn one_load_finds_all_that_was_forgotten_and_changes_nothing_that_is_cached() {
    let mut small = knowing(State::Hole, |_| ());
    for block in (4..400).step_by(3) {
        fill(&mut small, blocks(block, 1));
    }
    small.need(2, blocks(7, 1));
    let asked = small.map(State::Mapped, Proof::None);
    assert_eq!((asked.start, small.jobs.len()), (blocks(7, 1).start, 0));
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(2))]);
    let expected = |i: u64| match i {
        // Before the one that was asked for.
        4 => None,
        7..400 if i % 3 == 1 => Some(State::Mapped),
        _ => Some(State::Hole),
    };
    assert_eq!(states(&small, 0, 500), (0..500).map(expected).collect::<Vec<_>>());
    assert_eq!(small.keeper.snapshot().fiemap_calls, 2);
}

#[test]
fn blocks_that_were_mapped_stay_for_others_address_them() {
    let mut small = Small::direct(|_| ());
    small.need(0, blocks(0, 1));
    let mut known = extents(blocks(0, 4), State::Mapped);
    known.remove(2);
    let answer = MapAnswer { covered: blocks(0, 8), extents: known.clone(), proof: Proof::None };
    small.finish(JobDone::Map(Ok(answer)));
    small.take(A);
    fill(&mut small, blocks(1, 3));
    assert_eq!(small.shared.latest().1.map.overlapping(blocks(0, 4)).collect::<Vec<_>>(), known);
    assert_eq!(small.seen(2), None);
    // All of it mapped: there is nothing to forget, and nothing new to show.
    let version = small.shared.version();
    fill(&mut small, blocks(0, 2));
    assert_eq!((small.shared.version(), small.jobs.len()), (version, 0));
}

#[test]
fn fiemap_is_asked_at_once_where_forgetting_will_not_do() {
    // Pages were seen, or nobody could tell.
    let mut small = knowing(State::Hole, |_| ());
    small.lock(1, blocks(4, 1));
    small.unlock(1);
    assert_eq!(small.map(State::Mapped, Proof::None), blocks(4, 1));
    // Nothing is proven yet: the first blocks that are written are compared (R6).
    let mut small = knowing(State::Hole, |config| config.proven = false);
    small.lock(1, blocks(4, 1));
    small.unlock_uncached(1);
    assert_eq!(small.map(State::Mapped, Proof::Equal), blocks(4, 1));
    assert_eq!((small.seen(4), small.seen(5)), (Some(State::Mapped), None));
    // What may be opaque after the write as well: those who need it would find it gone again and again.
    let mut small = knowing(State::Opaque, |_| ());
    small.take(A);
    small.lock(1, blocks(4, 1));
    small.take(A);
    small.unlock_uncached(1);
    assert!(small.take(A).is_empty() && small.seen(4) == Some(State::Opaque));
    assert_eq!(small.map(State::Opaque, Proof::None), blocks(4, 1));
    assert_eq!(
        (small.take(A), small.seen(4)),
        (vec![ToWorker::Settled(Tag(1))], Some(State::Opaque))
    );
    // All of the map is to be kept.
    let mut small = Small::direct(|config| config.populate = true);
    small.map(State::Hole, Proof::None);
    small.lock(1, blocks(4, 1));
    small.unlock_uncached(1);
    assert_eq!(small.map(State::Mapped, Proof::None), blocks(4, 1));
    assert!(small.jobs.is_empty() && small.keeper.populating().is_none());
}

#[test]
fn an_answer_from_before_a_forgotten_write_is_not_believed() {
    let mut small = Small::direct(|_| ());
    small.need(0, blocks(0, 1));
    fill(&mut small, blocks(8, 2));
    // Somebody wants to see what was written while the old answer is on its way.
    small.need(2, blocks(8, 1));
    assert_eq!(small.map(State::Hole, Proof::None), ALL);
    assert_eq!(states(&small, 7, 4), [Some(State::Hole), None, None, Some(State::Hole)]);
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(0))]);
    assert_eq!(small.map(State::Mapped, Proof::None).start, blocks(8, 1).start);
    assert_eq!(states(&small, 8, 2), [Some(State::Mapped); 2]);
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(2))]);
    // A lock that is held while a load is asked for elsewhere.
    small.lock(1, blocks(20, 2));
    fill_elsewhere(&mut small);
    small.need(3, blocks(12, 1));
    small.map(State::Mapped, Proof::None);
    assert_eq!(states(&small, 20, 2), [Some(State::Hole); 2], "what was cached stays");
    small.unlock_uncached(1);
    assert_eq!(states(&small, 20, 2), [None; 2]);
}

fn fill_elsewhere(small: &mut Small) {
    small.take(A);
    small.lock(4, blocks(12, 1));
    small.unlock_uncached(4);
    small.take(A);
}

#[test]
fn who_waits_for_a_lock_goes_on_and_who_waits_for_the_map_gets_it() {
    let mut small = knowing(State::Hole, |_| ());
    for tag in [1, 2, 3] {
        small.lock(tag, blocks(4, 1));
    }
    assert_eq!(small.take(A), [ToWorker::Locked(Tag(1))]);
    small.unlock_uncached(1);
    assert_eq!(small.take(A), [ToWorker::Settled(Tag(1)), ToWorker::Locked(Tag(2))]);
    // From now on nobody sees a hole there any more: the locks that wait are the last before the map is loaded.
    small.need(5, blocks(4, 1));
    assert!(small.jobs.is_empty(), "being written");
    small.unlock_uncached(2);
    assert_eq!(small.take(A), [ToWorker::Settled(Tag(2)), ToWorker::Locked(Tag(3))]);
    small.unlock_uncached(3);
    assert_eq!(small.take(A), [ToWorker::Settled(Tag(3))]);
    small.map(State::Mapped, Proof::None);
    assert_eq!(
        (small.take(A), small.seen(4)),
        (vec![ToWorker::Retry(Tag(5))], Some(State::Mapped))
    );
}

#[test]
fn a_break_before_the_unlock_leaves_no_hole_behind_either() {
    let mut small = knowing(State::Hole, |_| ());
    small.lock(1, blocks(4, 1));
    small.break_lease();
    let (park, ..) = small.park_of(A);
    small.unlock_uncached(1);
    assert_eq!((small.seen(4), small.mode()), (None, Mode::Direct));
    assert_eq!(small.take(A), [ToWorker::Settled(Tag(1))]);
    small.say(A, ToKeeper::Parked(park));
    assert_eq!((small.drops, small.mode()), (1, Mode::Filesystem));
    // And behind the break there is no map.
    small.lock(2, blocks(4, 1));
    small.unlock_uncached(2);
    assert!(small.jobs.is_empty() && small.mode() == Mode::Filesystem);
}

#[test]
fn a_hole_cut_into_pieces_stays_below_the_cap() {
    let mut small = knowing(State::Hole, |config| config.max_extents = 100);
    let mut parks = 0;
    for block in (1..BLOCKS - 1).step_by(2) {
        small.lock(1, blocks(block, 1));
        small.unlock_uncached(1);
        for message in small.take(A) {
            if let ToWorker::Park(id, ..) = message {
                parks += 1;
                small.say(A, ToKeeper::Parked(id));
            }
        }
        small.take(A);
        assert!(small.keeper.map().len() <= 101);
    }
    assert!(parks > 3 && small.keeper.snapshot().evictions > 300, "{parks}");
}

/// Given up on is what somebody waits for, not the whole stretch.
#[test]
fn a_load_that_fails_makes_only_the_gap_opaque() {
    let mut small = knowing(State::Hole, |_| ());
    fill(&mut small, blocks(4, 1));
    fill(&mut small, blocks(8, 1));
    small.need(2, blocks(4, 1));
    small.finish(JobDone::Map(Err(5)));
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(2))]);
    assert_eq!((small.seen(4), small.seen(8)), (Some(State::Opaque), None));
}

fn asked(small: &Small) -> Vec<u32> {
    let most = |job: &Job| match job {
        Job::Map { max_extents, .. } => Some(*max_extents),
        _ => None,
    };
    small.jobs.iter().filter_map(|(_, job)| most(job)).collect()
}

#[test]
fn much_is_asked_for_where_nothing_is_cached_and_less_where_something_is() {
    let mut small = Small::direct(|_| ());
    small.need(0, blocks(0, 1));
    assert_eq!(asked(&small), [512]);
    small.map(State::Hole, Proof::None);
    small.take(A);
    fill(&mut small, blocks(4, 1));
    small.need(2, blocks(4, 1));
    assert_eq!(asked(&small), [128]);
}

/// A helper that hangs, and a guest that writes on.
#[test]
fn what_a_query_remembers_has_an_end() {
    let mut small = knowing(State::Hole, |_| ());
    fill(&mut small, blocks(500, 1));
    small.need(2, blocks(500, 1));
    for block in (2..400).chain(502..900) {
        fill(&mut small, blocks(block, 1));
        fill(&mut small, blocks(501, 1));
    }
    assert!(small.keeper.queries.values().all(|query| query.spoilt.len() <= 256));
    small.map(State::Mapped, Proof::None);
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(2))]);
    assert_eq!(states(&small, 499, 4), [Some(State::Hole), Some(State::Mapped), None, None]);
}

proptest! {
    /// Against an oracle of one entry a block: an answer fills what is neither cached nor spoilt, and nothing else changes.
    #[test]
    fn an_answer_fills_gaps_only(
        known in prop::collection::vec((0_u64..60, 1_u64..9, 0_usize..5), 0..12),
        told in prop::collection::vec(0_usize..5, 60),
        spoilt in prop::collection::vec((0_u64..60, 1_u64..9), 0..6),
        (first, count) in (0_u64..60, 0_u64..60),
    ) {
        const STATES: [State; 5] =
            [State::Mapped, State::Hole, State::Unwritten, State::Shared, State::Opaque];
        let extent = |i: u64, place: u64, state: State| {
            let placed = matches!(state, State::Mapped | State::Shared);
            let device = DeviceOffset(if placed { place * BLOCK } else { 0 });
            Extent { range: blocks(i, 1), device, state }
        };
        let mut small = Small::direct(|_| ());
        for (start, len, state) in known {
            let list: Vec<Extent> =
                (start..start + len).map(|i| extent(i, 1000 + i, STATES[state])).collect();
            small.keeper.map.replace(blocks(start, len), &list);
        }
        let covered = blocks(first, count.min(60 - first));
        let answer: Vec<Extent> =
            (0..60).map(|i| extent(i, 5000 + i, STATES[told[i as usize]])).collect();
        let inside: Vec<Extent> =
            answer.iter().copied().filter(|e| covered.contains(&e.range)).collect();
        let spoilt: Vec<FileRange> = spoilt.iter().map(|(at, len)| blocks(*at, *len)).collect();
        let look = |map: &ExtentMap, i: u64| {
            map.lookup(i * BLOCK, &mut Hint::default()).map(|e| e.clip(&blocks(i, 1)))
        };
        let before = small.keeper.map.clone();
        small.keeper.insert_gaps(covered, &inside, &spoilt);
        for i in 0..70 {
            let block = blocks(i, 1);
            let may = covered.contains(&block) && !spoilt.iter().any(|s| s.overlaps(&block));
            let fresh = answer.get(i as usize).copied().filter(|_| may);
            let place = |e: Extent| (e.state, e.range, matches!(e.state, State::Mapped | State::Shared).then_some(e.device));
            prop_assert_eq!(
                look(&small.keeper.map, i).map(place),
                look(&before, i).or(fresh).map(place),
                "block {}", i
            );
        }
    }
}
