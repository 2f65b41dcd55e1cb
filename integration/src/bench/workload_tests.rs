// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Names, and the requests that come out.

use super::*;

const SIZE: u64 = 64 << 20;

/// `n` requests, all of slot 0 in turn with the others.
fn requests(workload: Workload, n: usize) -> Vec<Request> {
    let mut source = Source::new(workload, SIZE);
    let slots = usize::from(workload.slots());
    (0..n).map(|i| source.next(u16::try_from(i % slots).unwrap())).collect()
}

#[test]
fn names_are_those_of_the_interface_and_no_two_are_the_same() {
    assert_eq!(Workload::READ_32.name(), "randread-4k-qd32-q1");
    let mut names: Vec<String> =
        Workload::TARGETS.iter().chain(&Workload::OTHERS).map(|w| w.name()).collect();
    for name in ["randrw-4k-qd128-q1", "seqread-128k-qd8-q1", "seqwrite-1m-qd4-q1"] {
        assert!(names.iter().any(|n| n == name), "{name}");
    }
    for name in ["randwrite-4k-qd32-q1-flush8", "fill-4k-qd32-q1", "discard-64k-qd8-q1"] {
        assert!(names.iter().any(|n| n == name), "{name}");
    }
    let all = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all);
}

#[test]
fn every_request_lies_inside_the_disk_and_on_a_block() {
    for workload in Workload::TARGETS.into_iter().chain(Workload::OTHERS) {
        for request in requests(workload, 3000) {
            let (Request::Read(place) | Request::Write(place) | Request::Discard(place)) = request
            else {
                continue;
            };
            assert_eq!(place % u64::from(workload.block), 0);
            assert!(place + u64::from(workload.block) <= SIZE);
        }
    }
}

#[test]
fn a_flush_follows_every_so_many_writes() {
    for every in [1, 8, 64] {
        let all = requests(Workload::flushing(32, every), 65 * 8);
        let flushes = all.iter().filter(|r| **r == Request::Flush).count();
        assert_eq!(flushes, all.len() / (every as usize + 1));
        let first = all.iter().position(|r| *r == Request::Flush);
        assert_eq!(first, Some(every as usize));
    }
}

#[test]
fn seven_of_ten_mixed_requests_are_reads() {
    let all = requests(Workload::random(Access::Mixed, 4, 1), 10_000);
    let reads = all.iter().filter(|r| matches!(r, Request::Read(_))).count();
    assert!((6800..7200).contains(&reads), "{reads}");
}

#[test]
fn a_discard_is_of_what_its_slot_has_written() {
    let workload = Workload::random(Access::Discard, 4, 1);
    let source = Source::new(workload, SIZE);
    let all = requests(workload, 64);
    for (i, request) in all.iter().enumerate() {
        match request {
            Request::Write(_) => assert!(i % 8 < 4 && !source.counts(*request)),
            Request::Discard(place) => {
                assert_eq!(all[i - 4], Request::Write(*place));
                assert!(source.counts(*request));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn sequential_requests_begin_again_at_the_end() {
    let all = requests(Workload::sequential(Access::Read, 1 << 20, 4), 65);
    assert_eq!(all[1], Request::Read(1 << 20));
    assert_eq!(all[63], Request::Read(63 << 20));
    assert_eq!(all[64], Request::Read(0));
}

#[test]
fn a_device_is_given_neither_holes_nor_discards() {
    assert!(!Workload::FILL.suits(Subject::NativeDevice));
    assert!(Workload::FILL.suits(Subject::NativeFile));
    assert!(Workload::READ_1.suits(Subject::NativeDevice));
    assert!(!Workload::FILL.all_direct());
}

#[test]
fn sectors_are_written_by_servers_only() {
    assert_eq!(Workload::SECTORS_32.name(), "randwrite-512-qd32-q1");
    for subject in [Subject::ExtentdDirect, Subject::ExtentdFilesystem, Subject::QemuStorageDaemon]
    {
        assert!(Workload::SECTORS_32.suits(subject));
    }
    assert!(!Workload::SECTORS_32.suits(Subject::NativeFile));
    assert!(!Workload::SECTORS_32.suits(Subject::NativeDevice));
}
