// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Starting, sharing and resting: what it costs to open an image, who else may, and what an idle daemon does.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use integration::rig::command::spawn;
use integration::rig::model::Model;
use integration::rig::wait::{PATIENCE, until};
use integration::rig::workload::Workload;
use integration::rig::{
    Backing, Bed, Client, ClientOptions, Daemon, Filesystem, Kind, Layout, LoopDisk, Rig, Setup,
    Status,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

fn daemon(rig: &Rig, name: &str, image: &Path, options: &[&str]) -> std::io::Result<Daemon> {
    let dir = rig.path().join(name);
    std::fs::create_dir_all(&dir)?;
    Daemon::start(Path::new(PROGRAM), &dir, image, options)
}

/// Starts one more daemon for `image`, which must not get as far as its socket.
fn rival(rig: &Rig, image: &Path) -> (Child, PathBuf) {
    let socket = rig.dir("rival").unwrap().join("blk.sock");
    let mut command = Command::new(PROGRAM);
    command.arg("--blk-file").arg(image).arg("--socket-path").arg(&socket).stderr(Stdio::null());
    (spawn(&mut command).unwrap(), socket)
}

#[test]
fn read_only_images_are_shared() {
    let Some(rig) = Rig::enter() else { return };
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &rig.dir("fs").unwrap())
        .unwrap();
    let image = fs.path().join("image");
    let mut model = Model::new(Layout::Mixed.make(&image, 8 * MIB, 1).unwrap());
    let first = daemon(&rig, "first", &image, &["--read-only"]).unwrap();
    let second = daemon(&rig, "second", &image, &["--read-only"]).unwrap();
    for daemon in [&first, &second] {
        daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
        let mut client = Client::connect(daemon.socket(), &ClientOptions::queues(2)).unwrap();
        assert_ne!(client.features() & (1 << 5), 0, "VIRTIO_BLK_F_RO is not offered");
        let load = Workload { requests: 300, write: false, ..Workload::default() };
        load.run(client.queues(), &mut model).unwrap();
        assert!(client.write_at(0, &[1; 512]).is_err(), "a write to a read-only image");
        assert!(daemon.status().unwrap().number("segments/direct") > 0);
    }
    // A writer is refused while they share it, and a reader of the file disturbs neither.
    let (mut writer, socket) = rival(&rig, &image);
    std::thread::sleep(Duration::from_millis(500));
    let served = socket.exists();
    writer.kill().unwrap();
    writer.wait().unwrap();
    assert!(!served, "a writer serves an image that others share");
    model.check(0, &std::fs::read(&image).unwrap()).unwrap();
    for daemon in [&first, &second] {
        daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    }
}

/// A reader keeps a writable image from direct mode, and a read-only one not: `extentctl check` says so for both.
#[test]
fn a_check_answers_for_the_daemon_that_is_meant() {
    let Some(rig) = Rig::enter() else { return };
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &rig.dir("fs").unwrap())
        .unwrap();
    let image = fs.path().join("image");
    Layout::Mixed.make(&image, 8 * MIB, 1).unwrap();
    let check = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_extentctl"));
        command.arg("check").arg(&image).args(options).stdout(Stdio::null());
        spawn(&mut command).unwrap().wait().unwrap().code()
    };
    assert_eq!((check(&[]), check(&["--read-only"])), (Some(0), Some(0)));
    let reader = File::open(&image).unwrap();
    assert_eq!((check(&[]), check(&["--read-only"])), (Some(1), Some(0)));
    drop(reader);
}

#[test]
fn a_writable_image_has_one_daemon() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    client.write_at(0, &[1; 4096]).unwrap();
    // The second waits for the lock a while; what matters is that the first goes on and the second never serves.
    let (mut second, socket) = rival(&rig, &bed.image);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        client.write_at(4096, &[2; 4096]).unwrap();
        assert!(!socket.exists(), "two daemons serve one image");
    }
    second.kill().unwrap();
    second.wait().unwrap();
    bed.await_direct(PATIENCE).unwrap();
    assert_eq!(client.read_at(4096, 4096).unwrap(), vec![2; 4096]);
}

#[test]
fn a_writable_block_device_has_one_daemon() {
    let Some(rig) = Rig::enter() else { return };
    let disk = LoopDisk::attach(8 * MIB, 512, &Backing::Memory).unwrap();
    let first = daemon(&rig, "first", disk.path(), &[]).unwrap();
    let (mut second, socket) = rival(&rig, disk.path());
    std::thread::sleep(Duration::from_millis(500));
    let served = socket.exists();
    second.kill().unwrap();
    second.wait().unwrap();
    assert!(!served, "two daemons serve one block device");
    drop(first);
}

