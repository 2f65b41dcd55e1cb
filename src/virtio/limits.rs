// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How much of what a process has once one device's frontend may take: descriptors and address space for its guest's memory.

use rustix::process::{Resource, getrlimit};

use super::wire::{HEADER, Message};

/// Memory regions that the crate announces, and the most that a session can have.
pub(crate) const MOST_REGIONS: usize = 509;

/// Fewer would stop frontends that ask for little; it is also what a vhost-user backend has to have at least.
const LEAST_REGIONS: usize = 8;

/// The address space that guests' memory may take, in bytes: a quarter of what four-level page tables give a process, since
/// a session has its last memory and its next one for a moment.
const ADDRESS_SPACE: u64 = 1 << 45;

/// Descriptors of a device without a session, and of the process, per device.
const BASE: u64 = 48;
/// Descriptors of a worker thread, and of a queue: kick, call and error signal, here and in the crate.
const PER_THREAD: u64 = 8;
const PER_QUEUE: u64 = 7;

/// Bytes of a memory region's description, and where in it its size is.
const REGION: usize = 32;
const SIZE: usize = 8;

/// What one session's memory may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryLimits {
    /// Regions, each of which holds a descriptor.
    pub regions: usize,
    /// Bytes, all regions together.
    pub bytes: u64,
}

impl MemoryLimits {
    /// One of `devices` devices' share of this process's.
    #[must_use]
    pub fn share(devices: usize, queues: u16, threads: u16) -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Self::of(files, devices, queues, threads)
    }

    fn of(files: u64, devices: usize, queues: u16, threads: u16) -> Self {
        let devices = u64::try_from(devices).unwrap_or(u64::MAX).max(1);
        let own = BASE + PER_THREAD * u64::from(threads) + PER_QUEUE * u64::from(queues);
        let left = (files / devices).saturating_sub(own);
        let regions = usize::try_from(left).unwrap_or(usize::MAX);
        let bytes = ADDRESS_SPACE / devices;
        Self { regions: regions.clamp(LEAST_REGIONS, MOST_REGIONS), bytes }
    }
}

/// More than that.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum OverLimit {
    /// Regions.
    #[error(
        "more than {0} memory regions: ask for no more than GET_MAX_MEM_SLOTS says, or raise the limit of open files (ulimit -n, LimitNOFILE=)"
    )]
    Regions(usize),
    /// Bytes.
    #[error("more than {0} bytes of guest memory: serve the device from a process of its own")]
    Bytes(u64),
}

/// What a session's memory takes, as far as its messages say. Those that make no sense are left to the crate, which ends the
/// session.
#[derive(Debug)]
pub(crate) struct Account {
    limits: MemoryLimits,
    /// The size of each region.
    regions: Vec<u64>,
}

impl Account {
    pub(crate) fn new(limits: MemoryLimits) -> Self {
        Self { limits, regions: Vec::new() }
    }

    /// How many regions there may be.
    pub(crate) fn most_regions(&self) -> u64 {
        u64::try_from(self.limits.regions).unwrap_or(u64::MAX)
    }

    /// SET_MEM_TABLE: these regions and no others.
    pub(crate) fn replace(&mut self, table: &Message) -> Result<(), OverLimit> {
        let count = usize::try_from(table.u32(HEADER)).unwrap_or(usize::MAX);
        self.regions.clear();
        (0..count).map_while(|index| size(table, index)).try_for_each(|size| self.add_one(size))
    }

    /// ADD_MEM_REG.
    pub(crate) fn add(&mut self, region: &Message) -> Result<(), OverLimit> {
        size(region, 0).map_or(Ok(()), |size| self.add_one(size))
    }

    /// REM_MEM_REG. One that is not there ends the session.
    pub(crate) fn remove(&mut self, region: &Message) {
        let at = size(region, 0).and_then(|size| self.regions.iter().position(|own| *own == size));
        if let Some(at) = at {
            self.regions.swap_remove(at);
        }
    }

    fn add_one(&mut self, size: u64) -> Result<(), OverLimit> {
        self.regions.push(size);
        let bytes = self.regions.iter().fold(0, |sum: u64, size| sum.saturating_add(*size));
        if self.regions.len() > self.limits.regions {
            return Err(OverLimit::Regions(self.limits.regions));
        }
        if bytes > self.limits.bytes {
            return Err(OverLimit::Bytes(self.limits.bytes));
        }
        Ok(())
    }
}

/// The size of a region in a message; all of them have eight bytes before their first.
fn size(message: &Message, index: usize) -> Option<u64> {
    message.payload_u64(8 + index * REGION + SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_its_share_of_descriptors_and_addresses() {
        let alone = MemoryLimits::of(1 << 20, 1, 16, 2);
        assert_eq!(alone, MemoryLimits { regions: MOST_REGIONS, bytes: 1 << 45 });
        // 3000 descriptors for three devices: what one may take leaves the others theirs.
        let three = MemoryLimits::of(3000, 3, 16, 2);
        let own = usize::try_from(BASE + 2 * PER_THREAD + 16 * PER_QUEUE).unwrap();
        assert!(three.regions == MOST_REGIONS && 3 * (three.regions + own) <= 3000);
        let many = MemoryLimits::of(4096, 16, 16, 2);
        assert!(16 * (many.regions + own) <= 4096 && many.regions > 64, "{many:?}");
        assert_eq!(MemoryLimits::of(256, 100, 64, 64).regions, LEAST_REGIONS);
    }
}
