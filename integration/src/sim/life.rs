// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The course of a run: bursts of requests, misfortunes in between, and the reckoning.

use super::hazard::Hazard;
use super::mutant::Mutant;
use super::outside::Errand;
use super::run::Sim;
use super::scenario::LEASE_BREAK;
use super::sharing;
use super::world::{Event, Stalls};
use extentd::engine::keeper::Start;

/// Longest the guest waits for its answers once everything is well, in microseconds.
const PATIENCE: u64 = 60_000_000;
/// Longest direct mode may stay away when nothing is in its way any more.
const RETURN: u64 = 900_000_000;

/// What can go wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Incident {
    Open(Errand),
    /// Some threads stop, and somebody opens the image meanwhile.
    StopAll,
    StopKeeper,
    StopWorker,
    Overlay,
    Kill,
    PowerCut,
    Session,
    SwitchCache,
    /// The guest fills its queues, and the image is opened.
    Burst,
}

const INCIDENTS: &[(Incident, u64)] = &[
    (Incident::Open(Errand::Read), 12),
    (Incident::Open(Errand::Write), 6),
    (Incident::Open(Errand::Punch), 5),
    (Incident::Open(Errand::Truncate), 1),
    (Incident::Open(Errand::Defragment), 6),
    (Incident::Open(Errand::Clone), 6),
    (Incident::Open(Errand::Glance), 4),
    (Incident::StopAll, 5),
    (Incident::StopKeeper, 4),
    (Incident::StopWorker, 4),
    (Incident::Overlay, 2),
    (Incident::Kill, 7),
    (Incident::PowerCut, 7),
    (Incident::Session, 6),
    (Incident::SwitchCache, 3),
    (Incident::Burst, 8),
];

/// On a slow device mostly those that free blocks or move them.
const MOVERS: &[(Incident, u64)] =
    &[(Incident::Open(Errand::Punch), 1), (Incident::Open(Errand::Defragment), 1)];

impl Sim {
    /// The whole run.
    pub(super) fn live(&mut self) {
        self.start_daemon();
        for _ in 0..self.world.scenario.phases {
            self.phase();
            if self.world.violation.is_some() {
                return;
            }
        }
        self.reckon();
    }

    fn phase(&mut self) {
        let busy = self.world.scenario.hot == 1 || self.world.scenario.hard.ragged;
        let most = if busy { 50 } else { 22 };
        // Enough to keep a slow device busy for longer than a break may take.
        let times = if self.world.scenario.slow_device.is_some() { 4 } else { 1 };
        let requests = self.world.rng.range(3, most) * times;
        let span = self.world.rng.range(100, 20_000);
        for _ in 0..requests {
            let at = self.world.rng.below(span);
            self.world.guest.to_issue += 1;
            self.world.after(at, Event::Issue);
        }
        if self.world.rng.chance(if self.world.scenario.hard.ragged { 300 } else { 800 }) {
            let at = self.world.rng.below(span + span / 4);
            self.world.after(at, Event::Incident);
        }
        let end = self.world.now + span;
        match self.world.rng.below(6) {
            0 => self.run_until(end, |_| false),
            1 => self.run_until(end + 50_000, |_| false),
            2 => self
                .run_until(end + PATIENCE, |sim| sim.world.now > end && sim.world.guest.is_idle()),
            // On into the moment when direct mode begins again.
            3 => self.run_until(end + 5_000_000, |sim| {
                sim.world.now > end && sim.world.jobs.is_entering()
            }),
            _ => self.run_until(end + 5_000_000, |sim| sim.world.now > end && sim.is_direct()),
        }
    }

    /// Lets events happen until `enough` or the given time.
    pub(super) fn run_until(&mut self, limit: u64, enough: impl Fn(&Self) -> bool) {
        while self.world.now < limit && !enough(self) && self.advance() {}
    }

    pub(super) fn is_direct(&self) -> bool {
        self.keeper.as_ref().is_some_and(|k| k.snapshot().direct)
    }

