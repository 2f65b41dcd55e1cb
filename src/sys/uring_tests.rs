// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};

use super::setup::TaskRun;
use super::*;
use crate::engine::Tag;
use crate::engine::io::{BounceSlot, Target};
use crate::engine::units::DeviceOffset;
use crate::sys::buffer::Memory;

const BLOCK: u32 = 4096;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
const IMAGE_BYTES: u64 = 1 << 20;
const RAM: u64 = 0x1000_0000;
const RAM_BYTES: usize = 8 << 20;

const GEOMETRY: Geometry = Geometry {
    file_size: IMAGE_BYTES,
    fs_block: BLOCK,
    file_align: BLOCK,
    dev_block: 512,
    write_block: 512,
    mem_align: 512,
    bounce_bytes: 64 << 10,
    bounce_slots: 8,
    ops: 128,
    zeroes_bytes: 4 << 20,
    punch_bytes: 256 << 20,
    lease_fresh: Some(Duration::from_secs(11)),
    raw: crate::engine::RawLimits {
        bytes: 32 << 20,
        start: 1 << 20,
        least: 128 << 10,
        operation: 1 << 20,
    },
};

/// An image in a directory of its own; nobody else has it open.
struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Image {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    fn at(dir: tempfile::TempDir) -> Self {
        let path = dir.path().join("image");
        let file = File::create(&path).unwrap();
        // Written, so that reads of it are real ones.
        file.write_all_at(&vec![0xee; IMAGE_BYTES as usize], 0).unwrap();
        file.sync_all().unwrap();
        Self { _dir: dir, path }
    }

    fn open(&self, write: bool) -> File {
        let flags = libc::O_DIRECT | libc::O_NONBLOCK;
        self.try_open(write, flags).unwrap()
    }

    fn try_open(&self, write: bool, flags: i32) -> io::Result<File> {
        OpenOptions::new().read(true).write(write).custom_flags(flags).open(&self.path)
    }
}

fn ram() -> Arc<Memory> {
    Arc::new(Memory::from_ranges(&[(GuestAddress(RAM), RAM_BYTES)]).unwrap())
}

fn ring(file: &File) -> Ring {
    Ring::new(file.as_fd(), None, &GEOMETRY, None, 0).unwrap()
}

fn guest(tag: u32, at: u64, len: u32) -> Buf {
    Buf::Guest { tag: Tag(tag), at, len }
}

fn bounce(slot: u32, at: u32, len: u32) -> Buf {
    Buf::Bounce { slot: BounceSlot(slot), at, len }
}

fn set(ring: &mut Ring, tag: u32, memory: &Arc<Memory>, pieces: &[(u64, u32)]) {
    let pieces: Vec<_> = pieces.iter().map(|&(at, len)| (GuestAddress(RAM + at), len)).collect();
    ring.guests().set(Tag(tag), memory, &pieces, GEOMETRY.mem_align).unwrap();
}

