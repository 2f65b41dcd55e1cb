// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! FLUSH as a barrier (R13, R14, R16): generations of writes on each worker, and the group commit
//! that the keeper runs over all of them.

use std::collections::BTreeSet;

use super::io::Tag;
use super::message::{PointId, WorkerId};
use super::units::DeviceOffset;

/// The generation a data-modifying request was accepted in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Generation(u64);

/// One worker's data-modifying requests, counted before and since the last flush point.
#[derive(Debug, Default)]
pub struct Generations {
    current: Generation,
    before: u32,
    since: u32,
    point: Option<PointId>,
}

impl Generations {
    /// A data-modifying request was accepted.
    pub fn begin(&mut self) -> Generation {
        self.since += 1;
        self.current
    }

    /// It ended, in whatever way.
    pub fn end(&mut self, generation: Generation) {
        let count = if generation == self.current { &mut self.since } else { &mut self.before };
        debug_assert!(*count > 0, "a request ended twice");
        *count = count.saturating_sub(1);
    }

    /// A flush point: what was accepted until now has to end before it is reached. The keeper
    /// sets one at a time; an unreached one is replaced by the later, which covers it.
    pub fn point(&mut self, id: PointId) {
        self.before += std::mem::take(&mut self.since);
        self.current.0 += 1;
        self.point = Some(id);
    }

    /// Whether every data-modifying request has ended.
    #[must_use]
    pub const fn is_still(&self) -> bool {
        self.before == 0 && self.since == 0
    }

    /// Whether there is a flush point that has not been reached.
    #[must_use]
    pub const fn is_awaited(&self) -> bool {
        self.point.is_some()
    }

    /// The flush point, once it is reached; says so once.
    pub fn reached(&mut self) -> Option<PointId> {
        if self.before == 0 { self.point.take() } else { None }
    }
}

/// Who asked for a flush.
pub type Waiter = (WorkerId, Tag);

/// What is not yet durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dirt {
    /// The file's metadata may have changed, or the file was written.
    pub metadata: bool,
    /// The device was written; the place is one inside the image.
    pub device: Option<DeviceOffset>,
}

impl Dirt {
    fn add(&mut self, other: Self) {
        self.metadata |= other.metadata;
        self.device = self.device.or(other.device);
    }

    const fn is_clean(&self) -> bool {
        !self.metadata && self.device.is_none()
    }
}

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Idle,
    /// Waiting for the workers to reach the point.
    Draining { id: PointId, missing: BTreeSet<WorkerId> },
    /// The first waiter's worker syncs; this is what it makes durable.
    Syncing(WorkerId, Dirt),
}

/// What the keeper has to do next for a flush.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Set a flush point on these workers.
    Point(PointId, Vec<WorkerId>),
    /// Have this worker make this durable.
    Sync(WorkerId, Dirt),
    /// Answer these with 0 or an errno.
    Answer(Vec<Waiter>, i32),
}

/// The group commit: one flush at a time; those that arrive meanwhile share the next.
#[derive(Debug, Default)]
pub struct GroupCommit {
    stage: Stage,
    next_point: u64,
    running: Vec<Waiter>,
    queued: Vec<Waiter>,
    dirt: Dirt,
    failed: Option<i32>,
    alone: bool,
}

impl GroupCommit {
    /// Begins with `dirt` that a killed predecessor may have left.
    #[must_use]
    pub fn new(dirt: Dirt) -> Self {
        Self { dirt, ..Self::default() }
    }

    /// One flush at a time, shared by nobody: what is held back behind one is accepted before the
    /// next (`--barrier=strict`).
    #[must_use]
    pub fn alone(self, alone: bool) -> Self {
        Self { alone, ..self }
    }

    /// Something became dirty.
    pub fn soil(&mut self, dirt: Dirt) {
        self.dirt.add(dirt);
    }

