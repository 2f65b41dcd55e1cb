// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every item of R5 and R5a on a real filesystem: which images are served raw, and why the others
//! are not.

use std::fs;
use std::path::Path;

use super::fixture::{Disk, device_test, open, options, sh, try_open};
use super::*;
use crate::engine::message::{Job, JobDone, Refusal};

/// Opens an image that must not be eligible, and gives the reason.
fn reason(path: &Path) -> String {
    let image = open(path);
    assert_eq!(image.start(), Start::Filesystem);
    assert!(image.device_fd().is_none(), "no device may stay open");
    let reason = image.not_eligible().unwrap().to_string();
    drop(image);
    // The same, demanded, is an error with the same reason.
    let direct = Options { mode: ModeChoice::Direct, ..options(path) };
    let message = try_open(&direct).unwrap_err().to_string();
    assert!(message.contains(&reason) && !message.contains('\n'), "{message}");
    reason
}

fn eligible(path: &Path) {
    let image = open(path);
    assert!(image.not_eligible().is_none(), "{:?}", image.not_eligible());
    assert_eq!(image.start(), Start::Eligible);
    assert!(image.proven(), "a written file is compared at open");
    drop(image);
    let never = Options { mode: ModeChoice::Filesystem, ..options(path) };
    let image = try_open(&never).unwrap();
    assert_eq!((image.start(), image.device_fd().is_none()), (Start::Filesystem, true));
}

device_test!(ext2_ext3_ext4_and_xfs_are_eligible, {
    for (mkfs, block) in [
        ("mkfs.ext2 -q -F -b 4096", 4096),
        ("mkfs.ext3 -q -F -b 4096", 4096),
        ("mkfs.ext4 -q -F -b 4096", 4096),
        ("mkfs.ext4 -q -F -b 1024", 1024),
        ("mkfs.xfs -q -f", 4096),
        ("mkfs.xfs -q -f -b size=1024", 1024),
    ] {
        let disk = Disk::new(mkfs, 512);
        let path = disk.file("image", 64);
        eligible(&path);
        let image = open(&path);
        let geometry = *image.geometry();
        // A page is written as a whole (ADR 0010).
        assert_eq!((image.fs_block(), geometry.fs_block), (block, 4096), "{mkfs}");
        drop(image);
        assert_eq!((geometry.file_align, geometry.dev_block, geometry.mem_align), (512, 512, 512));
        let empty = disk.path().join("sparse");
        sh(&format!("truncate -s 1T {} || truncate -s 100M {0}", empty.display()));
        let image = open(&empty);
        assert_eq!((image.start(), image.proven()), (Start::Eligible, false));
    }
});

device_test!(a_filesystem_without_barriers_is_known, {
    for (mkfs, options, barriers) in [
        ("mkfs.ext4 -q -F", "rw", true),
        ("mkfs.ext4 -q -F", "barrier=0", false),
        ("mkfs.ext3 -q -F", "nobarrier", false),
        ("mkfs.ext2 -q -F", "rw", true),
        ("mkfs.xfs -q -f", "rw", true),
    ] {
        let disk = Disk::mounted(mkfs, 512, options);
        let path = disk.file("image", 64);
        assert_eq!(open(&path).barriers(), barriers, "{mkfs}, {options}");
    }
    // The default of the filesystem, which mountinfo does not show.
    let hidden = Disk::new("sh -c 'mkfs.ext4 -q -F $0 && tune2fs -o nobarrier $0'", 512);
    let image = open(&hidden.file("image", 64));
    assert!(!image.barriers());
    let never = Options { mode: ModeChoice::Filesystem, ..options(image.path()) };
    drop(image);
    let image = try_open(&never).unwrap();
    assert!(!image.barriers() && image.device_fd().is_some(), "no device is open to be flushed");
    drop(image);
    // With barriers the filesystem does it.
    let plain = Disk::mounted("mkfs.ext4 -q -F", 512, "rw");
    let never = Options { path: plain.file("image", 64), ..never };
    assert!(try_open(&never).unwrap().device_fd().is_none());
});

