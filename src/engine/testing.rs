// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A world of one worker, one keeper and a filesystem of a few blocks, for unit tests: everything
//! happens at once and in order unless a test holds it back. The simulator is the thorough one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use super::counters::Counters;
use super::extent::{Extent, State};
use super::io::{Buf, Completion, Io, Op, OpId, Tag, Target};
use super::keeper::{Keeper, KeeperConfig, Start};
use super::message::{Action, Job, JobDone, JobId, MapAnswer, Proof, Report, WorkerId};
use super::request::{Kind, Request, Status};
use super::shared::Shared;
use super::units::{DeviceOffset, FileRange};
use super::{Geometry, Rules, Worker};

pub(super) const BLOCK: u64 = 4096;
pub(super) const BLOCKS: u64 = 16;
/// Block `i` of the file lies at block `PLACE + 2 i` of the device once it is allocated.
const PLACE: u64 = 3;

pub(super) fn range(first: u64, count: u64) -> FileRange {
    FileRange::new(first * BLOCK, (first + count) * BLOCK)
}

/// Device, file and guest memory. `hold` keeps completions back.
pub(super) struct World {
    pub(super) states: Vec<State>,
    pub(super) device: Vec<u8>,
    pub(super) guest: BTreeMap<Tag, Vec<u8>>,
    bounce: Vec<Vec<u8>>,
    pub(super) ops: VecDeque<(OpId, Op)>,
    pub(super) log: Vec<Op>,
    pub(super) hold: bool,
    pub(super) lease: bool,
    pub(super) clock: Duration,
    pub(super) results: VecDeque<i32>,
    /// Operations on this are not finished for now.
    pub(super) slow: Option<Target>,
    /// Zeroing by reference works; so does punching.
    pub(super) zeroes: bool,
    pub(super) punches: bool,
    /// Pages of the file stay in the cache: FIEMAP's answers say opaque (R10a).
    pub(super) cached: bool,
}

impl World {
    fn place(&self, at: u64) -> usize {
        ((PLACE + at / BLOCK * 2) * BLOCK + at % BLOCK) as usize
    }

    pub(super) fn device_place(&self, at: u64) -> Target {
        Target::Device(DeviceOffset(self.place(at) as u64))
    }

    /// R10a: no raw write and file write in one block at a time.
    fn check_apart(&self, op: Op) {
        let block = |op: Op| match op {
            Op::Write(Target::Image(at), buf) => {
                Some((false, at / BLOCK, (at + u64::from(buf.len()) - 1) / BLOCK))
            }
            // One block of the file is one block of the device here, with a stranger's between.
            Op::Write(Target::Device(at), _) => {
                let block = (at.0 / BLOCK - PLACE) / 2;
                Some((true, block, block))
            }
            _ => None,
        };
        let Some((raw, first, last)) = block(op) else { return };
        for (other_raw, from, to) in self.ops.iter().filter_map(|(_, op)| block(*op)) {
            let meet = first <= to && from <= last;
            assert!(raw == other_raw || !meet, "raw and file writes meet in a block: {op:?}");
        }
    }

    fn bytes(&mut self, buf: Buf) -> &mut [u8] {
        match buf {
            Buf::Guest { tag, at, len } => {
                let at = at as usize;
                &mut self.guest.get_mut(&tag).unwrap()[at..at + len as usize]
            }
            Buf::Bounce { slot, at, len } => {
                &mut self.bounce[slot.0 as usize][at as usize..(at + len) as usize]
            }
        }
    }

    pub(super) fn file_byte(&self, at: u64) -> u8 {
        match self.states[(at / BLOCK) as usize] {
            State::Hole | State::Unwritten => 0,
            _ => self.device[self.place(at)],
        }
    }

