// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is in the plots and on the page, over a small report.

use super::super::page::page;
use super::super::report::report_tests::good;
use super::super::table::tables;
use super::*;

/// The names of the elements of `svg`, which must be well-formed: every element closed in order, attributes quoted, no
/// stray `<` or `&`.
fn elements(svg: &str) -> Vec<String> {
    let mut open: Vec<&str> = Vec::new();
    let mut found = Vec::new();
    let mut rest = svg.trim_start();
    if let Some(after) = rest.strip_prefix("<?xml") {
        rest = &after[after.find("?>").unwrap() + 2..];
    }
    while let Some(start) = rest.find('<') {
        assert!(!rest[..start].contains('>'));
        let end = start + rest[start..].find('>').unwrap();
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name.trim()));
            continue;
        }
        assert!(tag.matches('"').count().is_multiple_of(2) && !tag.contains('<'), "{tag}");
        let name = tag.split([' ', '\n', '/']).next().unwrap();
        found.push(name.to_owned());
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
    for after in svg.split('&').skip(1) {
        assert!(["amp;", "lt;", "gt;", "quot;", "apos;", "#"].iter().any(|e| after.starts_with(e)));
    }
    assert_eq!(found.first().map(String::as_str), Some("svg"));
    found
}

fn plot<'a>(plots: &'a [Plot], file: &str) -> &'a Plot {
    plots.iter().find(|plot| plot.file == file).unwrap_or_else(|| panic!("{file} is missing"))
}

#[test]
fn every_plot_is_svg_with_a_line_and_a_name_for_each_series() {
    let report = good();
    let plots = plots(&report).unwrap();
    for plot in &plots {
        let elements = elements(&plot.svg);
        let lines = elements.iter().filter(|name| *name == "polyline").count();
        assert!(lines > 0 && plot.svg.contains(&plot.title), "{}", plot.file);
        assert!(plot.svg.len() < 60 << 10, "{}: {} bytes", plot.file, plot.svg.len());
    }
    let read = &plot(&plots, "iops-read-by-depth.svg").svg;
    for subject in ["extentd-direct", "extentd-filesystem", "qemu-storage-daemon", "native-device"]
    {
        assert!(read.contains(subject), "{subject}");
    }
    assert!(!plot(&plots, "cpu-by-depth.svg").svg.contains("native-device"), "no server, no CPU");
    for file in ["latency-read-qd32.svg", "latency-fill.svg", "extents.svg"] {
        plot(&plots, file);
    }
    assert!(plot(&plots, "neighbour.svg").svg.contains("kernel-loop-buffered"));
    assert!(plot(&plots, "devices-memory.svg").svg.contains("a process each"));
    assert!(plots.iter().all(|plot| plot.file != "iops-by-queues.svg"), "one queue is no line");
}

#[test]
fn points_are_where_the_figures_are() {
    let report = good();
    let chart = by_depth(&report, "reads", Access::Read);
    let own = chart.series.iter().find(|series| series.name == "extentd-direct").unwrap();
    // Measured at depths 1, 32 and 128, the first, third and fourth place.
    assert_eq!(own.points, [(0.0, 6.0), (2.0, 6.0), (3.0, 6.0)]);
    let latency = latency(&report, "reads", Workload::READ_32);
    let own = &latency.series[0];
    let last = own.points.last().unwrap();
    assert!((last.0 - 4.0).abs() < 1e-6 && (last.1 - 1.0).abs() < 0.02, "{own:?}");
    assert!(nines(1.0).is_none() && nines(0.9).is_some_and(|p| (p - 1.0).abs() < 1e-9));
    assert_eq!(extents(&report).series[0].points, [(0.0, 1.0), (1.0, 1.0)]);
    let devices = devices_iops(&report);
    assert_eq!(devices.series.len(), 2);
    assert_eq!(devices.series[0].points, [(0.0, 100.0), (1.0, 100.0)]);
    assert_eq!(devices.series[1].points, [(1.0, 100.0)]);
}

#[test]
fn nothing_measured_is_no_plot() {
    let report = Report::new(super::super::report::Environment::default());
    assert!(plots(&report).unwrap().is_empty());
}

#[test]
fn numbers_on_axes_are_short() {
    let short = [(0.5, "0.5"), (9000.0, "9000"), (123_400.0, "123.4 k"), (1_048_576.0, "1.05 M")];
    for (value, text) in short {
        assert_eq!(number(value), text);
    }
}

#[test]
fn the_page_has_every_table_and_every_plot() {
    let mut report = good();
    report.compare();
    report.checks = crate::bench::targets::checks(&report);
    let plots = plots(&report).unwrap();
    let page = page(&report, "bench: ok", &plots);
    for plot in &plots {
        assert!(page.contains(&format!("]({})", plot.file)), "{}", plot.file);
    }
    let tables = tables(&report);
    for title in ["Targets", "Workloads", "Images in pieces", "Many devices", "Opening"] {
        assert!(tables.iter().any(|table| table.title() == title), "{title}");
    }
    assert!(!page.contains("not to be quoted"));
    report.environment.others_percent = 30.0;
    assert!(super::super::page::page(&report, "", &[]).contains("not to be quoted"));
    for table in tables {
        assert!(page.contains(&format!("## {}\n", table.title())));
        let widths: Vec<usize> =
            table.markdown().lines().map(|line| line.matches('|').count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{}", table.title());
        assert!(table.text().lines().count() >= 3);
    }
}
