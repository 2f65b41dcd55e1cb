// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The keeper alone, its workers and its helper played by hand: every message comes when the test
//! says so.

use super::*;
use crate::engine::extent::Hint;
use crate::engine::io::Tag;
use crate::engine::message::{Drain, MapAnswer, PointId, Proof, Refusal};
use crate::engine::{Geometry, Rules};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 1024;
const A: WorkerId = WorkerId(1);
const B: WorkerId = WorkerId(2);

fn blocks(first: u64, count: u64) -> FileRange {
    FileRange::new(first * BLOCK, (first + count) * BLOCK)
}

/// Blocks that do not lie next to each other on the device.
fn extents(range: FileRange, state: State) -> Vec<Extent> {
    let block = |i| Extent { range: blocks(i, 1), device: DeviceOffset(i * 2 * BLOCK), state };
    (range.start / BLOCK..range.end / BLOCK).map(block).collect()
}

fn answer(range: FileRange, state: State, proof: Proof) -> JobDone {
    JobDone::Map(Ok(MapAnswer { covered: range, extents: extents(range, state), proof }))
}

struct Small {
    keeper: Keeper,
    shared: Arc<Shared>,
    now: Duration,
    jobs: VecDeque<(JobId, Job)>,
    sent: Vec<(WorkerId, ToWorker)>,
    drops: u32,
    reports: Vec<Report>,
}

impl Small {
    fn new(change: impl FnOnce(&mut KeeperConfig)) -> Self {
        let geometry = Geometry {
            file_size: BLOCKS * BLOCK,
            fs_block: 4096,
            file_align: 512,
            dev_block: 512,
            write_block: 512,
            mem_align: 512,
            bounce_bytes: 8192,
            bounce_slots: 2,
            ops: 4,
            zeroes_bytes: 4 << 20,
            punch_bytes: 256 << 20,
            lease_fresh: Some(Duration::from_secs(10)),
            raw: crate::engine::RawLimits::default(),
        };
        let mut config = KeeperConfig {
            geometry,
            start: Start::Eligible,
            window: blocks(0, BLOCKS),
            max_extents: 10_000,
            populate: false,
            lease_break_time: Duration::from_secs(40),
            proven: true,
            barriers: true,
            strict: false,
            rules: Rules::default(),
        };
        change(&mut config);
        let shared = Arc::new(Shared::new());
        // As if somebody were always writing: flushes have to ask.
        shared.stir();
        let mut small = Self {
            keeper: Keeper::new(config, shared.clone(), Duration::ZERO),
            shared,
            now: Duration::ZERO,
            jobs: VecDeque::new(),
            sent: Vec::new(),
            drops: 0,
            reports: Vec::new(),
        };
        small.keeper.worker_joined(A);
        small.poll();
        assert_eq!(small.take(A), [ToWorker::Begin]);
        small
    }

    /// In direct mode, with nothing cached.
    fn direct(change: impl FnOnce(&mut KeeperConfig)) -> Self {
        let mut small = Self::new(change);
        small.enter();
        small
    }

    fn enter(&mut self) {
        self.finish(JobDone::Enter(Ok(())));
        self.parked(A);
        self.finish(JobDone::Confirm(Ok(())));
        assert_eq!(self.reports.pop(), Some(Report::Direct));
        assert!(matches!(self.take(A)[..], [ToWorker::Release(_)]));
    }

    fn poll(&mut self) {
        while let Some(action) = self.keeper.poll_action() {
            match action {
                Action::Send(to, message) => self.sent.push((to, message)),
                Action::Run(id, job) => self.jobs.push_back((id, job)),
                Action::DropLease => self.drops += 1,
                Action::Report(report) => self.reports.push(report),
                Action::Touch => {}
            }
        }
    }

    /// What `worker` has been sent since it was last looked at.
    fn take(&mut self, worker: WorkerId) -> Vec<ToWorker> {
        let (mine, others) = self.sent.iter().partition(|(to, _)| *to == worker);
        self.sent = others;
        let mine: Vec<(WorkerId, ToWorker)> = mine;
        mine.into_iter().map(|(_, message)| message).collect()
    }

