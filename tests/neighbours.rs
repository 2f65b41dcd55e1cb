// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Other processes at the image and its filesystem while guest I/O runs: readers that come at bad moments, and the tools that
//! change, look at, copy or move a file's blocks.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use integration::rig::command::run;
use integration::rig::fault_disk::{Operation, Rule};
use integration::rig::image::extents;
use integration::rig::model::Model;
use integration::rig::outside::get_in;
use integration::rig::wait::{PATIENCE, until};
use integration::rig::workload::Workload;
use integration::rig::{
    Backing, Bed, FaultDisk, Kind, Layout, Queue, Request, Rig, Setup, Shape, Status,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
/// What the fault disk tells one write from the others by.
const MARK: [u8; 4096] = [0x67; 4096];

/// Ends the guest's load, also when an assertion fails: the scope would wait for it for ever.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn on_fault_disk(rig: &Rig) -> (FaultDisk, Bed) {
    let disk = FaultDisk::mount(64 * MIB, &rig.dir("slow").unwrap()).unwrap();
    let setup = Setup { backing: Backing::File(disk.path()), ..Setup::default() };
    let bed = Bed::make(rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    (disk, bed)
}

fn submit(queue: &mut Queue, request: Request<'_>, token: u64) {
    queue.submit(request, &Shape::whole(), token).unwrap();
    queue.kick().unwrap();
}

/// A write that the disk holds.
fn hold_a_write(disk: &FaultDisk, queue: &mut Queue, offset: u64) {
    disk.add(Rule::hold(Operation::Write).starting(&MARK).times(1));
    submit(queue, Request::Write { offset, data: &MARK }, 1);
    until("the held write", PATIENCE, || (disk.counts().hit > 0).then_some(())).unwrap();
}

fn is_breaking(bed: &Bed) {
    let breaking = |status: &Status| status.text("lease") != "held";
    bed.daemon.await_status("the lease break", PATIENCE, breaking).unwrap();
}

/// More readers come while raw I/O in flight keeps the first one waiting; and one more when all are in.
#[test]
fn a_second_break_while_one_is_being_served() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, mut bed) = on_fault_disk(&rig);
    let mut client = bed.connect(2).unwrap();
    hold_a_write(&disk, client.queue(0).unwrap(), 0);
    bed.model.write(0, &MARK).unwrap();
    thread::scope(|scope| {
        let first = scope.spawn(|| get_in(&bed.image, PATIENCE));
        is_breaking(&bed);
        let second = scope.spawn(|| get_in(&bed.image, PATIENCE));
        let writer = scope.spawn(|| File::options().write(true).open(&bed.image).map(drop));
        thread::sleep(Duration::from_millis(100));
        assert!(!first.is_finished() && !second.is_finished() && !writer.is_finished());
        // Served through the file as soon as nothing raw is in flight.
        submit(client.queue(1).unwrap(), Request::Write { offset: MIB, data: &[1; 4096] }, 2);
        disk.heal();
        first.join().unwrap().unwrap();
        second.join().unwrap().unwrap();
        writer.join().unwrap().unwrap();
    });
    bed.model.write(MIB, &[1; 4096]).unwrap();
    for queue in client.queues() {
        assert!(queue.drain().unwrap().iter().all(|done| done.result.is_ok()));
    }
    bed.model.check(0, &bed.host_bytes().unwrap()).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    bed.check_guest(&mut client).unwrap();
    drop(client);
    bed.finish().unwrap();
}

/// A reader comes while a discard waits for a raw write in its range.
#[test]
fn a_break_during_a_discard() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, mut bed) = on_fault_disk(&rig);
    let mut client = bed.connect(2).unwrap();
    hold_a_write(&disk, client.queue(0).unwrap(), MIB);
    submit(client.queue(1).unwrap(), Request::Discard { offset: 0, len: 4 * MIB }, 2);
    bed.daemon
        .await_status("the discard", PATIENCE, |status| status.number("requests/discard") == 1)
        .unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| get_in(&bed.image, PATIENCE));
        is_breaking(&bed);
        disk.heal();
        reader.join().unwrap().unwrap();
    });
    for queue in client.queues() {
        assert!(queue.drain().unwrap().iter().all(|done| done.result.is_ok()));
    }
    bed.model.zero(0..4 * MIB).unwrap();
    // The write was there first or last: the guest did not wait for it.
    let seen = client.read_at(MIB, 4096).unwrap();
    assert!(seen == MARK || seen == [0; 4096]);
    bed.model.write(MIB, &seen).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    bed.check_guest(&mut client).unwrap();
    drop(client);
    bed.finish().unwrap();
}

