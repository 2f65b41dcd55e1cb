// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The disks, the filesystem and the images that everything runs on.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use super::guest::{Guest, Wait};
use super::load::{Disk as _, transfer};
use super::native::Native;
use super::subject::{Device, Subject};
use super::workload::{Request, Workload};
use crate::rig::command::context;
use crate::rig::{Daemon, Filesystem, Kind, LoopDisk, Mount, Rig, syscalls};

/// Room for the filesystem's own blocks and for small images.
const MARGIN: u64 = 1 << 30;
/// Bytes of the image that discards make holes into: written anew for each run, so not the whole size.
const DISCARDED: u64 = 256 << 20;

/// The programs compared.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    /// The extentd under test.
    pub(super) extentd: PathBuf,
    /// The other one.
    pub(super) against: Option<PathBuf>,
}

/// An image and its size in bytes.
#[derive(Debug, Clone)]
pub(super) struct Image {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Bytes.
    pub(super) size: u64,
}

/// All of it, taken away when dropped.
#[derive(Debug)]
pub(super) struct Ground {
    programs: Programs,
    image: Image,
    sockets: PathBuf,
    filesystem: Filesystem,
    /// A disk of the same kind without a filesystem, so that writing to it straight is allowed.
    bare: LoopDisk,
    _tracing: Option<Mount>,
    rig: Rig,
}

impl Ground {
    /// Makes the disks, the filesystem and an image of `size` bytes, all fully written.
    pub(super) fn make(programs: Programs, device: Device, size: u64) -> io::Result<Ground> {
        let rig = Rig::enter()
            .ok_or_else(|| io::Error::other("run the bench as root: it needs loop devices"))?;
        let backing = device.backing();
        let mount = rig.dir("fs")?;
        let filesystem = Filesystem::make(Kind::Ext4, 2 * size + MARGIN, 512, &backing, &mount)?;
        let image = Image { path: filesystem.path().join("image"), size };
        fill(&image.path, true, size)?;
        // While metadata of the filesystem waits to be written, each direct read of its disk looks for dirty pages in the way.
        filesystem.sync()?;
        let bare = LoopDisk::attach(size, 512, &backing)?;
        fill(bare.path(), false, size)?;
        let sockets = rig.dir("sockets")?;
        let tracing = tracing();
        Ok(Ground { programs, image, sockets, filesystem, bare, _tracing: tracing, rig })
    }

    /// The image that is fully written and stays so.
    pub(super) fn image(&self) -> &Image {
        &self.image
    }

    /// The disk without a filesystem; as large as the image.
    pub(super) fn bare(&self) -> &Path {
        self.bare.path()
    }

    /// The directory for sockets and logs.
    pub(super) fn sockets(&self) -> &Path {
        &self.sockets
    }

    /// The filesystem the images are on.
    pub(super) fn filesystem(&self) -> &Filesystem {
        &self.filesystem
    }

    /// The rig, for directories of its own.
    pub(super) fn rig(&self) -> &Rig {
        &self.rig
    }

    /// The extentd under test.
    pub(super) fn program(&self) -> &Path {
        &self.programs.extentd
    }

    /// The image for a run of `workload`: made for it, if it is one that spoils its image.
    pub(super) fn image_for(&self, workload: Workload) -> io::Result<Image> {
        if !workload.needs_scratch() {
            return Ok(self.image.clone());
        }
        let path = self.filesystem.path().join("scratch");
        if path.exists() {
            std::fs::remove_file(&path)?;
        }
        let size = if workload.sparse { self.image.size } else { DISCARDED.min(self.image.size) };
        if workload.sparse {
            File::create_new(&path)?.set_len(size)?;
        } else {
            fill(&path, true, size)?;
        }
        // What the removal leaves to do is not the next run's business.
        self.filesystem.sync()?;
        Ok(Image { path, size })
    }

    /// Starts the server of `subject` on `image`; there may be none.
    pub(super) fn start(
        &self,
        subject: Subject,
        image: &Path,
        queues: u16,
    ) -> io::Result<Option<Daemon>> {
        self.start_in(subject, image, queues, &self.sockets)
    }

    /// The same with the sockets and the log in `directory`.
    pub(super) fn start_in(
        &self,
        subject: Subject,
        image: &Path,
        queues: u16,
        directory: &Path,
    ) -> io::Result<Option<Daemon>> {
        let start = |program: &Path, options: &[&str]| {
            Daemon::start(program, directory, image, options).map(Some)
        };
        match (subject, &self.programs.against) {
            (Subject::ExtentdDirect, _) => start(&self.programs.extentd, &[]),
            (Subject::ExtentdFilesystem, _) => {
                start(&self.programs.extentd, &["--mode", "filesystem"])
            }
            (Subject::ExtentdAgainst, Some(program)) => start(program, &[]),
            (Subject::ExtentdAgainst, None) => {
                Err(io::Error::other("the subject extentd-against needs --against"))
            }
            (Subject::QemuStorageDaemon, _) => {
                Daemon::start_peer(directory, image, queues).map(Some)
            }
            (Subject::NativeDevice | Subject::NativeFile, _) => Ok(None),
        }
    }

    /// A guest with a little I/O behind it.
    pub(super) fn connect_and_use(&self, server: &Daemon, wait: Wait) -> io::Result<Guest> {
        let mut guest = Guest::connect(server.socket(), Workload::READ_32, wait)?;
        let mut done = Vec::new();
        for slot in 0..8 {
            guest.queue(slot, Request::Read(u64::from(slot) << 12))?;
        }
        guest.submit()?;
        while done.len() < 8 {
            guest.reap(&mut done)?;
        }
        Ok(guest)
    }
}

/// System calls are counted with the kernel's tracepoints, whose numbers are found in a filesystem that is not mounted
/// everywhere.
fn tracing() -> Option<Mount> {
    syscalls::tracing().unwrap_or_else(|error| {
        eprintln!("system calls are not counted: {error}");
        None
    })
}

/// Writes `size` bytes, whole MiB, durably and past the page cache: random ones, the same few MiB over and over.
pub(super) fn fill(path: &Path, create: bool, size: u64) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(create)
        .open(path)
        .map_err(context(path.display()))?;
    if create {
        fallocate(&file, FallocateFlags::empty(), 0, size)?;
    }
    let workload = Workload::WRITE_ALL;
    let mut disk = Native::open(path, workload, Wait::Event)?;
    transfer(&mut disk, workload, size, size / u64::from(workload.block))?;
    file.sync_all()
}
