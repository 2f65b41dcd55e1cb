// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the fault disk does to which request.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuser::Errno;

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Data from the disk.
    Read,
    /// Data to the disk.
    Write,
    /// A device flush.
    Flush,
}

/// What happens to a request that matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Delay(Duration),
    Hold,
    Fail,
}

/// One rule: which requests, what happens to them, how many times.
#[derive(Debug, Clone)]
pub struct Rule {
    operation: Operation,
    range: Range<u64>,
    prefix: Vec<u8>,
    effect: Effect,
    left: u64,
    id: u64,
}

impl Rule {
    fn new(operation: Operation, effect: Effect) -> Rule {
        Rule { operation, range: 0..u64::MAX, prefix: Vec::new(), effect, left: u64::MAX, id: 0 }
    }

    /// Requests take `time`; a write's bytes change at the end of it.
    pub fn delay(operation: Operation, time: Duration) -> Rule {
        Rule::new(operation, Effect::Delay(time))
    }

    /// Requests wait until the rule is lifted.
    pub fn hold(operation: Operation) -> Rule {
        Rule::new(operation, Effect::Hold)
    }

    /// Requests end in EIO and change nothing.
    pub fn fail(operation: Operation) -> Rule {
        Rule::new(operation, Effect::Fail)
    }

    /// Only requests that touch these bytes of the disk.
    #[must_use]
    pub fn within(mut self, range: Range<u64>) -> Rule {
        self.range = range;
        self
    }

    /// Only writes whose data begins with `prefix`: finds a guest's block wherever the filesystem has put it.
    #[must_use]
    pub fn starting(mut self, prefix: &[u8]) -> Rule {
        self.prefix = prefix.to_vec();
        self
    }

    /// Only the next `count` requests that match.
    #[must_use]
    pub fn times(mut self, count: u64) -> Rule {
        self.left = count;
        self
    }

    fn matches(&self, operation: Operation, offset: u64, len: u64, data: &[u8]) -> bool {
        let touches = operation == Operation::Flush
            || (offset < self.range.end && self.range.start < offset + len);
        self.operation == operation && self.left > 0 && touches && data.starts_with(&self.prefix)
    }
}

/// Requests seen so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Device flushes.
    pub flushes: u64,
    /// Requests a rule delayed, held or failed.
    pub hit: u64,
    /// Requests being served now.
    pub in_flight: u64,
    /// The most requests ever served at the same time.
    pub deepest: u64,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    next_id: u64,
    counts: Counts,
}

/// The rules of a disk, shared between it and its test.
#[derive(Debug, Default)]
pub(super) struct Rules {
    state: Mutex<State>,
    lifted: Condvar,
}

/// What a request has to go through before it is served.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fate {
    effect: Effect,
    id: u64,
}

impl Rules {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, mut rule: Rule) {
        let mut state = self.lock();
        state.next_id += 1;
        rule.id = state.next_id;
        state.rules.push(rule);
    }

    pub(super) fn clear(&self) {
        self.lock().rules.clear();
        self.lifted.notify_all();
    }

    pub(super) fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// A request arrives. `None`: it can be served at once.
    pub(super) fn arrive(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        data: &[u8],
    ) -> Option<Fate> {
        let mut state = self.lock();
        let counts = &mut state.counts;
        match operation {
            Operation::Read => counts.reads += 1,
            Operation::Write => counts.writes += 1,
            Operation::Flush => counts.flushes += 1,
        }
        counts.in_flight += 1;
        counts.deepest = counts.deepest.max(counts.in_flight);
        let rule =
            state.rules.iter_mut().find(|rule| rule.matches(operation, offset, len, data))?;
        rule.left -= 1;
        let fate = Fate { effect: rule.effect, id: rule.id };
        state.counts.hit += 1;
        Some(fate)
    }

    /// Waits as `fate` says. An error is the request's answer.
    pub(super) fn suffer(&self, fate: Fate) -> Result<(), Errno> {
        let limit = match fate.effect {
            Effect::Fail => return Err(Errno::EIO),
            Effect::Delay(time) => time,
            Effect::Hold => Duration::from_secs(3600),
        };
        let end = Instant::now() + limit;
        let mut state = self.lock();
        // Lifting the rules ends a delay too, so that a test's end never waits for one.
        while state.rules.iter().any(|rule| rule.id == fate.id) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.lifted.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    pub(super) fn leave(&self) {
        self.lock().counts.in_flight -= 1;
    }
}