/// Waits and reaps until nothing is in flight.
fn finish(ring: &mut Ring) -> Vec<Completion> {
    let mut done = Vec::new();
    let start = Instant::now();
    loop {
        while let Some(completion) = ring.reap() {
            done.push(completion);
        }
        if ring.in_flight() == 0 {
            return done;
        }
        assert!(start.elapsed() < PATIENCE, "{} in flight", ring.in_flight());
        let _ = ring.wait(Sleep::Any);
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn signal(event: &OwnedFd) {
    rustix::io::write(event, &1_u64.to_ne_bytes()).unwrap();
}

/// Whether the ring says, soon, that the descriptor at `place` was signalled.
fn hears(ring: &mut Ring, place: usize) -> bool {
    // So that not hearing anything ends as well.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(50) {
        ring.arm_watches();
        ring.submit_queued();
        assert_eq!(ring.reap(), None);
        if ring.heard_at(place) {
            return true;
        }
    }
    false
}

/// The result of one operation on its own.
fn run(ring: &mut Ring, op: Op) -> i32 {
    // Raw operations follow a look at the clock.
    ring.now();
    match ring.submit(OpId(7), op) {
        Poll::Ready(result) => result,
        Poll::Pending => {
            let done = finish(ring);
            assert_eq!(done.len(), 1);
            assert_eq!(done[0].id, OpId(7));
            done[0].result
        }
    }
}

fn fill(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn data_go_out_and_come_back() {
    let image = Image::new();
    let file = image.open(true);
    let (mut ring, memory) = (ring(&file), ram());
    let data = fill(1, 16384);
    memory.write_slice(&data, GuestAddress(RAM)).unwrap();
    set(&mut ring, 0, &memory, &[(0, 16384)]);
    set(&mut ring, 1, &memory, &[(65536, 16384)]);
    assert_eq!(run(&mut ring, Op::Write(Target::Image(8192), guest(0, 0, 16384))), 16384);
    let mut on_disk = vec![0; 16384];
    File::open(&image.path).unwrap().read_exact_at(&mut on_disk, 8192).unwrap();
    assert_eq!(on_disk, data);
    assert_eq!(run(&mut ring, Op::Read(Target::Image(8192), guest(1, 0, 16384))), 16384);
    let mut back = vec![0; 16384];
    memory.read_slice(&mut back, GuestAddress(RAM + 65536)).unwrap();
    assert_eq!(back, data);
}

#[test]
fn split_buffers_use_lists() {
    split_buffers(false);
    split_buffers(true);
}

fn split_buffers(pinned: bool) {
    let image = Image::new();
    let file = image.open(true);
    let (mut ring, memory) = (ring(&file), ram());
    if pinned {
        ring.pin(&memory).unwrap();
    }
    let data = fill(2, 12288);
    for (piece, at) in data.chunks(1024).zip([11, 3, 7, 1, 9, 5, 0, 2, 4, 6, 8, 10]) {
        memory.write_slice(piece, GuestAddress(RAM + at * 4096)).unwrap();
    }
    let pieces: Vec<_> = [11, 3, 7, 1, 9, 5, 0, 2, 4, 6, 8, 10].map(|at| (at * 4096, 1024)).into();
    set(&mut ring, 5, &memory, &pieces);
    assert_eq!(run(&mut ring, Op::Write(Target::Image(0), guest(5, 0, 12288))), 12288);
    // From the middle of one piece to the middle of another.
    assert_eq!(run(&mut ring, Op::Write(Target::Image(65536), guest(5, 1536, 8192))), 8192);
    let file = File::open(&image.path).unwrap();
    let mut on_disk = vec![0; 12288];
    file.read_exact_at(&mut on_disk, 0).unwrap();
    assert_eq!(on_disk, data);
    file.read_exact_at(&mut on_disk[..8192], 65536).unwrap();
    assert_eq!(on_disk[..8192], data[1536..1536 + 8192]);
    // And back, into another order of other pieces.
    set(&mut ring, 6, &memory, &[(1 << 20, 512), (3 << 20, 8192), (2 << 20, 3584)]);
    assert_eq!(run(&mut ring, Op::Read(Target::Image(0), guest(6, 0, 12288))), 12288);
    let mut back = vec![0; 12288];
    for (at, part) in [(1, 0..512), (3, 512..8704), (2, 8704..12288)] {
        memory.read_slice(&mut back[part], GuestAddress(RAM + (at << 20))).unwrap();
    }
    assert_eq!(back, data);
    let room: Vec<_> = ring.slots.iter().map(|slot| slot.iovecs.capacity()).collect();
    assert!(room.iter().all(|room| *room <= KEEP_IOVECS));
}

#[test]
fn more_pieces_than_the_kernel_takes_are_a_short_transfer() {
    more_pieces(false);
    more_pieces(true);
}

fn more_pieces(pinned: bool) {
    let image = Image::new();
    let file = image.open(true);
    let (mut ring, memory) = (ring(&file), ram());
    if pinned {
        ring.pin(&memory).unwrap();
    }
    let pieces: Vec<_> = (0..1100).map(|i| (i * 1024, 512)).collect();
    set(&mut ring, 0, &memory, &pieces);
    let all = 1100 * 512;
    let mut op = Op::Write(Target::Image(0), guest(0, 0, all));
    let first = run(&mut ring, op);
    assert_eq!(first, 1024 * 512);
    op = Op::Write(Target::Image(1024 * 512), guest(0, 1024 * 512, all - 1024 * 512));
    // 38 KiB, not a multiple of the block: fine for the device's alignment.
    assert_eq!(run(&mut ring, op), 76 * 512);
    assert!(ring.slots.iter().all(|slot| slot.iovecs.capacity() <= KEEP_IOVECS));
}

#[test]
fn bounce_buffers_carry_data() {
    let image = Image::new();
    let file = image.open(true);
    let (mut ring, memory) = (ring(&file), ram());
    let data = fill(3, 4096);
    memory.write_slice(&data, GuestAddress(RAM + 3)).unwrap();
    set(&mut ring, 0, &memory, &[(3, 4096)]);
    assert_eq!(run(&mut ring, Op::Copy { from: guest(0, 0, 4096), to: bounce(7, 4096, 4096) }), 0);
    assert_eq!(run(&mut ring, Op::Write(Target::Image(4096), bounce(7, 4096, 4096))), 4096);
    assert_eq!(run(&mut ring, Op::Zero(guest(0, 0, 4096))), 0);
    assert_eq!(run(&mut ring, Op::Read(Target::Image(4096), bounce(0, 0, 4096))), 4096);
    assert_eq!(run(&mut ring, Op::Copy { from: bounce(0, 0, 4096), to: guest(0, 0, 4096) }), 0);
    let mut back = vec![0; 4096];
    memory.read_slice(&mut back, GuestAddress(RAM + 3)).unwrap();
    assert_eq!(back, data);
}

#[test]
fn short_and_failed_operations_say_so() {
    let image = Image::new();
    let (file, read_only) = (image.open(true), image.open(false));
    let (mut ring, memory) = (ring(&file), ram());
    set(&mut ring, 0, &memory, &[(0, 16384)]);
    let end = IMAGE_BYTES - 4096;
    assert_eq!(run(&mut ring, Op::Read(Target::Image(end), guest(0, 0, 16384))), 4096);
    assert_eq!(run(&mut ring, Op::Read(Target::Image(IMAGE_BYTES), guest(0, 0, 4096))), 0);
    assert_eq!(run(&mut ring, Op::Read(Target::Image(1), guest(0, 0, 512))), -libc::EINVAL);
    assert_eq!(run(&mut ring, Op::Read(Target::Image(0), guest(0, 0, 0))), 0);
    assert_eq!(run(&mut ring, Op::SyncImage), 0);
    let mut ring = super::tests::ring(&read_only);
    set(&mut ring, 0, &memory, &[(0, 16384)]);
    assert_eq!(run(&mut ring, Op::Write(Target::Image(0), guest(0, 0, 4096))), -libc::EBADF);
    assert_eq!(run(&mut ring, Op::Read(Target::Image(0), guest(0, 0, 4096))), 4096);
}

#[test]
fn invalid_operations_end_at_once() {
    let image = Image::new();
    let file = image.open(true);
    let (mut ring, memory) = (ring(&file), ram());
    set(&mut ring, 0, &memory, &[(0, 4096)]);
    let good = guest(0, 0, 4096);
    let on_device = Target::Device(DeviceOffset(0));
    for op in [
        Op::Read(Target::Image(0), guest(1, 0, 512)),
        Op::Read(Target::Image(0), guest(u32::MAX, 0, 512)),
        Op::Write(Target::Image(0), guest(0, 1, 4096)),
        Op::Write(Target::Image(0), guest(0, u64::MAX, 1)),
        Op::Write(Target::Image(0), bounce(8, 0, 512)),
        Op::Write(Target::Image(0), bounce(0, 1, 64 << 10)),
        Op::Read(on_device, good),
        Op::SyncDevice(DeviceOffset(0), 4096),
        // To io_uring this offset is "where the file position is".
        Op::Read(Target::Image(u64::MAX), good),
        Op::Read(Target::Image(u64::MAX - 4096), good),
        Op::Write(Target::Image(i64::MAX as u64), good),
        Op::Zero(guest(0, 0, 4097)),
        Op::Copy { from: good, to: bounce(0, 0, 4095) },
    ] {
        assert_eq!(ring.submit(OpId(0), op), Poll::Ready(-libc::EINVAL), "{op:?}");
    }
    for id in [GEOMETRY.ops, u32::MAX] {
        let op = Op::Read(Target::Image(0), good);
        assert_eq!(ring.submit(OpId(id), op), Poll::Ready(-libc::EINVAL));
    }
    assert_eq!(ring.submit(OpId(3), Op::SyncImage), Poll::Pending);
    assert_eq!(ring.submit(OpId(3), Op::SyncImage), Poll::Ready(-libc::EINVAL));
    assert_eq!(ring.in_flight(), 1);
    assert_eq!(finish(&mut ring), [Completion { id: OpId(3), result: 0 }]);
    ring.guests().clear(Tag(0));
    assert_eq!(run(&mut ring, Op::Read(Target::Image(0), good)), -libc::EINVAL);
}

#[test]
fn impossible_geometries_are_refused() {
    let image = Image::new();
    let file = image.open(true);
    for ops in [0, 32769, u32::MAX] {
        let geometry = Geometry { ops, ..GEOMETRY };
        assert!(Ring::new(file.as_fd(), None, &geometry, None, 0).is_err());
    }
    for ops in [1, 3, 32768] {
        let geometry = Geometry { ops, ..GEOMETRY };
        let mut ring = Ring::new(file.as_fd(), None, &geometry, None, 0).unwrap();
        assert_eq!(ring.submit(OpId(ops - 1), Op::SyncImage), Poll::Pending);
        assert_eq!(finish(&mut ring).len(), 1);
    }
}

/// What older kernels make of it.
#[test]
fn every_way_of_completion_works() {
    let image = Image::new();
    let file = image.open(true);

    for way in TaskRun::ALL {
        let mut ring = Ring::with(file.as_fd(), None, &GEOMETRY, None, 0, &[way]).unwrap();
        let memory = ram();
        set(&mut ring, 0, &memory, &[(0, 128 * 4096)]);
        for _ in 0..10 {
            for id in 0..128 {
                let at = u64::from(id) * 4096;
                let op = Op::Write(Target::Image(at), guest(0, at, 4096));
                assert_eq!(ring.submit(OpId(id), op), Poll::Pending);
            }
            assert_eq!(finish(&mut ring).len(), 128);
            assert_eq!(run(&mut ring, Op::SyncImage), 0);
        }
    }
    assert!(Ring::with(file.as_fd(), None, &GEOMETRY, None, 0, &[]).is_err());
}

/// With DEFER_TASKRUN one enter posts some 20 completions and keeps the others back.
#[test]
fn no_completion_is_forgotten_in_a_large_batch() {
    let image = Image::new();
    let file = image.open(true);
    let (mut ring, memory) = (ring(&file), ram());
    set(&mut ring, 0, &memory, &[(0, 128 * 4096)]);
    for _ in 0..20 {
        for id in 0..128 {
            let at = u64::from(id) * 4096;
            let op = Op::Read(Target::Image(at), guest(0, at, 4096));
            assert_eq!(ring.submit(OpId(id), op), Poll::Pending);
        }
        ring.enter().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let mut ids: Vec<_> = finish(&mut ring).iter().map(|done| done.id.0).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..128));
    }
}

