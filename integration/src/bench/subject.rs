// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is compared, on what, and one measured run of it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use clap::ValueEnum;

use super::guest::{Guest, Wait};
use super::load::{self, Disk, Sample, Timing, Workload};
use super::native::Native;
use super::syscalls::Counter;
use crate::rig::command::{context, run};
use crate::rig::{Backing, Daemon, Filesystem, Kind, LoopDisk, Random, Rig, Status};

/// Microseconds of a clock tick in /proc: the kernel reports hundredths of a second on every architecture we run on.
const TICK_US: f64 = 10_000.0;
/// The oldest peer that is a fair comparison.
const PEER_MAJOR: u32 = 10;

/// One of the things compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Subject {
    /// extentd with its default options, in direct mode.
    ExtentdDirect,
    /// The extentd of `--against`, as the first.
    ExtentdAgainst,
    /// extentd with `--mode filesystem`.
    ExtentdFilesystem,
    /// QEMU's own vhost-user-blk server, O_DIRECT and io_uring.
    QemuStorageDaemon,
    /// An io_uring on a block device, no server.
    NativeDevice,
    /// An io_uring on the image file, no server.
    NativeFile,
}

impl Subject {
    /// Its name in the report.
    pub(super) fn name(self) -> &'static str {
        match self {
            Subject::ExtentdDirect => "extentd-direct",
            Subject::ExtentdAgainst => "extentd-against",
            Subject::ExtentdFilesystem => "extentd-filesystem",
            Subject::QemuStorageDaemon => "qemu-storage-daemon",
            Subject::NativeDevice => "native-device",
            Subject::NativeFile => "native-file",
        }
    }
}

/// What holds the disk's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Device {
    /// A loop device over memory: as fast as it gets, so that software is what is measured.
    TmpfsLoop,
    /// A loop device over a file on the host's disk, direct I/O.
    DiskLoop,
}

impl Device {
    /// Its name in the report.
    pub(super) fn name(self) -> &'static str {
        match self {
            Device::TmpfsLoop => "tmpfs-loop",
            Device::DiskLoop => "disk-loop",
        }
    }

    fn backing(self) -> Backing {
        match self {
            Device::TmpfsLoop => Backing::Memory,
            Device::DiskLoop => Backing::HostDisk,
        }
    }
}

/// The disks and the image everything runs on, taken away when dropped.
#[derive(Debug)]
pub(super) struct Bed {
    program: PathBuf,
    against: Option<PathBuf>,
    image: PathBuf,
    size: u64,
    sockets: PathBuf,
    filesystem: Filesystem,
    /// A disk of the same kind without a filesystem, so that writing to it straight is allowed.
    bare: LoopDisk,
    _rig: Rig,
}

/// What one run of one subject came to. What a subject without a server does not have is `None`.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    /// The client's figures.
    pub(super) sample: Sample,
    /// Server CPU time (user and system) per request in microseconds.
    pub(super) cpu_us_per_io: Option<f64>,
    /// Server CPU time over wall time, in percent of one CPU.
    pub(super) busy_percent: Option<f64>,
    /// The most memory the server ever had resident.
    pub(super) peak_rss_kib: Option<u64>,
    /// The share of the data segments that went straight to the device (extentd only).
    pub(super) direct_share: Option<f64>,
}

impl Bed {
    /// Makes the disks, the filesystem and an image of `size` bytes, all fully written.
    ///
    /// `against` is the other extentd to measure, if there is one.
    pub(super) fn make(
        program: &Path,
        against: Option<&Path>,
        device: Device,
        size: u64,
    ) -> io::Result<Bed> {
        let rig = Rig::enter()
            .ok_or_else(|| io::Error::other("run the bench as root: it needs loop devices"))?;
        let backing = device.backing();
        let mount = rig.dir("fs")?;
        let filesystem = Filesystem::make(Kind::Ext4, size + (256 << 20), 512, &backing, &mount)?;
        let image = filesystem.path().join("image");
        fill(&image, true, size)?;
        let bare = LoopDisk::attach(size, 512, &backing)?;
        fill(bare.path(), false, size)?;
        let sockets = rig.dir("sockets")?;
        let (program, against) = (program.into(), against.map(Path::to_owned));
        Ok(Bed { program, against, image, size, sockets, filesystem, bare, _rig: rig })
    }

    /// The directory for sockets and logs.
    pub(super) fn sockets(&self) -> &Path {
        &self.sockets
    }

    /// The directory of the filesystem the image is on.
    pub(super) fn directory(&self) -> &Path {
        self.filesystem.path()
    }

    /// The extentd under test.
    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// Starts the server of `subject` on the image.
    pub(super) fn start(&self, subject: Subject) -> io::Result<Option<Daemon>> {
        let start = |program: &Path, options: &[&str]| {
            Daemon::start(program, &self.sockets, &self.image, options).map(Some)
        };
        match subject {
            Subject::ExtentdDirect => start(&self.program, &[]),
            Subject::ExtentdAgainst => match &self.against {
                Some(program) => start(program, &[]),
                None => Err(io::Error::other("the subject extentd-against needs --against")),
            },
            Subject::ExtentdFilesystem => start(&self.program, &["--mode", "filesystem"]),
            Subject::QemuStorageDaemon => {
                Daemon::start_peer(&self.sockets, &self.image, 1).map(Some)
            }
            Subject::NativeDevice | Subject::NativeFile => Ok(None),
        }
    }

