// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A map on one screen: every cell stands for an equal share of the image.

use std::fmt::Write;

use super::map::{Kind, Run};
use crate::config::size::human;

const COLUMNS: usize = 64;
const ROWS: usize = 16;

/// Bytes, runs and share of each kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Total {
    /// Which kind.
    pub state: Kind,
    /// How many runs.
    pub extents: u64,
    /// How many bytes they have.
    pub bytes: u64,
}

/// Sums up a map, leaving out kinds that do not occur.
#[must_use]
pub fn totals(runs: &[Run]) -> Vec<Total> {
    Kind::ALL
        .into_iter()
        .map(|state| {
            let of_kind = || runs.iter().filter(move |run| run.state == state);
            let bytes = of_kind().map(|run| run.length).sum();
            Total { state, extents: of_kind().count() as u64, bytes }
        })
        .filter(|total| total.extents > 0)
        .collect()
}

fn symbol(kind: Kind) -> char {
    match kind {
        Kind::Mapped => '#',
        Kind::Hole => '.',
        Kind::Unwritten => 'u',
        Kind::Shared => 's',
        Kind::Opaque => '?',
    }
}

/// The picture and its legend. A cell shows what most of its bytes are.
#[must_use]
pub fn picture(size: u64, runs: &[Run]) -> String {
    let mut text = String::new();
    if size == 0 {
        return text;
    }
    let most = (COLUMNS * ROWS) as u64;
    // Whole blocks a cell, so that a small image is not drawn finer than it is.
    let cell = size.div_ceil(most).div_ceil(4096) * 4096;
    let cells = cells(size, cell, runs);
    let width = digits(size);
    for (row, symbols) in cells.chunks(COLUMNS).enumerate() {
        let at = row as u64 * COLUMNS as u64 * cell;
        let line: String = symbols.iter().collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "{at:>width$}  {line}");
    }
    let legend: Vec<String> =
        Kind::ALL.iter().map(|kind| format!("{} {}", symbol(*kind), kind.name())).collect();
    let _ = writeln!(text, "each cell {}: {}", human(cell), legend.join(", "));
    text
}

/// Decimal digits of `number`.
#[must_use]
pub fn digits(number: u64) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

fn cells(size: u64, cell: u64, runs: &[Run]) -> Vec<char> {
    let mut symbols = Vec::new();
    let mut runs = runs.iter().peekable();
    let mut start = 0;
    while start < size {
        let end = size.min(start + cell);
        let mut bytes = [0_u64; Kind::ALL.len()];
        while let Some(run) = runs.peek() {
            let run_end = run.logical + run.length;
            let inside = run_end.min(end).saturating_sub(run.logical.max(start));
            for (kind, sum) in Kind::ALL.iter().zip(&mut bytes) {
                *sum += if *kind == run.state { inside } else { 0 };
            }
            if run_end > end {
                break;
            }
            runs.next();
        }
        // The first of equals: `mapped` before the others.
        let most = Kind::ALL.iter().zip(bytes).rev().max_by_key(|(_, sum)| *sum);
        symbols.push(most.filter(|(_, sum)| *sum > 0).map_or(' ', |(kind, _)| symbol(*kind)));
        start = end;
    }
    symbols
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(logical: u64, length: u64, state: Kind) -> Run {
        Run { logical, physical: None, length, state }
    }

    #[test]
    fn a_cell_shows_what_most_of_it_is() {
        let runs = [
            run(0, 4096, Kind::Mapped),
            run(4096, 1024, Kind::Hole),
            run(5120, 3072, Kind::Unwritten),
            run(8192, 2048, Kind::Shared),
            run(10240, 2048, Kind::Mapped),
            run(12288, 100, Kind::Opaque),
        ];
        assert_eq!(cells(12388, 4096, &runs), ['#', 'u', '#', '?']);
        let text = picture(12388, &runs);
        assert!(text.starts_with("    0  #u#?\neach cell 4 KiB: # mapped, . hole"), "{text}");
    }

    #[test]
    fn a_large_image_fits_on_a_screen() {
        let size = (1 << 40) + 4097;
        let half = 1 << 39;
        let runs = [run(0, half, Kind::Mapped), run(half, size - half, Kind::Hole)];
        let text = picture(size, &runs);
        assert!(text.lines().count() <= ROWS + 1, "{text}");
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        assert_eq!(picture(0, &[]), "");
        assert!(totals(&[]).is_empty());
    }

    #[test]
    fn totals_count_runs_and_bytes() {
        let runs = [run(0, 5, Kind::Hole), run(5, 7, Kind::Mapped), run(12, 2, Kind::Hole)];
        let sums = totals(&runs);
        assert_eq!(
            sums,
            [
                Total { state: Kind::Mapped, extents: 1, bytes: 7 },
                Total { state: Kind::Hole, extents: 2, bytes: 7 },
            ]
        );
    }
}
