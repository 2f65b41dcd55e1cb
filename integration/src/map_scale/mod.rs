// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the extent map costs, from one extent to ten million: in memory, and on a real filesystem (R7, R8).
//!
//! Nothing here passes or fails by the clock: the figures are for people, to be compared with those of another version on the
//! same machine.

mod disk;
mod fill;
mod memory;
mod table;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use crate::rig::program;

/// Options of `integration map`.
#[derive(Debug, Args)]
pub struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The largest map measured in memory, in extents
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    extents: u64,
    /// Blocks of the scattered image, each an extent of its own; 0: nothing is measured on disks
    #[arg(long, value_name = "N", default_value_t = 1 << 20)]
    blocks: u64,
    /// The extentd to measure [default: the workspace's, built in release]
    #[arg(long, value_name = "PROGRAM")]
    extentd: Option<PathBuf>,
}

/// All figures.
#[derive(Debug, Default, Serialize)]
struct Figures {
    version: u32,
    /// The map alone.
    memory: Vec<memory::Row>,
    /// A scattered image on ext4 on a loop device over memory.
    disk: Option<disk::Figures>,
    /// Writing sparse images full, on the same.
    fill: Vec<fill::Row>,
}

/// Measures and prints.
#[must_use]
pub fn run(options: &Options) -> ExitCode {
    match measure(options) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("map: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> io::Result<String> {
    let mut figures = Figures { version: 1, ..Figures::default() };
    for extents in [1, 1_000, 100_000, 1_000_000, 10_000_000] {
        if extents <= options.extents {
            figures.memory.push(memory::measure(extents));
        }
    }
    if options.blocks > 0 {
        let program = match &options.extentd {
            Some(program) => program.clone(),
            None => program::build()?,
        };
        let bed = disk::Bed::make(program, options.blocks)?;
        figures.disk = Some(bed.measure()?);
        figures.fill = fill::measure(&bed)?;
    }
    if options.json {
        let json = serde_json::to_string_pretty(&figures);
        return json.map(|json| json + "\n").map_err(io::Error::other);
    }
    Ok(table::text(&figures))
}

/// The middle one; 0 of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
