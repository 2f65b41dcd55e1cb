// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Loop devices that detach themselves when nobody uses them any more.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};

use super::command::run;

/// What holds the disk's bytes.
#[derive(Debug, Clone)]
pub enum Backing {
    /// A memfd: as fast as tmpfs and gone with its last user.
    Memory,
    /// An unnamed file on the host's disk, used with direct I/O, so that requests take time.
    HostDisk,
    /// An existing file, used with direct I/O (see [`super::FaultDisk`]).
    File(PathBuf),
    /// An existing file, used through the page cache, as `losetup` does by default.
    Buffered(PathBuf),
}

/// A loop device with autoclear; detached when this and its last mount are gone.
#[derive(Debug)]
pub struct LoopDisk {
    path: PathBuf,
    sector: u32,
    /// Keeps the device attached: autoclear takes it away at its last close.
    _hold: File,
}

impl LoopDisk {
    /// Attaches a disk of `size` bytes with sectors of `sector` (512 or 4096) bytes.
    ///
    /// `size` is ignored for existing files.
    pub fn attach(size: u64, sector: u32, backing: &Backing) -> io::Result<LoopDisk> {
        let (file, direct) = match backing {
            Backing::Memory => {
                (Some(sized(memfd_create("extentd-disk", MemfdFlags::CLOEXEC)?, size)?), false)
            }
            Backing::HostDisk => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                (Some(sized(open("/var/tmp", flags, Mode::RUSR | Mode::WUSR)?, size)?), true)
            }
            Backing::File(_) => (None, true),
            Backing::Buffered(_) => (None, false),
        };
        let source = match (backing, &file) {
            (Backing::File(path) | Backing::Buffered(path), _) => path.clone(),
            (_, Some(file)) => {
                format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
            }
            (_, None) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        let mut args =
            vec!["--find".to_owned(), "--show".to_owned(), format!("--sector-size={sector}")];
        if direct {
            args.push("--direct-io=on".to_owned());
        }
        args.push(source.to_string_lossy().into_owned());
        let path = PathBuf::from(run("losetup", &args)?.trim());
        let hold = File::open(&path)?;
        // With the device held open, detaching only marks it autoclear.
        run("losetup", &[Path::new("-d"), &path])?;
        Ok(LoopDisk { path, sector, _hold: hold })
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The sector size in bytes.
    pub fn sector(&self) -> u32 {
        self.sector
    }

    /// Sectors read and written since the device was attached, as the block layer counts them (512-byte units).
    pub fn sectors_moved(&self) -> io::Result<(u64, u64)> {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat"))?;
        let field =
            |n: usize| stat.split_whitespace().nth(n).and_then(|f| f.parse().ok()).unwrap_or(0);
        Ok((field(2), field(6)))
    }

    /// The device number.
    pub fn number(&self) -> io::Result<u64> {
        Ok(std::fs::metadata(&self.path)?.rdev())
    }
}

fn sized(fd: OwnedFd, size: u64) -> io::Result<File> {
    let file = File::from(fd);
    file.set_len(size)?;
    Ok(file)
}
