// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One run: the engine's workers and keeper, wired to each other and to the world, from a seed to
//! a verdict.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use extentd::engine::keeper::KeeperConfig;
use extentd::engine::message::{Action, Drain, Report, ToWorker, WorkerId};
use extentd::engine::shared::Shared;
use extentd::engine::units::FileRange;
use extentd::engine::{Keeper, Worker};

use super::hazard::{Hazard, Hazards};
use super::joins::Joins;
use super::mutant::Mutant;
use super::ops::Port;
use super::rng::Rng;
use super::scenario::{LEASE_BREAK, Scenario};
use super::world::{Event, World};

/// What became of a seed.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) events: u64,
    pub(super) hazards: Hazards,
    pub(super) residue: u64,
    pub(super) answered: u64,
    pub(super) violation: Option<String>,
    pub(super) trace: Vec<String>,
}

/// Runs one seed to its end or to its first violation.
pub(super) fn run(seed: u64, mutant: Option<Mutant>, traced: bool) -> Outcome {
    let scenario = Scenario::new(&mut Rng::new(seed), mutant);
    let mut sim = Sim::new(Rng::new(seed ^ 0x5EED), scenario, traced);
    sim.world.trace(|| format!("seed {seed}"));
    // A panic is a violation like any other, and its trace is worth as much.
    if catch_unwind(AssertUnwindSafe(|| sim.live())).is_err() {
        sim.world.fail("panicked; the message is above".into());
    }
    Outcome {
        events: sim.world.events,
        residue: sim.world.residue,
        answered: sim.world.guest.answered,
        trace: sim.world.take_trace(),
        hazards: sim.world.hazards,
        violation: sim.world.violation,
    }
}

/// A message channel: towards which worker, or from it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Channel {
    To(WorkerId),
    From(WorkerId),
}

#[derive(Debug)]
pub(super) struct Sim {
    pub(super) world: World,
    pub(super) shared: Arc<Shared>,
    pub(super) keeper: Option<Keeper>,
    pub(super) workers: BTreeMap<WorkerId, Worker>,
    next_worker: u32,
    /// The session is ending: workers leave as soon as they are idle.
    pub(super) closing: bool,
    /// Requests that found no queue.
    backlog: u32,
    /// When each channel delivered last.
    channels: BTreeMap<Channel, u64>,
    /// The deadline a [`Event::Tick`] is on its way for.
    tick: Option<Duration>,
    pub(super) evictions: u64,
    pub(super) joins: Joins,
}

impl Sim {
    pub(super) fn new(rng: Rng, scenario: Scenario, traced: bool) -> Self {
        let mut world = World::new(rng, scenario, traced);
        let scenario = world.scenario.clone();
        world.trace(|| format!("{scenario:?}"));
        Self {
            world,
            shared: Arc::new(Shared::new()),
            keeper: None,
            workers: BTreeMap::new(),
            next_worker: 0,
            closing: false,
            backlog: 0,
            channels: BTreeMap::new(),
            tick: None,
            evictions: 0,
            joins: Joins::default(),
        }
    }

    /// A new worker's number.
    pub(super) fn number_worker(&mut self) -> WorkerId {
        self.next_worker += 1;
        WorkerId(self.next_worker - 1)
    }

    pub(super) fn now(&self) -> Duration {
        Duration::from_micros(self.world.now)
    }

    /// A daemon starts, and with it a session.
    pub(super) fn start_daemon(&mut self) {
        let scenario = &self.world.scenario;
        let config = KeeperConfig {
            geometry: scenario.geometry,
            start: scenario.start,
            window: scenario.window,
            max_extents: scenario.max_extents,
            populate: scenario.populate,
            lease_break_time: Duration::from_micros(LEASE_BREAK),
            proven: !scenario.lies && self.world.rng.chance(700),
            barriers: scenario.barriers,
            strict: scenario.strict,
            rules: Mutant::rules(scenario.mutant),
        };
        self.world.alive = true;
        self.world.trace(|| format!("daemon starts, proven: {}", config.proven));
        self.shared = Arc::new(Shared::new());
        self.keeper = Some(Keeper::new(config, Arc::clone(&self.shared), self.now()));
        self.tick = None;
        self.evictions = 0;
        self.start_session();
    }

    pub(super) fn start_session(&mut self) {
        self.closing = false;
        self.world.guest.device_reset();
        self.join_workers();
        if let Some(keeper) = &mut self.keeper {
            keeper.device_reset();
        }
        self.pump_keeper();
        self.call_back(self.backlog);
    }

