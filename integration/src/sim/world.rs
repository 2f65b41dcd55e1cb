// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything outside the daemon's pure core, and the queue of what happens next.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};

use extentd::engine::Completion;
use extentd::engine::message::{JobDone, JobId, ToKeeper, ToWorker, WorkerId};

use super::disk::{Disk, Stamp, ZERO};
use super::guest::Guest;
use super::hazard::{Hazard, Hazards};
use super::host::Host;
use super::jobs::Jobs;
use super::layout::Layout;
use super::model::Model;
use super::ops::InFlight;
use super::outside::{Lease, Outside};
use super::rng::Rng;
use super::scenario::{Fill, Scenario};
use super::strain::Strain;

/// Marks what the guest's image held at the start.
const INITIAL: Stamp = 0x11 << 56;
/// Marks what the disk held before the filesystem was made.
const GARBAGE: Stamp = 0xBA << 56;

/// Something that happens.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// The guest puts a request into a queue.
    Issue,
    /// An operation goes one step on, or ends.
    Step(u64),
    /// A worker looks at its completions.
    Reap(WorkerId),
    ToWorker(WorkerId, ToWorker),
    ToKeeper(WorkerId, ToKeeper),
    /// A worker has ended; comes after its last message.
    Left(WorkerId),
    /// The helper thread goes one step on.
    Job,
    JobDone(JobId, JobDone),
    /// The keeper's deadline.
    Tick,
    LeaseSignal,
    SizeChanged,
    /// The lease-break time of that break is over.
    Forced(u64),
    /// Something an outside opener does.
    Opener(u64),
    /// A dirty page is written back.
    Writeback,
    WritebackEnds(u64),
    /// `truncate` through an overlay: no open, no break.
    Overlay,
    /// A new daemon starts.
    Restart,
    /// A new session starts.
    SessionStart,
    /// Something from the list of misfortunes.
    Incident,
    /// A stall is over.
    Wake,
    /// The power fails.
    Blackout,
    /// A worker joins this session late.
    Join(u32),
    /// A worker hands its ring over to the kernel.
    Enter(WorkerId),
    /// This lease break should have been answered by now.
    Overdue(u64),
}

/// Who an event is delivered to, as far as stalls go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Party {
    World,
    Keeper,
    Worker(WorkerId),
    /// The helper thread.
    Helper,
}

impl Event {
    pub(super) const fn party(&self) -> Party {
        match self {
            Self::Reap(id) | Self::ToWorker(id, _) | Self::Enter(id) => Party::Worker(*id),
            Self::ToKeeper(..) | Self::Left(_) | Self::JobDone(..) | Self::Tick => Party::Keeper,
            Self::LeaseSignal | Self::SizeChanged | Self::SessionStart => Party::Keeper,
            Self::Join(_) => Party::Keeper,
            Self::Job => Party::Helper,
            _ => Party::World,
        }
    }
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) at: u64,
    pub(super) order: u64,
    /// The daemon it belongs to; dropped when that one is dead.
    life: Option<u32>,
    pub(super) event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    /// The earliest is the greatest, as a heap wants it.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// Threads that get no CPU until some moment.
///
/// A stall is never cut short: what it holds up has been put off to its end already.
#[derive(Clone, Debug, Default)]
pub(super) struct Stalls {
    pub(super) all: u64,
    pub(super) keeper: u64,
    pub(super) workers: BTreeMap<WorkerId, u64>,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) scenario: Scenario,
    pub(super) rng: Rng,
    /// Microseconds.
    pub(super) now: u64,
    pub(super) queue: BinaryHeap<Entry>,
    order: u64,
    /// Which daemon lives; counts up at each death.
    pub(super) life: u32,
    pub(super) alive: bool,
    /// Nothing new goes wrong any more.
    pub(super) peace: bool,
    pub(super) stalls: Stalls,
    pub(super) host: Host,
    pub(super) lease: Lease,
    pub(super) outside: Outside,
    pub(super) ops: BTreeMap<u64, InFlight>,
    pub(super) next_key: u64,
    /// By worker: ended operations it has not reaped.
    pub(super) ended: BTreeMap<WorkerId, VecDeque<Completion>>,
    /// By worker: bounce buffers.
    pub(super) bounce: BTreeMap<WorkerId, Vec<Vec<Stamp>>>,
    pub(super) guest: Guest,
    pub(super) model: Model,
    pub(super) jobs: Jobs,
    pub(super) hazards: Hazards,
    /// Workers that have been told to begin.
    pub(super) begun: BTreeSet<WorkerId>,
    /// When a slow device is done with what it has been given.
    pub(super) device_free: u64,
    pub(super) strain: Strain,
    /// Raw operations ever started.
    pub(super) raw: u64,
    /// Raw accesses that the design page documents as unavoidable (R5a).
    pub(super) residue: u64,
    pub(super) events: u64,
    trace: Option<VecDeque<String>>,
    pub(super) violation: Option<String>,
}

