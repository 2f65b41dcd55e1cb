// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The verdict, over a report in which everything is as good as it had better be.

use super::*;
use crate::bench::report::report_tests::good;

fn judged(spoil: impl FnOnce(&mut Report)) -> (Report, String, bool) {
    let mut report = good();
    spoil(&mut report);
    report.compare();
    report.checks = checks(&report);
    let (line, ok) = verdict(&report);
    (report, line, ok)
}

/// The same report of a run that was to measure only some of it.
fn partial(mut report: Report) -> Report {
    report.environment.whole = false;
    report
}

/// The row of a subject under a workload.
fn row(report: &mut Report, subject: Subject, workload: Workload) -> &mut Row {
    let name = workload.name();
    let of = |row: &&mut Row| row.subject == subject.name() && row.workload == name;
    report.rows.iter_mut().find(of).unwrap()
}

#[test]
fn when_every_goal_is_reached_it_says_so() {
    let (report, line, ok) = judged(|_| {});
    for check in &report.checks {
        assert_eq!(check.verdict, Verdict::Goal, "{check:?}");
    }
    assert_eq!(report.checks.len(), 20);
    assert!(
        ok && line.starts_with("bench: ok (goals=20, musts=0, short=0, not_measured=0"),
        "{line}"
    );
    assert!(verdict(&partial(report)).0.starts_with("bench: partial"));
}

#[test]
fn every_must_can_fail_it() {
    let (direct, read) = (ExtentdDirect, Workload::READ_32);
    let spoil: [&dyn Fn(&mut Report); 11] = [
        &|r| row(r, QemuStorageDaemon, read).rounds.fill(3.0),
        &|r| row(r, NativeDevice, Workload::READ_128).rounds.fill(8.0),
        &|r| row(r, ExtentdFilesystem, Workload::WRITE_32).rounds.fill(5.5),
        &|r| row(r, NativeFile, Workload::READ_128).rounds.fill(5.0),
        &|r| row(r, QemuStorageDaemon, read).cpu_rounds.fill(2.0),
        &|r| row(r, QemuStorageDaemon, Workload::READ_1).p50_rounds.fill(15.0),
        &|r| row(r, direct, read).direct_share = Some(0.98),
        &|r| r.idle[0].cpu_percent = 0.1,
        &|r| r.opening.as_mut().unwrap().ratio = 2.1,
        &|r| r.extents[1].ratio = Some(Spread::exact(0.94)),
        &|r| r.page_cache[0].image_kib = 1025,
    ];
    for (index, spoil) in spoil.iter().enumerate() {
        let (report, line, ok) = judged(spoil);
        assert!(!ok && line.starts_with("bench: failed: "), "{index}: {line}");
        let missed: Vec<&Check> =
            report.checks.iter().filter(|c| c.verdict == Verdict::Missed).collect();
        assert_eq!(missed.len(), 1, "{index}: {missed:?}");
        assert!(line.contains(&missed[0].name) && line.contains("must be"), "{line}");
    }
}

/// The figure of a client that polls stands beside the one that is judged.
#[test]
fn the_other_client_is_not_judged() {
    let (report, _, ok) = judged(|report| {
        let mut polled = report.rows.clone();
        polled.iter_mut().for_each(|row| row.workload += "-poll");
        polled.iter_mut().for_each(|row| row.rounds.fill(1.0));
        report.rows.extend(polled);
    });
    let of = |name: &str| report.checks.iter().find(|check| check.name == name).unwrap();
    let check = of("IOPS / qemu-storage-daemon, read QD32");
    assert!(ok && check.verdict == Verdict::Goal && check.value.unwrap().median > 3.2);
    assert_eq!(check.otherwise, Some(1.0));
    assert_eq!(of("idle CPU, percent").otherwise, None);
    let table = crate::bench::table::tables(&report).remove(0).text();
    assert!(table.lines().nth(1).unwrap().ends_with("client poll"), "{table}");
}

#[test]
fn between_must_and_goal_is_well_enough() {
    let (report, _, ok) = judged(|r| r.idle[0].rss_kib = 6 << 10);
    assert!(ok);
    let check = report.checks.iter().find(|c| c.verdict == Verdict::Must).unwrap();
    assert_eq!(check.name, "memory of one idle device, MiB");
    assert_eq!((check.must_text(), check.goal_text()), ("<= 8".to_owned(), "<= 4".to_owned()));
}

#[test]
fn short_of_a_goal_without_a_must_is_no_failure() {
    let (report, line, ok) = judged(|r| row(r, ExtentdDirect, Workload::FILL).p999_us = 1e6);
    assert!(ok && line.contains("short=1"), "{line}");
    assert!(report.checks.iter().any(|c| c.verdict == Verdict::Short));
}

#[test]
fn what_was_not_measured_fails_a_whole_run_only() {
    let (report, line, ok) = judged(|r| r.extents.clear());
    assert!(!ok && line.contains("IOPS of 1 M extents / of 1, read QD32: not measured"), "{line}");
    let (line, ok) = verdict(&partial(report));
    assert!(ok && line.contains("not_measured=1"), "{line}");
    // Fewer extents than a million are not a million.
    let (_, line, ok) = judged(|r| r.extents[1].extents = 500_000);
    assert!(!ok && line.contains("not measured"), "{line}");
}

#[test]
fn what_went_wrong_fails_any_run() {
    let (report, line, ok) = judged(|r| r.failures.push("devices: too many".to_owned()));
    assert!(!ok && line == "bench: failed: devices: too many", "{line}");
    assert!(!verdict(&partial(report)).1);
}

#[test]
fn the_figures_of_another_disk_are_not_judged() {
    let (report, ..) = judged(|r| {
        let mut slow = row(r, ExtentdDirect, Workload::READ_32).clone();
        slow.device = "disk-loop";
        slow.rounds.fill(0.001);
        r.rows.insert(0, slow);
    });
    assert!(report.checks.iter().all(|check| check.verdict == Verdict::Goal));
}
