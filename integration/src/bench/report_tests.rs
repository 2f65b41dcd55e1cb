// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The verdict and the format of `report.json`.

use super::*;
use crate::bench::load::Sample;

fn outcomes(iops: &[f64]) -> Vec<Outcome> {
    let outcome = |iops: &f64| Outcome {
        sample: Sample { iops: *iops, ..Sample::default() },
        direct_share: Some(1.0),
        ..Outcome::default()
    };
    iops.iter().map(outcome).collect()
}

fn report(own: &[f64], peer: &[f64]) -> Report {
    let mut report = Report::new(Environment::default());
    for (subject, iops) in [(Subject::ExtentdDirect, own), (Subject::QemuStorageDaemon, peer)] {
        report.rows.push(Row::new(subject, Workload::READ_32, "tmpfs-loop", &outcomes(iops)));
    }
    report.idle.push(IdleRow::new(Subject::ExtentdDirect, Idle { ticks: 0, wake_ups: 0 }));
    report.opening = Some(Opening { small_ms: 5.0, large_ms: 6.0 }.into());
    report.compare();
    report.judge();
    report
}

#[test]
fn ratios_are_taken_round_by_round() {
    // The medians' ratio would be 1.0: the machine was busy in other rounds for the one than for the other.
    let report = report(&[100.0, 200.0, 300.0], &[50.0, 200.0, 150.0]);
    let row = report.row(Subject::ExtentdDirect, Workload::READ_32).unwrap();
    assert_eq!(row.ratio_to_peer, Some(2.0));
    let (line, ok) = report.verdict(true);
    assert!(ok && line.starts_with("bench: ok (randread-4k-qd32-q1=2.00x"), "{line}");
    assert!(report.verdict(false).0.starts_with("bench: partial"));
}

#[test]
fn another_extentd_is_compared_round_by_round() {
    let mut report = report(&[100.0, 300.0], &[50.0, 50.0]);
    let mut against = outcomes(&[80.0, 400.0]);
    against.iter_mut().for_each(|outcome| outcome.cpu_us_per_io = Some(4.0));
    let row = Row::new(Subject::ExtentdAgainst, Workload::READ_32, "tmpfs-loop", &against);
    report.rows.push(row);
    report.rows[0].server_cpu_us_per_io = Some(3.0);
    report.compare();
    let row = report.row(Subject::ExtentdDirect, Workload::READ_32).unwrap();
    assert_eq!((row.ratio_to_against, row.cpu_ratio_to_against), (Some(1.0), Some(0.75)));
    let table = report.table();
    assert!(table.contains("against: randread-4k-qd32-q1    IOPS 1.000 x, CPU per I/O 0.750 x"));
}

#[test]
fn every_figure_can_fail_it() {
    let spoil: [fn(&mut Report); 4] = [
        |r| r.rows[0].rounds = vec![74.0],
        |r| r.rows[0].direct_share = Some(0.98),
        |r| r.idle[0].cpu_ticks = 1,
        |r| r.opening = Some(Opening { small_ms: 5.0, large_ms: 10.1 }.into()),
    ];
    for spoil in spoil {
        let mut report = report(&[100.0], &[50.0]);
        assert!(report.verdict(true).1);
        spoil(&mut report);
        report.compare();
        report.judge();
        let (line, ok) = report.verdict(true);
        assert!(!ok && line.starts_with("bench: failed: "), "{line}");
        assert_eq!(line.matches("found").count(), 1, "{line}");
    }
}

#[test]
fn the_file_has_the_fields_scripts_depend_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("new");
    report(&[100.0], &[50.0]).write(&out).unwrap();
    let text = std::fs::read_to_string(out.join("report.json")).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["version"], 1);
    assert!(value["environment"].is_object());
    let row = &value["rows"][0];
    assert_eq!(row["subject"], "extentd-direct");
    assert_eq!(row["workload"], "randread-4k-qd32-q1");
    let fields = [
        "device",
        "iops",
        "mb_s",
        "p50_us",
        "p99_us",
        "p999_us",
        "server_cpu_us_per_io",
        "syscalls_per_io",
        "peak_rss_kib",
        "rounds",
        "busy_percent",
    ];
    for field in fields {
        assert!(row.get(field).is_some(), "{field}");
    }
}