    fn say(&mut self, from: WorkerId, message: ToKeeper) {
        self.keeper.message(self.now, from, message);
        self.poll();
    }

    fn lock(&mut self, tag: u32, range: FileRange) {
        self.say(A, ToKeeper::Lock(Tag(tag), range));
    }

    fn unlock(&mut self, tag: u32) {
        self.say(A, ToKeeper::Unlock { tag: Tag(tag), wrote_file: true, uncached: false });
    }

    /// The same, and the writes have left nothing in the page cache.
    fn unlock_uncached(&mut self, tag: u32) {
        self.say(A, ToKeeper::Unlock { tag: Tag(tag), wrote_file: true, uncached: true });
    }

    fn need(&mut self, tag: u32, range: FileRange) {
        self.say(A, ToKeeper::NeedMap(Tag(tag), range));
    }

    /// The one park order among the messages for `worker`, which are taken.
    fn park_of(&mut self, worker: WorkerId) -> (ParkId, FileRange, Drain) {
        let parks: Vec<(ParkId, FileRange, Drain)> = self
            .take(worker)
            .into_iter()
            .filter_map(|message| match message {
                ToWorker::Park(id, range, drain) => Some((id, range, drain)),
                _ => None,
            })
            .collect();
        assert_eq!(parks.len(), 1, "{parks:?}");
        parks[0]
    }

    /// `worker` gets a park order and has nothing in flight.
    fn parked(&mut self, worker: WorkerId) -> ParkId {
        let (id, ..) = self.park_of(worker);
        self.say(worker, ToKeeper::Parked(id));
        id
    }

    /// The oldest job ends.
    fn finish(&mut self, done: JobDone) -> Job {
        let (id, job) = self.jobs.pop_front().expect("no job");
        self.keeper.job_done(self.now, id, done);
        self.poll();
        job
    }

    /// The oldest job is a FIEMAP and says that everything asked for is in this state.
    fn map(&mut self, state: State, proof: Proof) -> FileRange {
        let Some((_, Job::Map { range, .. })) = self.jobs.front().copied() else {
            panic!("{:?}", self.jobs)
        };
        self.finish(answer(range, state, proof));
        range
    }

    fn break_lease(&mut self) {
        self.keeper.lease_break(self.now);
        self.poll();
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.keeper.tick(self.now);
        self.poll();
    }

    /// What a worker would see of block `i`; `None`: nothing cached.
    fn seen(&self, i: u64) -> Option<State> {
        let (_, view) = self.shared.latest();
        view.map.lookup(i * BLOCK, &mut Hint::default()).map(|extent| extent.state)
    }

    fn mode(&self) -> Mode {
        self.shared.latest().1.mode
    }
}

#[test]
fn a_break_while_the_helper_takes_the_lease_gives_it_back_whenever_it_was_taken() {
    let mut small = Small::new(|_| ());
    small.break_lease();
    assert_eq!(small.drops, 1);
    small.finish(JobDone::Enter(Ok(())));
    assert_eq!(small.drops, 2, "the lease may have been taken after the first");
    assert!(small.take(A).is_empty() && small.mode() == Mode::Filesystem);
    small.wait(Duration::from_secs(10));
    small.enter();
}

#[test]
fn a_break_while_everybody_is_being_parked_lets_everybody_go() {
    let mut small = Small::new(|_| ());
    small.finish(JobDone::Enter(Ok(())));
    let (park, range, drain) = small.park_of(A);
    assert_eq!((range, drain), (FileRange::ALL, Drain::Everything));
    small.break_lease();
    assert_eq!((small.drops, small.take(A)), (1, vec![ToWorker::Release(park)]));
    // It crossed the release.
    small.say(A, ToKeeper::Parked(park));
    assert!(small.jobs.is_empty() && small.mode() == Mode::Filesystem);
    small.wait(Duration::from_secs(10));
    small.enter();
}

