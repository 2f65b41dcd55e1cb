// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image served in direct mode while a cgroup limits how fast the daemon may write: raw I/O that
//! is in flight when a lease break comes has to end well before the break is forced (R2b).

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use integration::rig::scope::Sysctl;
use integration::rig::wait::{PATIENCE, until};
use integration::rig::{
    Bed, Client, ClientOptions, Kind, LoopDisk, Queue, Request, Rig, Setup, Shape,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
/// Bytes a second that the daemon may write.
const RATE: u64 = 4 * MIB;
/// What lease-break-time is set to.
const BREAK: Duration = Duration::from_secs(8);
const QUEUES: u16 = 2;
/// Writes of [`PIECE`] bytes in flight on each queue: 48 MiB in all, which take 12 s at [`RATE`],
/// half as long again as [`BREAK`].
const DEPTH: usize = 48;
/// Larger writes are more than one request of the disk, and the controller was seen to charge those
/// more than once.
const PIECE: usize = 512 << 10;
/// When this much has been written, so has everything that was submitted before the device's rate
/// could be known, and some more.
const WARM_UP: u64 = 56 * MIB;
/// Longest for what takes 14 s on an idle machine.
const LONG: Duration = Duration::from_secs(120);

/// A process whose writes to one disk are limited by the blkio controller of cgroup v1.
struct Throttle {
    group: PathBuf,
    controller: PathBuf,
    disk: (u64, u64),
    pid: u32,
}

impl Throttle {
    /// Where the controller is mounted; `None`, after saying so, where it is not.
    fn controller() -> Option<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let found = mounts.lines().find_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            let mut kind = kind.split(' ');
            let is_v1 = kind.next() == Some("cgroup");
            let has_blkio = kind.nth(1)?.split(',').any(|option| option == "blkio");
            (is_v1 && has_blkio).then(|| place.split(' ').nth(4).map(PathBuf::from))?
        });
        if found.is_none() {
            println!("skipped: no blkio controller of cgroup v1 is mounted");
        }
        found
    }

    /// Puts the process `pid` with its threads, and those it will start, under the limit.
    fn new(controller: &Path, disk: &LoopDisk, pid: u32) -> io::Result<Throttle> {
        let group = controller.join(format!("extentd-test-{}", std::process::id()));
        fs::create_dir(&group)?;
        let number = disk.number()?;
        let disk = (rustix::fs::major(number).into(), rustix::fs::minor(number).into());
        let throttle = Throttle { group, controller: controller.into(), disk, pid };
        throttle.limit(RATE)?;
        fs::write(throttle.group.join("cgroup.procs"), pid.to_string())?;
        Ok(throttle)
    }

    /// Sets the limit in bytes a second; 0 takes it away.
    fn limit(&self, rate: u64) -> io::Result<()> {
        let (major, minor) = self.disk;
        let file = self.group.join("blkio.throttle.write_bps_device");
        fs::write(file, format!("{major}:{minor} {rate}"))
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let _ = self.limit(0);
        // A group that has processes cannot be removed, and a failed test's daemon still runs.
        let _ = fs::write(self.controller.join("cgroup.procs"), self.pid.to_string());
        let gone = until("the cgroup's end", PATIENCE, || fs::remove_dir(&self.group).ok());
        if let Err(error) = gone {
            eprintln!("{}: {error}", self.group.display());
        }
    }
}

/// Ends the guest's load, also when an assertion fails: the scope would wait for it for ever.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Keeps [`DEPTH`] writes in flight, each to a place of its own, and counts the bytes written,
/// until `stop` or until one fails: the image has become shorter.
fn load(queue: &mut Queue, number: usize, written: &AtomicU64, stop: &AtomicBool) {
    let data = vec![0xee; PIECE];
    let submit = |queue: &mut Queue, slot: usize| {
        let offset = (number * DEPTH + slot) as u64 * MIB;
        let request = Request::Write { offset, data: &data };
        queue.submit(request, &Shape::whole(), slot as u64).unwrap();
    };
    for slot in 0..DEPTH {
        submit(queue, slot);
    }
    queue.kick().unwrap();
    while !stop.load(Ordering::Relaxed) {
        for done in queue.wait_at_most(Duration::from_millis(100)).unwrap() {
            if done.result.is_err() {
                return;
            }
            written.fetch_add(PIECE as u64, Ordering::Relaxed);
            if !stop.load(Ordering::Relaxed) {
                submit(queue, usize::try_from(done.token).unwrap());
            }
        }
        queue.kick().unwrap();
    }
}

