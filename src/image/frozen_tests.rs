// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Raw I/O beside file I/O that hangs in the filesystem (R2).

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;

use super::fixture::{BLOCK, Disk, ENTERED, blocks, device_test, map_some, open, sh};
use crate::engine::Io;
use crate::engine::io::{BounceSlot, Buf, Op, OpId, Tag, Target};
use crate::engine::message::Job;
use crate::sys::buffer::Memory;
use crate::sys::uring::Ring;

/// More pages than one bio holds: the kernel hands such a transfer to a worker thread of its own.
const PIECES: u64 = 512;
const WRITES: u32 = 128;

device_test!(raw_io_does_not_queue_behind_file_writes_that_hang, {
    let disk = Disk::ext4();
    let path = disk.file("image", PIECES);
    sh(&format!("truncate -s 64M {}", path.display()));
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    let place = map_some(&image, blocks(0, PIECES), 512).extents[0];
    assert_eq!(place.range, blocks(0, PIECES));
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap());
    let every_second: Vec<_> =
        (0..PIECES).map(|n| (GuestAddress(2 * n * BLOCK), BLOCK as u32)).collect();
    let mut ring =
        Ring::new(image.image_fd(), image.device_fd(), image.geometry(), None, 0).unwrap();
    assert!(ring.guests().set(Tag(0), &memory, &every_second, 4096).unwrap());
    let mount = disk.path();
    sh(&format!("fsfreeze -f {}", mount.display()));
    for n in 0..WRITES {
        let buf = Buf::Bounce { slot: BounceSlot(0), at: 0, len: BLOCK as u32 };
        let target = Target::Image((32 << 20) + u64::from(n) * BLOCK);
        assert!(ring.submit(OpId(n), Op::Write(target, buf)).is_pending());
    }
    ring.enter().unwrap();
    thread::sleep(Duration::from_millis(200));
    let buf = Buf::Guest { tag: Tag(0), at: 0, len: (PIECES * BLOCK) as u32 };
    let read = OpId(WRITES);
    // Raw operations follow a look at the clock.
    ring.now();
    assert!(ring.submit(read, Op::Read(Target::Device(place.device), buf)).is_pending());
    let since = Instant::now();
    let mut result = None;
    while result.is_none() && since.elapsed() < Duration::from_secs(30) {
        ring.enter().unwrap();
        while let Some(done) = ring.reap() {
            assert_eq!(done.id, read, "a write got through");
            result = Some(done.result);
        }
        thread::sleep(Duration::from_millis(5));
    }
    sh(&format!("fsfreeze -u {}", mount.display()));
    assert_eq!(result, Some((PIECES * BLOCK) as i32), "after {:?}", since.elapsed());
});
