// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every state an image's bytes can be in on a real filesystem, its odd ends and parts, and blocks that are larger than sectors.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use integration::rig::command::run as run_tool;
use integration::rig::model::{Model, stamp_of, stamp_sector};
use integration::rig::outside::{states, still};
use integration::rig::wait::{PATIENCE, until};
use integration::rig::workload::Workload;
use integration::rig::{
    Backing, Bed, Client, ClientOptions, Daemon, Filesystem, Kind, Layout, LoopDisk, Mount, Queue,
    Random, Request, Rig, Setup, Shape, Status,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const EXTENTCTL: &str = env!("CARGO_BIN_EXE_extentctl");
const MIB: u64 = 1 << 20;
/// Longer than a time that has been set is set again (R4).
const CALM: Duration = Duration::from_millis(1500);

/// Segments by path: direct, file, zero.
fn segments(daemon: &Daemon) -> [u64; 3] {
    let status = daemon.status().unwrap();
    ["direct", "file", "zero"].map(|name| status.number(&format!("segments/{name}")))
}

/// Which paths `act` took.
fn paths(daemon: &Daemon, act: impl FnOnce()) -> Vec<&'static str> {
    let before = segments(daemon);
    act();
    let after = segments(daemon);
    let grown = before.iter().zip(after).map(|(before, after)| after > *before);
    ["direct", "file", "zero"]
        .into_iter()
        .zip(grown)
        .filter(|(_, grown)| *grown)
        .map(|(name, _)| name)
        .collect()
}

fn state(daemon: &Daemon, range: Range<u64>) -> Vec<String> {
    states(daemon, EXTENTCTL, &range).unwrap()
}

/// What becomes of a range that is in `state` at first: read by the path `read`, written through the file, mapped and direct.
fn becomes_mapped(bed: &mut Bed, first: &str, read: &str) {
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    let daemon = &bed.daemon;
    let whole = 0..bed.model.size();
    assert_eq!(state(daemon, whole.clone()), [first]);
    let model = bed.model.clone();
    let reading = || model.check(MIB, &client.read_at(MIB, 64 << 10).unwrap()).unwrap();
    assert_eq!(paths(daemon, reading), [read], "reads");
    let range = MIB..MIB + (64 << 10);
    let writing = || client.write_at(range.start, &[7; 64 << 10]).unwrap();
    assert_eq!(paths(daemon, writing), ["file"], "the first write");
    let writing = || client.write_at(range.start, &[8; 64 << 10]).unwrap();
    assert_eq!(paths(daemon, writing), ["direct"], "the second write");
    assert_eq!(state(daemon, range.clone()), ["mapped"]);
    assert_eq!(state(daemon, whole), [first, "mapped", first]);
    bed.model.write(range.start, &[8; 64 << 10]).unwrap();
    let load = Workload { requests: 300, ..Workload::default() };
    load.run(client.queues(), &mut bed.model).unwrap();
    bed.check_guest(&mut client).unwrap();
}

#[test]
fn shared_extents() {
    let Some(rig) = Rig::enter() else { return };
    let setup = Setup { kind: Kind::XfsReflink, disk: 400 * MIB, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &["--mode", "filesystem"]).unwrap();
    assert!(bed.daemon.sigterm().unwrap().success());
    let copy = bed.fs.path().join("copy");
    run_tool("cp", &["--reflink=always".as_ref(), bed.image.as_os_str(), copy.as_os_str()])
        .unwrap();
    let then = bed.model.clone();
    bed.restart(&[]).unwrap();
    becomes_mapped(&mut bed, "shared", "direct");
    then.check(0, &std::fs::read(&copy).unwrap()).unwrap();
    bed.finish().unwrap();
}

#[test]
fn unwritten_extents() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let Some(rig) = Rig::enter() else { return };
        let setup = Setup { kind, disk: 400 * MIB, layout: Layout::Fallocated, ..Setup::default() };
        let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
        becomes_mapped(&mut bed, "unwritten", "zero");
        bed.finish().unwrap();
    }
}