/// A start that waits names the process it waits for, for a device as for a file; the kernel itself names none for such locks.
#[test]
fn the_holder_of_a_lock_is_named_at_once() {
    let Some(rig) = Rig::enter() else { return };
    let disk = LoopDisk::attach(8 * MIB, 512, &Backing::Memory).unwrap();
    let file = rig.path().join("image");
    std::fs::write(&file, vec![0; 1 << 20]).unwrap();
    for (name, image, options) in [
        ("device", disk.path(), &[][..]),
        ("file", &file, &[]),
        ("shared", &file, &["--read-only"]),
    ] {
        let first = daemon(&rig, name, image, options).unwrap();
        let log = rig.path().join(format!("{name}.log"));
        let mut command = Command::new(PROGRAM);
        command.arg("--blk-file").arg(image).arg("--socket-path").arg(rig.path().join("never"));
        let mut second = spawn(command.stderr(File::create(&log).unwrap())).unwrap();
        let line = format!("locked by another process, pid {} (extentd); waiting", first.pid());
        let said = || std::fs::read_to_string(&log).unwrap().contains(&line).then_some(());
        let told = until("the name of the holder", PATIENCE, said);
        second.kill().unwrap();
        second.wait().unwrap();
        told.unwrap_or_else(|_| panic!("{name}: {}", std::fs::read_to_string(&log).unwrap()));
    }
}

/// While somebody has the image open, it is served through the filesystem; when he has gone, directly.
#[test]
fn an_image_open_elsewhere_starts_in_filesystem_mode() {
    let Some(rig) = Rig::enter() else { return };
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &rig.dir("fs").unwrap())
        .unwrap();
    let image = fs.path().join("image");
    let mut model = Model::new(Layout::Written.make(&image, 8 * MIB, 1).unwrap());
    let reader = File::open(&image).unwrap();
    let daemon = daemon(&rig, "run", &image, &[]).unwrap();
    let status = daemon.status().unwrap();
    assert!(!status.direct() && !status.reason().is_empty(), "{status:?}");
    let mut client = Client::connect(daemon.socket(), &ClientOptions::queues(2)).unwrap();
    let load = Workload { requests: 200, ..Workload::default() };
    load.run(client.queues(), &mut model).unwrap();
    drop(reader);
    daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    Workload { seed: 2, ..load }.run(client.queues(), &mut model).unwrap();
    drop((client, daemon));
    model.check(0, &std::fs::read(&image).unwrap()).unwrap();
    fs.check().unwrap();
}

/// Opening 1 TiB costs what 1 MiB costs: the same number of FIEMAP calls. The bench compares the times, which are noise here.
#[test]
fn opening_a_tebibyte_costs_what_a_mebibyte_costs() {
    let Some(rig) = Rig::enter() else { return };
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &rig.dir("fs").unwrap())
        .unwrap();
    let calls = [("small", MIB), ("large", TIB)].map(|(name, size)| {
        let image = fs.path().join(name);
        File::create(&image).unwrap().set_len(size).unwrap();
        let mut daemon = daemon(&rig, name, &image, &[]).unwrap();
        let client = Client::connect(daemon.socket(), &ClientOptions::default()).unwrap();
        assert_eq!(client.capacity(), size);
        let status = daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
        drop(client);
        assert!(daemon.sigterm().unwrap().success());
        status.number("extents/fiemap_calls")
    });
    assert_eq!(calls[0], calls[1], "FIEMAP calls for 1 MiB and for 1 TiB");
}

#[test]
fn a_tebibyte_can_be_used_at_its_end() {
    let Some(rig) = Rig::enter() else { return };
    let fs = Filesystem::make(Kind::Xfs, 400 * MIB, 512, &Backing::Memory, &rig.dir("fs").unwrap())
        .unwrap();
    let image = fs.path().join("image");
    File::create(&image).unwrap().set_len(TIB).unwrap();
    let daemon = daemon(&rig, "run", &image, &[]).unwrap();
    let mut client = Client::connect(daemon.socket(), &ClientOptions::default()).unwrap();
    for offset in [0, TIB / 2, TIB - 4096] {
        assert_eq!(client.read_at(offset, 4096).unwrap(), vec![0; 4096]);
        client.write_at(offset, &[8; 4096]).unwrap();
        assert_eq!(client.read_at(offset, 4096).unwrap(), vec![8; 4096]);
    }
    assert!(client.write_at(TIB, &[8; 512]).is_err());
}

/// Two seconds of doing nothing, connected, in direct mode, after some work: no tick of the clock is ours, and nothing wakes up.
#[test]
fn an_idle_daemon_uses_no_cpu() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(4).unwrap();
    Workload { requests: 100, ..Workload::default() }.run(client.queues(), &mut bed.model).unwrap();
    let switches = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", bed.daemon.pid())).unwrap();
        let of = |text: String| -> u64 {
            let lines = text.lines().filter(|line| line.contains("voluntary_ctxt_switches"));
            lines.filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok()).sum()
        };
        tasks
            .map(|task| of(std::fs::read_to_string(task.unwrap().path().join("status")).unwrap()))
            .sum::<u64>()
    };
    // The mtime of the last write has yet to be set, and a busy machine may take its time for that.
    let mut seen = Vec::new();
    let rest = || {
        let before = (bed.daemon.cpu_ticks().unwrap(), switches());
        std::thread::sleep(Duration::from_secs(2));
        let after = (bed.daemon.cpu_ticks().unwrap(), switches());
        seen.push((before, after));
        (before == after).then_some(())
    };
    let rested = until("two seconds of rest", PATIENCE, rest);
    rested.unwrap_or_else(|error| panic!("{error}: ticks and context switches {seen:?}"));
}
