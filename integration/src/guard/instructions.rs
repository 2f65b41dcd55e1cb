// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Instructions of the core for each request, counted by valgrind.
//!
//! The program runs itself twice, the second time with twice as many requests: what is more in that run is what they
//! cost, and neither starting the program nor making a map of a million extents is in it.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use clap::ValueEnum;

use super::Measured;
use super::core::Case;
use crate::rig::command::{context, spawn};

/// The figures' names and what they are about.
const FIGURES: [(&str, Case); 6] = [
    ("instructions, 4 KiB read, hint", Case::ReadHit),
    ("instructions, 4 KiB read, any of 1 M extents", Case::ReadRandom),
    ("instructions, 4 KiB write", Case::Write),
    ("instructions, 128 KiB read, 32 pieces of memory", Case::ReadVectored),
    ("instructions, 128 KiB read, 32 extents", Case::ReadScattered),
    ("instructions, lookup, any of 1 M extents", Case::Lookup),
];

/// Both runs' numbers have as many digits, so that reading them costs the same.
const REQUESTS: [u32; 2] = [3200, 6400];

/// Names of the figures.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    FIGURES.iter().map(|(name, _)| *name)
}

/// All of them.
pub(super) fn measure(program: &Path) -> Vec<Measured> {
    FIGURES.iter().map(|(name, case)| (*name, per_request(program, *case))).collect()
}

fn per_request(program: &Path, case: Case) -> io::Result<f64> {
    // The two runs at once: there is little that one CPU could do in less time.
    let [once, twice] = REQUESTS.map(|requests| start(program, case, requests));
    // Both are waited for, whatever the first one says.
    let (once, twice) = (once.and_then(collected), twice.and_then(collected));
    let [few, many] = REQUESTS.map(f64::from);
    Ok((twice? - once?) / (many - few))
}

fn start(program: &Path, case: Case, requests: u32) -> io::Result<Child> {
    let name = case.to_possible_value().ok_or_else(|| io::Error::other("a case has no name"))?;
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(program).args([super::PART, "core", name.get_name(), &requests.to_string()]);
    command.stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    spawn(&mut command).map_err(context("valgrind, of the package of that name"))
}

/// What callgrind says at its end: `==1== Collected : 123`.
fn collected(child: Child) -> io::Result<f64> {
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let number = said.lines().find_map(|line| line.split("Collected :").nth(1));
    match number.map(|number| number.trim().parse()) {
        Some(count) if output.status.success() => count.map_err(context("valgrind's count")),
        _ => Err(io::Error::other(format!("valgrind: {}: {}", output.status, said.trim()))),
    }
}
