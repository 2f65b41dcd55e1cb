// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every eligible filesystem, on disks with both sector sizes, with every layout of an image: guest I/O against a model.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use integration::rig::command::run as run_tool;
use integration::rig::model::Model;
use integration::rig::wait::PATIENCE;
use integration::rig::workload::{Tally, Workload};
use integration::rig::{
    Backing, Client, ClientOptions, Daemon, FaultDisk, Filesystem, Kind, Layout, LoopDisk, Mount,
    Rig, Status,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
/// A fragmented image of this size has more than 10 000 extents.
const FRAGMENTED: u64 = 52 * MIB;

/// Serves `image`, lets four queues at it, returns what was done and the state at the end.
fn exercise(dir: &Path, image: &Path, model: &mut Model, mode: &str) -> (Tally, Status) {
    let options: &[&str] = if mode == "forbidden" { &["--mode", "filesystem"] } else { &[] };
    let mut daemon = Daemon::start(Path::new(PROGRAM), dir, image, options).unwrap();
    if mode == "direct" {
        daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    }
    let mut client = Client::connect(daemon.socket(), &ClientOptions::queues(4)).unwrap();
    assert_eq!(client.capacity(), model.size());
    let load = Workload { requests: 500, ..Workload::default() };
    let tally = load
        .run(client.queues(), model)
        .unwrap_or_else(|error| panic!("{error}; log: {}", daemon.log()));
    // Everything once more, in large requests: what was written must still be there when nothing is in flight.
    for offset in (0..model.size()).step_by(256 << 10) {
        let len = (model.size() - offset).min(256 << 10);
        let bytes = client.read_at(offset, usize::try_from(len).unwrap()).unwrap();
        if let Err(error) = model.check(offset, &bytes) {
            // Is it the map, the disk, or the write that is wrong? The file itself tells.
            let file = std::fs::read(image).unwrap();
            let file = model.check(0, &file).err();
            panic!("{error}; the file: {file:?}; {:?}; log: {}", daemon.status(), daemon.log());
        }
    }
    let status = daemon.status().unwrap();
    drop(client);
    assert!(daemon.sigterm().unwrap().success(), "{}", daemon.log());
    // No byte of what a host reader sees now may be stale.
    model.check(0, &std::fs::read(image).unwrap()).unwrap();
    (tally, status)
}

fn matrix(kind: Kind, sector: u32) {
    let Some(rig) = Rig::enter() else { return };
    let (mount, run) = (rig.dir("fs").unwrap(), rig.dir("run").unwrap());
    let fs = Filesystem::make(kind, 400 * MIB, sector, &Backing::Memory, &mount).unwrap();
    for layout in
        [Layout::Fragmented, Layout::Written, Layout::Sparse, Layout::Fallocated, Layout::Mixed]
    {
        let what = format!("{kind:?}, {sector}-byte sectors, {layout:?}");
        println!("{what}");
        let image = fs.path().join(format!("{layout:?}"));
        let size = if layout == Layout::Fragmented { FRAGMENTED } else { 8 * MIB };
        let mut model = Model::new(layout.make(&image, size, 5).unwrap());
        let (tally, status) = exercise(&run, &image, &mut model, "direct");
        assert!(tally.reads > 500 && tally.writes > 500 && tally.flushes > 0, "{what}: {tally:?}");
        assert!(status.direct(), "{what}: {status:?}");
        let (direct, file, zero) = (
            status.number("segments/direct"),
            status.number("segments/file"),
            status.number("segments/zero"),
        );
        assert!(direct > 0, "{what}: {status:?}");
        match layout {
            Layout::Written | Layout::Fragmented => {
                assert_eq!((file, zero), (0, 0), "{what}: {status:?}")
            }
            Layout::Sparse | Layout::Fallocated | Layout::Mixed => {
                assert!(file > 0 && zero > 0, "{what}: {status:?}");
            }
        }
        if layout == Layout::Fragmented {
            assert!(status.number("extents/cached") > 10_000, "{what}: {status:?}");
        }
        assert_eq!(status.number("requests/errors"), 0, "{what}: {status:?}");
        std::fs::remove_file(&image).unwrap();
    }
    fs.check().unwrap();
}

#[test]
fn ext4_on_512_byte_sectors() {
    matrix(Kind::Ext4, 512);
}

#[test]
fn ext4_on_4096_byte_sectors() {
    matrix(Kind::Ext4, 4096);
}

#[test]
fn ext4_with_1_kib_blocks() {
    matrix(Kind::Ext4Small, 512);
}

#[test]
fn ext3_on_512_byte_sectors() {
    matrix(Kind::Ext3, 512);
}

#[test]
fn ext3_on_4096_byte_sectors() {
    matrix(Kind::Ext3, 4096);
}

#[test]
fn ext2_on_512_byte_sectors() {
    matrix(Kind::Ext2, 512);
}

#[test]
fn xfs_on_512_byte_sectors() {
    matrix(Kind::Xfs, 512);
}

#[test]
fn xfs_on_4096_byte_sectors() {
    matrix(Kind::Xfs, 4096);
}

#[test]
fn xfs_with_reflink_on_512_byte_sectors() {
    matrix(Kind::XfsReflink, 512);
}

#[test]
fn xfs_with_reflink_on_4096_byte_sectors() {
    matrix(Kind::XfsReflink, 4096);
}

/// Half of the image's extents are shared with a copy, which must keep its bytes.
#[test]
fn a_reflinked_image_leaves_its_copy_alone() {
    let Some(rig) = Rig::enter() else { return };
    let (mount, run) = (rig.dir("fs").unwrap(), rig.dir("run").unwrap());
    let fs = Filesystem::make(Kind::XfsReflink, 400 * MIB, 512, &Backing::Memory, &mount).unwrap();
    let (image, copy) = (fs.path().join("image"), fs.path().join("copy"));
    let bytes = Layout::Written.make(&image, 8 * MIB, 5).unwrap();
    run_tool("cp", &["--reflink=always".as_ref(), image.as_os_str(), copy.as_os_str()]).unwrap();
    let mut model = Model::new(bytes.clone());
    let (_, status) = exercise(&run, &image, &mut model, "direct");
    assert!(status.direct() && status.number("segments/file") > 0, "{status:?}");
    assert!(std::fs::read(&copy).unwrap() == bytes, "the copy has changed");
    fs.check().unwrap();
}

fn filesystem_mode(dir: &Path, image: &Path, layout: Layout) {
    let mut model = Model::new(layout.make(image, 8 * MIB, 5).unwrap());
    let refused = Daemon::start(Path::new(PROGRAM), dir, image, &["--mode", "direct"]);
    assert!(refused.is_err(), "--mode direct was accepted for {}", image.display());
    let (_, status) = exercise(dir, image, &mut model, "refused");
    assert_eq!(status.text("mode"), "filesystem", "{status:?}");
    assert!(!status.reason().is_empty(), "{status:?}");
    assert_eq!(status.number("segments/direct"), 0, "{status:?}");
}

#[test]
fn btrfs_is_served_through_the_filesystem() {
    let Some(rig) = Rig::enter() else { return };
    let (mount, run) = (rig.dir("fs").unwrap(), rig.dir("run").unwrap());
    let fs = Filesystem::make(Kind::Btrfs, 400 * MIB, 512, &Backing::Memory, &mount).unwrap();
    for layout in [Layout::Written, Layout::Mixed] {
        filesystem_mode(&run, &fs.path().join(format!("{layout:?}")), layout);
    }
    fs.check().unwrap();
}

#[test]
fn tmpfs_is_served_through_the_filesystem() {
    let Some(rig) = Rig::enter() else { return };
    let run = rig.dir("run").unwrap();
    let mount = Mount::tmpfs(&rig.dir("fs").unwrap()).unwrap();
    for layout in [Layout::Written, Layout::Mixed] {
        filesystem_mode(&run, &mount.path().join(format!("{layout:?}")), layout);
    }
}

#[test]
fn overlayfs_is_served_through_the_filesystem() {
    let Some(rig) = Rig::enter() else { return };
    let (mount, run) = (rig.dir("fs").unwrap(), rig.dir("run").unwrap());
    let fs = Filesystem::make(Kind::Ext4, 100 * MIB, 512, &Backing::Memory, &mount).unwrap();
    let part = |name: &str| {
        let path = fs.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (lower, upper, work) = (part("lower"), part("upper"), part("work"));
    let overlay = Mount::overlay(&lower, &upper, &work, &rig.dir("overlay").unwrap()).unwrap();
    filesystem_mode(&run, &overlay.path().join("image"), Layout::Mixed);
    // The upper directory's own file can change size without a lease break while the overlay is there.
    let below = upper.join("below");
    filesystem_mode(&run, &below, Layout::Written);
    drop(overlay);
    fs.check().unwrap();
}

/// The file of a FUSE filesystem, which says nothing of blocks and punches no holes.
#[test]
fn fuse_is_served_through_the_filesystem() {
    let Some(rig) = Rig::enter() else { return };
    let run = rig.dir("run").unwrap();
    let fuse = FaultDisk::mount(8 * MIB, &rig.dir("fuse").unwrap()).unwrap();
    let mut model = Model::new(vec![0; 8 << 20]);
    let refused = Daemon::start(Path::new(PROGRAM), &run, &fuse.path(), &["--mode", "direct"]);
    assert!(refused.unwrap_err().to_string().contains("put the image on ext4 or XFS"));
    let (_, status) = exercise(&run, &fuse.path(), &mut model, "refused");
    assert_eq!(status.text("mode"), "filesystem", "{status:?}");
    assert_eq!(status.number("segments/direct"), 0, "{status:?}");
}

/// The node of the filesystem's device is another one's: whatever it is, nothing is read or written there.
#[test]
fn a_device_node_that_is_not_the_filesystems_is_not_used() {
    let Some(rig) = Rig::enter() else { return };
    let (mount, run) = (rig.dir("fs").unwrap(), rig.dir("run").unwrap());
    let fs = Filesystem::make(Kind::Ext4, 100 * MIB, 512, &Backing::Memory, &mount).unwrap();
    let other = LoopDisk::attach(100 * MIB, 512, &Backing::Memory).unwrap();
    for wrong in [other.path(), Path::new("/dev/null")] {
        let node = Mount::bind(wrong, fs.disk().path()).unwrap();
        let image = fs.path().join("image");
        let mut model = Model::new(Layout::Mixed.make(&image, 8 * MIB, 5).unwrap());
        let refused = Daemon::start(Path::new(PROGRAM), &run, &image, &["--mode", "direct"]);
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("below the filesystem cannot be used"), "{refused}");
        let before = other.sectors_moved().unwrap();
        let (_, status) = exercise(&run, &image, &mut model, "refused");
        assert_eq!(status.text("mode"), "filesystem", "{status:?}");
        assert_eq!(other.sectors_moved().unwrap(), before, "another disk was used");
        std::fs::remove_file(&image).unwrap();
        drop(node);
    }
    fs.check().unwrap();
}

#[test]
fn filesystem_mode_can_be_asked_for() {
    let Some(rig) = Rig::enter() else { return };
    let (mount, run) = (rig.dir("fs").unwrap(), rig.dir("run").unwrap());
    let fs = Filesystem::make(Kind::Ext4, 100 * MIB, 512, &Backing::Memory, &mount).unwrap();
    let image = fs.path().join("image");
    let mut model = Model::new(Layout::Mixed.make(&image, 8 * MIB, 5).unwrap());
    let (_, status) = exercise(&run, &image, &mut model, "forbidden");
    assert_eq!(
        (status.text("mode"), status.number("segments/direct")),
        ("filesystem", 0),
        "{status:?}"
    );
    fs.check().unwrap();
}

fn device(sector: u32) {
    let Some(rig) = Rig::enter() else { return };
    let run = rig.dir("run").unwrap();
    let disk = LoopDisk::attach(8 * MIB, sector, &Backing::Memory).unwrap();
    let mut model = Model::new(vec![0; 8 << 20]);
    let (tally, status) = exercise(&run, disk.path(), &mut model, "direct");
    assert!(tally.writes > 500, "{tally:?}");
    assert!(status.direct(), "{status:?}");
    assert_eq!(
        (status.number("segments/file"), status.number("segments/zero")),
        (0, 0),
        "{status:?}"
    );
}

#[test]
fn a_block_device_is_an_image() {
    device(512);
}

#[test]
fn a_block_device_with_4096_byte_sectors_is_an_image() {
    device(4096);
}

#[test]
fn a_mounted_block_device_is_refused() {
    let Some(rig) = Rig::enter() else { return };
    let (mount, run) = (rig.dir("fs").unwrap(), rig.dir("run").unwrap());
    let fs = Filesystem::make(Kind::Ext4, 100 * MIB, 512, &Backing::Memory, &mount).unwrap();
    let error = Daemon::start(Path::new(PROGRAM), &run, fs.disk().path(), &[]).unwrap_err();
    assert!(error.to_string().contains("ended at start"), "{error}");
}

/// A sparse image's blocks become mapped as they are written: the second pass over them is direct.
#[test]
fn filled_holes_become_direct() {
    let Some(rig) = Rig::enter() else { return };
    for kind in [Kind::Ext4, Kind::Xfs] {
        let (mount, run) =
            (rig.dir(&format!("{kind:?}")).unwrap(), rig.dir(&format!("{kind:?}-run")).unwrap());
        let fs = Filesystem::make(kind, 400 * MIB, 512, &Backing::Memory, &mount).unwrap();
        let image = fs.path().join("image");
        Layout::Sparse.make(&image, 8 * MIB, 5).unwrap();
        let daemon = Daemon::start(Path::new(PROGRAM), &run, &image, &[]).unwrap();
        daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
        let mut client = Client::connect(daemon.socket(), &ClientOptions::default()).unwrap();
        let segments = |name: &str| daemon.status().unwrap().number(&format!("segments/{name}"));
        for pass in 0..2_u8 {
            let file = segments("file");
            for block in 0..64 {
                client.write_at(block * 4096, &[pass + 1; 4096]).unwrap();
            }
            let through_file = segments("file") - file;
            match pass {
                0 => assert!(through_file >= 64, "{kind:?}: {through_file}"),
                _ => assert_eq!(through_file, 0, "{kind:?}"),
            }
        }
        assert!(client.read_at(0, 64 * 4096).unwrap().iter().all(|byte| *byte == 2));
        assert_eq!(client.read_at(64 * 4096, 4096).unwrap(), vec![0; 4096]);
    }
}
