// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the figures must be, and what they had better be.

use serde::Serialize;

use super::report::{Report, Row};
use super::sections::Situation;
use super::stats::Spread;
use super::subject::Subject::{
    self, ExtentdDirect, ExtentdFilesystem, NativeDevice, NativeFile, QemuStorageDaemon,
};
use super::workload::Workload;

/// Below this a percentage of CPU time is 0.0.
const NO_CPU: f64 = 0.05;
/// So many extents are a million, also where the filesystem's own blocks join two here and there.
const MILLION: u64 = 1_000_000;

/// How a figure compares with what is wanted of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Verdict {
    /// As good as it had better be.
    Goal,
    /// As good as it must be.
    Must,
    /// Not as good as it had better be, and there is nothing it must be.
    Short,
    /// Not as good as it must be.
    Missed,
    /// It was not measured.
    NotMeasured,
}

impl Verdict {
    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Verdict::Goal => "goal",
            Verdict::Must => "must",
            Verdict::Short => "short of the goal",
            Verdict::Missed => "MISSED",
            Verdict::NotMeasured => "not measured",
        }
    }
}

/// One figure with a target.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Check {
    /// What it is.
    pub(super) name: String,
    /// What was found; `low` and `high` are the rounds'.
    pub(super) value: Option<Spread>,
    /// The median with a client that waits in the other way than usual; not judged.
    pub(super) otherwise: Option<f64>,
    /// More is better.
    pub(super) at_least: bool,
    /// What it must be.
    pub(super) must: Option<f64>,
    /// What it had better be.
    pub(super) goal: f64,
    /// How it compares.
    pub(super) verdict: Verdict,
}

/// What a check looks at.
#[derive(Debug, Clone, Copy, Default)]
struct Found {
    value: Option<Spread>,
    otherwise: Option<f64>,
}

impl Found {
    /// A figure for which it does not matter how a client waits.
    fn alone(value: Option<Spread>) -> Found {
        Found { value, otherwise: None }
    }
}

impl Check {
    fn new(name: &str, found: Found, at_least: bool, must: Option<f64>, goal: f64) -> Check {
        let Found { value, otherwise } = found;
        let reaches = |limit: f64| {
            value.is_some_and(|v| if at_least { v.median >= limit } else { v.median <= limit })
        };
        let verdict = match must {
            _ if value.is_none() => Verdict::NotMeasured,
            _ if reaches(goal) => Verdict::Goal,
            None => Verdict::Short,
            Some(must) if reaches(must) => Verdict::Must,
            Some(_) => Verdict::Missed,
        };
        Check { name: name.to_owned(), value, otherwise, at_least, must, goal, verdict }
    }

    /// What it must be, for people; `-` where there is nothing.
    pub(super) fn must_text(&self) -> String {
        self.must.map_or_else(|| "-".to_owned(), |must| self.limit(must))
    }

    /// What it had better be.
    pub(super) fn goal_text(&self) -> String {
        self.limit(self.goal)
    }

    fn limit(&self, limit: f64) -> String {
        format!("{} {limit}", if self.at_least { ">=" } else { "<=" })
    }
}

/// All targets, held against `report`.
pub(super) fn checks(report: &Report) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut at_least = |name: &str, found, must, goal| {
        checks.push(Check::new(name, found, true, Some(must), goal));
    };
    let iops = |own, workload, other| ratio(report, workload, own, other, |row| &row.rounds);
    let of_direct = |workload, other| iops(ExtentdDirect, workload, other);
    let (read, write, deep) = (Workload::READ_32, Workload::WRITE_32, Workload::READ_128);
    at_least("IOPS / qemu-storage-daemon, read QD32", of_direct(read, QemuStorageDaemon), 2.3, 3.2);
    at_least(
        "IOPS / qemu-storage-daemon, write QD32",
        of_direct(write, QemuStorageDaemon),
        2.5,
        3.2,
    );
    at_least(
        "IOPS / qemu-storage-daemon, read QD128",
        of_direct(deep, QemuStorageDaemon),
        4.0,
        5.0,
    );
    at_least("IOPS / native device, read QD32", of_direct(read, NativeDevice), 0.7, 0.9);
    at_least("IOPS / native device, write QD32", of_direct(write, NativeDevice), 0.85, 1.0);
    at_least("IOPS / native device, read QD128", of_direct(deep, NativeDevice), 0.85, 0.95);
    at_least(
        "IOPS direct / filesystem mode, write QD32",
        of_direct(write, ExtentdFilesystem),
        1.15,
        1.3,
    );
    let filesystem = iops(ExtentdFilesystem, deep, NativeFile);
    at_least("IOPS filesystem mode / native file, read QD128", filesystem, 0.85, 0.92);
    at_least("IOPS of 1 M extents / of 1, read QD32", Found::alone(million(report)), 0.95, 0.98);
    at_least("direct share of segments", Found::alone(direct_share(report)), 0.99, 0.99);

    let mut at_most = |name: &str, found, must, goal| {
        checks.push(Check::new(name, found, false, must, goal));
    };
    let cpu =
        |workload| ratio(report, workload, ExtentdDirect, QemuStorageDaemon, |r| &r.cpu_rounds);
    at_most("CPU per I/O / qemu-storage-daemon, read QD32", cpu(read), Some(0.4), 0.25);
    at_most("CPU per I/O / qemu-storage-daemon, write QD32", cpu(write), Some(0.4), 0.25);
    let one = Workload::READ_1;
    let p50 = ratio(report, one, ExtentdDirect, QemuStorageDaemon, |row| &row.p50_rounds);
    at_most("median latency / qemu-storage-daemon, read QD1", p50, Some(0.5), 0.25);
    let idle = report.idle.iter().find(|row| row.subject == ExtentdDirect.name());
    let exact = |value: Option<f64>| Found::alone(value.map(Spread::exact));
    at_most("idle CPU, percent", exact(idle.map(|row| row.cpu_percent)), Some(NO_CPU), NO_CPU);
    let opening = report.opening.map(|row| row.ratio);
    at_most("opening 1 TiB sparse / 1 MiB", exact(opening), Some(2.0), 1.1);
    at_most("page cache after writing 2 GiB, MiB", exact(cached_mib(report)), Some(1.0), 0.0);
    let rss = idle.map(|row| row.rss_kib as f64 / 1024.0);
    at_most("memory of one idle device, MiB", exact(rss), Some(8.0), 4.0);
    at_most(
        "memory of 300 devices in one process, MiB",
        exact(in_one(report)),
        Some(1024.0),
        300.0,
    );
    at_most("p99.9 / p50 while a sparse image is filled", exact(stalls(report)), None, 10.0);
    at_most(
        "neighbour's p99 beside us / beside a kernel loop",
        Found::alone(neighbour(report)),
        None,
        1.0,
    );
    checks
}

