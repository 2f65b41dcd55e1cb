// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::atomic::AtomicU64;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress};

use super::*;

const MIB: usize = 1 << 20;

fn memory(file: &OwnedFd, bytes: usize) -> Memory {
    let file = FileOffset::new(file.try_clone().unwrap().into(), 0);
    Memory::from_ranges_with_files([(GuestAddress(0), bytes, Some(file))]).unwrap()
}

fn memfd(flags: MemfdFlags) -> OwnedFd {
    memfd_create("guest-ram", flags | MemfdFlags::CLOEXEC).unwrap()
}

fn rang(regions: &GuestRegions) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(regions, PollFlags::IN)], Some(&now)).unwrap() == 1
}

/// On a thread of its own, as a worker is.
fn on_a_thread<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(act).join().unwrap())
}

#[test]
fn what_a_shortened_file_had_reads_as_zeros_and_its_session_hears_of_it() {
    let file = memfd(MemfdFlags::empty());
    ftruncate(&file, MIB as u64).unwrap();
    let memory = memory(&file, MIB);
    let (regions, other) = (GuestRegions::new().unwrap(), GuestRegions::new().unwrap());
    regions.add(&memory).unwrap();
    regions.keep(&memory);
    memory.write_obj(7_u64, GuestAddress(0)).unwrap();
    memory.write_obj(9_u64, GuestAddress(8192)).unwrap();
    assert!(!regions.are_lost() && !rang(&regions));
    ftruncate(&file, 4096).unwrap();
    on_a_thread(|| {
        assert!(!regions.are_lost());
        assert_eq!(memory.read_obj::<u64>(GuestAddress(8192)).unwrap(), 0);
        assert!(regions.are_lost());
        // An object that is part here, part gone.
        assert_eq!(memory.read_obj::<u64>(GuestAddress(4092)).unwrap(), 0);
        memory.write_obj(5_u64, GuestAddress(12288)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(12288)).unwrap(), 5);
    });
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 7, "a page that is there");
    assert!(regions.are_lost() && rang(&regions));
    assert!(!other.are_lost() && !rang(&other), "another session");
}

/// Another thread that reads them without a fault of its own knows them for what they are.
#[test]
fn no_thread_reads_zeros_before_it_can_know_of_them() {
    const PAGES: usize = 64;
    for _ in 0..20 {
        let file = memfd(MemfdFlags::empty());
        ftruncate(&file, (PAGES * 4096) as u64).unwrap();
        let memory = memory(&file, PAGES * 4096);
        let regions = GuestRegions::new().unwrap();
        regions.add(&memory).unwrap();
        for page in 0..PAGES {
            memory.write_obj(7_u64, GuestAddress((page * 4096) as u64)).unwrap();
        }
        let begin = std::sync::Barrier::new(3);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    begin.wait();
                    loop {
                        for page in 0..PAGES {
                            let at = GuestAddress((page * 4096) as u64);
                            let word: u64 = memory.load(at, Ordering::Relaxed).unwrap();
                            let lost = regions.are_lost();
                            assert!(word == 7 || lost, "zeros that nobody knows of");
                            if lost {
                                return;
                            }
                        }
                    }
                });
            }
            begin.wait();
            ftruncate(&file, 0).unwrap();
        });
    }
}

#[test]
fn huge_pages_that_the_host_does_not_have() {
    let file = memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if ftruncate(&file, 4 * MIB as u64).is_err() || free.is_ok_and(|free| free.trim() != "0") {
        println!("skipped: there are huge pages, or the kernel knows none");
        return;
    }
    assert_eq!(page_size(file.as_fd()).unwrap(), 2 * MIB);
    let memory = memory(&file, 4 * MIB);
    let regions = GuestRegions::new().unwrap();
    regions.add(&memory).unwrap();
    for at in [3 * MIB, 0] {
        assert_eq!(on_a_thread(|| memory.read_obj::<u64>(GuestAddress(at as u64)).unwrap()), 0);
    }
    assert!(regions.are_lost());
}

#[test]
fn many_missing_pages_do_not_use_up_the_mappings_of_the_process() {
    const PAGES: usize = 20_000;
    let file = memfd(MemfdFlags::empty());
    ftruncate(&file, (PAGES * 4096) as u64).unwrap();
    let memory = memory(&file, PAGES * 4096);
    let regions = GuestRegions::new().unwrap();
    regions.add(&memory).unwrap();
    ftruncate(&file, 0).unwrap();
    let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let before = mappings();
    on_a_thread(|| {
        // Every other page, so that no two of them join to one mapping.
        for page in (0..PAGES).step_by(2) {
            let at = GuestAddress((page * 4096) as u64);
            assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
        }
    });
    assert!(mappings() < before + 2 * SINGLE_PAGES as usize + 64);
}

#[test]
fn many_missing_pages_are_survived_where_memory_is_limited() {
    for name in ["child_may_not_map_whole_regions", "child_may_have_little_data"] {
        let output = child(name);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{name}: {output:?}");
    }
}

