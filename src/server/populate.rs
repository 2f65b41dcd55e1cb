// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--populate all` at the start: nobody is let in before the whole map is loaded (R7).

use std::io;
use std::time::Duration;

use super::{Phase, ServeError, Server, failed};
use crate::control::progress::Progress;

/// How far loading the map is, for whoever watches, and how large a map is that cannot be kept.
#[derive(Debug, Default)]
pub(super) struct Loading {
    bar: Option<Progress>,
    pub(super) counted: Option<io::Result<u64>>,
}

impl Server<'_> {
    /// Whether frontends may be let in: the mode is decided on, or `until` has passed, and what is to be loaded is loaded.
    pub(super) fn ready(&mut self, until: Duration, now: Duration) -> bool {
        let Some((done, all)) = self.owner.keeper.populating() else {
            self.loading.bar = None;
            return self.owner.settled() || until <= now;
        };
        self.loading.bar.get_or_insert_default().show(done, all);
        false
    }

    /// When the decision on the mode is given up: never while the map is being loaded, however long that takes.
    pub(super) fn start_deadline(&self) -> Option<Duration> {
        match self.phase {
            Phase::Starting { until } if self.owner.keeper.populating().is_none() => Some(until),
            _ => None,
        }
    }

    /// Why the whole map cannot be kept, once that is known.
    pub(super) fn too_many(&mut self) -> Option<ServeError> {
        let cap = self.config.max_extents;
        let error = match self.loading.counted.take()? {
            Ok(count) => ServeError::TooManyExtents { count, cap },
            Err(source) => failed("count the image's extents")(source),
        };
        Some(error)
    }
}
