// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Heap bytes of an extent in a map of a million, the allocator's overhead and the directory counted.

use extentd::engine::extent::ExtentMap;
use extentd::engine::units::FileRange;

use super::Measured;
use super::core::single;
use crate::rig::heap;

const EXTENTS: u64 = 1 << 20;

/// The figures' names, and the extents of an insertion.
const FIGURES: [(&str, u64); 2] =
    [("bytes per extent, insertions of 512", 512), ("bytes per extent, single insertions", 1)];

/// Names of the figures.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    FIGURES.iter().map(|(name, _)| *name)
}

/// Both ways in which a map grows: a hole at a time, or by answers of FIEMAP.
pub(super) fn measure() -> Vec<Measured> {
    FIGURES.iter().map(|(name, batch)| (*name, Ok(bytes(*batch)))).collect()
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn bytes(batch: u64) -> f64 {
    let before = heap::in_use();
    let mut map = ExtentMap::new();
    let mut first = 0;
    while first < EXTENTS {
        let end = EXTENTS.min(first + batch);
        let list: Vec<_> = (first..end).map(single).collect();
        let (Some(start), Some(last)) = (list.first(), list.last()) else { break };
        map.replace(FileRange::new(start.range.start, last.range.end), &list);
        first = end;
    }
    heap::in_use().saturating_sub(before) as f64 / map.len() as f64
}
