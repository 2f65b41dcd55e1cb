// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ways to change a file's layout that can be tried here (ADR 0008): which lease each breaks,
//! and whether the file's bytes lie elsewhere afterwards. A way that moves them without a break is
//! a hole in R1.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use super::fixture::{Disk, blocks, device_test, open, options, picture, sh, try_open};
use super::*;
use crate::engine::message::{Job, JobDone, Refusal};
use crate::sys::fiemap::MAX_EXTENTS;

/// Blocks of the file.
const BLOCKS: u64 = 64;
/// The access mode for ioctls only.
const NEITHER: u32 = 3;

/// What a way does to a lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Breaks {
    Nothing,
    /// One that keeps everybody out.
    Write,
    Both,
}

/// A way: what it is called, the access mode it opens the file with, what it does then (in Perl:
/// `$f` is the file, `$t` another one of the same bytes that is open for reading and writing, `$r`
/// one open for reading), what it breaks, whether bytes move.
type Way = (&'static str, u32, &'static str, Breaks, bool);

const DEDUPE: &str = "my $b = pack('QQSSLqQQlL', 0, 262144, 1, 0, 0, fileno($f), 0, 0, 0, 0); \
    ioctl($r, 0xC0189436, $b)";
const DEDUPE_FROM: &str = "my $b = pack('QQSSLqQQlL', 0, 262144, 1, 0, 0, fileno($t), 0, 0, 0, 0); \
    ioctl($f, 0xC0189436, $b)";
const CLONE: &str = "ioctl($f, 0x40049409, fileno($r))";
const CLONE_FROM: &str = "ioctl($t, 0x40049409, fileno($f))";
/// fallocate(2) has this number on x86-64.
const PUNCH: &str = "syscall(285, fileno($f), 3, 0, 65536)";
const MOVE: &str = "my $b = pack('LLQQQQ', 0, fileno($t), 0, 0, 16, 0); ioctl($f, 0xC028660F, $b)";
const EXCHANGE: &str =
    "my $b = pack('llQQQQ', fileno($t), 0, 0, 0, 65536, 0); ioctl($f, 0x40285881, $b)";
const IMMUTABLE: &str = "my $b = pack('Q', 0); ioctl($f, 0x80086601, $b); \
    $b = pack('Q', unpack('L', $b) | 16); ioctl($f, 0x40086602, $b)";

const R: u32 = 0;
const RW: u32 = 2;

const EVERYWHERE: &[Way] = &[
    ("an open for reading", R, "", Breaks::Write, false),
    ("an open for reading and writing", RW, "", Breaks::Both, false),
    ("an open for ioctls", NEITHER, "", Breaks::Both, false),
    ("truncate by path", u32::MAX, "truncate($ARGV[0], 4096)", Breaks::Both, true),
    ("a change of mode by path", u32::MAX, "chmod 0600, $ARGV[0]", Breaks::Nothing, false),
    ("FIBMAP", R, "my $b = pack('L', 0); ioctl($f, 1, $b)", Breaks::Write, false),
    ("fallocate without the right to write", R, PUNCH, Breaks::Write, false),
    ("fallocate", RW, PUNCH, Breaks::Both, true),
    ("FS_IOC_SETFLAGS", R, IMMUTABLE, Breaks::Write, false),
];

const XFS: &[Way] = &[
    ("FIDEDUPERANGE to it", R, DEDUPE, Breaks::Write, true),
    ("FIDEDUPERANGE from it", R, DEDUPE_FROM, Breaks::Write, false),
    ("FICLONE to it without the right to write", R, CLONE, Breaks::Write, false),
    ("FICLONE to it", RW, CLONE, Breaks::Both, true),
    ("FICLONE from it", R, CLONE_FROM, Breaks::Write, false),
    ("EXCHANGE_RANGE without the right to write", R, EXCHANGE, Breaks::Write, false),
];

const EXT4: &[Way] = &[
    ("FIDEDUPERANGE to it", R, DEDUPE, Breaks::Write, false),
    ("MOVE_EXT without the right to write", R, MOVE, Breaks::Write, false),
    ("MOVE_EXT", RW, MOVE, Breaks::Both, true),
    ("SWAP_BOOT without the right to write", R, "ioctl($f, 0x6611, 0)", Breaks::Write, false),
    ("MIGRATE", R, "ioctl($f, 0x6609, 0)", Breaks::Write, false),
    ("ALLOC_DA_BLKS", R, "ioctl($f, 0x660c, 0)", Breaks::Write, false),
];

/// Which of them an open from before the lease lets do, that no lease counts.
const UNCOUNTED: &[(&str, bool)] =
    &[(DEDUPE, true), (CLONE, false), (PUNCH, false), (MOVE, false), (EXCHANGE, false)];

/// Where the file's blocks lie.
fn places(image: &Image) -> Vec<(FileRange, u64)> {
    let all = blocks(0, BLOCKS);
    let (extents, _) = image.fiemap(all, MAX_EXTENTS).unwrap();
    extents.iter().map(|extent| (extent.range, extent.device.0)).collect()
}

