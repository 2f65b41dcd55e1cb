// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The barrier against an oracle that remembers each write's place in one global order.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Event {
    Begin(u32),
    EndOldest(u32),
    Ask(u32),
    Synced(bool),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0u32..3).prop_map(Event::Begin),
        4 => (0u32..3).prop_map(Event::EndOldest),
        2 => (0u32..3).prop_map(Event::Ask),
        2 => prop::bool::weighted(0.9).prop_map(Event::Synced),
    ]
}

/// Three workers and a group commit, with messages delivered at once.
#[derive(Default)]
struct World {
    workers: BTreeMap<u32, (Generations, Vec<(u64, Generation)>)>,
    commit: GroupCommit,
    clock: u64,
    asked: BTreeMap<Tag, u64>,
    answered: BTreeMap<Tag, i32>,
    syncing: bool,
}

impl World {
    /// Who has to reach a point: nobody if all are still, as the keeper sees it.
    fn ids(&self) -> BTreeSet<WorkerId> {
        if self.workers.values().all(|(generations, _)| generations.is_still()) {
            return BTreeSet::new();
        }
        self.workers.keys().map(|w| WorkerId(*w)).collect()
    }

    fn step(&mut self, step: Option<Step>) {
        let Some(step) = step else { return };
        match step {
            Step::Point(id, workers) => {
                for w in workers {
                    self.workers.get_mut(&w.0).unwrap().0.point(id);
                    self.reached(w.0);
                }
            }
            Step::Sync(..) => {
                // R13: nothing accepted before any flush of this group is still under way.
                let newest = self.commit.running.iter().map(|(_, t)| self.asked[t]).max().unwrap();
                for (_, open) in self.workers.values() {
                    assert!(open.iter().all(|(at, _)| *at > newest), "a flush overtakes a write");
                }
                self.syncing = true;
            }
            Step::Answer(waiters, errno) => {
                for (_, tag) in waiters {
                    assert!(self.answered.insert(tag, errno).is_none(), "answered twice");
                }
                let next = self.commit.start(&self.ids());
                self.step(next);
            }
        }
    }

    fn reached(&mut self, worker: u32) {
        if let Some(id) = self.workers.get_mut(&worker).unwrap().0.reached() {
            self.commit.soil(Dirt { metadata: true, device: None });
            let step = self.commit.reached(WorkerId(worker), id);
            self.step(step);
        }
    }

    fn end(&mut self, worker: u32, index: usize) {
        let (generations, open) = self.workers.get_mut(&worker).unwrap();
        if index < open.len() {
            let (_, generation) = open.remove(index);
            generations.end(generation);
            self.reached(worker);
        }
    }
}

proptest! {
    #[test]
    fn a_flush_never_overtakes_a_write_and_each_is_answered_once(
        events in prop::collection::vec(event(), 1..120)
    ) {
        let mut world = World::default();
        for w in 0..3 {
            world.workers.insert(w, Default::default());
        }
        for event in events {
            world.clock += 1;
            match event {
                Event::Begin(w) => {
                    let at = world.clock;
                    let (generations, open) = world.workers.get_mut(&w).unwrap();
                    let generation = generations.begin();
                    open.push((at, generation));
                }
                Event::EndOldest(w) => world.end(w, 0),
                Event::Ask(w) => {
                    let tag = Tag(u32::try_from(world.clock).unwrap());
                    world.asked.insert(tag, world.clock);
                    let ids = world.ids();
                    let step = world.commit.ask((WorkerId(w), tag), &ids);
                    world.step(step);
                }
                Event::Synced(ok) if world.syncing => {
                    world.syncing = false;
                    let step = world.commit.synced(if ok { 0 } else { 5 });
                    world.step(step);
                }
                Event::Synced(_) => {}
            }
        }
        // Everything ends: then every flush is answered.
        for w in 0..3 {
            while !world.workers[&w].1.is_empty() {
                world.end(w, 0);
            }
        }
        while world.syncing {
            world.syncing = false;
            let step = world.commit.synced(0);
            world.step(step);
        }
        prop_assert_eq!(world.asked.len(), world.answered.len());
    }
}

#[test]
fn a_failed_flush_fails_those_that_wait_and_those_that_come_until_reset() {
    let workers = BTreeSet::from([WorkerId(0)]);
    let mut commit = GroupCommit::new(Dirt { metadata: true, device: None });
    assert!(matches!(commit.ask((WorkerId(0), Tag(1)), &workers), Some(Step::Point(..))));
    assert_eq!(commit.ask((WorkerId(0), Tag(2)), &workers), None);
    let dirt = Dirt { metadata: true, device: None };
    assert_eq!(commit.reached(WorkerId(0), PointId(1)), Some(Step::Sync(WorkerId(0), dirt)));
    let both = vec![(WorkerId(0), Tag(1)), (WorkerId(0), Tag(2))];
    assert_eq!(commit.synced(5), Some(Step::Answer(both, 5)));
    let third = vec![(WorkerId(0), Tag(3))];
    assert_eq!(commit.ask((WorkerId(0), Tag(3)), &workers), Some(Step::Answer(third, 5)));
    commit.reset();
    assert!(matches!(commit.ask((WorkerId(0), Tag(4)), &workers), Some(Step::Point(..))));
    // The dirt is still there to be flushed.
    assert_eq!(commit.reached(WorkerId(0), PointId(2)), Some(Step::Sync(WorkerId(0), dirt)));
}

#[test]
fn a_loss_that_no_flush_was_told_of_fails_the_one_under_way_and_those_to_come() {
    let workers: BTreeSet<WorkerId> = [WorkerId(0)].into();
    let mut commit = GroupCommit::new(Dirt { metadata: true, device: None });
    let Some(Step::Point(id, _)) = commit.ask((WorkerId(0), Tag(1)), &workers) else { panic!() };
    assert!(matches!(commit.reached(WorkerId(0), id), Some(Step::Sync(..))));
    commit.lost(5);
    // The kernel has told the error already, so the sync itself succeeds.
    assert_eq!(commit.synced(0), Some(Step::Answer(vec![(WorkerId(0), Tag(1))], 5)));
    let later = commit.ask((WorkerId(0), Tag(2)), &workers);
    assert_eq!(later, Some(Step::Answer(vec![(WorkerId(0), Tag(2))], 5)));
    commit.reset();
    assert_eq!(commit.failed(), None);
}