device_test!(btrfs_overlay_and_tmpfs_are_served_through_the_filesystem, {
    let disk = Disk::new("mkfs.btrfs -q -f", 512);
    assert!(reason(&disk.file("image", 16)).starts_with("btrfs does not say"));
    let image = disk.scratch().join("image");
    super::fixture::write_blocks(&image, 0, 16);
    assert!(reason(&image).starts_with("tmpfs does not say"));
    drop(disk);

    let disk = Disk::ext4();
    let base = disk.path();
    let merged = disk.scratch().join("merged");
    for name in ["lower", "upper", "work"] {
        fs::create_dir(base.join(name)).unwrap();
    }
    fs::create_dir(&merged).unwrap();
    let image = base.join("upper/image");
    super::fixture::write_blocks(&image, 0, 16);
    eligible(&image);
    let (base, merged) = (base.display(), merged.display());
    sh(&format!(
        "mount -t overlay o -o lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work {merged}"
    ));
    let through = std::panic::catch_unwind(|| reason(Path::new(&format!("{merged}/image"))));
    let below = std::panic::catch_unwind(|| reason(&image));
    sh(&format!("umount {merged}"));
    assert!(through.unwrap().starts_with("overlay does not say"));
    assert!(below.unwrap().contains("upper directory of the overlay at"));
    eligible(&image);
});

device_test!(an_overlay_that_appears_later_keeps_direct_mode_away, {
    let disk = Disk::ext4();
    let base = disk.path();
    for name in ["lower", "upper", "upper/vm", "work", "merged"] {
        fs::create_dir(base.join(name)).unwrap();
    }
    let path = disk.file("upper/vm/image", 16);
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), JobDone::Enter(Ok(())));
    image.drop_lease();
    let (base, merged) = (base.display(), disk.scratch().join("merged"));
    fs::create_dir(&merged).unwrap();
    sh(&format!(
        "mount -t overlay o -o lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work {}",
        merged.display()
    ));
    let refused = image.run(&Job::Enter);
    let watches = Arc::new(Watches::new().unwrap());
    let watch = image.watch(&watches).unwrap();
    assert_eq!(watch.check().unwrap(), Change::Unchanged);
    // R5a's residue: this shrinks the file, and no lease would have been broken.
    sh(&format!("python3 -c 'import os; os.truncate(\"{}/vm/image\", 4096)'", merged.display()));
    let mut rang = Vec::new();
    watches.hear(|id| rang.push(id)).unwrap();
    let seen = watch.check().unwrap();
    sh(&format!("umount {}", merged.display()));
    assert_eq!(refused, JobDone::Enter(Err(Refusal::Changed)));
    assert!(rang.contains(&watch.id()), "{rang:?}");
    assert_eq!(seen, Change::SizeChanged);
    assert_eq!(image.run(&Job::Enter), JobDone::Enter(Err(Refusal::Changed)));
});

device_test!(data_journalling_is_found_however_it_was_switched_on, {
    let disk = Disk::mounted("mkfs.ext4 -q -F -b 4096", 512, "data=journal");
    assert!(reason(&disk.file("image", 16)).contains("journals file data"));
    drop(disk);

    // As a default of the filesystem: mountinfo does not show it.
    let mkfs = "f() { mkfs.ext4 -q -F $1; tune2fs -o journal_data $1; }; f";
    let disk = Disk::new(mkfs, 512);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts.lines().find(|line| line.contains(disk.path().to_str().unwrap())).unwrap();
    assert!(!line.contains("data=journal"));
    assert!(reason(&disk.file("image", 16)).contains("journals file data"));
    drop(disk);

    // For one file: 0x4000 is FS_JOURNAL_DATA_FL, which chattr sets only with CAP_SYS_RESOURCE.
    let source = tempfile::tempdir_in("/dev/shm").unwrap();
    super::fixture::write_blocks(&source.path().join("image"), 0, 16);
    let mkfs = format!(
        "f() {{ mkfs.ext4 -q -F -b 4096 -d {} $1; debugfs -w -R 'sif image flags 0x84000' $1; }}; f",
        source.path().display()
    );
    let disk = Disk::new(&mkfs, 512);
    assert!(reason(&disk.path().join("image")).contains("data journalling; chattr -j"));
});

