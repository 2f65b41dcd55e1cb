// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The shape of `report.json`, and what a row is of its rounds. Also a report to try everything else on.

use super::*;
use crate::bench::load::Sample;
use crate::bench::sections::Situation;

/// An outcome of `iops` requests in a second, each of `micros` microseconds.
fn outcome(iops: u64, micros: u64) -> Outcome {
    let mut sample = Sample { seconds: 1.0, idle_looks: 3.0, ..Sample::default() };
    (0..iops).for_each(|_| sample.latencies.record(micros * 1000));
    Outcome { sample, ..Outcome::default() }
}

fn row(subject: Subject, workload: Workload, iops: u64, micros: u64) -> Row {
    let mut outcomes = vec![outcome(iops, micros); 3];
    for outcome in &mut outcomes {
        if subject.has_server() {
            outcome.cpu_us_per_io = Some(micros as f64 / 10.0);
            outcome.peak_rss_kib = Some(4000);
        }
        outcome.direct_share = (subject == Subject::ExtentdDirect).then_some(1.0);
    }
    Row::new(subject, workload, Device::TmpfsLoop, &outcomes)
}

/// A report in which every goal is reached.
pub(in crate::bench) fn good() -> Report {
    let environment = Environment { device: "tmpfs-loop", whole: true, ..Environment::default() };
    let mut report = Report::new(environment);
    for workload in Workload::TARGETS.into_iter().chain([Workload::FILL]) {
        use Subject::*;
        let figures = [
            (ExtentdDirect, 6, 10),
            (ExtentdFilesystem, 4, 20),
            (QemuStorageDaemon, 1, 50),
            (NativeDevice, 6, 9),
            (NativeFile, 4, 10),
        ];
        for (subject, iops, micros) in figures {
            if workload.suits(subject) {
                report.rows.push(row(subject, workload, iops, micros));
            }
        }
    }
    let name = Subject::ExtentdDirect.name();
    report.idle.push(IdleRow {
        subject: name,
        cpu_percent: 0.0,
        wake_ups: 0,
        rss_kib: 4000,
        pss_kib: 3000,
        threads: 4,
    });
    report.opening = Some(OpeningRow::new(&[5.0, 4.0, 6.0], &[5.0, 5.0, 5.0]));
    let pieces = |extents| ExtentsRow {
        extents,
        iops: 100.0,
        p99_us: 10.0,
        latency_us: vec![10.0; QUANTILES.len()],
        server_cpu_us_per_io: 1.0,
        peak_rss_kib: 5000,
        rounds: vec![100.0],
        ratio: Some(Spread::exact(1.0)),
    };
    report.extents = vec![pieces(1), pieces(1 << 20)];
    let devices = |devices, processes| DevicesRow {
        subject: name,
        devices,
        processes,
        threads: 4,
        rss_kib: 4000,
        pss_kib: 1000,
        iops: 100.0,
        p99_us: 10.0,
        server_cpu_us_per_io: 1.0,
    };
    report.devices = vec![devices(1, 1), devices(300, 300), devices(300, 1)];
    let beside = |situation: Situation, p99_us: f64| NeighbourRow {
        beside: situation.name(),
        writes_per_s_wanted: 10.0,
        writes_per_s: 10.0,
        reads: 100,
        p50_us: 50.0,
        p99_us,
        p999_us: p99_us,
        p99_rounds: vec![p99_us],
        latency_us: vec![p99_us; QUANTILES.len()],
    };
    report.neighbour =
        vec![beside(Situation::Extentd, 100.0), beside(Situation::KernelLoop, 1000.0)];
    report.page_cache.push(CacheRow {
        subject: name,
        written_bytes: 2 << 30,
        image_kib: 0,
        device_kib: 0,
    });
    report
}

