// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the manager does not take for granted: the end of a file, and the end of a punch.

use super::*;

#[test]
fn the_block_that_the_file_ends_in_is_never_raw() {
    for state in [State::Mapped, State::Shared] {
        let mut small = Small::direct(|config| {
            config.geometry.file_size = 9 * BLOCK + 512;
            config.window = FileRange::new(0, config.geometry.file_size);
        });
        small.need(0, blocks(0, 1));
        // FIEMAP says of the last block what it says of any.
        assert_eq!(small.map(state, Proof::None), blocks(0, 10));
        assert_eq!((small.seen(8), small.seen(9)), (Some(state), Some(State::Opaque)));
    }
}

/// Flushes; whether the image was synced for it.
fn flush(small: &mut Small, tag: u32) -> bool {
    small.say(A, ToKeeper::Flush(Tag(tag)));
    let point = small.take(A).into_iter().find_map(|message| match message {
        ToWorker::Point(id) => Some(id),
        _ => None,
    });
    let id = point.expect("no flush point");
    small.say(A, ToKeeper::PointReached { id, raw: None, file: false });
    let mut sent = small.take(A);
    let synced = sent.iter().any(|m| matches!(m, ToWorker::Sync { image: true, .. }));
    if synced {
        small.say(A, ToKeeper::Synced(0));
        sent = small.take(A);
    }
    assert_eq!(sent, [ToWorker::Flushed(Tag(tag), 0)]);
    synced
}

/// R14: what a flush makes durable while a punch runs is not the punch.
#[test]
fn a_flush_behind_a_punch_commits_it_whatever_was_flushed_beside_it() {
    let mut small = Small::direct(|_| ());
    assert!(flush(&mut small, 1), "a killed predecessor may have left anything");
    assert!(!flush(&mut small, 2));
    small.say(A, ToKeeper::Discard(Tag(0), blocks(4, 2)));
    small.parked(A);
    assert!(matches!(small.jobs.front(), Some((_, Job::Punch { .. }))));
    assert!(flush(&mut small, 3), "it may have begun");
    small.finish(JobDone::Punch(Ok(())));
    assert!(small.take(A).contains(&ToWorker::Discarded(Tag(0), 0)));
    assert!(flush(&mut small, 4), "and it has ended since");
    assert!(!flush(&mut small, 5));
}