#[test]
fn the_thread_sleeps_until_something_completes() {
    let image = Image::new();
    let file = image.open(true);
    let (mut ring, memory) = (ring(&file), ram());
    set(&mut ring, 0, &memory, &[(0, 16 * 4096)]);
    let (mut started, mut done) = (0_u64, 0);
    while done < 3000 {
        while started < 3000 && ring.in_flight() < 1 + (started / 500) as u32 {
            let id = (0..16).find(|id| !ring.slots[*id].taken).unwrap();
            let at = id as u64 * 4096;
            let op = Op::Read(Target::Image(at), guest(0, at, 4096));
            assert_eq!(ring.submit(OpId(id as u32), op), Poll::Pending);
            started += 1;
        }
        ring.wait(Sleep::Several).unwrap();
        while let Some(completion) = ring.reap() {
            assert_eq!(completion.result, 4096);
            done += 1;
        }
    }
}

/// No signal is lost at any distance from the sleep before it.
#[test]
fn watched_descriptors_end_the_sleep() {
    const POSTS: u64 = 20_000;
    let image = Image::new();
    let file = image.open(true);
    let mut ring = Ring::new(file.as_fd(), None, &GEOMETRY, None, 2).unwrap();
    let bell = event();
    ring.watch(1, Some(bell.as_raw_fd()), Hear::Each).unwrap();
    let posted = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&posted);
    let poster = std::thread::spawn(move || {
        for number in 0..POSTS {
            count.fetch_add(1, Ordering::SeqCst);
            signal(&bell);
            (0..number % 211).for_each(|_| std::hint::spin_loop());
        }
        bell
    });
    // It ends only because the last post is heard.
    while posted.load(Ordering::SeqCst) < POSTS {
        ring.wait(Sleep::Several).unwrap();
        assert_eq!(ring.reap(), None);
    }
    poster.join().unwrap();
}

/// Many reads in flight, of a pipe: two completions are slept for then, but a doorbell alone ends the sleep, and so does one
/// of them. If it does not, this hangs.
#[test]
fn with_many_in_flight_one_completion_is_enough_after_a_while() {
    let memory = ram();
    let (reader, mut writer) = io::pipe().unwrap();
    let mut ring = Ring::new(reader.as_fd(), None, &GEOMETRY, None, 1).unwrap();
    let bell = event();
    ring.watch(0, Some(bell.as_raw_fd()), Hear::Each).unwrap();
    let read = |ring: &mut Ring, id: u32| {
        set(ring, id, &memory, &[(4096 * u64::from(id), 4096)]);
        let op = Op::Read(Target::Image(0), guest(id, 0, 4096));
        assert_eq!(ring.submit(OpId(id), op), Poll::Pending);
        ring.enter().unwrap();
    };
    (0..62).for_each(|id| read(&mut ring, id));
    assert_eq!(ring.gathered(), 1);
    (62..64).for_each(|id| read(&mut ring, id));
    assert!(ring.gathered() == 2 || !ring.uring.0.params().is_feature_min_timeout());

    for _ in 0..3 {
        signal(&bell);
        while !ring.heard_at(0) {
            ring.wait(Sleep::Several).unwrap();
            assert_eq!(ring.reap(), None);
        }
    }
    writer.write_all(&[7; 10]).unwrap();
    let done = loop {
        ring.wait(Sleep::Several).unwrap();
        if let Some(done) = ring.reap() {
            break done;
        }
    };
    assert_eq!(done.result, 10);
    writer.write_all(&[7; 63]).unwrap();
    drop(writer);
    finish(&mut ring);
}

