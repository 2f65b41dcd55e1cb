// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ranges against sets of bytes, and at the ends of what a `u64` holds.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn bytes(range: FileRange) -> BTreeSet<u64> {
    (range.start..range.end).collect()
}

/// Anything, but mostly near the ends.
fn edgy() -> impl Strategy<Value = u64> {
    prop_oneof![0..300_u64, (u64::MAX - 300)..=u64::MAX, any::<u64>()]
}

proptest! {
    #[test]
    fn ranges_are_sets_of_bytes(a in 0..40_u64, b in 0..40_u64, c in 0..40_u64, d in 0..40_u64) {
        let (x, y) = (FileRange::new(a, b), FileRange::new(c, d));
        let (xs, ys) = (bytes(x), bytes(y));
        let common: BTreeSet<u64> = xs.intersection(&ys).copied().collect();
        prop_assert_eq!(x.len(), xs.len() as u64);
        prop_assert_eq!(x.is_empty(), xs.is_empty());
        prop_assert_eq!(x.overlaps(&y), !common.is_empty());
        prop_assert_eq!(bytes(x.intersect(&y)), common);
        if !y.is_empty() {
            prop_assert_eq!(x.contains(&y), ys.is_subset(&xs));
        }
    }

    #[test]
    fn rounding_keeps_whole_blocks(a in 0..200_u64, b in 0..200_u64, shift in 0..6_u32) {
        let (range, block) = (FileRange::new(a, b), 1_u64 << shift);
        let (out, inside) = (range.round_out(block), range.round_in(block));
        let blocks = |pred: &dyn Fn(u64) -> bool| -> BTreeSet<u64> {
            (0..512 / block).filter(|i| pred(*i)).flat_map(|i| i * block..(i + 1) * block).collect()
        };
        let set = bytes(range);
        let touched = |i: u64| (i * block..(i + 1) * block).any(|byte| set.contains(&byte));
        let covered = |i: u64| (i * block..(i + 1) * block).all(|byte| set.contains(&byte));
        if !range.is_empty() {
            prop_assert_eq!(bytes(out), blocks(&touched));
        }
        prop_assert_eq!(bytes(inside), blocks(&covered));
        prop_assert!(out.aligned(block) && (inside.is_empty() || inside.aligned(block)));
        prop_assert_eq!(range.aligned(block), out == range);
    }

    #[test]
    fn nothing_overflows_at_the_ends(a in edgy(), b in edgy(), c in edgy(), shift in 9..17_u32) {
        let (range, block) = (FileRange::new(a, b), 1_u64 << shift);
        let (out, inside) = (range.round_out(block), range.round_in(block));
        prop_assert!(out.start <= out.end && inside.start <= inside.end);
        prop_assert!(range.contains(&inside) || inside.is_empty());
        prop_assert!(out.start <= range.start);
        let _ = range.intersect(&FileRange::new(c, a)).len();
        prop_assert!(DeviceOffset(a).plus(b).0 >= a);
    }
}
