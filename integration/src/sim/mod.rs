// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The deterministic simulator: the daemon's real workers and keeper over a made-up disk,
//! filesystem, page cache, lease, guest and neighbourhood, all driven by one seed.
//!
//! It contains no planning, barrier or mode logic: what it knows are the facts of the host's kernel
//! and what a guest or a neighbour may observe. A run ends at the first thing that must not be.

// A wrong index here is a bug in a test tool, and stopping on it names the seed.
#![allow(clippy::indexing_slicing)]

mod check;
mod disk;
mod evictions;
mod explore;
mod fences;
mod former;
mod guest;
mod hang;
mod hardship;
mod hazard;
mod host;
mod host_layout;
mod jobs;
mod joins;
mod layout;
mod life;
mod memory;
mod model;
mod mutant;
mod ops;
mod outside;
mod pagecache;
mod rates;
mod ring;
mod rng;
mod run;
mod scenario;
mod sharing;
mod slow;
mod steps;
mod strain;
mod trims;
mod wishes;
mod world;

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hazard::Hazards;
pub use mutant::Mutant;
use run::{Outcome, run};

/// Lines of the trace printed with a violation of a whole run.
const TAIL: usize = 60;

/// Options of `sim`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How many seeds to run; each mutant gets as many to be caught in.
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first of them; a run that failed is had again with the base it printed.
    #[arg(long, default_value_t = 0, value_name = "SEED", conflicts_with = "seed")]
    base: u64,
    /// Go through all seeds whatever fails, and count in how many each hazard is met and each
    /// mutant is caught.
    #[arg(long, conflicts_with_all = ["seed", "mutant", "exhaustive"])]
    rates: bool,
    /// Run this seed alone and print all of its trace.
    #[arg(long)]
    seed: Option<u64>,
    /// Switch one rule off; it must be caught.
    #[arg(long, value_enum)]
    mutant: Option<Mutant>,
    /// No seeds: go through every interleaving of a few small scripts.
    #[arg(long, conflicts_with_all = ["seeds", "seed"])]
    exhaustive: bool,
}

/// What many seeds came to.
#[derive(Debug, Default)]
struct Total {
    seeds: u64,
    events: u64,
    answered: u64,
    residue: u64,
    hazards: Hazards,
    /// Seeds that met each hazard.
    met: Hazards,
    /// Seeds that failed.
    failures: u64,
    /// The lowest seed that failed, and how.
    failed: Option<(u64, String)>,
}

/// Runs the simulator; whether everything is as it must be.
#[must_use]
pub fn simulate(options: &Options) -> bool {
    if options.exhaustive {
        return explore::exhaust(options.mutant);
    }
    if let Some(seed) = options.seed {
        return replay(seed, options.mutant, usize::MAX);
    }
    let seeds = options.base..options.base.saturating_add(options.seeds);
    if let Some(mutant) = options.mutant {
        return hunt(mutant, &seeds, true);
    }
    if options.rates {
        return rates::tell(&seeds);
    }
    // First, so that it is known whatever becomes of the run.
    println!(
        "sim: base {}: again with `sim --base {} --seeds {}`",
        seeds.start, seeds.start, options.seeds
    );
    let total = run_many(seeds.clone(), None);
    for (name, count) in total.hazards.iter() {
        println!("{count:>9}  {name}");
    }
    println!("{:>9}  requests answered", total.answered);
    println!("{:>9}  raw accesses in the documented residue of a size change", total.residue);
    if let Some((seed, _)) = &total.failed {
        replay(*seed, None, TAIL);
    }
    let caught = Mutant::ALL.iter().filter(|m| hunt(**m, &seeds, false)).count();
    let violations = u64::from(total.failed.is_some());
    println!(
        "sim: seeds={} events={} hazards_hit={}/{} mutants_caught={caught}/{} violations={violations}",
        total.seeds,
        total.events,
        total.hazards.met(),
        total.hazards.total(),
        Mutant::ALL.len(),
    );
    let met = total.hazards.met() == total.hazards.total();
    met && caught == Mutant::ALL.len() && total.failed.is_none()
}

/// Runs one seed and prints the end of its trace; whether it held.
fn replay(seed: u64, mutant: Option<Mutant>, lines: usize) -> bool {
    let outcome = run(seed, mutant, true);
    let skip = outcome.trace.len().saturating_sub(lines);
    for line in outcome.trace.iter().skip(skip) {
        println!("{line}");
    }
    match &outcome.violation {
        Some(what) => println!("seed {seed}: VIOLATION after {} events: {what}", outcome.events),
        None => println!("seed {seed}: {} events, no violation", outcome.events),
    }
    outcome.violation.is_none()
}

/// Looks for a seed in which a mutant is caught.
fn hunt(mutant: Mutant, seeds: &Range<u64>, loud: bool) -> bool {
    let total = run_many(seeds.clone(), Some(mutant));
    match total.failed {
        Some((seed, what)) => {
            println!("mutant {mutant:?}: caught by seed {seed}: {what}");
            if loud {
                replay(seed, Some(mutant), TAIL);
            }
            true
        }
        None => {
            let (first, count) = (seeds.start, seeds.end - seeds.start);
            println!("mutant {mutant:?}: NOT CAUGHT in {count} seeds from {first}");
            false
        }
    }
}

/// Runs seeds on all CPUs until one fails.
fn run_many(seeds: Range<u64>, mutant: Option<Mutant>) -> Total {
    run_until(seeds, mutant, |total| total.failed.is_some())
}

/// Runs seeds on all CPUs until what one of them did says `enough`.
fn run_until(seeds: Range<u64>, mutant: Option<Mutant>, enough: fn(&Total) -> bool) -> Total {
    let next = AtomicU64::new(seeds.start);
    let stop = AtomicBool::new(false);
    let total = Mutex::new(Total::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = Total::default();
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    mine.add(seed, run(seed, mutant, false));
                    if enough(&mine) {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
                if let Ok(mut total) = total.lock() {
                    total.merge(mine);
                }
            });
        }
    });
    total.into_inner().unwrap_or_default()
}

impl Total {
    fn add(&mut self, seed: u64, outcome: Outcome) {
        self.seeds += 1;
        self.events += outcome.events;
        self.answered += outcome.answered;
        self.residue += outcome.residue;
        self.hazards.add(&outcome.hazards);
        self.met.add(&outcome.hazards.once());
        if let Some(what) = outcome.violation {
            self.failures += 1;
            self.failed.get_or_insert((seed, what));
        }
    }

    fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.events += other.events;
        self.answered += other.answered;
        self.residue += other.residue;
        self.hazards.add(&other.hazards);
        self.met.add(&other.met);
        self.failures += other.failures;
        if let Some(failed) = other.failed
            && self.failed.as_ref().is_none_or(|mine| failed.0 < mine.0)
        {
            self.failed = Some(failed);
        }
    }
}

#[cfg(test)]
#[path = "sim_tests.rs"]
mod tests;
