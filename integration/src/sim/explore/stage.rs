// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A script being played: what may happen next, and what is checked each time something has.
//!
//! Time stands still but for the keeper's deadlines: whatever takes no time may take any, so only the
//! order of events is left, and it is free but for what a thread, a channel and the kernel keep in order.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::hash::{DefaultHasher, Hash, Hasher};

use extentd::engine::message::WorkerId;
use extentd::engine::request::Kind;

use super::super::layout::NOWHERE;
use super::super::model::Model;
use super::super::mutant::Mutant;
use super::super::ops::InFlight;
use super::super::outside::Errand;
use super::super::rng::Rng;
use super::super::run::Sim;
use super::super::scenario::sectors;
use super::super::world::Event;
use super::scripts::{Block, Script};

/// Something that may happen next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Move {
    /// The guest makes this request of the script.
    Ask(usize),
    /// Somebody opens the image.
    Open,
    /// The event with this number in the queue.
    Event(u64),
    /// The keeper's deadline passes.
    Tick,
}

/// What delivers its events in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Lane {
    Op(u64),
    Reap(WorkerId),
    To(WorkerId),
    From(WorkerId),
    Helper,
    Done,
    Signal,
    Opener(u64),
    Writeback,
    WritebackEnds(u64),
}

fn lane(event: &Event) -> Option<Lane> {
    Some(match event {
        Event::Step(key) => Lane::Op(*key),
        Event::Reap(id) => Lane::Reap(*id),
        Event::ToWorker(id, _) => Lane::To(*id),
        Event::ToKeeper(id, _) | Event::Left(id) => Lane::From(*id),
        Event::Job => Lane::Helper,
        Event::JobDone(..) => Lane::Done,
        Event::LeaseSignal => Lane::Signal,
        Event::Opener(id) => Lane::Opener(*id),
        Event::Writeback => Lane::Writeback,
        Event::WritebackEnds(id) => Lane::WritebackEnds(*id),
        // The keeper's deadline is asked for. A break is forced long after the last raw I/O has ended (R2a).
        _ => return None,
    })
}

pub(super) struct Stage {
    sim: Sim,
    script: &'static Script,
    asked: Vec<bool>,
    /// Openers that have come.
    opened: usize,
    /// Deadlines that may pass although something else could happen first.
    early: u8,
}

impl Stage {
    /// The world as the script begins: in direct mode, with what was read before in the map.
    pub(super) fn new(script: &'static Script, mutant: Option<Mutant>, traced: bool) -> Self {
        let mut sim = Sim::new(Rng::still(), script.scenario(mutant), traced);
        lay_out(&mut sim, script.blocks);
        sim.start_daemon();
        let asked = vec![false; script.asks.len()];
        let mut stage = Self { sim, script, asked, opened: 0, early: 0 };
        if !script.entering {
            stage.settle();
        }
        for (i, kind) in script.before.iter().enumerate() {
            stage.request(script.asks.len() + i, 0, *kind);
            stage.settle();
        }
        stage.early = script.early;
        stage
    }

    /// What may happen next; nothing once the script is at its end.
    pub(super) fn moves(&self) -> Vec<Move> {
        let mut moves = self.events();
        moves.extend((0..self.script.asks.len()).filter(|i| self.may_ask(*i)).map(Move::Ask));
        if self.opened < self.script.outside.len() {
            moves.push(Move::Open);
        }
        let due = self.deadline_due();
        let unanswered = !self.sim.world.guest.is_idle();
        if due && (self.early > 0 && !moves.is_empty() || moves.is_empty() && unanswered) {
            moves.push(Move::Tick);
        }
        moves
    }

    /// The first event of each lane that is not held up.
    fn events(&self) -> Vec<Move> {
        let world = &self.sim.world;
        let busy = world.ops.values().any(InFlight::holds_layout);
        let mut queue: Vec<_> = world.queue.iter().collect();
        queue.sort_unstable_by_key(|entry| entry.order);
        let mut seen = BTreeSet::new();
        let mut moves = Vec::new();
        for entry in queue {
            let Some(lane) = lane(&entry.event) else { continue };
            let held = match lane {
                // The kernel changes no layout under direct I/O through the file.
                Lane::Helper => busy && world.jobs.is_punching(),
                Lane::Opener(_) => busy && self.script.outside.contains(&Errand::Defragment),
                Lane::Writeback => !world.host.cache.any_dirty(),
                _ => false,
            };
            if seen.insert(lane) && !held {
                moves.push(Move::Event(entry.order));
            }
        }
        moves
    }

    /// A queue is served in order; and a guest that writes where it is writing already deserves what it gets.
    fn may_ask(&self, index: usize) -> bool {
        let (queue, kind) = self.script.asks[index];
        let earlier = self.script.asks.iter().take(index).zip(&self.asked);
        let in_turn =
            !self.asked[index] && earlier.filter(|(ask, _)| ask.0 == queue).all(|(_, a)| *a);
        let range = kind.range();
        let mut span = sectors(range.start)..sectors(range.end);
        in_turn && (!kind.modifies() || !span.any(|s| self.sim.world.model.contended(s)))
    }

    fn deadline_due(&self) -> bool {
        self.sim.keeper.as_ref().is_some_and(|keeper| keeper.deadline().is_some())
    }

