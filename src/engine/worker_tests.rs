// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Single rules, each in the smallest world that shows it.

use super::*;
use crate::engine::Op;
use crate::engine::extent::State;
use crate::engine::io::Target;
use crate::engine::keeper::Start;
use crate::engine::message::{Report, Why};
use crate::engine::testing::{BLOCK, Rig, range};
use crate::engine::units::FileRange;

const HOLES: [State; 16] = [State::Hole; 16];
const MAPPED: [State; 16] = [State::Mapped; 16];

#[test]
fn holes_and_unwritten_blocks_read_as_zeros_without_io() {
    let mut states = HOLES;
    states[1] = State::Unwritten;
    let mut rig = Rig::new(states, Start::Eligible);
    assert_eq!(rig.reports, [Report::Direct]);
    assert_eq!(rig.read(range(0, 3)), vec![0; 3 * BLOCK as usize]);
    assert!(rig.world.log.is_empty());
}

#[test]
fn a_hole_write_goes_through_the_file_and_is_raw_from_then_on() {
    let mut rig = Rig::new(HOLES, Start::Eligible);
    let tag = rig.write(FileRange::new(512, 1024), 9);
    assert_eq!(rig.done[&tag], Status::Ok);
    assert_eq!(rig.raw_ops(), 0);
    let read = rig.read(range(0, 1));
    assert_eq!((read[511], read[512], read[1023], read[1024]), (0, 9, 9, 0));
    assert_eq!(rig.raw_ops(), 1);
    rig.write(range(0, 1), 4);
    assert_eq!(rig.raw_ops(), 2);
    assert_eq!(rig.read(range(0, 1)), vec![4; BLOCK as usize]);
}

/// A write that left nothing in the page cache is not waited for by FIEMAP; one that did, or that failed, is (ADR 0006).
#[test]
fn a_worker_says_what_its_file_writes_have_left() {
    for (cached, failed, asked) in [(false, false, 0), (true, false, 1), (false, true, 1)] {
        let mut rig = Rig::new(HOLES, Start::Eligible);
        rig.read(range(0, 1));
        let before = rig.keeper.snapshot().fiemap_calls;
        rig.world.cached = cached;
        rig.world.results.extend(failed.then_some(-5));
        let tag = rig.write(range(2, 2), 9);
        assert_eq!(rig.done[&tag], if failed { Status::IoError } else { Status::Ok });
        let calls = rig.keeper.snapshot().fiemap_calls - before;
        assert_eq!(calls, asked, "cached: {cached}, failed: {failed}");
        rig.world.cached = false;
        assert_eq!(rig.read(range(1, 4))[BLOCK as usize], if failed { 0 } else { 9 });
    }
}

#[test]
fn a_break_waits_for_raw_io_only_and_parks_the_rest_meanwhile() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.read(range(0, 1));
    rig.world.hold = true;
    let slow = rig.write(range(1, 1), 7);
    rig.keeper.lease_break(rig.world.clock);
    rig.run();
    let parked = rig.write(range(2, 1), 8);
    assert!(rig.world.lease && !rig.done.contains_key(&parked));
    rig.world.hold = false;
    rig.run();
    assert!(!rig.world.lease);
    assert_eq!(rig.reports, [Report::Direct, Report::Filesystem(Why::LeaseBroken)]);
    assert_eq!((rig.done[&slow], rig.done[&parked]), (Status::Ok, Status::Ok));
    assert!(matches!(rig.world.log.last(), Some(Op::Write(Target::Image(_), _))));
    rig.wait(Duration::from_millis(300));
    assert_eq!(rig.reports.last(), Some(&Report::Direct));
    assert_eq!(rig.read(range(1, 2))[BLOCK as usize], 8);
}

/// Who sleeps for several completions must not hold up what goes on in steps.
#[test]
fn it_hurries_while_the_keeper_or_a_drain_waits_for_it_and_no_longer() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.read(range(0, 1));
    assert!(!rig.worker.is_hurried());
    rig.world.hold = true;
    let write = rig.write(range(1, 1), 7);
    assert!(!rig.worker.is_hurried(), "raw I/O in flight is nobody else's business");
    let flush = rig.start(Kind::Flush, Vec::new());
    rig.run();
    assert!(rig.worker.is_hurried() && !rig.done.contains_key(&flush));
    rig.world.hold = false;
    rig.run();
    assert_eq!((rig.done[&write], rig.done[&flush]), (Status::Ok, Status::Ok));
    assert!(!rig.worker.is_hurried());

    rig.world.hold = true;
    let slow = rig.write(range(1, 1), 8);
    rig.keeper.lease_break(rig.world.clock);
    rig.run();
    assert!(rig.worker.is_hurried() && !rig.done.contains_key(&slow), "a break drains");
    rig.world.hold = false;
    rig.run();
    assert!(!rig.worker.is_hurried());
    rig.wait(Duration::from_millis(300));
    rig.read(range(0, 16));
    assert!(!rig.worker.is_hurried());
}

