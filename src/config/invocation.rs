// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the arguments to what is to be done, and the one line a mistake ends in.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use super::{Arguments, CAPABILITIES, Environment, LogFormat, LogLevel, Settings, file};

/// What the arguments ask for.
#[derive(Debug)]
pub enum Invocation {
    /// To serve.
    Serve(Settings),
    /// To print this and exit.
    Print(String),
}

/// Reads the daemon's arguments.
///
/// # Errors
/// One line for the user.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Invocation, String> {
    let arguments: Vec<OsString> = arguments.collect();
    // The backend conventions: everything else is ignored, mistakes too.
    if arguments.iter().skip(1).any(|argument| argument == "--print-capabilities") {
        return Ok(Invocation::Print(format!("{CAPABILITIES}\n")));
    }
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error).map(Invocation::Print),
    };
    arguments.resolve(&Environment::current()).map(Invocation::Serve)
}

impl Arguments {
    /// One device from the command line, or those of a file.
    ///
    /// # Errors
    /// One line for the user.
    pub fn resolve(self, environment: &Environment) -> Result<Settings, String> {
        let log = (self.log_level, self.log_format);
        if let Some(path) = &self.config {
            return file::read(path, log, environment).map_err(|error| error.to_string());
        }
        // The parser has seen to it that there is one of the two.
        let options = self.device.ok_or("no device to serve (see --help)")?;
        let config = options.resolve(environment).map_err(|error| error.to_string())?;
        Ok(Settings {
            devices: vec![config],
            log_level: log.0.unwrap_or(LogLevel::Info),
            log_format: log.1.unwrap_or(LogFormat::Text),
        })
    }
}

/// clap's answer: help and version are to be printed, a mistake becomes one line.
///
/// # Errors
/// The line.
pub fn usage(error: &clap::Error) -> Result<String, String> {
    let text = error.to_string();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return Ok(text);
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Err("nothing to do was named (see --help)".to_owned());
    }
    // The mistake is the first paragraph; usage and tips follow.
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    let line = words.join(" ");
    Err(format!("{} (see --help)", line.strip_prefix("error: ").unwrap_or(&line)))
}

/// Prints `text` on stdout.
#[must_use]
pub fn print(text: &str) -> ExitCode {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Prints why on stderr, and makes the exit status.
#[must_use]
pub fn fail(error: &impl Display, status: u8) -> ExitCode {
    let program = std::env::args().next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    // Without a stderr the status has to do.
    let _ = writeln!(std::io::stderr(), "{name}: {error}");
    ExitCode::from(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Invocation, String> {
        parse(["extentd"].iter().chain(arguments).map(OsString::from))
    }

    #[test]
    fn capabilities_are_printed_whatever_else_is_said() {
        for arguments in [
            &["--print-capabilities"][..],
            &["--nonsense", "--print-capabilities"],
            &["--num-queues=0", "--print-capabilities", "--blk-file"],
        ] {
            let Ok(Invocation::Print(text)) = parsed(arguments) else { panic!("{arguments:?}") };
            assert_eq!(text.trim(), r#"{"type":"block","features":["blk-file","read-only"]}"#);
        }
    }

    #[test]
    fn mistakes_are_one_line() {
        for (arguments, line) in [
            (&[][..], "the following required arguments were not provided: --blk-file <PATH>"),
            (&["--blk-file"], "a value is required for '--blk-file <PATH>'"),
            (&["--frobnicate"], "unexpected argument '--frobnicate' found"),
            (&["--blk-file=i", "--mode=fast"], "invalid value 'fast' for '--mode <MODE>'"),
            (&["--blk-file=i", "--num-queues=x"], "invalid value 'x' for '--num-queues <N>'"),
            (&["--blk-file=i", "--num-queues=65", "--fd=3"], "--num-queues 65: must be 1 to 64"),
            (&["--config=f", "--blk-file=i"], "the argument '--config <FILE>' cannot be used with"),
            (&["--config=f", "--read-only"], "the argument '--config <FILE>' cannot be used with"),
            (&["--config=/no/file"], "--config /no/file: No such file or directory"),
        ] {
            let error = parsed(arguments).unwrap_err();
            assert!(error.starts_with(line) && error.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn help_is_no_mistake() {
        assert!(
            matches!(parsed(&["--help"]), Ok(Invocation::Print(text)) if text.contains("Usage"))
        );
        assert!(matches!(parsed(&["--version"]), Ok(Invocation::Print(_))));
    }
}
