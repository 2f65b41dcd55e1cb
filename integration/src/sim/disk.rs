// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The disk: one stamp per 512-byte sector, behind a volatile write cache.
//!
//! A write is seen by every later read at once; it survives a power cut for certain only when it
//! was acknowledged before a flush. Until then any of the sector's versions may be what is left.

use std::collections::BTreeMap;

use super::rng::Rng;

/// What stands for a sector's 512 bytes; [`ZERO`] is 512 zero bytes.
pub(super) type Stamp = u64;

/// A sector of zeros.
pub(super) const ZERO: Stamp = 0;

/// The writer of a version nobody has to acknowledge any more.
const ACKNOWLEDGED: u64 = 0;

#[derive(Clone, Copy, Hash, Debug)]
struct Version {
    stamp: Stamp,
    writer: u64,
}

#[derive(Hash, Debug)]
pub(super) struct Disk {
    now: Vec<Stamp>,
    durable: Vec<Stamp>,
    pending: BTreeMap<usize, Vec<Version>>,
}

impl Disk {
    /// A disk full of what was on it before: `fill` by sector number.
    pub(super) fn new(sectors: usize, fill: impl Fn(usize) -> Stamp) -> Self {
        let now: Vec<Stamp> = (0..sectors).map(fill).collect();
        Self { durable: now.clone(), now, pending: BTreeMap::new() }
    }

    pub(super) fn read(&self, at: usize) -> Stamp {
        self.now[at]
    }

    /// Writes one sector for operation `writer` (above 0), to be acknowledged later.
    pub(super) fn write(&mut self, at: usize, stamp: Stamp, writer: u64) {
        self.now[at] = stamp;
        self.pending.entry(at).or_default().push(Version { stamp, writer });
    }

    /// Writes one sector and makes it durable at once; for others' data and for setting up.
    pub(super) fn write_durable(&mut self, at: usize, stamp: Stamp) {
        self.pending.remove(&at);
        self.now[at] = stamp;
        self.durable[at] = stamp;
    }

    /// Writes one sector for the host's kernel, which needs no acknowledgement.
    pub(super) fn write_back(&mut self, at: usize, stamp: Stamp) {
        self.write(at, stamp, ACKNOWLEDGED);
    }

    /// Operation `writer` has been reported complete: the next flush covers it.
    pub(super) fn acknowledge(&mut self, writer: u64) {
        for version in self.pending.values_mut().flatten() {
            if version.writer == writer {
                version.writer = ACKNOWLEDGED;
            }
        }
    }

    /// Makes everything acknowledged durable, and nothing else.
    pub(super) fn flush(&mut self) {
        let durable = &mut self.durable;
        self.pending.retain(|at, versions| {
            if let Some(last) = versions.iter().rposition(|v| v.writer == ACKNOWLEDGED) {
                durable[*at] = versions[last].stamp;
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// What the sector may hold after a power cut now.
    pub(super) fn leavings(&self, at: usize) -> impl Iterator<Item = Stamp> + '_ {
        let pending = self.pending.get(&at).into_iter().flatten().map(|v| v.stamp);
        std::iter::once(self.durable[at]).chain(pending)
    }

    /// The power fails: of each unflushed sector some version is left.
    pub(super) fn cut(&mut self, rng: &mut Rng) {
        for (at, versions) in std::mem::take(&mut self.pending) {
            let choice = rng.index(versions.len() + 1);
            let left = versions.get(choice).map_or(self.durable[at], |v| v.stamp);
            self.now[at] = left;
            self.durable[at] = left;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it_and_no_more() {
        for seed in 0..100 {
            let mut disk = Disk::new(4, |_| 9);
            disk.write(0, 1, 7);
            disk.write(1, 2, 8);
            disk.acknowledge(7);
            disk.flush();
            disk.write(0, 3, 9);
            assert_eq!((disk.read(0), disk.read(1)), (3, 2));
            disk.cut(&mut Rng::new(seed));
            assert!([1, 3].contains(&disk.read(0)));
            assert!([9, 2].contains(&disk.read(1)));
            assert_eq!(disk.read(2), 9);
        }
    }

    #[test]
    fn an_unacknowledged_write_under_an_acknowledged_one_is_settled_with_it() {
        let mut disk = Disk::new(1, |_| 9);
        disk.write(0, 1, 7);
        disk.write_back(0, 2);
        disk.flush();
        disk.cut(&mut Rng::new(1));
        assert_eq!(disk.read(0), 2);
    }
}