    /// Peace: everything must be answered, direct mode must come back, every byte must be right.
    fn reckon(&mut self) {
        self.world.trace(|| "peace".into());
        self.world.peace = true;
        self.outlive_hang();
        self.until_answered("at the end");
        if self.world.violation.is_some() {
            return;
        }
        let may = self.world.scenario.start == Start::Eligible && !self.world.scenario.lies;
        if may && !self.world.outside.resized {
            let limit = self.world.now + RETURN;
            self.run_until(limit, Self::is_direct);
            if !self.is_direct() {
                self.world.fail("direct mode does not come back".into());
            }
        }
        let window = self.world.window();
        let step = 1 + self.world.rng.index(64);
        self.world.guest.plan_sweep(&window, step);
        for _ in 0..self.world.guest.to_issue {
            let at = self.world.rng.below(5_000);
            self.world.after(at, Event::Issue);
        }
        let before = self.must_be_raw().then_some(self.world.raw);
        self.until_answered("in the last sweep");
        if self.must_be_raw() && before == Some(self.world.raw) {
            self.world.fail("direct mode reads nothing raw".into());
        }
        self.shut_down();
    }

    /// Whether direct mode is on and some block has to be read raw: one unit that can be proven
    /// (R6), and nothing that could keep it from being mapped.
    fn must_be_raw(&self) -> bool {
        let (world, scenario) = (&self.world, &self.world.scenario);
        let hampered = scenario.errors + scenario.stuck + scenario.buffered_reads > 0
            || scenario.hard.read_only
            || scenario.hard.unmapped > 0;
        let window = world.window();
        let (host, unit) = (&world.host, scenario.unit());
        let plain = |nth: usize| {
            let mut sectors = nth * unit..(nth + 1) * unit;
            let blocks = host.blocks_of(&sectors);
            let first = host.layout.block(blocks.start);
            let whole = blocks.clone().all(|block| {
                let entry = host.layout.block(block);
                let next = first.place.wrapping_add(block - blocks.start);
                entry.written && !entry.shared && entry.place == next
            });
            let inside = window.start <= sectors.start && sectors.end <= window.end;
            inside && whole && sectors.any(|s| host.stored(s) != 0)
        };
        !hampered && !scenario.lies && self.is_direct() && (0..scenario.sectors() / unit).any(plain)
    }

    fn until_answered(&mut self, when: &str) {
        let limit = self.world.now + PATIENCE;
        self.run_until(limit, |sim| {
            let peace = sim.world.alive && !sim.closing && !sim.workers.is_empty();
            peace && sim.world.guest.is_idle() && !sim.world.outside.anybody()
        });
        if !self.world.guest.is_idle() {
            let waiting = self.world.guest.waiting().join(", ");
            self.world.fail(format!("not answered {when}: {waiting}"));
        }
    }

    /// The daemon ends in good order; a buffered reader then sees what the guest wrote.
    pub(super) fn shut_down(&mut self) {
        if self.world.violation.is_some() {
            return;
        }
        if self.world.rng.chance(500) && !self.world.scenario.identity() {
            // Somebody opens it just then: before or after the keeper hears of the end.
            self.world.open(Errand::Read);
            let until = self.world.now + self.world.rng.range(0, 3_000);
            self.run_until(until, |_| false);
        }
        let now = self.now();
        if let Some(keeper) = &mut self.keeper {
            keeper.shut_down(now);
        }
        self.pump_keeper();
        let limit = self.world.now + PATIENCE;
        self.run_until(limit, |sim| !sim.world.lease.is_held());
        self.run_until(limit, |_| false);
        if self.world.lease.is_held() {
            self.world.fail("the lease is not given back at the end".into());
        }
        if self.world.violation.is_none() {
            self.world.audit("after the end");
        }
    }

    pub(super) fn incident(&mut self) {
        let slow = self.world.scenario.slow_device.is_some() && self.world.rng.chance(700);
        let incidents = match (slow, self.world.scenario.hard.read_only) {
            (true, _) => MOVERS,
            (false, true) => sharing::INCIDENTS,
            (false, false) => INCIDENTS,
        };
        let Some(incident) = self.world.rng.weighted(incidents) else { return };
        if self.world.peace {
            return;
        }
        if self.world.scenario.identity()
            && matches!(incident, Incident::Open(_) | Incident::Overlay | Incident::PowerCut)
        {
            return;
        }
        self.world.trace(|| format!("incident {incident:?}"));
        match incident {
            Incident::Open(errand) => {
                self.world.open(errand);
                if self.world.rng.chance(200) {
                    self.world.open(Errand::Read);
                }
            }
            Incident::StopAll | Incident::StopKeeper | Incident::StopWorker => self.stop(incident),
            Incident::Overlay => self.world.after(0, Event::Overlay),
            Incident::Kill => self.kill(),
            Incident::PowerCut => self.power_cut(),
            Incident::Session if self.world.alive && !self.workers.is_empty() => {
                self.world.hit(Hazard::SessionChange);
                self.closing = true;
            }
            Incident::Session => {}
            Incident::Burst => self.burst(),
            Incident::SwitchCache => {
                let on = self.world.guest.switch_cache();
                for worker in self.workers.values_mut() {
                    worker.set_write_through(on);
                }
            }
        }
    }

