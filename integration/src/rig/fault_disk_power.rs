// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault disk's power switch: requests meet the platter here, and none do while it is off.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuser::Errno;

use super::fault_disk_platter::{Event, Loss, Piece, Platter};
use super::fault_disk_rules::Rules;
use super::model::SECTOR;
use super::random::Random;

/// When an armed cut happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Right after this many more writes and flushes.
    Requests(u64),
    /// Right after this many more flushes, which is when the most was promised.
    Flushes(u64),
}

/// A power cut to come.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    /// When.
    pub when: When,
    /// What it may take.
    pub loss: Loss,
    /// Decides what it does take.
    pub seed: u64,
}

/// What happened to the disk's bytes, in order.
#[derive(Debug, Clone, Default)]
pub struct Log {
    events: VecDeque<Event>,
    bytes: usize,
    limit: usize,
    forgotten: u64,
}

impl Log {
    fn add(&mut self, event: Event) {
        self.bytes += weight(&event);
        self.events.push_back(event);
        while self.bytes > self.limit {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= weight(&oldest);
            self.forgotten += 1;
        }
    }

    /// All of it, oldest first.
    pub fn events(&self) -> impl Iterator<Item = &Event> {
        self.events.iter()
    }

    /// Events that did not fit.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Does to `platter` what was done to the disk; an error if some of that is forgotten.
    pub fn replay(&self, platter: &mut Platter) -> io::Result<()> {
        if self.forgotten > 0 {
            return Err(io::Error::other(format!("{} events are forgotten", self.forgotten)));
        }
        self.events.iter().for_each(|event| platter.apply(event));
        Ok(())
    }

    /// What happened to the sectors that begin with `prefix`, one event a line, flushes and cuts among them.
    pub fn story(&self, prefix: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for (number, event) in (self.forgotten..).zip(&self.events) {
            match event {
                Event::Write(piece) => {
                    lines.extend(sightings(piece, prefix).map(|s| format!("#{number} write {s}")));
                }
                Event::Flush { covers } => {
                    lines.push(format!("#{number} flush of the first {covers}"))
                }
                Event::Cut { survivors } => {
                    lines.push(format!("#{number} cut, {} pieces survive", survivors.len()));
                    let seen = survivors.iter().flat_map(|piece| sightings(piece, prefix));
                    lines.extend(seen.map(|s| format!("#{number} survives {s}")));
                }
            }
        }
        lines
    }
}

fn sightings<'a>(piece: &'a Piece, prefix: &'a [u8]) -> impl Iterator<Item = String> + 'a {
    let sectors = piece.data.chunks(SECTOR).zip((piece.offset..).step_by(SECTOR));
    sectors.filter(|(data, _)| data.starts_with(prefix)).map(|(data, at)| {
        format!("at {at}: {:02x?}", data.get(..32.min(data.len())).unwrap_or_default())
    })
}

fn weight(event: &Event) -> usize {
    64 + match event {
        Event::Write(piece) => piece.data.len(),
        Event::Flush { .. } => 0,
        Event::Cut { survivors } => survivors.iter().map(|p| 32 + p.data.len()).sum(),
    }
}

#[derive(Debug)]
struct State {
    platter: Platter,
    on: bool,
    /// Counts the power's comings, so that a request from before a cut does not end in a later life.
    life: u64,
    in_flight: BTreeMap<u64, Piece>,
    next: u64,
    armed: Option<Cut>,
    log: Option<Log>,
}

/// The platter behind its switch.
#[derive(Debug)]
pub(super) struct Power {
    state: Mutex<State>,
    gone: Condvar,
    rules: Arc<Rules>,
}

/// A write or flush on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    life: u64,
    /// A write's number, or how many writes a flush covers.
    number: u64,
}

impl Power {
    pub(super) fn new(size: usize, rules: Arc<Rules>) -> Power {
        let state = State {
            platter: Platter::new(size),
            on: true,
            life: 0,
            in_flight: BTreeMap::new(),
            next: 0,
            armed: None,
            log: None,
        };
        Power { state: Mutex::new(state), gone: Condvar::new(), rules }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `buffer` from the disk.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let state = self.lock();
        let start = usize::try_from(offset).map_err(|_| Errno::EIO)?;
        let end = start.checked_add(buffer.len()).ok_or(Errno::EIO)?;
        match state.platter.bytes().get(start..end) {
            Some(bytes) if state.on => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            _ => Err(Errno::EIO),
        }
    }