#[test]
fn a_lease_lost_in_our_sleep_stops_raw_writes_before_the_first() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.write(range(0, 1), 1);
    let before = rig.raw_ops();
    rig.world.lease = false;
    rig.world.clock += Duration::from_secs(11);
    let tag = rig.write(range(0, 1), 2);
    assert_eq!(rig.done[&tag], Status::Ok);
    assert_eq!(rig.raw_ops(), before);
    assert_eq!(rig.reports.last(), Some(&Report::Filesystem(Why::LeaseLost)));
}

/// R2a: what the ring held back at the last moment looks at the lease again, and goes another way without one.
#[test]
fn what_is_held_back_at_the_last_moment_looks_at_the_lease_again() {
    for lost in [false, true] {
        let mut rig = Rig::new(MAPPED, Start::Eligible);
        rig.write(range(5, 1), 6);
        rig.world.hold = true;
        let write = rig.write(range(4, 1), 7);
        let read = rig.start(Kind::Read(range(5, 1)), vec![0; BLOCK as usize]);
        let before = rig.raw_ops();
        rig.world.lease = !lost;
        rig.world.clock += Duration::from_secs(11);
        rig.world.results.extend([-11, -11]);
        rig.world.hold = false;
        rig.run();
        assert_eq!((rig.done[&write], rig.done[&read]), (Status::Ok, Status::Ok));
        assert_eq!(rig.raw_ops() - before, if lost { 0 } else { 2 }, "lost: {lost}");
        assert_eq!(rig.world.guest[&read], vec![6; BLOCK as usize]);
        let left = rig.reports.last() == Some(&Report::Filesystem(Why::LeaseLost));
        assert_eq!(left, lost);
        assert_eq!(rig.read(range(4, 1)), vec![7; BLOCK as usize]);
    }
}

#[test]
fn a_short_transfer_goes_on_and_an_error_fails_its_request_alone() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.world.hold = true;
    let short = rig.write(range(0, 1), 3);
    let bad = rig.write(range(4, 1), 3);
    rig.world.results.extend([512, -5]);
    rig.world.hold = false;
    rig.run();
    assert_eq!((rig.done[&short], rig.done[&bad]), (Status::Ok, Status::IoError));
    // The first 512 bytes were only said to be written: the rest must be.
    assert_eq!(rig.read(range(0, 1))[512..], vec![3; BLOCK as usize - 512]);
}

/// R10a: the rest of a block on its own could go through the page cache, beside raw writes to the
/// block.
#[test]
fn a_short_file_write_goes_on_at_a_whole_block() {
    for (start, states) in [(Start::Filesystem, MAPPED), (Start::Eligible, HOLES)] {
        let mut rig = Rig::new(states, start);
        let part = FileRange::new(512, 3 * BLOCK);
        // The first block is read, for its first sector; then three writes stop inside a block.
        rig.world.results.extend([BLOCK as i32, 512, 1024, BLOCK as i32 + 1024]);
        let tag = rig.write(part, 3);
        assert_eq!(rig.done[&tag], Status::Ok);
        let writes: Vec<(u64, u32)> = (rig.world.log.iter())
            .filter_map(|op| match op {
                Op::Write(Target::Image(at), buf) => Some((*at, buf.len())),
                _ => None,
            })
            .collect();
        assert!(writes.len() >= 4, "{writes:?}");
        let whole = |(at, len): &(u64, u32)| at % BLOCK == 0 && u64::from(*len) % BLOCK == 0;
        assert!(writes.iter().all(whole), "{writes:?}");
        // What was only said to be written before the block that was begun is not written again.
        assert!(writes.contains(&(2 * BLOCK, BLOCK as u32)), "{writes:?}");
        assert_eq!(rig.read(range(2, 1)), vec![3; BLOCK as usize]);
    }
}