#[test]
fn a_watched_descriptor_is_heard_at_each_signal_and_never_read() {
    let image = Image::new();
    let file = image.open(true);
    let mut ring = Ring::new(file.as_fd(), None, &GEOMETRY, None, 3).unwrap();
    let (bell, other) = (event(), event());
    signal(&bell);
    ring.watch(2, Some(bell.as_raw_fd()), Hear::Each).unwrap();
    assert!(hears(&mut ring, 2), "signalled before it was watched");
    assert!(!hears(&mut ring, 2));
    signal(&bell);
    signal(&bell);
    assert!(hears(&mut ring, 2));
    assert!(!hears(&mut ring, 0) && !hears(&mut ring, 1));
    let mut count = [0; 8];
    rustix::io::read(&bell, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 3);
    // Another one in its place, then none.
    ring.watch(2, Some(other.as_raw_fd()), Hear::Each).unwrap();
    signal(&bell);
    assert!(!hears(&mut ring, 2));
    signal(&other);
    assert!(hears(&mut ring, 2));
    ring.watch(2, None, Hear::Each).unwrap();
    signal(&other);
    assert!(!hears(&mut ring, 2));
    assert_eq!(ring.polls, 0);
    assert_eq!(ring.watch(3, None, Hear::Each).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    ring.watch(2, Some(i32::MAX), Hear::Each).unwrap_err();
    assert!(!hears(&mut ring, 2));
}

#[test]
fn a_level_is_heard_until_it_is_gone() {
    let image = Image::new();
    let file = image.open(true);
    let mut ring = Ring::new(file.as_fd(), None, &GEOMETRY, None, 1).unwrap();
    let bell = event();
    ring.watch(0, Some(bell.as_raw_fd()), Hear::Level).unwrap();
    assert!(!hears(&mut ring, 0));
    signal(&bell);
    assert!(hears(&mut ring, 0) && hears(&mut ring, 0));
    rustix::io::read(&bell, &mut [0; 8]).unwrap();
    let _ = hears(&mut ring, 0);
    assert!(!hears(&mut ring, 0));
}

/// Kernels that wait for a file's last poll before they let go of the files must not wait for ever.
#[test]
fn dropping_takes_the_watches_back() {
    let image = Image::new();
    let file = image.open(true);
    let mut ring = Ring::new(file.as_fd(), None, &GEOMETRY, None, 8).unwrap();
    let bell = event();
    for place in 0..8 {
        ring.watch(place, Some(bell.as_raw_fd()), Hear::Each).unwrap();
    }
    ring.arm_watches();
    ring.submit_queued();
    assert_eq!(ring.polls, 8);
    assert!(ring.disarm_all());
    assert_eq!(ring.polls, 0);
}

#[test]
fn a_batch_larger_than_the_submission_queue_is_carried_out() {
    let image = Image::new();
    let file = image.open(true);
    let geometry = Geometry { ops: 6000, ..GEOMETRY };
    let mut ring = Ring::new(file.as_fd(), None, &geometry, None, 0).unwrap();
    let memory = ram();
    set(&mut ring, 0, &memory, &[(0, 512)]);
    for id in 0..6000 {
        let op = Op::Read(Target::Image(0), guest(0, 0, 512));
        assert_eq!(ring.submit(OpId(id), op), Poll::Pending);
    }
    assert_eq!(ring.in_flight(), 6000);
    let done = finish(&mut ring);
    assert_eq!(done.len(), 6000);
    assert!(done.iter().all(|done| done.result == 512));
}

#[test]
fn nothing_but_reads_writes_and_syncs_of_fixed_files_is_possible() {
    let image = Image::new();
    let file = image.open(true);
    let mut ring = ring(&file);
    let plain = io_uring::types::Fd(file.as_raw_fd());
    for entry in [
        io_uring::opcode::Nop::new().build(),
        io_uring::opcode::Fsync::new(plain).build(),
        io_uring::opcode::Close::new(io_uring::types::Fixed(0)).build(),
    ] {
        ring.slots[0].taken = true;
        ring.queued.push_back(Queued::Op(OpId(0)));
        // SAFETY: the entry points to no memory.
        unsafe { ring.uring.0.submission().push(&entry.user_data(0)) }.unwrap();
        assert_eq!(finish(&mut ring), [Completion { id: OpId(0), result: -libc::EACCES }]);
    }
    assert!(ring.uring.0.submitter().register_eventfd(file.as_raw_fd()).is_err());
    assert_eq!(run(&mut ring, Op::SyncImage), 0);
}

#[test]
fn on_another_thread_operations_fail_and_nothing_is_lost() {
    let image = Image::new();
    let file = image.open(true);
    let mut ring = ring(&file);
    assert_eq!(ring.submit(OpId(0), Op::SyncImage), Poll::Pending);
    std::thread::spawn(move || {
        assert_eq!(ring.enter().unwrap_err().raw_os_error(), Some(libc::EEXIST));
        assert!(ring.enter().is_ok(), "told once");
        assert_eq!(ring.reap(), Some(Completion { id: OpId(0), result: -libc::EEXIST }));
        assert_eq!(ring.reap(), None);
        assert_eq!(ring.in_flight(), 0);
        assert_eq!(ring.submit(OpId(0), Op::SyncImage), Poll::Ready(-libc::EEXIST));
    })
    .join()
    .unwrap();
}

#[test]
fn dropping_waits_for_what_is_in_flight() {
    let image = Image::new();
    let file = image.open(true);
    let memory = ram();
    let data = fill(9, 128 * 4096);
    memory.write_slice(&data, GuestAddress(RAM)).unwrap();
    let mut ring = ring(&file);
    set(&mut ring, 0, &memory, &[(0, 128 * 4096)]);
    for id in 0..127 {
        let at = u64::from(id) * 4096;
        let op = Op::Write(Target::Image(at), guest(0, at, 4096));
        assert_eq!(ring.submit(OpId(id), op), Poll::Pending);
    }
    ring.enter().unwrap();
    // Never entered, so never written.
    let last = Op::Write(Target::Image(127 * 4096), guest(0, 127 * 4096, 4096));
    assert_eq!(ring.submit(OpId(127), last), Poll::Pending);
    assert_eq!(Arc::strong_count(&memory), 2);
    drop(ring);
    assert_eq!(Arc::strong_count(&memory), 1);
    let mut on_disk = vec![0; 128 * 4096];
    file.read_exact_at(&mut on_disk[..0], 0).unwrap();
    File::open(&image.path).unwrap().read_exact_at(&mut on_disk, 0).unwrap();
    assert!(on_disk[..127 * 4096] == data[..127 * 4096]);
    assert!(on_disk[127 * 4096..].iter().all(|byte| *byte == 0xee));
}

/// A pipe as image: a read of it takes until somebody writes.
fn endless_read(memory: &Arc<Memory>) -> (Ring, io::PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    let mut ring = Ring::new(reader.as_fd(), None, &GEOMETRY, None, 0).unwrap();
    set(&mut ring, 0, memory, &[(0, 4096)]);
    let op = Op::Read(Target::Image(0), guest(0, 0, 4096));
    assert_eq!(ring.submit(OpId(0), op), Poll::Pending);
    ring.enter().unwrap();
    (ring, writer)
}

#[test]
fn dropping_waits_as_long_as_it_takes() {
    let memory = ram();
    let (ring, mut writer) = endless_read(&memory);
    let written = Arc::new(AtomicBool::new(false));
    let late = std::thread::spawn({
        let written = Arc::clone(&written);
        move || {
            std::thread::sleep(Duration::from_millis(300));
            written.store(true, Ordering::SeqCst);
            writer.write_all(&[7; 10]).unwrap();
        }
    });
    drop(ring);
    assert!(written.load(Ordering::SeqCst), "it did not wait");
    late.join().unwrap();
    let mut data = [0; 11];
    memory.read_slice(&mut data, GuestAddress(RAM)).unwrap();
    assert_eq!(data, [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn where_dropping_cannot_wait_the_memory_is_left_to_the_kernel() {
    let memory = ram();
    let (ring, writer) = endless_read(&memory);
    std::thread::spawn(move || drop(ring)).join().unwrap();
    assert_eq!(Arc::strong_count(&memory), 2);
    drop(writer);
}

fn set_lease(file: &File, kind: i32) {
    /// F_SETSIG, which libc does not have for every target.
    const F_SETSIG: i32 = 10;
    // A break would send SIGIO, which kills the process; SIGURG is ignored.
    // SAFETY: plain integers, and a descriptor that `file` owns.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) }, 0);
}

#[test]
fn the_lease_is_confirmed_only_while_held() {
    let image = Image::new();
    let (read, write) = (lease::Kind::Read, lease::Kind::Write);
    // The kind that was taken, not the one that the access mode suggests: a reader may hold either.
    let taken = [(true, write, libc::F_WRLCK), (false, write, libc::F_WRLCK)];
    for (writable, wanted, kind) in taken.into_iter().chain([(false, read, libc::F_RDLCK)]) {
        let file = image.open(writable);
        let mut ring = Ring::new(file.as_fd(), None, &GEOMETRY, Some(wanted), 0).unwrap();
        assert_eq!(run(&mut ring, Op::ConfirmLease), 0, "none taken");
        set_lease(&file, kind);
        assert_eq!(run(&mut ring, Op::ConfirmLease), 1);
        let refused = image.try_open(true, libc::O_NONBLOCK).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(run(&mut ring, Op::ConfirmLease), 0, "being broken");
        set_lease(&file, libc::F_UNLCK);
        assert_eq!(run(&mut ring, Op::ConfirmLease), 0, "given up");
    }
    let file = image.open(false);
    set_lease(&file, libc::F_RDLCK);
    let mut ring = Ring::new(file.as_fd(), None, &GEOMETRY, Some(write), 0).unwrap();
    assert_eq!(run(&mut ring, Op::ConfirmLease), 0, "one that readers share is not enough");
    drop((ring, file));
    let file = image.open(true);
    set_lease(&file, libc::F_WRLCK);
    let mut ring = self::ring(&file);
    assert_eq!(run(&mut ring, Op::ConfirmLease), 0, "not asked for");
}

#[test]
fn pages_of_the_image_are_counted_without_an_operation_in_flight() {
    // Not where a memory filesystem may be, which drops nothing.
    let image = Image::at(tempfile::tempdir_in("/var/tmp").unwrap());
    let file = image.open(true);
    let mut ring = ring(&file);
    let all = FileRange::new(0, IMAGE_BYTES);
    match run(&mut ring, Op::CachedPages(all)) {
        error if error == -libc::ENOSYS => return println!("skipped: no cachestat(2) here"),
        pages => assert!(pages > 0, "{pages}"),
    }
    page_cache::drop_clean(file.as_fd(), FileRange::ALL).unwrap();
    assert_eq!(run(&mut ring, Op::CachedPages(all)), 0);
    let buffered = OpenOptions::new().write(true).open(&image.path).unwrap();
    buffered.write_all_at(&[1; 100], 8192).unwrap();
    assert_eq!(run(&mut ring, Op::CachedPages(FileRange::new(8192, 8704))), 1);
    assert_eq!(run(&mut ring, Op::CachedPages(FileRange::new(0, 4096))), 0);
    assert_eq!(ring.in_flight(), 0);
}

/// R1a: the ring holds the description that carries lease and lock, whoever else closes it.
#[test]
fn the_ring_is_the_fence() {
    let image = Image::new();
    let file = image.open(true);
    set_lease(&file, libc::F_WRLCK);
    let ring = Ring::new(file.as_fd(), None, &GEOMETRY, Some(lease::Kind::Write), 0).unwrap();
    drop(file);
    let refused = image.try_open(false, libc::O_NONBLOCK).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    drop(ring);
    // At once, not some time after the ring is closed.
    image.try_open(false, libc::O_NONBLOCK).unwrap();
}

/// R1a: so it is with the locks, of both kinds.
#[test]
fn locks_live_as_long_as_the_ring() {
    use rustix::fs::{FlockOperation, flock};

    use crate::sys::ofd_lock::{Bytes, Kind, try_lock};
    let image = Image::new();
    let file = image.open(true);
    let all = Bytes { start: 0, len: 0 };
    assert!(try_lock(file.as_fd(), Kind::Exclusive, all).unwrap());
    flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    let ring = Ring::new(file.as_fd(), None, &GEOMETRY, None, 0).unwrap();
    drop(file);
    let other = image.open(true);
    let shared = || flock(&other, FlockOperation::NonBlockingLockShared);
    assert_eq!(shared().unwrap_err(), rustix::io::Errno::WOULDBLOCK);
    assert!(!try_lock(other.as_fd(), Kind::Shared, all).unwrap());
    drop(ring);
    shared().unwrap();
    assert!(try_lock(other.as_fd(), Kind::Shared, all).unwrap());
}

/// A loop device over the image that goes away when the last one closes it, also if we are killed.
fn loop_device(image: &Image) -> Option<File> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let path = image.path.to_str().unwrap();
    let args = ["--find", "--show", "--direct-io=on", path];
    let made = std::process::Command::new("losetup").args(args).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let node = String::from_utf8(made.stdout).unwrap();
    let node = node.trim();
    let flags = libc::O_DIRECT | libc::O_EXCL;
    let device = OpenOptions::new().read(true).write(true).custom_flags(flags).open(node);
    // Detaching a device in use makes it autoclear.
    let detached = std::process::Command::new("losetup").args(["--detach", node]).status().unwrap();
    assert!(detached.success());
    Some(device.unwrap())
}

/// A ring with a device, what the device is made of, and the device; `None` without root.
fn ring_on_device(geometry: &Geometry) -> Option<(Ring, Image, OwnedFd)> {
    let image = Image::new();
    let Some(device) = loop_device(&image) else {
        eprintln!("skipped: not root");
        return None;
    };
    let device = OwnedFd::from(device);
    let file = Image::new().open(true);
    let ring = Ring::new(file.as_fd(), Some(device.as_fd()), geometry, None, 0).unwrap();
    Some((ring, image, device))
}

#[test]
fn the_device_is_written_read_and_flushed_in_ranges() {
    let Some((mut ring, image, device)) = ring_on_device(&GEOMETRY) else { return };
    let memory = ram();
    let data = fill(4, 8192);
    memory.write_slice(&data, GuestAddress(RAM)).unwrap();
    set(&mut ring, 0, &memory, &[(0, 8192)]);
    let at = Target::Device(DeviceOffset(512 * 9));
    assert_eq!(run(&mut ring, Op::Write(at, guest(0, 0, 8192))), 8192);
    assert_eq!(run(&mut ring, Op::Zero(guest(0, 0, 8192))), 0);
    assert_eq!(run(&mut ring, Op::Read(at, guest(0, 0, 8192))), 8192);
    let mut back = vec![0; 8192];
    memory.read_slice(&mut back, GuestAddress(RAM)).unwrap();
    assert_eq!(back, data);
    for (at, len) in [(0, 1), (0, 2), (0, 4096), (512, 1), (4096, 4096), (1 << 40, u32::MAX)] {
        assert_eq!(run(&mut ring, Op::SyncDevice(DeviceOffset(at), len)), 0, "{at} {len}");
    }
    for (at, len) in [(0, 0), (4096, 0), (u64::MAX, 1), (i64::MAX as u64, 1)] {
        let op = Op::SyncDevice(DeviceOffset(at), len);
        assert_eq!(ring.submit(OpId(0), op), Poll::Ready(-libc::EINVAL), "{at} {len}");
    }
    drop(ring);
    drop(device);
    let mut on_disk = vec![0; 8192];
    File::open(&image.path).unwrap().read_exact_at(&mut on_disk, 512 * 9).unwrap();
    assert_eq!(on_disk, data);
}

/// Zeros in place of guest memory that is gone do not reach the image, whichever thread they were put there for.
#[test]
fn nothing_is_written_any_more_once_guest_memory_is_lost() {
    let Some((mut ring, image, _device)) = ring_on_device(&GEOMETRY) else { return };
    let file = rustix::fs::memfd_create("guest-ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 65536).unwrap();
    let range = (GuestAddress(RAM), 65536, Some(vm_memory::FileOffset::new(file.into(), 0)));
    let memory = Arc::new(Memory::from_ranges_with_files([range]).unwrap());
    let regions = Arc::new(GuestRegions::new().unwrap());
    regions.add(&memory).unwrap();
    ring.guard(&regions);
    set(&mut ring, 0, &memory, &[(0, 8192)]);
    set(&mut ring, 1, &memory, &[(16384, 8192)]);
    memory.write_slice(&fill(4, 8192), GuestAddress(RAM)).unwrap();
    let at = Target::Device(DeviceOffset(4096));
    ring.now();
    assert_eq!(run(&mut ring, Op::Copy { from: guest(0, 0, 4096), to: bounce(0, 0, 4096) }), 0);
    assert!(ring.submit(OpId(0), Op::Write(at, guest(0, 0, 8192))).is_pending());
    assert!(ring.submit(OpId(1), Op::Write(at, bounce(0, 0, 4096))).is_pending());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let region = vm_memory::GuestMemoryBackend::iter(&*memory).next().unwrap();
            let file = vm_memory::GuestMemoryRegion::file_offset(region).unwrap().file();
            file.set_len(0).unwrap();
            assert_eq!(memory.read_obj::<u64>(GuestAddress(RAM)).unwrap(), 0);
        });
    });
    // Accepted before, and not handed over yet.
    let results: Vec<_> = finish(&mut ring).iter().map(|done| done.result).collect();
    assert_eq!(results, [-libc::EFAULT; 2]);
    for target in [at, Target::Image(0)] {
        assert_eq!(run(&mut ring, Op::Write(target, guest(0, 0, 8192))), -libc::EFAULT);
        assert_eq!(run(&mut ring, Op::Write(target, bounce(0, 0, 4096))), -libc::EFAULT);
    }
    let mut bytes = vec![0; 8192];
    File::open(&image.path).unwrap().read_exact_at(&mut bytes, 4096).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0xee), "written");
}

