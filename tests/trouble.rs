// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks that are full, fail or take their time, and filesystems that are frozen, read-only, shut down or cut short.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use integration::rig::command::run;
use integration::rig::fault_disk::{Operation, Rule};
use integration::rig::outside::{Filler, Frozen, get_in, settle};
use integration::rig::wait::{PATIENCE, until};
use integration::rig::workload::Workload;
use integration::rig::{
    Backing, Bed, FaultDisk, Kind, Layout, Mount, Queue, Request, Rig, Setup, Shape,
};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
/// What the fault disk tells one write from the others by.
const MARK: [u8; 4096] = [0x67; 4096];

fn fault_disk(rig: &Rig, layout: Layout) -> (FaultDisk, Setup) {
    let disk = FaultDisk::mount(64 * MIB, &rig.dir("slow").unwrap()).unwrap();
    let setup = Setup { backing: Backing::File(disk.path()), layout, ..Setup::default() };
    (disk, setup)
}

fn submit(queue: &mut Queue, request: Request<'_>, token: u64) {
    queue.submit(request, &Shape::whole(), token).unwrap();
    queue.kick().unwrap();
}

/// No space for what a hole takes: those requests fail and nothing else does, until there is space again.
fn full(kind: Kind) {
    let Some(rig) = Rig::enter() else { return };
    let setup =
        Setup { kind, disk: 400 * MIB, layout: Layout::Sparse, size: 32 * MIB, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    client.write_at(0, &[1; 8192]).unwrap();
    bed.model.write(0, &[1; 8192]).unwrap();
    let filler = Filler::new(bed.fs.path()).unwrap();
    let data = vec![2; 256 << 10];
    let queue = client.queue(0).unwrap();
    for token in 1..31 {
        let request = if token % 4 == 0 {
            Request::Write { offset: 4096, data: &[3; 4096] }
        } else {
            Request::Write { offset: token * MIB, data: &data }
        };
        // Two at a time to the same place would make the model guess.
        submit(queue, request, token);
        if token % 4 == 0 {
            submit(queue, Request::Read { offset: 0, len: 4096 }, 0);
        }
        for done in queue.drain().unwrap() {
            if done.token == 0 {
                bed.model.check(0, &done.result.unwrap()).unwrap();
            } else if done.token % 4 == 0 {
                done.result.unwrap();
            }
        }
    }
    bed.model.write(4096, &[3; 4096]).unwrap();
    let failed = bed.daemon.status().unwrap().number("requests/errors");
    assert!(failed > 10, "{failed} requests failed: the disk is not full");
    let log = bed.daemon.log();
    let said = log.lines().filter(|line| line.to_lowercase().contains("space")).count();
    assert!((1..failed).contains(&(said as u64)), "{said} lines say so: {log}");
    drop(filler);
    for offset in (1..31).filter(|n| n % 4 != 0).map(|n| n * MIB) {
        client.write_at(offset, &data).unwrap();
        bed.model.write(offset, &data).unwrap();
    }
    client.flush().unwrap();
    bed.check_guest(&mut client).unwrap();
    assert_eq!(bed.daemon.status().unwrap().number("requests/errors"), failed);
    drop(client);
    bed.finish().unwrap();
}

#[test]
fn a_full_ext4_fails_the_writes_to_holes_only() {
    full(Kind::Ext4);
}

#[test]
fn a_full_xfs_fails_the_writes_to_holes_only() {
    full(Kind::XfsReflink);
}

/// A read that fails on the disk, and a write that fails on its way through the file.
#[test]
fn a_disk_error_is_one_requests_error() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, setup) = fault_disk(&rig, Layout::Mixed);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    // Everything is mapped after this, and read.
    bed.check_guest(&mut client).unwrap();
    let queue = client.queue(0).unwrap();
    for what in ["raw", "file"] {
        let offset = if what == "raw" { 0 } else { MIB };
        if what == "raw" {
            queue.write_at(0, &[1; 64 << 10]).unwrap();
        } else {
            let discard = Request::Discard { offset, len: 64 << 10 };
            queue.once(discard, &Shape::whole()).unwrap();
        }
        disk.add(Rule::fail(Operation::Write).starting(&MARK));
        for token in 0..8 {
            let data = if token == 3 { &MARK } else { &[2; 4096] };
            submit(queue, Request::Write { offset: offset + token * 8192, data }, token);
        }
        for done in queue.drain().unwrap() {
            assert_eq!(done.result.is_err(), done.token == 3, "{what}: {done:?}");
        }
        disk.heal();
        queue.write_at(offset, &[3; 64 << 10]).unwrap();
        assert!(queue.read_at(offset, 64 << 10).unwrap().iter().all(|byte| *byte == 3));
        bed.model.write(offset, &[3; 64 << 10]).unwrap();
    }
    disk.add(Rule::fail(Operation::Read).times(1));
    for token in 0..8 {
        submit(queue, Request::Read { offset: token * 8192, len: 4096 }, token);
    }
    let failed = queue.drain().unwrap().iter().filter(|done| done.result.is_err()).count();
    assert_eq!((failed, bed.daemon.status().unwrap().number("requests/errors")), (1, 3));
    queue.flush().unwrap();
    bed.check_guest(&mut client).unwrap();
    drop(client);
    bed.finish().unwrap();
}

