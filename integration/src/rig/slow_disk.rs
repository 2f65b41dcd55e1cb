// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk whose requests can be delayed, held and failed while it runs.
//!
//! A FUSE filesystem of one file, served in parallel from this process and meant to lie under a loop device with direct I/O:
//! each of the device's requests arrives here, a device flush as an fsync.
//! A delayed write reaches the bytes at the *end* of its delay, as on a slow disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fuser::{BackgroundSession, Config, MountOption, Session};
use rustix::fs::{MemfdFlags, memfd_create};

use super::command::{context, run, spawn};
use super::slow_disk_fs::{NAME, SlowFs};
use super::slow_disk_rules::Rules;
pub use super::slow_disk_rules::{Counts, Operation, Rule};

const FUSECTL: &str = "/sys/fs/fuse/connections";

/// One file of the given size, `path()`, with its rules.
///
/// Drop everything above it (mounts, loop devices) first. Dropping it lifts all rules, unmounts, and if that does not end,
/// aborts the connection, so that nothing can stay wedged; so does a watchdog process when this process dies.
#[derive(Debug)]
pub struct SlowDisk {
    rules: Arc<Rules>,
    mountpoint: PathBuf,
    abort: PathBuf,
    session: Option<BackgroundSession>,
    watchdog: Child,
}

impl SlowDisk {
    /// Serves a file of `size` zero bytes under `mountpoint`, an existing directory.
    pub fn mount(size: u64, mountpoint: &Path) -> io::Result<SlowDisk> {
        let bytes = File::from(memfd_create("slow-disk", MemfdFlags::CLOEXEC)?);
        bytes.set_len(size)?;
        let rules = Arc::new(Rules::default());
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("slow-disk".to_owned()), MountOption::RW];
        config.n_threads = Some(2);
        let filesystem = SlowFs::new(Arc::new(bytes), size, Arc::clone(&rules));
        let session = Session::new(filesystem, mountpoint, &config)
            .map_err(context("mounting the slow disk"))?;
        let session = session.spawn()?;
        let abort = connection(mountpoint)?.join("abort");
        let watchdog = watch(&abort)?;
        Ok(SlowDisk {
            rules,
            mountpoint: mountpoint.into(),
            abort,
            session: Some(session),
            watchdog,
        })
    }

    /// The one file.
    pub fn path(&self) -> PathBuf {
        self.mountpoint.join(NAME)
    }

    /// Adds a rule; the oldest that matches a request decides.
    pub fn add(&self, rule: Rule) {
        self.rules.add(rule);
    }

    /// Lifts all rules and lets held requests go on.
    pub fn heal(&self) {
        self.rules.clear();
    }

    /// What has been asked of the disk so far.
    pub fn counts(&self) -> Counts {
        self.rules.counts()
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        self.rules.clear();
        if let Some(session) = self.session.take() {
            let ended = thread::spawn(move || session.umount_and_join());
            let limit = Duration::from_secs(5);
            let joined = super::wait::until("unmounting the slow disk", limit, || {
                ended.is_finished().then_some(())
            });
            let result = match joined {
                Ok(()) => ended.join().unwrap_or_else(|_| Err(io::Error::other("panicked"))),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                eprintln!("slow disk: {error}; aborting it");
                if let Err(error) = std::fs::write(&self.abort, "1").and_then(|()| {
                    run("umount", &[Path::new("--lazy"), &self.mountpoint]).map(drop)
                }) {
                    eprintln!("slow disk: {error}");
                }
            }
        }
        if let Err(error) = self.watchdog.kill().and_then(|()| self.watchdog.wait()) {
            eprintln!("slow disk's watchdog: {error}");
        }
    }
}

/// The control directory of the connection mounted at `mountpoint`.
fn connection(mountpoint: &Path) -> io::Result<PathBuf> {
    let control = Path::new(FUSECTL);
    let number = rustix::fs::minor(std::fs::metadata(mountpoint)?.dev());
    let directory = control.join(number.to_string());
    if !directory.exists() {
        run("mount", &["-t", "fusectl", "none", FUSECTL])?;
    }
    Ok(directory)
}

/// Starts a process that aborts the connection once this process is dead or a zombie.
///
/// A killed test cannot be served by its own threads any more while another of its threads sits in a request to them, and
/// that thread keeps `/dev/fuse` open: without the abort both would stay for ever.
fn watch(abort: &Path) -> io::Result<Child> {
    let script = r#"while read -r _ _ state _ < "/proc/$1/stat" && [ "$state" != Z ]; do sleep 0.5; done 2>/dev/null
        echo 1 > "$2""#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "watchdog", &std::process::id().to_string()]).arg(abort);
    spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))
}