/// A file that never takes a whole block must not keep the worker trying for ever.
#[test]
fn a_file_write_that_never_gets_a_block_on_fails() {
    let mut rig = Rig::new(MAPPED, Start::Filesystem);
    rig.world.results.extend([512; 200]);
    let tag = rig.write(range(0, 1), 3);
    assert_eq!(rig.done[&tag], Status::IoError);
    assert!(rig.world.log.len() < 100);
}

/// Two raw pieces of a request that lie in one block of the file are planned again: through the
/// file each is a read-modify-write of that block, and they must not meet.
#[test]
fn pieces_of_a_request_that_meet_in_a_block_of_the_file_take_turns() {
    for lost in [false, true] {
        let mut rig = Rig::with(MAPPED, Start::Eligible, |c| c.geometry.write_block = 1024);
        rig.write(range(5, 1), 6);
        let before = rig.read(range(4, 1));
        rig.world.hold = true;
        let part = FileRange::new(4 * BLOCK + 512, 4 * BLOCK + 1536);
        let tag = rig.write(part, 7);
        rig.world.lease = !lost;
        rig.world.clock += Duration::from_secs(11);
        rig.world.results.extend([-11, -11]);
        rig.world.hold = false;
        rig.run();
        assert_eq!(rig.done[&tag], Status::Ok);
        let after = rig.read(range(4, 1));
        assert!(after[512..1536].iter().all(|byte| *byte == 7), "lost: {lost}");
        assert!(after[..512] == before[..512] && after[1536..] == before[1536..]);
    }
}

/// The simulator's seed 34267: the rest alone was a read-modify-write, and put back what others had
/// written to the block meanwhile.
#[test]
fn what_is_left_of_a_whole_block_when_the_lease_is_lost_is_written_as_the_whole_block() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.write(range(5, 1), 6);
    rig.world.hold = true;
    let tag = rig.write(range(4, 1), 7);
    rig.world.lease = false;
    rig.world.clock += Duration::from_secs(11);
    rig.world.results.push_back(1536);
    rig.world.hold = false;
    rig.world.log.clear();
    rig.run();
    assert_eq!(rig.done[&tag], Status::Ok);
    let log = &rig.world.log;
    assert!(!log.iter().any(|op| matches!(op, Op::Read(..))), "{log:?}");
    let whole = |op: &Op| matches!(op, Op::Write(Target::Image(at), buf) if *at == 4 * BLOCK && u64::from(buf.len()) == BLOCK);
    assert!(log.iter().any(whole), "{log:?}");
    assert!(rig.read(range(4, 1)).iter().all(|byte| *byte == 7));
}

#[test]
fn a_flush_waits_for_the_write_before_it_and_syncs_what_is_dirty() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.world.hold = true;
    let write = rig.write(range(0, 1), 3);
    let flush = rig.start(Kind::Flush, Vec::new());
    assert!(!rig.done.contains_key(&flush));
    rig.world.hold = false;
    rig.run();
    assert_eq!((rig.done[&write], rig.done[&flush]), (Status::Ok, Status::Ok));
    let tail: Vec<Op> = rig.world.log.split_off(rig.world.log.len() - 2);
    assert!(matches!(tail[..], [Op::SyncImage, Op::SyncDevice(..)]), "{tail:?}");
    rig.start(Kind::Flush, Vec::new());
    assert!(!matches!(rig.world.log.last(), Some(Op::SyncImage)), "nothing is dirty any more");
}

#[test]
fn a_discard_punches_whole_blocks_behind_the_raw_io_there() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.read(range(0, 1));
    rig.world.hold = true;
    let write = rig.write(range(2, 1), 5);
    let discard = rig.start(Kind::Discard(FileRange::new(BLOCK + 512, 4 * BLOCK - 512)), vec![]);
    assert!(!rig.done.contains_key(&discard));
    assert_eq!(rig.world.states[2], State::Mapped);
    rig.world.hold = false;
    rig.run();
    assert_eq!((rig.done[&write], rig.done[&discard]), (Status::Ok, Status::Ok));
    assert_eq!(rig.world.states[1..4], [State::Mapped, State::Hole, State::Mapped]);
    assert_eq!(rig.read(range(2, 1)), vec![0; BLOCK as usize]);
}