    /// A flush is asked for, and these workers have to reach its point. After a failure it fails at once (R16).
    pub fn ask(&mut self, waiter: Waiter, workers: &BTreeSet<WorkerId>) -> Option<Step> {
        if let Some(errno) = self.failed {
            return Some(Step::Answer(vec![waiter], errno));
        }
        self.queued.push(waiter);
        self.start(workers)
    }

    /// Something that was written is lost, and no sync will say so any more: flushes fail from now
    /// on, those that are under way too (R16).
    pub fn lost(&mut self, errno: i32) {
        self.failed = self.failed.or(Some(errno));
    }

    /// Starts the next group if none is running and one is asked for; these workers have to reach its point.
    pub fn start(&mut self, workers: &BTreeSet<WorkerId>) -> Option<Step> {
        if !matches!(self.stage, Stage::Idle) || self.queued.is_empty() {
            return None;
        }
        let count = if self.alone { 1 } else { self.queued.len() };
        self.running = self.queued.drain(..count).collect();
        if workers.is_empty() {
            self.stage = Stage::Draining { id: PointId(self.next_point), missing: BTreeSet::new() };
            return self.drained();
        }
        self.next_point += 1;
        let id = PointId(self.next_point);
        self.stage = Stage::Draining { id, missing: workers.clone() };
        Some(Step::Point(id, workers.iter().copied().collect()))
    }

    /// A worker reached the point `id`.
    pub fn reached(&mut self, worker: WorkerId, id: PointId) -> Option<Step> {
        match &mut self.stage {
            Stage::Draining { id: current, missing } if *current == id => {
                missing.remove(&worker);
                self.drained()
            }
            _ => None,
        }
    }

    /// A worker ended; it had nothing in flight any more. If it was to sync and has not, because
    /// nothing of its own waited, those who still wait are asked for again.
    pub fn left(&mut self, worker: WorkerId) -> Option<Step> {
        self.queued.retain(|(w, _)| *w != worker);
        self.running.retain(|(w, _)| *w != worker);
        match &mut self.stage {
            Stage::Draining { missing, .. } => {
                missing.remove(&worker);
                self.drained()
            }
            Stage::Syncing(syncing, dirt) if *syncing == worker => {
                let dirt = *dirt;
                self.dirt.add(dirt);
                self.stage = Stage::Idle;
                self.running.append(&mut self.queued);
                std::mem::swap(&mut self.running, &mut self.queued);
                None
            }
            Stage::Syncing(..) | Stage::Idle => None,
        }
    }

    /// Whether no flush is under way.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Idle)
    }

    fn drained(&mut self) -> Option<Step> {
        let Stage::Draining { missing, .. } = &self.stage else { return None };
        if !missing.is_empty() {
            return None;
        }
        let Some(&(worker, _)) = self.running.first() else {
            self.stage = Stage::Idle;
            return None;
        };
        if self.dirt.is_clean() {
            return Some(self.finish(0));
        }
        // R14: clean before the sync is issued, so that what is dirtied meanwhile counts.
        let dirt = std::mem::take(&mut self.dirt);
        self.stage = Stage::Syncing(worker, dirt);
        Some(Step::Sync(worker, dirt))
    }

    /// The sync ended with 0 or an errno.
    pub fn synced(&mut self, result: i32) -> Option<Step> {
        let Stage::Syncing(_, dirt) = self.stage else { return None };
        if result != 0 {
            self.dirt.add(dirt);
            self.failed = Some(result);
            self.running.append(&mut self.queued);
        }
        Some(self.finish(result))
    }

    fn finish(&mut self, result: i32) -> Step {
        self.stage = Stage::Idle;
        let result = self.failed.unwrap_or(result);
        Step::Answer(std::mem::take(&mut self.running), result)
    }

    /// The errno of a flush that failed and is still held against the session.
    #[must_use]
    pub const fn failed(&self) -> Option<i32> {
        self.failed
    }

    /// The session ended or the device was reset: the failure is forgotten, the dirt is not.
    pub fn reset(&mut self) {
        self.failed = None;
    }
}

#[cfg(test)]
#[path = "barrier_tests.rs"]
mod tests;