device_test!(data_inside_the_inode_is_not_eligible, {
    let disk = Disk::new("mkfs.ext4 -q -F -b 4096 -I 1024 -O inline_data", 512);
    let path = disk.path().join("image");
    fs::write(&path, [7; 512]).unwrap();
    assert!(reason(&path).contains("marked inline; enlarge it"));
});

device_test!(immutable_and_append_only_files_are_not_eligible, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let read_only = Options { read_only: true, ..options(&path) };
    sh(&format!("chattr +i {}", path.display()));
    let message = try_open(&options(&path)).unwrap_err().to_string();
    let image = try_open(&read_only).unwrap();
    let why = image.not_eligible().map(ToString::to_string);
    drop(image);
    sh(&format!("chattr -i {}", path.display()));
    assert!(message.contains("serve it with --read-only"), "{message}");
    assert!(why.unwrap().contains("immutable; chattr -i"));

    // Set while it is served, by something that does not keep it open.
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), JobDone::Enter(Ok(())));
    image.drop_lease();
    sh(&format!("chattr +i {}", path.display()));
    let refused = image.run(&Job::Enter);
    sh(&format!("chattr -i {}", path.display()));
    assert_eq!(refused, JobDone::Enter(Err(Refusal::Changed)));
    assert_eq!(image.run(&Job::Enter), JobDone::Enter(Ok(())));
});

device_test!(swap_space_is_not_eligible, {
    let disk = Disk::ext4();
    let path = disk.file("image", 256);
    sh(&format!("chmod 600 {0}; mkswap -q {0}; swapon {0}", path.display()));
    let why = |read_only| match try_open(&Options { read_only, ..options(&path) }) {
        Ok(image) => image.not_eligible().map(ToString::to_string),
        Err(error) => Some(error.to_string()),
    };
    let (writable, read_only) = (why(false), why(true));
    sh(&format!("swapoff {}", path.display()));
    assert_eq!(read_only.unwrap(), "the file is swap space; swapoff it");
    // Some kernels do not even let it be opened for writing.
    let writable = writable.unwrap();
    assert!(writable.contains("swap space") || writable.contains("opened for writing"));
});

device_test!(realtime_files_of_xfs_are_not_eligible, {
    // A realtime device of its own: another file of the scratch directory.
    let disk = Disk::xfs();
    let backing = disk.scratch().join("realtime");
    sh(&format!("truncate -s 100M {}", backing.display()));
    let device = sh(&format!("losetup -f --show {}", backing.display()));
    let mount = disk.scratch().join("rt");
    fs::create_dir(&mount).unwrap();
    let data = disk.scratch().join("data");
    sh(&format!("truncate -s 400M {}", data.display()));
    let main = sh(&format!("losetup -f --show {}", data.display()));
    let result = std::panic::catch_unwind(|| {
        let mount = mount.display();
        sh(&format!("mkfs.xfs -q -f -r rtdev={device} {main}"));
        sh(&format!("mount -o rtdev={device} {main} {mount}"));
        sh(&format!("xfs_io -f -c 'chattr +t' -c 'pwrite -S 7 0 1M' -c fsync {mount}/image"));
        reason(Path::new(&format!("{mount}/image")))
    });
    let _ = std::process::Command::new("umount").arg(&mount).status();
    sh(&format!("losetup -d {main} {device}"));
    match result {
        Ok(reason) => assert!(reason.contains("realtime"), "{reason}"),
        // Kernels without CONFIG_XFS_RT refuse the mount.
        Err(_) => println!("skipped: no realtime XFS on this kernel"),
    }
});

device_test!(a_lease_others_hold_open_is_no_reason_against_the_image, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let other = fs::File::open(&path).unwrap();
    let image = open(&path);
    assert_eq!(image.start(), Start::Eligible);
    assert_eq!(image.run(&Job::Enter), JobDone::Enter(Err(Refusal::Busy)));
    drop(other);
    assert_eq!(image.run(&Job::Enter), JobDone::Enter(Ok(())));
});
