// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A test's place to stand: its directory, its mount namespace and its turn.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tempfile::TempDir;

use super::command::run;

/// Held shared by every test and exclusively by one that changes a sysctl.
const TURN: &str = "/tmp/.extentd-rig.lock";

thread_local! {
    /// A thread enters a mount namespace of its own once; later rigs on it share that one.
    static PRIVATE: Cell<bool> = const { Cell::new(false) };
}

/// A temporary directory in a mount namespace of the calling thread.
///
/// Processes and threads started from this thread share the namespace; whatever is still mounted when the last of them ends
/// is unmounted by the kernel.
#[derive(Debug)]
pub struct Rig {
    dir: TempDir,
    _turn: File,
}

impl Rig {
    /// Enters for a test that may run beside others; `None`, after saying so, when this is not root.
    pub fn enter() -> Option<Rig> {
        Rig::with_turn(FlockOperation::LockShared)
    }

    /// Enters for a test that changes a setting of the whole machine: no other rig is in use meanwhile.
    pub fn alone() -> Option<Rig> {
        Rig::with_turn(FlockOperation::LockExclusive)
    }

    fn with_turn(turn: FlockOperation) -> Option<Rig> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root: loop devices and mounts are needed");
            return None;
        }
        match Rig::build(turn) {
            Ok(rig) => Some(rig),
            Err(error) => fail(&error),
        }
    }

    fn build(turn: FlockOperation) -> io::Result<Rig> {
        let lock =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(TURN)?;
        flock(&lock, turn)?;
        private_mounts()?;
        Ok(Rig { dir: tempfile::Builder::new().prefix("extentd-").tempdir()?, _turn: lock })
    }

    /// The directory itself, removed with the rig.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A new directory under [`Rig::path`].
    pub fn dir(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.dir.path().join(name);
        std::fs::create_dir(&path)?;
        Ok(path)
    }
}

/// A rig that cannot be built is a failed test, not a skipped one.
#[expect(clippy::panic, reason = "this is how a test fails")]
fn fail(error: &io::Error) -> ! {
    panic!("the rig cannot be built: {error}")
}

fn private_mounts() -> io::Result<()> {
    if PRIVATE.get() {
        return Ok(());
    }
    // SAFETY: only NEWNS is unshared (the kernel adds FS: this thread's working directory and umask); no descriptor table is
    // split, which is what makes the call unsafe.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    // Slave, not private: when others unmount theirs in the outer namespace our copies go too, ours never reach them.
    run("mount", &["--make-rslave", "/"])?;
    PRIVATE.set(true);
    Ok(())
}

/// A kernel setting changed for as long as this lives.
#[derive(Debug)]
pub struct Sysctl {
    path: PathBuf,
    before: String,
}

impl Sysctl {
    /// Writes `value` to `path`, a file under /proc/sys. The rig must be [`Rig::alone`].
    pub fn set(path: &str, value: &str) -> io::Result<Sysctl> {
        let before = std::fs::read_to_string(path)?;
        std::fs::write(path, value)?;
        Ok(Sysctl { path: path.into(), before })
    }

    /// Lets the daemons of this user watch enough images: each watches its own, and 128 such watches are the kernel's
    /// default. Having more disturbs nobody, so this is no reason to be alone.
    pub fn more_watches() -> io::Result<Option<Sysctl>> {
        const WATCHES: &str = "/proc/sys/fs/inotify/max_user_instances";
        const ENOUGH: u32 = 1024;
        let now = std::fs::read_to_string(WATCHES)?.trim().parse().unwrap_or(0_u32);
        if now >= ENOUGH { Ok(None) } else { Self::set(WATCHES, &ENOUGH.to_string()).map(Some) }
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(&self.path, self.before.trim()) {
            eprintln!("{}: not restored to {}: {error}", self.path.display(), self.before.trim());
        }
    }
}
