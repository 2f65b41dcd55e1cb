// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What costs nothing if it is right: waiting, and opening a huge image.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::guest::Wait;
use super::stats::median;
use super::subject::{Bed, Subject};
use crate::rig::command::context;

const LIMIT: Duration = Duration::from_secs(20);
/// VHOST_USER_GET_FEATURES, version 1, no payload.
const GET_FEATURES: [u32; 3] = [1, 1, 0];
const GET_FEATURES_REPLY: usize = 20;

/// A server's doings while its guest does nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Idle {
    /// Clock ticks used.
    pub(super) ticks: u64,
    /// Times one of its threads went to sleep.
    pub(super) wake_ups: u64,
}

/// Measures `subject` connected and without I/O for `time`.
pub(super) fn idle(
    bed: &Bed,
    subject: Subject,
    time: Duration,
    wait: Wait,
) -> io::Result<Option<Idle>> {
    let Some(mut server) = bed.start(subject)? else { return Ok(None) };
    let guest = bed.connect_and_use(&server, wait)?;
    // Whatever follows the first requests (spinning that winds down, a map being read ahead) is not idleness yet.
    sleep(Duration::from_millis(500));
    let (ticks, wake_ups) = (server.cpu_ticks()?, switches(server.pid())?);
    sleep(time);
    let idle =
        Idle { ticks: server.cpu_ticks()? - ticks, wake_ups: switches(server.pid())? - wake_ups };
    drop(guest);
    server.sigterm()?;
    Ok(Some(idle))
}

fn switches(pid: u32) -> io::Result<u64> {
    let mut total = 0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(thread?.path().join("status"))?;
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        total += count.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(total)
}

/// Milliseconds from starting the daemon to its answer on the socket, medians.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opening {
    /// For an image of 1 MiB.
    pub(super) small_ms: f64,
    /// For a sparse image of 1 TiB.
    pub(super) large_ms: f64,
}

/// Opens a 1 MiB and a 1 TiB sparse image `repeats` times each, in turn.
pub(super) fn opening(bed: &Bed, repeats: usize) -> io::Result<Opening> {
    let small = sparse(&bed.directory().join("small"), 1 << 20)?;
    let large = sparse(&bed.directory().join("large"), 1 << 40)?;
    let (mut small_ms, mut large_ms) = (Vec::new(), Vec::new());
    // The first start also reads the program from the disk.
    open_once(bed, &small)?;
    for _ in 0..repeats {
        small_ms.push(open_once(bed, &small)?);
        large_ms.push(open_once(bed, &large)?);
    }
    std::fs::remove_file(small)?;
    std::fs::remove_file(large)?;
    Ok(Opening { small_ms: median(&small_ms), large_ms: median(&large_ms) })
}

fn sparse(path: &Path, size: u64) -> io::Result<PathBuf> {
    let file = File::create_new(path)?;
    file.set_len(size)?;
    file.sync_all()?;
    Ok(path.into())
}

/// A daemon started without the helper of [`crate::rig::Daemon`], whose own start would be part of the time.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let ended = self.0.try_wait().and_then(|status| match status {
            Some(_) => Ok(()),
            None => self.0.kill().and_then(|()| self.0.wait().map(drop)),
        });
        if let Err(error) = ended {
            eprintln!("daemon {}: {error}", self.0.id());
        }
    }
}

fn open_once(bed: &Bed, image: &Path) -> io::Result<f64> {
    let socket = bed.sockets().join("opening.sock");
    let mut command = Command::new(bed.program());
    command.arg("--blk-file").arg(image).arg("--socket-path").arg(&socket);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let start = Instant::now();
    let mut daemon = Started(command.spawn().map_err(context(bed.program().display()))?);
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(_) if start.elapsed() > LIMIT || daemon.0.try_wait()?.is_some() => {
                return Err(io::Error::other(format!("extentd does not open {}", image.display())));
            }
            Err(_) => sleep(Duration::from_micros(100)),
        }
    };
    stream.set_read_timeout(Some(LIMIT))?;
    let message: Vec<u8> = GET_FEATURES.iter().flat_map(|word| word.to_ne_bytes()).collect();
    stream.write_all(&message)?;
    stream.read_exact(&mut [0; GET_FEATURES_REPLY])?;
    let time = start.elapsed();
    drop(stream);
    kill_process(Pid::from_child(&daemon.0), Signal::TERM)?;
    daemon.0.wait()?;
    Ok(time.as_secs_f64() * 1000.0)
}