fn ratio(
    report: &Report,
    workload: Workload,
    own: Subject,
    other: Subject,
    of: fn(&Row) -> &Vec<f64>,
) -> Found {
    let of_rows = |own: Option<&Row>, other: Option<&Row>| Spread::of_ratios(of(own?), of(other?));
    let otherwise = |subject| report.row_otherwise(subject, workload);
    Found {
        value: of_rows(report.row(own, workload), report.row(other, workload)),
        otherwise: of_rows(otherwise(own), otherwise(other)).map(|ratio| ratio.median),
    }
}

fn million(report: &Report) -> Option<Spread> {
    report.extents.iter().find(|row| row.extents >= MILLION)?.ratio
}

/// The smallest, over the workloads whose data all lies where it can be written straight.
fn direct_share(report: &Report) -> Option<Spread> {
    let own = report.rows.iter().filter(|r| r.subject == ExtentdDirect.name() && r.all_direct);
    own.filter_map(|row| row.direct_share).min_by(f64::total_cmp).map(Spread::exact)
}

fn cached_mib(report: &Report) -> Option<f64> {
    let row = report.page_cache.iter().find(|row| row.subject == ExtentdDirect.name())?;
    Some((row.image_kib + row.device_kib) as f64 / 1024.0)
}

fn in_one(report: &Report) -> Option<f64> {
    let row = report.devices.iter().find(|row| row.processes == 1 && row.devices == 300)?;
    Some(row.rss_kib as f64 / 1024.0)
}

fn stalls(report: &Report) -> Option<f64> {
    let row = report.row(ExtentdDirect, Workload::FILL)?;
    (row.p50_us > 0.0).then(|| row.p999_us / row.p50_us)
}

fn neighbour(report: &Report) -> Option<Spread> {
    let beside =
        |situation: Situation| report.neighbour.iter().find(|row| row.beside == situation.name());
    let (own, other) = (beside(Situation::Extentd)?, beside(Situation::KernelLoop)?);
    Spread::of_ratios(&own.p99_rounds, &other.p99_rounds)
}

/// The last line of the bench, and whether all is well. In a whole run what was not measured is missing.
pub(super) fn verdict(report: &Report) -> (String, bool) {
    let whole = report.environment.whole;
    let missed = report.checks.iter().filter_map(|check| match (check.verdict, check.value) {
        (Verdict::Missed, Some(value)) => {
            Some(format!("{} = {:.2} (must be {})", check.name, value.median, check.must_text()))
        }
        (Verdict::NotMeasured, _) if whole && check.must.is_some() => {
            Some(format!("{}: not measured", check.name))
        }
        _ => None,
    });
    let bad: Vec<String> = report.failures.iter().cloned().chain(missed).collect();
    if !bad.is_empty() {
        return (format!("bench: failed: {}", bad.join("; ")), false);
    }
    let of = |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count();
    let line = format!(
        "bench: {} (goals={}, musts={}, short={}, not_measured={}, qemu-storage-daemon {})",
        if whole { "ok" } else { "partial" },
        of(Verdict::Goal),
        of(Verdict::Must),
        of(Verdict::Short),
        of(Verdict::NotMeasured),
        report.environment.qemu_storage_daemon,
    );
    (line, true)
}

#[cfg(test)]
#[path = "targets_tests.rs"]
mod targets_tests;
