// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host's page cache holds of an image after a guest has written to it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use extentd::engine::units::FileRange;
use extentd::sys::page_cache::pages;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::Serialize;

use crate::bench::ground::Ground;
use crate::bench::guest::Guest;
use crate::bench::load::transfer;
use crate::bench::measure::on_client_thread;
use crate::bench::subject::Subject;
use crate::bench::workload::{Access, Order, Workload};
use crate::rig::command::context;

/// Bytes written.
const WRITTEN: u64 = 2 << 30;
const BLOCK: u32 = 128 << 10;

/// The page cache after 2 GiB of guest writes.
#[derive(Debug, Clone, Copy, Serialize)]
pub(in crate::bench) struct CacheRow {
    /// The subject's name.
    pub(in crate::bench) subject: &'static str,
    /// Bytes the guest wrote.
    pub(in crate::bench) written_bytes: u64,
    /// Pages of the image, in KiB.
    pub(in crate::bench) image_kib: u64,
    /// Pages of the block device below the filesystem, in KiB: how many more than before.
    pub(in crate::bench) device_kib: u64,
}

/// Writes through `subject` and looks; `None` if it has no server.
pub(in crate::bench) fn page_cache(
    ground: &Ground,
    subject: Subject,
) -> io::Result<Option<CacheRow>> {
    let image = ground.image();
    let Some(mut server) = ground.start(subject, &image.path, 1)? else { return Ok(None) };
    let device = File::open(ground.filesystem().disk().path())?;
    let device_before = kib(&device)?;
    let workload = Workload {
        order: Order::Sequential,
        block: BLOCK,
        stride: BLOCK,
        ..Workload::random(Access::Write, 8, 1)
    };
    on_client_thread(|| {
        let mut guest = Guest::connect(server.socket(), workload, crate::bench::guest::Wait::Poll)?;
        transfer(&mut guest, workload, image.size, WRITTEN / u64::from(BLOCK))
    })?;
    let row = CacheRow {
        subject: subject.name(),
        written_bytes: WRITTEN,
        image_kib: kib(&servers_own(server.pid(), &image.path)?)?,
        device_kib: kib(&device)?.saturating_sub(device_before),
    };
    server.sigterm()?;
    Ok(Some(row))
}

/// The server's own open image: to open it once more would break the lease, and change what is looked at.
fn servers_own(pid: u32, image: &Path) -> io::Result<OwnedFd> {
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = pidfd_open(process.ok_or(io::ErrorKind::InvalidInput)?, PidfdFlags::empty())?;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let leads_there = std::fs::read_link(entry.path()).is_ok_and(|target| target == image);
        if let (Some(number), true) = (number, leads_there) {
            return pidfd_getfd(&process, number, PidfdGetfdFlags::empty())
                .map_err(context(image.display()));
        }
    }
    Err(io::Error::other(format!("the server has not opened {}", image.display())))
}

/// KiB in the page cache; pages are of 4 KiB on the machines we run on.
fn kib(file: &impl AsFd) -> io::Result<u64> {
    Ok(pages(file.as_fd(), FileRange::ALL)?.cached * 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn pages_are_counted_through_another_processs_descriptor() {
        let mut file = tempfile::Builder::new().tempfile_in("/var/tmp").unwrap();
        file.write_all(&[7; 256 << 10]).unwrap();
        let own = servers_own(std::process::id(), file.path()).unwrap();
        assert_eq!(kib(&own).unwrap(), 256);
        file.as_file().sync_all().unwrap();
        rustix::fs::fadvise(file.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert_eq!(kib(&own).unwrap(), 0);
        assert!(servers_own(std::process::id(), Path::new("/nonexistent")).is_err());
    }
}
