// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands that hold extentd to its rules.

use std::error::Error;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use extentd::config::invocation::{self, Invocation};
use extentd::server::{self, AllSignals};
use integration::rig::allocations::Counting;
use integration::{bench, crash, guard, map_scale, sim};

/// For the guard; what counting costs shows in nothing that is measured here.
#[global_allocator]
static HEAP: Counting = Counting;

/// Rigs, simulator and benches of extentd.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the engine over a simulated host, many seeds of it.
    Sim(sim::Options),
    /// Cut the power of hosts and kill daemons, and see whether anything promised is lost.
    Crash(crash::Options),
    /// Be an extentd that breaks one rule, for `crash --mutant`.
    #[command(name = crash::MUTANT_DAEMON, hide = true)]
    MutantDaemon {
        /// Which rule.
        mutant: sim::Mutant,
        /// What extentd is told.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Time extentd beside qemu-storage-daemon and no server at all.
    Bench(bench::BenchArgs),
    /// Measure the extent map, from one extent to ten million.
    Map(map_scale::Options),
    /// Hold the hot path to what it may cost: allocations, instructions, system calls and memory, as figures that no
    /// clock decides and that are the same on every machine. Each has a ceiling in integration/src/guard/ceilings.rs.
    /// Needs root, for loop devices, and valgrind.
    Guard(guard::Options),
    /// Be what the guard counts.
    #[command(name = guard::PART, hide = true)]
    GuardPart {
        /// What.
        #[command(subcommand)]
        part: guard::Part,
    },
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Sim(options) if sim::simulate(&options) => ExitCode::SUCCESS,
        Command::Sim(_) => ExitCode::FAILURE,
        Command::Crash(options) if crash::crash(&options) => ExitCode::SUCCESS,
        Command::Crash(_) => ExitCode::FAILURE,
        Command::MutantDaemon { mutant, arguments } => match serve(mutant, arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => invocation::fail(&error, 1),
        },
        Command::Bench(args) => bench::run(args),
        Command::Map(options) => map_scale::run(&options),
        Command::Guard(options) => guard::run(&options),
        Command::GuardPart { part } => guard::run_part(&part),
    }
}

/// What extentd's `main` does, without the rule that `mutant` breaks.
fn serve(mutant: sim::Mutant, arguments: Vec<OsString>) -> Result<(), Box<dyn Error>> {
    let arguments = std::iter::once("extentd".into()).chain(arguments);
    let Invocation::Serve(settings) = invocation::parse(arguments)? else {
        return Err("nothing to serve was named".into());
    };
    // Before any thread exists (R1).
    let signals = AllSignals::block()?;
    server::start_log(&settings);
    server::run_under(&settings, sim::Mutant::rules(Some(mutant)), signals)?;
    Ok(())
}
