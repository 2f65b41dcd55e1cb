// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long it takes until an image is served: a huge one takes no longer than a small one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use serde::Serialize;

use crate::bench::ground::Ground;
use crate::bench::stats::median;
use crate::rig::command::context;

const LIMIT: Duration = Duration::from_secs(20);
/// VHOST_USER_GET_FEATURES, version 1, no payload.
const GET_FEATURES: [u32; 3] = [1, 1, 0];
const GET_FEATURES_REPLY: usize = 20;

/// Milliseconds from starting the daemon to its answer on the socket, medians.
#[derive(Debug, Clone, Copy, Serialize)]
pub(in crate::bench) struct OpeningRow {
    /// For an image of 1 MiB.
    pub(in crate::bench) mib_1_ms: f64,
    /// For a sparse image of 1 TiB.
    pub(in crate::bench) tib_1_ms: f64,
    /// The one over the other.
    pub(in crate::bench) ratio: f64,
}

impl OpeningRow {
    /// Sums up the times of small and large images, taken in turn.
    pub(in crate::bench) fn new(small: &[f64], large: &[f64]) -> OpeningRow {
        let (mib_1_ms, tib_1_ms) = (median(small), median(large));
        OpeningRow { mib_1_ms, tib_1_ms, ratio: tib_1_ms / mib_1_ms }
    }
}

/// Opens a 1 MiB and a 1 TiB sparse image `repeats` times each, in turn.
pub(in crate::bench) fn opening(ground: &Ground, repeats: usize) -> io::Result<OpeningRow> {
    let small = sparse(&ground.filesystem().path().join("small"), 1 << 20)?;
    let large = sparse(&ground.filesystem().path().join("large"), 1 << 40)?;
    let (mut small_ms, mut large_ms) = (Vec::new(), Vec::new());
    // The first start also reads the program from the disk.
    open_once(ground, &small)?;
    for _ in 0..repeats {
        small_ms.push(open_once(ground, &small)?);
        large_ms.push(open_once(ground, &large)?);
    }
    std::fs::remove_file(small)?;
    std::fs::remove_file(large)?;
    Ok(OpeningRow::new(&small_ms, &large_ms))
}

fn sparse(path: &Path, size: u64) -> io::Result<PathBuf> {
    let file = File::create_new(path)?;
    file.set_len(size)?;
    file.sync_all()?;
    Ok(path.into())
}

/// A daemon started without the helper of [`crate::rig::Daemon`], whose own start would be part of the time.
pub(super) struct Started(Child);

impl Started {
    /// Runs `command`; where its errors go is the caller's business.
    pub(super) fn new(command: &mut Command) -> io::Result<Started> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let die_with_us = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
        // SAFETY: between fork and exec, in the child, this makes one system call and touches no memory of anybody's.
        unsafe { command.pre_exec(die_with_us) };
        command.spawn().map(Started).map_err(context(format!("{command:?}")))
    }

    /// The process id.
    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has ended by itself.
    pub(super) fn has_ended(&mut self) -> io::Result<bool> {
        Ok(self.0.try_wait()?.is_some())
    }

    /// Asks it to end and waits for that.
    pub(super) fn end(mut self) -> io::Result<()> {
        kill_process(Pid::from_child(&self.0), Signal::TERM)?;
        self.0.wait().map(drop)
    }
}

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

fn open_once(ground: &Ground, image: &Path) -> io::Result<f64> {
    let socket = ground.sockets().join("opening.sock");
    let mut command = Command::new(ground.program());
    command.arg("--blk-file").arg(image).arg("--socket-path").arg(&socket);
    command.stderr(Stdio::null());
    let start = Instant::now();
    let mut daemon = Started::new(&mut command)?;
    let mut stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(_) if start.elapsed() > LIMIT || daemon.has_ended()? => {
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
    daemon.end()?;
    Ok(time.as_secs_f64() * 1000.0)
}
