// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DISCARD and WRITE_ZEROES on real filesystems: what the guest and the host read, what the image takes of the disk, and what
//! becomes of requests and readers that come meanwhile (R12, R17).

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use integration::rig::fault_disk::{Operation, Rule};
use integration::rig::model::Model;
use integration::rig::outside::{allocated, get_in, settle, states};
use integration::rig::wait::{PATIENCE, until};
use integration::rig::workload::Workload;
use integration::rig::{
    Backing, Bed, Client, ClientOptions, Daemon, FaultDisk, Filesystem, Kind, Layout, Mount,
    Request, Rig, Setup, Shape, Status,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const EXTENTCTL: &str = env!("CARGO_BIN_EXE_extentctl");
const MIB: u64 = 1 << 20;
const DISCARD: u64 = 1 << 13;

/// First sector and sectors of what is discarded and zeroed, from a 64 KiB boundary.
const EDGES: [(u64, u64); 12] = [
    (0, 1),
    (1, 1),
    (1, 2),
    (7, 1),
    (7, 2),
    (8, 8),
    (7, 9),
    (8, 9),
    (7, 10),
    (3, 40),
    (15, 50),
    (0, 128),
];

/// What is done to a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Discard,
    Zero { unmap: bool },
}

const ALL: [What; 3] = [What::Discard, What::Zero { unmap: true }, What::Zero { unmap: false }];

impl What {
    fn request<'a>(self, offset: u64, len: u64) -> Request<'a> {
        match self {
            What::Discard => Request::Discard { offset, len },
            What::Zero { unmap } => Request::WriteZeroes { offset, len, unmap },
        }
    }

    fn to(self, client: &mut Client, offset: u64, len: u64) {
        let done = client.queue(0).unwrap().once(self.request(offset, len), &Shape::whole());
        done.unwrap_or_else(|error| panic!("{self:?} of {len} at {offset}: {error}"));
    }

    fn model(self, model: &mut Model, offset: u64, len: u64, block: u64) {
        match self {
            What::Discard => model.discard(offset..offset + len, block).unwrap(),
            What::Zero { .. } => model.zero(offset..offset + len).unwrap(),
        }
    }
}

fn check_guest(client: &mut Client, model: &Model) {
    for offset in (0..model.size()).step_by(256 << 10) {
        let len = usize::try_from((model.size() - offset).min(256 << 10)).unwrap();
        model.check(offset, &client.read_at(offset, len).unwrap()).unwrap();
    }
}

/// Every edge with every operation, then the three among random writes on four queues. What the host reads afterwards must be
/// the same, and what it reads in between.
fn contents(run: &Path, image: &Path, layout: Layout, block: u64, direct: bool) -> Status {
    let options: &[&str] = if direct { &[] } else { &["--mode", "filesystem"] };
    let mut model = Model::new(layout.make(image, 8 * MIB, 3).unwrap());
    let mut daemon = Daemon::start(Path::new(PROGRAM), run, image, options).unwrap();
    let mut client = Client::connect(daemon.socket(), &ClientOptions::queues(4)).unwrap();
    let places = ALL.iter().flat_map(|what| EDGES.iter().map(move |edge| (*what, *edge)));
    for (index, (what, (first, sectors))) in places.enumerate() {
        let (offset, len) = (index as u64 * (64 << 10) + first * 512, sectors * 512);
        what.to(&mut client, offset, len);
        what.model(&mut model, offset, len, block);
    }
    for what in ALL {
        // The last block is often a matter of its own.
        let (offset, len) = (model.size() - 9 * 512, 9 * 512);
        what.to(&mut client, offset, len);
        what.model(&mut model, offset, len, block);
    }
    check_guest(&mut client, &model);
    model.check(0, &std::fs::read(image).unwrap()).unwrap();
    if direct {
        daemon.await_status("the return to direct mode", PATIENCE, Status::direct).unwrap();
    }
    let load = Workload { requests: 300, discard: Some(block), ..Workload::default() };
    let tally = load
        .run(client.queues(), &mut model)
        .unwrap_or_else(|error| panic!("{error}; log: {}", daemon.log()));
    assert!(tally.zeroes > 50, "{tally:?}");
    check_guest(&mut client, &model);
    let status = daemon.status().unwrap();
    assert_eq!(status.number("requests/errors"), 0, "{status:?}; log: {}", daemon.log());
    drop(client);
    assert!(daemon.sigterm().unwrap().success(), "{}", daemon.log());
    model.check(0, &std::fs::read(image).unwrap()).unwrap();
    status
}

