// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The watch on the image's inode (R5a, R24), listened to as closely as the mode asks for.

use std::time::Duration;

use tracing::warn;

use crate::image::{Change, Watch};

/// In filesystem mode every write of ours rings, and nothing is urgent: one look in this time.
const CALM: Duration = Duration::from_secs(1);

/// The watch and when it is listened to closely again.
#[derive(Debug)]
pub(super) struct InodeWatch {
    watch: Watch,
    /// Writes are not heard until then.
    deaf_until: Option<Duration>,
}

impl InodeWatch {
    pub(super) fn new(watch: Watch) -> Self {
        Self { watch, deaf_until: None }
    }

    /// It rang. What has happened to the inode?
    pub(super) fn rang(&mut self, direct: bool, now: Duration) -> Change {
        if !direct && self.watch.listen(false).is_ok() {
            self.deaf_until = Some(now + CALM);
        }
        self.look()
    }

    /// Listens closely again when it is time, or at once when direct mode has begun, and says what was missed.
    pub(super) fn tick(&mut self, direct: bool, now: Duration) -> Change {
        if !self.deaf_until.is_some_and(|until| direct || until <= now) {
            return Change::Unchanged;
        }
        if let Err(error) = self.watch.listen(true) {
            self.deaf_until = Some(now + CALM);
            if !direct {
                return Change::Unchanged;
            }
            // Not hearing counts as the worst that can be (R5a).
            warn!(%error, "the image's size cannot be watched");
            return Change::SizeChanged;
        }
        self.deaf_until = None;
        self.look()
    }

    /// What has happened to the inode since the last look.
    pub(super) fn look(&self) -> Change {
        self.watch.check().unwrap_or_else(|error| {
            // Not knowing counts as the worst that can be (R5a).
            warn!(%error, "the image's size cannot be seen");
            Change::SizeChanged
        })
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        self.deaf_until
    }
}
