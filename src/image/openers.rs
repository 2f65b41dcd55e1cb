// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds descriptors that a lease does not count: the access mode 3 of open(2), "for ioctls only",
//! makes its holder neither a reader nor a writer, so that a lease is granted beside it, and
//! FIDEDUPERANGE is content with it (ADR 0008).
//!
//! What cannot be examined counts as such a descriptor. A link in `/proc/PID/fd` tells by its own
//! permissions, which take no ptrace access, whether the descriptor reads or writes; only those
//! that do neither are looked at more closely: by the inode's number and the mount's device, which
//! the kernel tells by itself. No filesystem is asked, which may not answer: any user can have a
//! FUSE file with the image's number.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::thread::{CapabilitySet, capabilities};

use crate::sys::process::share_descriptors;

/// The access mode's bits among the flags of an open file, all set: neither reads nor writes.
const NEITHER: u32 = 3;
/// The permissions of a link in `/proc/PID/fd`: read if its descriptor reads, write if it writes.
const READS_OR_WRITES: u32 = 0o600;
/// init, whatever its name.
const INIT: u32 = 1;
/// kthreadd, which is in the first pid namespace only.
const KTHREADD: u32 = 2;
/// The flag PF_KTHREAD of a task: it has no descriptors.
const KERNEL_THREAD: u32 = 0x20_0000;

/// A search ends within this time: other work waits for the thread that does it, and any user of
/// the host can open descriptors. A million are searched in five seconds.
pub(super) const LIMIT: Duration = Duration::from_secs(10);

/// Why it cannot be told whether there is such a descriptor.
#[derive(thiserror::Error, Debug)]
pub(super) enum Unseen {
    /// In a pid namespace of our own, or behind `hidepid=`.
    #[error("/proc does not show all processes of the host")]
    Processes,
    /// Of a process.
    #[error("process {pid}: {source}")]
    Descriptors {
        /// Its number.
        pid: u32,
        /// The kernel's word.
        source: io::Error,
    },
    /// More than can be searched in the time.
    #[error("there are too many to be searched in {} s", .0.as_secs())]
    TooMany(Duration),
}

/// What is searched for, and how long.
struct Search {
    dev: u64,
    ino: u64,
    until: Instant,
}

/// A process that has the file open without being counted. `last` is looked at before all others:
/// the answer of the time before, or 0.
///
/// # Errors
/// The first thing that could not be examined.
pub(super) fn uncounted(
    dev: u64,
    ino: u64,
    last: u32,
    limit: Duration,
) -> Result<Option<u32>, Unseen> {
    let search = Search { dev, ino, until: Instant::now() + limit };
    if !shows_all_processes() {
        return Err(Unseen::Processes);
    }
    let listed = numbers(Path::new("/proc")).map_err(|_| Unseen::Processes)?;
    for pid in std::iter::once(last).filter(|&pid| pid != 0).chain(listed) {
        match search.process_has(pid) {
            Ok(true) => return Ok(Some(pid)),
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return Err(Unseen::TooMany(limit));
            }
            Err(_) if is_kernel_thread(pid) => {}
            Err(error)
                if pid == INIT
                    && error.kind() == io::ErrorKind::PermissionDenied
                    && may_look_everywhere() => {}
            Err(source) => return Err(Unseen::Descriptors { pid, source }),
        }
    }
    Ok(None)
}

/// Whether `/proc` is that of the first pid namespace, from which all processes can be seen, hides
/// none of them from us (`hidepid=`, ProtectProc=), and has the numbers that we know them by.
fn shows_all_processes() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.is_some_and(|line| line.split_whitespace().count() == 1) && is_kernel_thread(KTHREADD)
}

/// Whether the kernel lets us look into every process, so that only a security module can hide
/// one. Where one hides init, that is taken as it is: there would be no direct mode at all.
fn may_look_everywhere() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_PTRACE))
}

