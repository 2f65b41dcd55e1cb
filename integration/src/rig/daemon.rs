// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A running server: extentd, or qemu-storage-daemon as its peer.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::command::{context, spawn};
use super::wait::{self, PATIENCE};

/// A server process, killed when dropped; it dies with the thread that started it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    control: PathBuf,
    log: PathBuf,
    log_start: u64,
    ended: Option<ExitStatus>,
}

impl Daemon {
    /// Starts the extentd at `program` for `image` with its sockets and log in `dir`, and waits for the socket.
    ///
    /// When it ends instead, the error is what it said.
    pub fn start(program: &Path, dir: &Path, image: &Path, options: &[&str]) -> io::Result<Daemon> {
        Daemon::start_as(program, &[], dir, image, options)
    }

    /// The same, for a program that becomes extentd when its first arguments are `role`.
    pub fn start_as(
        program: &Path,
        role: &[&str],
        dir: &Path,
        image: &Path,
        options: &[&str],
    ) -> io::Result<Daemon> {
        let (socket, control) = (dir.join("blk.sock"), dir.join("ctl.sock"));
        let mut args: Vec<OsString> = role.iter().map(OsString::from).collect();
        args.extend(["--blk-file".into(), image.into()]);
        args.extend(["--socket-path".into(), socket.clone().into()]);
        args.extend(["--control-path".into(), control.clone().into()]);
        args.extend(options.iter().map(OsString::from));
        Daemon::spawn(program, &args, dir, socket, control)
    }

    /// Starts the extentd at `program` for the devices of the file `config`, and waits for `socket`, which is to be the
    /// one of a device that answers at `control`.
    pub fn start_config(
        program: &Path,
        dir: &Path,
        config: &Path,
        socket: PathBuf,
        control: PathBuf,
    ) -> io::Result<Daemon> {
        Daemon::spawn(program, &["--config".into(), config.into()], dir, socket, control)
    }