/// R2a: a thread that was stopped after the lease was looked at does not submit what it was looked at for.
#[test]
fn raw_operations_are_held_back_if_the_look_at_the_lease_was_long_ago() {
    const FRESH: Duration = Duration::from_secs(5);
    let geometry = Geometry { lease_fresh: Some(FRESH), ..GEOMETRY };
    let Some((mut ring, image, _device)) = ring_on_device(&geometry) else { return };
    let memory = ram();
    memory.write_slice(&fill(4, 8192), GuestAddress(RAM)).unwrap();
    for tag in 0..4 {
        set(&mut ring, tag, &memory, &[(0, 8192)]);
    }
    let at = DeviceOffset(4096);
    let on_disk = || {
        let mut bytes = vec![0; 8192];
        File::open(&image.path).unwrap().read_exact_at(&mut bytes, 4096).unwrap();
        bytes
    };
    let submit = |ring: &mut Ring| {
        let ops = [
            Op::Write(Target::Device(at), guest(0, 0, 8192)),
            Op::Read(Target::Device(DeviceOffset(65536)), guest(1, 0, 8192)),
            Op::Zeroes(Target::Device(at), 8192),
            Op::Read(Target::Image(0), guest(3, 0, 8192)),
        ];
        for (id, op) in (0..).zip(ops) {
            assert!(ring.submit(OpId(id), op).is_pending());
        }
    };
    let results = |ring: &mut Ring| {
        let mut done = finish(ring);
        done.sort_by_key(|done| done.id);
        done.iter().map(|done| done.result).collect::<Vec<_>>()
    };
    for leave in [
        |ring: &mut Ring| ring.enter().unwrap(),
        |ring: &mut Ring| ring.wait(Sleep::Several).unwrap(),
    ] {
        let looked = ring.now();
        submit(&mut ring);
        assert_eq!(ring.in_flight(), 4);
        // As if the thread had stood still since.
        ring.checked = looked.checked_sub(FRESH + Duration::from_millis(1)).unwrap();
        leave(&mut ring);
        assert_eq!(results(&mut ring), [-libc::EAGAIN, -libc::EAGAIN, -libc::EAGAIN, 8192]);
        assert!(on_disk().iter().all(|byte| *byte == 0xee), "written");
    }
    // The time that counts is the one that was told before the first of them.
    let looked = ring.now();
    submit(&mut ring);
    assert_eq!(ring.checked, looked);
    let done = results(&mut ring);
    assert!(done[0] == 8192 && done[1] == 8192 && done[3] == 8192, "{done:?}");
    assert!(on_disk().iter().all(|byte| *byte != 0xee));
}

