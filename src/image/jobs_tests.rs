// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The keeper's jobs, leases and the map on real filesystems.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::fixture::{
    BLOCK, Disk, ENTERED, blocks, cached, device_test, map_some, open, options, picture, read_raw,
    sh, watch, write_blocks, write_direct,
};
use super::*;
use crate::engine::extent::State;
use crate::engine::message::{Job, JobDone, MapAnswer, Proof, Refusal};

/// What a lease of ours that nobody serves would take much longer than.
const AT_ONCE: Duration = Duration::from_secs(20);

device_test!(the_map_tells_written_hole_unwritten_and_tail_apart, {
    for mkfs in ["mkfs.ext4 -q -F -b 4096", "mkfs.ext4 -q -F -b 1024", "mkfs.xfs -q -f"] {
        let disk = Disk::new(mkfs, 512);
        let path = disk.file("image", 4);
        let name = path.display();
        sh(&format!("truncate -s 65536 {name}; fallocate -n -o 32768 -l 8192 {name}"));
        write_blocks(&path, 12, 13);
        // The file ends inside its last block.
        sh(&format!("printf tail >> {name}; sync {name}"));
        let image = open(&path);
        assert_eq!(image.run(&Job::Enter), ENTERED);
        let range = FileRange::new(0, 65536 + BLOCK);
        assert_eq!(picture(&image, range), "mmmm....uu..m...o", "{mkfs}");
        assert_eq!(picture(&image, blocks(2, 9)), "mm....u", "{mkfs}");
        let answer = map_some(&image, blocks(1, 3), 512);
        for extent in answer.extents {
            let block = extent.range.start / BLOCK;
            let byte = u8::try_from(block).unwrap() + 1;
            assert_eq!(read_raw(&image, extent.device.0), [byte; 4096], "{mkfs}");
        }
    }
});

device_test!(ext2_and_ext3_map_too, {
    for mkfs in ["mkfs.ext2 -q -F -b 4096", "mkfs.ext3 -q -F -b 4096"] {
        let disk = Disk::new(mkfs, 512);
        let path = disk.file("image", 4);
        write_blocks(&path, 6, 8);
        let image = open(&path);
        assert_eq!(image.run(&Job::Enter), ENTERED);
        assert_eq!(picture(&image, blocks(0, 8)), "mmmm..mm", "{mkfs}");
    }
});

device_test!(an_answer_without_room_covers_only_what_it_says, {
    let disk = Disk::ext4();
    let path = disk.path().join("image");
    for block in [0, 2, 4, 6] {
        write_blocks(&path, block, block + 1);
    }
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    let answer = map_some(&image, blocks(0, 7), 2);
    assert_eq!((answer.covered, answer.extents.len()), (blocks(0, 3), 2));
    let answer = map_some(&image, blocks(3, 7), 2);
    assert_eq!((answer.covered, answer.extents.len()), (blocks(3, 7), 2));
    assert_eq!(map_some(&image, blocks(1, 2), 512).extents, []);
});

device_test!(reflinked_blocks_are_shared_until_written, {
    let disk = Disk::xfs();
    let path = disk.file("image", 8);
    sh(&format!("cp --reflink=always {0} {0}.copy", path.display()));
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    assert_eq!(picture(&image, blocks(0, 8)), "ssssssss");
    write_direct(image.image_fd(), 2 * BLOCK, 0xaa);
    assert_eq!(picture(&image, blocks(0, 8)), "ssmsssss");
    // A reflinked file may end between two filesystem blocks.
    drop(image);
    sh(&format!("truncate -s {} {}", 8 * BLOCK + 512, path.display()));
    assert_eq!(open(&path).limits().capacity, 8 * BLOCK + 512);
});

