// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--barrier=strict` as a guest may rely on it across its queues: what arrives on any of them while a flush point stands there is
//! not answered before the flush has ended (R13).

use std::collections::{BTreeMap, BTreeSet};

use extentd::engine::Tag;
use extentd::engine::message::{ToWorker, WorkerId};
use extentd::engine::request::Kind;

use super::hazard::Hazard;
use super::world::World;

/// By worker that has heard of a flush point and not of its passing: the requests that it has accepted since.
#[derive(Debug, Default)]
pub(super) struct Fences(BTreeMap<WorkerId, BTreeSet<Tag>>);

impl World {
    /// A worker is about to hear a message.
    pub(super) fn note_fence(&mut self, worker: WorkerId, message: ToWorker) {
        match message {
            ToWorker::Point(_) if self.scenario.strict => {
                self.strain.fences.0.entry(worker).or_default();
            }
            ToWorker::Passed => drop(self.strain.fences.0.remove(&worker)),
            _ => {}
        }
    }

    /// A worker accepts a request. A flush takes its place among others, it is not held back.
    pub(super) fn note_behind_fence(&mut self, worker: WorkerId, tag: Tag, kind: Kind) {
        if kind != Kind::Flush
            && let Some(behind) = self.strain.fences.0.get_mut(&worker)
        {
            behind.insert(tag);
            self.hit(Hazard::BehindFence);
        }
    }

    pub(super) fn check_fence(&mut self, worker: WorkerId, tag: Tag) {
        if self.strain.fences.0.get(&worker).is_some_and(|behind| behind.contains(&tag)) {
            let what = "was answered while a flush that it came behind was under way";
            self.fail(format!("w{} tag {} {what} (R13, strict)", worker.0, tag.0));
        }
    }
}