/// `du` before and after, the writes that follow, and what the map says.
fn space(run: &Path, image: &Path, block: u64) {
    Layout::Written.make(image, 8 * MIB, 3).unwrap();
    let daemon = Daemon::start(Path::new(PROGRAM), run, image, &[]).unwrap();
    daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    let mut client = Client::connect(daemon.socket(), &ClientOptions::default()).unwrap();
    let segments = |name: &str| daemon.status().unwrap().number(&format!("segments/{name}"));
    let whole = allocated(image).unwrap();
    let state = |range| states(&daemon, EXTENTCTL, &range).unwrap();
    let mapped = ["mapped"];
    // Zeros in place take nothing away, at odd places neither.
    What::Zero { unmap: false }.to(&mut client, 512, 2 * MIB);
    assert_eq!(
        (allocated(image).unwrap(), state(0..8 * MIB)),
        (whole, mapped.map(String::from).to_vec())
    );
    for (what, start) in [(What::Discard, 2 * MIB), (What::Zero { unmap: true }, 4 * MIB)] {
        let before = allocated(image).unwrap();
        what.to(&mut client, start + 512, MIB);
        // A block at each end is only partly in the range.
        let freed = before - allocated(image).unwrap();
        assert!(freed >= MIB - 2 * block, "{what:?} freed {freed} bytes");
        let inside = start + block..start + MIB;
        assert_eq!(state(inside.clone()), ["hole"], "{what:?}");
        let zero = segments("zero");
        assert_eq!(client.read_at(inside.start, 4096).unwrap(), [0; 4096]);
        assert!(segments("zero") > zero, "{what:?}: zeros that are not there were read");
        for pass in 0..2_u8 {
            let (direct, file) = (segments("direct"), segments("file"));
            for offset in (start..start + 2 * MIB).step_by(64 << 10) {
                client.write_at(offset, &[pass + 1; 64 << 10]).unwrap();
            }
            let (direct, file) = (segments("direct") - direct, segments("file") - file);
            assert!(
                if pass == 0 { file > 0 } else { file == 0 && direct >= 32 },
                "{what:?} {direct} {file}"
            );
        }
        assert_eq!(state(start..start + 2 * MIB), mapped, "{what:?}");
        assert!(allocated(image).unwrap() >= before, "{what:?}");
    }
}

fn everything(kind: Kind, sector: u32) {
    let Some(rig) = Rig::enter() else { return };
    let (mount, run) = (rig.dir("fs").unwrap(), rig.dir("run").unwrap());
    let fs = Filesystem::make(kind, 400 * MIB, sector, &Backing::Memory, &mount).unwrap();
    let image = fs.path().join("image");
    for layout in [Layout::Written, Layout::Mixed] {
        let status = contents(&run, &image, layout, kind.unit(), kind.eligible());
        assert_eq!(status.direct(), kind.eligible(), "{status:?}");
        std::fs::remove_file(&image).unwrap();
    }
    if kind.eligible() {
        let status = contents(&run, &image, Layout::Mixed, kind.unit(), false);
        assert!(!status.direct(), "{status:?}");
        std::fs::remove_file(&image).unwrap();
        space(&run, &image, kind.unit());
    }
    fs.check().unwrap();
}

#[test]
fn on_ext4() {
    everything(Kind::Ext4, 512);
}

#[test]
fn on_ext4_with_4096_byte_sectors() {
    everything(Kind::Ext4, 4096);
}

#[test]
fn on_ext4_with_1_kib_blocks() {
    everything(Kind::Ext4Small, 512);
}

#[test]
fn on_ext3() {
    everything(Kind::Ext3, 512);
}

