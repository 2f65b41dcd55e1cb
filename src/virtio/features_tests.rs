// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::mem::offset_of;

use virtio_bindings::virtio_blk::virtio_blk_config;

use super::*;

const LIMITS: Limits =
    Limits { base: 0, capacity: 10 << 20, block_size: 512, read_only: false, unmap: true };
const TOPOLOGY: Topology = Topology {
    physical_block: 4096,
    alignment_offset: 1024,
    min_io: 8192,
    opt_io: 1 << 20,
    discard_block: 4096,
};

fn field<const N: usize>(space: &[u8], at: usize) -> [u8; N] {
    space[at..at + N].try_into().unwrap()
}

#[test]
fn every_field_is_where_linux_reads_it() {
    let space = config(&LIMITS, &TOPOLOGY, 16, 1, 0, 60);
    let u32_at = |at| u32::from_le_bytes(field(&space, at));
    let u16_at = |at| u16::from_le_bytes(field(&space, at));
    let capacity = u64::from_le_bytes(field(&space, offset_of!(virtio_blk_config, capacity)));
    assert_eq!(capacity, 20480);
    assert_eq!(u32_at(offset_of!(virtio_blk_config, size_max)), SIZE_MAX);
    assert_eq!(u32_at(offset_of!(virtio_blk_config, seg_max)), SEG_MAX);
    assert_eq!(u32_at(offset_of!(virtio_blk_config, blk_size)), 512);
    assert_eq!(space[offset_of!(virtio_blk_config, physical_block_exp)], 3);
    assert_eq!(space[offset_of!(virtio_blk_config, alignment_offset)], 2);
    assert_eq!(u16_at(offset_of!(virtio_blk_config, min_io_size)), 16);
    assert_eq!(u32_at(offset_of!(virtio_blk_config, opt_io_size)), 2048);
    assert_eq!(space[offset_of!(virtio_blk_config, wce)], 1);
    assert_eq!(offset_of!(virtio_blk_config, wce), WRITEBACK_OFFSET as usize);
    assert_eq!(u16_at(offset_of!(virtio_blk_config, num_queues)), 16);
    assert_eq!(u32_at(offset_of!(virtio_blk_config, max_discard_sectors)), 1 << 21);
    assert_eq!(u32_at(offset_of!(virtio_blk_config, max_discard_seg)), 64);
    assert_eq!(u32_at(offset_of!(virtio_blk_config, discard_sector_alignment)), 8);
    assert_eq!(u32_at(offset_of!(virtio_blk_config, max_write_zeroes_sectors)), 1 << 21);
    assert_eq!(u32_at(offset_of!(virtio_blk_config, max_write_zeroes_seg)), 64);
    assert_eq!(space[offset_of!(virtio_blk_config, write_zeroes_may_unmap)], 1);
    assert!(space[57..].iter().all(|&byte| byte == 0));
}

#[test]
fn exactly_what_was_asked_for_is_returned() {
    let whole = config(&LIMITS, &TOPOLOGY, 4, 0, 0, 60);
    for offset in 0..80u32 {
        for size in 1..=256u32 {
            let part = config(&LIMITS, &TOPOLOGY, 4, 0, offset, size);
            assert_eq!(part.len(), size as usize);
            for (i, byte) in part.iter().enumerate() {
                assert_eq!(*byte, whole.get(offset as usize + i).copied().unwrap_or(0));
            }
        }
    }
}

#[test]
fn odd_topologies_do_not_panic_and_never_claim_nonsense() {
    let odd = Topology {
        physical_block: 0,
        alignment_offset: u32::MAX,
        min_io: 1,
        opt_io: 3,
        discard_block: 1,
    };
    let space = config(&LIMITS, &odd, 1, 0, 0, 60);
    assert_eq!(&space[24..32], &[0; 8]);
}

#[test]
fn what_cannot_be_served_is_not_offered() {
    let features = offered(&LIMITS);
    // LIFETIME, SECURE_ERASE and ZONED.
    for missing in [VIRTIO_BLK_F_RO, 15, 16, 17] {
        assert!(!has(features, missing), "bit {missing}");
    }
    let both = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
    assert_eq!(both.map(|bit| has(features, bit)), [true, true]);
    let keeping = offered(&Limits { unmap: false, ..LIMITS });
    assert_eq!(both.map(|bit| has(keeping, bit)), [false, true]);
    let read_only = offered(&Limits { read_only: true, ..LIMITS });
    assert!(has(read_only, VIRTIO_BLK_F_RO));
    assert_eq!(both.map(|bit| has(read_only, bit)), [false, false]);
    let unserved = VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::BACKEND_REQ;
    assert!(!protocol().intersects(unserved));
}
