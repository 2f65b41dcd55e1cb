// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens rarely: changes that leave no trace in the size, errors that must not get lost.

use std::fs;

use super::fixture::{
    BLOCK, Disk, ENTERED, blocks, device_test, map_some, open, sh, watch, write_direct,
};
use super::*;
use crate::control::map;
use crate::engine::message::{Job, JobDone, Proof, Refusal};

fn truncate(path: &Path, size: u64) {
    sh(&format!("python3 -c 'import os; os.truncate(\"{}\", {size})'", path.display()));
}

device_test!(a_file_cut_and_grown_again_is_noticed, {
    let disk = Disk::ext4();
    let base = disk.path();
    sh(&format!("mkdir -p {0}/upper {0}/lower {0}/work", base.display()));
    let path = disk.file("upper/image", 1024);
    let image = open(&path);
    let watch = watch(&image);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    assert_eq!(watch.check().unwrap(), Change::Unchanged);
    // Our own punches are no reason.
    assert_eq!(image.run(&Job::Punch { range: blocks(2, 4) }), JobDone::Punch(Ok(())));
    assert_eq!(watch.check().unwrap(), Change::Unchanged);
    write_direct(image.image_fd(), 2 * BLOCK, 1);
    assert_eq!(watch.check().unwrap(), Change::Unchanged);
    let (base, merged) = (base.display(), disk.scratch().join("merged"));
    fs::create_dir(&merged).unwrap();
    sh(&format!(
        "mount -t overlay o -o lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work {}",
        merged.display()
    ));
    truncate(&merged.join("image"), 4096);
    truncate(&merged.join("image"), 1024 * BLOCK);
    let seen = watch.check().unwrap();
    sh(&format!("umount {}", merged.display()));
    assert_eq!(map_some(&image, blocks(8, 1024), 512).extents, [], "the blocks are gone");
    assert_eq!(seen, Change::BlocksLost);
});

device_test!(an_image_moved_into_an_overlay_is_refused, {
    let disk = Disk::ext4();
    let base = disk.path();
    sh(&format!("mkdir -p {0}/upper {0}/lower {0}/work", base.display()));
    let path = disk.file("image", 16);
    let image = open(&path);
    fs::rename(&path, base.join("upper/image")).unwrap();
    let (base, merged) = (base.display(), disk.scratch().join("merged"));
    fs::create_dir(&merged).unwrap();
    sh(&format!(
        "mount -t overlay o -o lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work {}",
        merged.display()
    ));
    let refused = image.run(&Job::Enter);
    sh(&format!("umount {}", merged.display()));
    assert_eq!(refused, JobDone::Enter(Err(Refusal::Changed)));
});

device_test!(a_proof_that_the_control_socket_found_is_not_lost, {
    let disk = Disk::ext4();
    let path = disk.path().join("image");
    fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    write_direct(image.image_fd(), 0, 7);
    map::load(&image, 0).unwrap();
    assert!(image.proven());
    assert_eq!(map_some(&image, blocks(0, 1), 1).proof, Proof::Equal);
});

/// Runs `body` with an image whose block 0 cannot be written: its place in the file below the disk
/// was given back, and there is no room for another.
fn with_unwritable_block(body: impl FnOnce(&Image) + std::panic::UnwindSafe) {
    let dir = tempfile::Builder::new().prefix("extentd-").tempdir_in("/dev/shm").unwrap();
    let (small, mount) = (dir.path().join("small"), dir.path().join("mnt"));
    fs::create_dir(&small).unwrap();
    fs::create_dir(&mount).unwrap();
    sh(&format!("mount -t tmpfs -o size=40M t {}", small.display()));
    let done = std::panic::catch_unwind(|| {
        let backing = small.join("disk");
        sh(&format!("truncate -s 16M {0}; mkfs.ext2 -q -F -b 4096 {0}", backing.display()));
        let device = sh(&format!("losetup -f --show {}", backing.display()));
        sh(&format!("mount {device} {}; losetup -d {device}", mount.display()));
        let path = mount.join("image");
        super::fixture::write_blocks(&path, 0, 64);
        let image = open(&path);
        assert_eq!(image.run(&Job::Enter), ENTERED);
        let place = map_some(&image, blocks(0, 1), 1).extents[0].device.0;
        sh(&format!("sync -f {}", mount.display()));
        image.drop_lease();
        let backing = backing.display();
        sh(&format!("fallocate -p -o {place} -l 4096 {backing}"));
        sh(&format!("dd if=/dev/zero of={}/fill bs=4096 2>/dev/null || true", small.display()));
        body(&image);
    });
    let _ = std::process::Command::new("umount").arg(&mount).status();
    let _ = std::process::Command::new("umount").arg("-l").arg(&small).status();
    if let Err(panic) = done {
        std::panic::resume_unwind(panic);
    }
}

fn sync_error(image: &Image) -> Option<i32> {
    rustix::fs::fdatasync(image.image_fd()).err().map(|errno| errno.raw_os_error())
}

/// Makes page 0 dirty by the one description there is, as an O_DIRECT fallback leaves it.
fn dirty(image: &Image) {
    rustix::fs::fcntl_setfl(image.image_fd(), rustix::fs::OFlags::empty()).unwrap();
    rustix::io::pwrite(image.image_fd(), &[9; 4096], 0).unwrap();
    rustix::fs::fcntl_setfl(image.image_fd(), rustix::fs::OFlags::DIRECT).unwrap();
}

device_test!(a_flush_still_hears_of_a_write_that_mapping_saw_fail, {
    with_unwritable_block(|image| {
        assert_eq!(sync_error(image), None);
        dirty(image);
        let answer = image.run(&Job::Map { range: blocks(0, 1), max_extents: 1 });
        assert!(matches!(answer, JobDone::Map(Err(_))), "{answer:?}");
        assert_eq!(sync_error(image), Some(libc::ENOSPC));
    });
});

device_test!(entering_direct_mode_says_that_a_write_failed, {
    with_unwritable_block(|image| {
        dirty(image);
        assert_eq!(image.run(&Job::Enter), JobDone::Enter(Err(Refusal::Unsynced(libc::ENOSPC))));
    });
});