/// Written by another process a moment ago: nothing of it has a place on the disk yet.
#[test]
fn delayed_allocation_at_the_start() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let Some(rig) = Rig::enter() else { return };
        let setup = Setup { kind, disk: 400 * MIB, layout: Layout::Sparse, ..Setup::default() };
        let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
        assert!(bed.daemon.sigterm().unwrap().success());
        let bytes = Random::new(9).bytes(8 << 20);
        File::options().write(true).open(&bed.image).unwrap().write_all_at(&bytes, 0).unwrap();
        bed.model = Model::new(bytes);
        bed.restart(&[]).unwrap();
        bed.await_direct(PATIENCE).unwrap();
        let mut client = bed.connect(2).unwrap();
        let daemon = &bed.daemon;
        assert_eq!(paths(daemon, || bed.check_guest(&mut client).unwrap()), ["direct"]);
        let load = Workload { requests: 300, ..Workload::default() };
        load.run(client.queues(), &mut bed.model).unwrap();
        drop(client);
        bed.finish().unwrap();
    }
}

/// A file that lies in its inode has no blocks to go to.
#[test]
fn inline_data() {
    let Some(rig) = Rig::enter() else { return };
    let run = rig.dir("run").unwrap();
    let disk = LoopDisk::attach(64 * MIB, 512, &Backing::Memory).unwrap();
    let mkfs = ["-q", "-F", "-b", "4096", "-I", "1024", "-O", "inline_data"];
    let mut args: Vec<&std::ffi::OsStr> = mkfs.iter().map(std::ffi::OsStr::new).collect();
    args.push(disk.path().as_os_str());
    run_tool("mkfs.ext4", &args).unwrap();
    let mount = Mount::device(disk.path(), &rig.dir("fs").unwrap()).unwrap();
    let image = mount.path().join("image");
    std::fs::write(&image, [3; 512]).unwrap();
    File::open(&image).unwrap().sync_all().unwrap();
    let said = run_tool("filefrag", &["-v".as_ref(), image.as_os_str()]).unwrap();
    assert!(said.contains("inline"), "{said}");
    let mut daemon = Daemon::start(Path::new(PROGRAM), &run, &image, &[]).unwrap();
    let mut client = Client::connect(daemon.socket(), &ClientOptions::default()).unwrap();
    assert_eq!(client.read_at(0, 512).unwrap(), [3; 512]);
    let through = paths(&daemon, || client.write_at(0, &[4; 512]).unwrap());
    assert_eq!(through, ["file"], "{:?}", daemon.status());
    client.flush().unwrap();
    assert_eq!(client.read_at(0, 512).unwrap(), [4; 512]);
    drop(client);
    assert!(daemon.sigterm().unwrap().success(), "{}", daemon.log());
    assert_eq!(std::fs::read(&image).unwrap(), [4; 512]);
    drop((daemon, mount));
    Kind::Ext4.check(disk.path()).unwrap();
}

/// Images that end in the middle of a block, and in the middle of a sector.
#[test]
fn odd_sizes() {
    let Some(rig) = Rig::enter() else { return };
    let run = rig.dir("run").unwrap();
    for (kind, sector) in
        [(Kind::Ext4, 512), (Kind::Ext4, 4096), (Kind::Xfs, 512), (Kind::Xfs, 4096)]
    {
        let mount = rig.dir(&format!("{kind:?}{sector}")).unwrap();
        let fs = Filesystem::make(kind, 400 * MIB, sector, &Backing::Memory, &mount).unwrap();
        for size in [512, 2 * MIB + 512, 2 * MIB - 512, 2 * MIB + 700, 2 * MIB + 300] {
            for layout in [Layout::Written, Layout::Sparse] {
                let what = format!("{kind:?}, {sector}, {size} bytes, {layout:?}");
                let image = fs.path().join("image");
                let bytes = layout.make(&image, size, 3).unwrap();
                let (disk, tail) = bytes.split_at(bytes.len() / 512 * 512);
                let mut model = Model::new(disk.to_vec());
                let mut daemon = match Daemon::start(Path::new(PROGRAM), &run, &image, &[]) {
                    // What such a disk cannot move is no image, and is told how to become one.
                    Err(error) if !disk.len().is_multiple_of(sector as usize) => {
                        assert!(error.to_string().contains("truncate -s %4096"), "{what}: {error}");
                        std::fs::remove_file(&image).unwrap();
                        continue;
                    }
                    daemon => daemon.unwrap_or_else(|error| panic!("{what}: {error}")),
                };
                // So small an image cannot be shared out between queues.
                let queues = if size == 512 { 1 } else { 2 };
                let mut client =
                    Client::connect(daemon.socket(), &ClientOptions::queues(queues)).unwrap();
                assert_eq!(client.capacity(), model.size(), "{what}");
                let load = Workload { requests: 100, ..Workload::default() };
                load.run(client.queues(), &mut model)
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                let end = model.size() - 512;
                client
                    .write_at(end, &[9; 512])
                    .unwrap_or_else(|error| panic!("{what}: {error}: {:?}", daemon.status()));
                model.write(end, &[9; 512]).unwrap();
                model.check(end, &client.read_at(end, 512).unwrap()).unwrap();
                client.flush().unwrap();
                drop(client);
                assert!(daemon.sigterm().unwrap().success(), "{what}: {}", daemon.log());
                let now = std::fs::read(&image).unwrap();
                assert_eq!(now.len() as u64, size, "{what}");
                let (now, now_tail) = now.split_at(disk.len());
                model.check(0, now).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(now_tail, tail, "{what}: the bytes behind the last sector");
                std::fs::remove_file(&image).unwrap();
            }
        }
        fs.check().unwrap();
    }
}

