// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether the parts of a virtqueue lie over each other: what the device writes would then be what it reads, and a ring that
//! has its used index for its available index feeds itself for ever, at the cost of a CPU and without the guest's.

use rustix::fs::fstat;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::Memory;

/// Where a virtqueue's parts are (virtio 1.3, 2.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    table: u64,
    available: u64,
    used: u64,
    size: u16,
}

/// Bytes of a file, or of the guest's address space for memory without one.
#[derive(PartialEq, Eq, Debug)]
struct Run {
    file: Option<(u64, u64)>,
    start: u64,
    end: u64,
}

impl Run {
    fn meets(&self, other: &Self) -> bool {
        self.file == other.file && self.start < other.end && other.start < self.end
    }
}

impl Layout {
    pub(crate) fn of(queue: &virtio_queue::Queue) -> Self {
        Self {
            table: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            size: queue.size(),
        }
    }

    /// Whether a byte belongs to two of the parts. The fields for event indices, which a driver without them may leave out, do
    /// not count. Different addresses may be the same memory, so its files are compared.
    pub(crate) fn overlaps(&self, memory: &Memory) -> bool {
        let size = u64::from(self.size);
        let table = runs(memory, self.table, 16 * size);
        let available = runs(memory, self.available, 4 + 2 * size);
        let used = runs(memory, self.used, 4 + 8 * size);
        meet(&table, &available) || meet(&table, &used) || meet(&available, &used)
    }
}

fn meet(one: &[Run], other: &[Run]) -> bool {
    one.iter().any(|a| other.iter().any(|b| a.meets(b)))
}

/// What `bytes` bytes of guest memory from `start` on are. What is not memory is found out when it is used.
fn runs(memory: &Memory, start: u64, bytes: u64) -> Vec<Run> {
    let (mut at, mut left) = (start, bytes);
    let mut runs = Vec::new();
    while left > 0
        && let Some(region) = memory.find_region(GuestAddress(at))
        && let Some(offset) = at.checked_sub(region.start_addr().0)
        && let Some(there) = region.len().checked_sub(offset).filter(|there| *there > 0)
    {
        let len = left.min(there);
        let file = region.file_offset().and_then(|file| {
            let stat = fstat(file.file()).ok()?;
            Some(((stat.st_dev, stat.st_ino), file.start()))
        });
        let (file, start) = match file {
            Some((file, base)) => (Some(file), base.saturating_add(offset)),
            None => (None, at),
        };
        runs.push(Run { file, start, end: start.saturating_add(len) });
        left -= len;
        at = at.saturating_add(len);
    }
    runs
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::FileOffset;

    use super::*;

    fn layout(table: u64, available: u64, used: u64) -> Layout {
        Layout { table, available, used, size: 8 }
    }

    #[test]
    fn parts_that_touch_are_fine_and_parts_that_share_a_byte_are_not() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        for (parts, expected) in [
            (layout(0, 128, 160), false),
            (layout(0, 128, 148), false),
            (layout(1024, 1000, 932), false),
            (layout(0, 128, 128), true),
            (layout(0, 126, 4096), true),
            (layout(0, 4096, 127), true),
            (layout(0, 4096, 4115), true),
            (layout(4096, 4096, 4096), true),
        ] {
            assert_eq!(parts.overlaps(&memory), expected, "{parts:?}");
        }
    }

    #[test]
    fn the_same_memory_at_two_addresses_is_the_same_memory() {
        let file = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 0x10000).unwrap();
        let region = |address, start| {
            let file = FileOffset::new(file.try_clone().unwrap().into(), start);
            (GuestAddress(address), 0x4000, Some(file))
        };
        let ranges = [region(0, 0), region(0x4000, 0x8000), region(0x10_0000, 0)];
        let memory = Memory::from_ranges_with_files(ranges).unwrap();
        assert!(layout(0x2000, 0x1000, 0x10_1000).overlaps(&memory));
        assert!(!layout(0x2000, 0x1000, 0x10_1020).overlaps(&memory));
        assert!(!layout(0x2000, 0x1000, 0x5000).overlaps(&memory));
        // A part that goes on in the next region, elsewhere in the file.
        assert!(!layout(0x3ff0, 0x1000, 0x10_0000).overlaps(&memory));
        assert!(layout(0x3ff0, 0x1000, 0x10_3ff8).overlaps(&memory));
    }
}
