// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Others at the image while it is served: readers, writers, truncation, unlinking, and what each does to direct mode.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use integration::rig::command::run;
use integration::rig::model::{BLOCK, Model};
use integration::rig::outside::still;
use integration::rig::scope::Sysctl;
use integration::rig::stamped::Stamps;
use integration::rig::wait::{PATIENCE, until};
use integration::rig::{
    Backing, Bed, ClientOptions, Daemon, Filesystem, Kind, Layout, Mount, Request, Rig, Setup,
    Shape, Status,
};
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
/// Longest that a reader may wait under a guest's load, and that direct mode may stay away after him.
const BOUND: Duration = Duration::from_secs(2);
/// Longer than a time that has been set is set again (R4).
const CALM: Duration = Duration::from_millis(1500);

/// Ends the guest's load, also when an assertion fails: the scope would wait for it for ever.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads the image in the middle of a write load, twice over, and checks every sector it saw. Alone, for it measures.
fn cat_under_load(kind: Kind, sector: u32) {
    let Some(rig) = Rig::enter() else { return };
    let fs = Filesystem::make(kind, 400 * MIB, sector, &Backing::Memory, &rig.dir("fs").unwrap())
        .unwrap();
    let image = fs.path().join("image");
    let stamps = Stamps::new(8 * MIB / BLOCK as u64);
    std::fs::write(&image, stamps.image()).unwrap();
    let daemon = Daemon::start(Path::new(PROGRAM), &rig.dir("run").unwrap(), &image, &[]).unwrap();
    daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    let mut client =
        integration::rig::Client::connect(daemon.socket(), &ClientOptions::queues(2)).unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| stamps.write(client.queues(), 8, &stop));
        let ending = Stop(&stop);
        for round in 0..2 {
            thread::sleep(Duration::from_millis(200));
            assert!(!load.is_finished(), "the guest's I/O has ended");
            let oldest = stamps.written();
            let start = Instant::now();
            let mut bytes = Vec::new();
            let mut file = File::open(&image).unwrap();
            file.read_to_end(&mut bytes).unwrap();
            let took = start.elapsed();
            let newest = stamps.asked();
            Stamps::check(&bytes, &oldest, &newest).unwrap();
            assert!(took < BOUND, "the reader took {took:?}");
            assert!(!daemon.status().unwrap().direct(), "direct while the file is open elsewhere");
            drop(file);
            let status =
                daemon.await_status("the return to direct mode", BOUND, Status::direct).unwrap();
            assert!(status.number("lease_breaks") > round, "{status:?}");
            let direct = status.number("segments/direct");
            let more = |status: &Status| status.number("segments/direct") > direct + 100;
            daemon.await_status("direct writes again", PATIENCE, more).unwrap();
        }
        drop(ending);
        let writes = load.join().unwrap();
        assert!(writes.unwrap() > 1000);
    });
    // Not one stale byte for a buffered reader, nor for the guest.
    let (written, asked) = (stamps.written(), stamps.asked());
    assert_eq!(written, asked);
    Stamps::check(&std::fs::read(&image).unwrap(), &written, &written).unwrap();
    for offset in (0..8 * MIB).step_by(256 << 10) {
        let bytes = client.read_at(offset, 256 << 10).unwrap();
        let first = usize::try_from(offset).unwrap() / BLOCK;
        for (index, block) in bytes.chunks(BLOCK).enumerate() {
            let seen = integration::rig::model::versions((first + index) as u64, block).unwrap();
            assert!(seen.iter().all(|version| Some(version) == written.get(first + index)));
        }
    }
    assert_eq!(daemon.status().unwrap().number("requests/errors"), 0);
    drop((client, daemon));
    fs.check().unwrap();
}

#[test]
fn serial_cat_in_the_middle_of_a_write_load_on_ext4() {
    cat_under_load(Kind::Ext4, 512);
}

#[test]
fn serial_cat_in_the_middle_of_a_write_load_on_xfs() {
    cat_under_load(Kind::XfsReflink, 512);
}

#[test]
fn serial_cat_in_the_middle_of_a_write_load_on_4096_byte_sectors() {
    cat_under_load(Kind::Ext4, 4096);
}