/// Touches many pages of a region of [`LARGE`] bytes that is gone, once `limit` has been called.
fn touch_many(limit: impl FnOnce()) {
    if std::env::var_os("FAULT_TEST_CHILD").is_none() {
        return;
    }
    let file = memfd(MemfdFlags::empty());
    ftruncate(&file, LARGE as u64).unwrap();
    let memory = memory(&file, LARGE);
    let regions = GuestRegions::new().unwrap();
    regions.add(&memory).unwrap();
    ftruncate(&file, 0).unwrap();
    limit();
    for page in (0..8 * u64::from(SINGLE_PAGES)).step_by(2) {
        assert_eq!(memory.read_obj::<u64>(GuestAddress(page * 4096)).unwrap(), 0);
    }
    assert!(regions.are_lost());
    // There is room for what other devices need.
    assert_eq!(
        vec![1_u8; LARGE / 4].iter().map(|byte| u64::from(*byte)).sum::<u64>(),
        LARGE as u64 / 4
    );
}

const LARGE: usize = 128 * MIB;

#[test]
#[ignore = "limits its process; run by the test above"]
fn child_may_have_little_data() {
    touch_many(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let data = status.lines().find_map(|line| line.strip_prefix("VmData:")).unwrap();
        let data: u64 = data.trim().trim_end_matches("kB").trim().parse().unwrap();
        let limit = Some((data << 10) + LARGE as u64 / 2);
        let limit = rustix::process::Rlimit { current: limit, maximum: limit };
        rustix::process::setrlimit(rustix::process::Resource::Data, limit).unwrap();
    });
}

/// As with overcommit_memory=2, which is the host's.
#[test]
#[ignore = "limits its process; run by the test above"]
fn child_may_not_map_whole_regions() {
    touch_many(|| {
        let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let (load, jump, answer) = (0x20, 0x15, 0x06);
        let mut filter = [
            // The number of the call, and the lower half of its second argument.
            step(load, 0, 0, 0),
            step(jump, 0, 3, u32::try_from(libc::SYS_mmap).unwrap()),
            step(load, 0, 0, 24),
            step(jump, 0, 1, u32::try_from(LARGE).unwrap()),
            step(answer, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOMEM.cast_unsigned()),
            step(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: 6, filter: filter.as_mut_ptr() };
        // SAFETY: it takes numbers only.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        // SAFETY: `program` and the six steps it names are locals, which the kernel copies.
        let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) };
        assert_eq!(set, 0);
    });
}

/// Sessions come and go while another one's memory is touched: each fault finds its region.
#[test]
fn regions_are_found_while_others_come_and_go() {
    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let file = memfd(MemfdFlags::empty());
                    ftruncate(&file, 65536).unwrap();
                    let (one, two) = (memory(&file, 65536), memory(&file, 32768));
                    let regions = GuestRegions::new().unwrap();
                    regions.add(&one).unwrap();
                    regions.add(&two).unwrap();
                    regions.keep(&two);
                    drop(one);
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let file = memfd(MemfdFlags::empty());
        let mut faults = 0;
        while faults < 200 || rounds.load(Ordering::Relaxed) < 200 {
            let memory = memory(&file, 4096);
            let regions = GuestRegions::new().unwrap();
            regions.add(&memory).unwrap();
            assert_eq!(memory.read_obj::<u64>(GuestAddress(8)).unwrap(), 0);
            assert!(regions.are_lost());
            faults += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// Runs the `#[ignore]`d test `name` of this module in a process of its own.
fn child(name: &str) -> Output {
    let name = format!("sys::fault::tests::{name}");
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", &name])
        .env("FAULT_TEST_CHILD", "1")
        .output()
        .unwrap()
}

#[test]
#[ignore = "dies of SIGBUS; run by the test below"]
fn child_touches_memory_that_nobody_registered() {
    if std::env::var_os("FAULT_TEST_CHILD").is_none() {
        return;
    }
    let file = memfd(MemfdFlags::empty());
    ftruncate(&file, 8192).unwrap();
    let memory = memory(&file, 8192);
    let regions = GuestRegions::new().unwrap();
    regions.add(&memory).unwrap();
    regions.keep(&Memory::new());
    ftruncate(&file, 0).unwrap();
    let _ = memory.read_obj::<u64>(GuestAddress(0));
}

#[test]
#[ignore = "dies of SIGBUS; run by the test below"]
fn child_is_sent_the_signal() {
    if std::env::var_os("FAULT_TEST_CHILD").is_none() {
        return;
    }
    install().unwrap();
    let pid = rustix::process::getpid();
    rustix::process::kill_process(pid, rustix::process::Signal::BUS).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(30));
}

#[test]
fn any_other_sigbus_is_fatal() {
    for name in ["child_touches_memory_that_nobody_registered", "child_is_sent_the_signal"] {
        assert_eq!(child(name).status.signal(), Some(libc::SIGBUS), "{name}");
    }
}
