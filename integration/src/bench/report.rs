// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the bench says: a table for people, `report.json` for scripts, and a verdict.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::load::{BLOCK, Workload};
use super::opening::{Idle, Opening};
use super::stats::median;
use super::subject::{Outcome, Subject};

/// Version of the format of `report.json`.
const VERSION: u32 = 1;

/// Where and how it was measured.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Environment {
    /// Kernel release.
    pub(super) kernel: String,
    /// The processor's name.
    pub(super) cpu: String,
    /// CPUs there are.
    pub(super) cpus: usize,
    /// Version of qemu-storage-daemon.
    pub(super) qemu_storage_daemon: String,
    /// Version of extentd.
    pub(super) extentd: String,
    /// Version of the extentd it is compared with.
    pub(super) against: Option<String>,
    /// Bytes of the image.
    pub(super) image_bytes: u64,
    /// Rounds, each over all subjects.
    pub(super) rounds: usize,
    /// Seconds measured in each round.
    pub(super) seconds: f64,
    /// How the client waits: `poll` or `block`.
    pub(super) client: String,
    /// Load average over one minute, before and after: above 1 before, others were using the machine.
    pub(super) load_average: [f64; 2],
}

/// One subject under one workload; medians over the rounds.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    /// The subject's name.
    pub(super) subject: &'static str,
    /// The workload's name.
    pub(super) workload: String,
    /// `tmpfs-loop` or `disk-loop`.
    pub(super) device: &'static str,
    /// Requests per second.
    pub(super) iops: f64,
    /// Megabytes (10^6) per second.
    pub(super) mb_s: f64,
    /// Median latency in microseconds.
    pub(super) p50_us: f64,
    /// 99 % latency.
    pub(super) p99_us: f64,
    /// 99.9 % latency.
    pub(super) p999_us: f64,
    /// Server CPU per request in microseconds; null without a server.
    pub(super) server_cpu_us_per_io: Option<f64>,
    /// Server system calls per request; null without a server, or where they cannot be counted.
    pub(super) syscalls_per_io: Option<f64>,
    /// The server's largest resident set.
    pub(super) peak_rss_kib: Option<u64>,
    /// Requests per second in each round.
    pub(super) rounds: Vec<f64>,
    /// The server's share of one CPU.
    pub(super) busy_percent: Option<f64>,
    /// Median over the rounds of the ratio to qemu-storage-daemon in the same round.
    pub(super) ratio_to_peer: Option<f64>,
    /// The same to the extentd of `--against`.
    pub(super) ratio_to_against: Option<f64>,
    /// Server CPU per request over that of the extentd of `--against`.
    pub(super) cpu_ratio_to_against: Option<f64>,
    /// The smallest share, over the rounds, of data segments that went straight to the device (extentd only).
    pub(super) direct_share: Option<f64>,
    /// Times the client looked in vain for completions, per request.
    pub(super) client_idle_looks: f64,
}

impl Row {
    /// Sums the rounds up.
    pub(super) fn new(
        subject: Subject,
        workload: Workload,
        device: &'static str,
        outcomes: &[Outcome],
    ) -> Row {
        let of =
            |value: fn(&Outcome) -> f64| median(&outcomes.iter().map(value).collect::<Vec<f64>>());
        let some = |value: fn(&Outcome) -> Option<f64>| {
            let values: Vec<f64> = outcomes.iter().filter_map(value).collect();
            (!values.is_empty()).then(|| median(&values))
        };
        let iops = of(|o| o.sample.iops);
        Row {
            subject: subject.name(),
            workload: workload.name(),
            device,
            iops,
            mb_s: iops * BLOCK as f64 / 1e6,
            p50_us: of(|o| o.sample.p50_us),
            p99_us: of(|o| o.sample.p99_us),
            p999_us: of(|o| o.sample.p999_us),
            server_cpu_us_per_io: some(|o| o.cpu_us_per_io),
            syscalls_per_io: None,
            peak_rss_kib: outcomes.iter().filter_map(|o| o.peak_rss_kib).max(),
            rounds: outcomes.iter().map(|o| o.sample.iops).collect(),
            busy_percent: some(|o| o.busy_percent),
            ratio_to_peer: None,
            ratio_to_against: None,
            cpu_ratio_to_against: None,
            direct_share: outcomes.iter().filter_map(|o| o.direct_share).min_by(f64::total_cmp),
            client_idle_looks: of(|o| o.sample.idle_looks),
        }
    }
}

