// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Saying less than happens.

use std::time::{Duration, Instant};

/// Lets a guest make us say something at most once a second.
#[derive(Debug, Default)]
pub(crate) struct Quiet {
    last: Option<Instant>,
    untold: u64,
}

impl Quiet {
    /// It happened once more: how often since the last time this said so, if it is time again.
    pub(crate) fn tell(&mut self) -> Option<u64> {
        self.untold += 1;
        if self.last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            return None;
        }
        self.last = Some(Instant::now());
        Some(std::mem::take(&mut self.untold))
    }
}