    pub(super) fn make(&mut self, choice: Move) {
        match choice {
            Move::Ask(index) => {
                self.asked[index] = true;
                let (queue, kind) = self.script.asks[index];
                self.request(index, queue, kind);
            }
            Move::Open => {
                self.sim.world.open(self.script.outside[self.opened]);
                self.opened += 1;
            }
            Move::Event(order) => {
                let queue = &mut self.sim.world.queue;
                let Some(event) = queue.iter().find(|e| e.order == order).map(|e| e.event.clone())
                else {
                    return;
                };
                queue.retain(|e| e.order != order);
                self.sim.dispatch(event);
            }
            Move::Tick => {
                self.early = self.early.saturating_sub(1);
                let deadline = self.sim.keeper.as_ref().and_then(|keeper| keeper.deadline());
                let micros = deadline.map_or(0, |at| at.as_nanos().div_ceil(1000));
                let at = u64::try_from(micros).unwrap_or(u64::MAX);
                self.sim.world.now = self.sim.world.now.max(at);
                self.sim.dispatch(Event::Tick);
            }
        }
    }

    /// Numbers and data go by the place in the script, not by when it comes to it: states that differ in
    /// nothing else are the same.
    fn request(&mut self, index: usize, queue: u32, kind: Kind) {
        let id = WorkerId(queue);
        let world = &mut self.sim.world;
        let Some(tag) = world.guest.free_tag(id, world.scenario.queue_depth) else { return };
        let number = index as u64 + 1;
        world.guest.next_number = number;
        world.guest.next_stamp = number << 16;
        let request = world.make(id, tag, kind);
        self.sim.with_worker(id, |worker, port| worker.accept(port, tag, request));
    }

    /// What holds at all times, besides what each event looks at: a stranger's blocks are as he wrote
    /// them, whoever may open the file sees what the guest may, and so would everybody after a power cut.
    pub(super) fn check(&mut self) {
        let world = &mut self.sim.world;
        if world.lease.is_held() {
            world.check_canary();
        } else {
            world.audit("at any time");
        }
        for at in 0..world.scenario.sectors() {
            let leavings = world.host.leavings(at);
            if let Some(left) =
                leavings.into_iter().find(|left| !world.model.may_be_left(at, *left))
            {
                return world
                    .fail(format!("a power cut could leave {left:#x} in sector {at} (R14)"));
            }
        }
    }

    /// The script is over: everything is answered, direct mode comes back, and every byte is right.
    pub(super) fn finish(&mut self) {
        let waiting = self.sim.world.guest.waiting().join(", ");
        if !waiting.is_empty() {
            return self.fail(&format!("never answered: {waiting}"));
        }
        for _ in 0..20 {
            self.settle();
            if self.sim.is_direct() || !self.deadline_due() {
                break;
            }
            self.make(Move::Tick);
        }
        if !self.sim.is_direct() {
            return self.fail("direct mode does not come back");
        }
        let spb = self.sim.world.host.spb;
        let count = self.script.asks.len() + self.script.before.len();
        for block in 0..self.script.blocks.len() {
            for queue in 0..self.script.queues {
                self.request(count + block, queue, super::scripts::read(block * spb, spb));
                self.settle();
            }
        }
        self.sim.shut_down();
    }

    /// Lets everything happen that is under way, in one order.
    fn settle(&mut self) {
        while self.violation().is_none()
            && let Some(first) = self.events().first().copied()
        {
            self.make(first);
        }
    }

    pub(super) fn fail(&mut self, what: &str) {
        self.sim.world.fail(what.into());
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.sim.world.violation.clone()
    }

    pub(super) fn into_trace(mut self) -> Vec<String> {
        self.sim.world.take_trace()
    }

    /// Stands for everything that what happens later can depend on.
    pub(super) fn key(&self) -> u64 {
        let mut key = Key(DefaultHasher::new());
        let (sim, world) = (&self.sim, &self.sim.world);
        (&self.asked, self.opened, self.early, world.now).hash(&mut key.0);
        (&world.host, &world.model, &world.bounce).hash(&mut key.0);
        let mut queue: Vec<_> =
            world.queue.iter().filter_map(|e| Some((lane(&e.event)?, e.order, &e.event))).collect();
        queue.sort_unstable_by_key(|(lane, order, _)| (*lane, *order));
        let queue: Vec<_> = queue.iter().map(|(lane, _, event)| (lane, event)).collect();
        // Writing to a hasher cannot fail.
        let _ = write!(key, "{queue:?}{:?}{:?}", sim.keeper, sim.workers);
        let _ = write!(key, "{:?}{:?}{:?}", world.lease, world.outside, world.jobs);
        let _ = write!(key, "{:?}{:?}{:?}", world.ops, world.ended, world.guest.pending);
        key.0.finish()
    }
}

struct Key(DefaultHasher);

impl fmt::Write for Key {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// Makes the image of a script out of one that is written all over.
fn lay_out(sim: &mut Sim, blocks: &[Block]) {
    let host = &mut sim.world.host;
    for (index, block) in blocks.iter().enumerate() {
        match block {
            Block::Written => {}
            Block::Unwritten => host.layout.set_unwritten(index),
            Block::Shared => host.layout.set_shared(index),
            Block::Hole => {
                debug_assert_ne!(host.layout.block(index).place, NOWHERE);
                host.layout.unmap(index);
            }
        }
    }
    host.commit();
    let host = &sim.world.host;
    sim.world.model = Model::new((0..sim.world.scenario.sectors()).map(|at| host.stored(at)));
}