/// A server while its guest does nothing.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct IdleRow {
    /// The subject's name.
    pub(super) subject: &'static str,
    /// Clock ticks used.
    pub(super) cpu_ticks: u64,
    /// Times one of its threads went to sleep.
    pub(super) wake_ups: u64,
}

impl IdleRow {
    /// The row of `subject`.
    pub(super) fn new(subject: Subject, idle: Idle) -> IdleRow {
        IdleRow { subject: subject.name(), cpu_ticks: idle.ticks, wake_ups: idle.wake_ups }
    }
}

/// Times to open an image.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct OpeningRow {
    /// Of 1 MiB, in milliseconds.
    pub(super) mib_1_ms: f64,
    /// Of 1 TiB, sparse.
    pub(super) tib_1_ms: f64,
    /// The one over the other.
    pub(super) ratio: f64,
}

impl From<Opening> for OpeningRow {
    fn from(opening: Opening) -> OpeningRow {
        OpeningRow {
            mib_1_ms: opening.small_ms,
            tib_1_ms: opening.large_ms,
            ratio: opening.large_ms / opening.small_ms,
        }
    }
}

/// One figure that has to be what it must be.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Check {
    /// What is required.
    pub(super) name: String,
    /// What was found.
    pub(super) value: f64,
    /// Whether that is good enough.
    pub(super) ok: bool,
}

/// Everything, in the shape of `report.json`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    version: u32,
    /// Where and how.
    pub(super) environment: Environment,
    /// The figures.
    pub(super) rows: Vec<Row>,
    /// Servers doing nothing.
    pub(super) idle: Vec<IdleRow>,
    /// Opening images.
    pub(super) opening: Option<OpeningRow>,
    /// The verdict's parts.
    pub(super) checks: Vec<Check>,
}

impl Report {
    /// An empty report.
    pub(super) fn new(environment: Environment) -> Report {
        Report {
            version: VERSION,
            environment,
            rows: Vec::new(),
            idle: Vec::new(),
            opening: None,
            checks: Vec::new(),
        }
    }

    /// The row of `subject` under `workload`, if it was measured.
    pub(super) fn row(&self, subject: Subject, workload: Workload) -> Option<&Row> {
        let workload = workload.name();
        self.rows.iter().find(|row| row.subject == subject.name() && row.workload == workload)
    }

    /// Fills in every row's ratios to the others, taken round by round.
    pub(super) fn compare(&mut self) {
        let rows = self.rows.clone();
        for row in &mut self.rows {
            let other = |subject: Subject| {
                let of = |other: &&Row| {
                    other.subject == subject.name() && other.workload == row.workload
                };
                rows.iter().find(of)
            };
            let peer = other(Subject::QemuStorageDaemon);
            row.ratio_to_peer = peer.map(|peer| ratio(&row.rounds, &peer.rounds));
            let against = other(Subject::ExtentdAgainst);
            row.ratio_to_against = against.map(|against| ratio(&row.rounds, &against.rounds));
            let cpu = against.and_then(|against| against.server_cpu_us_per_io);
            row.cpu_ratio_to_against = row.server_cpu_us_per_io.zip(cpu).map(|(a, b)| a / b);
        }
    }

    /// Judges everything that was measured.
    pub(super) fn judge(&mut self) {
        let mut checks = Vec::new();
        let mut check = |name: &str, value: f64, ok: bool| {
            checks.push(Check { name: name.to_owned(), value, ok });
        };
        let direct = self.row(Subject::ExtentdDirect, Workload::READ_32);
        if let Some(ratio) = direct.and_then(|row| row.ratio_to_peer) {
            check("read-qd32 over qemu-storage-daemon >= 1.5", ratio, ratio >= 1.5);
        }
        let shares = self.rows.iter().filter(|row| row.subject == Subject::ExtentdDirect.name());
        if let Some(share) = shares.filter_map(|row| row.direct_share).min_by(f64::total_cmp) {
            check("direct share of segments >= 0.99", share, share >= 0.99);
        }
        let own = |row: &&IdleRow| row.subject != Subject::QemuStorageDaemon.name();
        if let Some(ticks) = self.idle.iter().filter(own).map(|row| row.cpu_ticks).max() {
            check("idle CPU ticks = 0", ticks as f64, ticks == 0);
        }
        if let Some(opening) = self.opening {
            check("opening 1 TiB over 1 MiB <= 2", opening.ratio, opening.ratio <= 2.0);
        }
        self.checks = checks;
    }