    /// Lets the next event happen; `false` when there is none or the run has failed.
    pub(super) fn advance(&mut self) -> bool {
        if self.world.violation.is_some() {
            return false;
        }
        let Some(event) = self.world.pop() else { return false };
        self.dispatch(event);
        if self.closing {
            self.close_idle();
        }
        if self.world.events > 400_000 {
            self.world.fail("the run does not come to an end".into());
        }
        true
    }

    pub(super) fn dispatch(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Issue => self.issue(),
            Event::Step(key) => self.world.step(key),
            Event::Reap(id) => self.with_worker(id, |worker, port| worker.reap(port)),
            Event::ToWorker(id, message) => {
                if message == ToWorker::Begin {
                    self.world.begun.insert(id);
                }
                self.world.trace(|| format!("w{} hears {message:?}", id.0));
                self.world.note_fence(id, message);
                self.with_worker(id, |worker, port| worker.message(port, message));
            }
            Event::Job => self.world.job_step(),
            Event::Forced(id) => self.world.force(id),
            Event::Opener(id) => self.world.opener_acts(id),
            Event::Writeback => self.world.writeback(),
            Event::WritebackEnds(id) => self.world.host.finish_writeback(id),
            Event::Overlay => self.world.overlay(),
            Event::Restart => {
                self.world.model.abandon();
                self.start_daemon();
            }
            Event::SessionStart => {
                self.world.guest.flush_first = true;
                self.start_session();
                if self.world.rng.chance(300) {
                    let delay = self.world.delay(5_000, 40_000);
                    self.world.after(delay, Event::Blackout);
                }
            }
            Event::Incident => self.incident(),
            Event::Wake => {}
            Event::Join(session) => self.join_late(session),
            Event::Enter(id) => self.world.enter(id),
            Event::Overdue(id) => self.world.check_prompt(id),
            Event::Blackout => self.blackout(),
            event => self.tell_keeper(event, now),
        }
    }

    /// What the keeper is told of.
    fn tell_keeper(&mut self, event: Event, now: Duration) {
        let Some(keeper) = &mut self.keeper else { return };
        self.world.trace(|| format!("keeper hears {event:?}"));
        self.world.take_time(&event);
        match event {
            Event::ToKeeper(id, message) => keeper.message(now, id, message),
            Event::Left(id) => keeper.worker_left(now, id),
            Event::JobDone(id, done) => keeper.job_done(now, id, done),
            Event::LeaseSignal => keeper.lease_break(now),
            Event::SizeChanged => keeper.size_changed(now),
            Event::Tick => {
                self.tick = None;
                if keeper.deadline().is_some_and(|deadline| deadline <= now) {
                    keeper.tick(now);
                }
            }
            _ => {}
        }
        self.pump_keeper();
        self.check_evictions();
    }

    pub(super) fn pump_keeper(&mut self) {
        while let Some(action) = self.keeper.as_mut().and_then(Keeper::poll_action) {
            self.world.trace(|| format!("keeper: {action:?}"));
            self.tempt_to_join(&action);
            match action {
                Action::Send(id, message) => self.send(id, message),
                Action::Run(id, job) => self.world.run_job(id, job),
                Action::DropLease => self.world.drop_lease(),
                Action::Report(Report::SlowBreak) => self.world.hit(Hazard::LateBreak),
                Action::Touch | Action::Report(_) => {}
            }
        }
        let deadline = self.keeper.as_ref().and_then(Keeper::deadline);
        if let Some(at) = deadline
            && self.tick.is_none_or(|tick| at < tick)
        {
            self.tick = Some(at);
            let micros = at.as_nanos().div_ceil(1000);
            self.world.daemon_at(u64::try_from(micros).unwrap_or(u64::MAX), Event::Tick);
        }
    }

    fn send(&mut self, id: WorkerId, message: ToWorker) {
        if let ToWorker::Park(_, range, drain) = message {
            self.note_park(range, drain);
            self.note_standing(id);
        }
        let at = self.channel(Channel::To(id));
        self.world.daemon_at(at, Event::ToWorker(id, message));
    }

    /// A park order that finds raw I/O on several queues is a cross-queue drain.
    fn note_park(&mut self, range: FileRange, _drain: Drain) {
        let spb = self.world.host.spb;
        let bytes = |block: usize| super::scenario::bytes(block * spb);
        let mut workers: Vec<WorkerId> = self
            .world
            .raw_in_flight()
            .filter(|o| {
                let mut blocks = o.blocks.iter();
                blocks.any(|b| FileRange::new(bytes(*b), bytes(b + 1)).overlaps(&range))
            })
            .map(|o| o.worker)
            .collect();
        workers.dedup();
        if workers.len() > 1 {
            self.world.hit(Hazard::CrossQueueDrain);
        }
    }

    /// When a message sent now on this channel arrives: never before an earlier one.
    fn channel(&mut self, channel: Channel) -> u64 {
        let sent = self.world.now + self.world.delay(2, 1_500);
        let last = self.channels.entry(channel).or_default();
        *last = sent.max(*last);
        *last
    }

    /// Lets a worker do something, then hands on what it has to say.
    pub(super) fn with_worker(
        &mut self,
        id: WorkerId,
        act: impl FnOnce(&mut Worker, &mut Port<'_>),
    ) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        act(worker, &mut Port { world: &mut self.world, worker: id });
        let mut messages = Vec::new();
        let mut answers = 0;
        while let Some(message) = worker.poll_message() {
            messages.push(message);
        }
        while let Some((tag, status)) = worker.poll_done() {
            self.world.answered(id, tag, status);
            answers += 1;
        }
        self.call_back(answers);
        for message in messages {
            self.world.trace(|| format!("w{} says {message:?}", id.0));
            let at = self.channel(Channel::From(id));
            self.world.daemon_at(at, Event::ToKeeper(id, message));
        }
    }

    /// The guest makes a request, if there is a queue to put it into.
    fn issue(&mut self) {
        let depth = self.world.scenario.queue_depth;
        let ready: Vec<_> = self
            .workers
            .keys()
            .filter(|id| !self.closing && !self.world.is_stalled(**id))
            .filter_map(|id| Some((*id, self.world.guest.free_tag(*id, depth)?)))
            .collect();
        if ready.is_empty() {
            return self.put_off();
        }
        let choice = self.world.rng.index(ready.len());
        let (id, _) = ready[choice];
        self.world.guest.to_issue -= 1;
        self.ask_of(id);
    }

    /// The guest makes a request on this queue, if it has room.
    pub(super) fn ask_of(&mut self, id: WorkerId) {
        let depth = self.world.scenario.queue_depth;
        let Some(tag) = self.world.guest.free_tag(id, depth) else { return };
        let request = self.world.make_request(id, tag);
        self.world.note_behind_fence(id, tag, request.kind);
        self.with_worker(id, |worker, port| worker.accept(port, tag, request));
    }

    /// No queue takes a request: it waits for an answer or for a session, or, with all workers
    /// stalled, for a while.
    fn put_off(&mut self) {
        let stalled = !self.closing && !self.workers.is_empty();
        if stalled && self.workers.keys().all(|id| self.world.is_stalled(*id)) {
            let delay = self.world.delay(8_000, 40_000);
            self.world.after(delay, Event::Issue);
        } else {
            self.backlog += 1;
        }
    }

    fn call_back(&mut self, most: u32) {
        for _ in 0..most.min(self.backlog) {
            self.backlog -= 1;
            let delay = self.world.delay(1, 500);
            self.world.after(delay, Event::Issue);
        }
    }

    /// At the end of a session: workers with nothing left to do go.
    fn close_idle(&mut self) {
        let world = &self.world;
        let busy = |id: WorkerId| {
            let ended = world.ended.get(&id).is_some_and(|e| !e.is_empty());
            ended || world.ops.values().any(|o| o.life == world.life && o.worker == id)
        };
        let idle: Vec<WorkerId> = self
            .workers
            .iter()
            .filter(|(id, w)| w.in_flight() == 0 && !busy(**id) && !world.is_stalled(**id))
            .map(|(id, _)| *id)
            .collect();
        let some = !idle.is_empty();
        for id in idle {
            self.world.trace(|| format!("w{} leaves", id.0));
            self.with_worker(id, |worker, _| worker.retire());
            self.workers.remove(&id);
            self.world.ended.remove(&id);
            self.world.bounce.remove(&id);
            let at = self.channel(Channel::From(id));
            self.world.daemon_at(at, Event::Left(id));
        }
        if some && self.workers.is_empty() {
            let delay = self.world.delay(10, 50_000);
            self.world.daemon_after(delay, Event::SessionStart);
        }
    }
}
