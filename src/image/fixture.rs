// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Filesystems on loop devices, for the tests of this module.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::{pread, pwrite};
use tempfile::TempDir;

use super::aligned::AlignedBuf;
use super::{BorrowedFd, FileRange, Image, ModeChoice, OpenError, Options, Watch, Watches};
use crate::engine::extent::State;
use crate::engine::message::{Job, JobDone, MapAnswer};
use crate::sys::page_cache;

const CHILD: &str = "EXTENTD_TEST_CHILD";

/// A test that needs root and, since it takes leases, a process whose every thread blocks
/// their signal: it runs itself again as a child that inherits the mask.
macro_rules! device_test {
    ($name:ident, $body:block) => {
        #[test]
        fn $name() {
            let name = concat!(module_path!(), "::", stringify!($name));
            crate::image::fixture::isolated(name, || $body);
        }
    };
}
pub(super) use device_test;

pub(super) fn isolated(name: &str, body: impl FnOnce()) {
    let name = name.strip_prefix("extentd::").unwrap();
    if !rustix::process::geteuid().is_root() {
        println!("skipped: not root");
        return;
    }
    if std::env::var(CHILD).as_deref() == Ok(name) {
        return body();
    }
    let _signals = super::block_lease_signals().unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(CHILD, name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    print!("{text}{}", String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success() && text.contains("1 passed"), "{}", child.status);
}

/// Runs a command; panics with what it said if it fails.
pub(super) fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    said
}

/// A mounted filesystem on a loop device on tmpfs. Everything goes when it is dropped.
pub(super) struct Disk {
    dir: TempDir,
    device: String,
}

impl Disk {
    /// `mkfs` is a command without the device, `sector` the device's block size.
    pub(super) fn new(mkfs: &str, sector: u32) -> Self {
        Self::mounted(mkfs, sector, "defaults")
    }

    pub(super) fn mounted(mkfs: &str, sector: u32, options: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("extentd-").tempdir_in("/dev/shm").unwrap();
        let backing = dir.path().join("disk");
        File::create(&backing).unwrap().set_len(400 << 20).unwrap();
        let device = sh(&format!(
            "losetup --direct-io=off --sector-size {sector} -f --show {}",
            backing.display()
        ));
        let disk = Self { dir, device };
        let device = &disk.device;
        fs::create_dir(disk.path()).unwrap();
        // Detached while mounted, the loop device goes with the mount, also if the test is killed.
        let path = disk.path();
        let done = std::panic::catch_unwind(|| {
            sh(&format!("{mkfs} {device} >/dev/null"));
            sh(&format!("mount -o {options} {device} {}", path.display()));
        });
        let _ = Command::new("losetup").args(["-d", device]).status();
        if let Err(panic) = done {
            std::panic::resume_unwind(panic);
        }
        disk
    }

    pub(super) fn ext4() -> Self {
        Self::new("mkfs.ext4 -q -F -b 4096", 512)
    }

    pub(super) fn xfs() -> Self {
        Self::new("mkfs.xfs -q -f", 512)
    }

    /// Where it is mounted.
    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// A scratch directory on tmpfs.
    pub(super) fn scratch(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    /// A file of `blocks` 4 KiB blocks, each full of its number plus one, written through.
    pub(super) fn file(&self, name: &str, blocks: u64) -> PathBuf {
        let path = self.path().join(name);
        write_blocks(&path, 0, blocks);
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let path = self.path();
        let unmounted = Command::new("umount").arg(&path).output();
        if !unmounted.is_ok_and(|output| output.status.success()) {
            let _ = Command::new("umount").arg("-l").arg(&path).output();
        }
    }
}

/// Fills blocks `from..to` of 4 KiB with their numbers plus one.
pub(super) fn write_blocks(path: &Path, from: u64, to: u64) {
    let file = File::options().create(true).truncate(false).write(true).open(path).unwrap();
    for block in from..to {
        let byte = u8::try_from(block % 255).unwrap() + 1;
        file.write_all_at(&[byte; 4096], block * 4096).unwrap();
    }
    file.sync_all().unwrap();
}

pub(super) fn options(path: &Path) -> Options {
    Options {
        path: path.to_owned(),
        read_only: false,
        mode: ModeChoice::Auto,
        offset: 0,
        size_limit: None,
        format_raw: false,
        block_size: 512,
        unmap: true,
    }
}

/// Opens without patience.
pub(super) fn try_open(options: &Options) -> Result<Arc<Image>, OpenError> {
    Image::open_within(options, Duration::ZERO).map(Arc::new)
}

pub(super) fn open(path: &Path) -> Arc<Image> {
    try_open(&options(path)).unwrap()
}

pub(super) const ENTERED: JobDone = JobDone::Enter(Ok(()));
pub(super) const BLOCK: u64 = 4096;

/// A watch of its own on the image.
pub(super) fn watch(image: &Arc<Image>) -> Watch {
    image.watch(&Arc::new(Watches::new().unwrap())).unwrap()
}

pub(super) fn blocks(from: u64, to: u64) -> FileRange {
    FileRange::new(from * BLOCK, to * BLOCK)
}

pub(super) fn map_some(image: &Image, range: FileRange, max_extents: u32) -> MapAnswer {
    match image.run(&Job::Map { range, max_extents }) {
        JobDone::Map(Ok(answer)) => answer,
        other => panic!("{other:?}"),
    }
}

/// States by 4 KiB block, as one letter each.
pub(super) fn picture(image: &Image, range: FileRange) -> String {
    let answer = map_some(image, range, 512);
    assert_eq!(answer.covered, range);
    (range.start / BLOCK..range.end / BLOCK)
        .map(|block| {
            let extent =
                answer.extents.iter().find(|e| e.range.overlaps(&blocks(block, block + 1)));
            match extent.map_or(State::Hole, |extent| extent.state) {
                State::Mapped => 'm',
                State::Hole => '.',
                State::Unwritten => 'u',
                State::Shared => 's',
                State::Opaque => 'o',
            }
        })
        .collect()
}

pub(super) fn read_raw(image: &Image, at: u64) -> Vec<u8> {
    let mut buffer = AlignedBuf::new(4096, 4096);
    assert_eq!(pread(image.device_fd().unwrap(), buffer.bytes_mut(), at).unwrap(), 4096);
    buffer.bytes().to_vec()
}

pub(super) fn write_direct(fd: BorrowedFd<'_>, at: u64, byte: u8) {
    let mut buffer = AlignedBuf::new(4096, 4096);
    buffer.bytes_mut().fill(byte);
    assert_eq!(pwrite(fd, buffer.bytes(), at).unwrap(), 4096);
}

pub(super) fn cached(image: &Image) -> u64 {
    page_cache::pages(image.image_fd(), FileRange::ALL).unwrap().cached
}
