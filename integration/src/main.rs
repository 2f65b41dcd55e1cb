// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands that hold extentd to its rules.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use integration::{bench, sim};

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
    /// Time extentd beside qemu-storage-daemon and no server at all.
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Sim(options) if sim::simulate(&options) => ExitCode::SUCCESS,
        Command::Sim(_) => ExitCode::FAILURE,
        Command::Bench(args) => bench::run(args),
    }
}
