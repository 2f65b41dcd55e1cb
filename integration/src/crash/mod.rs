// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Power cuts and kills on real filesystems, over a disk that forgets what was not flushed.
//!
//! Three hosts (ext4, ext4 without barriers, XFS) crash beside each other, each over and over: a guest that keeps a ledger of what it was
//! promised writes through extentd, the power goes between two requests of the disk (or the daemon is killed with writes in
//! flight), the next life begins on what the disk has kept, and all of the image is held against the ledger. Before that each
//! has a canary, which must outlive a discard in the middle of a write. A golden image is served beside, read-only, while others
//! on the host open it, copy it and have its blocks moved.

mod canary;
mod golden;
mod host;
mod lane;
mod ledger;
mod load;
mod operations;

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use clap::ValueEnum;

use self::host::{FLAVOURS, Flavour};
use self::lane::{Crash, Lane};
use crate::rig::daemon::Daemon;
use crate::rig::model::SECTOR;
use crate::rig::program;
use crate::rig::random::Random;
use crate::sim::Mutant;

/// The subcommand of this program that is an extentd under other rules.
pub const MUTANT_DAEMON: &str = "mutant-daemon";

/// Options of `crash`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// How many power cuts
    #[arg(long, value_name = "N")]
    cuts: Option<u64>,
    /// How many kills
    #[arg(long, value_name = "N")]
    kills: Option<u64>,
    /// 5000 cuts and 500 kills unless said otherwise; else it is 200 and 20
    #[arg(long)]
    soak: bool,
    /// Take the decisions of an earlier run again
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Only on this host: ext4, "ext4,barrier=0" or xfs
    #[arg(long, value_name = "NAME")]
    host: Option<String>,
    /// Break one rule in the daemon; it must end in a loss
    #[arg(long, value_enum)]
    mutant: Option<Mutant>,
    /// The extentd to crash [default: the workspace's, built in release]
    #[arg(long, value_name = "PROGRAM")]
    extentd: Option<PathBuf>,
}

/// What is started as the daemon.
#[derive(Debug)]
struct Program {
    path: PathBuf,
    role: Vec<String>,
}

impl Program {
    fn find(options: &Options) -> io::Result<Program> {
        if let Some(mutant) = options.mutant {
            let name = mutant.to_possible_value().map_or_else(String::new, |v| v.get_name().into());
            if !mutant.is_of_the_engine() {
                return Err(io::Error::other(format!(
                    "{name} is a mutant of the simulator's world"
                )));
            }
            let role = vec![MUTANT_DAEMON.to_owned(), name];
            return Ok(Program { path: std::env::current_exe()?, role });
        }
        let path = options.extentd.clone().map_or_else(program::build, Ok)?;
        Ok(Program { path, role: Vec::new() })
    }

    fn start(&self, dir: &Path, image: &Path, options: &[&str]) -> io::Result<Daemon> {
        let role: Vec<&str> = self.role.iter().map(String::as_str).collect();
        Daemon::start_as(&self.path, &role, dir, image, options)
    }
}

/// What lanes have found so far.
#[derive(Debug, Default)]
struct Tally {
    /// Canaries heard.
    canaries: u64,
    cuts: u64,
    kills: u64,
    /// Sectors compared.
    checked: u64,
    /// Sectors that were not what they had to be.
    lost: u64,
    /// Kills with writes in flight on the disk when the next daemon was started.
    haunted: u64,
    /// Flushes that guests were told are complete.
    flushes: u64,
    /// Times that a guest has read all of a golden image, in direct mode.
    golden: u64,
}

impl Tally {
    /// What was seen of a golden image.
    fn add_golden(&mut self, seen: &Tally) {
        self.golden += seen.golden;
        self.lost += seen.lost;
    }

    /// An error if something is lost.
    fn verdict(&self) -> io::Result<()> {
        match self.lost {
            0 => Ok(()),
            lost => Err(io::Error::other(format!("{lost} sectors of it are wrong"))),
        }
    }

    /// Whether the dangers were met: kills with nothing in flight prove nothing, nor do guests that were promised nothing.
    fn means_something(&self) -> bool {
        let crashed = self.cuts + self.kills > 0;
        let promised = self.flushes > 0 && self.golden > 0;
        self.canaries > 0 && (self.kills == 0 || self.haunted > 0) && (!crashed || promised)
    }
}

