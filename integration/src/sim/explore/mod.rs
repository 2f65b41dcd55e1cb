// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every interleaving of small scripts, where the seeds of the simulator are only samples of large ones.
//!
//! Depth first over what may happen next; a choice that is taken back is undone by playing the
//! others again from the start, so nothing need be cloned. A state that was met before is not gone
//! through again: what comes of it is known, and how many ways lead through it is counted.

mod scripts;
mod stage;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::mutant::Mutant;
use scripts::{SCRIPTS, Script};
use stage::{Move, Stage};

/// More moves than any script can take.
const DEEPEST: usize = 2_000;

/// What exploring a script came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Tally {
    interleavings: u128,
    states: usize,
}

/// Moves that lead to something that must not be, and what that is.
#[derive(Debug)]
struct Failure {
    path: Vec<Move>,
    what: String,
}

/// Goes through all scripts, with a rule switched off if asked; whether everything held.
pub(super) fn exhaust(mutant: Option<Mutant>) -> bool {
    let (mut total, mut violations) = (0, 0);
    for script in SCRIPTS {
        match explore(script, mutant) {
            Ok(tally) => {
                let Tally { interleavings, states } = tally;
                println!(
                    "{:<28} {interleavings:>28} interleavings  {states:>7} states",
                    script.name
                );
                total += interleavings;
            }
            Err(failure) => {
                for line in trace(script, mutant, &failure.path) {
                    println!("{line}");
                }
                println!("{:<28} VIOLATION: {}", script.name, failure.what);
                violations += 1;
            }
        }
    }
    let scripts = SCRIPTS.len();
    println!("exhaustive: scripts={scripts} interleavings={total} violations={violations}");
    violations == 0
}

/// A node of the tree with the moves that are possible there.
struct Node {
    key: u64,
    moves: Vec<Move>,
    /// Moves that have been gone through.
    done: usize,
    interleavings: u128,
}

/// Goes through all interleavings of a script.
fn explore(script: &'static Script, mutant: Option<Mutant>) -> Result<Tally, Failure> {
    // `None` while a state's own future is being gone through.
    let mut known: HashMap<u64, Option<u128>> = HashMap::new();
    let mut nodes: Vec<Node> = Vec::new();
    let mut path: Vec<Move> = Vec::new();
    let mut stage = play(script, mutant, &path)?;
    loop {
        let key = stage.key();
        let mut count = match known.get(&key) {
            Some(Some(count)) => *count,
            Some(None) => return Err(Failure { path, what: "goes round in circles".into() }),
            None => {
                let moves = stage.moves();
                if let Some(first) = moves.first().copied() {
                    known.insert(key, None);
                    nodes.push(Node { key, moves, done: 0, interleavings: 0 });
                    path.push(first);
                    step(&mut stage, &path, first)?;
                    continue;
                }
                finish(stage, &path)?;
                known.insert(key, Some(1));
                1
            }
        };
        loop {
            let Some(node) = nodes.last_mut() else {
                return Ok(Tally { interleavings: count, states: known.len() });
            };
            path.pop();
            node.interleavings += count;
            node.done += 1;
            if let Some(next) = node.moves.get(node.done).copied() {
                path.push(next);
                break;
            }
            count = node.interleavings;
            known.insert(node.key, Some(count));
            nodes.pop();
        }
        stage = play(script, mutant, &path)?;
    }
}

/// Makes these moves from the start; all but the last have been looked at before.
fn play(script: &'static Script, mutant: Option<Mutant>, path: &[Move]) -> Result<Stage, Failure> {
    let mut stage = Stage::new(script, mutant, false);
    let (last, before) = path.split_last().map_or((None, path), |(last, rest)| (Some(*last), rest));
    before.iter().for_each(|choice| stage.make(*choice));
    match last {
        Some(choice) => step(&mut stage, path, choice)?,
        None => verdict(&stage, path)?,
    }
    Ok(stage)
}

/// Makes the last move of a path and checks what is true at all times.
fn step(stage: &mut Stage, path: &[Move], choice: Move) -> Result<(), Failure> {
    guarded(stage, |stage| {
        stage.make(choice);
        stage.check();
        if path.len() > DEEPEST {
            stage.fail("does not come to an end");
        }
    });
    verdict(stage, path)
}

fn finish(mut stage: Stage, path: &[Move]) -> Result<(), Failure> {
    guarded(&mut stage, Stage::finish);
    verdict(&stage, path)
}

/// A panic is a violation like any other.
fn guarded(stage: &mut Stage, act: impl FnOnce(&mut Stage)) {
    if catch_unwind(AssertUnwindSafe(|| act(stage))).is_err() {
        stage.fail("panicked; the message is above");
    }
}

fn verdict(stage: &Stage, path: &[Move]) -> Result<(), Failure> {
    match stage.violation() {
        Some(what) => Err(Failure { path: path.to_vec(), what }),
        None => Ok(()),
    }
}

/// The same moves once more, for the record.
fn trace(script: &'static Script, mutant: Option<Mutant>, path: &[Move]) -> Vec<String> {
    let mut stage = Stage::new(script, mutant, true);
    for choice in path {
        guarded(&mut stage, |stage| stage.make(*choice));
    }
    if stage.violation().is_none() && stage.moves().is_empty() {
        guarded(&mut stage, Stage::finish);
    }
    stage.into_trace()
}

#[cfg(test)]
#[path = "explore_tests.rs"]
mod tests;
