// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is compared, and on what.

use std::io;

use clap::ValueEnum;

use crate::rig::Backing;
use crate::rig::command::{context, run};

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

    /// Whether there is a server process.
    pub(super) fn has_server(self) -> bool {
        !matches!(self, Subject::NativeDevice | Subject::NativeFile)
    }

    /// Whether it is an extentd.
    pub(super) fn is_extentd(self) -> bool {
        self.has_server() && self != Subject::QemuStorageDaemon
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

    /// What the rig makes it of.
    pub(super) fn backing(self) -> Backing {
        match self {
            Device::TmpfsLoop => Backing::Memory,
            Device::DiskLoop => Backing::HostDisk,
        }
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