/// R2a: what the kernel did not take at once goes out only under another look at the lease.
#[test]
fn raw_operations_left_in_the_queue_go_out_only_if_the_lease_is_still_ours() {
    let image = Image::new();
    let Some(device) = loop_device(&image) else {
        eprintln!("skipped: not root");
        return;
    };
    let leased = Image::new();
    let file = leased.open(true);
    let mut ring =
        Ring::new(file.as_fd(), Some(device.as_fd()), &GEOMETRY, Some(lease::Kind::Write), 0)
            .unwrap();
    let memory = ram();
    memory.write_slice(&fill(4, 8192), GuestAddress(RAM)).unwrap();
    set(&mut ring, 0, &memory, &[(0, 8192)]);
    set(&mut ring, 1, &memory, &[(8192, 8192)]);
    let on_disk = || {
        let mut bytes = vec![0; 8192];
        File::open(&image.path).unwrap().read_exact_at(&mut bytes, 4096).unwrap();
        bytes
    };
    // Into the submission queue, as if the kernel had then refused to take anything.
    let leave = |ring: &mut Ring| {
        ring.now();
        let write = Op::Write(Target::Device(DeviceOffset(4096)), guest(0, 0, 8192));
        assert!(ring.submit(OpId(0), write).is_pending());
        assert!(ring.submit(OpId(1), Op::Read(Target::Image(0), guest(1, 0, 8192))).is_pending());
        ring.release_raw();
        assert!(ring.queued.contains(&Queued::Raw(OpId(0))));
    };
    let results = |ring: &mut Ring| {
        let mut done = finish(ring);
        done.sort_by_key(|done| done.id);
        done.iter().map(|done| done.result).collect::<Vec<_>>()
    };
    for enter in
        [|ring: &mut Ring| ring.enter().unwrap(), |ring: &mut Ring| ring.wait(Sleep::Any).unwrap()]
    {
        set_lease(&file, libc::F_WRLCK);
        leave(&mut ring);
        // Whether it was taken from us or given up: it is no longer ours.
        set_lease(&file, libc::F_UNLCK);
        enter(&mut ring);
        assert_eq!(results(&mut ring), [-libc::ECANCELED, 8192]);
        assert!(on_disk().iter().all(|byte| *byte == 0xee), "written");
    }
    // With the lease they go out, and so does everything after a time without it.
    set_lease(&file, libc::F_WRLCK);
    leave(&mut ring);
    ring.enter().unwrap();
    assert_eq!(results(&mut ring), [8192, 8192]);
    assert!(on_disk() == fill(4, 8192), "not written");
    memory.write_slice(&fill(5, 8192), GuestAddress(RAM)).unwrap();
    ring.now();
    let write = Op::Write(Target::Device(DeviceOffset(4096)), guest(0, 0, 8192));
    assert_eq!(run(&mut ring, write), 8192);
    assert!(on_disk() == fill(5, 8192), "not written");
}

