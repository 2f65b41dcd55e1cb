// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rig's own tests, against qemu-storage-daemon where a server is needed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::fault_disk::{Operation, Rule};
use super::frontend::{self, Frontend, kind};
use super::model::Model;
use super::wait::{PATIENCE, until};
use super::workload::Workload;
use super::*;

const MIB: u64 = 1 << 20;

#[test]
fn layouts_are_what_they_say() {
    let Some(rig) = Rig::enter() else { return };
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Ext2, Kind::Ext4Small] {
        let dir = rig.dir(&format!("{kind:?}")).unwrap();
        let fs = Filesystem::make(kind, 400 * MIB, 512, &Backing::Memory, &dir).unwrap();
        let path = fs.path().join("fragmented");
        let bytes = Layout::Fragmented.make(&path, 52 * MIB, 7).unwrap();
        let extents = image::extents(&path).unwrap();
        assert!(extents >= 10_000, "{kind:?}: {extents}");
        assert!(std::fs::read(&path).unwrap() == bytes);
        for layout in [Layout::Mixed, Layout::Sparse, Layout::Fallocated, Layout::Written] {
            let path = fs.path().join(format!("{layout:?}"));
            let bytes = layout.make(&path, 8 * MIB, 7).unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes, "{kind:?} {layout:?}");
        }
        fs.check().unwrap();
    }
}

#[test]
fn the_clients_drive_the_peer() {
    let Some(rig) = Rig::enter() else { return };
    let image = rig.path().join("image");
    let bytes = Layout::Written.make(&image, 8 * MIB, 3).unwrap();
    let daemon = Daemon::start_peer(rig.path(), &image, 4).unwrap();
    let mut model = Model::new(bytes);
    let mut client = Client::connect(daemon.socket(), &ClientOptions::queues(4)).unwrap();
    assert_eq!(client.capacity(), 8 * MIB);
    let mut queues = client.take_queues();
    let tally = Workload::default().run(&mut queues, &mut model).unwrap();
    assert!(tally.reads > 500 && tally.writes > 500 && tally.flushes > 0, "{tally:?}");
    drop((client, queues));

    let mut front =
        Frontend::start(daemon.socket(), 1, 64, frontend::VERSION_1 | frontend::FLUSH).unwrap();
    let ring = front.ring_mut(0).unwrap();
    ring.prepare(0, kind::IN, 8, 4096, true).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    let used = ring.wait_used(PATIENCE).unwrap();
    assert_eq!((used.id, used.len, ring.status(0).unwrap()), (0, 4097, 0));
    model.check(4096, &ring.read_bytes(ring.data(0), 4096).unwrap()).unwrap();
    assert_eq!(front.stop(0).unwrap(), 1);
}

#[test]
fn a_slow_disk_is_slow_where_it_is_told() {
    let Some(rig) = Rig::enter() else { return };
    let slow = FaultDisk::mount(64 * MIB, &rig.dir("slow").unwrap()).unwrap();
    {
        let fs = Filesystem::make(
            Kind::Ext4,
            0,
            512,
            &Backing::File(slow.path()),
            &rig.dir("fs").unwrap(),
        )
        .unwrap();
        let path = fs.path().join("file");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        assert!(slow.counts().flushes > 0 && slow.counts().writes > 0);

        // Others are served while one waits, for as long as it was told to.
        let delay = Duration::from_millis(300);
        for rule in [Rule::hold(Operation::Write), Rule::delay(Operation::Write, delay)] {
            let timed = slow.counts().hit > 0;
            slow.add(rule.starting(b"slow!").times(1));
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(b"slow!", 8192).unwrap();
            let (start, hit) = (Instant::now(), slow.counts().hit);
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| file.sync_data().unwrap());
                until("the slow write", PATIENCE, || (slow.counts().hit > hit).then_some(()))
                    .unwrap();
                let mut block = vec![0; 4096];
                let other = File::open(fs.disk().path()).unwrap();
                rustix::fs::fadvise(&other, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                other.read_exact_at(&mut block, 32 * MIB).unwrap();
                if !timed {
                    assert!(!writer.is_finished() && slow.counts().in_flight > 0);
                    slow.heal();
                }
            });
            assert!(!timed || start.elapsed() >= delay);
        }

        slow.add(Rule::fail(Operation::Read).within(0..u64::MAX));
        let mut block = vec![0; 4096];
        rustix::fs::fadvise(
            File::open(fs.disk().path()).unwrap(),
            0,
            None,
            rustix::fs::Advice::DontNeed,
        )
        .unwrap();
        assert!(File::open(fs.disk().path()).unwrap().read_exact_at(&mut block, 40 * MIB).is_err());
        slow.heal();
        fs.check().unwrap();
    }
}