/// The setting is the whole machine's, so it is short only while it matters: when the daemon reads
/// it and when a break begins.
fn short_break_time() -> Sysctl {
    Sysctl::set("/proc/sys/fs/lease-break-time", &BREAK.as_secs().to_string()).unwrap()
}

/// Opens the image, which waits for its lease, truncates it, and gives the freed blocks to another
/// file; how long the opener waited. The truncation waits as well, for what the guest writes through
/// the file by then, like on any file.
fn truncate_and_fill(image: &Path, canary: &Path, bytes: &[u8]) -> Duration {
    let short = short_break_time();
    let start = Instant::now();
    let opened = File::options().write(true).open(image).unwrap();
    let waited = start.elapsed();
    drop(short);
    opened.set_len(0).unwrap();
    drop(opened);
    fs::write(canary, bytes).unwrap();
    File::open(canary).unwrap().sync_all().unwrap();
    waited
}

/// The opener has to be let in because raw I/O has ended, not because its time is up.
fn opener_on_a_throttled_device(kind: Kind) {
    let Some(rig) = Rig::alone() else { return };
    let Some(controller) = Throttle::controller() else { return };
    let setup = Setup { kind, disk: 448 * MIB, size: 96 * MIB, ..Setup::default() };
    let short = short_break_time();
    let mut bed = Bed::make(&rig, PROGRAM, &setup, &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    drop(short);
    // At least a third of what the image gives up has to go to the canary.
    let filler = File::create(bed.fs.path().join("filler")).unwrap();
    let size = free(bed.fs.path()) - 32 * MIB;
    rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, size).unwrap();
    drop(filler);
    let throttle = Throttle::new(&controller, bed.fs.disk(), bed.daemon.pid()).unwrap();
    let options = ClientOptions {
        max_request: PIECE,
        depth: DEPTH,
        limit: LONG,
        ..ClientOptions::queues(QUEUES)
    };
    let mut client = Client::connect(bed.daemon.socket(), &options).unwrap();
    let (written, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let (canary, bytes) = (bed.fs.path().join("canary"), vec![0xcc; 64 << 20]);
    let waited = thread::scope(|scope| {
        for (number, queue) in client.queues().iter_mut().enumerate() {
            let (written, stop) = (&written, &stop);
            scope.spawn(move || load(queue, number, written, stop));
        }
        let _ending = Stop(&stop);
        let stable = || (written.load(Ordering::Relaxed) >= WARM_UP).then_some(());
        until("a stable rate", LONG, stable).unwrap();
        truncate_and_fill(&bed.image, &canary, &bytes)
    });
    throttle.limit(0).unwrap();
    for queue in client.queues() {
        // Each is answered, well or not.
        queue.drain().unwrap();
    }
    drop(client);
    let forced = bed.daemon.status().unwrap().number("forced_breaks");
    assert!(bed.daemon.sigterm().unwrap().success(), "{}", bed.daemon.log());
    drop(throttle);
    let log = bed.daemon.log();
    drop(bed.daemon);
    let foreign = overwritten(&canary, &bytes);
    let fsck = bed.fs.check();
    assert!(
        foreign == 0 && fsck.is_ok() && forced == 0 && waited < BREAK * 3 / 4,
        "the opener waited {waited:?} of {BREAK:?}, forced: {forced}; then {foreign} blocks of another file were \
         overwritten; fsck: {fsck:?}; log: {log}"
    );
}

/// How many blocks of the file at `path` are not `bytes` on the disk.
fn overwritten(path: &Path, bytes: &[u8]) -> usize {
    let file = File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let read = fs::read(path).unwrap();
    assert_eq!(read.len(), bytes.len());
    read.chunks(4096).zip(bytes.chunks(4096)).filter(|(now, then)| now != then).count()
}

/// Bytes that a file may still take.
fn free(path: &Path) -> u64 {
    let stat = rustix::fs::statvfs(path).unwrap();
    stat.f_bavail * stat.f_frsize
}

#[test]
fn serial_an_opener_need_not_wait_for_a_throttled_device_on_ext4() {
    opener_on_a_throttled_device(Kind::Ext4);
}

#[test]
fn serial_an_opener_need_not_wait_for_a_throttled_device_on_xfs() {
    opener_on_a_throttled_device(Kind::XfsReflink);
}
