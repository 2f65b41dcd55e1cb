// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Workers that join while their session is under way, most often just when a quiesce order stands.

use std::sync::Arc;

use extentd::engine::Worker;
use extentd::engine::counters::Counters;
use extentd::engine::message::{Action, Job, ToWorker, WorkerId};

use super::hazard::Hazard;
use super::mutant::Mutant;
use super::run::Sim;
use super::world::Event;

/// Workers that are still to join.
#[derive(Debug, Default)]
pub(super) struct Joins {
    session: u32,
    left: usize,
    /// The worker that is just joining.
    joining: Option<WorkerId>,
}

impl Sim {
    /// A session begins with all of its workers, or with one.
    pub(super) fn join_workers(&mut self) {
        self.joins.session += 1;
        self.joins.left = 0;
        let workers = self.world.scenario.workers;
        let at_once = if self.world.scenario.hard.late { 1 } else { workers };
        for _ in 0..at_once {
            self.join_worker();
        }
        for _ in at_once..workers {
            self.joins.left += 1;
            let delay = self.world.rng.range(500, 40_000);
            self.world.daemon_after(delay, Event::Join(self.joins.session));
        }
    }

    /// What the manager does makes this a bad moment to join.
    pub(super) fn tempt_to_join(&mut self, action: &Action) {
        let standing = matches!(
            action,
            Action::Send(_, ToWorker::Park(..)) | Action::Run(_, Job::Punch { .. } | Job::Confirm)
        );
        if standing
            && self.joins.left > 0
            && self.joins.joining.is_none()
            && self.world.rng.chance(700)
        {
            let delay = self.world.rng.below(1_500);
            self.world.daemon_after(delay, Event::Join(self.joins.session));
        }
    }

    /// A worker joins late, and finds requests in its queue.
    pub(super) fn join_late(&mut self, session: u32) {
        if session != self.joins.session || self.joins.left == 0 || self.closing {
            return;
        }
        self.joins.left -= 1;
        let id = self.join_worker();
        self.joins.joining = Some(id);
        self.pump_keeper();
        self.joins.joining = None;
        if !self.world.peace {
            // A read of what is being punched, most of all.
            let window = self.world.window();
            for punch in self.world.jobs.punches() {
                let range = punch.start.max(window.start)..punch.end.min(window.end);
                if !range.is_empty() {
                    self.world.guest.sweep.push_front(range);
                    self.ask_of(id);
                }
            }
            (0..3).for_each(|_| self.ask_of(id));
            let delay = self.world.rng.below(400);
            self.world.guest.to_issue += 1;
            self.world.after(delay, Event::Issue);
        }
    }

    /// A worker gets a quiesce order; if it is the one that joins, it has stood before.
    pub(super) fn note_standing(&mut self, worker: WorkerId) {
        if self.joins.joining == Some(worker) {
            self.world.hit(Hazard::LateJoin);
        }
    }

    fn join_worker(&mut self) -> WorkerId {
        let scenario = self.world.scenario.clone();
        let id = self.number_worker();
        if let Some(keeper) = &mut self.keeper {
            keeper.worker_joined(id);
        }
        let mut worker = Worker::new(
            scenario.geometry,
            Mutant::rules(scenario.mutant),
            Arc::clone(&self.shared),
            Arc::new(Counters::default()),
            u32::try_from(scenario.queue_depth).unwrap_or(u32::MAX),
        );
        worker.set_write_through(self.world.guest.write_through);
        if scenario.strict {
            worker.set_strict();
        }
        let slots = scenario.geometry.bounce_slots as usize;
        let sectors = scenario.geometry.bounce_bytes as usize / 512;
        self.world.bounce.insert(id, vec![vec![0; sectors]; slots]);
        self.world.ended.insert(id, std::collections::VecDeque::new());
        self.workers.insert(id, worker);
        id
    }
}
