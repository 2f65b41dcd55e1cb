// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The keeper: the one owner of an image's mode, extent map and layout.
//!
//! Everything that could make a cached address wrong goes through here, one event at a time:
//! `ownership` takes and gives up the lease, `mapping` loads and forgets extents and settles file
//! writes, `layout` locks ranges, parks workers and punches, the barrier makes things durable.

mod config;
mod layout;
mod mapping;
mod ownership;
mod populate;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::barrier::{Dirt, GroupCommit, Step};
use super::extent::{Extent, ExtentMap, State};
use super::locks::{Owner, RangeLocks};
use super::message::{
    Action, Job, JobDone, JobId, ParkId, Report, ToKeeper, ToWorker, Why, WorkerId,
};
use super::shared::{Mode, Shared, View};
use super::units::{DeviceOffset, FileRange};

pub use config::{KeeperConfig, Lease, Snapshot, Start};
use layout::{Park, Purpose};
use mapping::{Query, Want};
use ownership::Ownership;
use populate::Population;

/// Numbers for `status`.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    fiemap_calls: u64,
    evictions: u64,
    lease_breaks: u64,
    forced_breaks: u64,
    flush_requests: u64,
    device_flushes: u64,
    metadata_commits: u64,
}

/// The image's one owner of mode, map and layout. See the [module](self).
#[derive(Debug)]
pub struct Keeper {
    config: KeeperConfig,
    shared: Arc<Shared>,
    workers: BTreeSet<WorkerId>,
    actions: VecDeque<Action>,
    counts: Counts,
    /// R6: raw and file reads were seen equal.
    proven: bool,

    ownership: Ownership,
    why: Why,
    /// Breaks in a row, for the backoff.
    breaks: u32,
    /// Attempts in a row that were refused, likewise.
    refusals: u32,
    /// When direct mode last began.
    direct_since: Duration,

    map: ExtentMap,
    /// The mode to publish the map with, if the workers' view is older.
    unpublished: Option<Mode>,
    /// Answers to FIEMAPs that are older than this epoch are not inserted.
    epoch: u64,
    queries: BTreeMap<JobId, Query>,
    wants: VecDeque<Want>,
    population: Population,

    locks: RangeLocks<Purpose>,
    parks: BTreeMap<ParkId, Park>,
    punches: BTreeMap<JobId, layout::Punch>,
    /// What each discard that holds or waits for a lock gives back.
    punch_ranges: BTreeMap<Owner, FileRange>,
    next_id: u64,

    commit: GroupCommit,
    /// The workers have a flush point and wait to hear that it is passed (`--barrier=strict`).
    fenced: bool,
    /// R4: when the image's mtime is due; `None`: nothing was written raw.
    touch_at: Option<Duration>,
}

impl Keeper {
    /// Starts; the first actions are there at once.
    #[must_use]
    pub fn new(config: KeeperConfig, shared: Arc<Shared>, now: Duration) -> Self {
        let identity = config.start == Start::Identity;
        // R14: a killed predecessor may have left anything unflushed.
        let dirt = Dirt { metadata: !identity, device: identity.then_some(DeviceOffset(0)) };
        let mut keeper = Self {
            config,
            shared,
            workers: BTreeSet::new(),
            actions: VecDeque::new(),
            counts: Counts::default(),
            proven: config.proven,
            ownership: Ownership::Final,
            why: Why::Starting,
            breaks: 0,
            refusals: 0,
            direct_since: now,
            map: ExtentMap::new(),
            unpublished: None,
            epoch: 0,
            queries: BTreeMap::new(),
            wants: VecDeque::new(),
            population: Population::default(),
            locks: RangeLocks::default(),
            parks: BTreeMap::new(),
            punches: BTreeMap::new(),
            punch_ranges: BTreeMap::new(),
            next_id: 0,
            commit: GroupCommit::new(dirt).alone(config.strict),
            fenced: false,
            touch_at: None,
        };
        match config.start {
            Start::Eligible => keeper.enter(),
            Start::Filesystem => {
                keeper.why = Why::NotEligible;
                keeper.report(Report::Filesystem(Why::NotEligible));
            }
            Start::Identity => keeper.own_device(),
        }
        keeper
    }