#[test]
fn a_break_while_confirming_is_not_forgotten_when_the_helper_says_yes() {
    let mut small = Small::new(|_| ());
    small.finish(JobDone::Enter(Ok(())));
    let park = small.parked(A);
    small.break_lease();
    assert_eq!((small.drops, small.take(A)), (1, vec![ToWorker::Release(park)]));
    small.break_lease();
    small.finish(JobDone::Confirm(Ok(())));
    assert_eq!((small.mode(), small.drops), (Mode::Filesystem, 1));
    small.wait(Duration::from_secs(10));
    small.enter();
}

#[test]
fn nobody_stays_parked_for_a_helper_that_hangs_while_confirming() {
    let mut small = Small::new(|_| ());
    small.finish(JobDone::Enter(Ok(())));
    let park = small.parked(A);
    assert!(small.keeper.deadline().is_some());
    small.wait(Duration::from_secs(2));
    assert_eq!((small.drops, small.take(A)), (1, vec![ToWorker::Release(park)]));
    small.finish(JobDone::Confirm(Ok(())));
    assert_eq!(small.mode(), Mode::Filesystem);
}

#[test]
fn an_unproven_image_is_opaque_until_a_comparison_says_equal() {
    let mut small = Small::direct(|config| config.proven = false);
    small.need(0, blocks(0, 1));
    let range = small.map(State::Mapped, Proof::None);
    assert_eq!(range, blocks(0, BLOCKS));
    assert_eq!(
        (small.seen(0), small.take(A)),
        (Some(State::Opaque), vec![ToWorker::Retry(Tag(0))])
    );
    small.lock(1, blocks(5, 1));
    small.unlock(1);
    small.map(State::Mapped, Proof::Equal);
    assert_eq!((small.seen(5), small.seen(0)), (Some(State::Mapped), None));
    small.need(2, blocks(0, 1));
    small.map(State::Mapped, Proof::None);
    assert_eq!(small.seen(0), Some(State::Mapped));
}

#[test]
fn a_comparison_that_ends_after_a_break_counts_all_the_same() {
    let mut small = Small::direct(|config| config.proven = false);
    small.need(0, blocks(0, 1));
    small.break_lease();
    small.parked(A);
    assert_eq!((small.drops, small.mode()), (1, Mode::Filesystem));
    // The image says so once and never compares again.
    small.map(State::Mapped, Proof::Equal);
    assert_eq!(small.seen(0), None);
    small.wait(Duration::from_secs(10));
    small.sent.clear();
    small.enter();
    small.need(0, blocks(0, 1));
    small.map(State::Mapped, Proof::None);
    assert_eq!(small.seen(0), Some(State::Mapped));
}

#[test]
fn a_mismatch_ends_direct_mode_for_good() {
    let mut small = Small::direct(|config| config.proven = false);
    small.need(0, blocks(0, 1));
    small.map(State::Mapped, Proof::Different);
    assert_eq!(small.seen(0), None);
    // A break on top of it does not make it a passing one.
    small.break_lease();
    small.parked(A);
    assert_eq!((small.mode(), small.drops), (Mode::Filesystem, 1));
    assert_eq!(small.reports.last(), Some(&Report::Filesystem(Why::Mismatch)));
    assert_eq!(small.keeper.deadline(), None);
}

#[test]
fn an_eviction_waits_for_the_raw_io_there() {
    let mut small = Small::direct(|config| config.max_extents = 300);
    small.need(0, blocks(0, 1));
    small.finish(answer(blocks(0, 256), State::Mapped, Proof::None));
    small.need(1, blocks(256, 1));
    small.take(A);
    small.finish(answer(blocks(256, 256), State::Mapped, Proof::None));
    let (park, range, drain) = small.park_of(A);
    // Down to fifteen sixteenths of 300, in whole leaves: one order, not one for each of them.
    assert_eq!((range, drain), (blocks(0, 232), Drain::Raw));
    assert_eq!(small.seen(0), Some(State::Mapped), "a raw operation is in flight");
    small.say(A, ToKeeper::Parked(park));
    assert_eq!((small.seen(231), small.seen(232)), (None, Some(State::Mapped)));
    assert_eq!(small.take(A), [ToWorker::Release(park)]);
}

