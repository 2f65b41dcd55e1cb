// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rig's own tests, against qemu-storage-daemon where a server is needed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::fault_disk::{Operation, Rule};
use super::frontend::{self, Frontend, kind};
use super::model::Model;
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
    let used = ring.wait_used(Duration::from_secs(5)).unwrap();
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

        // Others are served while one waits.
        slow.add(
            Rule::delay(Operation::Write, Duration::from_millis(700)).starting(b"slow!").times(1),
        );
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"slow!", 8192).unwrap();
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| file.sync_data().unwrap());
            std::thread::sleep(Duration::from_millis(100));
            let other = fs.disk().path();
            let mut block = vec![0; 4096];
            rustix::fs::fadvise(File::open(other).unwrap(), 0, None, rustix::fs::Advice::DontNeed)
                .unwrap();
            File::open(other).unwrap().read_exact_at(&mut block, 32 * MIB).unwrap();
            assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
        });
        assert!(start.elapsed() >= Duration::from_millis(700));

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
        drop(file);
        fs.check().unwrap();
    }
}