    /// Starts qemu-storage-daemon for `image`, to try a rig, or to compare with.
    pub fn start_peer(dir: &Path, image: &Path, queues: u16) -> io::Result<Daemon> {
        let socket = dir.join("blk.sock");
        let blockdev = format!(
            "driver=file,filename={},node-name=n,cache.direct=on,aio=io_uring,discard=unmap",
            image.display()
        );
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            socket.display()
        );
        let args = ["--blockdev".into(), blockdev.into(), "--export".into(), export.into()];
        Daemon::spawn(Path::new("qemu-storage-daemon"), &args, dir, socket, dir.join("none"))
    }

    fn spawn(
        program: &Path,
        args: &[OsString],
        dir: &Path,
        socket: PathBuf,
        control: PathBuf,
    ) -> io::Result<Daemon> {
        // The socket of a killed predecessor may still be there: the daemon has to replace it, and we have to notice.
        let stale = identity(&socket);
        let log = dir.join("daemon.log");
        let out = OpenOptions::new().create(true).append(true).open(&log)?;
        let log_start = out.metadata()?.len();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"].map(OsStr::new)).arg(program).args(args);
        let child = spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(out))?;
        let mut daemon = Daemon { child, socket, control, log, log_start, ended: None };
        daemon.await_socket(stale)?;
        Ok(daemon)
    }

    fn await_socket(&mut self, stale: Option<(u64, i64, i64)>) -> io::Result<()> {
        let socket = self.socket.clone();
        let mut ended = None;
        wait::until("the daemon's socket", PATIENCE, || {
            ended = self.child.try_wait().ok().flatten();
            let there = identity(&socket).is_some_and(|now| Some(now) != stale);
            (ended.is_some() || there).then_some(())
        })
        .map_err(|error| io::Error::new(error.kind(), format!("{error}; log: {}", self.log())))?;
        match ended {
            None => Ok(()),
            Some(status) => {
                self.ended = ended;
                Err(io::Error::other(format!("ended at start: {status}: {}", self.log().trim())))
            }
        }
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The control socket.
    pub fn control_path(&self) -> &Path {
        &self.control
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has written to standard error.
    pub fn log(&self) -> String {
        let start = usize::try_from(self.log_start).unwrap_or(0);
        let log = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(log.get(start..).unwrap_or_default()).into_owned()
    }

    /// One request on the control socket; the reply's single line.
    pub fn control(&self, command: &str) -> io::Result<Value> {
        request(&self.control, command)
    }

    /// Its state.
    pub fn status(&self) -> io::Result<Status> {
        Status::of(&self.control)
    }

    /// Waits until `ready` holds of its state; the error shows the last one.
    pub fn await_status(
        &self,
        what: &str,
        limit: Duration,
        ready: impl Fn(&Status) -> bool,
    ) -> io::Result<Status> {
        let mut last = None;
        let found = wait::until(what, limit, || {
            last = self.status().ok();
            last.as_ref().filter(|status| ready(status)).cloned()
        });
        found.map_err(|error| {
            io::Error::new(error.kind(), format!("{error}; status: {last:?}; log: {}", self.log()))
        })
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = Pid::from_child(&self.child);
        Ok(kill_process(pid, signal)?)
    }

    /// Kills it at once, without waiting for its end: a request in flight may hold that up.
    pub fn sigkill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Asks it to end and waits for that.
    pub fn sigterm(&mut self) -> io::Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(PATIENCE)
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let child = &mut self.child;
        let status = wait::until("the daemon's end", limit, || child.try_wait().transpose())??;
        self.ended = Some(status);
        Ok(status)
    }

    /// The number of its open file descriptors.
    pub fn open_files(&self) -> io::Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// KiB of memory it has resident.
    pub fn resident_kib(&self) -> io::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        number.ok_or_else(|| io::Error::other("no VmRSS in its status"))
    }

    /// Clock ticks it has used, in user and kernel mode, over all threads.
    pub fn cpu_ticks(&self) -> io::Result<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        // The name, field 2, may contain spaces; what follows it does not.
        let rest = stat.rsplit(')').next().unwrap_or_default();
        let field = |n: usize| {
            rest.split_whitespace().nth(n).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0)
        };
        Ok(field(11) + field(12))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.ended.is_some() {
            return;
        }
        let killed = self.sigkill().and_then(|()| self.wait(PATIENCE).map(drop));
        if let Err(error) = killed {
            eprintln!("daemon {}: {error}", self.child.id());
        }
        if std::thread::panicking() {
            eprintln!("--- log of the daemon\n{}---", self.log());
        }
    }
}

/// A status reply.
#[derive(Debug, Clone)]
pub struct Status(pub Value);

impl Status {
    /// The state of whoever has the control socket at `control`.
    pub fn of(control: &Path) -> io::Result<Status> {
        let reply = request(control, "status")?;
        // The reply may carry the state inside an envelope.
        let inner = ["status", "result", "reply"]
            .into_iter()
            .find_map(|key| reply.get(key).filter(|v| v.is_object()));
        Ok(Status(inner.cloned().unwrap_or(reply)))
    }

    /// The text at `path` (keys separated by `/`), empty if there is none.
    pub fn text(&self, path: &str) -> &str {
        self.0.pointer(&format!("/{path}")).and_then(Value::as_str).unwrap_or_default()
    }

    /// The number at `path`; 0 if there is none.
    pub fn number(&self, path: &str) -> u64 {
        self.0.pointer(&format!("/{path}")).and_then(Value::as_u64).unwrap_or(0)
    }

    /// Whether it is in direct mode.
    pub fn direct(&self) -> bool {
        self.text("mode") == "direct"
    }

    /// Why it is in the mode it is in.
    pub fn reason(&self) -> &str {
        self.text("reason")
    }
}

/// One request on the control socket at `control`; the reply's single line.
fn request(control: &Path, command: &str) -> io::Result<Value> {
    let connect = || UnixStream::connect(control).ok();
    let mut stream = wait::until("the control socket", PATIENCE, connect)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{{\"v\":1,\"cmd\":\"{command}\"}}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    serde_json::from_str(&line).map_err(context(format!("the reply to {command}: {line:?}")))
}

/// Tells one socket file from its successor at the same path; inode numbers alone are used again at once.
fn identity(path: &Path) -> Option<(u64, i64, i64)> {
    let data = std::fs::metadata(path).ok()?;
    Some((data.ino(), data.ctime(), data.ctime_nsec()))
}