/// A reader that opens and closes all the time must not keep the guest from its disk.
#[test]
fn a_poller_does_not_make_us_flap() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    let opens: u64 = 100;
    for open in 0..opens {
        let mut block = [0; 4096];
        File::open(&bed.image).unwrap().read_exact_at(&mut block, 8192).unwrap();
        let data = vec![u8::try_from(open % 251).unwrap(); 4096];
        client.write_at(8192, &data).unwrap();
        bed.model.write(8192, &data).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    let breaks = bed.daemon.status().unwrap().number("lease_breaks");
    assert!(breaks < opens / 2, "{breaks} breaks at {opens} opens");
    bed.await_direct(PATIENCE).unwrap();
    drop(client);
    bed.finish().unwrap();
}

/// The image copied by reflink while it is served: afterwards its extents are shared, and the copy must stay as it was.
#[test]
fn a_reflink_while_served_leaves_the_copy_alone() {
    let Some(rig) = Rig::enter() else { return };
    let setup = Setup { kind: Kind::XfsReflink, disk: 400 * MIB, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    client.write_at(0, &[7; 4096]).unwrap();
    bed.model.write(0, &[7; 4096]).unwrap();
    let copy = bed.fs.path().join("copy");
    run("cp", &["--reflink=always".as_ref(), bed.image.as_os_str(), copy.as_os_str()]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let then = bed.model.clone();
    for block in 0..64 {
        client.write_at(block * 4096, &[9; 4096]).unwrap();
        bed.model.write(block * 4096, &[9; 4096]).unwrap();
    }
    then.check(0, &std::fs::read(&copy).unwrap()).unwrap();
    drop(client);
    bed.finish().unwrap();
}

#[test]
fn an_unlinked_image_is_served_on() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    std::fs::remove_file(&bed.image).unwrap();
    client.write_at(4096, &[5; 8192]).unwrap();
    assert_eq!(client.read_at(4096, 8192).unwrap(), vec![5; 8192]);
    client.flush().unwrap();
    let unlinked = |status: &Status| {
        status.0.to_string().contains("unlinked")
            && !status.0.to_string().contains("\"unlinked\":false")
    };
    bed.daemon.await_status("the unlinked image in the state", PATIENCE, unlinked).unwrap();
    bed.model.write(4096, &[5; 8192]).unwrap();
    bed.check_guest(&mut client).unwrap();
    drop(client);
    assert!(bed.daemon.sigterm().unwrap().success(), "{}", bed.daemon.log());
    let Bed { daemon, fs, .. } = bed;
    drop(daemon);
    fs.check().unwrap();
}

#[test]
fn direct_writes_show_in_the_mtime() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    let mtime = || std::fs::metadata(&bed.image).unwrap().modified().unwrap();
    let mut before = mtime();
    for _ in 0..2 {
        client.write_at(0, &[1; 4096]).unwrap();
        until("a new mtime", PATIENCE, || (mtime() != before).then_some(())).unwrap();
        // It may be set once more for the same write, a second later; then no more.
        before = still(&bed.image, CALM).unwrap();
        client.read_at(0, 4096).unwrap();
        assert_eq!(still(&bed.image, CALM).unwrap(), before, "the mtime changes without a write");
    }
    assert!(bed.daemon.status().unwrap().direct());
}

