// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The program under test.

use std::io;
use std::path::PathBuf;
use std::process::Command;

use super::command::context;

/// Builds the workspace's extentd in release, or finds it up to date, and says where it is.
pub fn build() -> io::Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let output = Command::new(cargo)
        .args(["build", "--release", "--bin", "extentd", "--message-format=json"])
        .args(["--manifest-path", manifest])
        .stderr(std::process::Stdio::inherit())
        .output()
        .map_err(context("cargo (or name a program with --extentd)"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let program = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
        .next_back();
    match program {
        Some(program) if output.status.success() => Ok(program),
        _ => Err(io::Error::other("extentd does not build")),
    }
}