#[test]
fn on_ext3_with_4096_byte_sectors() {
    everything(Kind::Ext3, 4096);
}

#[test]
fn on_xfs() {
    everything(Kind::Xfs, 512);
}

#[test]
fn on_xfs_with_4096_byte_sectors() {
    everything(Kind::Xfs, 4096);
}

#[test]
fn on_xfs_with_reflink() {
    everything(Kind::XfsReflink, 512);
}

#[test]
fn on_xfs_with_reflink_and_4096_byte_sectors() {
    everything(Kind::XfsReflink, 4096);
}

#[test]
fn on_btrfs() {
    everything(Kind::Btrfs, 512);
}

#[test]
fn on_tmpfs() {
    let Some(rig) = Rig::enter() else { return };
    let run = rig.dir("run").unwrap();
    let mount = Mount::tmpfs(&rig.dir("fs").unwrap()).unwrap();
    for layout in [Layout::Written, Layout::Mixed] {
        let status = contents(&run, &mount.path().join(format!("{layout:?}")), layout, 4096, false);
        assert!(!status.direct(), "{status:?}");
    }
}

/// Zeros are written and discards ignored, and the guest hears of no error.
#[test]
fn on_ramfs_which_cannot_punch() {
    let Some(rig) = Rig::enter() else { return };
    let run = rig.dir("run").unwrap();
    let mount = Mount::ramfs(&rig.dir("fs").unwrap()).unwrap();
    let image = mount.path().join("image");
    // No discard holds a block of such a size.
    let status = contents(&run, &image, Layout::Written, 1 << 40, false);
    assert!(!status.direct(), "{status:?}");
}

#[test]
fn ignored_discards_are_not_offered_and_zeros_keep_their_blocks() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &["--discard", "ignore"]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    assert_eq!(client.features() & DISCARD, 0);
    let before = allocated(&bed.image).unwrap();
    let discard = Request::Discard { offset: 0, len: MIB };
    assert!(client.queue(0).unwrap().once(discard, &Shape::whole()).is_err());
    What::Zero { unmap: true }.to(&mut client, 2 * MIB, MIB);
    bed.model.zero(2 * MIB..3 * MIB).unwrap();
    assert_eq!(allocated(&bed.image).unwrap(), before);
    let state = states(&bed.daemon, EXTENTCTL, &(0..8 * MIB)).unwrap();
    assert_eq!(state, ["mapped"]);
    bed.check_guest(&mut client).unwrap();
    drop(client);
    bed.finish().unwrap();
}