device_test!(entering_direct_mode_leaves_no_page_behind, {
    for disk in [Disk::ext4(), Disk::xfs()] {
        let path = disk.path().join("image");
        // Dirty pages, and clean ones of a reader that is gone.
        fs::write(&path, vec![3; 8 << 20]).unwrap();
        fs::read(&path).unwrap();
        let image = open(&path);
        fs::read(&path).unwrap();
        assert!(cached(&image) > 0);
        assert_eq!(image.run(&Job::Enter), ENTERED);
        assert_eq!(cached(&image), 0);
        assert_eq!(image.run(&Job::Confirm), JobDone::Confirm(Ok(())));
        let answer = map_some(&image, FileRange::new(0, 8 << 20), 512);
        let place = answer.extents[0].device.0;
        assert_eq!(
            (answer.extents[0].state, read_raw(&image, place)),
            (State::Mapped, vec![3; 4096])
        );
        // A raw write is what a later buffered reader sees.
        write_direct(image.device_fd().unwrap(), place, 9);
        image.drop_lease();
        assert_eq!(fs::read(&path).unwrap()[..4096], [9; 4096]);
    }
});

device_test!(pages_that_stay_keep_direct_mode_away, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let image = open(&path);
    // Nothing can drop a locked page. The mapping hangs on our own description, so that no
    // other one stands in the way of the lease.
    let holder = Command::new("python3")
        .args([
            "-c",
            "
import ctypes, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
size = ctypes.c_size_t(65536)
page = libc.mmap(None, size, 1, 1, 0, ctypes.c_size_t(0))
assert libc.mlock(ctypes.c_void_p(page), size) == 0
print('locked', flush=True)
time.sleep(60)
",
        ])
        .stdin(Stdio::from(image.image_fd().try_clone_to_owned().unwrap()))
        .stdout(Stdio::piped())
        .spawn();
    let mut holder = holder.unwrap();
    holder.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    let refused = image.run(&Job::Enter);
    let map = picture(&image, blocks(0, 16));
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(refused, JobDone::Enter(Err(Refusal::PagesCached)));
    assert_eq!(map, "oooooooooooooooo");
    // The lease went again with the refusal: a reader gets in at once.
    let since = Instant::now();
    fs::read(&path).unwrap();
    assert!(since.elapsed() < AT_ONCE);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    assert_eq!(picture(&image, blocks(0, 16)), "mmmmmmmmmmmmmmmm");
});

device_test!(a_map_after_a_file_write_is_free_of_its_pages, {
    let disk = Disk::xfs();
    let path = disk.path().join("image");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    assert!(!image.proven());
    rustix::fs::fcntl_setfl(image.image_fd(), rustix::fs::OFlags::empty()).unwrap();
    rustix::io::pwrite(image.image_fd(), &[5; 65536], 0).unwrap();
    rustix::fs::fcntl_setfl(image.image_fd(), rustix::fs::OFlags::DIRECT).unwrap();
    assert!(cached(&image) > 0);
    // Half of what may be one large folio.
    let answer = map_some(&image, blocks(0, 8), 512);
    assert_eq!(answer.proof, Proof::Equal);
    assert!(image.proven());
    assert_eq!(picture(&image, blocks(0, 20)), "mmmmmmmmmmmmmmmm....");
    assert_eq!(map_some(&image, blocks(30, 38), 512).proof, Proof::Equal, "proven once is enough");
});

device_test!(a_map_that_lies_is_found_out, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let other = Disk::ext4();
    // Another device with other bytes, in place of the filesystem's own.
    let wrong =
        super::device::open_number(rustix::fs::stat(other.device()).unwrap().st_rdev, false);
    let mut image = Image::open_within(&options(&path), Duration::ZERO).unwrap();
    image.proven = AtomicBool::new(false);
    image.device = Some(wrong.unwrap());
    assert_eq!(image.run(&Job::Enter), ENTERED);
    assert_eq!(map_some(&image, blocks(0, 16), 512).proof, Proof::Different);
    assert!(!image.proven());
    assert_eq!(image.prove_at_open().unwrap(), Proof::Different);
});