#[test]
fn a_request_of_more_extents_than_are_kept_is_loaded_all_the_same() {
    let mut small = Small::direct(|config| config.max_extents = 300);
    small.need(0, blocks(0, BLOCKS));
    for first in [0, 256, 512, 768] {
        assert!(small.take(A).is_empty(), "nothing of it is forgotten before it is used");
        small.finish(answer(blocks(first, 256), State::Mapped, Proof::None));
    }
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(0))]);
    assert!((0..BLOCKS).all(|i| small.seen(i) == Some(State::Mapped)));
    assert!(small.jobs.is_empty());
}

#[test]
fn a_worker_that_joins_while_a_park_stands_is_parked_before_it_begins() {
    let mut small = Small::direct(|_| ());
    small.break_lease();
    let (park, ..) = small.park_of(A);
    small.keeper.worker_joined(B);
    small.poll();
    let orders = small.take(B);
    assert_eq!(orders, [ToWorker::Park(park, FileRange::ALL, Drain::Raw), ToWorker::Begin]);
    small.say(A, ToKeeper::Parked(park));
    assert_eq!((small.drops, small.mode()), (0, Mode::Direct));
    small.say(B, ToKeeper::Parked(park));
    assert_eq!((small.drops, small.mode()), (1, Mode::Filesystem));
    assert_eq!(small.take(B), [ToWorker::Release(park)]);
}

#[test]
fn a_worker_that_joins_while_confirming_waits_and_is_not_waited_for() {
    let mut small = Small::new(|_| ());
    small.finish(JobDone::Enter(Ok(())));
    let park = small.parked(A);
    small.keeper.worker_joined(B);
    small.poll();
    assert!(matches!(small.take(B)[..], [ToWorker::Park(..), ToWorker::Begin]));
    small.finish(JobDone::Confirm(Ok(())));
    assert_eq!((small.mode(), small.take(B)), (Mode::Direct, vec![ToWorker::Release(park)]));
    // Its answer comes late.
    small.say(B, ToKeeper::Parked(park));
    assert!(small.jobs.is_empty());
}

#[test]
fn a_worker_that_leaves_is_not_waited_for() {
    let mut small = Small::direct(|_| ());
    small.keeper.worker_joined(B);
    small.poll();
    small.break_lease();
    small.parked(A);
    assert_eq!(small.drops, 0);
    small.keeper.worker_left(small.now, B);
    small.poll();
    assert_eq!((small.drops, small.mode()), (1, Mode::Filesystem));
}

#[test]
fn a_lock_held_across_a_break_and_back_keeps_its_range_out_of_the_new_map() {
    let mut small = Small::direct(|_| ());
    small.lock(0, blocks(4, 2));
    assert_eq!(small.take(A), [ToWorker::Locked(Tag(0))]);
    small.break_lease();
    small.parked(A);
    small.take(A);
    small.wait(Duration::from_secs(10));
    small.enter();
    // What is loaded around the lock leaves the lock's range out, and nobody loads it.
    small.need(1, blocks(0, 1));
    small.map(State::Mapped, Proof::None);
    assert_eq!(
        (small.seen(3), small.seen(4), small.seen(6)),
        (Some(State::Mapped), None, Some(State::Mapped))
    );
    assert_eq!(small.take(A), [ToWorker::Retry(Tag(1))]);
    small.need(2, blocks(5, 1));
    assert!(small.jobs.is_empty() && small.take(A).is_empty());
    small.unlock(0);
    assert_eq!(small.map(State::Mapped, Proof::None), blocks(4, 2));
    assert_eq!(small.seen(5), Some(State::Mapped));
    assert_eq!(small.take(A), [ToWorker::Settled(Tag(0)), ToWorker::Retry(Tag(2))]);
}