#[test]
fn write_through_writes_end_with_a_sync() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.worker.set_write_through(true);
    let tag = rig.write(range(0, 1), 3);
    assert_eq!(rig.done[&tag], Status::Ok);
    assert!(matches!(rig.world.log.last(), Some(Op::SyncDevice(..))));
}

#[test]
fn a_shared_block_is_read_raw_and_written_through_the_file() {
    let mut states = MAPPED;
    states[3] = State::Shared;
    let mut rig = Rig::new(states, Start::Eligible);
    rig.read(range(3, 1));
    assert_eq!(rig.raw_ops(), 1);
    rig.write(range(2, 3), 6);
    let writes = rig.world.log.iter().filter(|op| matches!(op, Op::Write(..)));
    let file = writes.filter(|op| matches!(op, Op::Write(Target::Image(_), _))).count();
    assert!(file >= 1);
    assert_eq!(rig.read(range(2, 3)), vec![6; 3 * BLOCK as usize]);
}

/// Whether the keeper believes FIEMAP's new answer for blocks that nobody wrote through the file
/// makes a difference when somebody has a raw write in flight there.
#[test]
fn settling_a_mixed_write_does_not_take_mapped_blocks_from_under_raw_writes() {
    let mut states = MAPPED;
    states[2] = State::Hole;
    let mut rig = Rig::new(states, Start::Eligible);
    rig.read(range(0, 4));
    rig.world.slow = Some(rig.world.device_place(0));
    let raw = rig.write(FileRange::new(0, 512), 1);
    // ext2 and ext3 fill holes through the page cache, and it would not become empty.
    rig.world.cached = true;
    let mixed = rig.write(FileRange::new(512, 3 * BLOCK), 2);
    // A read-modify-write of the block would carry old bytes over what `raw` writes.
    let inside = rig.write(FileRange::new(1024, 1536), 3);
    rig.world.slow = None;
    rig.run();
    for tag in [raw, mixed, inside] {
        assert_eq!(rig.done[&tag], Status::Ok);
    }
    let read = rig.read(range(0, 1));
    assert_eq!((read[0], read[512], read[1024], read[1536]), (1, 2, 3, 2));
}

fn zeroes(range: FileRange, unmap: bool) -> Kind {
    Kind::WriteZeroes { range, unmap }
}

fn log_of(rig: &Rig, wanted: fn(&Op) -> bool) -> usize {
    rig.world.log.iter().filter(|op| wanted(op)).count()
}

#[test]
fn zeroing_keeps_mapped_blocks_and_leaves_holes_alone() {
    let mut states = MAPPED;
    states[3] = State::Hole;
    states[4] = State::Unwritten;
    let mut rig = Rig::new(states, Start::Eligible);
    rig.write(range(0, 3), 7);
    rig.write(range(5, 2), 7);
    rig.world.log.clear();
    let tag = rig.start(zeroes(FileRange::new(512, 6 * BLOCK), false), Vec::new());
    assert_eq!(rig.done[&tag], Status::Ok);
    assert_eq!(rig.world.states, states, "nothing is allocated, nothing given back");
    assert!(rig.world.log.iter().all(|op| matches!(op, Op::Zeroes(Target::Device(_), _))));
    assert_eq!(rig.raw_ops(), 0, "no data is moved");
    let read = rig.read(range(0, 7));
    assert!(read[..512].iter().chain(&read[6 * 4096..]).all(|&byte| byte == 7));
    assert!(read[512..6 * 4096].iter().all(|&byte| byte == 0));
}

#[test]
fn zeroing_with_unmap_punches_the_whole_blocks_and_writes_the_edges() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.write(range(0, 8), 7);
    let odd = FileRange::new(BLOCK + 512, 6 * BLOCK + 1024);
    let tag = rig.start(zeroes(odd, true), Vec::new());
    assert_eq!(rig.done[&tag], Status::Ok);
    let mut expected = MAPPED;
    expected[2..6].fill(State::Hole);
    assert_eq!(rig.world.states, expected);
    let read = rig.read(range(0, 8));
    for (at, byte) in read.iter().enumerate() {
        assert_eq!(
            *byte,
            if odd.contains(&FileRange::new(at as u64, at as u64 + 1)) { 0 } else { 7 }
        );
    }
    rig.write(range(3, 1), 9);
    assert_eq!(rig.read(range(3, 1)), vec![9; BLOCK as usize], "a punched block is filled again");
}