/// R16: the failure stays in the state as long as it is held against the session.
#[test]
fn a_failed_flush_is_in_the_state_until_the_session_ends() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, setup) = fault_disk(&rig, Layout::Written);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let error = || bed.daemon.status().unwrap().0.pointer("/flush/error").cloned();
    let mut client = bed.connect(1).unwrap();
    client.write_at(0, &MARK).unwrap();
    client.flush().unwrap();
    assert_eq!(error(), Some(Value::Null));
    client.write_at(0, &MARK).unwrap();
    disk.add(Rule::fail(Operation::Flush).times(1));
    assert!(client.flush().is_err());
    for _ in 0..3 {
        assert!(client.flush().is_err(), "the failed flush is forgotten");
        assert!(error().is_some_and(|error| error.is_string()));
        client.write_at(8192, &[1; 4096]).unwrap();
        assert!(client.read_at(0, 4096).unwrap() == MARK);
    }
    drop(client);
    let mut next = bed.connect(1).unwrap();
    next.flush().unwrap();
    assert_eq!(error(), Some(Value::Null));
    bed.model.write(0, &MARK).unwrap();
    bed.model.write(8192, &[1; 4096]).unwrap();
    drop(next);
    bed.finish().unwrap();
}

/// A request that takes 10 s holds up nothing but the flush that must wait for it.
#[test]
fn a_request_of_ten_seconds() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, setup) = fault_disk(&rig, Layout::Written);
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(2).unwrap();
    disk.add(Rule::hold(Operation::Write).starting(&MARK).times(1));
    submit(client.queue(0).unwrap(), Request::Write { offset: 0, data: &MARK }, 1);
    until("the slow write", PATIENCE, || (disk.counts().hit > 0).then_some(())).unwrap();
    let start = Instant::now();
    submit(client.queue(1).unwrap(), Request::Flush, 2);
    let queue = client.queue(1).unwrap();
    for token in 10..110 {
        let offset = token * 8192;
        submit(queue, Request::Write { offset, data: &[4; 4096] }, token);
        bed.model.write(offset, &[4; 4096]).unwrap();
        for done in queue.wait().unwrap() {
            assert!(done.token >= 10, "the flush did not wait");
            done.result.unwrap();
        }
    }
    std::thread::sleep(Duration::from_secs(10).saturating_sub(start.elapsed()));
    for queue in client.queues() {
        assert!(queue.collect().unwrap().is_empty(), "something did not wait for the disk");
    }
    disk.heal();
    for queue in client.queues() {
        assert!(queue.drain().unwrap().iter().all(|done| done.result.is_ok()));
    }
    bed.model.write(0, &MARK).unwrap();
    bed.check_guest(&mut client).unwrap();
    drop(client);
    bed.finish().unwrap();
}

