// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What others on the host do to an image and its filesystem, and what they see of it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use serde_json::Value;

use super::command::{context, run};
use super::daemon::Daemon;
use super::wait::{PATIENCE, until};

/// Bytes of disk a file takes, as `du` counts. Does not open it.
pub fn allocated(path: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

/// Writes a file's pages back and empties the page cache of it. Opens it.
pub fn settle(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// Opens `path` for reading on another thread, which waits for the lease on it; how long, or an error after `limit`.
pub fn get_in(path: &Path, limit: Duration) -> io::Result<Duration> {
    let (send, receive) = mpsc::channel();
    let path = path.to_owned();
    let start = Instant::now();
    thread::spawn(move || {
        drop(send.send(File::open(&path).map(|_| start.elapsed())));
    });
    receive.recv_timeout(limit).unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("a reader waits for over {limit:?}")))
    })
}

/// The mtime of `path` once it has not changed for the time `calm`. Does not open it.
pub fn still(path: &Path, calm: Duration) -> io::Result<SystemTime> {
    let mtime = || std::fs::metadata(path)?.modified();
    let (mut seen, mut since) = (mtime()?, Instant::now());
    until("an mtime that stays", PATIENCE, || match mtime() {
        Ok(now) if now != seen => {
            (seen, since) = (now, Instant::now());
            None
        }
        Ok(_) if since.elapsed() < calm => None,
        done => Some(done),
    })?
}

/// The states of `range` of the image that `daemon` serves, in order, as its map says; asked with the program `extentctl`.
pub fn states(daemon: &Daemon, extentctl: &str, range: &Range<u64>) -> io::Result<Vec<String>> {
    let args =
        ["map".as_ref(), "--json".as_ref(), "-c".as_ref(), daemon.control_path().as_os_str()];
    let text = run(extentctl, &args)?;
    let map: Value = serde_json::from_str(&text).map_err(context("extentctl map"))?;
    let mut states = Vec::new();
    for run in map.get("extents").and_then(Value::as_array).into_iter().flatten() {
        let number = |key| run.get(key).and_then(Value::as_u64).unwrap_or(0);
        let (start, end) = (number("logical"), number("logical") + number("length"));
        let state = run.get("state").and_then(Value::as_str).unwrap_or_default();
        let within = start < range.end && range.start < end;
        if within && states.last().is_none_or(|last| last != state) {
            states.push(state.to_owned());
        }
    }
    Ok(states)
}

/// A file that takes all the space there is, until it is dropped.
#[derive(Debug)]
pub struct Filler(PathBuf);

impl Filler {
    /// Fills the filesystem of the directory `dir`.
    pub fn new(dir: &Path) -> io::Result<Filler> {
        let path = dir.join("filler");
        let file = File::create(&path)?;
        let filler = Filler(path);
        let (mut offset, mut piece) = (0, statvfs(dir)?.f_bavail * 4096);
        while piece >= 4096 {
            // A little is sometimes found again once the allocations so far are on disk.
            match fallocate(&file, FallocateFlags::empty(), offset, piece) {
                Ok(()) => offset += piece,
                Err(_) => piece = piece / 2 / 4096 * 4096,
            }
        }
        file.sync_all()?;
        Ok(filler)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let freed = std::fs::remove_file(&self.0)
            .and_then(|()| run("sync", &["-f".as_ref(), self.0.parent().unwrap_or(&self.0)]));
        if let Err(error) = freed {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

/// A frozen filesystem, thawed when this is dropped.
#[derive(Debug)]
pub struct Frozen(PathBuf);

impl Frozen {
    /// Freezes the filesystem mounted at `path`.
    pub fn new(path: &Path) -> io::Result<Frozen> {
        run("fsfreeze", &[Path::new("--freeze"), path])?;
        Ok(Frozen(path.into()))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Err(error) = run("fsfreeze", &[Path::new("--unfreeze"), &self.0]) {
            eprintln!("{error}");
        }
    }
}
