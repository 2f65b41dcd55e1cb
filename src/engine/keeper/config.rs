// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a keeper is made of, and what it shows of itself.

use std::time::Duration;

use crate::engine::Geometry;
use crate::engine::message::Why;
use crate::engine::rules::Rules;
use crate::engine::units::FileRange;

/// How an image begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// A regular file that may be served raw: the keeper tries for direct mode at once and again
    /// after every break.
    Eligible,
    /// Filesystem mode for good.
    Filesystem,
    /// A block device: raw always, the file's offsets are the device's (R6a).
    Identity,
}

/// What a keeper is made of.
#[derive(Clone, Copy, Debug)]
pub struct KeeperConfig {
    /// Sizes and alignments.
    pub geometry: Geometry,
    /// How it begins.
    pub start: Start,
    /// The part of the file the guest sees, in bytes.
    pub window: FileRange,
    /// Most extents cached (R8).
    pub max_extents: usize,
    /// `--populate all`: all of the map is loaded at once and kept (R7).
    pub populate: bool,
    /// `/proc/sys/fs/lease-break-time`; half of it unserved is reported (R2a).
    pub lease_break_time: Duration,
    /// Whether a comparison at open has shown raw and file reads equal (R6).
    pub proven: bool,
    /// Whether the filesystem's `fdatasync` flushes the device's cache (R14): not where it is
    /// mounted with `barrier=0`.
    pub barriers: bool,
    /// `--barrier=strict` (R13).
    pub strict: bool,
    /// All of them, but in the simulator.
    pub rules: Rules,
}

/// The lease, as `status` shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lease {
    /// Not ours.
    None,
    /// Ours.
    Held,
    /// Ours, and somebody waits.
    Breaking,
}

/// What `status` shows of the keeper.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Direct mode.
    pub direct: bool,
    /// If not: why.
    pub why: Why,
    /// The lease.
    pub lease: Lease,
    /// Extents cached.
    pub cached: usize,
    /// Bytes cached as mapped.
    pub mapped_bytes: u64,
    /// FIEMAP jobs ordered.
    pub fiemap_calls: u64,
    /// Extents forgotten because of the cap.
    pub evictions: u64,
    /// Lease breaks seen.
    pub lease_breaks: u64,
    /// Of these, those that the kernel forced with raw I/O still in flight.
    pub forced_breaks: u64,
    /// Flushes asked for, write-through writes included.
    pub flush_requests: u64,
    /// Device cache flushes ordered.
    pub device_flushes: u64,
    /// Metadata commits ordered.
    pub metadata_commits: u64,
    /// The errno of a flush that failed and is still held against the session (R16).
    pub flush_error: Option<i32>,
}