#[test]
fn a_lock_settled_while_direct_mode_ends_leaves_no_hole_behind() {
    let mut small = Small::direct(|_| ());
    small.need(0, blocks(0, 1));
    small.map(State::Hole, Proof::None);
    small.lock(1, blocks(4, 1));
    small.break_lease();
    let (park, ..) = small.park_of(A);
    small.unlock(1);
    // A reader who has not seen the order yet must not answer with zeros what is written.
    assert_eq!((small.seen(4), small.mode()), (None, Mode::Direct));
    assert_eq!(small.take(A), [ToWorker::Settled(Tag(1))]);
    small.say(A, ToKeeper::Parked(park));
    assert_eq!(small.drops, 1);
}

#[test]
fn an_answer_is_not_believed_where_a_lock_was_held_while_it_was_made() {
    let mut small = Small::direct(|_| ());
    small.need(0, blocks(0, 1));
    // Taken and given back while FIEMAP runs: its answer is from before the write.
    small.lock(1, blocks(8, 2));
    small.unlock(1);
    small.map(State::Hole, Proof::None);
    assert_eq!((small.seen(7), small.seen(8), small.seen(9)), (Some(State::Hole), None, None));
    assert_eq!(small.seen(10), Some(State::Hole));
    assert_eq!(small.map(State::Mapped, Proof::None), blocks(8, 2));
    assert_eq!(small.seen(9), Some(State::Mapped));
    // A discard likewise.
    small.keeper.message(small.now, A, ToKeeper::Discard(Tag(2), blocks(8, 1)));
    small.poll();
    small.parked(A);
    small.need(3, blocks(BLOCKS - 1, 1));
    small.finish(JobDone::Punch(Ok(())));
    assert_eq!(small.seen(8), None);
}

#[test]
fn settling_does_not_forget_blocks_that_others_address() {
    let done = [
        JobDone::Map(Err(5)),
        answer(blocks(0, 4), State::Opaque, Proof::None),
        answer(blocks(0, 1), State::Mapped, Proof::None),
    ];
    for done in done {
        let mut small = Small::direct(|_| ());
        small.need(0, blocks(0, 1));
        let mut known = extents(blocks(0, 4), State::Mapped);
        known.remove(2);
        let answer =
            MapAnswer { covered: blocks(0, 8), extents: known.clone(), proof: Proof::None };
        small.finish(JobDone::Map(Ok(answer)));
        assert_eq!((small.seen(2), small.seen(3)), (Some(State::Hole), Some(State::Mapped)));
        small.lock(1, blocks(0, 4));
        small.unlock(1);
        small.finish(done);
        let (_, view) = small.shared.latest();
        let mapped = view.map.iter().filter(|e| e.state == State::Mapped);
        assert_eq!(mapped.collect::<Vec<Extent>>(), known);
        assert_ne!(small.seen(2), Some(State::Hole));
    }
}

#[test]
fn without_barriers_a_metadata_commit_is_followed_by_a_device_flush() {
    let mut small = Small::direct(|config| config.barriers = false);
    let reached = |id, file| ToKeeper::PointReached { id: PointId(id), raw: None, file };
    for (id, written) in [(1, false), (2, true), (3, false)] {
        small.say(A, ToKeeper::Flush(Tag(0)));
        small.say(A, reached(id, written));
        if id == 3 {
            assert_eq!(small.take(A)[1..], [ToWorker::Flushed(Tag(0), 0)], "nothing is dirty");
            continue;
        }
        let sync = ToWorker::Sync { image: true, device: Some(DeviceOffset(0)) };
        assert_eq!(small.take(A)[1..], [sync]);
        small.say(A, ToKeeper::Synced(0));
        small.take(A);
    }
}

