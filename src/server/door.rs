// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A listening socket in the main loop's epoll set, which can be left alone for a while.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tracing::warn;

use super::poll::{Interest, Poll};
use super::socket::Listener;

/// How long to leave the socket alone when nothing can be accepted: without descriptors left, say,
/// it would be reported as ready forever.
const PAUSE: Duration = Duration::from_secs(1);

/// A listening socket.
#[derive(Debug)]
pub(super) struct Door {
    listener: Listener,
    token: u64,
    open: bool,
    reopen_at: Option<Duration>,
}

impl Door {
    /// A closed door; `token` will name it in the epoll set.
    pub(super) fn new(listener: Listener, token: u64) -> Self {
        Self { listener, token, open: false, reopen_at: None }
    }

    /// Lets the loop hear of those that wait.
    pub(super) fn open(&mut self, poll: &Poll) -> io::Result<()> {
        self.reopen_at = None;
        if !self.open {
            poll.add(&self.listener, self.token, Interest::Read)?;
            self.open = true;
        }
        Ok(())
    }

    /// Leaves those that come waiting in the backlog.
    pub(super) fn close(&mut self, poll: &Poll) {
        self.reopen_at = None;
        if self.open {
            self.open = false;
            // It was added, so it can be removed.
            let _ = poll.remove(&self.listener);
        }
    }

    /// The next connection, if one is there.
    pub(super) fn accept(&mut self, poll: &Poll, now: Duration) -> Option<UnixStream> {
        // Closed by something else that happened in the same round.
        if !self.open {
            return None;
        }
        match self.listener.accept() {
            Ok(stream) => stream,
            Err(error) => {
                warn!(%error, "cannot accept a connection; trying again in a second");
                self.close(poll);
                self.reopen_at = Some(now + PAUSE);
                None
            }
        }
    }

    /// When [`tick`](Self::tick) wants to be called.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.reopen_at
    }

    pub(super) fn tick(&mut self, poll: &Poll, now: Duration) {
        if self.reopen_at.is_some_and(|at| at <= now) && self.open(poll).is_err() {
            self.reopen_at = Some(now + PAUSE);
        }
    }
}
