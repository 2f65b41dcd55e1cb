// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of requests in flight against a map.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const ROOM: u32 = 6;

proptest! {
    #[test]
    fn each_request_has_a_tag_of_its_own_and_leaves_once(
        events in prop::collection::vec((any::<bool>(), 0..ROOM + 2), 1..100)
    ) {
        let mut table = Requests::new(ROOM);
        let mut inside: BTreeMap<u32, Pending> = BTreeMap::new();
        for ((enter, n), moment) in events.into_iter().zip(0..) {
            let pending = Pending {
                queue: usize::try_from(n % 3).unwrap(),
                head: u16::try_from(n).unwrap(),
                status: GuestAddress(moment),
                written: n,
                since: Duration::from_nanos(moment * 7919 % 50),
            };
            if enter {
                let tag = table.enter(pending);
                prop_assert_eq!(tag.is_some(), inside.len() < ROOM as usize);
                if let Some(Tag(tag)) = tag {
                    prop_assert!(tag < ROOM && inside.insert(tag, pending).is_none());
                }
            } else {
                prop_assert_eq!(table.leave(Tag(n)), inside.remove(&n));
            }
            for queue in [None, Some(0), Some(1), Some(2)] {
                let of_queue = |p: &&Pending| queue.is_none_or(|queue| p.queue == queue);
                let oldest = inside.values().filter(of_queue).map(|p| p.since).min();
                prop_assert_eq!(table.oldest(queue), oldest);
            }
        }
    }
}