impl Search {
    /// Threads usually share one table of descriptors, but need not.
    fn process_has(&self, pid: u32) -> io::Result<bool> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        if self.table_has(&process)? {
            return Ok(true);
        }
        let tasks = process.join("task");
        for tid in unless_gone(numbers(&tasks))? {
            // Where the kernel does not tell, the table is read, the same one again perhaps.
            let same = tid == pid || share_descriptors(pid, tid).unwrap_or(false);
            if !same && self.table_has(&tasks.join(tid.to_string()))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the file is among the descriptors of a task, whose directory this is.
    fn table_has(&self, task: &Path) -> io::Result<bool> {
        for fd in unless_gone(numbers(&task.join("fd")))? {
            if Instant::now() >= self.until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let link = task.join("fd").join(fd.to_string());
            let mode = unless_gone(fs::symlink_metadata(&link).map(|link| Some(link.mode())))?;
            if mode.is_none_or(|mode| mode & READS_OR_WRITES != 0) {
                continue;
            }
            let info = unless_gone(fs::read(task.join("fdinfo").join(fd.to_string())))?;
            let info = String::from_utf8_lossy(&info);
            if info.is_empty() || access_mode(&info)? != NEITHER {
                continue;
            }
            let ino = inode(&info).ok_or(io::ErrorKind::Unsupported)?;
            if ino == self.ino && self.is_on_device(task, &link, &info)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Search {
    /// Whether a descriptor's file is on the image's device. Its mount tells; a file of a mount that is
    /// gone is asked for what the kernel has cached and nothing else, since its filesystem may be a
    /// FUSE server that does not answer.
    fn is_on_device(&self, task: &Path, link: &Path, info: &str) -> io::Result<bool> {
        let mount = field(info, "mnt_id:").unwrap_or_default();
        let theirs = task.join("mountinfo");
        let device = [Path::new("/proc/self/mountinfo"), &theirs]
            .into_iter()
            .find_map(|list| device_of(mount, &fs::read(list).ok()?));
        let (major, minor) = match device {
            Some(device) => device,
            None => {
                let flags = AtFlags::STATX_DONT_SYNC.union(AtFlags::NO_AUTOMOUNT);
                let file = statx(CWD, link, flags, StatxFlags::empty()).map_err(io::Error::from);
                match unless_gone(file.map(Some))? {
                    Some(file) => (file.stx_dev_major, file.stx_dev_minor),
                    None => return Ok(false),
                }
            }
        };
        Ok((major, minor) == (rustix::fs::major(self.dev), rustix::fs::minor(self.dev)))
    }
}

/// The device of a mount, by its number in a list such as `/proc/self/mountinfo`.
fn device_of(mount: &str, list: &[u8]) -> Option<(u32, u32)> {
    list.split(|byte| *byte == b'\n').find_map(|line| {
        // Its first fields are ASCII; a path behind them need not be.
        let mut fields =
            line.split(|byte| *byte == b' ').map_while(|f| std::str::from_utf8(f).ok());
        if fields.next()? != mount {
            return None;
        }
        let (major, minor) = fields.nth(1)?.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    })
}

/// The entries of a directory that are numbers.
fn numbers(directory: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory)? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(numbers)
}

/// What has ended or was closed meanwhile has nothing open.
fn unless_gone<T: Default>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            Ok(T::default())
        }
        other => other,
    }
}

/// By the flags in `/proc/PID/stat`, the seventh field after the name, which is in parentheses and
/// may have some itself.
fn is_kernel_thread(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let flags = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(6));
    flags
        .and_then(|flags| flags.parse::<u32>().ok())
        .is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

/// From `flags:\t0100003`, in octal, of a file in `/proc/PID/fdinfo`. A descriptor that only names
/// a file (O_PATH) says 0.
fn access_mode(info: &str) -> io::Result<u32> {
    let flags = field(info, "flags:").and_then(|flags| u32::from_str_radix(flags, 8).ok());
    flags.map(|flags| flags & NEITHER).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// From `ino:\t131`, which Linux has since 5.14.
fn inode(info: &str) -> Option<u64> {
    field(info, "ino:")?.parse().ok()
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_access_mode_is_read_from_the_flags() {
        let mode = |info| access_mode(info).ok();
        assert_eq!(mode("pos:\t0\nflags:\t0100003\nmnt_id:\t29\n"), Some(3));
        assert_eq!(mode("pos:\t0\nflags:\t02100002\n"), Some(2));
        assert_eq!(mode("pos:\t0\nflags:\t012000000\n"), Some(0));
        assert_eq!(mode("pos:\t0\n"), None);
        assert_eq!(inode("pos:\t0\nflags:\t0100003\nmnt_id:\t29\nino:\t131\n"), Some(131));
    }

    #[test]
    fn a_mounts_device_is_read_from_the_list_of_mounts() {
        let list =
            b"36 35 98:0 /mnt1 /mnt2 rw - ext3 /dev/root rw\n44 1 0:51 / /\xff - fuse s rw\n";
        assert_eq!(device_of("36", list), Some((98, 0)));
        assert_eq!(device_of("44", list), Some((0, 51)));
        assert_eq!(device_of("98:0", list), None);
        let own = fs::read("/proc/self/mountinfo").unwrap();
        let first = String::from_utf8_lossy(&own).split(' ').next().unwrap().to_owned();
        assert!(device_of(&first, &own).is_some());
    }

    #[test]
    fn only_kernel_threads_are_taken_for_some() {
        assert!(!is_kernel_thread(std::process::id()));
        assert!(!is_kernel_thread(INIT));
        assert!(!is_kernel_thread(0));
    }

    #[test]
    fn a_search_that_takes_too_long_tells_nothing() {
        let search = Search { dev: 0, ino: 0, until: Instant::now() };
        let error = search.process_has(std::process::id()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
