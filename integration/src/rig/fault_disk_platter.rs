// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a disk with a volatile write cache holds: the bytes it answers with, those that survive for certain, and what lies between.
//!
//! All that ever happens to it is an [`Event`], and chance is used up before one is made: the same events give the same bytes.

use std::collections::VecDeque;
use std::sync::Arc;

use super::model::SECTOR;
use super::random::Random;

/// Bytes the write cache holds; what is older reaches the medium by itself, as on a disk.
const CACHE: usize = 32 << 20;

/// Bytes and their place on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where, in bytes.
    pub offset: u64,
    /// What.
    pub data: Arc<[u8]>,
}

/// Something that changes the disk's content, or what of it is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A write has reached the cache.
    Write(Piece),
    /// A flush: the first so many writes since the disk was made are on the medium.
    Flush {
        /// How many.
        covers: u64,
    },
    /// The power went; of what was not on the medium, this has got there.
    Cut {
        /// In the order of writing.
        survivors: Vec<Piece>,
    },
}

/// What a power cut may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Any of the unflushed writes, or any of their sectors: a cache that writes back as it likes.
    Any,
    /// The newest only: a cache that keeps the order of writes. The only kind that a host without barriers can live with.
    Newest,
}

/// The bytes.
#[derive(Debug, Clone)]
pub struct Platter {
    current: Vec<u8>,
    durable: Vec<u8>,
    unflushed: VecDeque<Piece>,
    /// Writes that have left `unflushed` for the medium, or were lost.
    settled: u64,
    cached: usize,
}

impl Platter {
    /// `size` zero bytes.
    pub fn new(size: usize) -> Platter {
        Platter {
            current: vec![0; size],
            durable: vec![0; size],
            unflushed: VecDeque::new(),
            settled: 0,
            cached: 0,
        }
    }

    /// What a read returns.
    pub fn bytes(&self) -> &[u8] {
        &self.current
    }

    /// What is on the medium.
    pub fn durable(&self) -> &[u8] {
        &self.durable
    }

    /// Writes so far: what a flush that begins now covers.
    pub(super) fn written(&self) -> u64 {
        self.settled + self.unflushed.len() as u64
    }

    /// Puts `pattern` everywhere.
    pub(super) fn fill(&mut self, pattern: &[u8]) {
        for bytes in [&mut self.current, &mut self.durable] {
            bytes.chunks_mut(pattern.len()).for_each(|chunk| {
                chunk.copy_from_slice(pattern.get(..chunk.len()).unwrap_or_default());
            });
        }
    }

    /// Takes `event` in. Its pieces lie within the disk.
    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::Write(piece) => {
                put(&mut self.current, piece);
                self.cached += piece.data.len();
                self.unflushed.push_back(piece.clone());
                while self.cached > CACHE && self.settle() {}
            }
            Event::Flush { covers } => while self.settled < *covers && self.settle() {},
            Event::Cut { survivors } => {
                for lost in std::mem::take(&mut self.unflushed) {
                    self.settled += 1;
                    let range = range(&lost);
                    if let (Some(to), Some(from)) =
                        (self.current.get_mut(range.clone()), self.durable.get(range))
                    {
                        to.copy_from_slice(from);
                    }
                }
                self.cached = 0;
                for piece in survivors {
                    put(&mut self.current, piece);
                    put(&mut self.durable, piece);
                }
            }
        }
    }

    /// The oldest write of the cache goes to the medium; false if there is none.
    fn settle(&mut self) -> bool {
        let Some(piece) = self.unflushed.pop_front() else { return false };
        put(&mut self.durable, &piece);
        self.cached -= piece.data.len();
        self.settled += 1;
        true
    }

    /// Decides what a power cut leaves of the cache and of the writes `in_flight`.
    pub(super) fn survivors<'a>(
        &'a self,
        loss: Loss,
        in_flight: impl Iterator<Item = &'a Piece>,
        random: &mut Random,
    ) -> Vec<Piece> {
        match loss {
            Loss::Any => {
                // From a cut that loses nearly all to one that loses nothing.
                let luck = random.below(9);
                let all = self.unflushed.iter().chain(in_flight);
                all.flat_map(|piece| fate(piece, luck, random)).collect()
            }
            Loss::Newest => {
                let count = random.index(self.unflushed.len() + 1);
                let mut kept: Vec<Piece> = self.unflushed.iter().take(count).cloned().collect();
                if let Some(torn) = self.unflushed.get(count) {
                    let sectors = random.index(torn.data.len() / SECTOR + 1);
                    let data = torn.data.get(..sectors * SECTOR).unwrap_or_default();
                    kept.push(Piece { offset: torn.offset, data: data.into() });
                }
                kept
            }
        }
    }
}

/// A write survives whole, not at all, or in some of its sectors.
fn fate(piece: &Piece, luck: u64, random: &mut Random) -> Vec<Piece> {
    if random.below(8) < luck {
        return vec![piece.clone()];
    }
    if !random.one_in(3) {
        return Vec::new();
    }
    let sectors = piece.data.chunks(SECTOR).zip((piece.offset..).step_by(SECTOR));
    sectors
        .filter(|_| random.one_in(2))
        .map(|(data, offset)| Piece { offset, data: data.into() })
        .collect()
}

fn range(piece: &Piece) -> std::ops::Range<usize> {
    let start = usize::try_from(piece.offset).unwrap_or(usize::MAX);
    start..start.saturating_add(piece.data.len())
}

fn put(bytes: &mut [u8], piece: &Piece) {
    if let Some(to) = bytes.get_mut(range(piece)) {
        to.copy_from_slice(&piece.data);
    }
}
