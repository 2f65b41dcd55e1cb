// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the keeper publishes and the workers read: the mode and the map, as immutable views. And the other way round,
//! how many workers have begun to write.
//!
//! A worker looks at one atomic per request and takes the mutex only when the view has changed,
//! so the hot path takes no lock. A completion the guest sees is published after the view it
//! depends on (R10: what a write made wrong goes first, *then* it completes), and a worker looks at the version after it has taken a
//! request from the ring: a guest that saw a write complete never gets an older map for its next read.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::extent::ExtentMap;

/// How data moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// Everything through the host filesystem.
    #[default]
    Filesystem,
    /// By the extent map.
    Direct,
}

/// One published state.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// How data moves.
    pub mode: Mode,
    /// Where the bytes are; empty in filesystem mode.
    pub map: ExtentMap,
}

/// Workers that write. On cache lines of its own: every worker looks at the version for each of its requests.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Stirred(AtomicU32);

/// The place where views are published.
#[derive(Debug, Default)]
pub struct Shared {
    version: AtomicU64,
    view: Mutex<Arc<View>>,
    stirred: Stirred,
}

impl Shared {
    /// In filesystem mode, with nothing known.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Publishes a view. Only the keeper does.
    pub fn publish(&self, view: View) {
        let view = Arc::new(view);
        let old = {
            let mut slot = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            self.version.fetch_add(1, Ordering::Release);
            std::mem::replace(&mut *slot, view)
        };
        // The old view may be the last of its kind; it is freed outside the lock.
        drop(old);
    }

    /// The newest view, and its version.
    #[must_use]
    pub fn latest(&self) -> (u64, Arc<View>) {
        let slot = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        (self.version.load(Ordering::Relaxed), Arc::clone(&slot))
    }

    /// A worker that was still is about to write. It counts as stirred until the keeper has heard
    /// [`Still`](super::message::ToKeeper::Still).
    pub(super) fn stir(&self) {
        self.stirred.0.fetch_add(1, Ordering::SeqCst);
    }

    /// The keeper has heard it.
    pub(super) fn calm(&self) {
        let before = self.stirred.0.fetch_sub(1, Ordering::SeqCst);
        debug_assert_ne!(before, 0, "still without having been stirred");
    }

    /// Whether all that any worker has begun to write has ended, and the keeper knows of it.
    pub(crate) fn is_calm(&self) -> bool {
        self.stirred.0.load(Ordering::SeqCst) == 0
    }

    /// The newest version's number.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }
}
