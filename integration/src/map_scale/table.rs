// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The figures for people.

use std::fmt::Write;

use super::Figures;

/// All of it.
pub(super) fn text(figures: &Figures) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "{:>10} {:>9} {:>10} {:>8} {:>8} {:>9} {:>11} {:>9} {:>7}",
        "extents",
        "B/extent",
        "insert ns",
        "hint ns",
        "next ns",
        "random ns",
        "publish us",
        "evict ms",
        "ranges"
    );
    for row in &figures.memory {
        let _ = writeln!(
            text,
            "{:>10} {:>9.1} {:>10.1} {:>8.1} {:>8.1} {:>9.1} {:>11.1} {:>9.2} {:>7}",
            row.extents,
            row.bytes_per_extent,
            row.insert_ns,
            row.hint_ns,
            row.next_ns,
            row.random_ns,
            row.publish_us,
            row.evict_ms,
            row.evict_ranges
        );
    }
    if let Some(disk) = &figures.disk {
        let _ = writeln!(text);
        for (name, value) in disk.rows() {
            let _ = writeln!(text, "{name:<52} {value}");
        }
    }
    if !figures.fill.is_empty() {
        let _ = writeln!(
            text,
            "\n{:<34} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "4 KiB writes to a sparse image", "kIOPS", "p50 us", "p99 us", "p99.9 us", "FIEMAPs"
        );
    }
    for row in &figures.fill {
        let _ = writeln!(
            text,
            "{:<34} {:>9.1} {:>9.0} {:>9.0} {:>9.0} {:>9}",
            row.name, row.kiops, row.p50_us, row.p99_us, row.p999_us, row.fiemap_calls
        );
    }
    text
}