/// R14: what else is dirty on the device, the host filesystem's blocks, is not pushed out.
#[test]
fn a_device_flush_leaves_dirty_pages_outside_its_range_alone() {
    let image = Image::new();
    let Some(device) = loop_device(&image) else {
        eprintln!("skipped: not root");
        return;
    };
    let node = std::fs::read_link(format!("/proc/self/fd/{}", device.as_raw_fd())).unwrap();
    let buffered = OpenOptions::new().write(true).open(node).unwrap();
    let on_disk = |at: u64| {
        let mut byte = [0];
        File::open(&image.path).unwrap().read_exact_at(&mut byte, at).unwrap();
        byte[0]
    };
    let file = image.try_open(true, 0).unwrap();
    let mut ring = Ring::new(file.as_fd(), Some(device.as_fd()), &GEOMETRY, None, 0).unwrap();
    for (at, len, spared) in [(0, 4096, 4096), (8192, 8192, 16384), (0, 1, 4096), (8192, 1, 12288)]
    {
        buffered.write_all_at(&[at as u8 ^ 0x11; 512], at).unwrap();
        buffered.write_all_at(&[len as u8 ^ 0x22; 512], spared).unwrap();
        let before = on_disk(spared);
        assert_eq!(run(&mut ring, Op::SyncDevice(DeviceOffset(at), len)), 0);
        assert_eq!(on_disk(at), at as u8 ^ 0x11, "{at} {len}");
        assert_eq!(on_disk(spared), before, "{at} {len}");
        buffered.sync_all().unwrap();
    }
}

/// R22: what is pinned goes with the memory it belongs to.
#[test]
fn pinned_memory_is_read_and_written_until_other_memory_takes_its_place() {
    let image = Image::new();
    let mut ring = ring(&image.open(true));
    let memories = [ram(), ram()];
    ring.pin(&Arc::default()).unwrap();
    for (round, memory) in memories.iter().chain([&memories[0]]).enumerate() {
        ring.pin(memory).unwrap();
        let bytes: Vec<u8> = (0..BLOCK).map(|at| (at as usize * 7 + round) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(RAM + 8192)).unwrap();
        // One piece, and two.
        set(&mut ring, 0, memory, &[(8192, BLOCK)]);
        set(&mut ring, 1, memory, &[(1 << 20, 512), (2 << 20, BLOCK - 512)]);
        assert!(
            ring.submit(OpId(0), Op::Write(Target::Image(4096), guest(0, 0, BLOCK))).is_pending()
        );
        assert_eq!(finish(&mut ring), [Completion { id: OpId(0), result: BLOCK as i32 }]);
        memory.write_slice(&vec![0; BLOCK as usize], GuestAddress(RAM + 8192)).unwrap();
        for tag in [0, 1] {
            let op = Op::Read(Target::Image(4096), guest(tag, 0, BLOCK));
            assert!(ring.submit(OpId(tag), op).is_pending());
        }
        let done = finish(&mut ring);
        assert!(done.len() == 2 && done.iter().all(|done| done.result == BLOCK as i32), "{done:?}");
        let mut read = vec![0; BLOCK as usize];
        memory.read_slice(&mut read, GuestAddress(RAM + 8192)).unwrap();
        assert!(read == bytes, "round {round}, in place");
        memory.read_slice(&mut read[..512], GuestAddress(RAM + (1 << 20))).unwrap();
        memory.read_slice(&mut read[512..], GuestAddress(RAM + (2 << 20))).unwrap();
        assert!(read == bytes, "round {round}, in pieces");
        ring.guests().clear(Tag(0));
        ring.guests().clear(Tag(1));
    }
    // The ring and this test; what was pinned before is let go.
    assert_eq!((Arc::strong_count(&memories[0]), Arc::strong_count(&memories[1])), (2, 1));
}