impl World {
    pub(super) fn new(mut rng: Rng, scenario: Scenario, traced: bool) -> Self {
        let host = new_host(&scenario, &mut rng);
        let model = Model::new((0..scenario.sectors()).map(|s| host.stored(s)));
        Self {
            guest: Guest::new(&scenario, &mut rng),
            scenario,
            rng,
            now: 0,
            queue: BinaryHeap::new(),
            order: 0,
            life: 0,
            alive: false,
            peace: false,
            stalls: Stalls::default(),
            host,
            lease: Lease::default(),
            outside: Outside::default(),
            ops: BTreeMap::new(),
            next_key: 1,
            ended: BTreeMap::new(),
            bounce: BTreeMap::new(),
            model,
            jobs: Jobs::default(),
            hazards: Hazards::default(),
            begun: BTreeSet::new(),
            device_free: 0,
            strain: Strain::default(),
            raw: 0,
            residue: 0,
            events: 0,
            trace: traced.then(VecDeque::new),
            violation: None,
        }
    }

    /// Lets `event` happen `delay` microseconds from now, whoever lives then.
    pub(super) fn after(&mut self, delay: u64, event: Event) {
        self.push(self.now + delay, None, event);
    }

    /// The same, if this daemon still lives then.
    pub(super) fn daemon_after(&mut self, delay: u64, event: Event) {
        self.push(self.now + delay, Some(self.life), event);
    }

    /// The same at a given time.
    pub(super) fn daemon_at(&mut self, at: u64, event: Event) {
        self.push(at.max(self.now), Some(self.life), event);
    }

    fn push(&mut self, at: u64, life: Option<u32>, event: Event) {
        self.order += 1;
        self.queue.push(Entry { at, order: self.order, life, event });
    }

    /// The next event that still concerns somebody and is not held up by a stall.
    pub(super) fn pop(&mut self) -> Option<Event> {
        loop {
            let entry = self.queue.pop()?;
            if entry.life.is_some_and(|life| life != self.life || !self.alive) {
                continue;
            }
            let wait = self.stalled(entry.event.party());
            if wait > entry.at {
                // It keeps its place in the order, so that channels stay first in, first out.
                self.queue.push(Entry { at: wait, ..entry });
                continue;
            }
            self.now = entry.at;
            self.events += 1;
            return Some(entry.event);
        }
    }

    /// Until when a party gets no CPU.
    fn stalled(&self, party: Party) -> u64 {
        match party {
            Party::World => 0,
            Party::Helper => self.stalls.all,
            Party::Keeper => self.stalls.all.max(self.stalls.keeper).max(self.strain.busy),
            Party::Worker(id) => {
                let own = self.stalls.workers.get(&id).copied().unwrap_or(0);
                self.stalls.all.max(own)
            }
        }
    }

    /// Whether a worker gets no CPU now.
    pub(super) fn is_stalled(&self, worker: WorkerId) -> bool {
        self.stalled(Party::Worker(worker)) > self.now
    }

    pub(super) fn hit(&mut self, hazard: Hazard) {
        self.hazards.hit(hazard);
    }

    /// Notes a broken rule; the first one counts.
    pub(super) fn fail(&mut self, what: String) {
        self.trace(|| format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    /// Adds a line to the trace of a replay.
    pub(super) fn trace(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push_back(format!("{:>9} {}", self.now, line()));
        }
    }

    pub(super) fn take_trace(&mut self) -> Vec<String> {
        self.trace.take().map(Vec::from).unwrap_or_default()
    }

    pub(super) fn delay(&mut self, low: u64, high: u64) -> u64 {
        self.rng.delay(low, high)
    }

    /// Checks what every buffered reader would see now against the model.
    pub(super) fn audit(&mut self, when: &str) {
        for at in 0..self.scenario.sectors() {
            let saw = self.host.visible(at);
            if let Err(wrong) = self.model.check(at, saw) {
                self.fail(format!("{when}: a buffered reader would be misled: {wrong}"));
                return;
            }
        }
        self.check_canary();
    }

    pub(super) fn check_canary(&mut self) {
        if let Some(place) = self.host.dead_canary() {
            self.fail(format!("the canary's block {place} was overwritten"));
        }
    }
}

/// A disk with the image on it.
fn new_host(scenario: &Scenario, rng: &mut Rng) -> Host {
    let spb = scenario.spb;
    let disk = Disk::new(scenario.places() * spb, |s| GARBAGE | s as u64);
    let layout = Layout::new(scenario.blocks, scenario.sectors(), scenario.places());
    let mut host = Host::new(disk, layout, spb, scenario.greed);
    host.barriers = scenario.barriers;
    host.former.often = scenario.former;
    for block in 0..scenario.blocks {
        let written = match scenario.fill {
            _ if scenario.identity() => Some(true),
            Fill::Written => Some(true),
            Fill::Holes => None,
            Fill::Unwritten => Some(false),
            Fill::Mixed | Fill::Cloned => [None, Some(false), Some(true)][rng.index(3)],
        };
        let Some(written) = written else { continue };
        let place = if scenario.identity() { Some(block) } else { host.find(block, rng) };
        let Some(place) = place else { continue };
        host.layout.map(block, place, written);
        for i in 0..spb {
            if written {
                let stamp = INITIAL | (block * spb + i) as u64;
                let beyond = block * spb + i >= scenario.sectors();
                host.disk.write_durable(place * spb + i, if beyond { ZERO } else { stamp });
            }
        }
        if written && scenario.fill == Fill::Cloned && rng.chance(400) && !scenario.identity() {
            host.layout.set_shared(block);
        }
    }
    host.commit();
    host
}
