// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What frontends, guests and control clients can take of what all share: the log, and the main loop's time.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use integration::rig::command::close;
use integration::rig::frontend::{self, Frontend};
use integration::rig::ring::Descriptor;
use integration::rig::wait::{PATIENCE, until};
use integration::rig::{Bed, Rig, Setup};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const FEATURES: u64 = frontend::VERSION_1 | frontend::FLUSH;
/// A flood's length; without a limit it was megabytes.
const FLOOD: Duration = Duration::from_secs(2);
/// What all floods together may add to the log.
const LOG_BYTES: usize = 64 << 10;

/// A vhost-user message.
fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let header = [request, 1, len].into_iter().flat_map(u32::to_le_bytes);
    header.chain(payload.iter().copied()).collect()
}

/// Does `act` for the time of a flood, at least ten times.
fn flood(bed: &Bed, what: &str, mut act: impl FnMut()) {
    let (begun, before) = (Instant::now(), bed.daemon.log().len());
    let mut times = 0;
    while begun.elapsed() < FLOOD || times < 10 {
        act();
        times += 1;
    }
    println!("{what}: {times} times, {} bytes of log", bed.daemon.log().len() - before);
}

/// A frontend that says what it wants while the connection lasts.
fn connect(bed: &Bed, bytes: &[u8]) {
    let mut stream = UnixStream::connect(bed.daemon.socket()).unwrap();
    // It may have been closed already.
    let _ = stream.write_all(bytes);
    close(stream);
}

fn floods(options: &[&str], is_line: impl Fn(&str) -> bool) {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), options).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let start = bed.daemon.log().len();
    flood(&bed, "connect and close", || connect(&bed, &[]));
    flood(&bed, "nonsense", || connect(&bed, &message(77, &[0; 8])));
    // SET_VRING_NUM of 3, which the crate complains of by way of `log`.
    let sizes = message(8, &[0, 0, 0, 0, 3, 0, 0, 0]).repeat(100);
    flood(&bed, "queue sizes", || connect(&bed, &sizes));

    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    flood(&bed, "second frontends", || connect(&bed, &[]));
    // The operator's lines are there in the middle of it.
    let said = bed.daemon.log().len();
    let reader = File::open(&bed.image).unwrap();
    until("the end of direct mode", PATIENCE, || {
        connect(&bed, &[]);
        bed.daemon.log().get(said..).unwrap().contains("mode=filesystem").then_some(())
    })
    .unwrap();
    drop(reader);
    until("direct mode", PATIENCE, || {
        connect(&bed, &[]);
        bed.daemon.log().get(said..).unwrap().contains("mode=direct").then_some(())
    })
    .unwrap();

    // A header alone, which is no request.
    let ring = front.ring_mut(0).unwrap();
    ring.describe(0, Descriptor { addr: ring.header(0), len: 16, flags: 0, next: 0 }).unwrap();
    flood(&bed, "malformed chains", || {
        let ring = front.ring_mut(0).unwrap();
        ring.publish(0).unwrap();
        ring.kick().unwrap();
        ring.wait_used(PATIENCE).unwrap();
    });
    until("the report", PATIENCE, || {
        let log = bed.daemon.log();
        let left_out = |line: &&str| line.contains("lines left out, the last: ");
        let report = log.lines().filter(left_out).any(|line| line.contains("malformed"));
        report.then_some(())
    })
    .unwrap();
    drop(front);
    let log = bed.daemon.log();
    let grown = log.len() - start;
    assert!(grown < LOG_BYTES, "{grown} bytes of log: {}", log.get(..4096).unwrap_or(&log));
    for line in log.lines() {
        assert!(is_line(line), "{line}");
    }
    bed.finish().unwrap();
}

#[test]
fn floods_leave_a_few_lines_in_the_log() {
    floods(&[], |line| !line.is_empty());
}

/// Nobody reads the log, so that every thread that has something to say waits for ever: not the one that hears signals.
#[test]
fn a_second_signal_ends_a_daemon_whose_log_nobody_reads() {
    let scratch = tempfile::tempdir().unwrap();
    let (image, socket) = (scratch.path().join("image"), scratch.path().join("s"));
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let (_reader, mut log) = std::io::pipe().unwrap();
    let flags = fcntl_getfl(&log).unwrap();
    fcntl_setfl(&log, flags | OFlags::NONBLOCK).unwrap();
    while log.write(&[b'x'; 4096]).is_ok() {}
    fcntl_setfl(&log, flags).unwrap();
    let mut daemon = Command::new(PROGRAM);
    daemon.arg("--blk-file").arg(&image).arg("--socket-path").arg(&socket);
    let mut daemon = daemon.arg("--mode=filesystem").stderr(log).spawn().unwrap();
    let pid = Pid::from_child(&daemon);
    until("the socket", PATIENCE, || socket.exists().then_some(())).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(daemon.try_wait().unwrap(), None, "it ended without the log");
    // Another signal of the same kind could still be taken for the first.
    kill_process(pid, Signal::INT).unwrap();
    let told = Instant::now();
    let ended = until("the end", PATIENCE, || daemon.try_wait().unwrap());
    if ended.is_err() {
        daemon.kill().unwrap();
    }
    assert_eq!(ended.unwrap().code(), Some(1));
    println!("it took {:?}", told.elapsed());
}

/// As JSON, and with everything that can be said.
#[test]
fn floods_leave_a_few_lines_in_the_log_at_any_level() {
    floods(&["--log-level=trace", "--log-format=json"], |line| {
        serde_json::from_str::<Value>(line).is_ok_and(|line| line.get("message").is_some())
    });
}
