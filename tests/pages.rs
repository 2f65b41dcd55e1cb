// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Filesystems whose blocks are smaller than a page (ADR 0010): the page cache keeps or drops a
//! page as a whole.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use integration::rig::{Backing, Bed, FaultDisk, Kind, Layout, Request, Rig, Setup, Shape};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;
const BLOCK: usize = 1024;

/// Reads the page at `place` through the page cache, over and over, until told to stop.
fn read_all_the_time(image: &File, place: &AtomicU64, stop: &AtomicBool) {
    let mut page = [0; PAGE];
    while !stop.load(Ordering::Relaxed) {
        image.read_exact_at(&mut page, place.load(Ordering::Relaxed)).unwrap();
    }
}

/// Without extents a write to a hole goes through the page cache, which makes the page dirty for a
/// moment. A direct write to another block of the page that ends in that moment cannot drop the
/// page: readers would go on seeing what was there when they read it into the cache, and the kernel
/// says EIO to the guest's next FLUSH.
#[test]
fn a_write_beside_a_hole_is_seen_by_readers_and_flushes_well() {
    let Some(rig) = Rig::enter() else { return };
    let disk = FaultDisk::mount(64 * MIB, &rig.dir("disk").unwrap()).unwrap();
    let setup = Setup {
        kind: Kind::Ext2Small,
        backing: Backing::File(disk.path()),
        layout: Layout::Sparse,
        size: 8 * MIB,
        ..Setup::default()
    };
    let bed = Bed::make(&rig, PROGRAM, &setup, &["--mode", "filesystem"]).unwrap();
    let mut client = bed.connect(4).unwrap();
    let image = File::open(&bed.image).unwrap();
    let (place, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let wrong = thread::scope(|scope| {
        scope.spawn(|| read_all_the_time(&image, &place, &stop));
        let wrong = (0..setup.size / PAGE as u64).find_map(|page| {
            let base = page * PAGE as u64;
            client.write_at(base, &[1; BLOCK]).unwrap();
            place.store(base, Ordering::Relaxed);
            // The first is written directly, the others into holes.
            let mut offset = base;
            for (queue, byte) in client.queues().iter_mut().zip(2_u8..) {
                let data = &[byte; BLOCK];
                queue.submit(Request::Write { offset, data }, &Shape::whole(), 0).unwrap();
                queue.kick().unwrap();
                offset += BLOCK as u64;
            }
            for queue in client.queues() {
                assert!(queue.drain().unwrap().iter().all(|done| done.result.is_ok()));
            }
            let mut seen = [0; PAGE];
            image.read_exact_at(&mut seen, base).unwrap();
            let stale = seen.chunks(BLOCK).zip(2_u8..).find(|(block, byte)| block[0] != *byte);
            let stale =
                stale.map(|(block, byte)| format!("a reader sees {}, not {byte}", block[0]));
            // What the kernel has to say it keeps until it is asked.
            let asked = page % 64 == 63;
            let flush = asked.then(|| client.flush().err()).flatten();
            let failed = flush.map(|error| format!("the flush says {error}"));
            let what = [stale, failed].into_iter().flatten().collect::<Vec<_>>().join("; ");
            (!what.is_empty()).then(|| format!("page {page}: {what}"))
        });
        stop.store(true, Ordering::Relaxed);
        wrong
    });
    assert_eq!(wrong, None);
    drop((client, image));
    drop(bed);
}