/// The filesystem stops working under the image while the guest goes on. What was flushed before is there when it is mounted
/// again, no request is left unanswered, and no flush claims what it cannot do.
fn filesystem_lost(kind: Kind, lose: impl Fn(&Path)) {
    let Some(rig) = Rig::enter() else { return };
    let setup = Setup { kind, disk: 400 * MIB, layout: Layout::Mixed, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(2).unwrap();
    Workload { requests: 200, ..Workload::default() }.run(client.queues(), &mut bed.model).unwrap();
    let hole = Request::Discard { offset: 6 * MIB, len: MIB };
    client.queue(0).unwrap().once(hole, &Shape::whole()).unwrap();
    bed.model.zero(6 * MIB..7 * MIB).unwrap();
    client.write_at(0, &[5; 64 << 10]).unwrap();
    bed.model.write(0, &[5; 64 << 10]).unwrap();
    client.flush().unwrap();
    bed.check_guest(&mut client).unwrap();

    lose(bed.fs.path());
    bed.model.check(0, &client.read_at(0, 64 << 10).unwrap()).unwrap();
    assert!(client.write_at(6 * MIB, &[6; 4096]).is_err(), "a hole was filled");
    // Whether the disk's own sectors may still be written is for the kernel to say.
    let raw = client.write_at(0, &[7; 4096]).is_ok();
    println!("{kind:?}: a raw write goes on: {raw}");
    assert!(client.flush().is_err(), "a flush that cannot be: {:?}", bed.daemon.status());
    drop(client);
    assert!(bed.daemon.sigterm().unwrap().code().is_some(), "{}", bed.daemon.log());

    // The device must outlive its mount, to be mounted again.
    let device = bed.fs.disk().path().to_owned();
    let hold = File::open(&device).unwrap();
    let Bed { daemon, fs, mut model, .. } = bed;
    drop((daemon, fs));
    let again = Mount::device(&device, &rig.dir("again").unwrap()).unwrap();
    let bytes = std::fs::read(again.path().join("image")).unwrap();
    let first = bytes.get(..4096).unwrap();
    assert!(
        first == [5; 4096] || (raw && first == [7; 4096]),
        "the first block is neither old nor new"
    );
    model.write(0, first).unwrap();
    model.check(0, &bytes).unwrap();
    drop(again);
    kind.check(&device).unwrap();
    drop(hold);
}

#[test]
fn an_ext4_that_turns_read_only() {
    filesystem_lost(Kind::Ext4, |path| {
        // Not while we have the image open for writing, unless it is forced.
        let remount =
            |option: &str| run("mount", &["-o".as_ref(), option.as_ref(), path.as_os_str()]);
        assert!(remount("remount,ro").is_err());
        remount("remount,abort").unwrap();
    });
}

#[test]
fn an_xfs_that_is_shut_down() {
    let shut = |path: &Path| {
        run("xfs_io", &["-x".as_ref(), "-c".as_ref(), "shutdown".as_ref(), path.as_os_str()])
            .unwrap();
    };
    filesystem_lost(Kind::XfsReflink, shut);
}

/// Direct I/O goes on under a frozen filesystem; a reader gets in; what needs the filesystem waits for the thaw and no longer.
fn frozen(kind: Kind) {
    let Some(rig) = Rig::enter() else { return };
    let setup = Setup { kind, disk: 400 * MIB, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(2).unwrap();
    let load = Workload { requests: 300, ..Workload::default() };
    load.run(client.queues(), &mut bed.model).unwrap();
    client.flush().unwrap();
    let ice = Frozen::new(bed.fs.path()).unwrap();
    load.run(client.queues(), &mut bed.model)
        .unwrap_or_else(|error| panic!("while frozen: {error}; log: {}", bed.daemon.log()));
    // A discard under way holds no reader up.
    submit(client.queue(1).unwrap(), Request::Discard { offset: 4 * MIB, len: MIB }, 9);
    std::thread::sleep(Duration::from_millis(100));
    get_in(&bed.image, PATIENCE).unwrap();
    submit(client.queue(0).unwrap(), Request::Write { offset: 0, data: &MARK }, 1);
    submit(client.queue(0).unwrap(), Request::Flush, 2);
    std::thread::sleep(Duration::from_millis(100));
    drop(ice);
    for queue in client.queues() {
        for done in queue.drain().unwrap() {
            done.result.unwrap();
        }
    }
    bed.model.write(0, &MARK).unwrap();
    bed.model.zero(4 * MIB..5 * MIB).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    bed.check_guest(&mut client).unwrap();
    load.run(client.queues(), &mut bed.model).unwrap();
    drop(client);
    bed.finish().unwrap();
}

#[test]
fn a_frozen_ext4() {
    frozen(Kind::Ext4);
}

#[test]
fn a_frozen_xfs() {
    frozen(Kind::XfsReflink);
}

/// Cut short by somebody who opened it: what is left is served, and the blocks that were cut off belong to others.
#[test]
fn an_image_truncated_through_an_open() {
    let Some(rig) = Rig::enter() else { return };
    let setup = Setup { size: 16 * MIB, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(2).unwrap();
    Workload { requests: 200, ..Workload::default() }.run(client.queues(), &mut bed.model).unwrap();
    let file = File::options().write(true).open(&bed.image).unwrap();
    file.set_len(8 * MIB).unwrap();
    drop(file);
    let canary = bed.fs.path().join("canary");
    std::fs::write(&canary, vec![0xcc; 45 << 20]).unwrap();
    settle(&canary).unwrap();
    for offset in (8 * MIB..16 * MIB).step_by(64 << 10) {
        // Whether it is an error or grows the file again is another matter.
        let _ = client.write_at(offset, &[4; 64 << 10]);
    }
    client.write_at(0, &MARK).unwrap();
    bed.model.write(0, &MARK).unwrap();
    for offset in (0..8 * MIB).step_by(256 << 10) {
        bed.model.check(offset, &client.read_at(offset, 256 << 10).unwrap()).unwrap();
    }
    let status = bed.daemon.status().unwrap();
    println!("afterwards: {} mode: {}", status.text("mode"), status.reason());
    drop(client);
    assert!(bed.daemon.sigterm().unwrap().success(), "{}", bed.daemon.log());
    bed.model.check(0, std::fs::read(&bed.image).unwrap().get(..8 << 20).unwrap()).unwrap();
    let canary = std::fs::read(&canary).unwrap();
    assert!(canary.iter().all(|byte| *byte == 0xcc), "a write landed in another file");
    let Bed { daemon, fs, .. } = bed;
    drop(daemon);
    fs.check().unwrap();
}