    /// A worker has started. It takes requests on when it gets [`ToWorker::Begin`], behind the
    /// park orders that stand.
    pub fn worker_joined(&mut self, id: WorkerId) {
        self.workers.insert(id);
        let standing = self.parks.iter_mut().filter(|_| self.config.rules.join_quiesced);
        let orders: Vec<ToWorker> = standing.map(|(park, order)| order.join(*park, id)).collect();
        for order in orders {
            self.send(id, order);
        }
        self.send(id, ToWorker::Begin);
    }

    /// A worker has ended, with nothing in flight.
    pub fn worker_left(&mut self, now: Duration, id: WorkerId) {
        self.workers.remove(&id);
        self.wants.retain(|want| want.owner.0 != id);
        let step = self.commit.left(id).or_else(|| self.start_flush());
        self.flush_step(step);
        let ids: Vec<ParkId> = self.parks.keys().copied().collect();
        for park in ids {
            self.parked(now, id, park);
        }
    }

    /// A message from a worker.
    pub fn message(&mut self, now: Duration, from: WorkerId, message: ToKeeper) {
        match message {
            ToKeeper::NeedMap(tag, range) => self.want(Want { owner: (from, tag), range }),
            ToKeeper::Lock(tag, range) => self.lock((from, tag), range, Purpose::Write),
            ToKeeper::Unlock { tag, wrote_file, uncached } => {
                self.unlock(now, (from, tag), wrote_file, uncached);
            }
            ToKeeper::Discard(tag, range) => self.discard((from, tag), range),
            ToKeeper::Flush(tag) => {
                self.counts.flush_requests += 1;
                let workers = self.to_drain();
                let step = self.commit.ask((from, tag), &workers);
                self.flush_step(step);
            }
            ToKeeper::Parked(id) => self.parked(now, from, id),
            ToKeeper::PointReached { id, raw, file } => {
                self.commit.soil(Dirt { metadata: file, device: raw });
                // Nobody may wait for it any more; then it is the next group's turn.
                let step = self.commit.reached(from, id);
                let step = step.or_else(|| self.start_flush());
                self.flush_step(step);
            }
            ToKeeper::Still { raw, file } => {
                self.commit.soil(Dirt { metadata: file, device: raw });
                self.shared.calm();
            }
            ToKeeper::Synced(errno) => {
                if errno != 0 {
                    self.report(Report::FlushFailed(errno));
                }
                let step = self.commit.synced(errno);
                self.flush_step(step);
            }
            ToKeeper::LeaseLost => self.leave(now, Why::LeaseLost),
            ToKeeper::Dirty => {
                self.touch_at = self.touch_at.or(Some(now + Duration::from_secs(1)));
            }
        }
    }

    /// A job ended.
    pub fn job_done(&mut self, now: Duration, id: JobId, done: JobDone) {
        match done {
            JobDone::Map(answer) => self.mapped(now, id, answer),
            JobDone::Enter(result) => self.entered(now, id, result),
            JobDone::Confirm(result) => self.confirmed(now, id, result),
            JobDone::Punch(result) => self.punched(id, result),
        }
    }

    /// The device was reset or a new session begins: an old flush error is forgotten (R16).
    pub fn device_reset(&mut self) {
        self.commit.reset();
    }

    /// The time of [`deadline`](Self::deadline) has come.
    pub fn tick(&mut self, now: Duration) {
        if self.touch_at.is_some_and(|at| at <= now) {
            self.touch();
        }
        self.ownership_tick(now);
    }

