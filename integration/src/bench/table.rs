// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables for people, of text or of Markdown.

use std::fmt::Write as _;

use super::guest::Wait;
use super::report::{Report, Row};
use super::stats::Spread;
use super::targets::{Check, Verdict};

/// Looks in vain for each request, below which the client is at its limit.
const CLIENT_BOUND: f64 = 0.1;

/// What the signs in the tables mean.
pub(super) const LEGEND: &str = "\
* the client, which polled, was at its limit: a faster server would have shown little of it
client poll, client event: the same figure with a client that waits in the other way than in the other columns; it is not judged
± % half of the way from the slowest round to the fastest; × peer, × native: IOPS over qemu-storage-daemon's and over
those of an io_uring on the device (on the file where a device cannot be given the workload), round by round
others %: the machine's CPU time that is neither the client's, the server's, kernel workers' nor interrupts'";

/// Columns of text; the first ones of words, the others of numbers.
#[derive(Debug, Clone)]
pub(super) struct Table {
    title: &'static str,
    words: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table whose first `words` columns are words.
    pub(super) fn new(title: &'static str, words: usize, head: &[&str]) -> Table {
        Table { title, words, rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    /// Adds a row.
    pub(super) fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// What it is about.
    pub(super) fn title(&self) -> &'static str {
        self.title
    }

    fn is_empty(&self) -> bool {
        self.rows.len() < 2
    }

    /// For a terminal.
    pub(super) fn text(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = format!("{}\n", self.title);
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                // Writing into a string cannot fail.
                let _ = if column < self.words {
                    write!(line, "{cell:<width$}  ")
                } else {
                    write!(line, "{cell:>width$}  ")
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// For a page.
    pub(super) fn markdown(&self) -> String {
        let mut text = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            let _ = writeln!(text, "| {} |", row.join(" | "));
            if index == 0 {
                let rule = |column| if column < self.words { "---|" } else { "--:|" };
                let _ = writeln!(text, "|{}", (0..row.len()).map(rule).collect::<String>());
            }
        }
        text
    }
}

/// A number that may not be there.
fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// As many digits as a ratio is good for; percentages and MiB as well.
fn spread(value: Option<Spread>) -> [String; 2] {
    let Some(value) = value else { return ["-".to_owned(), "-".to_owned()] };
    let digits = if value.median.abs() < 10.0 { 2 } else { 1 };
    let range = format!("{:.digits$} – {:.digits$}", value.low, value.high);
    let range = if value.low < value.high { range } else { "-".to_owned() };
    [format!("{:.digits$}", value.median), range]
}

/// All the tables of `report` that have something in them.
pub(super) fn tables(report: &Report) -> Vec<Table> {
    let all = [
        targets(report),
        workloads(report),
        flushes(report),
        against(report),
        extents(report),
        devices(report),
        neighbour(report),
        idle(report),
        opening(report),
        page_cache(report),
    ];
    all.into_iter().filter(|table| !table.is_empty()).collect()
}

fn targets(report: &Report) -> Table {
    let other = format!("client {}", report.other_client().name());
    let head = ["target", "found", "rounds", "must", "goal", "verdict", &other];
    let mut table = Table::new("Targets", 1, &head);
    let measured =
        |check: &&Check| report.environment.whole || check.verdict != Verdict::NotMeasured;
    for check in report.checks.iter().filter(measured) {
        let [found, rounds] = spread(check.value);
        let verdict = check.verdict.name().to_owned();
        let name = check.name.clone();
        let (must, goal) = (check.must_text(), check.goal_text());
        table.push(vec![name, found, rounds, must, goal, verdict, number(check.otherwise, 2)]);
    }
    table
}

fn workloads(report: &Report) -> Table {
    let head = [
        "workload",
        "subject",
        "device",
        "kIOPS",
        "± %",
        "MB/s",
        "× peer",
        "× native",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "CPU µs/IO",
        "CPU %",
        "calls/IO",
        "sleeps/IO",
        "kworkers µs/IO",
        "RSS MiB",
        "direct",
        "others %",
    ];
    let mut table = Table::new("Workloads", 3, &head);
    for row in &report.rows {
        table.push(vec![
            row.workload.clone(),
            row.subject.to_owned(),
            row.device.to_owned(),
            format!("{:.1}{}", row.iops / 1000.0, if client_bound(row) { "*" } else { "" }),
            format!("{:.0}", row.spread_percent / 2.0),
            format!("{:.0}", row.mb_s),
            number(row.ratio_to_peer, 2),
            number(row.ratio_to_native, 2),
            format!("{:.1}", row.p50_us),
            format!("{:.1}", row.p99_us),
            format!("{:.1}", row.p999_us),
            number(row.server_cpu_us_per_io, 2),
            number(row.busy_percent, 0),
            number(row.syscalls_per_io, 2),
            number(row.switches_per_io, 2),
            format!("{:.2}", row.kworkers_cpu_us_per_io),
            number(row.peak_rss_kib.map(|kib| kib as f64 / 1024.0), 1),
            number(row.direct_share, 3),
            format!("{:.0}", row.others_percent),
        ]);
    }
    table
}

/// Whether a polling client found something nearly every time it looked, so that a faster server would not have shown.
fn client_bound(row: &Row) -> bool {
    row.client_idle_looks < CLIENT_BOUND && row.client == Wait::Poll.name()
}

fn flushes(report: &Report) -> Table {
    let mut table =
        Table::new("Flushes", 3, &["workload", "subject", "device", "p50 µs", "p99 µs"]);
    for row in report.rows.iter().filter(|row| row.flush_p50_us.is_some()) {
        let (p50, p99) = (number(row.flush_p50_us, 1), number(row.flush_p99_us, 1));
        let names = [row.workload.as_str(), row.subject, row.device];
        table.push(names.into_iter().map(str::to_owned).chain([p50, p99]).collect());
    }
    table
}

fn against(report: &Report) -> Table {
    let head = ["workload", "device", "IOPS ×", "CPU/IO ×"];
    let mut table = Table::new("extentd over the extentd of --against", 2, &head);
    let own = report.rows.iter().filter(|row| row.subject == "extentd-direct");
    for row in own.filter(|row| row.ratio_to_against.is_some()) {
        let ratios = [number(row.ratio_to_against, 3), number(row.cpu_ratio_to_against, 3)];
        let names = [row.workload.clone(), row.device.to_owned()];
        table.push(names.into_iter().chain(ratios).collect());
    }
    table
}

fn extents(report: &Report) -> Table {
    let head = ["extents", "kIOPS", "× one", "rounds", "p99 µs", "CPU µs/IO", "RSS MiB"];
    let mut table = Table::new("Images in pieces", 0, &head);
    for row in &report.extents {
        let [ratio, rounds] = spread(row.ratio);
        table.push(vec![
            row.extents.to_string(),
            format!("{:.1}", row.iops / 1000.0),
            ratio,
            rounds,
            format!("{:.1}", row.p99_us),
            format!("{:.2}", row.server_cpu_us_per_io),
            format!("{:.1}", row.peak_rss_kib as f64 / 1024.0),
        ]);
    }
    table
}

fn devices(report: &Report) -> Table {
    let head = [
        "subject",
        "devices",
        "processes",
        "threads",
        "RSS MiB",
        "PSS MiB",
        "kIOPS",
        "p99 µs",
        "CPU µs/IO",
    ];
    let mut table = Table::new("Many devices", 1, &head);
    for row in &report.devices {
        table.push(vec![
            row.subject.to_owned(),
            row.devices.to_string(),
            row.processes.to_string(),
            row.threads.to_string(),
            format!("{:.1}", row.rss_kib as f64 / 1024.0),
            format!("{:.1}", row.pss_kib as f64 / 1024.0),
            format!("{:.1}", row.iops / 1000.0),
            format!("{:.1}", row.p99_us),
            format!("{:.2}", row.server_cpu_us_per_io),
        ]);
    }
    table
}

fn neighbour(report: &Report) -> Table {
    let head = ["beside", "writes/s", "reads", "p50 µs", "p99 µs", "p99.9 µs"];
    let mut table = Table::new("A neighbour on the same disk", 1, &head);
    for row in &report.neighbour {
        table.push(vec![
            row.beside.to_owned(),
            format!("{:.0}", row.writes_per_s),
            row.reads.to_string(),
            format!("{:.1}", row.p50_us),
            format!("{:.1}", row.p99_us),
            format!("{:.1}", row.p999_us),
        ]);
    }
    table
}

fn idle(report: &Report) -> Table {
    let head = ["subject", "CPU %", "wake-ups", "RSS MiB", "PSS MiB", "threads"];
    let mut table = Table::new("Connected and idle", 1, &head);
    for row in &report.idle {
        table.push(vec![
            row.subject.to_owned(),
            format!("{:.2}", row.cpu_percent),
            row.wake_ups.to_string(),
            format!("{:.1}", row.rss_kib as f64 / 1024.0),
            format!("{:.1}", row.pss_kib as f64 / 1024.0),
            row.threads.to_string(),
        ]);
    }
    table
}

fn opening(report: &Report) -> Table {
    let mut table = Table::new("Opening", 0, &["1 MiB, ms", "1 TiB sparse, ms", "ratio"]);
    if let Some(row) = report.opening {
        table.push(vec![
            format!("{:.2}", row.mib_1_ms),
            format!("{:.2}", row.tib_1_ms),
            format!("{:.2}", row.ratio),
        ]);
    }
    table
}

fn page_cache(report: &Report) -> Table {
    let head = ["subject", "written MiB", "image KiB", "device KiB"];
    let mut table = Table::new("In the host's page cache afterwards", 1, &head);
    for row in &report.page_cache {
        table.push(vec![
            row.subject.to_owned(),
            (row.written_bytes >> 20).to_string(),
            row.image_kib.to_string(),
            row.device_kib.to_string(),
        ]);
    }
    table
}