#[test]
fn ratios_are_taken_round_by_round_and_on_the_same_disk() {
    let mut report = Report::new(Environment { device: "tmpfs-loop", ..Environment::default() });
    let add = |report: &mut Report, subject, device, rounds: &[f64], cpu: &[f64]| {
        let mut row = row(subject, Workload::READ_32, 1, 1);
        (row.rounds, row.cpu_rounds, row.device) = (rounds.into(), cpu.into(), device);
        report.rows.push(row);
    };
    let (own, other) = (Subject::ExtentdDirect, Subject::ExtentdAgainst);
    add(&mut report, own, "tmpfs-loop", &[100.0, 200.0, 300.0], &[3.0, 3.0, 3.0]);
    add(&mut report, other, "disk-loop", &[1.0, 1.0, 1.0], &[1.0]);
    add(&mut report, other, "tmpfs-loop", &[50.0, 200.0, 150.0], &[4.0, 2.0, 4.0]);
    add(&mut report, Subject::NativeFile, "tmpfs-loop", &[400.0, 400.0, 400.0], &[]);
    report.compare();
    let row = report.row(own, Workload::READ_32).unwrap();
    assert_eq!((row.ratio_to_against, row.cpu_ratio_to_against), (Some(2.0), Some(0.75)));
    assert_eq!((row.ratio_to_peer, row.ratio_to_native), (None, Some(0.5)));
}

#[test]
fn a_row_has_medians_and_spreads_and_all_latencies() {
    let outcomes = [outcome(100, 10), outcome(300, 30), outcome(200, 20)];
    let row = Row::new(Subject::ExtentdDirect, Workload::READ_32, Device::DiskLoop, &outcomes);
    assert_eq!((row.iops, row.spread_percent), (200.0, 100.0));
    assert_eq!(row.rounds, [100.0, 300.0, 200.0]);
    assert_eq!(row.mb_s, 200.0 * 4096.0 / 1e6);
    assert!((row.p50_us / 20.0 - 1.0).abs() < 0.02);
    // Half of all requests took 30 µs.
    assert_eq!(row.latency_us.len(), QUANTILES.len());
    assert!((row.latency_us[9] / 30.0 - 1.0).abs() < 0.02, "{:?}", row.latency_us);
    assert_eq!((row.server_cpu_us_per_io, row.flush_p50_us), (None, None));
    assert_eq!(row.device, "disk-loop");
}

#[test]
fn the_file_has_the_fields_scripts_depend_on() {
    let mut report = good();
    report.compare();
    report.checks = crate::bench::targets::checks(&report);
    let text = report.json().unwrap();
    assert_eq!(text, report.json().unwrap());
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["version"], 1);
    assert!(value["environment"].is_object());
    let row = &value["rows"][5];
    assert_eq!(row["subject"], "extentd-direct");
    assert_eq!(row["workload"], "randread-4k-qd32-q1");
    assert_eq!(row["device"], "tmpfs-loop");
    let numbers =
        ["iops", "mb_s", "p50_us", "p99_us", "p999_us", "server_cpu_us_per_io", "peak_rss_kib"];
    for field in numbers {
        assert!(row[field].is_number(), "{field}");
    }
    for field in ["syscalls_per_io", "busy_percent"] {
        assert!(row[field].is_null(), "{field} was not measured");
    }
    assert_eq!(row["rounds"].as_array().unwrap().len(), 3);
    let quantiles = value["quantiles"].as_array().unwrap().len();
    assert_eq!(row["latency_us"].as_array().unwrap().len(), quantiles);
    for list in ["checks", "rows", "idle", "extents", "devices", "neighbour", "page_cache"] {
        assert!(!value[list].as_array().unwrap().is_empty(), "{list}");
    }
    assert_eq!(value["checks"][0]["verdict"], "goal");
    assert_eq!(value["opening"]["ratio"], 1.0);
}

#[test]
fn an_empty_report_is_a_file_too() {
    let text = Report::new(Environment::default()).json().unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["rows"].as_array().unwrap().len(), 0);
    assert!(value["opening"].is_null());
}