#[test]
fn where_zeroing_and_punching_cannot_be_had_zeros_are_written() {
    for (start, unmap) in
        [(Start::Eligible, false), (Start::Eligible, true), (Start::Filesystem, true)]
    {
        let mut rig = Rig::new(MAPPED, start);
        rig.write(range(0, 8), 7);
        (rig.world.zeroes, rig.world.punches) = (false, false);
        let tag = rig.start(zeroes(FileRange::new(512, 8 * BLOCK - 512), unmap), Vec::new());
        assert_eq!(rig.done[&tag], Status::Ok);
        assert_eq!(rig.world.states, MAPPED);
        let read = rig.read(range(0, 8));
        assert_eq!(
            (read[511], read[512], read[8 * 4096 - 513], read[8 * 4096 - 512]),
            (7, 0, 0, 7)
        );
        assert!(read[512..8 * 4096 - 512].iter().all(|&byte| byte == 0));
        let discard = rig.start(Kind::Discard(range(0, 2)), Vec::new());
        assert_eq!(rig.done[&discard], Status::Ok, "DISCARD is advice");
    }
}

/// Held back at the last moment, not refused.
#[test]
fn zeroes_that_are_to_be_tried_again_are() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.write(range(0, 1), 7);
    rig.world.log.clear();
    rig.world.results = [-11].into();
    let tag = rig.start(zeroes(range(0, 1), false), Vec::new());
    assert_eq!(rig.done[&tag], Status::Ok);
    assert_eq!(log_of(&rig, |op| matches!(op, Op::Zeroes(Target::Device(_), _))), 2);
    assert_eq!(rig.world.log.len(), 2, "and nothing is written instead");
    assert!(rig.read(range(0, 1)).iter().all(|&byte| byte == 0));
}

#[test]
fn through_the_filesystem_whole_blocks_are_zeroed_by_reference() {
    let mut rig = Rig::new(MAPPED, Start::Filesystem);
    rig.write(range(0, 4), 7);
    rig.world.log.clear();
    let tag = rig.start(zeroes(range(1, 2), false), Vec::new());
    assert_eq!(rig.done[&tag], Status::Ok);
    assert_eq!(rig.world.log, [Op::Zeroes(Target::Image(BLOCK), 2 * BLOCK as u32)]);
    let read = rig.read(range(0, 4));
    assert_eq!((read[0], read[4096], read[3 * 4096 - 1], read[3 * 4096]), (7, 0, 0, 7));
}

#[test]
fn all_ranges_of_a_request_are_done_before_its_one_answer_and_a_flush_waits_for_all() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.write(range(0, 9), 7);
    rig.world.hold = true;
    let tag = Tag(31);
    let first = zeroes(range(0, 1), false);
    let more = [zeroes(range(3, 1), true), zeroes(range(6, 1), false)];
    let request = Request { kind: first, mem_aligned: true };
    rig.worker.accept_all(&mut rig.world, tag, request, &more);
    rig.run();
    let flush = rig.start(Kind::Flush, Vec::new());
    assert!(!rig.done.contains_key(&tag) && !rig.done.contains_key(&flush));
    assert_eq!(log_of(&rig, |op| matches!(op, Op::SyncImage | Op::SyncDevice(..))), 0);
    rig.world.hold = false;
    rig.run();
    assert_eq!((rig.done[&tag], rig.done[&flush]), (Status::Ok, Status::Ok));
    let last = rig.world.log.iter().rposition(|op| matches!(op, Op::Zeroes(..)));
    let sync = rig.world.log.iter().position(|op| matches!(op, Op::SyncImage | Op::SyncDevice(..)));
    assert!(last < sync, "{:?}", rig.world.log);
    let read = rig.read(range(0, 9));
    let zero: Vec<usize> = (0..9).filter(|i| read[i * 4096] == 0).collect();
    assert_eq!(zero, [0, 3, 6]);
    assert_eq!(rig.world.states[3], State::Hole);
}

#[test]
fn a_range_that_fails_ends_the_request_and_the_later_ones_are_left_alone() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.write(range(0, 4), 7);
    // The zeroing, and the writing of zeros in its place.
    rig.world.results.extend([-5, -5]);
    let request = Request { kind: zeroes(range(0, 1), false), mem_aligned: true };
    rig.worker.accept_all(&mut rig.world, Tag(31), request, &[zeroes(range(2, 1), false)]);
    rig.run();
    assert_eq!(rig.done[&Tag(31)], Status::IoError);
    assert_eq!(rig.read(range(2, 1)), vec![7; BLOCK as usize]);
}