    /// A write has arrived. Until it ends a power cut may leave any part of it on the medium.
    pub(super) fn begin_write(&self, offset: u64, data: &[u8]) -> Result<Ticket, Errno> {
        let mut state = self.lock();
        let size = state.platter.bytes().len() as u64;
        if !state.on || offset.saturating_add(data.len() as u64) > size {
            return Err(Errno::EIO);
        }
        state.next += 1;
        let (life, number) = (state.life, state.next);
        state.in_flight.insert(number, Piece { offset, data: data.into() });
        Ok(Ticket { life, number })
    }

    /// The write ends: in the cache, or with an error.
    pub(super) fn end_write(&self, ticket: Ticket, go: Result<(), Errno>) -> Result<(), Errno> {
        let mut state = self.lock();
        if state.life != ticket.life || !state.on {
            return Err(Errno::EIO);
        }
        let piece = state.in_flight.remove(&ticket.number).ok_or(Errno::EIO)?;
        go?;
        self.happen(&mut state, Event::Write(piece));
        self.count_down(&mut state, false);
        Ok(())
    }

    /// A flush has arrived.
    pub(super) fn begin_flush(&self) -> Result<Ticket, Errno> {
        let state = self.lock();
        let ticket = Ticket { life: state.life, number: state.platter.written() };
        if state.on { Ok(ticket) } else { Err(Errno::EIO) }
    }

    /// The flush ends; what had been written when it arrived is on the medium unless it failed.
    pub(super) fn end_flush(&self, ticket: Ticket, go: Result<(), Errno>) -> Result<(), Errno> {
        let mut state = self.lock();
        if state.life != ticket.life || !state.on {
            return Err(Errno::EIO);
        }
        go?;
        self.happen(&mut state, Event::Flush { covers: ticket.number });
        self.count_down(&mut state, true);
        Ok(())
    }

    fn happen(&self, state: &mut State, event: Event) {
        state.platter.apply(&event);
        if let Some(log) = &mut state.log {
            log.add(event);
        }
    }

    fn count_down(&self, state: &mut State, flush: bool) {
        let Some(cut) = &mut state.armed else { return };
        let left = match &mut cut.when {
            When::Requests(left) => left,
            When::Flushes(left) if flush => left,
            When::Flushes(_) => return,
        };
        *left = left.saturating_sub(1);
        if *left == 0 {
            let cut = *cut;
            self.fall(state, cut.loss, cut.seed);
        }
    }

    fn fall(&self, state: &mut State, loss: Loss, seed: u64) {
        if !state.on {
            return;
        }
        state.on = false;
        state.armed = None;
        let in_flight = std::mem::take(&mut state.in_flight);
        let random = &mut Random::new(seed);
        let survivors = state.platter.survivors(loss, in_flight.values(), random);
        self.happen(state, Event::Cut { survivors });
        // Nothing waits on a disk without power.
        self.rules.clear();
        self.gone.notify_all();
    }

    pub(super) fn fill(&self, pattern: &[u8]) {
        self.lock().platter.fill(pattern);
    }

    pub(super) fn arm(&self, cut: Cut) {
        self.lock().armed = Some(cut);
    }

    pub(super) fn cut(&self, loss: Loss, seed: u64) {
        self.fall(&mut self.lock(), loss, seed);
    }

    pub(super) fn on(&self) {
        let mut state = self.lock();
        if !state.on {
            state.on = true;
            state.life += 1;
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.lock().on
    }

    pub(super) fn await_cut(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        while state.on {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.gone.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    pub(super) fn record(&self, limit: usize) {
        self.lock().log = Some(Log { limit, ..Log::default() });
    }

    pub(super) fn take_log(&self) -> Log {
        self.lock().log.take().unwrap_or_default()
    }

    pub(super) fn platter(&self) -> Platter {
        self.lock().platter.clone()
    }
}
