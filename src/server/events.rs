// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the main loop does about each thing that happens.

use std::collections::BTreeSet;
use std::time::Duration;

use tracing::warn;

use crate::control::check::Ownership;
use crate::control::{Command, reply};
use crate::engine::message::WorkerId;
use crate::image::Change;
use crate::inbox::Event;

use super::clients::ClientId;
use super::describe::{self, Particulars};
use super::helper::{Answer, Task};
use super::log::{HOST, image_field};
use super::poll::now;
use super::{Phase, Server, failed};

/// Workers, jobs, the session and the process.
pub(super) const INBOX: u64 = 0;
/// A deadline.
pub(super) const TIMER: u64 = 1;
/// The helper's answers.
pub(super) const HELPER: u64 = 2;
/// Frontends.
pub(super) const LISTENER: u64 = 3;
/// Clients of the control socket, and above it each of them.
pub(super) const CONTROL: u64 = 4;

impl Server<'_> {
    pub(super) fn handle(&mut self, tokens: &[u64]) {
        let now = now();
        // First: somebody may wait for the lease, and events of a session that is over must not be
        // taken for the next one's.
        self.inbox(now);
        for &token in tokens {
            match token {
                INBOX => {}
                TIMER => self.timer.hear(),
                HELPER => self.answers(),
                LISTENER => self.frontend(now),
                CONTROL => {
                    if let Some(clients) = &mut self.clients {
                        clients.accept(&self.poll, now);
                    }
                }
                _ => self.client(token, now),
            }
        }
        self.tick(now);
    }

    fn tick(&mut self, now: Duration) {
        let change = self.watch.tick(self.owner.direct(), now);
        self.inode_changed(change, now);
        if self.owner.keeper.deadline().is_some_and(|at| at <= now) {
            self.owner.keeper.tick(now);
        }
        if let Some(front) = &mut self.front {
            front.tick(&self.poll, now);
        }
        if let Some(clients) = &mut self.clients {
            clients.tick(&self.poll, now);
        }
    }

    fn inbox(&mut self, now: Duration) {
        self.inbox.hear();
        let events: Vec<Event> = std::iter::from_fn(|| self.inbox.next()).collect();
        let broken = events.iter().any(|event| matches!(event, Event::LeaseBreak));
        // A signal may have meant another image, or an earlier lease: then this one is still what it was.
        if broken && !self.image.has_lease() {
            self.owner.keeper.lease_break(now);
        }
        for event in events {
            match event {
                Event::Worker(id, message) => {
                    if self.front.as_ref().is_some_and(|front| front.knows(id)) {
                        self.owner.keeper.message(now, id, message);
                    }
                }
                Event::Job(id, done) => self.owner.keeper.job_done(now, id, done),
                Event::DeviceReset => self.owner.keeper.device_reset(),
                Event::LeaseBreak => {}
                Event::InodeTouched => {
                    let change = self.watch.rang(self.owner.direct(), now);
                    self.inode_changed(change, now);
                }
                Event::Listen => self.may_listen = true,
                Event::Stop => self.stop = true,
                Event::SessionEnded(reason) => {
                    if let Some(reason) = reason {
                        warn!("the session failed: {reason}");
                    }
                    if let Some(front) = &mut self.front {
                        front.end(&self.poll, now);
                    }
                }
                Event::Quiesced(id) => {
                    // At once, not when the last one has drained: what the last one waits for may
                    // itself wait for every worker's answer (a flush point, a park order).
                    self.owner.keeper.worker_left(now, id);
                    if let Some(front) = &mut self.front {
                        front.quiesced(id);
                    }
                }
            }
        }
    }

    fn frontend(&mut self, now: Duration) {
        let Some(front) = &mut self.front else { return };
        let workers = front.accept(&self.poll, now);
        self.join(&workers);
    }

    /// A session has begun.
    pub(super) fn join(&mut self, workers: &BTreeSet<WorkerId>) {
        if !workers.is_empty() {
            self.owner.keeper.device_reset();
        }
        for worker in workers {
            self.owner.keeper.worker_joined(*worker);
        }
    }

    pub(super) fn inode_changed(&mut self, change: Change, now: Duration) {
        match change {
            Change::SizeChanged => self.owner.keeper.size_changed(now),
            Change::BlocksLost => self.owner.keeper.blocks_lost(now),
            Change::Unlinked if !self.unlinked => {
                self.unlinked = true;
                let image = image_field(self.image.path());
                warn!(
                    target: HOST,
                    image,
                    "the image was unlinked; it is served on and goes with this process"
                );
            }
            Change::Unlinked | Change::Unchanged => {}
        }
    }

    fn answers(&mut self) {
        for answer in self.owner.helper.answers().collect::<Vec<_>>() {
            match answer {
                Answer::Counted(count) => self.loading.counted = Some(count),
                Answer::Synced(result) => {
                    self.phase = Phase::Over;
                    if let Err(source) = result {
                        self.outcome = Err(failed("make the last writes durable")(source));
                    }
                }
                Answer::Reply(client, line) => {
                    let clients = self.clients.as_mut();
                    if let Some((id, next)) =
                        clients.and_then(|c| c.answered(&self.poll, client, &line, now()))
                    {
                        self.help(id, next);
                    }
                }
            }
        }
    }

    fn client(&mut self, token: u64, now: Duration) {
        let Some(clients) = &mut self.clients else { return };
        let id = clients.client(token);
        match clients.ready(&self.poll, id, now) {
            Some(Command::Status) => {
                let line = self.status();
                if let Some(clients) = &mut self.clients {
                    clients.reply(&self.poll, id, &line, now);
                }
            }
            Some(command) => {
                if let Some((id, command)) = clients.queue(id, command) {
                    self.help(id, command);
                }
            }
            None => {}
        }
    }

    /// Has the helper answer a client.
    fn help(&self, id: ClientId, command: Command) {
        let task = match command {
            Command::Map { start } => Task::Map(id, start),
            Command::Status | Command::Check => {
                let snapshot = self.owner.keeper.snapshot();
                let ownership = Ownership {
                    direct: snapshot.direct,
                    lease: describe::lease(snapshot.lease),
                    reason: describe::reason(&self.image, &snapshot),
                };
                Task::Check(id, ownership)
            }
        };
        self.owner.helper.give(task);
    }

    fn status(&self) -> String {
        let snapshot = self.owner.keeper.snapshot();
        let particulars = Particulars {
            uptime_seconds: now().saturating_sub(self.started).as_secs(),
            unlinked: self.unlinked,
            block_size: self.config.block_size,
            read_only: self.config.read_only,
        };
        match &self.front {
            Some(front) => reply(describe::status(&self.image, &snapshot, front, particulars)),
            // The control socket and the frontends' are made together.
            None => crate::control::failure(&"not serving yet"),
        }
    }
}
