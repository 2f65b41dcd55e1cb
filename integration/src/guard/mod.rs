// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guard of the hot path: figures that are the same on every machine and at any time, each below its ceiling.
//!
//! | part | what it counts |
//! |---|---|
//! | `allocations` | what the thread that serves a queue asks of the heap |
//! | `instructions` | what the core executes, under valgrind |
//! | `calls` | system calls of the daemon |
//! | `extents` | memory of the extent map |
//! | `core`, `load` | what is driven, and with what |
//! | `ceilings` | what may come out |
//!
//! Nothing here looks at a clock: how fast all this is, is the bench's business.

mod allocations;
mod calls;
mod ceilings;
pub mod core;
mod extents;
mod instructions;
mod load;

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::{Args, Subcommand};
use serde::Serialize;

use self::ceilings::{CEILINGS, Ceiling};
use self::core::{Case, Core};
use crate::rig::command::context;
use crate::rig::{Rig, program};

/// The hidden command that carries out a [`Part`].
pub const PART: &str = "guard-part";

/// Options of `integration guard`.
#[derive(Debug, Args)]
pub struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The extentd whose system calls are counted [default: the workspace's, built in release]
    #[arg(long, value_name = "PROGRAM")]
    extentd: Option<PathBuf>,
}

/// What the guard has a process of its own for.
#[derive(Debug, Subcommand)]
pub enum Part {
    /// Carries out requests, for valgrind to count.
    Core {
        /// Which.
        case: Case,
        /// How many.
        requests: u32,
    },
    /// Serves an image and prints what that took from the heap.
    Allocations,
}

/// A figure's name and value.
type Measured = (&'static str, io::Result<f64>);

/// A line of the table.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    measured: Option<f64>,
    recorded: f64,
    ceiling: f64,
    ok: bool,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Row {
    fn new(ceiling: &Ceiling, measured: &[Measured]) -> Row {
        let found = measured.iter().find(|(name, _)| *name == ceiling.name);
        let (measured, error) = match found {
            Some((_, Ok(value))) => (Some(*value), None),
            Some((_, Err(error))) => (None, Some(error.to_string())),
            None => (None, Some("nobody measures it".to_owned())),
        };
        Row {
            name: ceiling.name,
            measured,
            recorded: ceiling.recorded,
            ceiling: ceiling.most,
            ok: measured.is_some_and(|value| value <= ceiling.most),
            error,
        }
    }

    fn text(&self) -> String {
        let measured = self.measured.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        let verdict = match &self.error {
            Some(error) => format!("not measured: {error}"),
            None if self.ok => "ok".to_owned(),
            None => "over".to_owned(),
        };
        format!("{:<58} {measured:>10} {:>10.3}  {verdict}", self.name, self.ceiling)
    }
}

/// Measures and prints.
#[must_use]
pub fn run(options: &Options) -> ExitCode {
    let measured = measure(options);
    let rows: Vec<Row> = CEILINGS.iter().map(|ceiling| Row::new(ceiling, &measured)).collect();
    if options.json {
        let report = serde_json::json!({ "version": 1, "figures": rows });
        println!("{report:#}");
    } else {
        println!(
            "{:<58} {:>10} {:>10}",
            "figure, for each request unless it says", "measured", "ceiling"
        );
        rows.iter().for_each(|row| println!("{}", row.text()));
    }
    let missing = rows.iter().filter(|row| row.measured.is_none()).count();
    let over = rows.iter().filter(|row| !row.ok).count() - missing;
    let verdict = match (over, missing) {
        (0, 0) => format!("guard: ok (figures={})", rows.len()),
        (_, 0) => format!("guard: {over} figures over their ceilings"),
        _ => format!("guard: {over} figures over their ceilings, {missing} not measured"),
    };
    if options.json {
        eprintln!("{verdict}")
    } else {
        println!("{verdict}")
    }
    if over + missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn measure(options: &Options) -> Vec<Measured> {
    let mut measured = vec![allocations::of_core()];
    measured.extend(extents::measure());
    match std::env::current_exe() {
        Ok(this) => {
            measured.extend(instructions::measure(&this));
            let names = allocations::names();
            match of_child(&this) {
                Ok(values) => measured.extend(names.zip(values.into_iter().map(Ok))),
                Err(error) => measured.extend(each_failed(names, &error)),
            }
        }
        Err(error) => {
            let names = instructions::names().chain(allocations::names());
            measured.extend(each_failed(names, &error));
        }
    }
    let program = || options.extentd.clone().map_or_else(program::build, Ok);
    measured.extend(calls::measure(&program));
    measured
}

/// What `Part::Allocations` prints.
fn of_child(this: &Path) -> io::Result<Vec<f64>> {
    let mut command = Command::new(this);
    command.args([PART, "allocations"]).stdin(Stdio::null()).stderr(Stdio::piped());
    let output = command.output().map_err(context("this program"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(said.trim().to_owned()));
    }
    serde_json::from_slice(&output.stdout).map_err(io::Error::other)
}

/// Carries out a part; what went wrong goes to the guard by way of standard error.
#[must_use]
pub fn run_part(part: &Part) -> ExitCode {
    let done = match part {
        Part::Core { case, requests } => Core::new(*case).and_then(|mut core| core.run(*requests)),
        Part::Allocations => allocations::of_daemon().map(|figures| {
            println!("{}", serde_json::json!(figures));
        }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// A place for loop devices and mounts.
fn enter() -> io::Result<Rig> {
    let root = rustix::process::geteuid().is_root();
    root.then(Rig::enter)
        .flatten()
        .ok_or_else(|| io::Error::other("root is needed, for loop devices"))
}

/// One error for all of them.
fn each_failed(names: impl Iterator<Item = &'static str>, error: &io::Error) -> Vec<Measured> {
    names.map(|name| (name, Err(io::Error::other(error.to_string())))).collect()
}

/// The threads of a process that have this name.
fn threads(pid: u32, name: &str) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.trim() == name {
            found.extend(entry.file_name().to_str().and_then(|id| id.parse::<i32>().ok()));
        }
    }
    if found.is_empty() {
        return Err(io::Error::other(format!("process {pid} has no thread {name}")));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_has_one_ceiling() {
        let measured = allocations::all_names().chain(instructions::names());
        let mut measured: Vec<&str> =
            measured.chain(calls::names()).chain(extents::names()).collect();
        let mut known: Vec<&str> = CEILINGS.iter().map(|ceiling| ceiling.name).collect();
        measured.sort_unstable();
        known.sort_unstable();
        assert_eq!(measured, known);
        assert!(CEILINGS.iter().all(|ceiling| ceiling.recorded <= ceiling.most));
    }

    #[test]
    fn what_is_over_its_ceiling_or_not_measured_is_not_ok() {
        let ceiling = Ceiling { name: "calls", recorded: 4.0, most: 4.0 };
        let row = |measured: &[Measured]| Row::new(&ceiling, measured);
        assert!(row(&[("calls", Ok(4.0))]).ok);
        assert!(!row(&[("calls", Ok(4.001))]).ok);
        assert!(!row(&[("calls", Ok(f64::NAN))]).ok);
        let missing = row(&[("other", Ok(1.0)), ("calls", Err(io::Error::other("not root")))]);
        assert!(!missing.ok && missing.text().ends_with("not measured: not root"));
        assert!(!row(&[]).ok);
    }
}