/// `truncate(2)` through an overlay that was mounted later breaks no lease; the freed blocks belong to others at once.
#[test]
fn a_truncation_without_a_lease_break_stops_raw_writes() {
    let Some(rig) = Rig::enter() else { return };
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &rig.dir("fs").unwrap())
        .unwrap();
    let part = |name: &str| {
        let path = fs.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (lower, upper, work) = (part("lower"), part("upper"), part("work"));
    let image = upper.join("image");
    let mut model = Model::new(Layout::Written.make(&image, 16 * MIB, 1).unwrap());
    let daemon = Daemon::start(Path::new(PROGRAM), &rig.dir("run").unwrap(), &image, &[]).unwrap();
    daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    let mut client =
        integration::rig::Client::connect(daemon.socket(), &ClientOptions::queues(1)).unwrap();
    client.write_at(12 * MIB, &[3; 4096]).unwrap();

    let overlay = Mount::overlay(&lower, &upper, &work, &rig.dir("overlay").unwrap()).unwrap();
    let script = "truncate($ARGV[0], $ARGV[1]) or die $!";
    let path = overlay.path().join("image");
    let size = (8 * MIB).to_string();
    run("perl", &["-e".as_ref(), script.as_ref(), path.as_os_str(), size.as_ref()]).unwrap();
    let left = |status: &Status| !status.direct();
    daemon.await_status("filesystem mode after the size change", PATIENCE, left).unwrap();

    let canary = fs.path().join("canary");
    let bytes = vec![0xcc; 45 << 20];
    std::fs::write(&canary, &bytes).unwrap();
    File::open(&canary).unwrap().sync_all().unwrap();
    rustix::fs::fadvise(File::open(&canary).unwrap(), 0, None, rustix::fs::Advice::DontNeed)
        .unwrap();
    for offset in (8 * MIB..16 * MIB).step_by(64 << 10) {
        // Whether it is an error or grows the file again is another matter.
        let _ = client.write_at(offset, &[4; 64 << 10]);
    }
    client.write_at(0, &[6; 4096]).unwrap();
    model.write(0, &[6; 4096]).unwrap();
    model.check(0, &client.read_at(0, 256 << 10).unwrap()).unwrap();
    drop((client, daemon));
    assert!(std::fs::read(&canary).unwrap() == bytes, "a write landed in another file");
    drop(overlay);
    fs.check().unwrap();
}

/// A break that is not served in time is forced: the daemon wakes up owning nothing.
#[test]
fn serial_a_forced_break_stops_raw_writes() {
    let Some(rig) = Rig::alone() else { return };
    let _short = Sysctl::set("/proc/sys/fs/lease-break-time", "2").unwrap();
    let setup = Setup { size: 16 * MIB, ..Setup::default() };
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut client = bed.connect(1).unwrap();
    client.write_at(0, &[1; 4096]).unwrap();

    bed.daemon.signal(Signal::STOP).unwrap();
    // Long enough that the last confirmation of the lease is too old.
    let start = Instant::now();
    let truncated = File::options().write(true).truncate(true).open(&bed.image).unwrap();
    let waited = start.elapsed();
    assert!(
        waited > Duration::from_millis(1500),
        "the break was served by a stopped daemon: {waited:?}"
    );
    let canary = bed.fs.path().join("canary");
    let bytes = vec![0xcc; 45 << 20];
    std::fs::write(&canary, &bytes).unwrap();
    File::open(&canary).unwrap().sync_all().unwrap();
    rustix::fs::fadvise(File::open(&canary).unwrap(), 0, None, rustix::fs::Advice::DontNeed)
        .unwrap();

    let queue = client.queue(0).unwrap();
    for block in 0..32 {
        let request = Request::Write { offset: block * 256 * 1024, data: &[2; 4096] };
        queue.submit(request, &Shape::whole(), block).unwrap();
    }
    queue.kick().unwrap();
    bed.daemon.signal(Signal::CONT).unwrap();
    // Each is answered, well or not.
    assert_eq!(queue.drain().unwrap().len(), 32);
    bed.daemon.await_status("filesystem mode", PATIENCE, |status| !status.direct()).unwrap();
    drop((truncated, client));
    assert!(bed.daemon.sigterm().unwrap().success(), "{}", bed.daemon.log());
    assert!(std::fs::read(&canary).unwrap() == bytes, "a write landed in another file");
    drop(bed.daemon);
    bed.fs.check().unwrap();
}

/// Looking at a served image by its path is refused before it could break the lease, and without a warning of that.
#[test]
fn extentctl_does_not_disturb_who_serves_the_image() {
    let Some(rig) = Rig::enter() else { return };
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &rig.dir("fs").unwrap())
        .unwrap();
    let image = fs.path().join("image");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let daemon = Daemon::start(Path::new(PROGRAM), &rig.dir("run").unwrap(), &image, &[]).unwrap();
    daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    for action in ["check", "map"] {
        let mut extentctl = Command::new(env!("CARGO_BIN_EXE_extentctl"));
        let output = extentctl.arg(action).arg(&image).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{said}");
        assert!(said.contains("ask that with -c SOCKET"), "{said}");
    }
    let status = daemon.status().unwrap();
    assert_eq!((status.direct(), status.number("lease_breaks")), (true, 0));
}