    /// Starts `subject`, runs `workload` on it, ends it.
    pub(super) fn measure(
        &self,
        subject: Subject,
        workload: Workload,
        timing: Timing,
        wait: Wait,
    ) -> io::Result<Outcome> {
        let Some(mut server) = self.start(subject)? else {
            let path = if subject == Subject::NativeFile { &self.image } else { self.bare.path() };
            let sample = on_own_thread(|| {
                load::run(&mut Native::open(path, wait)?, workload, timing, self.size, || Ok(()))
            })?;
            return Ok(Outcome { sample, ..Outcome::default() });
        };
        let before = modes(subject, &server)?;
        let mut ticks = Vec::new();
        let sample = self.drive(&server, workload, timing, wait, || {
            ticks.push(server.cpu_ticks()?);
            Ok(())
        })?;
        let direct_share = match (before, modes(subject, &server)?) {
            (Some(before), Some(after)) => Some(direct_share(&before, &after)),
            _ => None,
        };
        let peak_rss_kib = peak_rss_kib(server.pid());
        server.sigterm()?;
        let cpu_us = match ticks.as_slice() {
            [start, end] => end.saturating_sub(*start) as f64 * TICK_US,
            _ => 0.0,
        };
        Ok(Outcome {
            cpu_us_per_io: Some(cpu_us / sample.requests.max(1) as f64),
            busy_percent: Some(cpu_us / sample.seconds / 1e4),
            peak_rss_kib,
            direct_share,
            sample,
        })
    }

    /// The server's system calls per request, where they can be counted.
    pub(super) fn syscalls_per_io(
        &self,
        subject: Subject,
        workload: Workload,
        timing: Timing,
        wait: Wait,
    ) -> io::Result<Option<f64>> {
        let Some(mut server) = self.start(subject)? else { return Ok(None) };
        let mut counter = None;
        let mut calls = None;
        let sample = self.drive(&server, workload, timing, wait, || {
            match &counter {
                None => counter = Counter::start(server.pid()),
                Some(counter) => calls = Some(counter.read()?),
            }
            Ok(())
        })?;
        server.sigterm()?;
        Ok(calls.map(|calls| calls as f64 / sample.requests.max(1) as f64))
    }

    fn drive(
        &self,
        server: &Daemon,
        workload: Workload,
        timing: Timing,
        wait: Wait,
        mark: impl FnMut() -> io::Result<()> + Send,
    ) -> io::Result<Sample> {
        let sample = on_own_thread(|| {
            let mut guest = Guest::connect(server.socket(), wait)?;
            load::run(&mut guest, workload, timing, self.size, mark)
        });
        sample.map_err(|error| {
            io::Error::new(error.kind(), format!("{error}; the server's log: {}", server.log()))
        })
    }

    /// A guest with a little I/O behind it.
    pub(super) fn connect_and_use(&self, server: &Daemon, wait: Wait) -> io::Result<Guest> {
        let mut guest = Guest::connect(server.socket(), wait)?;
        let mut done = Vec::new();
        for slot in 0..8 {
            guest.queue(slot, false, u64::from(slot) << 20)?;
        }
        guest.submit()?;
        while done.len() < 8 {
            guest.reap(&mut done)?;
        }
        Ok(guest)
    }
}

/// The version of qemu-storage-daemon; refuses one that would be an unfair comparison.
pub(super) fn peer_version() -> io::Result<String> {
    let text = run("qemu-storage-daemon", &["--version"])
        .map_err(context("the peer is missing (Debian: qemu-system-common 10 from backports)"))?;
    let line = text.lines().next().unwrap_or_default().to_owned();
    let version = line.split("version ").nth(1).unwrap_or_default();
    let major = version.split('.').next().and_then(|v| v.parse::<u32>().ok()).unwrap_or(0);
    if major < PEER_MAJOR {
        return Err(io::Error::other(format!(
            "{line} is too old to compare with: install {PEER_MAJOR}.0 or newer, for example from Debian's backports"
        )));
    }
    Ok(version.to_owned())
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|_| Err(io::Error::other("the client panicked")))
}

/// Writes `size` random bytes, durably, and leaves nothing of them in the page cache.
fn fill(path: &Path, create: bool, size: u64) -> io::Result<()> {
    let file: File = OpenOptions::new().write(true).create_new(create).open(path)?;
    let mut random = Random::new(size);
    let mut piece = vec![0; 1 << 20];
    for offset in (0..size).step_by(piece.len()) {
        random.fill(&mut piece);
        let len = usize::try_from(size - offset).unwrap_or(usize::MAX).min(piece.len());
        file.write_all_at(piece.get(..len).unwrap_or_default(), offset)?;
    }
    file.sync_all()?;
    Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
}

fn modes(subject: Subject, server: &Daemon) -> io::Result<Option<Status>> {
    match subject {
        Subject::ExtentdDirect | Subject::ExtentdAgainst | Subject::ExtentdFilesystem => {
            server.status().map(Some)
        }
        Subject::QemuStorageDaemon | Subject::NativeDevice | Subject::NativeFile => Ok(None),
    }
}

/// The direct share of the segments between two states, 0 if either was not in direct mode.
fn direct_share(before: &Status, after: &Status) -> f64 {
    let since = |path: &str| after.number(path).saturating_sub(before.number(path)) as f64;
    let direct = since("segments/direct");
    let all = direct + since("segments/file") + since("segments/zero");
    if before.direct() && after.direct() && all > 0.0 { direct / all } else { 0.0 }
}

fn peak_rss_kib(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}