/// A reader comes while a flush hangs in the disk: it is no raw data, so nobody waits for it.
#[test]
fn a_break_during_a_flush() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, mut bed) = on_fault_disk(&rig);
    let mut client = bed.connect(2).unwrap();
    client.flush().unwrap();
    client.write_at(0, &MARK).unwrap();
    bed.model.write(0, &MARK).unwrap();
    disk.add(Rule::hold(Operation::Flush).times(1));
    submit(client.queue(0).unwrap(), Request::Flush, 1);
    until("the held flush", PATIENCE, || (disk.counts().hit > 0).then_some(())).unwrap();
    // Only to open it: a loop device does nothing else while it flushes.
    get_in(&bed.image, PATIENCE).unwrap();
    assert!(client.queue(0).unwrap().collect().unwrap().is_empty(), "the flush did not wait");
    disk.heal();
    assert!(client.queue(0).unwrap().drain().unwrap().iter().all(|done| done.result.is_ok()));
    bed.await_direct(PATIENCE).unwrap();
    bed.check_guest(&mut client).unwrap();
    drop(client);
    bed.finish().unwrap();
}

/// Readers again and again among writes, discards, zeroing and flushes on four queues.
#[test]
fn breaks_among_discards() {
    beside(Kind::Ext4, Layout::Mixed, |bed| {
        for _ in 0..5 {
            get_in(&bed.image, PATIENCE).unwrap();
            thread::sleep(Duration::from_millis(100));
        }
    });
}

/// Lets `others` do something in the middle of a guest's random I/O.
fn beside(kind: Kind, layout: Layout, others: impl Fn(&Bed)) {
    beside_load(kind, layout, true, others);
}

/// The same with a guest that only reads, unless it may `write`.
fn beside_load(kind: Kind, layout: Layout, write: bool, others: impl Fn(&Bed)) {
    let Some(rig) = Rig::enter() else { return };
    // A small image finds room in one piece on XFS.
    let size = if layout == Layout::Fragmented { 32 * MIB } else { 8 * MIB };
    let setup = Setup { kind, layout, size, disk: 400 * MIB, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(4).unwrap();
    let stop = AtomicBool::new(false);
    let mut model = bed.model.clone();
    let rounds = thread::scope(|scope| {
        let load = scope.spawn(|| guest(client.queues(), &mut model, (kind.block(), write), &stop));
        let ending = Stop(&stop);
        thread::sleep(Duration::from_millis(50));
        for _ in 0..2 {
            others(&bed);
            // Once more from direct mode, in which it may be busy for another moment.
            bed.await_direct(PATIENCE).unwrap();
        }
        drop(ending);
        load.join().unwrap()
    });
    assert!(rounds > 0);
    bed.model = model;
    let status = bed.daemon.status().unwrap();
    assert_eq!(status.number("requests/errors"), 0, "{status:?}; log: {}", bed.daemon.log());
    bed.check_guest(&mut client).unwrap();
    drop(client);
    bed.finish().unwrap();
}

/// Random I/O, every read compared, until `stop`.
fn guest(
    queues: &mut [Queue],
    model: &mut Model,
    (block, write): (u64, bool),
    stop: &AtomicBool,
) -> u64 {
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        let load = Workload {
            seed: round,
            requests: 200,
            discard: Some(block),
            write,
            ..Workload::default()
        };
        load.run(queues, model).unwrap_or_else(|error| panic!("round {round}: {error}"));
        round += 1;
    }
    round
}

fn tool(program: &str, options: &[&str], path: &Path) -> io::Result<String> {
    let mut args: Vec<_> = options.iter().map(std::ffi::OsStr::new).collect();
    args.push(path.as_os_str());
    run(program, &args)
}

#[test]
fn filefrag_beside_a_guest() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        beside(kind, Layout::Mixed, |bed| drop(tool("filefrag", &["-v"], &bed.image).unwrap()));
    }
}

#[test]
fn a_reflink_copy_beside_a_guest() {
    beside(Kind::XfsReflink, Layout::Written, |bed| {
        let copy = bed.fs.path().join("copy");
        let args = ["--reflink=always".as_ref(), bed.image.as_os_str(), copy.as_os_str()];
        run("cp", &args).unwrap();
        let then = std::fs::read(&copy).unwrap();
        // The guest fills the shared blocks anew meanwhile.
        thread::sleep(Duration::from_millis(300));
        assert!(std::fs::read(&copy).unwrap() == then, "the copy has changed");
    });
}