device_test!(punching_gives_blocks_back, {
    for disk in [Disk::ext4(), Disk::xfs()] {
        let path = disk.file("image", 8);
        let image = open(&path);
        assert_eq!(image.run(&Job::Enter), ENTERED);
        assert_eq!(image.run(&Job::Punch { range: blocks(2, 4) }), JobDone::Punch(Ok(())));
        assert_eq!(picture(&image, blocks(0, 8)), "mm..mmmm");
        assert_eq!(image.file_size_now().unwrap(), 8 * BLOCK);
        let bad = image.run(&Job::Punch { range: blocks(2, 2) });
        assert_eq!(bad, JobDone::Punch(Err(libc::EINVAL)));
    }
});

device_test!(an_unlinked_image_is_served_on, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let image = open(&path);
    let watch = watch(&image);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    assert_eq!(watch.check().unwrap(), Change::Unchanged);
    fs::remove_file(&path).unwrap();
    assert_eq!(watch.check().unwrap(), Change::Unlinked);
    assert!(image.is_unlinked().unwrap());
    assert_eq!(picture(&image, blocks(0, 16)), "mmmmmmmmmmmmmmmm");
    image.drop_lease();
    assert_eq!(image.run(&Job::Enter), ENTERED);
    image.touch().unwrap();
});

device_test!(touching_changes_the_mtime_only, {
    let disk = Disk::ext4();
    let path = disk.file("image", 1);
    sh(&format!("touch -d '2001-01-01' {}", path.display()));
    let image = open(&path);
    let before = fs::metadata(&path).unwrap();
    image.touch().unwrap();
    let after = fs::metadata(&path).unwrap();
    assert_eq!(before.accessed().unwrap(), after.accessed().unwrap());
    assert!(after.modified().unwrap().elapsed().unwrap() < Duration::from_secs(60));
});

device_test!(a_size_that_changed_before_direct_mode_refuses_it, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let image = open(&path);
    let watch = watch(&image);
    File::options().append(true).open(&path).unwrap().write_all(&[0; 512]).unwrap();
    assert_eq!(watch.check().unwrap(), Change::SizeChanged);
    assert_eq!(image.run(&Job::Enter), JobDone::Enter(Err(Refusal::Changed)));
});

device_test!(a_fragmented_and_a_huge_sparse_file_open_quickly, {
    let disk = Disk::xfs();
    let sparse = disk.path().join("sparse");
    File::create(&sparse).unwrap().set_len(1 << 40).unwrap();
    let since = Instant::now();
    let image = open(&sparse);
    assert!(since.elapsed() < AT_ONCE);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    let whole = FileRange::new(0, 1 << 40);
    assert_eq!(map_some(&image, whole, 512), MapAnswer { covered: whole, ..Default::default() });

    let path = disk.path().join("fragmented");
    let file = File::create(&path).unwrap();
    for block in (0..4000).step_by(2) {
        file.write_all_at(&[1; 4096], block * BLOCK).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let image = open(&path);
    assert!(image.proven());
    assert_eq!(image.run(&Job::Enter), ENTERED);
    let (mut at, mut count) = (0, 0);
    while at < 3999 * BLOCK {
        let answer = map_some(&image, FileRange::new(at, 3999 * BLOCK), 512);
        assert!(answer.covered.start == at && answer.covered.end > at);
        let mapped = answer.extents.iter().filter(|extent| extent.state == State::Mapped);
        count += mapped.map(|extent| extent.range.len() / BLOCK).sum::<u64>();
        at = answer.covered.end;
    }
    assert_eq!(count, 2000);
});

device_test!(a_block_device_maps_onto_itself_and_serials_fit, {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let backing = dir.path().join("disk");
    File::create(&backing).unwrap().set_len(1 << 20).unwrap();
    let device = sh(&format!("losetup -f --show {}", backing.display()));
    let image = open(Path::new(&device));
    let answer = map_some(&image, FileRange::new(4096, 2 << 20), 1);
    let serial = image.default_serial();
    drop(image);
    sh(&format!("losetup -d {device}"));
    assert_eq!(answer.extents.len(), 1);
    assert_eq!(answer.extents[0].range, FileRange::new(4096, 1 << 20));
    assert_eq!(answer.extents[0].device.0, 4096);
    assert!(serial.starts_with("blk-7-") && serial.len() <= 20);
    let image = open(&backing);
    assert!((3..=20).contains(&image.default_serial().len()));
});
