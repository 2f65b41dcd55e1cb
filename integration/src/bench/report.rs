// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything the bench found, in the shape of `report.json`.

use std::io;

use serde::Serialize;

use super::guest::Wait;
use super::histogram::Histogram;
use super::measure::Outcome;
use super::sections::{CacheRow, DevicesRow, ExtentsRow, IdleRow, NeighbourRow, OpeningRow};
use super::stats::{Spread, median};
use super::subject::{Device, Subject};
use super::targets::Check;
use super::workload::Workload;

/// Version of the format of `report.json`.
const VERSION: u32 = 1;
/// Percent of the machine's time.
const BUSY: f64 = 10.0;
/// The quantiles of every `latency_us`: enough to draw its distribution.
pub(super) const QUANTILES: [f64; 18] = [
    0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995,
    0.9999, 1.0,
];

/// Where and how it was measured.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Environment {
    /// Kernel release.
    pub(super) kernel: String,
    /// The processor's name.
    pub(super) cpu: String,
    /// CPUs there are.
    pub(super) cpus: usize,
    /// The CPU the client stays on; null if it is the only one.
    pub(super) client_cpu: Option<usize>,
    /// Whether the kernel's unbound workers were kept off it, and its softirq threads from preempting anybody.
    pub(super) kernel_threads_held_still: bool,
    /// Bytes of memory.
    pub(super) memory_bytes: u64,
    /// Version of qemu-storage-daemon.
    pub(super) qemu_storage_daemon: String,
    /// Version of extentd.
    pub(super) extentd: String,
    /// The workspace's commit, which is also extentd's unless another one was given; `+` if it has been changed since.
    pub(super) commit: String,
    /// Version of the extentd it is compared with.
    pub(super) against: Option<String>,
    /// The filesystem of the images.
    pub(super) filesystem: &'static str,
    /// Whether everything with a target was to be measured.
    pub(super) whole: bool,
    /// What most was measured on, and the targets are about.
    pub(super) device: &'static str,
    /// Bytes of the image.
    pub(super) image_bytes: u64,
    /// Rounds of the workloads with targets, each over all subjects.
    pub(super) rounds: usize,
    /// Seconds measured in each of these rounds.
    pub(super) seconds: f64,
    /// How the client waits: `poll` or `event`.
    pub(super) client: &'static str,
    /// Load average over one minute, before and after: above 1 before, others were using the machine.
    pub(super) load_average: [f64; 2],
    /// The median over all rows of the machine's time that others used, in percent.
    pub(super) others_percent: f64,
    /// The same of what its hypervisor took.
    pub(super) stolen_percent: f64,
    /// Minutes it all took.
    pub(super) minutes: f64,
}

impl Environment {
    /// Whether others used so much of the machine that the figures are worth little.
    pub(super) fn busy(&self) -> bool {
        self.others_percent + self.stolen_percent > BUSY
    }
}

/// One subject under one workload; medians over the rounds.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    /// The subject's name.
    pub(super) subject: &'static str,
    /// The workload's name; with `-event` or `-poll` where the client waited in the other way than usual.
    pub(super) workload: String,
    /// `tmpfs-loop` or `disk-loop`.
    pub(super) device: &'static str,
    /// How the client waited: `poll` or `event`.
    pub(super) client: &'static str,
    /// Requests in flight on each queue.
    pub(super) depth: u16,
    /// Virtqueues.
    pub(super) queues: u16,
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
    /// Latencies at the report's `quantiles`, all rounds together.
    pub(super) latency_us: Vec<f64>,
    /// Median latency of the flushes, where there are any.
    pub(super) flush_p50_us: Option<f64>,
    /// 99 % latency of the flushes.
    pub(super) flush_p99_us: Option<f64>,
    /// Server CPU per request in microseconds, its io_uring workers included; null without a server.
    pub(super) server_cpu_us_per_io: Option<f64>,
    /// The part of it that those workers used.
    pub(super) io_workers_cpu_us_per_io: Option<f64>,
    /// CPU of all kernel workers of the machine per request: nobody can tell whose work they do.
    pub(super) kworkers_cpu_us_per_io: f64,
    /// Server system calls per request; null without a server, or where they cannot be counted.
    pub(super) syscalls_per_io: Option<f64>,
    /// Times a thread of the server went to sleep, per request.
    pub(super) switches_per_io: Option<f64>,
    /// The server's largest resident set.
    pub(super) peak_rss_kib: Option<u64>,
    /// Requests per second in each round.
    pub(super) rounds: Vec<f64>,
    /// Median latency in each round.
    pub(super) p50_rounds: Vec<f64>,
    /// Server CPU per request in each round.
    pub(super) cpu_rounds: Vec<f64>,
    /// From the slowest round to the fastest, in percent of the median.
    pub(super) spread_percent: f64,
    /// The server's share of one CPU.
    pub(super) busy_percent: Option<f64>,
    /// Median over the rounds of the ratio to qemu-storage-daemon in the same round.
    pub(super) ratio_to_peer: Option<f64>,
    /// The same to io_uring on the device; for workloads that a device is not given, on the file.
    pub(super) ratio_to_native: Option<f64>,
    /// The same to the extentd of `--against`.
    pub(super) ratio_to_against: Option<f64>,
    /// Server CPU per request over that of the extentd of `--against`.
    pub(super) cpu_ratio_to_against: Option<f64>,
    /// The smallest share, over the rounds, of data segments that went straight to the device (extentd only).
    pub(super) direct_share: Option<f64>,
    /// Whether all of them should have.
    pub(super) all_direct: bool,
    /// Times the client looked in vain for completions, per request: near 0 it was the bottleneck.
    pub(super) client_idle_looks: f64,
    /// The machine's time that others used, in percent.
    pub(super) others_percent: f64,
    /// The machine's time that its hypervisor took, in percent.
    pub(super) stolen_percent: f64,
}

