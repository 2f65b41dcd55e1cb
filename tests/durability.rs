// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What FLUSH and the cache mode ask of a real disk: how many flushes reach it, when, and what waits for them.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::thread;
use std::time::Duration;

use integration::rig::fault_disk::{Operation, Rule};
use integration::rig::frontend::{self, Frontend, kind};
use integration::rig::wait::{PATIENCE, until};
use integration::rig::{
    Backing, Bed, Client, ClientOptions, FaultDisk, Layout, Request, Rig, Setup, Shape, Status,
};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
/// Long enough for what does not wait to show that.
const MOMENT: Duration = Duration::from_millis(500);
/// What the fault disk tells one write from the others by.
const MARK: [u8; 4096] = [0x67; 4096];

fn fault_disk(rig: &Rig, layout: Layout, options: &[&str]) -> (FaultDisk, Bed) {
    let disk = FaultDisk::mount(64 * MIB, &rig.dir("disk").unwrap()).unwrap();
    let setup = Setup { backing: Backing::File(disk.path()), layout, ..Setup::default() };
    let bed = Bed::make(rig, PROGRAM, &setup, options).unwrap();
    if !options.contains(&"filesystem") {
        bed.await_direct(PATIENCE).unwrap();
    }
    (disk, bed)
}

/// Ten guests that flush while the disk is busy with one flush cost it one more.
#[test]
fn flushes_share_the_next_one() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, mut bed) = fault_disk(&rig, Layout::Written, &[]);
    let mut client = bed.connect(2).unwrap();
    client.flush().unwrap();
    client.write_at(0, &MARK).unwrap();
    let asked = bed.daemon.status().unwrap().number("flush/requests");
    let ordered = |status: &Status| status.number("flush/device_flushes");
    let before = ordered(&bed.daemon.status().unwrap());
    disk.add(Rule::hold(Operation::Flush).times(1));
    for token in 0..10 {
        let queue = client.queue(usize::from(token > 4)).unwrap();
        queue.submit(Request::Flush, &Shape::whole(), token).unwrap();
        queue.kick().unwrap();
        until("the flush on the disk", PATIENCE, || (disk.counts().hit > 0).then_some(())).unwrap();
        let heard = |status: &Status| status.number("flush/requests") == asked + token + 1;
        bed.daemon.await_status("the flush", PATIENCE, heard).unwrap();
        // Something to be flushed by the next one. It is answered later: a loop device does nothing else while it flushes.
        let write = Request::Write { offset: (token + 1) * MIB / 2, data: &[1; 4096] };
        let queue = client.queue(1).unwrap();
        queue.submit(write, &Shape::whole(), 100 + token).unwrap();
        queue.kick().unwrap();
        bed.model.write((token + 1) * MIB / 2, &[1; 4096]).unwrap();
    }
    bed.model.write(0, &MARK).unwrap();
    disk.heal();
    for queue in client.queues() {
        assert!(queue.drain().unwrap().iter().all(|done| done.result.is_ok()));
    }
    assert_eq!(ordered(&bed.daemon.status().unwrap()) - before, 2, "flushes of the disk for ten");
    drop(client);
    bed.finish().unwrap();
}

/// What comes behind a flush goes on, and with `--barrier=strict` it waits until the flush has ended.
#[test]
fn a_strict_barrier_holds_back_what_comes_behind_a_flush() {
    for options in [&[][..], &["--barrier=strict"]] {
        let Some(rig) = Rig::enter() else { return };
        let (disk, mut bed) = fault_disk(&rig, Layout::Written, options);
        let mut client = bed.connect(2).unwrap();
        disk.add(Rule::hold(Operation::Write).starting(&MARK).times(1));
        let queue = client.queue(0).unwrap();
        queue.submit(Request::Write { offset: 0, data: &MARK }, &Shape::whole(), 1).unwrap();
        queue.submit(Request::Flush, &Shape::whole(), 2).unwrap();
        queue.submit(Request::Write { offset: MIB, data: &[2; 4096] }, &Shape::whole(), 3).unwrap();
        queue.kick().unwrap();
        until("the write on the disk", PATIENCE, || (disk.counts().hit > 0).then_some(())).unwrap();
        let mut order = Vec::new();
        if options.is_empty() {
            order.extend(queue.wait().unwrap());
        } else {
            thread::sleep(MOMENT);
            assert!(queue.collect().unwrap().is_empty(), "something overtook the flush");
        }
        disk.heal();
        order.extend(queue.drain().unwrap());
        assert!(order.iter().all(|done| done.result.is_ok()), "{order:?}");
        let order: Vec<u64> = order.iter().map(|done| done.token).collect();
        assert_eq!(order, if options.is_empty() { [3, 1, 2] } else { [1, 2, 3] });
        bed.model.write(0, &MARK).unwrap();
        bed.model.write(MIB, &[2; 4096]).unwrap();
        drop(client);
        bed.finish().unwrap();
    }
}

