// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control socket: JSON lines, one request, one reply.
//!
//! A request is `{"v":1,"cmd":"status"}`; a reply has `"v":1` and either the command's fields or
//! `"error"`. A long map comes in pieces: `{"v":1,"cmd":"map","start":N}` is answered with the
//! extents from byte `N` on and the `next` byte to ask for.

pub mod check;
pub mod client;
pub mod command;
pub mod connection;
pub mod leases;
pub mod map;
pub mod picture;
pub mod progress;
pub mod status;
pub mod table;

use serde::{Deserialize, Serialize};

/// The protocol's version.
pub const VERSION: u32 = 1;
/// The longest request line, in bytes.
pub const MAX_LINE: usize = 64 << 10;

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// [`status::Status`].
    Status,
    /// What `extentctl check` shows.
    Check,
    /// [`map::Piece`] from this byte of the image on.
    Map {
        /// Where the piece begins.
        start: u64,
    },
}

/// What is wrong with a request.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum RequestError {
    #[error("not a request: {reason}")]
    Syntax { reason: String },
    #[error("version {version} is not spoken here, only {VERSION}")]
    Version { version: u64 },
    #[error("unknown command {command:?}; there are status, check and map")]
    Unknown { command: String },
    #[error("the line is longer than {MAX_LINE} bytes")]
    TooLong,
}

/// A request as it stands in its line. Members unknown to this version are passed over.
#[derive(Serialize, Deserialize)]
struct Line {
    v: u64,
    cmd: String,
    #[serde(default)]
    start: u64,
}

impl Command {
    /// Reads a request line.
    ///
    /// # Errors
    /// It is not a request, or one of another version.
    pub fn parse(line: &[u8]) -> Result<Self, RequestError> {
        let line: Line = serde_json::from_slice(line)
            .map_err(|error| RequestError::Syntax { reason: error.to_string() })?;
        if line.v != u64::from(VERSION) {
            return Err(RequestError::Version { version: line.v });
        }
        match line.cmd.as_str() {
            "status" => Ok(Self::Status),
            "check" => Ok(Self::Check),
            "map" => Ok(Self::Map { start: line.start }),
            _ => Err(RequestError::Unknown { command: line.cmd.chars().take(32).collect() }),
        }
    }

    /// The request's line, with its end.
    #[must_use]
    pub fn line(self) -> String {
        let (name, start) = match self {
            Self::Status => ("status", 0),
            Self::Check => ("check", 0),
            Self::Map { start } => ("map", start),
        };
        reply_line(&Line { v: VERSION.into(), cmd: name.to_owned(), start })
    }
}

/// A reply: the version, and a command's own fields.
#[derive(Debug, Serialize)]
pub struct Reply<T: Serialize> {
    v: u32,
    #[serde(flatten)]
    body: T,
}

/// The reply that says what went wrong.
#[derive(Debug, Serialize, Deserialize)]
pub struct Failure {
    /// One line.
    pub error: String,
}

/// A command's reply, as a line.
#[must_use]
pub fn reply<T: Serialize>(body: T) -> String {
    reply_line(&Reply { v: VERSION, body })
}

/// An error's reply, as a line.
#[must_use]
pub fn failure(error: &impl ToString) -> String {
    reply(Failure { error: error.to_string() })
}

fn reply_line(value: &impl Serialize) -> String {
    // Only maps with keys that are no strings can fail, and there are none.
    let mut line = serde_json::to_string(value).unwrap_or_default();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_way() {
        for command in [Command::Status, Command::Check, Command::Map { start: 1 << 40 }] {
            assert_eq!(Command::parse(command.line().as_bytes()), Ok(command));
        }
        assert_eq!(Command::parse(br#"{"v":1,"cmd":"map"}"#), Ok(Command::Map { start: 0 }));
    }

    #[test]
    fn bad_requests_are_named() {
        for (line, error) in [
            (&b""[..], "not a request"),
            (b"\xff\xfe", "not a request"),
            (b"[]", "not a request"),
            (br#"{"cmd":"status"}"#, "not a request: missing field `v`"),
            (br#"{"v":2,"cmd":"status"}"#, "version 2 is not spoken here"),
            (br#"{"v":1,"cmd":"halt"}"#, "unknown command \"halt\""),
            (br#"{"v":1,"cmd":"map","start":-1}"#, "not a request"),
        ] {
            let said = Command::parse(line).unwrap_err().to_string();
            assert!(said.starts_with(error), "{said}");
        }
    }

    #[test]
    fn replies_are_one_line() {
        assert_eq!(failure(&"a\nb"), "{\"v\":1,\"error\":\"a\\nb\"}\n");
    }
}
