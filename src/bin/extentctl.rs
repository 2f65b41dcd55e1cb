// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! extentctl: looks at images and at the daemons that serve them.

use std::process::ExitCode;

use clap::Parser;
use extentd::config::invocation::{fail, print, usage};
use extentd::control::command::Arguments;
use extentd::image::block_lease_signals;

/// The exit status of a failure; 1 is an answer.
const FAILURE: u8 = 2;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => match usage(&error) {
            Ok(text) => return print(&text),
            Err(line) => return fail(&line, FAILURE),
        },
    };
    // `check` takes a lease for a moment, and whoever breaks it then must not kill us (R1).
    let _signals = match block_lease_signals() {
        Ok(signals) => signals,
        Err(error) => return fail(&error, FAILURE),
    };
    match arguments.run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => fail(&error, FAILURE),
    }
}