    fn perform(&mut self, op: Op) -> i32 {
        match op {
            Op::Read(Target::Device(at), buf) => {
                let data = self.device[at.0 as usize..][..buf.len() as usize].to_vec();
                self.bytes(buf).copy_from_slice(&data);
            }
            Op::Write(Target::Device(at), buf) => {
                let data = self.bytes(buf).to_vec();
                self.device[at.0 as usize..][..data.len()].copy_from_slice(&data);
            }
            Op::Read(Target::Image(at), buf) => {
                let data: Vec<u8> =
                    (at..at + u64::from(buf.len())).map(|at| self.file_byte(at)).collect();
                self.bytes(buf).copy_from_slice(&data);
            }
            Op::Write(Target::Image(at), buf) => {
                assert!(at % BLOCK == 0 && u64::from(buf.len()) % BLOCK == 0, "R10a: {op:?}");
                let data = self.bytes(buf).to_vec();
                for (at, byte) in (at..).zip(data) {
                    self.states[(at / BLOCK) as usize] = State::Mapped;
                    let place = self.place(at);
                    self.device[place] = byte;
                }
            }
            Op::Zeroes(..) if !self.zeroes => return -95,
            Op::Zeroes(Target::Device(at), len) => {
                self.device[at.0 as usize..][..len as usize].fill(0);
            }
            Op::Zeroes(Target::Image(at), len) => {
                assert!(at % BLOCK == 0 && u64::from(len) % BLOCK == 0, "whole blocks: {op:?}");
                for block in at / BLOCK..(at + u64::from(len)) / BLOCK {
                    self.states[block as usize] = State::Unwritten;
                }
            }
            Op::SyncImage | Op::SyncDevice(..) => return 0,
            Op::Zero(_) | Op::Copy { .. } | Op::ConfirmLease | Op::CachedPages(_) => unreachable!(),
        }
        match op {
            Op::Read(_, buf) | Op::Write(_, buf) => buf.len() as i32,
            _ => 0,
        }
    }
}

impl Io for World {
    fn submit(&mut self, id: OpId, op: Op) -> Poll<i32> {
        match op {
            Op::Zero(buf) => self.bytes(buf).fill(0),
            Op::Copy { from, to } => {
                let data = self.bytes(from).to_vec();
                self.bytes(to).copy_from_slice(&data);
            }
            Op::ConfirmLease => return Poll::Ready(i32::from(self.lease)),
            Op::CachedPages(_) => return Poll::Ready(i32::from(self.cached)),
            _ => {
                self.check_apart(op);
                self.log.push(op);
                self.ops.push_back((id, op));
                return Poll::Pending;
            }
        }
        Poll::Ready(0)
    }

    fn reap(&mut self) -> Option<Completion> {
        if self.hold {
            return None;
        }
        let target = |op: &Op| match op {
            Op::Read(target, _) | Op::Write(target, _) => Some(*target),
            _ => None,
        };
        let free = |(_, op): &(OpId, Op)| self.slow.is_none() || target(op) != self.slow;
        let index = self.ops.iter().position(free)?;
        let (id, op) = self.ops.remove(index)?;
        let result = self.results.pop_front().unwrap_or_else(|| self.perform(op));
        Some(Completion { id, result })
    }

    fn now(&self) -> Duration {
        self.clock
    }
}

/// The pieces together.
pub(super) struct Rig {
    pub(super) world: World,
    pub(super) worker: Worker,
    pub(super) keeper: Keeper,
    pub(super) done: BTreeMap<Tag, Status>,
    pub(super) reports: Vec<Report>,
    pub(super) jobs: VecDeque<(JobId, Job)>,
    pub(super) hold_jobs: bool,
    next: u32,
}

const WORKER: WorkerId = WorkerId(7);

impl Rig {
    pub(super) fn new(states: [State; BLOCKS as usize], start: Start) -> Self {
        Self::with(states, start, |_| ())
    }