#[test]
fn a_flush_counts_what_a_worker_wrote_that_left_while_it_drained() {
    let mut small = Small::direct(|_| ());
    small.keeper.worker_joined(B);
    small.poll();
    small.take(B);
    // Whatever a predecessor left is flushed.
    small.say(A, ToKeeper::Flush(Tag(0)));
    let reached = |id| ToKeeper::PointReached { id: PointId(id), raw: None, file: false };
    small.say(A, reached(1));
    small.say(B, reached(1));
    assert_eq!(small.take(A)[1..], [ToWorker::Sync { image: true, device: None }]);
    small.say(A, ToKeeper::Synced(0));
    small.take(A);
    small.take(B);

    let place = Some(DeviceOffset(4096));
    small.say(A, ToKeeper::Flush(Tag(1)));
    small.say(A, reached(2));
    assert_eq!(small.take(A), [ToWorker::Point(PointId(2))]);
    small.shared.stir();
    small.say(B, ToKeeper::Still { raw: place, file: false });
    small.keeper.worker_left(small.now, B);
    small.poll();
    assert_eq!(small.take(A), [ToWorker::Sync { image: false, device: place }]);
    small.say(A, ToKeeper::Synced(0));
    assert_eq!(small.take(A), [ToWorker::Flushed(Tag(1), 0)]);

    // Nothing else is dirty: the next one costs nothing.
    small.say(A, ToKeeper::Flush(Tag(2)));
    small.say(A, reached(3));
    assert_eq!(small.take(A)[1..], [ToWorker::Flushed(Tag(2), 0)]);
}

#[test]
fn a_flush_asks_nobody_while_nothing_is_being_written() {
    let mut small = Small::direct(|_| ());
    small.keeper.worker_joined(B);
    small.poll();
    small.take(B);
    small.shared.calm();
    // Whatever a predecessor left is flushed.
    small.say(A, ToKeeper::Flush(Tag(0)));
    assert_eq!(small.take(A), [ToWorker::Sync { image: true, device: None }]);
    // Who asks meanwhile has to wait for what was begun since.
    small.shared.stir();
    small.say(B, ToKeeper::Flush(Tag(1)));
    assert!(small.take(B).is_empty());
    small.say(A, ToKeeper::Synced(0));
    let point = ToWorker::Point(PointId(1));
    assert_eq!(small.take(A), [ToWorker::Flushed(Tag(0), 0), point]);
    assert_eq!(small.take(B), [point]);
    let reached = ToKeeper::PointReached { id: PointId(1), raw: None, file: false };
    small.say(B, reached);
    small.say(A, reached);
    assert_eq!(small.take(B), [ToWorker::Flushed(Tag(1), 0)]);
    // What the last one wrote counts, though it was told without a point.
    let place = Some(DeviceOffset(4096));
    small.say(A, ToKeeper::Still { raw: place, file: false });
    small.say(B, ToKeeper::Flush(Tag(2)));
    assert_eq!(small.take(B), [ToWorker::Sync { image: false, device: place }]);
    small.say(B, ToKeeper::Synced(0));
    assert_eq!(small.take(B), [ToWorker::Flushed(Tag(2), 0)]);
    assert!(small.take(A).is_empty());
}

#[test]
fn a_flush_whose_asker_left_makes_room_for_the_next() {
    let mut small = Small::direct(|_| ());
    small.keeper.worker_joined(B);
    small.say(B, ToKeeper::Flush(Tag(0)));
    small.say(A, ToKeeper::Flush(Tag(1)));
    small.sent.clear();
    small.keeper.worker_left(small.now, B);
    // The first point is still owed by A; B is gone, and so is the first flush with A's answer.
    let reached = |id| ToKeeper::PointReached { id: PointId(id), raw: None, file: false };
    small.say(A, reached(1));
    small.say(A, reached(2));
    let sync = ToWorker::Sync { image: true, device: None };
    assert_eq!(small.take(A), [ToWorker::Point(PointId(2)), sync]);
    small.say(A, ToKeeper::Synced(0));
    assert_eq!(small.take(A), [ToWorker::Flushed(Tag(1), 0)]);
}

