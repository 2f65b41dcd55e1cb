// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The commands of `extentctl`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::check::{self, Check, Ownership};
use super::client::{Client, ClientError};
use super::map::{self, MapError, Piece, Run};
use super::picture::{Total, totals};
use super::progress::Progress;
use super::status::Status;
use super::{Command, leases, table};
use crate::image::{Image, ModeChoice, OpenError, Options};

/// How long somebody else's locks are waited for; who only looks does not wait.
const LOCK_WAIT: Duration = Duration::ZERO;

/// Look at disk images and at the extentd that serves them.
#[derive(Debug, Parser)]
#[command(name = "extentctl", version, about, long_about = None, max_term_width = 100)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Say whether an image can be served direct, and if not, why and what helps. Exit status: 0
    /// direct, 1 filesystem, 2 failure.
    Check {
        #[command(flatten)]
        source: Source,
        /// Check for a disk served with --read-only, which shares the image with other readers.
        #[arg(long, conflicts_with = "control")]
        read_only: bool,
    },
    /// Show where an image's bytes lie on the disk: all extents, totals and a picture.
    Map(Source),
    /// Show the state of a running extentd.
    Status {
        /// Control socket of extentd.
        #[arg(short, long, value_name = "SOCKET")]
        control: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Where to look.
#[derive(Args, Debug)]
struct Source {
    /// The image; not needed with --control.
    #[arg(required_unless_present = "control", conflicts_with = "control")]
    image: Option<PathBuf>,
    /// Ask the extentd that serves the image, over its control socket, instead of opening it.
    #[arg(short, long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Why a command failed. One line.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CommandError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("{source}; if extentd serves it, ask that with -c SOCKET")]
    Locked { source: OpenError },
    #[error(transparent)]
    Open(OpenError),
    #[error("the answer makes no sense: {source}")]
    Answer { source: serde_json::Error },
    #[error("the map ends at byte {at} of {size}")]
    Short { at: u64, size: u64 },
    #[error("cannot print: {source}")]
    Print { source: io::Error },
}

/// What `extentctl map --json` prints; all numbers in bytes.
#[derive(Serialize)]
struct Map<'a> {
    image: String,
    size_bytes: u64,
    extents: &'a [Run],
    totals: Vec<Total>,
}

impl Arguments {
    /// Does what was asked for; says whether the answer is the good one.
    ///
    /// # Errors
    /// One line.
    pub fn run(self) -> Result<bool, CommandError> {
        match self.action {
            Action::Check { source, read_only } => source.check(read_only),
            Action::Map(source) => source.map(),
            Action::Status { control, json } => {
                let status: Status = typed(Client::connect(&control)?.ask(Command::Status)?)?;
                show(json, &status, || table::status(&status))?;
                Ok(true)
            }
        }
    }
}

impl Source {
    fn check(&self, read_only: bool) -> Result<bool, CommandError> {
        let check: Check = match (&self.control, &self.image) {
            (Some(control), _) => typed(Client::connect(control)?.ask(Command::Check)?)?,
            (None, path) => {
                let image = open(path.as_deref().unwrap_or(Path::new("")))?;
                check::look(&image, &Ownership::try_out(&image, read_only))
            }
        };
        show(self.json, &check, || table::check(&check))?;
        Ok(check.verdict == check::mode_name(true))
    }

    fn map(&self) -> Result<bool, CommandError> {
        let (name, (size, runs)) = match (&self.control, &self.image) {
            (Some(control), _) => {
                let mut client = Client::connect(control)?;
                let status: Status = typed(client.ask(Command::Status)?)?;
                let all = gather(|start| typed(client.ask(Command::Map { start })?))?;
                (status.image, all)
            }
            (None, path) => {
                let path = path.as_deref().unwrap_or(Path::new(""));
                let image = open(path)?;
                let all = gather(|start| Ok(map::load(&image, start)?))?;
                (path.display().to_string(), all)
            }
        };
        let whole = Map { image: name, size_bytes: size, extents: &runs, totals: totals(&runs) };
        show(self.json, &whole, || table::map(size, &runs))?;
        Ok(true)
    }
}

/// All pieces of a map; its size and runs.
fn gather(
    mut load: impl FnMut(u64) -> Result<Piece, CommandError>,
) -> Result<(u64, Vec<Run>), CommandError> {
    let mut progress = Progress::new();
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    loop {
        let piece = load(start)?;
        for run in piece.extents {
            map::append(&mut runs, run);
        }
        match piece.next {
            Some(next) if next > start => start = next,
            Some(at) => return Err(CommandError::Short { at, size: piece.size }),
            None => return Ok((piece.size, runs)),
        }
        progress.show(start, piece.size);
    }
}

/// Opens an image to look at it, and warns if that breaks a lease. An extentd that serves the image
/// for writing is not disturbed: its byte locks are seen first, and the image is not opened.
fn open(path: &Path) -> Result<Image, CommandError> {
    // What cannot be looked at fails to open, too, and that says it better.
    let lease = leases::holder(path).ok().flatten().filter(|_| !Image::is_locked(path, true));
    if let Some(pid) = lease {
        let who = if pid == 0 { "another process".to_owned() } else { format!("process {pid}") };
        let path = path.display();
        // Without a stderr nobody is there to be warned.
        let _ = writeln!(
            io::stderr(),
            "extentctl: warning: {who} has a lease on {path} and will be disturbed; if it is extentd, ask it with -c SOCKET"
        );
    }
    let options = Options {
        path: path.to_owned(),
        read_only: true,
        mode: ModeChoice::Auto,
        offset: 0,
        size_limit: None,
        format_raw: true,
        block_size: 512,
        unmap: false,
    };
    Image::open_within(&options, LOCK_WAIT).map_err(|source| match source {
        OpenError::Locked { .. } => CommandError::Locked { source },
        source => CommandError::Open(source),
    })
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<T, CommandError> {
    serde_json::from_value(value).map_err(|source| CommandError::Answer { source })
}

/// Prints a result as JSON or as text.
fn show(
    json: bool,
    value: &impl Serialize,
    text: impl FnOnce() -> String,
) -> Result<(), CommandError> {
    let text = if json {
        let json = serde_json::to_string_pretty(value);
        json.map_err(|source| CommandError::Answer { source })? + "\n"
    } else {
        text()
    };
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever read it has seen enough: `extentctl map IMAGE | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|source| CommandError::Print { source }),
    }
}
