// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest was promised: for every sector of its disk the versions it has written, and how firmly each of them stands.

use std::fmt;
use std::ops::Range;

use crate::rig::model::{BLOCK, SECTOR, stamp_of, stamp_sector};

/// What the disk is filled with before anything else, to be recognised where no file has written.
pub(super) const POISON: &[u8; 32] = b"<poison: not written by a file!>";

/// Sectors in a stamped block.
pub(super) const BLOCK_SECTORS: u64 = (BLOCK / SECTOR) as u64;

/// What an operation leaves in its sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// The sector's stamp with the operation's version.
    Stamp,
    /// Zeros.
    Zero,
    /// Zeros in the whole blocks of the range; at its ends zeros, or what was there before.
    Discarded,
}

/// How much of what was written has to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Floor {
    /// The host lived on: all that was completed.
    Completed,
    /// The host lost its power: what was made durable.
    Durable,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    version: u64,
    content: Content,
    /// The how many-th completion it was; none yet.
    done: Option<u64>,
    /// It was promised to be durable by its completion alone.
    durable: bool,
}

/// A sector that is not what it may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// Which, from the image's start.
    pub(super) sector: u64,
    seen: Seen,
    /// The versions that would have been right, oldest first.
    allowed: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Version(u64),
    Zero,
    Poison,
    /// A whole sector of another place.
    Elsewhere(u64, u64),
    Foreign(Vec<u8>),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}: ", self.sector)?;
        match &self.seen {
            Seen::Version(version) => write!(f, "version {version}")?,
            Seen::Zero => write!(f, "zeros")?,
            Seen::Poison => write!(f, "what was on the disk before any file")?,
            Seen::Elsewhere(sector, version) => {
                write!(f, "version {version} of sector {sector}")?;
            }
            Seen::Foreign(bytes) => write!(f, "no data of this image: {bytes:02x?}")?,
        }
        write!(f, " instead of one of the versions {:?}", self.allowed)
    }
}

/// The promises of one image.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    sectors: Vec<Vec<Entry>>,
    busy: Vec<bool>,
    /// Counts on from image to image, so that no version ever comes back.
    version: u64,
    done: u64,
    flushed: u64,
}

/// Indices of the sectors `range`.
fn indices(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap_or(usize::MAX)
        ..usize::try_from(range.end).unwrap_or(usize::MAX)
}

impl Ledger {
    /// A new image of `sectors` sectors, all of them zero.
    pub(super) fn renew(&mut self, sectors: u64) {
        let sectors = indices(&(0..sectors)).end;
        let zero = Entry { version: 0, content: Content::Zero, done: Some(0), durable: true };
        self.sectors = vec![vec![zero]; sectors];
        self.busy = vec![false; sectors];
    }

    /// The image's sectors.
    pub(super) fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// Operations completed so far.
    pub(super) fn done(&self) -> u64 {
        self.done
    }

    /// Takes `range` for one request, unless another has some of it.
    pub(super) fn claim(&mut self, range: &Range<u64>) -> bool {
        let Some(busy) = self.busy.get_mut(indices(range)) else { return false };
        let free = !busy.contains(&true);
        if free {
            busy.fill(true);
        }
        free
    }

    /// Gives `range` back.
    pub(super) fn release(&mut self, range: &Range<u64>) {
        if let Some(busy) = self.busy.get_mut(indices(range)) {
            busy.fill(false);
        }
    }

    /// An operation on `range` is about to be sent; its version.
    pub(super) fn issue(&mut self, range: &Range<u64>, content: Content) -> u64 {
        self.version += 1;
        let whole =
            range.start.next_multiple_of(BLOCK_SECTORS)..range.end / BLOCK_SECTORS * BLOCK_SECTORS;
        let sectors = self.sectors.get_mut(indices(range)).unwrap_or_default();
        for (number, sector) in (range.start..).zip(sectors) {
            let content = match content {
                Content::Discarded if whole.contains(&number) => Content::Zero,
                content => content,
            };
            sector.push(Entry { version: self.version, content, done: None, durable: false });
        }
        self.version
    }

    /// The bytes of `version` in `range`.
    pub(super) fn data(range: &Range<u64>, version: u64) -> Vec<u8> {
        let stamp = |s| stamp_sector(s / BLOCK_SECTORS, s % BLOCK_SECTORS, version);
        range.clone().flat_map(stamp).collect()
    }

