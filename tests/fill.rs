// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sparse images filled at random places, overwritten and read meanwhile, on the filesystems that write into holes in their own
//! ways: directly (ext4, XFS) or, without a word, through the page cache (ext2 and ext3, and pages of four blocks on a small ext4).

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::AsFd;

use extentd::engine::units::FileRange;
use extentd::sys::page_cache;
use integration::rig::wait::PATIENCE;
use integration::rig::workload::Workload;
use integration::rig::{Bed, Kind, Layout, Rig, Setup};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;

/// Writes at random into what is a hole at first, each read compared; somebody else reads the image in the middle of it.
fn fill(kind: Kind, options: &[&str]) {
    let Some(rig) = Rig::enter() else { return };
    let setup =
        Setup { kind, disk: 400 * MIB, layout: Layout::Sparse, size: 16 * MIB, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, options).unwrap();
    let mut client = bed.connect(3).unwrap();
    for (seed, max_sectors) in [(1, 8), (2, 8), (3, 40)] {
        bed.await_direct(PATIENCE).unwrap();
        let load = Workload { seed, requests: 1500, max_sectors, ..Workload::default() };
        load.run(client.queues(), &mut bed.model).unwrap();
        bed.check_guest(&mut client).unwrap();
        // This breaks the lease. What the map said goes, and what file writes left in the page cache must be what was written.
        bed.model.check(0, &bed.host_bytes().unwrap()).unwrap();
    }
    bed.await_direct(PATIENCE).unwrap();
    let zeroed = Workload { seed: 4, discard: Some(kind.unit()), ..Workload::default() };
    zeroed.run(client.queues(), &mut bed.model).unwrap();
    bed.check_guest(&mut client).unwrap();
    let status = bed.daemon.status().unwrap();
    let [file, direct, calls, errors] =
        ["segments/file", "segments/direct", "extents/fiemap_calls", "requests/errors"]
            .map(|name| status.number(name));
    assert_eq!(errors, 0, "{status:?}");
    assert!(file > 1000 && direct > 1000, "{status:?}");
    // Once for each write to a hole, or for many of them: the kernel says what the writes left in the page cache, which on ext2 and
    // ext3 may be something each time, and the map has room.
    let through_pages = matches!(kind, Kind::Ext2 | Kind::Ext3);
    let other = File::create(bed.fs.path().join("other")).unwrap();
    let tells = page_cache::count(other.as_fd(), FileRange::ALL).is_ok();
    drop(other);
    if tells && !through_pages && options.is_empty() {
        assert!(calls < file / 4, "{status:?}");
    }
    drop(client);
    bed.finish().unwrap();
}

#[test]
fn ext4() {
    fill(Kind::Ext4, &[]);
}

#[test]
fn xfs() {
    fill(Kind::Xfs, &[]);
}

#[test]
fn ext4_with_1_kib_blocks() {
    fill(Kind::Ext4Small, &[]);
}

#[test]
fn ext3() {
    fill(Kind::Ext3, &[]);
}

#[test]
fn ext2() {
    fill(Kind::Ext2, &[]);
}

#[test]
fn ext4_whose_map_is_kept_whole() {
    fill(Kind::Ext4, &["--populate", "all"]);
}

#[test]
fn xfs_with_few_extents_kept() {
    fill(Kind::Xfs, &["--max-extents", "64"]);
}
