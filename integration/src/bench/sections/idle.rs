// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Servers whose guest does nothing.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use serde::Serialize;

use crate::bench::ground::Ground;
use crate::bench::guest::Wait;
use crate::bench::subject::Subject;
use crate::bench::usage::{Memory, Usage, threads};

/// Whatever follows the first requests (spinning that winds down, a map being read ahead) is not idleness yet.
const SETTLING: Duration = Duration::from_millis(500);

/// A server while its guest is connected and does nothing.
#[derive(Debug, Clone, Copy, Serialize)]
pub(in crate::bench) struct IdleRow {
    /// The subject's name.
    pub(in crate::bench) subject: &'static str,
    /// CPU time in percent of one CPU.
    pub(in crate::bench) cpu_percent: f64,
    /// Times one of its threads went to sleep.
    pub(in crate::bench) wake_ups: u64,
    /// Its resident memory, after a few requests.
    pub(in crate::bench) rss_kib: u64,
    /// The part of it that it does not share with other processes.
    pub(in crate::bench) pss_kib: u64,
    /// Its threads.
    pub(in crate::bench) threads: usize,
}

/// Measures `subject` for `time`; `None` if it has no server.
pub(in crate::bench) fn idle(
    ground: &Ground,
    subject: Subject,
    time: Duration,
    wait: Wait,
) -> io::Result<Option<IdleRow>> {
    let Some(mut server) = ground.start(subject, &ground.image().path, 1)? else {
        return Ok(None);
    };
    let guest = ground.connect_and_use(&server, wait)?;
    sleep(SETTLING);
    let before = Usage::of(server.pid())?;
    sleep(time);
    let after = Usage::of(server.pid())?;
    let memory = Memory::of(server.pid())?;
    let row = IdleRow {
        subject: subject.name(),
        cpu_percent: (after.cpu_ns - before.cpu_ns) as f64 / time.as_secs_f64() / 1e7,
        wake_ups: after.switches - before.switches,
        rss_kib: memory.rss,
        pss_kib: memory.pss,
        threads: threads(server.pid())?,
    };
    drop(guest);
    server.sigterm()?;
    Ok(Some(row))
}
