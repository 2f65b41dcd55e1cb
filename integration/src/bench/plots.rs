// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which plots there are, and what of the report is in them.

use std::io;

use clap::ValueEnum;

use super::chart::{Across, Chart, Series, nines, number};
use super::report::{QUANTILES, Report, Row};
use super::subject::Subject;
use super::workload::{Access, Workload};

const DEPTHS: [u16; 4] = [1, 4, 32, 128];
const QUEUES: [u16; 3] = [1, 2, 4];

/// A plot, drawn.
#[derive(Debug, Clone)]
pub(super) struct Plot {
    /// The name of its file.
    pub(super) file: &'static str,
    /// Its title.
    pub(super) title: String,
    /// The table it shows a part of.
    pub(super) belongs_to: &'static str,
    /// The file's text.
    pub(super) svg: String,
}

/// All plots for which something was measured.
pub(super) fn plots(report: &Report) -> io::Result<Vec<Plot>> {
    let workloads = "Workloads";
    let all = [
        ("iops-read-by-depth.svg", workloads, by_depth(report, "Random 4 KiB reads", Access::Read)),
        (
            "iops-write-by-depth.svg",
            workloads,
            by_depth(report, "Random 4 KiB writes", Access::Write),
        ),
        ("cpu-by-depth.svg", workloads, cpu_by_depth(report)),
        (
            "latency-read-qd32.svg",
            workloads,
            latency(report, "Random 4 KiB reads, QD32", Workload::READ_32),
        ),
        (
            "latency-fill.svg",
            workloads,
            latency(report, "4 KiB writes into a sparse image, QD32", Workload::FILL),
        ),
        ("iops-by-queues.svg", workloads, by_queues(report)),
        ("extents.svg", "Images in pieces", extents(report)),
        ("devices-memory.svg", "Many devices", devices_memory(report)),
        ("devices-iops.svg", "Many devices", devices_iops(report)),
        ("neighbour.svg", "A neighbour on the same disk", neighbour(report)),
    ];
    let mut plots = Vec::new();
    for (file, belongs_to, chart) in all {
        // A line of one point is no line.
        if chart.series.iter().any(|series| series.points.len() > 1) {
            plots.push(Plot { file, belongs_to, svg: chart.svg()?, title: chart.title });
        }
    }
    Ok(plots)
}

fn by_depth(report: &Report, what: &str, access: Access) -> Chart {
    let workloads = DEPTHS.map(|depth| Workload::random(access, depth, 1));
    Chart {
        title: format!("{what}: requests per second by queue depth"),
        across: Across::Places(DEPTHS.map(|depth| depth.to_string()).into()),
        across_name: "requests in flight",
        up_name: "IOPS",
        logarithmic: false,
        series: series(report, &workloads, |row| Some(row.iops)),
    }
}

fn cpu_by_depth(report: &Report) -> Chart {
    let workloads = DEPTHS.map(|depth| Workload::random(Access::Read, depth, 1));
    Chart {
        title: "Random 4 KiB reads: server CPU per request by queue depth".to_owned(),
        across: Across::Places(DEPTHS.map(|depth| depth.to_string()).into()),
        across_name: "requests in flight",
        up_name: "µs of CPU per request",
        logarithmic: false,
        series: series(report, &workloads, |row| row.server_cpu_us_per_io),
    }
}

fn by_queues(report: &Report) -> Chart {
    let workloads = QUEUES.map(|queues| Workload::random(Access::Read, 32, queues));
    Chart {
        title: "Random 4 KiB reads, 32 in flight on each queue".to_owned(),
        across: Across::Places(QUEUES.map(|queues| queues.to_string()).into()),
        across_name: "queues",
        up_name: "IOPS",
        logarithmic: false,
        series: series(report, &workloads, |row| Some(row.iops)),
    }
}

/// A line for each subject, with a point for each workload.
fn series(report: &Report, workloads: &[Workload], value: fn(&Row) -> Option<f64>) -> Vec<Series> {
    let of = |subject: Subject| {
        let point = |(place, workload): (usize, &Workload)| {
            Some((place as f64, report.row(subject, *workload).and_then(value)?))
        };
        workloads.iter().enumerate().filter_map(point).collect::<Vec<_>>()
    };
    let subjects = Subject::value_variants().iter().enumerate();
    subjects
        .map(|(colour, subject)| Series {
            name: subject.name().to_owned(),
            colour,
            points: of(*subject),
        })
        .filter(|series| !series.points.is_empty())
        .collect()
}

