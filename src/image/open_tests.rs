// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening: the exact errors, what the guest gets to see, the locks. Each test has a process of its
//! own: a child that another one starts would hold an image's description until it executes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::fixture::{Disk, device_test, open, options, sh, try_open};
use super::*;

/// On tmpfs: nothing here depends on where the file lies.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn file(dir: &tempfile::TempDir, size: u64) -> PathBuf {
    let path = dir.path().join(format!("image-{size}"));
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn error(options: &Options) -> String {
    let message = try_open(options).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

device_test!(what_is_not_an_image_is_refused_with_the_fix, {
    let dir = scratch();
    let path = dir.path();
    assert!(error(&options(&path.join("none"))).contains("no such file; correct the path"));
    assert!(error(&options(path)).contains("is a directory"));
    let fifo = path.join("fifo");
    sh(&format!("mkfifo {}", fifo.display()));
    assert!(error(&options(&fifo)).contains("is a FIFO; an image is"));
    assert!(error(&options("/dev/null".as_ref())).contains("is a character device"));
    assert!(error(&options(&file(&dir, 0))).contains("is empty; give it a size"));
    assert!(error(&options(&file(&dir, 511))).contains("less than one 512-byte block"));
    let large = Options { block_size: 4096, ..options(&file(&dir, 2048)) };
    assert!(error(&large).contains("less than one 4096-byte block"));
    let odd = Options { block_size: 1024, ..options(&file(&dir, 4096)) };
    assert!(error(&odd).contains("use 512 or 4096"));
});

device_test!(offset_and_limit_are_checked_exactly, {
    let dir = scratch();
    let plain = options(&file(&dir, 1 << 20));
    let offset = |offset| Options { offset, ..plain.clone() };
    assert!(error(&offset(513)).contains("--offset 513 is not a multiple of 512; use 512"));
    assert!(error(&offset(1 << 20)).contains("leaves no block of its 1048576 bytes"));
    assert!(error(&offset(u64::MAX - 511)).contains("leaves no block"));
    assert!(error(&Options { block_size: 4096, ..offset(512) }).contains("multiple of 4096"));
    let limit = |limit| Options { size_limit: Some(limit), ..offset(4096) };
    assert!(error(&limit(0)).contains("--size-limit 0 is not a multiple of 512 above 0"));
    assert!(error(&limit(100)).contains("--size-limit 100"));
    let image = try_open(&limit(8192)).unwrap();
    assert_eq!(image.window(), FileRange::new(4096, 12288));
    assert_eq!(image.limits().capacity, 8192);
    drop(image);
    assert_eq!(try_open(&limit(1 << 30)).unwrap().window(), FileRange::new(4096, 1 << 20));
});

device_test!(the_last_bytes_that_are_no_block_stay_hidden, {
    let dir = scratch();
    let path = file(&dir, 10_000);
    assert_eq!(open(&path).limits().capacity, 9728);
    let large = Options { block_size: 4096, ..options(&path) };
    assert_eq!(try_open(&large).unwrap().limits().capacity, 8192);
});

device_test!(other_formats_need_format_raw, {
    let dir = scratch();
    let path = file(&dir, 1 << 20);
    File::options().write(true).open(&path).unwrap().write_all_at(b"QFI\xfb", 0).unwrap();
    let message = error(&options(&path));
    assert!(message.contains("looks like a qcow2 image; convert it"), "{message}");
    assert!(try_open(&Options { format_raw: true, ..options(&path) }).is_ok());
});

device_test!(an_unwritable_file_needs_read_only, {
    let dir = scratch();
    let path = file(&dir, 1 << 20);
    // Root may write whatever the mode says, but not on a read-only mount.
    let mount = dir.path().join("ro");
    fs::create_dir(&mount).unwrap();
    let (from, to) = (path.display(), mount.join("image"));
    File::create(&to).unwrap();
    sh(&format!("mount --bind {from} {0}; mount -o remount,ro,bind {0}", to.display()));
    let message = try_open(&options(&to)).map(|_| ());
    let read_only = try_open(&Options { read_only: true, ..options(&to) }).map(|i| *i.limits());
    sh(&format!("umount {}", to.display()));
    let message = message.unwrap_err().to_string();
    assert!(message.contains("cannot be opened for writing (Read-only file system"), "{message}");
    assert!(read_only.unwrap().read_only);
});

device_test!(a_second_writer_is_locked_out_and_told_the_pid, {
    let dir = scratch();
    let path = file(&dir, 1 << 20);
    let first = open(&path);
    let since = Instant::now();
    let second = Image::open_within(&options(&path), Duration::from_millis(300));
    assert!(matches!(second, Err(OpenError::Locked { .. })));
    assert!(since.elapsed() >= Duration::from_millis(300));
    let reader = Options { read_only: true, ..options(&path) };
    assert!(matches!(try_open(&reader), Err(OpenError::Locked { .. })));
    drop(first);
    let (one, two) = (try_open(&reader).unwrap(), try_open(&reader).unwrap());
    assert!(matches!(try_open(&options(&path)), Err(OpenError::Locked { .. })));
    drop((one, two));
    open(&path);
});

device_test!(qemu_and_extentd_keep_out_of_each_others_images, {
    let dir = scratch();
    let path = file(&dir, 1 << 20);
    let qemu_io = |arguments: &[&str]| {
        Command::new("qemu-io").args(["-f", "raw"]).args(arguments).arg(&path).output()
    };
    let write = ["-c", "write 0 4k"];
    match qemu_io(&write) {
        Ok(output) if output.status.success() => {}
        _ => return println!("skipped: no qemu-io here"),
    }
    let allowed = |arguments: &[&str]| qemu_io(arguments).unwrap().status.success();
    // In QEMU's own words, which its users know.
    let told = |arguments: &[&str], permission: &str| {
        let output = qemu_io(arguments).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(&format!("Failed to get {permission} lock")), "{said}");
        assert!(said.contains("Is another process using the image"), "{said}");
        assert!(!output.status.success());
    };
    let read_only = Options { read_only: true, ..options(&path) };

    let image = open(&path);
    told(&write, "\"write\"");
    // A tool that only reads grants others to write, and may; a guest's disk does not.
    let guest = Command::new("qemu-system-x86_64")
        .args(["-display", "none", "-S", "-drive"])
        .arg(format!("file={},format=raw,if=virtio,readonly=on", path.display()))
        .output();
    if let Ok(guest) = guest {
        let said = String::from_utf8_lossy(&guest.stderr).into_owned();
        assert!(said.contains("Failed to get shared \"write\" lock"), "{said}");
        assert!(said.contains("Is another process using the image"), "{said}");
    }
    assert!(allowed(&["-r", "-U", "-c", "read 0 4k"]), "--force-share must work");
    drop(image);
    let image = try_open(&read_only).unwrap();
    told(&write, "\"write\"");
    assert!(allowed(&["-r", "-c", "read 0 4k"]));
    drop(image);

    let mut child = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its prompt says that it has opened the image.
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 1]).unwrap();
    for options in [options(&path), read_only] {
        let refused = try_open(&options).unwrap_err();
        let named = format!("another process, pid {} (qemu-io), also", child.id());
        assert!(refused.to_string().contains(&named), "{refused}");
        let OpenError::Locked { holder, .. } = refused else { panic!("{refused}") };
        let holder = holder.unwrap();
        assert_eq!((holder.pid, holder.command.as_str()), (child.id(), "qemu-io"));
    }
    drop(child.stdin.take());
    child.wait().unwrap();
    open(&path);

    // A guest that only reads shares the image with one of ours that does.
    let guest = Command::new("qemu-system-x86_64")
        .args(["-display", "none", "-S", "-drive"])
        .arg(format!("file={},format=raw,if=virtio,readonly=on", path.display()))
        .spawn();
    if let Ok(mut guest) = guest {
        let since = Instant::now();
        while !Image::is_locked(&path, false) && since.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let writer = try_open(&options(&path)).map(drop);
        let reader = try_open(&Options { read_only: true, ..options(&path) }).map(drop);
        guest.kill().unwrap();
        guest.wait().unwrap();
        assert!(matches!(writer, Err(OpenError::Locked { .. })));
        reader.unwrap();
    }
});