    pub(super) fn with(
        states: [State; BLOCKS as usize],
        start: Start,
        change: impl FnOnce(&mut KeeperConfig),
    ) -> Self {
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
            start,
            window: FileRange::new(0, geometry.file_size),
            max_extents: 1000,
            populate: false,
            lease_break_time: Duration::from_secs(40),
            proven: true,
            barriers: true,
            strict: false,
            rules: Rules::default(),
        };
        change(&mut config);
        let geometry = config.geometry;
        let shared = Arc::new(Shared::new());
        let counters = Arc::new(Counters::default());
        let mut rig = Self {
            world: World {
                states: states.to_vec(),
                device: (0..(PLACE + BLOCKS * 2) * BLOCK).map(|i| (i % 251) as u8).collect(),
                guest: BTreeMap::new(),
                bounce: vec![vec![0; 8192]; 2],
                ops: VecDeque::new(),
                log: Vec::new(),
                hold: false,
                lease: false,
                clock: Duration::ZERO,
                results: VecDeque::new(),
                slow: None,
                zeroes: true,
                punches: true,
                cached: false,
            },
            worker: Worker::new(geometry, Rules::default(), shared.clone(), counters, 32),
            keeper: Keeper::new(config, shared, Duration::ZERO),
            done: BTreeMap::new(),
            reports: Vec::new(),
            jobs: VecDeque::new(),
            hold_jobs: false,
            next: 0,
        };
        rig.keeper.worker_joined(WORKER);
        rig.run();
        rig
    }

    fn map(&self, range: FileRange) -> MapAnswer {
        let extents = (range.start / BLOCK..(range.end / BLOCK).min(BLOCKS))
            .filter(|i| self.world.states[*i as usize] != State::Hole)
            .map(|i| Extent {
                range: self::range(i, 1),
                device: DeviceOffset((PLACE + i * 2) * BLOCK),
                state: if self.world.cached {
                    State::Opaque
                } else {
                    self.world.states[i as usize]
                },
            })
            .collect();
        MapAnswer { covered: range, extents, proof: Proof::None }
    }

    fn job(&mut self, job: Job) -> JobDone {
        match job {
            Job::Map { range, .. } => JobDone::Map(Ok(self.map(range))),
            Job::Enter => {
                self.world.lease = true;
                JobDone::Enter(Ok(()))
            }
            Job::Confirm => JobDone::Confirm(Ok(())),
            Job::Punch { .. } if !self.world.punches => JobDone::Punch(Err(95)),
            Job::Punch { range } => {
                for i in range.start / BLOCK..range.end / BLOCK {
                    self.world.states[i as usize] = State::Hole;
                }
                JobDone::Punch(Ok(()))
            }
        }
    }

    /// Runs until nothing moves.
    pub(super) fn run(&mut self) {
        loop {
            self.worker.reap(&mut self.world);
            while let Some((tag, status)) = self.worker.poll_done() {
                assert!(self.done.insert(tag, status).is_none(), "{tag:?} answered twice");
            }
            let now = self.world.clock;
            let mut moved = false;
            while let Some(message) = self.worker.poll_message() {
                self.keeper.message(now, WORKER, message);
                moved = true;
            }
            while let Some(action) = self.keeper.poll_action() {
                moved = true;
                match action {
                    Action::Send(_, message) => self.worker.message(&mut self.world, message),
                    Action::Run(id, job) => self.jobs.push_back((id, job)),
                    Action::DropLease => {
                        let raw = |(_, op): &(OpId, Op)| {
                            matches!(
                                op,
                                Op::Read(Target::Device(_), _) | Op::Write(Target::Device(_), _)
                            )
                        };
                        assert!(!self.world.ops.iter().any(raw), "lease dropped under raw I/O");
                        self.world.lease = false;
                    }
                    Action::Report(report) => self.reports.push(report),
                    Action::Touch => {}
                }
            }
            if !self.hold_jobs
                && let Some((id, job)) = self.jobs.pop_front()
            {
                let done = self.job(job);
                self.keeper.job_done(now, id, done);
                moved = true;
            }
            let stuck = self.world.hold
                || self.world.ops.is_empty()
                || (self.world.slow.is_some() && self.world.ops.len() == 1);
            if !moved && stuck {
                return;
            }
        }
    }

    /// Lets time pass, and the keeper know.
    pub(super) fn wait(&mut self, time: Duration) {
        self.world.clock += time;
        while self.keeper.deadline().is_some_and(|at| at <= self.world.clock) {
            self.keeper.tick(self.world.clock);
            self.run();
        }
    }

    pub(super) fn start(&mut self, kind: Kind, data: Vec<u8>) -> Tag {
        let tag = Tag(self.next);
        self.next += 1;
        self.world.guest.insert(tag, data);
        self.worker.accept(&mut self.world, tag, Request { kind, mem_aligned: true });
        self.run();
        tag
    }

    pub(super) fn write(&mut self, range: FileRange, byte: u8) -> Tag {
        self.start(Kind::Write(range), vec![byte; range.len() as usize])
    }

    pub(super) fn read(&mut self, range: FileRange) -> Vec<u8> {
        let tag = self.start(Kind::Read(range), vec![0xEE; range.len() as usize]);
        assert_eq!(self.done.get(&tag), Some(&Status::Ok));
        self.world.guest[&tag].clone()
    }

    pub(super) fn raw_ops(&self) -> usize {
        let raw = |op: &&Op| {
            matches!(op, Op::Read(Target::Device(_), _) | Op::Write(Target::Device(_), _))
        };
        self.world.log.iter().filter(raw).count()
    }
}