impl Row {
    /// Sums the rounds up.
    pub(super) fn new(
        subject: Subject,
        workload: Workload,
        device: Device,
        outcomes: &[Outcome],
    ) -> Row {
        let all = |value: fn(&Outcome) -> f64| outcomes.iter().map(value).collect::<Vec<f64>>();
        let of = |value: fn(&Outcome) -> f64| median(&all(value));
        let some = |value: fn(&Outcome) -> Option<f64>| {
            let values: Vec<f64> = outcomes.iter().filter_map(value).collect();
            (!values.is_empty()).then(|| median(&values))
        };
        let (mut latencies, mut flushes) = (Histogram::default(), Histogram::default());
        for outcome in outcomes {
            latencies.merge(&outcome.sample.latencies);
            flushes.merge(&outcome.sample.flushes);
        }
        let flush = |quantile| (flushes.total() > 0).then(|| flushes.quantile_us(quantile));
        let rounds = all(|o| o.sample.iops());
        let iops = median(&rounds);
        let spread = Spread::of(&rounds).filter(|spread| spread.median > 0.0);
        Row {
            subject: subject.name(),
            workload: workload.name(),
            device: device.name(),
            client: Wait::Event.name(),
            depth: workload.depth,
            queues: workload.queues,
            iops,
            mb_s: iops * f64::from(workload.block) / 1e6,
            p50_us: of(|o| o.sample.latencies.quantile_us(0.5)),
            p99_us: of(|o| o.sample.latencies.quantile_us(0.99)),
            p999_us: of(|o| o.sample.latencies.quantile_us(0.999)),
            latency_us: distribution(&latencies),
            flush_p50_us: flush(0.5),
            flush_p99_us: flush(0.99),
            server_cpu_us_per_io: some(|o| o.cpu_us_per_io),
            io_workers_cpu_us_per_io: some(|o| o.io_workers_us_per_io),
            kworkers_cpu_us_per_io: of(|o| o.kworkers_us_per_io),
            syscalls_per_io: None,
            switches_per_io: some(|o| o.switches_per_io),
            peak_rss_kib: outcomes.iter().filter_map(|o| o.peak_rss_kib).max(),
            p50_rounds: all(|o| o.sample.latencies.quantile_us(0.5)),
            cpu_rounds: outcomes.iter().filter_map(|o| o.cpu_us_per_io).collect(),
            spread_percent: spread.map_or(0.0, |s| (s.high - s.low) / s.median * 100.0),
            rounds,
            busy_percent: some(|o| o.busy_percent),
            ratio_to_peer: None,
            ratio_to_native: None,
            ratio_to_against: None,
            cpu_ratio_to_against: None,
            direct_share: outcomes.iter().filter_map(|o| o.direct_share).min_by(f64::total_cmp),
            all_direct: workload.all_direct(),
            client_idle_looks: of(|o| o.sample.idle_looks),
            others_percent: of(|o| o.others_percent),
            stolen_percent: of(|o| o.stolen_percent),
        }
    }
}

/// The latencies at all [`QUANTILES`], in microseconds with one digit: no clock here is better than that.
pub(super) fn distribution(latencies: &Histogram) -> Vec<f64> {
    let at = |quantile: &f64| (latencies.quantile_us(*quantile) * 10.0).round() / 10.0;
    QUANTILES.iter().map(at).collect()
}