fn latency(report: &Report, what: &str, workload: Workload) -> Chart {
    let subjects = Subject::value_variants().iter().enumerate();
    let of = |(colour, subject): (usize, &Subject)| {
        let row = report.row(*subject, workload)?;
        Some((subject.name(), colour, row.latency_us.as_slice()))
    };
    distributions(format!("{what}: latency"), subjects.filter_map(of))
}

fn neighbour(report: &Report) -> Chart {
    let rows = report.neighbour.iter().enumerate();
    // extentd has the first colour everywhere.
    let colour = |index: usize| if index == 0 { 4 } else { index - 1 };
    distributions(
        "Reads of a neighbour while a guest writes: latency".to_owned(),
        rows.map(|(index, row)| (row.beside, colour(index), row.latency_us.as_slice())),
    )
}

fn distributions<'a>(
    title: String,
    lines: impl Iterator<Item = (&'a str, usize, &'a [f64])>,
) -> Chart {
    let points = |latencies: &[f64]| {
        let point =
            |(quantile, latency): (&f64, &f64)| Some((nines(*quantile)?, latency.max(0.1).log10()));
        QUANTILES.iter().zip(latencies).filter_map(point).collect()
    };
    Chart {
        title,
        across: Across::Quantiles,
        across_name: "percent of the requests that took no longer",
        up_name: "µs",
        logarithmic: true,
        series: lines
            .map(|(name, colour, latencies)| Series {
                name: name.to_owned(),
                colour,
                points: points(latencies),
            })
            .collect(),
    }
}

fn extents(report: &Report) -> Chart {
    let rows = || report.extents.iter().enumerate();
    let ratio = |(place, row): (usize, &super::sections::ExtentsRow)| {
        Some((place as f64, row.ratio?.median))
    };
    Chart {
        title: "Random 4 KiB reads, QD32, by the number of extents of the image".to_owned(),
        across: Across::Places(rows().map(|(_, row)| number(row.extents as f64)).collect()),
        across_name: "extents",
        up_name: "IOPS / IOPS of the image in one piece",
        logarithmic: false,
        series: vec![Series {
            name: Subject::ExtentdDirect.name().to_owned(),
            colour: 0,
            points: rows().filter_map(ratio).collect(),
        }],
    }
}

fn devices_memory(report: &Report) -> Chart {
    Chart {
        title: "Memory of all servers by the number of devices".to_owned(),
        up_name: "MiB (PSS)",
        series: by_devices(report, |row| row.pss_kib as f64 / 1024.0),
        ..devices_iops(report)
    }
}

fn devices_iops(report: &Report) -> Chart {
    Chart {
        title: "32 random reads in flight, spread over all devices".to_owned(),
        across: Across::Places(numbers(report).iter().map(usize::to_string).collect()),
        across_name: "devices",
        up_name: "IOPS",
        logarithmic: false,
        series: by_devices(report, |row| row.iops),
    }
}

/// The numbers of devices there are rows for.
fn numbers(report: &Report) -> Vec<usize> {
    let mut numbers: Vec<usize> = report.devices.iter().map(|row| row.devices).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

fn by_devices(report: &Report, value: fn(&super::sections::DevicesRow) -> f64) -> Vec<Series> {
    let numbers = numbers(report);
    let mut lines: Vec<Series> = Vec::new();
    for row in &report.devices {
        let in_one = row.processes == 1 && row.devices > 1;
        let name =
            format!("{}, {}", row.subject, if in_one { "one process" } else { "a process each" });
        let place = numbers.iter().position(|number| *number == row.devices).unwrap_or(0);
        let point = (place as f64, value(row));
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Series { name, colour: lines.len(), points: vec![point] }),
        }
    }
    lines
}

#[cfg(test)]
#[path = "plots_tests.rs"]
mod plots_tests;
