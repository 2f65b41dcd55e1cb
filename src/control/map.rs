// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `map` answers, piece by piece, and putting the pieces together.

use serde::{Deserialize, Serialize};

use crate::engine::Geometry;
use crate::engine::extent::{Extent, State};
use crate::engine::keeper::Start;
use crate::engine::message::{Job, JobDone, MapAnswer};
use crate::engine::units::{DeviceOffset, FileRange};
use crate::image::Image;

/// Extents in a piece at most: a few milliseconds of the helper's time, a hundred KiB of reply.
const PIECE_EXTENTS: u32 = 1024;

/// What a run of bytes is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Raw reads and writes.
    Mapped,
    /// No blocks.
    Hole,
    /// Allocated, never written.
    Unwritten,
    /// Blocks shared with another file: raw reads only.
    Shared,
    /// Everything else: through the file.
    Opaque,
}

impl Kind {
    /// All, in the order they are shown in.
    pub const ALL: [Self; 5] =
        [Self::Mapped, Self::Hole, Self::Unwritten, Self::Shared, Self::Opaque];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mapped => "mapped",
            Self::Hole => "hole",
            Self::Unwritten => "unwritten",
            Self::Shared => "shared",
            Self::Opaque => "opaque",
        }
    }
}

impl From<State> for Kind {
    fn from(state: State) -> Self {
        match state {
            State::Mapped => Self::Mapped,
            State::Hole => Self::Hole,
            State::Unwritten => Self::Unwritten,
            State::Shared => Self::Shared,
            State::Opaque => Self::Opaque,
        }
    }
}

/// A run of bytes in one state; all numbers in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Where in the image file.
    pub logical: u64,
    /// Where on the device, if it has a place known there.
    pub physical: Option<u64>,
    /// How long.
    pub length: u64,
    /// What it is.
    pub state: Kind,
}

/// A piece of a map.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Piece {
    /// Size of the image file in bytes.
    pub size: u64,
    /// The runs, in order and without gaps.
    pub extents: Vec<Run>,
    /// Where the next piece begins; `None` after the last.
    pub next: Option<u64>,
}

/// Why there is no piece. One line.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum MapError {
    #[error("there is no byte {start} in the image's {size}")]
    PastEnd { start: u64, size: u64 },
    #[error("the filesystem does not say where byte {start} and what follows lies: {source}")]
    Fiemap { start: u64, source: std::io::Error },
}

/// Finds the piece at byte `start`, by the same way as the daemon's own. May block.
///
/// # Errors
/// The filesystem has no FIEMAP, or `start` is past the end.
pub fn load(image: &Image, start: u64) -> Result<Piece, MapError> {
    let geometry = image.geometry();
    let size = geometry.file_size;
    let job = job(geometry, start).ok_or(MapError::PastEnd { start, size })?;
    if image.start() == Start::Identity {
        return Ok(identity(size));
    }
    match image.run(&job) {
        JobDone::Map(Ok(answer)) if !answer.covered.is_empty() => {
            Ok(piece(geometry, start, &answer))
        }
        JobDone::Map(Err(errno)) => {
            Err(MapError::Fiemap { start, source: std::io::Error::from_raw_os_error(errno) })
        }
        // An answer about nothing would be asked for again forever.
        _ => Err(MapError::Fiemap { start, source: std::io::ErrorKind::InvalidData.into() }),
    }
}

/// The job that finds the piece at `start`; `None` past the image's end.
fn job(geometry: &Geometry, start: u64) -> Option<Job> {
    let block = geometry.fs_block.into();
    let range = FileRange::new(start, geometry.file_size).round_out(block);
    (start < geometry.file_size).then_some(Job::Map { range, max_extents: PIECE_EXTENTS })
}

/// What [`job`]'s answer says, as a piece.
fn piece(geometry: &Geometry, start: u64, answer: &MapAnswer) -> Piece {
    let size = geometry.file_size;
    let covered = answer.covered.intersect(&FileRange::new(start, size));
    let mut extents = Vec::new();
    let mut at = covered.start;
    let hole = |from, to| Extent {
        range: FileRange::new(from, to),
        device: DeviceOffset(0),
        state: State::Hole,
    };
    for extent in answer.extents.iter().map(|extent| extent.clip(&covered)) {
        if extent.range.is_empty() {
            continue;
        }
        push(&mut extents, hole(at, extent.range.start));
        push(&mut extents, extent);
        at = extent.range.end;
    }
    push(&mut extents, hole(at, covered.end));
    Piece { size, extents, next: (covered.end < size).then_some(covered.end) }
}

/// The map of a block device: one run, where it is (R6a).
fn identity(size: u64) -> Piece {
    let all = Run { logical: 0, physical: Some(0), length: size, state: Kind::Mapped };
    Piece { size, extents: vec![all], next: None }
}

fn push(runs: &mut Vec<Run>, extent: Extent) {
    if extent.range.is_empty() {
        return;
    }
    let placed = matches!(extent.state, State::Mapped | State::Shared);
    append(
        runs,
        Run {
            logical: extent.range.start,
            physical: placed.then_some(extent.device.0),
            length: extent.range.len(),
            state: extent.state.into(),
        },
    );
}

/// Adds a run, or makes the last one longer if it goes on there.
pub fn append(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut()
        && last.state == run.state
        && last.logical + last.length == run.logical
        && last.physical.map(|at| at.saturating_add(last.length)) == run.physical
    {
        last.length += run.length;
    } else {
        runs.push(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(file_size: u64) -> Geometry {
        Geometry {
            file_size,
            fs_block: 4096,
            file_align: 512,
            dev_block: 512,
            write_block: 512,
            mem_align: 512,
            bounce_bytes: 4096,
            bounce_slots: 1,
            ops: 1,
            zeroes_bytes: 4 << 20,
            punch_bytes: 256 << 20,
            lease_fresh: None,
            raw: crate::engine::RawLimits::default(),
        }
    }

    fn mapped(start: u64, end: u64, device: u64) -> Extent {
        let range = FileRange::new(start, end);
        Extent { range, device: DeviceOffset(device), state: State::Mapped }
    }

    #[test]
    fn gaps_become_holes_and_neighbours_one() {
        let answer = MapAnswer {
            covered: FileRange::new(0, 40960),
            extents: vec![mapped(4096, 8192, 1 << 20), mapped(8192, 12288, (1 << 20) + 4096)],
            ..MapAnswer::default()
        };
        let piece = piece(&geometry(50000), 0, &answer);
        let hole = |logical, length| Run { logical, physical: None, length, state: Kind::Hole };
        let run = Run { logical: 4096, physical: Some(1 << 20), length: 8192, state: Kind::Mapped };
        assert_eq!(piece.extents, [hole(0, 4096), run, hole(12288, 40960 - 12288)]);
        assert_eq!(piece.next, Some(40960));
    }

    #[test]
    fn the_last_piece_ends_at_the_files_size() {
        let geometry = geometry(10000);
        assert_eq!(
            job(&geometry, 4096),
            Some(Job::Map { range: FileRange::new(4096, 12288), max_extents: PIECE_EXTENTS })
        );
        assert_eq!(job(&geometry, 10000), None);
        let answer = MapAnswer {
            covered: FileRange::new(4096, 12288),
            extents: vec![mapped(0, 12288, 8192)],
            ..MapAnswer::default()
        };
        let last = piece(&geometry, 4096, &answer);
        let run = Run { logical: 4096, physical: Some(12288), length: 5904, state: Kind::Mapped };
        assert_eq!((last.extents, last.next), (vec![run], None));
    }
}