    /// The newest operation on `range` has completed, and was durable by that if `durable`.
    pub(super) fn complete(&mut self, range: &Range<u64>, durable: bool) {
        self.done += 1;
        for sector in self.sectors.get_mut(indices(range)).unwrap_or_default() {
            if let Some(entry) = sector.last_mut() {
                entry.done = Some(self.done);
                entry.durable = durable;
            }
        }
    }

    /// A flush that completed, and was sent when `mark` operations had.
    pub(super) fn flushed(&mut self, mark: u64) {
        self.flushed = self.flushed.max(mark);
    }

    /// Where in its history a sector has to be at least.
    fn floor(&self, history: &[Entry], floor: Floor) -> usize {
        let stands = |entry: &Entry| {
            let promised = match (floor, entry.done) {
                (_, None) => false,
                (Floor::Completed, Some(_)) => true,
                (Floor::Durable, Some(done)) => entry.durable || done <= self.flushed,
            };
            promised && entry.content != Content::Discarded
        };
        history.iter().rposition(stands).unwrap_or(0)
    }

    /// The place in its history of what a sector holds.
    fn judge(&self, sector: u64, bytes: &[u8], floor: Floor) -> Result<usize, Fault> {
        let history = self.sectors.get(indices(&(sector..sector + 1)).start);
        let history = history.map(Vec::as_slice).unwrap_or_default();
        let first = self.floor(history, floor);
        let seen = see(sector, bytes);
        let fits = |entry: &Entry| match seen {
            Seen::Version(version) => entry.content == Content::Stamp && entry.version == version,
            Seen::Zero => entry.content != Content::Stamp,
            _ => false,
        };
        let allowed = history.get(first..).unwrap_or_default();
        match allowed.iter().rposition(fits) {
            Some(at) => Ok(first + at),
            None => {
                let allowed = allowed.iter().map(|entry| entry.version).collect();
                Err(Fault { sector, seen, allowed })
            }
        }
    }

    /// The sectors from `start` on that `bytes` shows to be wrong.
    pub(super) fn faults(&self, start: u64, bytes: &[u8], floor: Floor) -> Vec<Fault> {
        let sectors = (start..).zip(bytes.chunks(SECTOR));
        sectors.filter_map(|(sector, bytes)| self.judge(sector, bytes, floor).err()).collect()
    }

    /// Nothing is in flight any more, and the whole image holds `bytes`: what is seen is what is written. What the power's
    /// return shows is on the medium; what a new daemon shows, a flush has yet to put there.
    pub(super) fn settle(&mut self, bytes: &[u8], floor: Floor) -> Vec<Fault> {
        let mut faults = Vec::new();
        self.busy.fill(false);
        // To see it completes what nobody answered, after every flush so far.
        self.done += 1;
        for (sector, bytes) in (0..self.len()).zip(bytes.chunks(SECTOR)) {
            let at = match self.judge(sector, bytes, floor) {
                Ok(at) => at,
                Err(fault) => {
                    faults.push(fault);
                    continue;
                }
            };
            let done = self.done;
            let index = indices(&(sector..sector + 1)).start;
            let Some(history) = self.sectors.get_mut(index) else { continue };
            history.truncate(at + 1);
            if let Some(entry) = history.last_mut() {
                entry.done.get_or_insert(done);
                if floor == Floor::Durable {
                    entry.durable = true;
                    // Zeros that were seen are zeros, whoever made them.
                    if entry.content == Content::Discarded && bytes.iter().all(|b| *b == 0) {
                        entry.content = Content::Zero;
                    }
                    let only = *entry;
                    *history = vec![only];
                }
            }
        }
        faults
    }
}

fn see(sector: u64, bytes: &[u8]) -> Seen {
    match stamp_of(bytes) {
        Some((block, within, version)) if block * BLOCK_SECTORS + within == sector => {
            Seen::Version(version)
        }
        Some((block, within, version)) => {
            Seen::Elsewhere(block.wrapping_mul(BLOCK_SECTORS).wrapping_add(within), version)
        }
        None if bytes.iter().all(|byte| *byte == 0) => Seen::Zero,
        None if bytes.chunks(POISON.len()).any(|chunk| chunk == POISON) => Seen::Poison,
        None => Seen::Foreign(bytes.iter().take(32).copied().collect()),
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