/// Crashes hosts and daemons; whether all is as it must be.
#[must_use]
pub fn crash(options: &Options) -> bool {
    let clock = || {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        time.map_or(1, |time| Random::new(time.subsec_nanos().into()).below(1 << 32))
    };
    let seed = options.seed.unwrap_or_else(clock);
    println!("crash: seed {seed}");
    let tally = Mutex::new(Tally::default());
    let result = Program::find(options).and_then(|program| all(options, seed, &program, &tally));
    let tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "crash: canaries={} flushes={} kills_with_writes_in_flight={} golden={}",
        tally.canaries, tally.flushes, tally.haunted, tally.golden
    );
    if let Err(error) = &result {
        println!("{error}");
    }
    println!(
        "crash: cuts={} kills={} checked={} lost={}",
        tally.cuts, tally.kills, tally.checked, tally.lost
    );
    match options.mutant {
        None => result.is_ok() && tally.lost == 0 && tally.means_something(),
        Some(mutant) => {
            let caught = tally.lost > 0;
            println!("crash: mutant {mutant:?}: {}", if caught { "caught" } else { "NOT CAUGHT" });
            caught
        }
    }
}

/// The crashes of the host `index` among `count`.
fn schedule(options: &Options, seed: u64, index: u64, count: u64) -> Vec<Crash> {
    let share = |total: u64| total / count + u64::from(index < total % count);
    let (cuts, kills) = if options.soak { (5000, 500) } else { (200, 20) };
    let cuts = share(options.cuts.unwrap_or(cuts));
    let kills = share(options.kills.unwrap_or(kills));
    let mut random = Random::new(seed);
    let (mut cuts_left, mut kills_left) = (cuts, kills);
    let next = |_| {
        let kill = random.below(cuts_left + kills_left) < kills_left;
        let (left, crash) =
            if kill { (&mut kills_left, Crash::Kill) } else { (&mut cuts_left, Crash::Cut) };
        *left -= 1;
        crash
    };
    (0..cuts + kills).map(next).collect()
}

/// All hosts beside each other; the first error ends all.
fn all(options: &Options, seed: u64, program: &Program, tally: &Mutex<Tally>) -> io::Result<()> {
    let wanted = |flavour: &&Flavour| options.host.as_ref().is_none_or(|name| name == flavour.name);
    let flavours: Vec<&Flavour> = FLAVOURS.iter().filter(wanted).collect();
    if flavours.is_empty() {
        return Err(io::Error::other("there is no such host"));
    }
    let stop = AtomicBool::new(false);
    let over = AtomicUsize::new(0);
    let count = flavours.len();
    let plans: Vec<(u64, Vec<Crash>)> = (0..count as u64)
        .map(|index| {
            let seed = Random::new(seed ^ (index << 48)).bits() >> 16;
            (seed, schedule(options, seed, index, count as u64))
        })
        .collect();
    let total = plans.iter().map(|(_, crashes)| crashes.len()).sum();
    thread::scope(|scope| {
        let start = |(flavour, (seed, crashes)): (&Flavour, &(u64, Vec<Crash>))| {
            let (flavour, seed, crashes) = (*flavour, *seed, crashes.clone());
            let (stop, over) = (&stop, &over);
            scope.spawn(move || {
                let result = hear(flavour, program, tally)
                    .and_then(|()| Lane::make(flavour, seed, program, tally))
                    .and_then(|mut lane| {
                        lane.run(&crashes, flavour.loss, || !stop.load(Ordering::SeqCst))
                    });
                if result.is_err() {
                    stop.store(true, Ordering::SeqCst);
                }
                over.fetch_add(1, Ordering::SeqCst);
                result
            })
        };
        let lanes: Vec<_> = flavours.into_iter().zip(&plans).map(start).collect();
        progress(tally, total, || over.load(Ordering::SeqCst) == count);
        let join = |lane: thread::ScopedJoinHandle<'_, io::Result<()>>| {
            lane.join().unwrap_or_else(|_| Err(io::Error::other("a host's thread panicked")))
        };
        let results: Vec<io::Result<()>> = lanes.into_iter().map(join).collect();
        results.into_iter().collect()
    })
}

/// Listens to the canary of a host.
fn hear(flavour: Flavour, program: &Program, tally: &Mutex<Tally>) -> io::Result<()> {
    let lost = canary::canary(flavour, program)
        .map_err(|error| io::Error::other(format!("{}: canary: {error}", flavour.name)))?;
    let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
    tally.canaries += 1;
    tally.lost += lost / SECTOR as u64;
    if lost == 0 {
        return Ok(());
    }
    Err(io::Error::other(format!("{}: {lost} bytes of the canary were overwritten", flavour.name)))
}

/// Shows how far it is until all is `over`.
fn progress(tally: &Mutex<Tally>, total: usize, over: impl Fn() -> bool) {
    let terminal = io::stderr().is_terminal();
    while !over() {
        thread::sleep(Duration::from_millis(100));
        if terminal {
            let (cuts, kills) = {
                let tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
                (tally.cuts, tally.kills)
            };
            eprint!("\rcrash: {cuts} cuts, {kills} kills of {total}");
            // Only to look at.
            let _ = io::stderr().flush();
        }
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
}
