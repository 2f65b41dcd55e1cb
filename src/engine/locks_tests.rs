// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The range lock: an example, and any course of events against a plain list.

use proptest::prelude::*;

use super::*;

fn lock(tag: u32, start: u64, end: u64) -> Lock<()> {
    Lock { owner: (WorkerId(0), Tag(tag)), range: FileRange::new(start, end), purpose: () }
}

#[test]
fn a_later_lock_does_not_overtake_one_it_overlaps_that_still_waits() {
    let mut locks = RangeLocks::default();
    locks.ask(lock(1, 0, 10));
    locks.ask(lock(2, 5, 20));
    locks.ask(lock(3, 15, 30));
    locks.ask(lock(4, 40, 50));
    assert_eq!(locks.grant().map(|l| l.owner.1.0), Some(1));
    // 2 waits for 1, 3 overlaps 2 and waits behind it, 4 is free.
    assert_eq!(locks.grant().map(|l| l.owner.1.0), Some(4));
    assert_eq!(locks.grant(), None);
    assert!(locks.release((WorkerId(0), Tag(1))).is_some());
    assert_eq!(locks.grant().map(|l| l.owner.1.0), Some(2));
    assert_eq!(locks.grant(), None);
    assert!(locks.release((WorkerId(0), Tag(2))).is_some());
    assert_eq!(locks.grant().map(|l| l.owner.1.0), Some(3));
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Ask(u64, u64),
    /// Of those that are held, by their place in the order of asking.
    Release(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (0..40_u64, 1..12_u64).prop_map(|(start, len)| Event::Ask(start, len)),
        (0..8_usize).prop_map(Event::Release),
    ]
}

proptest! {
    /// Held is what overlaps nothing that was asked for earlier and is still there: then no two that are held overlap,
    /// nobody waits for nothing, and nobody is overtaken.
    #[test]
    fn held_is_what_overlaps_nothing_older(events in prop::collection::vec(event(), 1..80)) {
        let mut locks = RangeLocks::default();
        let mut asked: Vec<Lock<()>> = Vec::new();
        for (event, tag) in events.into_iter().zip(0..) {
            let held: Vec<Owner> = locks.held().map(|lock| lock.owner).collect();
            match event {
                Event::Ask(start, len) => {
                    let lock = lock(tag, start, start + len);
                    asked.push(lock);
                    locks.ask(lock);
                }
                Event::Release(nth) => {
                    let owner = asked.iter().map(|lock| lock.owner).filter(|o| held.contains(o)).nth(nth);
                    let Some(owner) = owner else { continue };
                    prop_assert_eq!(locks.find(owner).map(|lock| lock.owner), Some(owner));
                    prop_assert_eq!(locks.release(owner).map(|lock| lock.owner), Some(owner));
                    prop_assert_eq!(locks.release(owner), None);
                    asked.retain(|lock| lock.owner != owner);
                }
            }
            while let Some(lock) = locks.grant() {
                prop_assert!(!held.contains(&lock.owner), "granted twice");
            }
            let free = |(i, lock): (usize, &Lock<()>)| {
                let older = asked.iter().take(i).any(|older| older.range.overlaps(&lock.range));
                (!older).then_some(lock.owner)
            };
            let expected: std::collections::BTreeSet<Owner> =
                asked.iter().enumerate().filter_map(free).collect();
            prop_assert_eq!(locks.held().map(|lock| lock.owner).collect::<std::collections::BTreeSet<_>>(), expected);
        }
    }
}
