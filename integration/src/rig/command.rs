// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Running the system's tools, with their complaint in the error.

use std::ffi::OsStr;
use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Between fork and exec a child of this process holds a copy of every descriptor, so that closing a socket meanwhile does not
/// hang up. Held shared by those who start processes and exclusively by [`close`].
static FORKING: RwLock<()> = RwLock::new(());

/// Starts a process.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let _forking = FORKING.read().unwrap_or_else(PoisonError::into_inner);
    let child = command.spawn().map_err(context(format!("{command:?}")))?;
    // We go on as soon as the child has memory of its own; it closes its copies of our descriptors a moment later, and takes
    // its new name after that.
    let name = |of: &str| std::fs::read(format!("/proc/{of}/comm")).ok();
    let (ours, theirs) = (name("thread-self"), child.id().to_string());
    let start = Instant::now();
    while name(&theirs) == ours && start.elapsed() < Duration::from_secs(1) {
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(child)
}

/// Drops what holds a connection, so that the other end hears of it at once.
pub fn close<T>(connection: T) {
    let _alone = FORKING.write().unwrap_or_else(PoisonError::into_inner);
    drop(connection);
}

/// Runs `program` to its end and returns its standard output; a failure carries the command line and its standard error.
pub fn run<A: AsRef<OsStr>>(program: &str, args: &[A]) -> io::Result<String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = spawn(&mut command)?.wait_with_output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    Err(io::Error::other(format!(
        "{command:?}: {}: {} {}",
        output.status,
        stderr.trim(),
        stdout.trim()
    )))
}

/// An error that says what was being tried.
pub fn context<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> io::Error {
    move |error| io::Error::other(format!("{what}: {error}"))
}
