// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! extentd: options → settings → run.

use std::process::ExitCode;

use extentd::config::invocation::{self, Invocation};
use extentd::server::{self, AllSignals, ServeError};

/// The exit status of a wrong command line; everything else that fails ends with 1.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let settings = match invocation::parse(std::env::args_os()) {
        Ok(Invocation::Serve(settings)) => settings,
        Ok(Invocation::Print(text)) => return invocation::print(&text),
        Err(line) => return invocation::fail(&line, USAGE),
    };
    // Before any thread exists (R1).
    let served = AllSignals::block()
        .map_err(|source| ServeError::Io { action: "block signals", source })
        .and_then(|signals| {
            server::start_log(&settings);
            server::run(&settings, signals)
        });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => invocation::fail(&error, 1),
    }
}