/// Perl that opens `$f`, `$t` and `$r`, says so, waits for a line if there is one to come, and does
/// what it is told.
fn outsider(image: &Path, mode: u32, act: &str, waits: bool) -> std::process::Child {
    let open = if mode == u32::MAX {
        String::new()
    } else {
        format!("sysopen(my $f, $ARGV[0], {mode}) or die; ")
    };
    let wait = if waits { "<STDIN>;" } else { "" };
    let script = format!(
        "$| = 1; sysopen(my $t, $ARGV[1], 2) or die; sysopen(my $r, $ARGV[1], 0) or die; \
         {open}print 'x'; {wait} {act};"
    );
    Command::new("perl")
        .args(["-e", &script])
        .arg(image)
        .arg(image.with_extension("twin"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Serves breaks until the child has ended; whether there was one.
fn serve(image: &Image, signals: &LeaseSignals, child: &mut std::process::Child) -> bool {
    let (since, mut broken) = (Instant::now(), false);
    loop {
        let ended = child.try_wait().unwrap().is_some();
        while signals.next().unwrap().is_some() {
            broken = true;
            image.drop_lease();
        }
        if ended {
            return broken;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "an outsider that does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A new image and its twin.
fn twins(disk: &Disk) -> std::path::PathBuf {
    let path = disk.path().join("image");
    sh(&format!(
        "cd {}; chattr -i image 2>/dev/null || true; rm -f image image.twin",
        disk.path().display()
    ));
    disk.file("image", BLOCKS);
    disk.file("image.twin", BLOCKS);
    path
}

fn each_way(disk: &Disk, ways: &[Way]) {
    let signals = block_lease_signals().unwrap();
    for (name, mode, act, breaks, moves) in ways {
        for kind in [lease::Kind::Read, lease::Kind::Write] {
            let path = twins(disk);
            let image = try_open(&Options { read_only: true, ..options(&path) }).unwrap();
            let before = places(&image);
            lease::take(image.image_fd(), kind, lease_signal()).unwrap();
            let mut child = outsider(&path, *mode, act, false);
            let broken = serve(&image, &signals, &mut child);
            let expected = match breaks {
                Breaks::Nothing => false,
                Breaks::Write => kind == lease::Kind::Write,
                Breaks::Both => true,
            };
            assert_eq!(broken, expected, "{name} breaks a {kind:?} lease");
            assert_eq!(places(&image) != before, *moves, "{name} moves blocks");
        }
    }
}

device_test!(what_each_way_does_on_xfs, {
    let disk = Disk::xfs();
    each_way(&disk, EVERYWHERE);
    each_way(&disk, XFS);
});

device_test!(what_each_way_does_on_ext4, {
    let disk = Disk::ext4();
    each_way(&disk, EVERYWHERE);
    each_way(&disk, EXT4);
});

// A descriptor that no lease counts can do one thing that moves blocks, and only where files share
// them; there it is found.
device_test!(what_an_uncounted_descriptor_does, {
    for (disk, shares) in [(Disk::xfs(), true), (Disk::ext4(), false)] {
        let signals = block_lease_signals().unwrap();
        for (act, moves) in UNCOUNTED {
            let path = twins(&disk);
            let mut child = outsider(&path, NEITHER, act, true);
            std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 1]).unwrap();
            let image = open(&path);
            assert_eq!(image.shares_blocks, shares);
            let entered = image.run(&Job::Enter);
            let expected = if shares { Err(Refusal::Busy) } else { Ok(()) };
            assert_eq!(entered, JobDone::Enter(expected), "{act}");
            // The kernel grants it all the same.
            lease::take(image.image_fd(), lease::Kind::Write, lease_signal()).unwrap();
            let before = places(&image);
            drop(child.stdin.take());
            assert!(!serve(&image, &signals, &mut child), "{act} breaks a lease");
            assert_eq!(places(&image) != before, *moves && shares, "{act}");
        }
    }
});

// Flags that can be set without an open, or by one that is not counted: what has become another
// kind of file is not mapped.
device_test!(a_file_whose_flags_change_is_mapped_no_more, {
    for disk in [Disk::ext4(), Disk::xfs()] {
        let image = open(&disk.file("image", BLOCKS));
        assert_eq!(image.run(&Job::Enter), JobDone::Enter(Ok(())));
        assert_eq!(picture(&image, blocks(0, 2)), "mm");
        // Through our own descriptor, which breaks no lease of ours either.
        let flags = ioctl_getflags(image.image_fd()).unwrap();
        ioctl_setflags(image.image_fd(), flags | IFlags::IMMUTABLE).unwrap();
        let map = Job::Map { range: blocks(0, 2), max_extents: 8 };
        assert_eq!(image.run(&map), JobDone::Map(Err(libc::EIO)));
        // One that was never to be served raw is shown all the same, to `extentctl map` for one.
        let reader = Options { read_only: true, ..options(image.path()) };
        drop(image);
        let shown = try_open(&reader).unwrap();
        assert_eq!(shown.start(), Start::Filesystem);
        assert_eq!(picture(&shown, blocks(0, 2)), "mm");
        drop(shown);
        sh(&format!("chattr -i {}", reader.path.display()));
        let image = open(&reader.path);
        assert_eq!(image.run(&Job::Enter), JobDone::Enter(Ok(())));
        assert_eq!(picture(&image, blocks(0, 2)), "mm");
        assert!(image.has_lease());
    }
});