#[test]
fn e4defrag_beside_a_guest() {
    beside(Kind::Ext4, Layout::Fragmented, |bed| {
        let mut have_a_go = || match tool("e4defrag", &["-v"], &bed.image) {
            // It wants no file that somebody has locked, and we have (R1a); it has opened it by then.
            Err(error) if error.to_string().contains("has been locked") => {
                println!("skipped: e4defrag leaves locked files alone");
                Some(())
            }
            // It gives up on one whose extents change between two looks of its own.
            Err(error) if error.to_string().contains("Failed to get file extents") => None,
            said => {
                println!("{}", said.unwrap());
                Some(())
            }
        };
        until("e4defrag to come to an end", PATIENCE, &mut have_a_go).unwrap();
    });
}

/// It gives up on a file that changes under it, so that only beside a reading guest the blocks are sure to move.
#[test]
fn xfs_fsr_beside_a_guest() {
    for (kind, write) in [(Kind::Xfs, true), (Kind::XfsReflink, false)] {
        beside_load(kind, Layout::Fragmented, write, |bed| {
            let before = extents(&bed.image).unwrap();
            let mut after = before;
            let mut moved = || {
                tool("xfs_fsr", &["-v"], &bed.image).unwrap();
                after = extents(&bed.image).unwrap();
                (write || after == 1 || after < before).then_some(())
            };
            // XFS frees what was removed a moment ago in the background, and there is no better place before.
            until("xfs_fsr to move blocks", PATIENCE, &mut moved).unwrap();
            println!("{kind:?}, a writing guest: {write}: {after} extents of {before}");
        });
    }
}

/// An immutable image is out of direct mode; whatever the kernel says of a write to it, the guest hears.
#[test]
fn chattr_beside_a_guest() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let Some(rig) = Rig::enter() else { return };
        let dirs = rig.dir(&format!("{kind:?}")).unwrap();
        let (mount, run) = (dirs.join("fs"), dirs.join("run"));
        std::fs::create_dir(&mount).unwrap();
        std::fs::create_dir(&run).unwrap();
        chattr(kind, &mount, &run);
    }
}

/// chattr opens without waiting, so that it fails at a lease, but breaks it: the next try succeeds.
fn set_flag(flag: &str, path: &Path) {
    let what = format!("chattr {flag}");
    until(&what, PATIENCE, || tool("chattr", &[flag], path).ok()).unwrap();
}

fn chattr(kind: Kind, mount: &Path, run: &Path) {
    use integration::rig::{Client, ClientOptions, Daemon, Filesystem};
    let fs = Filesystem::make(kind, 400 * MIB, 512, &Backing::Memory, mount).unwrap();
    let image = fs.path().join("image");
    let mut model = Model::new(Layout::Written.make(&image, 8 * MIB, 3).unwrap());
    let mut daemon = Daemon::start(Path::new(PROGRAM), run, &image, &[]).unwrap();
    daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    let mut client = Client::connect(daemon.socket(), &ClientOptions::queues(2)).unwrap();
    let load = Workload { requests: 200, ..Workload::default() };
    let reads = Workload { write: false, ..load.clone() };
    load.run(client.queues(), &mut model).unwrap();
    set_flag("+i", &image);
    reads.run(client.queues(), &mut model).unwrap();
    let data = [5; 4096];
    let went = client.write_at(8192, &data).is_ok();
    println!("{kind:?}: a write to an immutable image: {went}");
    if went {
        model.write(8192, &data).unwrap();
    }
    set_flag("-i", &image);
    client.write_at(0, &data).unwrap();
    model.write(0, &data).unwrap();
    load.run(client.queues(), &mut model).unwrap();
    let status = daemon.await_status("the return to direct mode", PATIENCE, Status::direct);
    println!("{kind:?}: afterwards {:?}", status.map(|status| status.reason().to_owned()));
    load.run(client.queues(), &mut model).unwrap();
    client.flush().unwrap();
    drop(client);
    assert!(daemon.sigterm().unwrap().success(), "{}", daemon.log());
    model.check(0, &std::fs::read(&image).unwrap()).unwrap();
    drop(daemon);
    fs.check().unwrap();
}
