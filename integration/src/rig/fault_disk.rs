// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk with a volatile write cache, whose requests can be delayed, held and failed, and whose power can be cut, while it runs.
//!
//! A FUSE filesystem of one file, served in parallel from this process and meant to lie under a loop device with direct I/O:
//! each of the device's requests arrives here, a device flush as an fsync.
//! A delayed write reaches the bytes at the *end* of its delay, as on a fault disk.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fuser::{BackgroundSession, Config, MountOption, Session};

use super::command::{context, run, spawn};
use super::fault_disk_fs::{FaultFs, NAME};
pub use super::fault_disk_platter::{Event, Loss, Piece, Platter};
use super::fault_disk_power::Power;
pub use super::fault_disk_power::{Cut, Log, When};
use super::fault_disk_rules::Rules;
pub use super::fault_disk_rules::{Counts, Operation, Rule};

const FUSECTL: &str = "/sys/fs/fuse/connections";

/// One file of the given size, `path()`, with its rules.
///
/// Drop everything above it (mounts, loop devices) first. Dropping it lifts all rules, unmounts, and if that does not end,
/// aborts the connection, so that nothing can stay wedged; so does a watchdog process when this process dies.
#[derive(Debug)]
pub struct FaultDisk {
    rules: Arc<Rules>,
    power: Arc<Power>,
    mountpoint: PathBuf,
    abort: PathBuf,
    session: Option<BackgroundSession>,
    watchdog: Child,
}

impl FaultDisk {
    /// Serves a file of `size` zero bytes under `mountpoint`, an existing directory.
    pub fn mount(size: u64, mountpoint: &Path) -> io::Result<FaultDisk> {
        let rules = Arc::new(Rules::default());
        let bytes = usize::try_from(size).map_err(io::Error::other)?;
        let power = Arc::new(Power::new(bytes, Arc::clone(&rules)));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("fault-disk".to_owned()), MountOption::RW];
        config.n_threads = Some(2);
        let filesystem = FaultFs::new(Arc::clone(&power), size, Arc::clone(&rules));
        let session = Session::new(filesystem, mountpoint, &config)
            .map_err(context("mounting the fault disk"))?;
        let session = session.spawn()?;
        let abort = connection(mountpoint)?.join("abort");
        let watchdog = watch(&abort)?;
        Ok(FaultDisk {
            rules,
            power,
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

    /// Puts `pattern` all over the medium, to be recognised where nothing should be seen. Nothing may use the disk yet.
    pub fn fill(&self, pattern: &[u8]) {
        self.power.fill(pattern);
    }

    /// Cuts the power now.
    pub fn cut(&self, loss: Loss, seed: u64) {
        self.power.cut(loss, seed);
    }

    /// Has the power cut between two requests to come.
    pub fn arm(&self, cut: Cut) {
        self.power.arm(cut);
    }

    /// Waits for an armed cut; false when `limit` passes first.
    pub fn await_cut(&self, limit: Duration) -> bool {
        self.power.await_cut(limit)
    }

    /// Gives the power back.
    pub fn power_on(&self) {
        self.power.on();
    }

    /// Whether there is power.
    pub fn has_power(&self) -> bool {
        self.power.is_on()
    }

    /// Begins a new log of what changes the disk, of at most `limit` bytes: the oldest goes first.
    pub fn record(&self, limit: usize) {
        self.power.record(limit);
    }

    /// The log since [`FaultDisk::record`], which ends here.
    pub fn take_log(&self) -> Log {
        self.power.take_log()
    }

    /// A copy of the disk as it is, its cache included.
    pub fn platter(&self) -> Platter {
        self.power.platter()
    }

    /// What has been asked of the disk so far.
    pub fn counts(&self) -> Counts {
        self.rules.counts()
    }
}

impl Drop for FaultDisk {
    fn drop(&mut self) {
        self.rules.clear();
        if let Some(session) = self.session.take() {
            let ended = thread::spawn(move || session.umount_and_join());
            let joined =
                super::wait::until("unmounting the fault disk", super::wait::PATIENCE, || {
                    ended.is_finished().then_some(())
                });
            let result = match joined {
                Ok(()) => ended.join().unwrap_or_else(|_| Err(io::Error::other("panicked"))),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                eprintln!("fault disk: {error}; aborting it");
                if let Err(error) = std::fs::write(&self.abort, "1").and_then(|()| {
                    run("umount", &[Path::new("--lazy"), &self.mountpoint]).map(drop)
                }) {
                    eprintln!("fault disk: {error}");
                }
            }
        }
        if let Err(error) = self.watchdog.kill().and_then(|()| self.watchdog.wait()) {
            eprintln!("fault disk's watchdog: {error}");
        }
    }
}

/// The control directory of the connection mounted at `mountpoint`.
pub(super) fn connection(mountpoint: &Path) -> io::Result<PathBuf> {
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
