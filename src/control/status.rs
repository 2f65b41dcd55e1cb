// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `status` answers.

use serde::{Deserialize, Serialize};

use crate::engine::counters::Counters;

/// The state of one device. All sizes in bytes; all counts since the daemon started.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of extentd.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// `direct` or `filesystem`.
    pub mode: String,
    /// Why that mode.
    pub reason: String,
    /// `held`, `breaking` or `none`.
    pub lease: String,
    /// Path of the image.
    pub image: String,
    /// The image has lost its name (R24).
    pub unlinked: bool,
    /// Path of the block device raw I/O goes to.
    pub device: Option<String>,
    /// Size of the disk the guest sees.
    pub capacity_bytes: u64,
    /// Its logical block size.
    pub block_size: u32,
    /// The guest may not write.
    pub read_only: bool,
    /// `none`, `connected` or `draining`.
    pub frontend: String,
    /// Frontends served so far.
    pub sessions: u64,
    /// The extent map.
    pub extents: Extents,
    /// Requests taken.
    pub requests: Requests,
    /// Pieces of requests, by the way they went.
    pub segments: Segments,
    /// Durability.
    pub flush: Flush,
    /// The queue threads of the present session.
    pub queues: Vec<QueueThread>,
    /// Lease breaks served.
    pub lease_breaks: u64,
    /// Of these, those that the kernel forced with raw I/O still in flight.
    #[serde(default)]
    pub forced_breaks: u64,
}

/// The extent map.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Extents {
    /// Extents in memory.
    pub cached: u64,
    /// Bytes known to be mapped.
    pub mapped_bytes: u64,
    /// FIEMAP answers taken.
    pub fiemap_calls: u64,
    /// Extents forgotten because of `--max-extents`.
    pub evictions: u64,
}

/// Requests taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Requests {
    /// Reads.
    pub read: u64,
    /// Writes.
    pub write: u64,
    /// Flushes.
    pub flush: u64,
    /// Discards.
    pub discard: u64,
    /// Write-zeroes requests.
    pub write_zeroes: u64,
    /// Of all these, those that ended in an error.
    pub errors: u64,
}

/// Pieces of requests, by the way they went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Segments {
    /// Straight to the device.
    pub direct: u64,
    /// Through the host filesystem.
    pub file: u64,
    /// Answered with zeros.
    pub zero: u64,
    /// Through a bounce buffer; counted in `direct` or `file` as well.
    pub bounced: u64,
}

/// Durability.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Flush {
    /// Flushes asked for.
    pub requests: u64,
    /// Device cache flushes carried out for them.
    pub device_flushes: u64,
    /// Metadata commits carried out for them.
    pub metadata_commits: u64,
    /// A failed flush that is still held against the session (R16).
    pub error: Option<String>,
}

/// One queue thread.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct QueueThread {
    /// Its number, never used again.
    pub worker: u32,
    /// The queues it serves.
    pub queues: Vec<u16>,
    /// Requests it took.
    pub requests: Requests,
    /// The ways their pieces went.
    pub segments: Segments,
}

impl Requests {
    /// What `counters` says now.
    #[must_use]
    pub fn of(counters: &Counters) -> Self {
        Self {
            read: counters.read.get(),
            write: counters.write.get(),
            flush: counters.flush.get(),
            discard: counters.discard.get(),
            write_zeroes: counters.write_zeroes.get(),
            errors: counters.errors.get(),
        }
    }

    /// Adds `other`.
    pub fn add(&mut self, other: &Self) {
        self.read += other.read;
        self.write += other.write;
        self.flush += other.flush;
        self.discard += other.discard;
        self.write_zeroes += other.write_zeroes;
        self.errors += other.errors;
    }
}

impl Segments {
    /// What `counters` says now.
    #[must_use]
    pub fn of(counters: &Counters) -> Self {
        Self {
            direct: counters.direct.get(),
            file: counters.file.get(),
            zero: counters.zero.get(),
            bounced: counters.bounced.get(),
        }
    }

    /// Adds `other`.
    pub fn add(&mut self, other: &Self) {
        self.direct += other.direct;
        self.file += other.file;
        self.zero += other.zero;
        self.bounced += other.bounced;
    }
}
