// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the options choose.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: BenchArgs,
}

fn plan(options: &str) -> io::Result<Plan> {
    let words = std::iter::once("bench").chain(options.split_whitespace());
    Plan::new(&Cli::try_parse_from(words).unwrap().args)
}

fn names(plan: &Plan) -> Vec<String> {
    plan.passes.iter().map(|pass| pass.name(plan)).collect()
}

#[test]
fn a_whole_run_has_everything_and_a_quick_one_everything_with_a_target() {
    let (whole, quick) = (plan("").unwrap(), plan("--quick").unwrap());
    for plan in [&whole, &quick] {
        assert!(plan.whole && plan.targets.rounds >= 5);
        assert_eq!(plan.sections, Section::ALL);
        for workload in Workload::TARGETS.into_iter().chain([Workload::FILL]) {
            assert!(names(plan).contains(&workload.name()));
        }
    }
    assert_eq!(quick.passes.len(), 5);
    let all = Workload::TARGETS.len() * 3 + Workload::OTHERS.len();
    assert_eq!(whole.passes.len(), all);
    assert!(names(&whole).contains(&"randread-4k-qd32-q1-poll".to_owned()));
    let polled = whole.passes.iter().filter(|pass| pass.wait == Wait::Poll);
    assert_eq!(polled.map(|pass| pass.workload).collect::<Vec<_>>(), Workload::TARGETS);
    assert!(quick.passes.iter().all(|pass| pass.wait == Wait::Event));
    let on_disk = whole.passes.iter().filter(|pass| pass.device == Device::DiskLoop);
    assert_eq!(on_disk.count(), Workload::TARGETS.len());
    assert!(!whole.subjects.contains(&Subject::ExtentdAgainst));
}

#[test]
fn both_stay_within_their_time() {
    let seconds = |plan: &Plan| -> f64 {
        let of = |pass: &Pass| {
            let timing = pass.effort.timing;
            // To start a server, to connect to it and to end it.
            let run = (timing.warm_up + timing.measured).as_secs_f64() + 0.3;
            run * (pass.effort.rounds * plan.subjects.len()) as f64 + 3.0
        };
        plan.passes.iter().map(of).sum()
    };
    assert!(seconds(&plan("--quick").unwrap()) < 120.0);
    assert!(seconds(&plan("").unwrap()) < 22.0 * 60.0);
}

#[test]
fn names_choose_workloads_and_sections() {
    let some = plan("--workload randread-4k-qd32-q1,idle").unwrap();
    assert!(!some.whole);
    assert_eq!(names(&some), ["randread-4k-qd32-q1"]);
    assert_eq!(some.sections, [Section::Idle]);
    let quick = plan("--quick --workload discard").unwrap();
    assert_eq!(names(&quick), ["discard-64k-qd8-q1"]);
    assert_eq!(names(&plan("--workload qd128-q1-poll").unwrap()), ["randread-4k-qd128-q1-poll"]);
    let error = plan("--workload nonsense").unwrap_err().to_string();
    assert!(error.contains("randread-4k-qd32-q1") && error.contains("neighbour"), "{error}");
}

#[test]
fn the_other_extentd_is_a_subject_as_soon_as_it_is_named() {
    let chosen = plan("--against /bin/true --subjects extentd-direct").unwrap();
    assert_eq!(chosen.subjects, [Subject::ExtentdDirect, Subject::ExtentdAgainst]);
    assert!(!chosen.whole);
}

#[test]
fn a_device_or_a_way_to_wait_that_is_named_is_the_only_one() {
    for (name, wait) in [("poll", Wait::Poll), ("block", Wait::Event)] {
        let disk = plan(&format!("--device disk-loop --client {name}")).unwrap();
        assert!(disk.passes.iter().all(|p| p.device == Device::DiskLoop && p.wait == wait));
        assert!(names(&disk).iter().all(|name| !name.ends_with(wait.name())));
    }
    let disk = plan("--device disk-loop").unwrap();
    assert_eq!(disk.place_of(Section::Extents), Device::DiskLoop);
    assert_eq!(plan("").unwrap().place_of(Section::Neighbour), Device::DiskLoop);
}

#[test]
fn without_extentd_its_sections_are_left_out() {
    let peer = plan("--subjects qemu-storage-daemon").unwrap();
    assert_eq!(peer.sections, [Section::Idle, Section::PageCache]);
    assert!(plan("--seconds 0").is_err() && plan("--rounds 0").is_err());
}