/// Writes here and there, to holes too; on how many of them the disk was flushed before the answer.
fn flushed_writes(disk: &FaultDisk, client: &mut Client, bed: &mut Bed) -> usize {
    let mut flushed = 0;
    for (nth, offset) in (0..8 * MIB).step_by(400 << 10).enumerate() {
        let data = [u8::try_from(nth).unwrap() + 1; 3 << 10];
        let before = disk.counts().flushes;
        client.write_at(offset, &data).unwrap();
        flushed += usize::from(disk.counts().flushes > before);
        bed.model.write(offset, &data).unwrap();
    }
    flushed
}

/// Three ways to say that a write is durable when it is complete, and that it is not, in both modes.
#[test]
fn writes_through_the_cache_flush_the_disk() {
    let plain = ClientOptions::default();
    let wce = virtio_driver::VirtioBlkFeatureFlags::CONFIG_WCE.bits();
    let no_flush = plain.features & !(frontend::FLUSH | wce);
    for mode in ["direct", "filesystem"] {
        for (cache, features, through) in [
            ("writeback", plain.features, false),
            ("writethrough", plain.features, true),
            ("writeback", no_flush, true),
        ] {
            let Some(rig) = Rig::enter() else { return };
            let options = ["--mode", mode, "--cache", cache];
            let (disk, mut bed) = fault_disk(&rig, Layout::Mixed, &options);
            let options = ClientOptions { features, ..plain.clone() };
            let mut client = Client::connect(bed.daemon.socket(), &options).unwrap();
            let flushed = flushed_writes(&disk, &mut client, &mut bed);
            // The host's filesystem flushes on its own, now and then.
            let right = if through { flushed == 21 } else { flushed < 15 };
            assert!(right, "{mode}, {cache}: {flushed} of 21 writes were flushed");
            bed.check_guest(&mut client).unwrap();
            drop(client);
            bed.finish().unwrap();
        }
    }
}

/// As by `echo "write through" > /sys/block/vda/cache_type`, and back.
#[test]
fn a_guest_turns_its_cache_off_and_on() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, bed) = fault_disk(&rig, Layout::Written, &[]);
    let features = frontend::VERSION_1 | frontend::FLUSH | frontend::CONFIG_WCE;
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, features).unwrap();
    let write = |front: &mut Frontend| {
        let before = disk.counts().flushes;
        let ring = front.ring_mut(0).unwrap();
        ring.prepare(0, kind::OUT, 8, 4096, false).unwrap();
        ring.publish(0).unwrap();
        ring.kick().unwrap();
        assert_eq!(ring.wait_used(PATIENCE).unwrap().id, 0);
        assert_eq!(ring.status(0).unwrap(), 0);
        disk.counts().flushes > before
    };
    let many = |front: &mut Frontend| (0..20).filter(|_| write(front)).count();
    for _ in 0..2 {
        assert!(many(&mut front) < 15, "flushed behind a cache");
        let before = bed.daemon.status().unwrap().number("flush/requests");
        front.wire.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
        // What was written until now is made durable at the switch, not at the next request.
        let asked = |status: &Status| status.number("flush/requests") > before;
        bed.daemon.await_status("a flush", PATIENCE, asked).unwrap();
        assert_eq!(many(&mut front), 20, "of 20 writes without a cache were flushed");
        front.wire.set_config(32, VhostUserConfigFlags::WRITABLE, &[1]).unwrap();
    }
    let _ = front.wire.get_features().unwrap();
}