/// A partition inside an image: whatever is done to it, nothing outside changes.
#[test]
fn a_part_of_an_image() {
    for (kind, sector, offset, len) in [
        (Kind::Ext4, 512, MIB, 3 * MIB),
        (Kind::Ext4, 512, 63 * 512, 3 * MIB - 1536),
        (Kind::XfsReflink, 4096, 63 * 512, 3 * MIB + 512),
        (Kind::Ext4Small, 512, 2 * MIB + 1536, 1024 * 1024),
    ] {
        for layout in [Layout::Written, Layout::Mixed] {
            let Some(rig) = Rig::enter() else { return };
            let setup = Setup { kind, sector, disk: 400 * MIB, layout, ..Setup::default() };
            let (from, most) = (offset.to_string(), len.to_string());
            let options = ["--offset", &from, "--size-limit", &most];
            let mut bed = Bed::make(&rig, PROGRAM, &setup, &options).unwrap();
            let mut client = bed.connect(4).unwrap();
            assert_eq!(client.capacity(), len);
            let inside = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
            let mut part = Model::new(bed.model.bytes().get(inside).unwrap().to_vec());
            // What a discard leaves of a block depends on where it is in the file, and the model does not know.
            let discard = offset.is_multiple_of(kind.unit()).then_some(kind.unit());
            let load = Workload { requests: 300, discard, ..Workload::default() };
            load.run(client.queues(), &mut part).unwrap();
            bed.model.write(offset, part.bytes()).unwrap();
            bed.model.check(0, &bed.host_bytes().unwrap()).unwrap();
            for unmap in [false, true] {
                client.write_at(0, &[1; 8192]).unwrap();
                client.write_at(len - 8192, &[1; 8192]).unwrap();
                let zero = Request::WriteZeroes { offset: 0, len, unmap };
                client.queue(0).unwrap().once(zero, &Shape::whole()).unwrap();
                bed.model.zero(offset..offset + len).unwrap();
                bed.model.check(0, &bed.host_bytes().unwrap()).unwrap();
            }
            client
                .queue(0)
                .unwrap()
                .once(Request::Discard { offset: 0, len }, &Shape::whole())
                .unwrap();
            let past = Request::WriteZeroes { offset: len - 512, len: 1024, unmap: true };
            assert!(client.queue(0).unwrap().once(past, &Shape::whole()).is_err());
            assert!(client.write_at(len, &[1; 512]).is_err());
            drop(client);
            bed.finish().unwrap();
        }
    }
}

