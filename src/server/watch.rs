// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The watch on the image's inode (R5a, R24), listened to as closely as the mode asks for.

use std::io;
use std::time::Duration;

use tracing::warn;

use crate::image::{Change, Watch};

use super::poll::{Interest, Poll};

/// In filesystem mode every write of ours rings, and nothing is urgent: one look in this time.
const CALM: Duration = Duration::from_secs(1);

/// The watch and when it is listened to again.
#[derive(Debug)]
pub(super) struct InodeWatch {
    watch: Watch,
    token: u64,
    /// It is not listened to until then.
    deaf_until: Option<Duration>,
}

impl InodeWatch {
    pub(super) fn new(watch: Watch) -> Self {
        Self { watch, token: 0, deaf_until: None }
    }

    /// Puts it into the epoll set.
    pub(super) fn register(&mut self, poll: &Poll, token: u64) -> io::Result<()> {
        self.token = token;
        poll.add(&self.watch, token, Interest::Read)
    }

    /// What has happened to the inode.
    pub(super) fn check(&mut self, poll: &Poll, direct: bool, now: Duration) -> Change {
        if !direct && poll.change(&self.watch, self.token, Interest::Nothing).is_ok() {
            self.deaf_until = Some(now + CALM);
        }
        self.watch.check().unwrap_or_else(|error| {
            // Not knowing counts as the worst that can be (R5a).
            warn!(%error, "the image's size cannot be seen");
            Change::SizeChanged
        })
    }

    /// Listens again when it is time, or at once when direct mode has begun. Says whether it
    /// has to be [checked](Self::check).
    pub(super) fn tick(&mut self, poll: &Poll, direct: bool, now: Duration) -> bool {
        if !self.deaf_until.is_some_and(|until| direct || until <= now) {
            return false;
        }
        self.deaf_until = None;
        poll.change(&self.watch, self.token, Interest::Read).is_ok() && direct
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        self.deaf_until
    }
}