/// A discard waits for the raw write under it; what comes for the same blocks waits for the discard; others wait for nothing.
#[test]
fn requests_on_a_range_that_changes_wait_and_go_on() {
    let Some(rig) = Rig::enter() else { return };
    for what in ALL.into_iter().take(2) {
        let slow = FaultDisk::mount(64 * MIB, &rig.dir(&format!("slow{what:?}")).unwrap()).unwrap();
        let mount = rig.dir(&format!("fs{what:?}")).unwrap();
        let run = rig.dir(&format!("run{what:?}")).unwrap();
        let fs = Filesystem::make(Kind::Ext4, 0, 512, &Backing::File(slow.path()), &mount).unwrap();
        let image = fs.path().join("image");
        let mut model = Model::new(Layout::Written.make(&image, 8 * MIB, 3).unwrap());
        let daemon = Daemon::start(Path::new(PROGRAM), &run, &image, &[]).unwrap();
        daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
        let mut client = Client::connect(daemon.socket(), &ClientOptions::queues(2)).unwrap();
        slow.add(Rule::hold(Operation::Write).starting(&[0x67; 4096]).times(1));
        let queue = client.queue(0).unwrap();
        let shape = Shape::whole();
        queue.submit(Request::Write { offset: MIB, data: &[0x67; 4096] }, &shape, 0).unwrap();
        queue.kick().unwrap();
        until("the slow write", PATIENCE, || (slow.counts().hit > 0).then_some(())).unwrap();
        queue.submit(what.request(MIB - 512, 8192), &shape, 1).unwrap();
        queue.kick().unwrap();
        until("the change", PATIENCE, || {
            let status = daemon.status().unwrap();
            (status.number("requests/discard") + status.number("requests/write_zeroes") > 0)
                .then_some(())
        })
        .unwrap();
        let parked = client.queue(1).unwrap();
        parked.submit(Request::Read { offset: MIB + 512, len: 512 }, &shape, 2).unwrap();
        parked.submit(Request::Write { offset: MIB + 1024, data: &[1; 512] }, &shape, 3).unwrap();
        parked.submit(Request::Read { offset: 4 * MIB, len: 4096 }, &shape, 4).unwrap();
        parked.kick().unwrap();
        let first = parked.wait().unwrap();
        assert!(first.iter().all(|done| done.token == 4 && done.result.is_ok()), "{first:?}");
        assert!(
            client.queue(0).unwrap().collect().unwrap().is_empty(),
            "{what:?}: it did not wait"
        );
        slow.heal();
        for queue in client.queues() {
            for done in queue.drain().unwrap() {
                assert!(done.result.is_ok(), "{what:?}: {done:?}");
            }
        }
        what.model(&mut model, MIB - 512, 8192, 4096);
        for (offset, len) in [(0, MIB - 512), (MIB + 8192, MIB)] {
            for at in (offset..offset + len).step_by(128 << 10) {
                let part = usize::try_from((offset + len - at).min(128 << 10)).unwrap();
                model.check(at, &client.read_at(at, part).unwrap()).unwrap();
            }
        }
        client.write_at(MIB, &[9; 8192]).unwrap();
        assert!(client.read_at(MIB, 8192).unwrap() == [9; 8192]);
        drop((client, daemon));
        fs.check().unwrap();
    }
}

/// 1 GiB of zeros in one request: a reader gets in long before its end.
#[test]
fn a_reader_gets_in_while_1_gib_is_zeroed() {
    let Some(rig) = Rig::enter() else { return };
    let (mount, size) = (rig.dir("fs").unwrap(), 1024 * MIB);
    let fs = Filesystem::make(Kind::Ext4, 1200 * MIB, 512, &Backing::Memory, &mount).unwrap();
    let image = fs.path().join("image");
    let mut file = File::create_new(&image).unwrap();
    let chunk = vec![7; 1 << 20];
    (0..size / MIB).for_each(|_| file.write_all(&chunk).unwrap());
    drop(file);
    settle(&image).unwrap();
    let whole = allocated(&image).unwrap();
    let run = rig.dir("run").unwrap();
    let mut daemon = Daemon::start(Path::new(PROGRAM), &run, &image, &[]).unwrap();
    daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    let mut client = Client::connect(daemon.socket(), &ClientOptions::default()).unwrap();
    let queue = client.queue(0).unwrap();
    let zero = Request::WriteZeroes { offset: 0, len: size, unmap: false };
    queue.submit(zero, &Shape::whole(), 0).unwrap();
    queue.kick().unwrap();
    // A moment after it has begun; when the disk was quicker than that, little has been tested.
    thread::sleep(Duration::from_millis(5));
    println!("it goes on when the reader comes: {}", queue.collect().unwrap().is_empty());
    println!("the reader got in after {:?}", get_in(&image, PATIENCE).unwrap());
    for done in queue.drain().unwrap() {
        done.result.unwrap();
    }
    let status = daemon.status().unwrap();
    assert_eq!(status.number("lease_breaks"), 1);
    // The disk may be so quick that the reader proves nothing: no operation is longer than 4 MiB (R17).
    let pieces = status.number("segments/direct") + status.number("segments/file");
    assert!(pieces >= size / (4 * MIB), "1 GiB of zeros in {pieces} pieces");
    for offset in (0..size).step_by(37 << 20) {
        assert!(client.read_at(offset, 128 << 10).unwrap().iter().all(|byte| *byte == 0));
    }
    drop(client);
    assert!(daemon.sigterm().unwrap().success(), "{}", daemon.log());
    assert_eq!(allocated(&image).unwrap(), whole);
    drop(daemon);
    fs.check().unwrap();
}