/// Everything.
#[derive(Debug, Clone)]
pub(super) struct Report {
    /// Where and how.
    pub(super) environment: Environment,
    /// What could not be measured, and why.
    pub(super) failures: Vec<String>,
    /// The verdict's parts.
    pub(super) checks: Vec<Check>,
    /// The figures.
    pub(super) rows: Vec<Row>,
    /// Servers doing nothing.
    pub(super) idle: Vec<IdleRow>,
    /// Opening images.
    pub(super) opening: Option<OpeningRow>,
    /// Images in many pieces.
    pub(super) extents: Vec<ExtentsRow>,
    /// Many devices at once.
    pub(super) devices: Vec<DevicesRow>,
    /// Somebody else on the same disk.
    pub(super) neighbour: Vec<NeighbourRow>,
    /// What is left in the page cache.
    pub(super) page_cache: Vec<CacheRow>,
}

impl Report {
    /// An empty report.
    pub(super) fn new(environment: Environment) -> Report {
        Report {
            environment,
            failures: Vec::new(),
            checks: Vec::new(),
            rows: Vec::new(),
            idle: Vec::new(),
            opening: None,
            extents: Vec::new(),
            devices: Vec::new(),
            neighbour: Vec::new(),
            page_cache: Vec::new(),
        }
    }

    /// The row of `subject` under `workload` on the device that the targets are about, if it was measured.
    pub(super) fn row(&self, subject: Subject, workload: Workload) -> Option<&Row> {
        self.named(subject, &workload.name())
    }

    /// The same of a client that waited in the other way than usual.
    pub(super) fn row_otherwise(&self, subject: Subject, workload: Workload) -> Option<&Row> {
        self.named(subject, &format!("{}-{}", workload.name(), self.other_client().name()))
    }

    /// The way to wait that is not the usual one of this report.
    pub(super) fn other_client(&self) -> Wait {
        if self.environment.client == Wait::Poll.name() { Wait::Event } else { Wait::Poll }
    }

    fn named(&self, subject: Subject, workload: &str) -> Option<&Row> {
        let device = self.environment.device;
        self.rows.iter().find(|row| {
            row.subject == subject.name() && row.workload == workload && row.device == device
        })
    }

    /// Fills in every row's ratios to the others, taken round by round.
    pub(super) fn compare(&mut self) {
        let rows = self.rows.clone();
        for row in &mut self.rows {
            let other = |subject: Subject| {
                rows.iter().find(|other| {
                    other.subject == subject.name()
                        && other.workload == row.workload
                        && other.device == row.device
                })
            };
            let ratio = |other: Option<&Row>| {
                Spread::of_ratios(&row.rounds, &other?.rounds).map(|ratio| ratio.median)
            };
            let native = other(Subject::NativeDevice).or(other(Subject::NativeFile));
            let against = other(Subject::ExtentdAgainst);
            row.ratio_to_peer = ratio(other(Subject::QemuStorageDaemon));
            row.ratio_to_native = ratio(native);
            row.ratio_to_against = ratio(against);
            row.cpu_ratio_to_against = against
                .and_then(|against| Spread::of_ratios(&row.cpu_rounds, &against.cpu_rounds))
                .map(|ratio| ratio.median);
        }
    }

    /// Notes how busy the machine was.
    pub(super) fn note_disturbance(&mut self) {
        let of = |value: fn(&Row) -> f64| median(&self.rows.iter().map(value).collect::<Vec<_>>());
        self.environment.others_percent = of(|row| row.others_percent);
        self.environment.stolen_percent = of(|row| row.stolen_percent);
    }

    /// The text of `report.json`: one line for each row, so that two reports can be compared with `diff`.
    pub(super) fn json(&self) -> io::Result<String> {
        let parts = [
            ("version", line(&VERSION)?),
            ("quantiles", line(&QUANTILES)?),
            ("environment", line(&self.environment)?),
            ("failures", lines(&self.failures)?),
            ("checks", lines(&self.checks)?),
            ("rows", lines(&self.rows)?),
            ("idle", lines(&self.idle)?),
            ("opening", line(&self.opening)?),
            ("extents", lines(&self.extents)?),
            ("devices", lines(&self.devices)?),
            ("neighbour", lines(&self.neighbour)?),
            ("page_cache", lines(&self.page_cache)?),
        ];
        let parts: Vec<String> =
            parts.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
        Ok(format!("{{\n{}\n}}\n", parts.join(",\n")))
    }
}

fn line(value: &impl Serialize) -> io::Result<String> {
    serde_json::to_string(value).map_err(io::Error::other)
}

fn lines<T: Serialize>(values: &[T]) -> io::Result<String> {
    let lines = values.iter().map(line).collect::<io::Result<Vec<String>>>()?;
    Ok(if lines.is_empty() { "[]".to_owned() } else { format!("[\n{}\n]", lines.join(",\n")) })
}

#[cfg(test)]
#[path = "report_tests.rs"]
pub(in crate::bench) mod report_tests;
