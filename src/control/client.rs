// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The asking end of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::{Command, VERSION};

/// The longest reply taken; a piece of a map is the longest there is.
const MAX_REPLY: u64 = 16 << 20;
/// Longer than any job a reply has to wait for on a busy disk.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why there is no answer. One line.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ClientError {
    #[error("cannot connect to {}: {source}; is extentd running with this --control-path?", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("no answer from the control socket: {source}")]
    Io { source: io::Error },
    #[error("the control socket closed without an answer")]
    Closed,
    #[error("the answer makes no sense: {source}")]
    Syntax { source: serde_json::Error },
    #[error("the answer is of another version; use the extentctl that came with this extentd")]
    Version,
    #[error("extentd says: {error}")]
    Refused { error: String },
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        let stream =
            connect().map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// No answer within a minute, or the daemon refused.
    pub fn ask(&mut self, command: Command) -> Result<Value, ClientError> {
        let failed = |source| ClientError::Io { source };
        self.stream.get_mut().write_all(command.line().as_bytes()).map_err(failed)?;
        let mut line = String::new();
        (&mut self.stream).take(MAX_REPLY).read_line(&mut line).map_err(failed)?;
        if !line.ends_with('\n') {
            return Err(ClientError::Closed);
        }
        let value: Value =
            serde_json::from_str(&line).map_err(|source| ClientError::Syntax { source })?;
        if value.get("v").and_then(Value::as_u64) != Some(VERSION.into()) {
            return Err(ClientError::Version);
        }
        if let Some(error) = value.get("error").and_then(Value::as_str) {
            return Err(ClientError::Refused { error: error.to_owned() });
        }
        Ok(value)
    }
}