/// Memory that cannot be pinned, here because it ends behind the end of its file, works as without.
#[test]
fn memory_that_cannot_be_pinned_is_used_unpinned() {
    let image = Image::new();
    let mut ring = ring(&image.open(true));
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 10).unwrap();
    let backing = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
    let region = (GuestAddress(RAM), 64 << 10, Some(backing));
    let memory = Arc::new(Memory::from_ranges_with_files([region]).unwrap());
    file.set_len(32 << 10).unwrap();
    ring.pin(&memory).unwrap_err();
    set(&mut ring, 0, &memory, &[(4096, BLOCK)]);
    assert!(ring.submit(OpId(0), Op::Read(Target::Image(0), guest(0, 0, BLOCK))).is_pending());
    assert_eq!(finish(&mut ring), [Completion { id: OpId(0), result: BLOCK as i32 }]);
    let byte: u8 = memory.read_obj(GuestAddress(RAM + 4096)).unwrap();
    assert_eq!(byte, 0xee);
    ring.guests().clear(Tag(0));
    drop(ring);
    assert_eq!(Arc::strong_count(&memory), 1);
}

/// R2a: whoever was stopped in the middle of a turn sees it at the next look, also where nothing was entered in between.
#[test]
fn the_clock_runs() {
    let image = Image::new();
    let ring = ring(&image.open(true));
    let (real, start) = (Instant::now(), ring.now());
    std::thread::sleep(Duration::from_millis(5));
    let elapsed = ring.now() - start;
    assert!(elapsed >= Duration::from_millis(5) && elapsed <= real.elapsed());
}

/// What one step of the random run does, in 512-byte units.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write { at: u16, len: u8, pieces: u8 },
    Read { at: u16, len: u8, pieces: u8 },
    WriteBounced { at: u16, len: u8, skew: u8 },
    ReadBounced { at: u16, len: u8, skew: u8 },
    Zero { at: u16, len: u8 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..240_u16, 1..=16_u8);
    let step = prop_oneof![
        (range.clone(), 1..6_u8).prop_map(|((at, len), pieces)| Step::Write { at, len, pieces }),
        (range.clone(), 1..6_u8).prop_map(|((at, len), pieces)| Step::Read { at, len, pieces }),
        (range.clone(), any::<u8>()).prop_map(|((at, len), skew)| Step::WriteBounced {
            at,
            len,
            skew
        }),
        (range.clone(), any::<u8>()).prop_map(|((at, len), skew)| Step::ReadBounced {
            at,
            len,
            skew
        }),
        range.prop_map(|(at, len)| Step::Zero { at, len }),
    ];
    proptest::collection::vec(step, 1..60)
}

/// Guest addresses of `sectors` sectors from 1 MiB on, in `pieces` parts that are not contiguous
/// and lie in descending order, shifted by `skew` bytes.
fn scattered(sectors: u8, pieces: u8, skew: u8) -> Vec<(u64, u32)> {
    let each = sectors.div_ceil(pieces).max(1);
    let starts = (0..sectors).step_by(usize::from(each));
    let mut at = (2 << 20) + u64::from(skew);
    starts
        .map(|start| {
            at -= 65536;
            (at, u32::from(each.min(sectors - start)) * 512)
        })
        .collect()
}

fn poke(memory: &Memory, pieces: &[(u64, u32)], mut data: &[u8]) {
    for &(at, len) in pieces {
        let (now, later) = data.split_at(len as usize);
        memory.write_slice(now, GuestAddress(RAM + at)).unwrap();
        data = later;
    }
}

fn peek(memory: &Memory, pieces: &[(u64, u32)]) -> Vec<u8> {
    let mut data = Vec::new();
    for &(at, len) in pieces {
        let mut piece = vec![0; len as usize];
        memory.read_slice(&mut piece, GuestAddress(RAM + at)).unwrap();
        data.extend(piece);
    }
    data
}

struct Model {
    ring: Ring,
    memory: Arc<Memory>,
    bytes: Vec<u8>,
    seed: u64,
}

impl Model {
    fn step(&mut self, step: Step) {
        self.seed += 1;
        let Self { ring, memory, bytes, seed } = self;
        let (at, len, pieces) = match step {
            Step::Write { at, len, pieces } | Step::Read { at, len, pieces } => {
                (at, len, scattered(len, pieces, 0))
            }
            Step::WriteBounced { at, len, skew } | Step::ReadBounced { at, len, skew } => {
                (at, len, scattered(len, 3, skew))
            }
            Step::Zero { at, len } => (at, len, scattered(len, 1, 0)),
        };
        let range = usize::from(at) * 512..(usize::from(at) + usize::from(len)) * 512;
        let (target, len) = (Target::Image(range.start as u64), u32::from(len) * 512);
        let (slot, all) = (bounce(*seed as u32 % 8, 512, len), guest(2, 0, len));
        let data = fill(*seed, len as usize);
        set(ring, 2, memory, &pieces);
        match step {
            Step::Write { .. } | Step::WriteBounced { .. } | Step::Zero { .. } => {
                poke(memory, &pieces, &data);
                bytes[range].copy_from_slice(&data);
            }
            Step::Read { .. } | Step::ReadBounced { .. } => poke(memory, &pieces, &data),
        }
        let full = len as i32;
        match step {
            Step::Write { .. } => assert_eq!(run(ring, Op::Write(target, all)), full),
            Step::Read { .. } => assert_eq!(run(ring, Op::Read(target, all)), full),
            Step::WriteBounced { .. } => {
                assert_eq!(run(ring, Op::Copy { from: all, to: slot }), 0);
                assert_eq!(run(ring, Op::Write(target, slot)), full);
            }
            Step::ReadBounced { .. } => {
                assert_eq!(run(ring, Op::Read(target, slot)), full);
                assert_eq!(run(ring, Op::Copy { from: slot, to: all }), 0);
            }
            Step::Zero { at, .. } => {
                assert_eq!(run(ring, Op::Zero(all)), 0);
                assert_eq!(run(ring, Op::Write(target, all)), full);
                let start = usize::from(at) * 512;
                bytes[start..start + len as usize].fill(0);
            }
        }
        if let Step::Read { at, .. } | Step::ReadBounced { at, .. } = step {
            let start = usize::from(at) * 512;
            assert!(peek(memory, &pieces) == bytes[start..start + len as usize], "{step:?}");
        }
        ring.guests().clear(Tag(2));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_file_written_through_the_ring_is_like_a_vec(steps in steps()) {
        let image = Image::new();
        let file = image.open(true);
        let ring = ring(&file);
        let bytes = vec![0xee; IMAGE_BYTES as usize];
        let mut model = Model { ring, memory: ram(), bytes, seed: 0 };
        for step in steps {
            model.step(step);
        }
        prop_assert!(std::fs::read(&image.path).unwrap() == model.bytes);
        prop_assert_eq!(Arc::strong_count(&model.memory), 1);
    }
}
