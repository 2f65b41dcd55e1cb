// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--populate all` in the keeper, and misses that hold up nobody else.

use super::*;

/// In direct mode with all of the map wanted; the first FIEMAP is under way.
fn populating() -> Small {
    let mut small = Small::direct(|config| config.populate = true);
    assert_eq!(small.keeper.populating(), Some((0, BLOCKS * BLOCK)));
    assert!(small.take(A).is_empty());
    small
}

/// The oldest job, a FIEMAP, speaks about so many blocks only.
fn map_some(small: &mut Small, count: u64) -> FileRange {
    let Some((_, Job::Map { range, .. })) = small.jobs.front().copied() else {
        panic!("{:?}", small.jobs)
    };
    let part = FileRange::new(range.start, range.end.min(range.start + count * BLOCK));
    small.finish(answer(part, State::Mapped, Proof::None));
    part
}

#[test]
fn all_of_the_map_is_loaded_before_anybody_asks() {
    let mut small = populating();
    for first in (0..BLOCKS).step_by(100) {
        assert!(small.reports.is_empty());
        assert_eq!(small.keeper.populating(), Some((first * BLOCK, BLOCKS * BLOCK)));
        assert_eq!(small.jobs.len(), 1, "one at a time");
        assert_eq!(map_some(&mut small, 100).start, first * BLOCK);
    }
    assert_eq!(small.reports, [Report::Populated]);
    assert_eq!((small.keeper.populating(), small.jobs.len()), (None, 0));
    assert_eq!(small.keeper.snapshot().cached as u64, BLOCKS);
}

#[test]
fn requests_that_need_the_map_go_first() {
    let mut small = populating();
    small.need(7, blocks(900, 1));
    map_some(&mut small, 100);
    // What a request waits for, before the rest.
    assert_eq!(map_some(&mut small, 10), blocks(900, 10));
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(7))]);
    while !small.jobs.is_empty() {
        map_some(&mut small, 100);
    }
    assert_eq!(small.keeper.snapshot().cached as u64, BLOCKS);
}

#[test]
fn what_is_being_written_is_loaded_when_that_has_ended() {
    let mut small = populating();
    map_some(&mut small, 100);
    small.lock(1, blocks(500, 10));
    small.lock(2, blocks(520, 10));
    // The FIEMAP under way is not believed there (R9), the next ones do not ask.
    while !small.jobs.is_empty() {
        map_some(&mut small, 100);
    }
    assert!(small.reports.is_empty() && small.keeper.populating().is_some());
    assert_eq!(
        (small.seen(499), small.seen(505), small.seen(515)),
        (Some(State::Mapped), None, Some(State::Mapped))
    );
    small.say(A, ToKeeper::Unlock { tag: Tag(1), wrote_file: false, uncached: false });
    assert_eq!(map_some(&mut small, 100), blocks(500, 10));
    small.unlock(2);
    // The settling itself tells what has become of it.
    assert_eq!(map_some(&mut small, 100), blocks(520, 10));
    assert_eq!((small.reports.as_slice(), small.jobs.len()), (&[Report::Populated][..], 0));
    assert_eq!(small.keeper.snapshot().cached as u64, BLOCKS);
}

#[test]
fn a_break_ends_the_loading_and_its_end_begins_it_anew() {
    let mut small = populating();
    map_some(&mut small, 100);
    small.break_lease();
    small.parked(A);
    assert_eq!((small.keeper.populating(), small.mode()), (None, Mode::Filesystem));
    // An answer from before.
    map_some(&mut small, 100);
    assert!(small.jobs.is_empty() && small.keeper.map().is_empty());
    small.reports.clear();
    small.take(A);
    small.wait(Duration::from_secs(10));
    small.enter();
    while !small.jobs.is_empty() {
        map_some(&mut small, 300);
    }
    assert_eq!(small.reports, [Report::Populated]);
    assert_eq!(small.keeper.snapshot().cached as u64, BLOCKS);
}

#[test]
fn what_is_punched_is_loaded_again() {
    let mut small = populating();
    map_some(&mut small, BLOCKS);
    small.reports.clear();
    small.say(A, ToKeeper::Discard(Tag(3), blocks(100, 50)));
    small.parked(A);
    small.finish(JobDone::Punch(Ok(())));
    let Some((_, Job::Map { range, .. })) = small.jobs.front().copied() else { panic!("no job") };
    assert_eq!(range, blocks(100, 50));
    small.finish(JobDone::Map(Ok(MapAnswer { covered: range, ..MapAnswer::default() })));
    assert_eq!((small.seen(99), small.seen(120)), (Some(State::Mapped), Some(State::Hole)));
    assert!(small.jobs.is_empty() && small.keeper.populating().is_none());
    assert!(small.reports.is_empty(), "said once, or a guest that discards fills the log");
}

#[test]
fn a_map_over_its_cap_is_not_kept_whole() {
    let mut small = Small::direct(|config| (config.populate, config.max_extents) = (true, 300));
    map_some(&mut small, 300);
    assert!(small.keeper.populating().is_some() && small.reports.is_empty());
    map_some(&mut small, 100);
    assert_eq!(small.reports, [Report::Unpinned]);
    assert_eq!(small.keeper.populating(), None);
    assert!(small.jobs.is_empty(), "no more is loaded than was asked for");
    small.parked(A);
    assert!(small.keeper.map().len() <= 300);
}

/// A FIEMAP that takes long holds up those who wait for it, and nothing else.
#[test]
fn a_miss_stalls_only_who_needs_it() {
    let mut small = Small::direct(|_| ());
    small.need(0, blocks(0, 1));
    map_some(&mut small, 100);
    small.take(A);
    // This one hangs in the filesystem from here on.
    small.need(1, blocks(900, 1));
    assert_eq!(small.jobs.len(), 1);
    small.need(2, blocks(50, 10));
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(2))], "what is cached is answered");
    small.lock(3, blocks(10, 1));
    assert_eq!(small.take(A), [ToWorker::Locked(Tag(3))], "locks are granted");
    small.say(A, ToKeeper::Unlock { tag: Tag(3), wrote_file: false, uncached: false });
    assert_eq!(small.take(A), [ToWorker::Settled(Tag(3))], "and given back");
    small.say(A, ToKeeper::Flush(Tag(4)));
    assert!(matches!(small.take(A)[..], [ToWorker::Point(_)]), "flushes begin");
    small.break_lease();
    small.parked(A);
    assert_eq!(small.drops, 1, "a lease break is served");
    assert!(
        small.take(A).contains(&ToWorker::Retry(Tag(1))),
        "and who waits goes through the file"
    );
    assert_eq!(small.jobs.len(), 1, "it still hangs");
}
