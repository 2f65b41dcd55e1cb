// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Filesystems on loop disks, and the other mounts tests need.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use super::command::run;
use super::disk::{Backing, LoopDisk};
use super::wait::{self, PATIENCE};

/// A filesystem type with the options a test is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ext2, 4 KiB blocks, no journal, no extents.
    Ext2,
    /// ext2, 1 KiB blocks: smaller than a page.
    Ext2Small,
    /// ext3, 4 KiB blocks, journal, no extents.
    Ext3,
    /// ext4, 4 KiB blocks.
    Ext4,
    /// ext4, 1 KiB blocks: smaller than a page.
    Ext4Small,
    /// XFS that cannot share extents.
    Xfs,
    /// XFS with reflink, its default.
    XfsReflink,
    /// btrfs: FIEMAP's addresses are not the device's.
    Btrfs,
}

impl Kind {
    /// Whether direct mode is to be had on it.
    pub fn eligible(self) -> bool {
        self != Kind::Btrfs
    }

    /// The filesystem's block size in bytes.
    pub fn block(self) -> u64 {
        if matches!(self, Kind::Ext2Small | Kind::Ext4Small) { 1024 } else { 4096 }
    }

    /// What files on it are written, and punched, in multiples of (ADR 0010).
    pub fn unit(self) -> u64 {
        self.block().max(4096)
    }

    /// Whether mkfs allows it on sectors of `sector` bytes.
    pub fn fits_sector(self, sector: u32) -> bool {
        u64::from(sector) <= self.block()
    }

    /// Makes one on `device`.
    pub fn format(self, device: &Path) -> io::Result<()> {
        // Without it the kernel goes on writing inode tables for a while after the first mount.
        const AT_ONCE: &str = "lazy_itable_init=0,lazy_journal_init=0";
        let (program, args): (&str, &[&str]) = match self {
            Kind::Ext2 => ("mkfs.ext2", &["-q", "-F", "-b", "4096", "-m", "0"]),
            Kind::Ext2Small => ("mkfs.ext2", &["-q", "-F", "-b", "1024", "-m", "0"]),
            Kind::Ext3 => ("mkfs.ext3", &["-q", "-F", "-b", "4096", "-m", "0"]),
            Kind::Ext4 => ("mkfs.ext4", &["-q", "-F", "-b", "4096", "-m", "0", "-E", AT_ONCE]),
            Kind::Ext4Small => ("mkfs.ext4", &["-q", "-F", "-b", "1024", "-m", "0"]),
            Kind::Xfs => ("mkfs.xfs", &["-q", "-f", "-m", "reflink=0"]),
            Kind::XfsReflink => ("mkfs.xfs", &["-q", "-f", "-m", "reflink=1"]),
            Kind::Btrfs => ("mkfs.btrfs", &["-q", "-f"]),
        };
        let mut all: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        all.push(device.as_os_str());
        run(program, &all).map(drop)
    }

    /// Has its fsck look for damage on `device`, which is not mounted, without repairing any.
    pub fn check(self, device: &Path) -> io::Result<()> {
        let (program, args): (&str, &[&str]) = match self {
            Kind::Ext2 | Kind::Ext2Small | Kind::Ext3 | Kind::Ext4 | Kind::Ext4Small => {
                ("e2fsck", &["-f", "-n"])
            }
            Kind::Xfs | Kind::XfsReflink => ("xfs_repair", &["-n"]),
            Kind::Btrfs => ("btrfs", &["check", "--readonly"]),
        };
        let mut all: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        all.push(device.as_os_str());
        run(program, &all).map(drop)
    }
}

/// A mounted directory, unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    target: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Mounts `device` on `target`, which must exist.
    pub fn device(device: &Path, target: &Path) -> io::Result<Mount> {
        Mount::with_options(device, target, "defaults")
    }

    /// The same with mount options.
    pub fn with_options(device: &Path, target: &Path, options: &str) -> io::Result<Mount> {
        run("mount", &["-o".as_ref(), options.as_ref(), device.as_os_str(), target.as_os_str()])?;
        Ok(Mount { target: target.into(), mounted: true })
    }

    /// A tmpfs.
    pub fn tmpfs(target: &Path) -> io::Result<Mount> {
        Mount::of_kind("tmpfs", target)
    }

    /// A ramfs: it has neither direct I/O nor `fallocate`.
    pub fn ramfs(target: &Path) -> io::Result<Mount> {
        Mount::of_kind("ramfs", target)
    }

    /// A filesystem of type `kind` that needs no device.
    pub fn of_kind(kind: &str, target: &Path) -> io::Result<Mount> {
        let none = Path::new("none");
        run("mount", &[Path::new("-t"), Path::new(kind), none, target])?;
        Ok(Mount { target: target.into(), mounted: true })
    }

    /// Another name for what is at `source`, a file or a directory.
    pub fn bind(source: &Path, target: &Path) -> io::Result<Mount> {
        run("mount", &[Path::new("--bind"), source, target])?;
        Ok(Mount { target: target.into(), mounted: true })
    }

    /// An overlay of `upper` (with its `work` directory, on the same filesystem) over `lower`.
    pub fn overlay(lower: &Path, upper: &Path, work: &Path, target: &Path) -> io::Result<Mount> {
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let target_name = target.as_os_str();
        run(
            "mount",
            &[
                "-t".as_ref(),
                "overlay".as_ref(),
                "-o".as_ref(),
                options.as_ref(),
                "none".as_ref(),
                target_name,
            ],
        )?;
        Ok(Mount { target: target.into(), mounted: true })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.target
    }

    /// Unmounts it now.
    pub fn unmount(&mut self) -> io::Result<()> {
        // A process that has just been killed may need a moment to let go of its files.
        let mut last = None;
        let done = wait::until("umount", PATIENCE, || match run("umount", &[&self.target]) {
            Ok(_) => Some(()),
            Err(error) => {
                last = Some(error);
                None
            }
        });
        done.map_err(|_| last.unwrap_or_else(|| io::ErrorKind::TimedOut.into()))?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.mounted {
            return;
        }
        if let Err(error) = self.unmount() {
            eprintln!("{error}; detaching it");
            if let Err(error) = run("umount", &[Path::new("--lazy"), &self.target]) {
                eprintln!("{error}");
            }
        }
    }
}

/// A formatted, mounted loop disk.
#[derive(Debug)]
pub struct Filesystem {
    kind: Kind,
    mount: Option<Mount>,
    disk: LoopDisk,
}

impl Filesystem {
    /// Formats a new disk of `size` bytes and mounts it on `target`, which must exist.
    pub fn make(
        kind: Kind,
        size: u64,
        sector: u32,
        backing: &Backing,
        target: &Path,
    ) -> io::Result<Filesystem> {
        let disk = LoopDisk::attach(size, sector, backing)?;
        kind.format(disk.path())?;
        let mount = Mount::device(disk.path(), target)?;
        Ok(Filesystem { kind, mount: Some(mount), disk })
    }

    /// The filesystem type.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.mount.as_ref().map_or(Path::new(""), Mount::path)
    }

    /// Writes everything that waits for it to its disk: syncfs(2).
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(std::fs::File::open(self.path())?)?)
    }

    /// Its disk.
    pub fn disk(&self) -> &LoopDisk {
        &self.disk
    }

    /// Unmounts it and has its own fsck look for damage, without repairing any.
    pub fn check(mut self) -> io::Result<()> {
        if let Some(mut mount) = self.mount.take() {
            mount.unmount()?;
        }
        self.kind.check(self.disk.path())
    }
}