// flock(2), as crosvm and flock(1) take it: by whom the image is held, and whom we keep out.
device_test!(flock_is_respected_and_taken, {
    let dir = scratch();
    let path = file(&dir, 1 << 20);
    let reader = Options { read_only: true, ..options(&path) };
    for (option, reads) in [("-x", false), ("-s", true)] {
        let mut child = Command::new("flock")
            .arg(option)
            .arg("--no-fork")
            .arg(&path)
            .args(["sh", "-c", "echo; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 1]).unwrap();
        let refused = try_open(&options(&path)).unwrap_err();
        assert!(refused.to_string().contains(&format!("pid {} (", child.id())), "{refused}");
        assert_eq!(try_open(&reader).is_ok(), reads);
        drop(child.stdin.take());
        child.wait().unwrap();
    }
    let taken = |option| {
        let mut flock = Command::new("flock");
        !flock.args(["-n", option]).arg(&path).arg("true").status().unwrap().success()
    };
    let image = open(&path);
    assert!(taken("-s") && taken("-x"));
    drop(image);
    let image = try_open(&reader).unwrap();
    assert!(!taken("-s") && taken("-x"));
    drop(image);
    assert!(!taken("-x"));
});

// A block device is served under a shared flock(2): udev, which takes a shared one to look at a device, is not kept away from
// it, and who partitions it, under an exclusive one, is.
device_test!(a_block_devices_flock_is_shared, {
    let dir = scratch();
    let device = sh(&format!("losetup -f --show {}", file(&dir, 1 << 20).display()));
    let done = std::panic::catch_unwind(|| {
        let taken = |option| {
            let mut flock = Command::new("flock");
            !flock.args(["-n", option, &device, "true"]).status().unwrap().success()
        };
        let udev = File::open(&device).unwrap();
        rustix::fs::flock(&udev, rustix::fs::FlockOperation::LockShared).unwrap();
        let image = open(Path::new(&device));
        assert!(!taken("-s") && taken("-x"));
        drop(image);
        rustix::fs::flock(&udev, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let refused = try_open(&options(Path::new(&device))).unwrap_err();
        assert!(matches!(refused, OpenError::Locked { .. }), "{refused}");
    });
    sh(&format!("losetup -d {device}"));
    done.unwrap();
});

// A lock that is in the way of one part takes none of the others with it.
device_test!(what_is_refused_leaves_no_lock_behind, {
    let dir = scratch();
    let path = file(&dir, 1 << 20);
    let other = File::open(&path).unwrap();
    rustix::fs::flock(&other, rustix::fs::FlockOperation::LockShared).unwrap();
    let waiting = std::thread::spawn({
        let options = options(&path);
        move || Image::open_within(&options, Duration::from_secs(20))
    });
    let listed = || fs::read_to_string("/proc/locks").unwrap();
    let ino = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
    let ours = |text: &str| {
        let file = format!(":{ino} ");
        text.lines().filter(|line| line.contains(&file) && line.contains("OFDLCK")).count()
    };
    std::thread::sleep(Duration::from_millis(300));
    // It is seen before the image is opened; nothing was taken.
    assert_eq!(ours(&listed()), 0);
    drop(other);
    let image = waiting.join().unwrap().unwrap();
    assert!(ours(&listed()) > 0);
    drop(image);
});

device_test!(a_whole_file_lock_as_cloud_hypervisor_takes_it_is_respected, {
    use std::os::fd::AsFd;

    use crate::sys::ofd_lock::{Bytes, Kind, try_lock};
    let dir = scratch();
    let path = file(&dir, 1 << 20);
    let other = File::options().read(true).write(true).open(&path).unwrap();
    let lock = |kind| try_lock(other.as_fd(), kind, Bytes { start: 0, len: 0 }).unwrap();
    let reader = Options { read_only: true, ..options(&path) };
    assert!(lock(Kind::Exclusive));
    assert!(try_open(&options(&path)).is_err() && try_open(&reader).is_err());
    assert!(lock(Kind::Shared));
    assert!(try_open(&options(&path)).is_err() && try_open(&reader).is_ok());
    drop(other);
    let image = open(&path);
    let other = File::options().read(true).write(true).open(&path).unwrap();
    for kind in [Kind::Shared, Kind::Exclusive] {
        assert!(!try_lock(other.as_fd(), kind, Bytes { start: 0, len: 0 }).unwrap());
    }
    drop(image);
});

device_test!(a_second_start_does_not_break_the_lease_of_the_first, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let image = open(&path);
    let signals = block_lease_signals().unwrap();
    use crate::engine::message::{Job, JobDone};
    assert_eq!(image.run(&Job::Enter), JobDone::Enter(Ok(())));
    let second = Image::open_within(&options(&path), Duration::from_millis(200));
    assert!(matches!(second, Err(OpenError::Locked { .. })));
    assert_eq!(signals.next().unwrap(), None);
});

device_test!(a_device_that_moves_4_kib_wants_a_size_in_4_kib, {
    let disk = Disk::new("mkfs.ext4 -q -F -b 4096", 4096);
    let path = disk.file("image", 16);
    let image = open(&path);
    assert_eq!(image.start(), Start::Eligible);
    let geometry = image.geometry();
    assert_eq!((geometry.dev_block, geometry.file_align, geometry.fs_block), (4096, 4096, 4096));
    // On its own, a piece of memory shorter than a block is refused by kernels before 6.18.
    assert_eq!(geometry.mem_align, 4096);
    assert_eq!(image.topology().physical_block, 4096);
    drop(image);
    File::options().write(true).open(&path).unwrap().set_len(65536 + 512).unwrap();
    let message = error(&options(&path));
    assert!(message.contains("truncate -s %4096"), "{message}");
    // What the window leaves out need not be reachable.
    let limited = Options { size_limit: Some(65536), ..options(&path) };
    assert!(try_open(&limited).is_ok());
    sh(&format!("truncate -s %4096 {}", path.display()));
    assert_eq!(open(&path).limits().capacity, 65536 + 4096);
});

device_test!(raw_writes_are_of_whole_blocks_of_the_devices_page_cache, {
    // ext4 caches its device in blocks of its own, XFS in sectors (ADR 0004).
    for (mkfs, write_block) in [("mkfs.ext4 -q -F -b 4096", 4096), ("mkfs.xfs -q -f", 512)] {
        let disk = Disk::new(mkfs, 512);
        let image = open(&disk.file("image", 16));
        let geometry = image.geometry();
        assert_eq!((geometry.write_block, geometry.dev_block), (write_block, 512), "{mkfs}");
        assert!(image.topology().physical_block >= write_block, "{mkfs}");
    }
});

#[test]
fn only_the_devices_own_physical_blocks_begin_where_it_says() {
    let facts = crate::sys::blockdev::DeviceFacts {
        size: 1 << 30,
        logical_block: 512,
        cache_block: 512,
        physical_block: 4096,
        min_io: 4096,
        opt_io: 0,
        alignment_offset: 3584,
    };
    let seen = |write_block, fs_block| {
        let seen = super::open::in_blocks(facts, fs_block, write_block);
        (seen.physical_block, seen.alignment_offset)
    };
    assert_eq!(seen(512, 4096), (4096, 3584));
    assert_eq!(seen(4096, 4096), (4096, 0), "its page cache has blocks as large");
    assert_eq!(seen(512, 1024), (1024, 0), "the filesystem's blocks are smaller");
    assert_eq!(seen(1024, 1024), (1024, 0));
}

device_test!(a_block_device_is_served_unless_somebody_has_it, {
    let disk = Disk::ext4();
    let device = disk.device();
    let message = error(&options(device.as_ref()));
    assert!(message.contains("the device is in use (mounted"), "{message}");
    drop(disk);

    let dir = scratch();
    let backing = file(&dir, 8 << 20);
    let device = sh(&format!("losetup -f --show --sector-size 4096 {}", backing.display()));
    let image = open(device.as_ref());
    let facts = (image.start(), image.is_block_device(), image.limits().capacity);
    let geometry = *image.geometry();
    let second = try_open(&options(device.as_ref())).is_err();
    let device_is_image = image.device_fd().is_some();
    drop(image);
    sh(&format!("losetup -d {device}"));
    assert_eq!(facts, (Start::Identity, true, 8 << 20));
    assert_eq!((geometry.dev_block, geometry.lease_fresh), (4096, None));
    assert!(second && device_is_image);
});