    /// SIGSTOP, or one thread that gets no CPU, while somebody opens the image.
    fn stop(&mut self, incident: Incident) {
        let until = self.world.now + self.world.rng.range(LEASE_BREAK / 8, LEASE_BREAK * 2);
        let victim = self.world.rng.index(self.workers.len().max(1));
        let victim = self.workers.keys().nth(victim).copied();
        let stalls = &mut self.world.stalls;
        match incident {
            Incident::StopAll => stalls.all = stalls.all.max(until),
            Incident::StopKeeper => stalls.keeper = stalls.keeper.max(until),
            _ => {
                if let Some(id) = victim {
                    let stall = stalls.workers.entry(id).or_default();
                    *stall = until.max(*stall);
                    self.world.hit(Hazard::WorkerStall);
                }
            }
        }
        let stall = until - self.world.now;
        self.world.after(stall, Event::Wake);
        let errand = [Errand::Punch, Errand::Defragment, Errand::Write, Errand::Read];
        let choice = self.world.rng.index(errand.len());
        if !self.world.scenario.identity() {
            self.world.open(errand[choice]);
        }
    }

    /// Every queue is full at once, and then the image is opened.
    fn burst(&mut self) {
        if !self.world.scenario.hard.bursts || self.closing {
            return;
        }
        for id in self.workers.keys().copied().collect::<Vec<_>>() {
            for _ in 0..self.world.scenario.queue_depth {
                if !self.world.is_stalled(id) {
                    self.ask_of(id);
                }
            }
        }
        let delay = self.world.rng.below(2_000);
        let until = self.world.now + delay;
        self.run_until(until, |_| false);
        if !self.world.scenario.identity() {
            self.world.open(Errand::Read);
        }
    }

    fn end_life(&mut self) {
        self.world.alive = false;
        self.world.life += 1;
        self.keeper = None;
        self.workers.clear();
        self.closing = false;
        self.world.jobs.clear();
        self.world.ended.clear();
        self.world.bounce.clear();
        self.world.stalls = Stalls::default();
        self.world.strain.end_life();
        let before = self.world.guest.to_issue;
        self.world.drop_requests();
        for _ in before..self.world.guest.to_issue {
            let delay = self.world.delay(100, 5_000);
            self.world.after(delay, Event::Issue);
        }
    }

    /// SIGKILL: what is in flight goes on; lease and lock stay until it has ended (R1a).
    pub(super) fn kill(&mut self) {
        if !self.world.alive {
            return;
        }
        self.world.hit(Hazard::Kill);
        for lost in self.world.strain.rings.lose() {
            self.world.ops.remove(&lost);
        }
        self.world.pin_all();
        self.end_life();
        if self.world.scenario.is(Mutant::NoFence) {
            self.world.release_fence();
        } else {
            self.world.ghost_ended();
        }
    }

    pub(super) fn blackout(&mut self) {
        if !self.world.peace && !self.world.scenario.identity() {
            self.power_cut();
        }
    }

    /// The host goes down, and comes back with what the disk and the journal kept.
    fn power_cut(&mut self) {
        if !self.world.alive {
            return;
        }
        self.world.hit(Hazard::PowerCut);
        self.end_life();
        let world = &mut self.world;
        world.ops.clear();
        world.forget_outside();
        world.host.cut(&mut world.rng);
        let host = &world.host;
        if let Err(wrong) = world.model.cut(|at| host.stored(at)) {
            world.fail(format!("after a power cut: {wrong} (R14)"));
        }
        world.check_canary();
        world.after(1_000_000, Event::Restart);
    }
}

impl super::world::World {
    /// The fence of R1a: when the last of a dead daemon's operations has ended, its lease and
    /// lock go, and a waiting daemon gets on.
    pub(super) fn ghost_ended(&mut self) {
        if !self.alive && self.ops.is_empty() && !self.scenario.is(Mutant::NoFence) {
            self.release_fence();
        }
    }

    pub(super) fn release_fence(&mut self) {
        self.end_lease();
        let delay = self.delay(100, 2_000);
        self.after(delay, Event::Restart);
    }
}
