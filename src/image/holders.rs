// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds the processes whose locks keep us waiting, as far as `/proc` shows them.
//!
//! The kernel names no process for byte locks of a description (F_OFD_GETLK and `/proc/locks` say
//! -1): those are looked for among the open files of all processes.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

/// A process that holds a lock we want.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// Its number in our namespace.
    pub pid: u32,
    /// Its name, as the kernel has it: 15 bytes at most.
    pub command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.command)
    }
}

impl Holder {
    fn of(pid: u32) -> Option<Self> {
        // Gone, then.
        let command = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        // It may call itself what it likes, and this is going to be a line.
        let command = command.trim_end().replace(char::is_control, "?");
        Some(Self { pid, command })
    }
}

/// What kind of lock it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// flock(2).
    Flock,
    /// Byte locks, of a process or of a description.
    Bytes {
        /// First byte.
        start: u64,
        /// Last byte.
        end: u64,
    },
    /// F_SETLEASE.
    Lease,
}

/// A lock as `/proc/locks` and `/proc/PID/fdinfo` list it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Listed {
    pub(super) class: Class,
    pub(super) exclusive: bool,
    /// Whose, if the kernel says so.
    pid: Option<u32>,
}

/// The locks on this file in such a list, those that are only waited for left out.
pub(super) fn listed(text: &str, dev: u64, ino: u64) -> impl Iterator<Item = Listed> {
    let file = format!("{:02x}:{:02x}:{ino}", major(dev), minor(dev));
    text.lines().filter_map(move |line| {
        // "1: OFDLCK ADVISORY  WRITE -1 fe:00:10019010 0 99"; fdinfo puts "lock:" in front.
        let line = line.strip_prefix("lock:").unwrap_or(line);
        let mut fields = line.split_whitespace().skip(1);
        let class = fields.next()?;
        let kind = fields.nth(1)?;
        let (pid, place) = (fields.next()?, fields.next()?);
        let (start, end) = (fields.next()?, fields.next()?);
        let class = match class {
            "OFDLCK" | "POSIX" => Class::Bytes {
                start: start.parse().unwrap_or(0),
                end: end.parse().unwrap_or(u64::MAX),
            },
            "FLOCK" => Class::Flock,
            "LEASE" => Class::Lease,
            _ => return None,
        };
        let pid = pid.parse().ok().filter(|&pid| pid != 0);
        (place == file).then_some(Listed { class, exclusive: kind == "WRITE", pid })
    })
}

/// A process that holds one of the locks on this file for which `in_the_way` is true.
pub(super) fn find(dev: u64, ino: u64, in_the_way: impl Fn(&Listed) -> bool) -> Option<Holder> {
    let text = fs::read_to_string("/proc/locks").unwrap_or_default();
    let blocking: Vec<Listed> = listed(&text, dev, ino).filter(|lock| in_the_way(lock)).collect();
    let named = blocking.iter().filter_map(|lock| lock.pid).find_map(Holder::of);
    if named.is_some() || blocking.is_empty() {
        return named;
    }
    let own = std::process::id();
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|&pid| pid != own)
        .find(|&pid| holds(pid, dev, ino, &in_the_way))
        .and_then(Holder::of)
}

/// Whether one of its descriptors of this file carries such a lock.
fn holds(pid: u32, dev: u64, ino: u64, in_the_way: &impl Fn(&Listed) -> bool) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files.flatten().any(|file| {
        // Only files with a path have such locks, and each names its file. No filesystem is asked for
        // one: it may not answer.
        let is_path = |link: PathBuf| link.as_os_str().as_encoded_bytes().starts_with(b"/");
        fs::read_link(file.path()).is_ok_and(is_path) && {
            let info =
                Path::new("/proc").join(pid.to_string()).join("fdinfo").join(file.file_name());
            let info = fs::read_to_string(info).unwrap_or_default();
            let locks: Vec<&str> = info.lines().filter(|line| line.starts_with("lock:")).collect();
            listed(&locks.join("\n"), dev, ino).any(|lock| in_the_way(&lock))
        }
    })
}
