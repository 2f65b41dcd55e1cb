// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a worker counts. One writer each, so a count costs a plain add; anybody may read.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number only its owner changes.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owner may call it: it is a load and a store, not an atomic add.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Replaces the number. Only the owner may call it.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The number as it stands.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One worker's counts; on cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    /// Read requests taken.
    pub read: Counter,
    /// Write requests taken.
    pub write: Counter,
    /// Flush requests taken.
    pub flush: Counter,
    /// Discard requests taken.
    pub discard: Counter,
    /// Write-zeroes requests taken.
    pub write_zeroes: Counter,
    /// Requests that ended in an error status.
    pub errors: Counter,
    /// Segments moved raw.
    pub direct: Counter,
    /// Segments moved through the file.
    pub file: Counter,
    /// Segments answered with zeros, without I/O.
    pub zero: Counter,
    /// Segments that went through a bounce buffer (counted in `direct` or `file` as well).
    pub bounced: Counter,
    /// Bytes of raw I/O in flight, kept up to date only while a drain waits for them.
    pub draining: Counter,
}
