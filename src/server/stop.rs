// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The end, as somebody asked for it: the first signal begins it, a later one bounds it whatever is stuck.
//!
//! The signals have a thread of their own, which waits for nothing else. Any other may be held up: the process's
//! own by a log that nobody reads, a device's by the end of a session, a helper by a frozen filesystem.

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{io, thread};

use rustix::event::{PollFd, PollFlags};
use tracing::error;

use super::Phase;
use crate::sys::process::{Signals, end_process};
use crate::sys::signals::LeaseSignals;

/// A signal so soon after the first is part of the same order: `timeout` of coreutils signals its child and then its
/// process group, which the child is in.
const SAME_ORDER: Duration = Duration::from_secs(1);
/// How long the regular end may take after a second order. With [`LAST_LINE`] it stays within five seconds.
const GRACE: Duration = Duration::from_secs(3);
/// Longest that the last line may take: the other end of the log may not be read.
const LAST_LINE: Duration = Duration::from_secs(1);
/// Devices that the last line names.
const NAMED: usize = 8;

/// The signals this process reads; blocked before any thread exists.
#[derive(Debug)]
pub struct AllSignals {
    /// SIGTERM and SIGINT.
    pub stop: Signals,
    /// The lease's (R1).
    pub lease: LeaseSignals,
}

impl AllSignals {
    /// Blocks them. SIGPIPE is ignored already: Rust's runtime does it before `main`.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn block() -> io::Result<Self> {
        crate::sys::fault::install()?;
        Ok(Self {
            stop: Signals::block(&[libc::SIGTERM, libc::SIGINT])?,
            lease: crate::sys::signals::block_lease_signals()?,
        })
    }
}

/// What a device does, and so what its end waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Stage {
    Opening,
    Deciding,
    Serving,
    Draining,
    Joining,
    Syncing,
    Touching,
    Over,
}

impl From<Phase> for Stage {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Starting { .. } | Phase::Ready | Phase::Counting => Self::Deciding,
            Phase::Serving => Self::Serving,
            Phase::Draining => Self::Draining,
            Phase::Syncing { .. } => Self::Syncing,
            Phase::Over => Self::Over,
        }
    }
}

const STAGES: [(Stage, &str); 8] = [
    (Stage::Opening, "opening the image"),
    (Stage::Deciding, "deciding on the mode"),
    (Stage::Serving, "its main loop, which has not taken the order"),
    (Stage::Draining, "requests in flight"),
    (Stage::Joining, "the threads of its session"),
    (Stage::Syncing, "the filesystem, to write what is left"),
    (Stage::Touching, "the filesystem, to set the image's mtime"),
    (Stage::Over, "nothing"),
];

/// How far a device is, for a thread that cannot ask it.
#[derive(Debug)]
pub(super) struct Progress {
    image: PathBuf,
    stage: AtomicU8,
}

impl Progress {
    pub(super) fn new(image: PathBuf) -> Self {
        Self { image, stage: AtomicU8::new(Stage::Opening as u8) }
    }

    pub(super) fn set(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    /// What its end waits for; `None` once it has come.
    fn waits_for(&self) -> Option<&'static str> {
        let stage = self.stage.load(Ordering::Relaxed);
        let (stage, what) = STAGES.into_iter().find(|(named, _)| *named as u8 == stage)?;
        (stage != Stage::Over).then_some(what)
    }
}

/// Starts the thread that hears `signals`: the first calls `stop`, a second order bounds the time that this may take.
pub(super) fn start(
    signals: Signals,
    devices: Vec<Arc<Progress>>,
    stop: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let run = move || {
        wait(&signals);
        let first = Instant::now();
        stop();
        wait(&signals);
        while first.elapsed() < SAME_ORDER {
            wait(&signals);
        }
        // The regular end takes this thread with it.
        thread::sleep(GRACE);
        end_now(&devices);
    };
    thread::Builder::new().name("signals".to_owned()).spawn(run).map(drop)
}

/// Waits for a signal.
fn wait(signals: &Signals) {
    while signals.next().is_none() {
        // A failure is an interruption, and the next turn tries again.
        let _ = rustix::event::poll(&mut [PollFd::new(signals, PollFlags::IN)], None);
    }
}

/// Ends the process without unwinding anything: a thread may be stuck. The kernel keeps lease and locks until the
/// last raw request has ended (R1a); sockets stay, stale, and the next daemon replaces them.
fn end_now(devices: &[Arc<Progress>]) -> ! {
    let line = last_line(devices);
    let (written, is_written) = mpsc::channel();
    let write = move || {
        error!("{line}");
        // The thread that waits may have given up.
        let _ = written.send(());
    };
    // Not on this thread: nobody may be reading the log.
    if thread::Builder::new().name("last line".to_owned()).spawn(write).is_ok() {
        let _ = is_written.recv_timeout(LAST_LINE);
    }
    end_process(1)
}

fn last_line(devices: &[Arc<Progress>]) -> String {
    let waiting = devices.iter().filter_map(|device| Some((device, device.waits_for()?)));
    let waiting: Vec<_> = waiting.collect();
    let mut line = "told to stop twice; ending without waiting any longer".to_owned();
    for (index, (device, what)) in waiting.iter().take(NAMED).enumerate() {
        let before = if index == 0 { ". What was still waited for: " } else { "; " };
        // Writing into memory does not fail.
        let _ = write!(line, "{before}{what} ({})", device.image.display());
    }
    if waiting.len() > NAMED {
        let _ = write!(line, "; and {} devices more", waiting.len() - NAMED);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_says_what_was_waited_for() {
        let devices: Vec<_> =
            (0..12).map(|n| Arc::new(Progress::new(format!("/{n}").into()))).collect();
        devices[0].set(Stage::Over);
        devices[1].set(Stage::Draining);
        devices[2].set(Stage::Syncing);
        assert_eq!(
            last_line(&devices[..3]),
            "told to stop twice; ending without waiting any longer. What was still waited for: requests in flight (/1); \
             the filesystem, to write what is left (/2)"
        );
        assert!(last_line(&devices).ends_with("opening the image (/8); and 3 devices more"));
        assert_eq!(
            last_line(&devices[..1]),
            "told to stop twice; ending without waiting any longer"
        );
    }

    #[test]
    fn every_stage_has_its_words() {
        for (place, (stage, _)) in STAGES.into_iter().enumerate() {
            assert_eq!(usize::from(stage as u8), place);
        }
    }
}
