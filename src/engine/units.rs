// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Offsets and ranges. Everything inside extentd counts bytes; 512-byte sectors exist only at
//! the virtio boundary ([`SECTOR`]).

use std::fmt;

/// Bytes in a virtio-blk sector (virtio 1.3, 5.2.4: always 512, whatever the block size).
pub const SECTOR: u64 = 512;

/// A byte offset on the block device below the filesystem.
///
/// Deliberately another type than a file offset: mixing the two up destroys a host filesystem.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DeviceOffset(pub u64);

impl DeviceOffset {
    /// The offset `bytes` further on; saturates, and a saturated offset fails at the device.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

/// A half-open range of byte offsets in the image file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FileRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte; never below `start`.
    pub end: u64,
}

impl FileRange {
    /// The range `start..end`; an inverted range is empty at `start`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end: if end < start { start } else { end } }
    }

    /// Everything.
    pub const ALL: Self = Self { start: 0, end: u64::MAX };

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether no byte is in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether a byte is in both.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// Whether byte `at` is in it.
    #[must_use]
    pub const fn has(&self, at: u64) -> bool {
        self.start <= at && at < self.end
    }

    /// Whether every byte of `other` is in it.
    #[must_use]
    pub const fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The bytes in both; empty when there are none.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The smallest range of whole `block`-byte blocks that covers it. `block` is a power of two.
    #[must_use]
    pub const fn round_out(&self, block: u64) -> Self {
        let mask = block - 1;
        Self { start: self.start & !mask, end: self.end.saturating_add(mask) & !mask }
    }

    /// The largest range of whole `block`-byte blocks inside it; may be empty.
    #[must_use]
    pub const fn round_in(&self, block: u64) -> Self {
        let mask = block - 1;
        Self::new(self.start.saturating_add(mask) & !mask, self.end & !mask)
    }

    /// Whether both ends are multiples of `block`, a power of two.
    #[must_use]
    pub const fn aligned(&self, block: u64) -> bool {
        (self.start | self.end) & (block - 1) == 0
    }
}

impl fmt::Debug for FileRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

#[cfg(test)]
#[path = "units_tests.rs"]
mod tests;
