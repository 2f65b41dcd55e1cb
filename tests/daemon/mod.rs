// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A running extentd with its directory; both go when the test ends, however it ends.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

pub(crate) const EXTENTD: &str = env!("CARGO_BIN_EXE_extentd");
pub(crate) const EXTENTCTL: &str = env!("CARGO_BIN_EXE_extentctl");

/// Longer than anything waited for here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A directory of the test's own.
#[derive(Clone)]
pub(crate) struct Scratch(Rc<tempfile::TempDir>);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(Rc::new(tempfile::tempdir().unwrap()))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// An image of 1 MiB.
    pub(crate) fn image(&self) -> PathBuf {
        let path = self.path("image");
        if !path.exists() {
            fs::write(&path, vec![1; 1 << 20]).unwrap();
        }
        path
    }
}

/// Waits until `done`.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) struct Daemon {
    child: Child,
    scratch: Scratch,
    image: PathBuf,
    socket: PathBuf,
    control: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts one in a new directory, in filesystem mode, and waits for its sockets.
    pub(crate) fn start(options: &[&str]) -> Self {
        Self::start_in(&Scratch::new(), options)
    }

    /// Starts one in this directory.
    pub(crate) fn start_in(scratch: &Scratch, options: &[&str]) -> Self {
        let (socket, control) = (scratch.path("s"), scratch.path("c"));
        let control_option = format!("--control-path={}", control.display());
        let options = [&[control_option.as_str(), "--mode=filesystem"], options].concat();
        let mut daemon = Self::run(scratch, &scratch.image(), &socket, &options);
        daemon.control = control;
        // The mode is logged when everything is in place.
        wait_for("the start", || {
            let exited = daemon.child.try_wait().unwrap();
            assert!(exited.is_none(), "{}", daemon.log());
            daemon.log().contains("mode=")
        });
        daemon
    }

    /// Starts one and waits for nothing.
    pub(crate) fn spawn(image: &Path, socket: &Path, options: &[&str]) -> Self {
        Self::run(&Scratch::new(), image, socket, options)
    }

    fn run(scratch: &Scratch, image: &Path, socket: &Path, options: &[&str]) -> Self {
        let log = scratch.path(&format!("log-{}", fs::read_dir(scratch.path("")).unwrap().count()));
        let child = Command::new(EXTENTD)
            .arg("--blk-file")
            .arg(image)
            .arg("--socket-path")
            .arg(socket)
            .args(options)
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self {
            child,
            scratch: scratch.clone(),
            image: image.to_owned(),
            socket: socket.to_owned(),
            control: PathBuf::new(),
            log,
        }
    }

    /// Starts one that inherits a socket as descriptor 3: with `--fd 3`, or as systemd would.
    pub(crate) fn inherit(scratch: &Scratch, socket: OwnedFd, how: &str) -> Self {
        let log = scratch.path("log-inherit");
        let image = scratch.image();
        let (variables, option) = match how {
            "LISTEN_FDS" => ("LISTEN_PID=$$ LISTEN_FDS=1", ""),
            option => ("", option),
        };
        let script = format!(
            "{variables} exec \"$0\" --blk-file \"$1\" --mode=filesystem {option} 3<&0 </dev/null"
        );
        let child = Command::new("/bin/sh")
            .args(["-c", &script, EXTENTD])
            .arg(&image)
            .stdin(socket)
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let scratch = scratch.clone();
        Self { child, scratch, image, socket: PathBuf::new(), control: PathBuf::new(), log }
    }

    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn control(&self) -> &Path {
        &self.control
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Sends SIGTERM and waits; the exit status.
    pub(crate) fn terminate(&mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.wait()
    }

    /// Waits for its end; the exit status.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        wait_for("the end", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap().code()
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
