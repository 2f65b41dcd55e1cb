// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the disk must say: a flat byte model, and sectors that say themselves what they are.

use std::io;
use std::ops::Range;

use super::random::Random;

/// The bytes a disk must return.
#[derive(Debug, Clone)]
pub struct Model {
    bytes: Vec<u8>,
}

impl Model {
    /// A disk that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Model {
        Model { bytes }
    }

    /// Its size.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let to =
            self.bytes.get_mut(start..start + data.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        to.copy_from_slice(data);
        Ok(())
    }

    /// The guest makes bytes zero.
    pub fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
        let start = usize::try_from(range.start).map_err(io::Error::other)?;
        let end = usize::try_from(range.end).map_err(io::Error::other)?;
        self.bytes.get_mut(start..end).ok_or(io::ErrorKind::UnexpectedEof)?.fill(0);
        Ok(())
    }

    /// The guest discards: whole blocks of `block` bytes read as zeros afterwards, what else there is of the range as before.
    pub fn discard(&mut self, range: Range<u64>, block: u64) -> io::Result<()> {
        let (start, end) = (range.start.next_multiple_of(block), range.end / block * block);
        if start < end { self.zero(start..end) } else { Ok(()) }
    }

    /// Fails, naming the first difference, unless the disk returned what it must.
    pub fn check(&self, offset: u64, got: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let want = self.bytes.get(start..start + got.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        if want == got {
            return Ok(());
        }
        let at = want.iter().zip(got).position(|(a, b)| a != b).unwrap_or(0);
        let wrong = want.chunks(512).zip(got.chunks(512)).filter(|(a, b)| a != b).count();
        let show =
            |bytes: &[u8]| format!("{:02x?}", bytes.iter().skip(at).take(16).collect::<Vec<_>>());
        Err(io::Error::other(format!(
            "read of {} bytes at {offset}: {wrong} sectors differ, the first at byte {}: {} instead of {}",
            got.len(),
            offset + at as u64,
            show(got),
            show(want)
        )))
    }
}

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Bytes of a stamped block.
pub const BLOCK: usize = 4096;

/// A block whose every sector names the block, the sector in it and `version`, and is filled from these.
pub fn stamp(block: u64, version: u64) -> Vec<u8> {
    (0..BLOCK as u64 / SECTOR as u64)
        .flat_map(|sector| stamp_sector(block, sector, version))
        .collect()
}

/// One sector of such a block.
pub fn stamp_sector(block: u64, sector: u64, version: u64) -> Vec<u8> {
    let seed = block.wrapping_mul(0x1_0001) ^ (version << 40) ^ (sector << 32);
    let mut bytes = Vec::with_capacity(SECTOR);
    for word in [block, sector, version, seed] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(Random::new(seed).bytes(SECTOR - bytes.len()));
    bytes
}

/// What a sector says it is: its block, its place in that, its version.
fn named(bytes: &[u8]) -> [u64; 3] {
    [0, 1, 2].map(|n| {
        let mut word = [0; 8];
        word.iter_mut().zip(bytes.iter().skip(8 * n)).for_each(|(to, from)| *to = *from);
        u64::from_le_bytes(word)
    })
}

/// Block, sector in the block and version of a sector that is whole.
pub fn stamp_of(bytes: &[u8]) -> Option<(u64, u64, u64)> {
    let [block, sector, version] = named(bytes);
    (stamp_sector(block, sector, version) == bytes).then_some((block, sector, version))
}

/// The version of each of a block's sectors; an error if one is not a whole sector of that block.
pub fn versions(block: u64, bytes: &[u8]) -> io::Result<Vec<u64>> {
    let sectors = bytes.chunks(SECTOR).enumerate();
    sectors
        .map(|(sector, bytes)| match stamp_of(bytes) {
            Some((b, s, version)) if b == block && s == sector as u64 => Ok(version),
            _ => {
                let [b, s, v] = named(bytes);
                let what = format!(
                    "block {block} sector {sector}: not whole (it names {b}, {s}, version {v})"
                );
                Err(io::Error::new(io::ErrorKind::InvalidData, what))
            }
        })
        .collect()
}