#[test]
fn a_flush_whose_syncing_worker_left_is_synced_by_another() {
    let mut small = Small::direct(|_| ());
    small.keeper.worker_joined(B);
    small.poll();
    let reached = |id| ToKeeper::PointReached { id: PointId(id), raw: None, file: false };
    small.say(A, ToKeeper::Flush(Tag(0)));
    small.say(A, reached(1));
    small.say(B, reached(1));
    let sync = ToWorker::Sync { image: true, device: None };
    assert_eq!(small.take(A)[1..], [sync]);
    small.say(B, ToKeeper::Flush(Tag(1)));
    small.take(B);
    // Its frontend is gone, and with it the one that waited: it has not begun to sync.
    small.shared.stir();
    small.say(A, ToKeeper::Still { raw: None, file: false });
    small.keeper.worker_left(small.now, A);
    small.poll();
    assert_eq!(small.take(B), [ToWorker::Point(PointId(2))]);
    small.say(B, reached(2));
    // What A was to make durable still has to be.
    assert_eq!(small.take(B), [sync]);
    small.say(B, ToKeeper::Synced(0));
    assert_eq!(small.take(B), [ToWorker::Flushed(Tag(1), 0)]);
}

#[test]
fn flushes_that_come_meanwhile_share_the_next_sync() {
    for strict in [false, true] {
        let mut small = Small::direct(|config| config.strict = strict);
        let reached = |id| ToKeeper::PointReached {
            id: PointId(id),
            raw: Some(DeviceOffset(4096)),
            file: false,
        };
        (0..4).for_each(|tag| small.say(A, ToKeeper::Flush(Tag(tag))));
        let mut groups = Vec::new();
        for point in 1..5 {
            small.say(A, reached(point));
            small.say(A, ToKeeper::Synced(0));
            let flushed = small.take(A).into_iter().filter_map(|message| match message {
                ToWorker::Flushed(Tag(tag), 0) => Some(tag),
                _ => None,
            });
            groups.push(flushed.collect::<Vec<_>>());
        }
        let expected: [&[u32]; 4] =
            if strict { [&[0], &[1], &[2], &[3]] } else { [&[0], &[1, 2, 3], &[], &[]] };
        assert_eq!(groups, expected, "strict: {strict}");
    }
}

#[test]
fn a_write_lost_before_direct_mode_fails_the_flushes_until_reset() {
    let mut small = Small::new(|_| ());
    small.finish(JobDone::Enter(Err(Refusal::Unsynced(5))));
    let refused = Report::Refused(Refusal::Unsynced(5));
    assert_eq!(small.reports, [Report::FlushFailed(5), refused]);
    small.say(A, ToKeeper::Flush(Tag(0)));
    assert_eq!(small.take(A), [ToWorker::Flushed(Tag(0), 5)]);
    small.keeper.device_reset();
    small.say(A, ToKeeper::Flush(Tag(1)));
    assert_eq!(small.take(A), [ToWorker::Point(PointId(1))]);
}

#[test]
fn blocks_lost_behind_us_end_direct_mode_for_a_while_and_the_map_for_good() {
    let mut small = Small::direct(|_| ());
    small.need(0, blocks(0, 1));
    small.map(State::Mapped, Proof::Equal);
    small.take(A);
    assert_eq!(small.seen(0), Some(State::Mapped));
    small.keeper.blocks_lost(small.now);
    small.poll();
    let (id, range, drain) = small.park_of(A);
    assert_eq!((range, drain, small.drops), (FileRange::ALL, Drain::Raw, 0));
    small.say(A, ToKeeper::Parked(id));
    assert_eq!((small.drops, small.mode(), small.seen(0)), (1, Mode::Filesystem, None));
    assert_eq!(small.reports.pop(), Some(Report::Filesystem(Why::BlocksLost)));
    small.take(A);
    small.wait(Duration::from_secs(60));
    small.enter();
    assert_eq!(small.seen(0), None);
}

#[test]
fn a_discard_of_no_whole_block_is_done_at_once() {
    let mut small = Small::direct(|_| ());
    small.say(A, ToKeeper::Discard(Tag(0), FileRange::new(512, BLOCK + 512)));
    assert_eq!(small.take(A), [ToWorker::Discarded(Tag(0), 0)]);
    assert!(small.jobs.is_empty());
}

