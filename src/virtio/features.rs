// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is offered to the frontend: feature bits, and the configuration space (virtio 1.3, 5.2.4).

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::engine::request::{Limits, MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use crate::engine::units::SECTOR;

/// Data segments a request should have at most: what fits in the usual queue of 128 descriptors
/// beside the header and the status byte, as a driver without indirect descriptors needs.
pub const SEG_MAX: u32 = 126;

/// Bytes a segment should have at most: `SEG_MAX` of them stay below [`MAX_DATA`].
pub const SIZE_MAX: u32 = 512 << 10;

/// Bytes of data in one request, at most; more is answered with S_IOERR. Drivers are known to
/// exceed `SEG_MAX` and `SIZE_MAX`, so those are not enforced; this bounds what one request costs.
pub const MAX_DATA: u64 = 64 << 20;

/// Where `writeback` is in the configuration space.
pub const WRITEBACK_OFFSET: u32 = 32;

/// Bytes of the configuration space that may differ from zero.
const CONFIG_BYTES: usize = 60;

/// What the device below looks like, for VIRTIO_BLK_F_TOPOLOGY. Bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Topology {
    /// Physical block size; a power of two.
    pub physical_block: u32,
    /// Where the first whole physical block begins, counted from the image's first byte.
    pub alignment_offset: u32,
    /// Smallest transfer without a penalty; 0 if unknown.
    pub min_io: u32,
    /// Best transfer size; 0 if unknown.
    pub opt_io: u32,
    /// What discards should be aligned to: less gives nothing back.
    pub discard_block: u32,
}

/// The virtio feature bits offered.
#[must_use]
pub fn offered(limits: &Limits) -> u64 {
    let bits = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    let some = |offer: bool, number| if offer { bit(number) } else { 0 };
    bits.into_iter().map(bit).sum::<u64>()
        | some(limits.read_only, VIRTIO_BLK_F_RO)
        | some(!limits.read_only && limits.unmap, VIRTIO_BLK_F_DISCARD)
        | some(!limits.read_only, VIRTIO_BLK_F_WRITE_ZEROES)
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

/// The vhost-user protocol features offered. What the crate cannot serve is not among them.
#[must_use]
pub fn protocol() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

/// Whether a feature was negotiated.
#[must_use]
pub fn has(features: u64, number: u32) -> bool {
    features & bit(number) != 0
}

/// `size` bytes of the configuration space from `offset` on: exactly as many as asked for, zeros
/// where nothing is defined.
#[must_use]
pub fn config(
    limits: &Limits,
    topology: &Topology,
    num_queues: u16,
    writeback: u8,
    offset: u32,
    size: u32,
) -> Vec<u8> {
    let space = config_space(limits, topology, num_queues, writeback);
    let skip = usize::try_from(offset).unwrap_or(usize::MAX);
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    space.into_iter().skip(skip).chain(std::iter::repeat(0)).take(size).collect()
}

/// The fields in their order, little-endian.
fn config_space(limits: &Limits, topology: &Topology, queues: u16, writeback: u8) -> Vec<u8> {
    let block = limits.block_size.max(1);
    let exponent = (topology.physical_block.max(block) / block).ilog2();
    let blocks = |bytes: u32| bytes / block;
    let sectors = |bytes: u32| u32::try_from(u64::from(bytes) / SECTOR).unwrap_or(1);
    let mut space = Vec::with_capacity(CONFIG_BYTES);
    space.extend((limits.capacity / SECTOR).to_le_bytes());
    space.extend(SIZE_MAX.to_le_bytes());
    space.extend(SEG_MAX.to_le_bytes());
    space.extend([0; 4]); // geometry, not offered
    space.extend(block.to_le_bytes());
    space.push(u8::try_from(exponent).unwrap_or(0));
    space.push(u8::try_from(blocks(topology.alignment_offset)).unwrap_or(0));
    space.extend(u16::try_from(blocks(topology.min_io)).unwrap_or(0).to_le_bytes());
    space.extend(blocks(topology.opt_io).to_le_bytes());
    space.push(writeback);
    space.push(0);
    space.extend(queues.to_le_bytes());
    let ranges = u32::try_from(MAX_SEGMENTS).unwrap_or(1);
    space.extend(MAX_SEGMENT_SECTORS.to_le_bytes()); // max_discard_sectors
    space.extend(ranges.to_le_bytes()); // max_discard_seg
    space.extend(sectors(topology.discard_block).to_le_bytes()); // discard_sector_alignment
    space.extend(MAX_SEGMENT_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    space.extend(ranges.to_le_bytes()); // max_write_zeroes_seg
    space.push(u8::from(limits.unmap)); // write_zeroes_may_unmap
    space.resize(CONFIG_BYTES, 0);
    space
}

fn bit(number: u32) -> u64 {
    1u64.checked_shl(number).unwrap_or(0)
}

#[cfg(test)]
#[path = "features_tests.rs"]
mod tests;