    /// When [`tick`](Self::tick) wants to be called, in the clock of `now`; `None`: not at all.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        [self.touch_at, self.ownership.deadline()].into_iter().flatten().min()
    }

    /// The next thing to do. What has changed since the last one is published first: a view goes out before the message that depends
    /// on it, and once for all that was heard in one go.
    pub fn poll_action(&mut self) -> Option<Action> {
        if let Some(mode) = self.unpublished.take() {
            self.shared.publish(View { mode, map: self.map.clone() });
        }
        self.actions.pop_front()
    }

    /// For `status`.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let counts = self.counts;
        Snapshot {
            direct: self.direct(),
            why: self.why,
            lease: self.ownership.lease(),
            cached: self.map.len(),
            mapped_bytes: self.map.mapped_bytes(),
            fiemap_calls: counts.fiemap_calls,
            evictions: counts.evictions,
            lease_breaks: counts.lease_breaks,
            forced_breaks: counts.forced_breaks,
            flush_requests: counts.flush_requests,
            device_flushes: counts.device_flushes,
            metadata_commits: counts.metadata_commits,
            flush_error: self.commit.failed(),
        }
    }

    /// The map as far as it is cached, for `extentctl map`.
    #[must_use]
    pub const fn map(&self) -> &ExtentMap {
        &self.map
    }

    fn send(&mut self, to: WorkerId, message: ToWorker) {
        self.actions.push_back(Action::Send(to, message));
    }

    fn report(&mut self, report: Report) {
        self.actions.push_back(Action::Report(report));
    }

    fn run(&mut self, job: Job) -> JobId {
        self.next_id += 1;
        let id = JobId(self.next_id);
        self.actions.push_back(Action::Run(id, job));
        id
    }

    /// Has the workers see the map as it is when they hear of anything next.
    const fn publish(&mut self, mode: Mode) {
        self.unpublished = Some(mode);
    }

    /// R6a: nothing but us allocates on a device opened exclusively.
    fn own_device(&mut self) {
        let range = FileRange::new(0, self.config.geometry.file_size);
        let all = Extent { range, device: DeviceOffset(0), state: State::Mapped };
        self.map.replace(range, &[all]);
        self.ownership = Ownership::Device;
        self.publish(Mode::Direct);
        self.report(Report::Direct);
    }

    fn direct(&self) -> bool {
        matches!(self.ownership, Ownership::Direct | Ownership::Device)
    }

    /// Forgets a range, for the workers too: before anybody is told that it has changed. A block
    /// device's addresses never change.
    fn forget(&mut self, range: FileRange) {
        if matches!(self.ownership, Ownership::Direct | Ownership::Leaving { .. }) {
            self.map.remove(range);
            self.publish(Mode::Direct);
            self.miss(range);
        }
    }

    fn touch(&mut self) {
        self.touch_at = None;
        self.actions.push_back(Action::Touch);
        for worker in self.workers.clone() {
            self.send(worker, ToWorker::Touched);
        }
    }

    /// The workers that a flush has to wait for: none, if no worker has begun to write anything that the keeper does not know to
    /// have ended. A write that ended before the flush was asked for was counted before it began, so it is seen here.
    /// With `--barrier=strict` the point also holds back what comes later, everywhere.
    fn to_drain(&self) -> BTreeSet<WorkerId> {
        let nobody = self.shared.is_calm() && !self.config.strict;
        if nobody { BTreeSet::new() } else { self.workers.clone() }
    }

    fn start_flush(&mut self) -> Option<Step> {
        let workers = self.to_drain();
        self.commit.start(&workers)
    }

    fn flush_step(&mut self, step: Option<Step>) {
        let mut next = step;
        while let Some(step) = next.take() {
            match step {
                Step::Point(id, workers) => {
                    // First: this flush waits for what the one before it held back.
                    self.pass();
                    self.fenced = self.config.strict;
                    for worker in workers {
                        self.send(worker, ToWorker::Point(id));
                    }
                }
                Step::Sync(worker, dirt) => {
                    let image = dirt.metadata && self.config.rules.metadata_sync;
                    // R14: what file writes left in the device's cache no filesystem without barriers flushes.
                    // Any place will do, and at the first block there is next to nothing to write back.
                    let unflushed = dirt.metadata && !self.config.barriers;
                    let device = dirt.device.or(unflushed.then_some(DeviceOffset(0)));
                    self.counts.metadata_commits += u64::from(image);
                    self.counts.device_flushes += u64::from(device.is_some());
                    self.send(worker, ToWorker::Sync { image, device });
                }
                Step::Answer(waiters, errno) => {
                    for (worker, tag) in waiters {
                        self.send(worker, ToWorker::Flushed(tag, errno));
                    }
                    next = self.start_flush();
                }
            }
        }
        if self.commit.is_idle() {
            self.pass();
        }
    }

    /// `--barrier=strict`: a flush has ended, or nobody waits for it any more.
    fn pass(&mut self) {
        if std::mem::take(&mut self.fenced) {
            for worker in self.workers.clone() {
                self.send(worker, ToWorker::Passed);
            }
        }
    }
}

#[cfg(test)]
#[path = "../keeper_tests.rs"]
mod tests;