#[test]
fn shutting_down_gives_the_lease_back_in_every_state_and_it_stays_so() {
    fn stop(small: &mut Small) {
        small.keeper.shut_down(small.now);
        small.poll();
    }
    fn check(small: &mut Small) {
        assert!(small.drops >= 1);
        small.wait(Duration::from_secs(60));
        assert!(small.jobs.is_empty() && small.mode() == Mode::Filesystem);
        assert_eq!(small.keeper.deadline(), None);
    }
    // Entering: the helper may take the lease after it was dropped.
    let mut small = Small::new(|_| ());
    stop(&mut small);
    let drops = small.drops;
    small.finish(JobDone::Enter(Ok(())));
    assert_eq!(small.drops, drops + 1);
    check(&mut small);
    // Gathering.
    let mut small = Small::new(|_| ());
    small.finish(JobDone::Enter(Ok(())));
    let (park, ..) = small.park_of(A);
    stop(&mut small);
    assert_eq!(small.take(A), [ToWorker::Release(park)]);
    small.say(A, ToKeeper::Parked(park));
    check(&mut small);
    // Confirming.
    let mut small = Small::new(|_| ());
    small.finish(JobDone::Enter(Ok(())));
    let park = small.parked(A);
    stop(&mut small);
    assert_eq!(small.take(A), [ToWorker::Release(park)]);
    small.finish(JobDone::Confirm(Ok(())));
    check(&mut small);
    // Waiting for another try.
    let mut small = Small::new(|_| ());
    small.finish(JobDone::Enter(Err(Refusal::Busy)));
    stop(&mut small);
    check(&mut small);
    // Direct, with raw I/O in flight, and a break on top of it.
    let mut small = Small::direct(|_| ());
    stop(&mut small);
    let (park, ..) = small.park_of(A);
    small.break_lease();
    assert_eq!(small.drops, 0);
    small.say(A, ToKeeper::Parked(park));
    check(&mut small);
    // Leaving.
    let mut small = Small::direct(|_| ());
    small.break_lease();
    stop(&mut small);
    small.parked(A);
    check(&mut small);
}

#[path = "populate_tests.rs"]
mod populate;

#[path = "forget_tests.rs"]
mod forget;

#[path = "tail_tests.rs"]
mod tail;

/// R2b: what is reported of a break that takes long, whatever made direct mode end before or after.
#[test]
fn a_break_is_reported_as_forced_when_its_own_time_is_over() {
    let forced =
        |small: &Small| small.reports.iter().filter(|r| **r == Report::ForcedBreak).count();
    let at = |small: &mut Small, seconds: u64| {
        let now = Duration::from_secs(seconds);
        while small.keeper.deadline().is_some_and(|at| at <= now) {
            let deadline = small.keeper.deadline().unwrap();
            small.keeper.tick(deadline);
        }
        small.poll();
    };
    // The lease was lost for another reason, or the end was asked for, while the opener waits.
    for other in [Why::LeaseLost, Why::Stopping] {
        let mut small = Small::direct(|_| ());
        small.keeper.lease_break(Duration::from_secs(1));
        match other {
            Why::Stopping => small.keeper.shut_down(Duration::from_secs(2)),
            _ => small.keeper.message(Duration::from_secs(2), A, ToKeeper::LeaseLost),
        }
        at(&mut small, 40);
        assert_eq!(forced(&small), 0, "{other:?}");
        at(&mut small, 42);
        assert_eq!(forced(&small), 1, "{other:?}");
        assert_eq!(small.keeper.snapshot().forced_breaks, 1);
    }
    // Nobody waits for the lease: nobody is let in.
    let mut small = Small::direct(|_| ());
    small.keeper.size_changed(Duration::from_secs(1));
    at(&mut small, 100);
    assert_eq!(forced(&small), 0);
    // Somebody comes late.
    small.keeper.lease_break(Duration::from_secs(100));
    at(&mut small, 139);
    assert_eq!(forced(&small), 0);
    at(&mut small, 141);
    assert_eq!(forced(&small), 1);
}