/// Eight writers, each with a sector of its own in the same blocks of a disk that can only write all eight at once.
fn neighbours(kind: Kind, layout: Layout, options: &[&str]) {
    const BLOCKS: u64 = 16;
    let Some(rig) = Rig::enter() else { return };
    let setup = Setup { kind, sector: 4096, disk: 400 * MIB, layout, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, options).unwrap();
    let mut client = bed.connect(8).unwrap();
    let writer = |sector: u64, queue: &mut Queue| {
        for version in 1..40 {
            for block in 0..BLOCKS {
                let data = stamp_sector(block, sector, version);
                let request = Request::Write { offset: block * 4096 + sector * 512, data: &data };
                queue.submit(request, &Shape::whole(), block).unwrap();
            }
            queue.kick().unwrap();
            for done in queue.drain().unwrap() {
                done.result.unwrap();
            }
        }
    };
    thread::scope(|scope| {
        for (sector, queue) in client.queues().iter_mut().enumerate() {
            scope.spawn(move || writer(sector as u64, queue));
        }
    });
    let bytes = client.read_at(0, 4096 * 16).unwrap();
    for (index, sector) in bytes.chunks(512).enumerate() {
        let index = index as u64;
        assert_eq!(stamp_of(sector), Some((index / 8, index % 8, 39)), "{kind:?} {layout:?}");
    }
    bed.model.write(0, &bytes).unwrap();
    bed.check_guest(&mut client).unwrap();
    drop(client);
    bed.finish().unwrap();
}

#[test]
fn sectors_of_a_larger_block_have_many_writers() {
    for kind in [Kind::Ext4, Kind::XfsReflink] {
        for layout in [Layout::Written, Layout::Sparse, Layout::Fallocated] {
            neighbours(kind, layout, &[]);
        }
        neighbours(kind, Layout::Written, &["--mode", "filesystem"]);
    }
}

#[test]
fn blocks_of_4096_bytes_for_the_guest() {
    for sector in [512, 4096] {
        let Some(rig) = Rig::enter() else { return };
        let setup = Setup { sector, layout: Layout::Mixed, ..Setup::default() };
        let mut bed = Bed::make(&rig, PROGRAM, &setup, &["--block-size", "4096"]).unwrap();
        let mut client = bed.connect(1).unwrap();
        assert_eq!(client.config().blk_size.to_native(), 4096);
        assert_eq!(client.capacity(), bed.model.size());
        let mut random = Random::new(5);
        for _ in 0..300 {
            let offset = random.below(2000) * 4096;
            let len = 4096 * (1 + random.index(8));
            let data = random.bytes(len);
            client.write_at(offset, &data).unwrap();
            bed.model.write(offset, &data).unwrap();
        }
        client.flush().unwrap();
        bed.check_guest(&mut client).unwrap();
        assert_eq!(bed.daemon.status().unwrap().number("segments/bounced"), 0);
        drop(client);
        bed.finish().unwrap();
    }
}

/// R4: a backup by `find -newer` sees what the guest has written past the filesystem, and nothing where it wrote nothing.
#[test]
fn find_newer_sees_a_guests_writes_and_nothing_else() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    let (image, since) = (bed.image.clone(), bed.fs.path().join("since"));
    let newer = || {
        let args = [image.as_os_str(), "-newer".as_ref(), since.as_os_str()];
        !run_tool("find", &args).unwrap().is_empty()
    };
    let mark = || {
        // The clock of the filesystem is a coarse one.
        thread::sleep(Duration::from_millis(30));
        std::fs::write(&since, "x").unwrap();
        thread::sleep(Duration::from_millis(30));
    };
    mark();
    client.write_at(0, &[1; 4096]).unwrap();
    until("a newer image", PATIENCE, || newer().then_some(())).unwrap();
    // The write's time may be set once more, a second later.
    still(&image, CALM).unwrap();
    mark();
    client.read_at(0, 4096).unwrap();
    client.flush().unwrap();
    still(&image, CALM).unwrap();
    assert!(!newer(), "an idle guest's image has changed");
    assert!(bed.daemon.status().unwrap().direct());
    drop(client);
    assert!(bed.daemon.sigterm().unwrap().success());
    assert!(!newer(), "the end of an idle guest changed the image");
    bed.restart(&[]).unwrap();
    bed.daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    mark();
    assert!(!newer(), "a start changed the image");
    let mut client = bed.connect(1).unwrap();
    client.write_at(0, &[2; 4096]).unwrap();
    drop(client);
    assert!(bed.daemon.sigterm().unwrap().success());
    assert!(newer(), "the last write is not seen after the end");
}
