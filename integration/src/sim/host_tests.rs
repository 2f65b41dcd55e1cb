// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each test is a fact of the host's kernel that the model must show.

use super::*;

const SPB: usize = 8;

fn host() -> (Host, Rng) {
    let disk = Disk::new(64 * SPB, |s| 0xDEAD_0000 | s as u64);
    (Host::new(disk, Layout::new(8, 8 * SPB, 64), SPB, 1000), Rng::new(3))
}

/// A direct write of `stamp` all over `sectors`, all three steps.
fn write(host: &mut Host, rng: &mut Rng, sectors: Range<usize>, stamp: Stamp) {
    let copies = host.prepare(&sectors, rng).unwrap();
    host.transfer(&sectors, &copies, 1, |_| stamp);
    host.disk.acknowledge(1);
    host.convert(&sectors, &copies, rng);
}

#[test]
fn a_page_of_a_former_life_takes_its_block_back() {
    let mut former = Former::default();
    former.often = 1000;
    former.allocated(3, vec![7; SPB], &mut Rng::new(1));
    assert_eq!(former.page(3), Some(&mut vec![7; SPB]));
    former.often = 1;
    former.allocated(3, vec![8; SPB], &mut Rng::new(1));
    assert_eq!(former.page(3), None);
}

#[test]
fn allocation_takes_two_steps_and_garbage_is_never_seen() {
    let (mut host, mut rng) = host();
    let copies = host.prepare(&(0..8), &mut rng).unwrap();
    let block = host.layout.block(0);
    assert!(block.place != NOWHERE && !block.written);
    assert_eq!(host.stored(0), ZERO);
    host.transfer(&(0..8), &copies, 1, |s| 100 + s as u64);
    assert_eq!(host.stored(3), ZERO);
    host.convert(&(0..8), &copies, &mut rng);
    assert_eq!(host.stored(3), 103);
}

#[test]
fn a_dirty_edge_page_later_undoes_a_raw_write() {
    let (mut host, mut rng) = host();
    write(&mut host, &mut rng, 0..8, 5);
    host.punch(&(1..3), &mut rng);
    let raw = host.layout.block(0).place * SPB + 7;
    host.disk.write(raw, 6, 2);
    assert_eq!(host.stored(7), 6);
    host.fsync();
    assert_eq!((host.stored(7), host.stored(1)), (5, ZERO));
}

#[test]
fn freed_blocks_are_the_canarys_at_once() {
    let (mut host, mut rng) = host();
    write(&mut host, &mut rng, 0..16, 5);
    let place = host.layout.block(1).place;
    host.punch(&(8..16), &mut rng);
    assert_eq!(host.layout.owner(place), Owner::Canary);
    assert_eq!(host.dead_canary(), None);
    host.disk.write(place * SPB, 1, 1);
    assert_eq!(host.dead_canary(), Some(place));
}

#[test]
fn a_shared_block_is_copied_on_write_and_its_clone_keeps_the_old_one() {
    let (mut host, mut rng) = host();
    host.greed = 0;
    write(&mut host, &mut rng, 0..8, 5);
    host.share(0);
    let old = host.layout.block(0).place;
    write(&mut host, &mut rng, 0..4, 6);
    assert_ne!(host.layout.block(0).place, old);
    assert_eq!((host.stored(0), host.stored(7)), (6, 5));
    assert_eq!((host.layout.owner(old), host.disk.read(old * SPB)), (Owner::Clone, 5));
}

#[test]
fn a_cut_loses_an_allocation_whose_data_a_device_flush_had_kept() {
    let (mut host, mut rng) = host();
    write(&mut host, &mut rng, 0..8, 5);
    host.disk.flush();
    host.cut(&mut rng);
    assert_eq!(host.stored(0), ZERO);
    write(&mut host, &mut rng, 0..8, 6);
    host.fsync();
    host.cut(&mut rng);
    assert_eq!(host.stored(0), 6);
}

#[test]
fn a_stale_clean_page_outlives_raw_writes() {
    let (mut host, mut rng) = host();
    write(&mut host, &mut rng, 0..8, 5);
    host.buffered_read(0);
    let raw = host.layout.block(0).place * SPB;
    host.disk.write(raw, 6, 2);
    assert_eq!((host.visible(0), host.stored(0)), (5, 6));
}

#[test]
fn shrinking_to_inside_a_block_zeroes_its_rest_through_the_cache() {
    let (mut host, mut rng) = host();
    write(&mut host, &mut rng, 0..64, 5);
    host.shrink(12, false, &mut rng);
    assert_eq!((host.visible(11), host.visible(12)), (5, ZERO));
    assert!(host.cache.is_dirty(12));
    assert_eq!(host.layout.block(2).place, NOWHERE);
}

/// What seeds 29794 and 65104 found, when blocks of a page were written one by one (ADR 0010).
/// ext2, ext4 and XFS do it: `tests/pages.rs`.
#[test]
fn a_page_stays_stale_under_a_direct_write_if_another_of_its_blocks_is_dirty() {
    let (small, mut rng) = (2, Rng::new(3));
    let disk = Disk::new(64 * small, |s| 0xDEAD_0000 | s as u64);
    let mut host = Host::new(disk, Layout::new(8, 8 * small, 64), small, 1000);
    write(&mut host, &mut rng, 0..4, 5);
    let copies = host.prepare(&(0..2), &mut rng).unwrap();
    // Somebody reads the page in, then its other block becomes dirty.
    host.buffered_read(0);
    host.buffered_write(2, 7);
    host.transfer(&(0..2), &copies, 2, |_| 6);
    assert!(!host.kept_stale);
    host.convert(&(0..2), &copies, &mut rng);
    assert!(host.kept_stale, "the next fsync says EIO");
    assert_eq!((host.visible(0), host.stored(0)), (5, 6));
    // Blocks that are not dirty stay where they are; one that becomes so in part takes the rest
    // along.
    host.fsync();
    assert_eq!(host.stored(0), 6);
    host.buffered_write(1, 8);
    host.fsync();
    assert_eq!((host.stored(0), host.stored(1)), (5, 8));
}

/// Seed 104167: the block with the new end was shared, and is copied to have its rest zeroed. Raw
/// reads of the old place are residue like those of what the cut has freed.
#[test]
fn a_shared_block_with_a_new_end_leaves_residue_if_nobody_was_told() {
    for residue in [true, false] {
        let (mut host, mut rng) = host();
        write(&mut host, &mut rng, 0..16, 5);
        host.share(1);
        let old = host.layout.block(1).place;
        host.shrink(12, residue, &mut rng);
        host.fsync();
        assert_ne!(host.layout.block(1).place, old);
        let owner = if residue { Owner::Residue } else { Owner::Clone };
        assert_eq!(host.layout.owner(old), owner);
    }
}
