// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables for people.

use std::fmt::Write;

use super::check::Check;
use super::map::{Kind, Run};
use super::picture::{picture, totals};
use super::status::Status;
use crate::config::size::human;

/// Names and values, one a line, the values in one column.
fn pairs(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in rows {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<width$}  {value}");
    }
    text
}

/// Columns under their heads; all but the last are numbers and stand right.
fn columns(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|&name| name.to_owned()).collect();
    let width = |column: usize| {
        let cells = rows.iter().chain([&head]).filter_map(|row| row.get(column));
        cells.map(String::len).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for row in [&head].into_iter().chain(rows) {
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = match index + 1 == row.len() {
                true => writeln!(text, "{cell}"),
                false => write!(text, "{cell:>width$}  "),
            };
        }
    }
    text
}

/// `bytes`, and how people say it.
fn size(bytes: u64) -> String {
    if bytes < 1024 { format!("{bytes}") } else { format!("{bytes} ({})", human(bytes)) }
}

fn or_none(text: Option<&String>) -> String {
    text.map_or_else(|| "none".to_owned(), Clone::clone)
}

/// `extentctl check`.
#[must_use]
pub fn check(check: &Check) -> String {
    let alignment = check.alignment;
    let mut rows = vec![
        ("image", check.image.clone()),
        ("size", size(check.size_bytes)),
        ("filesystem", check.filesystem.clone()),
        ("device", or_none(check.device.as_ref())),
        ("lease", check.lease.clone()),
        ("filesystem block", size(alignment.filesystem_block.into())),
        ("device block", size(alignment.device_block.into())),
        ("raw writes", size(alignment.raw_write.into())),
        ("file alignment", size(alignment.file.into())),
        ("memory alignment", size(alignment.memory.into())),
        ("cached pages", check.cached_pages.map_or("unknown".to_owned(), |n| n.to_string())),
        ("verdict", check.verdict.clone()),
        ("reason", check.reason.clone()),
    ];
    rows.extend(check.fix.clone().map(|fix| ("fix", fix)));
    pairs(&rows)
}

/// `extentctl map`.
#[must_use]
pub fn map(image_size: u64, runs: &[Run]) -> String {
    let row = |run: &Run| {
        let physical = run.physical.map_or_else(|| "-".to_owned(), |at| at.to_string());
        let length = run.length.to_string();
        vec![run.logical.to_string(), physical, length, run.state.name().to_owned()]
    };
    let rows: Vec<Vec<String>> = runs.iter().map(row).collect();
    let mut text = columns(&["LOGICAL", "PHYSICAL", "LENGTH", "STATE"], &rows);
    text.push('\n');
    let sums: Vec<Vec<String>> = totals(runs)
        .iter()
        .map(|total| {
            let share = u128::from(total.bytes) * 1000 / u128::from(image_size.max(1));
            vec![
                total.extents.to_string(),
                total.bytes.to_string(),
                human(total.bytes),
                format!("{}.{} %", share / 10, share % 10),
                Kind::name(total.state).to_owned(),
            ]
        })
        .collect();
    text.push_str(&columns(&["EXTENTS", "BYTES", "", "SHARE", "STATE"], &sums));
    text.push('\n');
    text.push_str(&picture(image_size, runs));
    text
}

/// `extentctl status`.
#[must_use]
pub fn status(status: &Status) -> String {
    let Status { extents, requests, segments, flush, .. } = status;
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let mut text = pairs(&[
        ("version", status.version.clone()),
        ("pid", status.pid.to_string()),
        ("uptime", format!("{} s", status.uptime_seconds)),
        ("mode", status.mode.clone()),
        ("reason", status.reason.clone()),
        ("lease", status.lease.clone()),
        ("lease breaks", status.lease_breaks.to_string()),
        ("forced breaks", status.forced_breaks.to_string()),
        ("image", status.image.clone()),
        ("unlinked", yes(status.unlinked)),
        ("device", or_none(status.device.as_ref())),
        ("capacity", size(status.capacity_bytes)),
        ("block size", size(status.block_size.into())),
        ("read-only", yes(status.read_only)),
        ("frontend", status.frontend.clone()),
        ("sessions", status.sessions.to_string()),
        ("extents cached", extents.cached.to_string()),
        ("mapped", size(extents.mapped_bytes)),
        ("FIEMAP calls", extents.fiemap_calls.to_string()),
        ("evictions", extents.evictions.to_string()),
        ("flush requests", flush.requests.to_string()),
        ("device flushes", flush.device_flushes.to_string()),
        ("metadata commits", flush.metadata_commits.to_string()),
        ("flush error", or_none(flush.error.as_ref())),
    ]);
    let head = [
        "READ", "WRITE", "FLUSH", "DISCARD", "ERRORS", "DIRECT", "FILE", "ZERO", "BOUNCED",
        "QUEUES",
    ];
    let mut rows: Vec<Vec<String>> = status
        .queues
        .iter()
        .map(|thread| {
            let queues: Vec<String> = thread.queues.iter().map(u16::to_string).collect();
            counts(&thread.requests, &thread.segments, queues.join(","))
        })
        .collect();
    rows.push(counts(requests, segments, "all so far".to_owned()));
    text.push('\n');
    text.push_str(&columns(&head, &rows));
    text
}

fn counts(
    requests: &super::status::Requests,
    segments: &super::status::Segments,
    name: String,
) -> Vec<String> {
    let numbers = [
        requests.read,
        requests.write,
        requests.flush,
        requests.discard,
        requests.errors,
        segments.direct,
        segments.file,
        segments.zero,
        segments.bounced,
    ];
    numbers.iter().map(u64::to_string).chain([name]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows =
            [vec!["1".to_owned(), "a".to_owned()], vec!["1000000".to_owned(), "b".to_owned()]];
        assert_eq!(columns(&["N", "NAME"], &rows), "      N  NAME\n      1  a\n1000000  b\n");
        assert_eq!(pairs(&[("a", "1".to_owned()), ("bcd", "2".to_owned())]), "a    1\nbcd  2\n");
    }

    #[test]
    fn a_map_ends_with_its_picture() {
        let runs = [
            Run { logical: 0, physical: Some(1 << 20), length: 8192, state: Kind::Mapped },
            Run { logical: 8192, physical: None, length: 4096, state: Kind::Hole },
        ];
        let text = map(12288, &runs);
        assert!(
            text.contains("      0   1048576    8192  mapped\n   8192         -    4096  hole\n"),
            "{text}"
        );
        assert!(text.contains("      1   8192  8 KiB  66.6 %  mapped\n"), "{text}");
        assert!(text.contains("    0  ##.\n"), "{text}");
    }
}
