// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--config`: several devices in a TOML file. Each table becomes the command line of one device and
//! goes the way of those: defaults, checks and messages exist once.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Arg, Args, Parser};
use toml::{Table, Value};

use super::invocation::usage;
use super::{
    Arguments, Config, ConfigError, Endpoint, Environment, LogFormat, LogLevel, Options, Settings,
};

/// What may stand before the first device.
const PROCESS_KEYS: [&str; 2] = ["log-level", "log-format"];

/// What is wrong with the file. One line, with the place and the fix.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum FileError {
    #[error("--config {}: {source}", file.display())]
    Read { file: PathBuf, source: io::Error },
    #[error("{}: line {line}: {message}", file.display())]
    Syntax { file: PathBuf, line: usize, message: String },
    #[error("{}: {problem}", file.display())]
    Process { file: PathBuf, problem: Problem },
    #[error("{}: device {number} ({image}): {problem}", file.display())]
    Device { file: PathBuf, number: usize, image: String, problem: Problem },
}

/// What is wrong with a part of it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Problem {
    #[error("no device in it; begin one for each image with a line that says [[device]]")]
    NoDevice,
    #[error("device: must be a list of tables; begin each with a line that says [[device]]")]
    NotTables,
    #[error("unknown key {key}; outside of a [[device]] only log-level and log-format may stand")]
    UnknownProcessKey { key: String },
    #[error("unknown key {key}; keys are extentd's options (see --help) without the dashes")]
    UnknownKey { key: String },
    #[error("{key}: must be true or false")]
    Flag { key: String },
    #[error("{key}: must be a text in quotes or a whole number")]
    Text { key: String },
    #[error("socket-mode: must be octal permissions in quotes, such as \"0660\"")]
    Octal,
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "no socket to serve: give socket-path or fd (a socket from systemd is taken by a single device only)"
    )]
    NoEndpoint,
    #[error("{key} {value} is device {other}'s already; every device needs its own")]
    Taken { key: &'static str, value: String, other: usize },
}

/// Reads the file. What the command line says of the log goes before what the file says.
pub(super) fn read(
    file: &Path,
    log: (Option<LogLevel>, Option<LogFormat>),
    environment: &Environment,
) -> Result<Settings, FileError> {
    let text = std::fs::read_to_string(file)
        .map_err(|source| FileError::Read { file: file.to_owned(), source })?;
    let mut table: Table = text.parse().map_err(|error| syntax(file, &text, &error))?;
    let process = |problem| FileError::Process { file: file.to_owned(), problem };
    let tables = tables(table.remove("device")).map_err(process)?;
    let said = process_options(table).map_err(process)?;
    let mut names = Names::default();
    let mut devices = Vec::new();
    let several = tables.len() > 1;
    let share = Environment { cpus: share(environment.cpus, tables.len()), ..environment.clone() };
    for (number, table) in (1..).zip(tables) {
        let image = match table.get("blk-file") {
            Some(Value::String(image)) => image.clone(),
            _ => "without a blk-file".to_owned(),
        };
        let config = device(table, several, &share)
            .and_then(|config| names.take(number, &config).map(|()| config))
            .map_err(|problem| {
                let file = file.to_owned();
                FileError::Device { file, number, image, problem }
            })?;
        devices.push(config);
    }
    Ok(Settings {
        devices,
        log_level: log.0.or(said.log_level).unwrap_or(LogLevel::Info),
        log_format: log.1.or(said.log_format).unwrap_or(LogFormat::Text),
    })
}

fn syntax(file: &Path, text: &str, error: &toml::de::Error) -> FileError {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let words: Vec<&str> = error.message().split_whitespace().collect();
    FileError::Syntax { file: file.to_owned(), line, message: words.join(" ") }
}

fn tables(devices: Option<Value>) -> Result<Vec<Table>, Problem> {
    let devices = match devices {
        None => return Err(Problem::NoDevice),
        Some(Value::Array(devices)) => devices,
        Some(_) => return Err(Problem::NotTables),
    };
    if devices.is_empty() {
        return Err(Problem::NoDevice);
    }
    let table = |value| match value {
        Value::Table(table) => Ok(table),
        _ => Err(Problem::NotTables),
    };
    devices.into_iter().map(table).collect()
}