    /// Writes `report.json` into `dir`, which is made if it is not there.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        std::fs::create_dir_all(dir)?;
        let mut text = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        text.push('\n');
        std::fs::write(dir.join("report.json"), text)
    }

    /// The table.
    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{:<22}{:<23}{:>8}{:>8}{:>9}{:>9}{:>9}{:>9}{:>7}{:>9}{:>8}\n",
            "workload",
            "subject",
            "kIOPS",
            "x peer",
            "p50 us",
            "p99 us",
            "p99.9 us",
            "CPU us/IO",
            "CPU %",
            "calls/IO",
            "direct"
        );
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        for row in &self.rows {
            // Writing into a string cannot fail.
            let _ = writeln!(
                text,
                "{:<22}{:<23}{:>8.1}{:>8}{:>9.1}{:>9.1}{:>9.1}{:>9}{:>7}{:>9}{:>8}",
                row.workload,
                row.subject,
                row.iops / 1000.0,
                number(row.ratio_to_peer, 2),
                row.p50_us,
                row.p99_us,
                row.p999_us,
                number(row.server_cpu_us_per_io, 2),
                number(row.busy_percent, 0),
                number(row.syscalls_per_io, 2),
                number(row.direct_share, 3),
            );
        }
        for row in self.rows.iter().filter(|row| row.subject == Subject::ExtentdDirect.name()) {
            if let Some(ratio) = row.ratio_to_against {
                let _ = writeln!(
                    text,
                    "against: {:<22} IOPS {ratio:.3} x, CPU per I/O {} x",
                    row.workload,
                    number(row.cpu_ratio_to_against, 3),
                );
            }
        }
        for row in &self.idle {
            let _ = writeln!(
                text,
                "idle: {:<22} {} CPU ticks, {} wake-ups",
                row.subject, row.cpu_ticks, row.wake_ups
            );
        }
        if let Some(opening) = self.opening {
            let _ = writeln!(
                text,
                "opening: 1 MiB {:.1} ms, 1 TiB sparse {:.1} ms, ratio {:.2}",
                opening.mib_1_ms, opening.tib_1_ms, opening.ratio
            );
        }
        text
    }

    /// The last line, and whether all is well. `whole`: everything was measured.
    pub(super) fn verdict(&self, whole: bool) -> (String, bool) {
        let bad: Vec<String> = (self.checks.iter().filter(|check| !check.ok))
            .map(|check| format!("{} (found {:.2})", check.name, check.value))
            .collect();
        if !bad.is_empty() {
            return (format!("bench: failed: {}", bad.join("; ")), false);
        }
        let figures = |row: Option<&Row>| row.and_then(|row| row.ratio_to_peer).unwrap_or(0.0);
        let idle = self.idle.iter().filter(|row| row.subject == Subject::ExtentdDirect.name());
        let word = if whole { "ok" } else { "partial" };
        let line = format!(
            "bench: {word} (randread-4k-qd32-q1={:.2}x qemu-storage-daemon {}, idle_ticks={}, open_1tib={:.2}x)",
            figures(self.row(Subject::ExtentdDirect, Workload::READ_32)),
            self.environment.qemu_storage_daemon,
            idle.map(|row| row.cpu_ticks).sum::<u64>(),
            self.opening.map_or(0.0, |opening| opening.ratio),
        );
        (line, true)
    }
}

/// The median over the rounds of the one over the other in the same round.
fn ratio(own: &[f64], other: &[f64]) -> f64 {
    median(&own.iter().zip(other).map(|(own, other)| own / other).collect::<Vec<f64>>())
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod report_tests;