/// EBUSY, say: the kernel may refuse a range of the device for reasons of its own.
#[test]
fn zeros_that_the_kernel_refuses_are_written() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.write(range(0, 4), 7);
    rig.world.results.push_back(-16);
    let request = Request { kind: zeroes(range(0, 1), false), mem_aligned: true };
    rig.worker.accept_all(&mut rig.world, Tag(31), request, &[]);
    rig.run();
    assert_eq!(rig.done[&Tag(31)], Status::Ok);
    assert_eq!(rig.read(range(0, 1)), vec![0; BLOCK as usize]);
    assert_eq!(rig.read(range(1, 1)), vec![7; BLOCK as usize]);
}

/// Takes operations and ends none by itself.
#[derive(Default)]
struct Sink(std::collections::VecDeque<(crate::engine::OpId, Op)>, bool);

impl Io for Sink {
    fn submit(&mut self, id: crate::engine::OpId, op: Op) -> std::task::Poll<i32> {
        if op == Op::ConfirmLease {
            return std::task::Poll::Ready(1);
        }
        self.0.push_back((id, op));
        std::task::Poll::Pending
    }

    fn reap(&mut self) -> Option<crate::engine::Completion> {
        if !std::mem::take(&mut self.1) {
            return None;
        }
        let (id, op) = self.0.pop_front()?;
        let Op::Write(_, buf) = op else { panic!("{op:?}") };
        Some(crate::engine::Completion { id, result: buf.len() as i32 })
    }

    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

fn sink_geometry() -> Geometry {
    Geometry {
        file_size: 0,
        fs_block: 4096,
        file_align: 512,
        dev_block: 512,
        write_block: 512,
        mem_align: 512,
        bounce_bytes: 8192,
        bounce_slots: 2,
        ops: 128,
        zeroes_bytes: 4 << 20,
        punch_bytes: 256 << 20,
        lease_fresh: Some(Duration::from_secs(10)),
        raw: crate::engine::RawLimits::default(),
    }
}

/// A worker in direct mode whose file is mapped in `range`, and the sink for its operations.
fn sink_worker(geometry: Geometry, range: FileRange) -> (Worker, Sink) {
    let shared = Arc::new(Shared::new());
    let mut map = crate::engine::extent::ExtentMap::new();
    let device = DeviceOffset(1 << 20);
    map.replace(range, &[crate::engine::extent::Extent { range, device, state: State::Mapped }]);
    shared.publish(View { mode: crate::engine::shared::Mode::Direct, map });
    let mut worker = Worker::new(geometry, Rules::default(), shared, Arc::default(), 100);
    let mut sink = Sink::default();
    worker.message(&mut sink, ToWorker::Begin);
    (worker, sink)
}

#[test]
fn a_guest_cannot_make_a_break_wait_for_more_than_a_few_seconds_of_raw_io() {
    const EACH: u64 = 10 << 20;
    let range = FileRange::new(0, 100 * EACH);
    let geometry = Geometry { file_size: range.end, ..sink_geometry() };
    let (mut worker, mut sink) = sink_worker(geometry, range);
    for tag in 0..100 {
        let range = FileRange::new(u64::from(tag) * EACH, u64::from(tag + 1) * EACH);
        worker.accept(&mut sink, Tag(tag), Request { kind: Kind::Write(range), mem_aligned: true });
    }
    let mut done = 0;
    while !sink.0.is_empty() {
        let bytes = |(_, op): &(crate::engine::OpId, Op)| match op {
            Op::Write(_, buf) => u64::from(buf.len()),
            op => panic!("{op:?}"),
        };
        let in_flight: u64 = sink.0.iter().map(bytes).sum();
        assert!(in_flight <= 32 << 20, "{in_flight} bytes in flight");
        assert!(sink.0.iter().all(|op| bytes(op) <= 1 << 20), "an operation is too long");
        sink.1 = true;
        worker.reap(&mut sink);
        while let Some((_, status)) = worker.poll_done() {
            assert_eq!(status, Status::Ok);
            done += 1;
        }
    }
    assert_eq!(done, 100);
}

/// A lane that always has small requests must not keep a large one waiting for ever.
#[test]
fn a_large_request_gets_its_turn_among_small_ones() {
    const SMALL: u64 = 4096;
    const DEPTH: u32 = 15;
    let raw = crate::engine::RawLimits {
        bytes: 16 * SMALL,
        start: 16 * SMALL,
        least: SMALL,
        operation: 16 * SMALL,
    };
    let range = FileRange::new(0, 64 << 20);
    let geometry = Geometry { raw, file_size: range.end, ops: 128, ..sink_geometry() };
    let (mut worker, mut sink) = sink_worker(geometry, range);
    let mut next = 1 << 20;
    let mut small = |worker: &mut Worker, sink: &mut Sink, tag: Tag| {
        let range = FileRange::new(next, next + SMALL);
        next += SMALL;
        worker.accept(sink, tag, Request { kind: Kind::Write(range), mem_aligned: true });
    };
    for tag in 0..DEPTH {
        small(&mut worker, &mut sink, Tag(tag));
    }
    let large = Kind::Write(FileRange::new(0, 16 * SMALL));
    worker.accept(&mut sink, Tag(99), Request { kind: large, mem_aligned: true });
    for _ in 0..200 {
        sink.1 = true;
        worker.reap(&mut sink);
        while let Some((tag, status)) = worker.poll_done() {
            assert_eq!(status, Status::Ok);
            if tag == Tag(99) {
                return;
            }
            small(&mut worker, &mut sink, tag);
        }
    }
    panic!("still waiting");
}

#[test]
fn a_strict_barrier_holds_back_what_comes_after_it_and_a_drain_does_not() {
    for strict in [false, true] {
        let mut rig = Rig::with(MAPPED, Start::Eligible, |config| config.strict = strict);
        if strict {
            rig.worker.set_strict();
        }
        rig.read(range(0, 3));
        rig.world.hold = true;
        let before = rig.write(range(0, 1), 1);
        let flush = rig.start(Kind::Flush, Vec::new());
        let ops = rig.world.log.len();
        let after = rig.write(range(1, 1), 2);
        let read = rig.start(Kind::Read(range(2, 1)), vec![9; BLOCK as usize]);
        assert_eq!(rig.world.log.len() - ops, if strict { 0 } else { 2 });
        rig.world.hold = false;
        rig.run();
        for tag in [before, flush, after, read] {
            assert_eq!(rig.done.get(&tag), Some(&Status::Ok));
        }
        let sync = |op: &Op| matches!(op, Op::SyncImage | Op::SyncDevice(..));
        let synced = rig.world.log.iter().rposition(sync).unwrap();
        assert_eq!(rig.world.log.len() - 1 > synced, strict, "{:?}", rig.world.log);
        assert_eq!(rig.read(range(1, 1)), vec![2; BLOCK as usize]);
    }
}

#[test]
fn switching_to_write_through_makes_durable_what_was_written_before() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    rig.write(range(0, 1), 1);
    let sync = |op: &Op| matches!(op, Op::SyncImage | Op::SyncDevice(..));
    assert_eq!(log_of(&rig, sync), 0);
    rig.worker.set_write_through(true);
    rig.run();
    assert_eq!(log_of(&rig, sync), 2, "{:?}", rig.world.log);
    rig.worker.set_write_through(true);
    rig.worker.set_write_through(false);
    rig.run();
    assert_eq!(log_of(&rig, sync), 2);
}

/// R7: a FIEMAP that hangs holds up the request that misses, and no other one of its queue.
#[test]
fn a_miss_stalls_no_other_request() {
    let mut rig = Rig::new(MAPPED, Start::Eligible);
    let before = rig.read(range(0, 4));
    // What is punched is not cached any more.
    rig.start(Kind::Discard(range(8, 4)), Vec::new());
    rig.hold_jobs = true;
    let miss = rig.start(Kind::Read(range(9, 1)), vec![0; BLOCK as usize]);
    let miss_too = rig.write(range(10, 1), 1);
    assert!(rig.read(range(0, 4)) == before);
    let write = rig.write(range(4, 2), 7);
    assert_eq!(rig.done.get(&write), Some(&Status::Ok));
    assert!(!rig.done.contains_key(&miss) && !rig.done.contains_key(&miss_too));
    rig.hold_jobs = false;
    rig.run();
    assert_eq!(rig.done.get(&miss), Some(&Status::Ok));
    assert_eq!(rig.done.get(&miss_too), Some(&Status::Ok));
}

#[path = "orders_tests.rs"]
mod orders;