fn process_options(table: Table) -> Result<Arguments, Problem> {
    if let Some(key) = table.keys().find(|key| !PROCESS_KEYS.contains(&key.as_str())) {
        return Err(Problem::UnknownProcessKey { key: key.clone() });
    }
    let words = table.into_iter().map(|(key, value)| valued(&key, &value));
    let words = words.collect::<Result<Vec<_>, _>>()?;
    // Which file it is does not matter any more: where one is named, no device has to be.
    parse(words.into_iter().chain(["--config=-".into()]))
}

fn device(table: Table, several: bool, environment: &Environment) -> Result<Config, Problem> {
    let command = Options::augment_args(clap::Command::new(""));
    let known = |key: &str| command.get_arguments().find(|known| known.get_long() == Some(key));
    let mut words = Vec::new();
    for (key, value) in table {
        match (known(&key), &value) {
            (None, _) => return Err(Problem::UnknownKey { key }),
            (Some(option), Value::Boolean(on)) if is_flag(option) => {
                words.extend(on.then(|| format!("--{key}").into()));
            }
            (Some(option), _) if is_flag(option) => return Err(Problem::Flag { key }),
            (Some(_), value) => words.push(valued(&key, value)?),
        }
    }
    let arguments = parse(words)?;
    // The parser has seen to it that there is a device where no file is named.
    let Some(options) = arguments.device else { return Err(Problem::NoDevice) };
    if several && options.socket_path.is_none() && options.fd.is_none() {
        return Err(Problem::NoEndpoint);
    }
    Ok(options.resolve(environment)?)
}

/// The CPUs that a device of `devices` has worker threads for by default. Not all are busy at once, so four
/// times the CPUs in all; but each thread has its memory, and two are enough for a guest that has company.
fn share(cpus: usize, devices: usize) -> usize {
    let cpus = cpus.max(1);
    (cpus.saturating_mul(4) / devices.max(1)).clamp(cpus.min(2), cpus)
}

fn is_flag(option: &Arg) -> bool {
    !option.get_action().takes_values()
}

/// `--key=value`: in one word, so that a value may begin with a dash.
fn valued(key: &str, value: &Value) -> Result<OsString, Problem> {
    match value {
        Value::String(text) => Ok(format!("--{key}={text}").into()),
        // 0o660 is 432 by then, and 432 would be taken for octal.
        Value::Integer(_) if key == "socket-mode" => Err(Problem::Octal),
        Value::Integer(number) => Ok(format!("--{key}={number}").into()),
        _ => Err(Problem::Text { key: key.to_owned() }),
    }
}

fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Arguments, Problem> {
    let words = std::iter::once("extentd".into()).chain(words);
    // A key that asks for help is not known.
    Arguments::try_parse_from(words).map_err(|error| match usage(&error) {
        Ok(line) | Err(line) => Problem::Usage(line),
    })
}

/// What a device has to itself, and whose it is.
#[derive(Default)]
struct Names {
    paths: BTreeMap<PathBuf, usize>,
    fds: BTreeMap<i32, usize>,
}

impl Names {
    fn take(&mut self, number: usize, config: &Config) -> Result<(), Problem> {
        let control = config.control.as_ref().map(|socket| ("control-path", &socket.path));
        let socket = match &config.endpoint {
            Endpoint::Path(socket) => Some(("socket-path", &socket.path)),
            Endpoint::Fd(fd) => match self.fds.insert(*fd, number) {
                Some(other) => {
                    return Err(Problem::Taken { key: "fd", value: fd.to_string(), other });
                }
                None => None,
            },
        };
        for (key, path) in socket.into_iter().chain(control) {
            if let Some(other) = self.paths.insert(path.clone(), number) {
                let value = path.display().to_string();
                return Err(Problem::Taken { key, value, other });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
