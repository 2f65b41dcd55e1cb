// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a daemon costs the house it runs in: the host's page cache, memory, and the CPU while nothing happens.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use extentd::engine::units::FileRange;
use extentd::sys::page_cache;
use integration::rig::scope::Sysctl;
use integration::rig::{
    Backing, Bed, Client, ClientOptions, Daemon, Filesystem, Kind, Layout, Queue, Random, Request,
    Rig, Setup, Shape,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

/// The daemon's own descriptor of `path`: opening the file would break the lease.
fn descriptor(pid: u32, path: &Path) -> OwnedFd {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let fd = links
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == path))
        .find_map(|entry| entry.file_name().to_str()?.parse().ok())
        .unwrap();
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    pidfd_getfd(process, fd, PidfdGetfdFlags::empty()).unwrap()
}

/// Writes every byte of `range`, 256 KiB at a time, as many at a time as the queue takes.
fn write_all(queue: &mut Queue, range: std::ops::Range<u64>, data: &[u8]) {
    for offset in range.step_by(data.len()) {
        let request = Request::Write { offset, data };
        while let Err(error) = queue.submit(request, &Shape::whole(), 0) {
            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
            queue.kick().unwrap();
            queue.wait().unwrap().into_iter().for_each(|done| drop(done.result.unwrap()));
        }
    }
    queue.kick().unwrap();
    queue.drain().unwrap().into_iter().for_each(|done| drop(done.result.unwrap()));
}

/// Guests fill half a GiB of holes and write it again: the host's cache has nothing of it, neither of the file
/// nor of the disk below.
#[test]
fn the_host_caches_nothing_of_what_a_guest_writes() {
    const SIZE: u64 = 512 * MIB;
    let Some(rig) = Rig::enter() else { return };
    let setup = Setup { disk: 700 * MIB, size: SIZE, layout: Layout::Sparse, ..Setup::default() };
    let bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(SOON).unwrap();
    let mut client = bed.connect(1).unwrap();
    let data = Random::new(1).bytes(256 << 10);
    let queue = client.queue(0).unwrap();
    write_all(queue, 0..SIZE, &data);
    write_all(queue, 0..SIZE, &data);
    // Odd ends of blocks are read, changed and written.
    for at in 0..256 {
        queue.write_at(at * MIB + 512, &data[..1024]).unwrap();
        queue.read_at(at * MIB, 4096).unwrap();
    }
    queue.flush().unwrap();
    let status = bed.daemon.status().unwrap();
    assert!(status.direct() && status.number("segments/direct") >= SIZE / MIB * 4, "{status:?}");

    let image = descriptor(bed.daemon.pid(), &bed.image);
    let cached = |fd: &OwnedFd, range| page_cache::pages(fd.as_fd(), range).unwrap().cached;
    assert_eq!(cached(&image, FileRange::ALL), 0, "pages of the image");
    let disk = OwnedFd::from(File::open(bed.fs.disk().path()).unwrap());
    let map = bed.daemon.control("map").unwrap();
    let mut bytes = 0;
    for extent in map["extents"].as_array().unwrap() {
        let length = extent["length"].as_u64().unwrap();
        if let Some(at) = extent["physical"].as_u64() {
            assert_eq!(cached(&disk, FileRange::new(at, at + length)), 0, "of the disk: {extent}");
            bytes += length;
        }
    }
    assert_eq!(bytes, SIZE, "{map}");
}

/// The numbers of a process's status file that begin with `name`, in KiB where it says so.
fn number(path: &str, name: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// How often each thread has gone to sleep. Not the kernel's own workers for io_uring: it keeps one, and looks every five
/// seconds whether it is still needed.
fn sleeps(pid: u32) -> Vec<(String, u64)> {
    let mut sleeps: Vec<(String, u64)> = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .flatten()
        .map(|task| {
            let status = format!("{}/status", task.path().display());
            let name = fs::read_to_string(task.path().join("comm")).unwrap();
            let name = format!("{} {}", name.trim(), task.file_name().display());
            (name, number(&status, "voluntary_ctxt_switches:"))
        })
        .collect();
    sleeps.retain(|(name, _)| !name.starts_with("iou-wrk"));
    sleeps.sort();
    sleeps
}

/// With a frontend connected and nothing to do, no thread wakes up, and little memory is used.
#[test]
fn an_idle_daemon_sleeps_and_is_small() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    bed.await_direct(SOON).unwrap();
    let mut client = bed.connect(2).unwrap();
    client.write_at(0, &[1; 4096]).unwrap();
    client.read_at(0, 4096).unwrap();
    client.flush().unwrap();
    let pid = bed.daemon.pid();
    // What follows from the last request (the mtime, once a second) is done after a while, and for good.
    let mut before = sleeps(pid);
    integration::rig::wait::until("a second of sleep", SOON, || {
        thread::sleep(Duration::from_secs(1));
        let now = sleeps(pid);
        let same = now == before;
        before = now;
        same.then_some(())
    })
    .unwrap();
    thread::sleep(Duration::from_secs(4));
    assert_eq!(sleeps(pid), before, "threads have woken up");

    let status = format!("/proc/{pid}/status");
    let (anonymous, all) = (number(&status, "RssAnon:"), number(&status, "VmRSS:"));
    println!("idle: {all} KiB resident, {anonymous} KiB of them anonymous");
    // The program itself is larger in a test's build than in a release's; what it allocates is not.
    assert!(anonymous <= 2048, "{anonymous} KiB of anonymous memory");
    assert!(all <= 12 << 10, "{all} KiB resident");
}

/// Golden images: many readers of one file, each its own process.
#[test]
fn serial_three_hundred_read_only_daemons_fit() {
    const DAEMONS: u64 = 300;
    let Some(rig) = Rig::enter() else { return };
    let _watches = Sysctl::more_watches().unwrap();
    let fs = rig.dir("fs").unwrap();
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &fs).unwrap();
    let images: Vec<PathBuf> = (0..3).map(|n| fs.path().join(format!("image-{n}"))).collect();
    let contents: Vec<Vec<u8>> = (0..3)
        .zip(&images)
        .map(|(seed, image)| Layout::Written.make(image, 4 * MIB, seed).unwrap())
        .collect();
    let mut served: Vec<(Client, Daemon)> = Vec::new();
    for number in 0..DAEMONS {
        let image = usize::try_from(number % 3).unwrap();
        let dir = rig.dir(&format!("run-{number}")).unwrap();
        let options = ["--read-only", "--mode=direct"];
        let daemon = Daemon::start(Path::new(PROGRAM), &dir, &images[image], &options).unwrap();
        let mut client = Client::connect(daemon.socket(), &ClientOptions::default()).unwrap();
        assert_eq!(client.capacity(), 4 * MIB);
        let at = number % 1000 * 4096;
        let start = usize::try_from(at).unwrap();
        let read = client.read_at(at, 4096).unwrap();
        assert!(read == contents[image][start..start + 4096], "daemon {number}");
        served.push((client, daemon));
    }
    let pss = |daemon: &Daemon| number(&format!("/proc/{}/smaps_rollup", daemon.pid()), "Pss:");
    let all: u64 = served.iter().map(|(_, daemon)| pss(daemon)).sum();
    println!("{DAEMONS} daemons: {} MiB", all >> 10);
    assert!(all <= 1 << 20, "{all} KiB");
    assert!(served.iter().all(|(_, daemon)| daemon.status().unwrap().direct()));
    for (client, mut daemon) in served {
        drop(client);
        assert!(daemon.sigterm().unwrap().success(), "{}", daemon.log());
    }
}
