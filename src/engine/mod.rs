// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pure core: requests, the extent map, planning, the barrier, ownership of the layout.
//!
//! No I/O, no clock, no threads, no unsafe. A [`Worker`] owns the requests of one queue thread and
//! drives them through an [`Io`]; the one [`Keeper`] of an image owns its mode and map, decides who
//! may write through the file where, and orders drains. They exchange messages only. The daemon and
//! the simulator drive the same two types.
//!
//! ```text
//! virtio ──Request──► Worker ──Op──► Io            (io_uring, or the simulated disk)
//!                      ▲  │
//!           ToWorker   │  │ ToKeeper
//!                      │  ▼
//!  lease, timer ────► Keeper ──Action──► helper thread (FIEMAP, fsync, punch), lease
//!                         └──publishes──► Shared (mode + extent map) ──read by──► Worker
//! ```

pub mod barrier;
pub mod counters;
pub mod extent;
pub mod io;
pub mod keeper;
pub mod locks;
pub mod message;
mod ops;
pub mod pace;
pub mod plan;
pub mod request;
pub mod rules;
pub mod shared;
#[cfg(test)]
mod testing;
pub mod units;
pub mod worker;

use std::time::Duration;

pub use io::{Completion, Io, Op, OpId, Tag};
pub use keeper::Keeper;
pub use pace::RawLimits;
pub use rules::Rules;
pub use worker::Worker;

/// Sizes and alignments, fixed when the image was opened. All powers of two unless said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size of the image file in bytes (any number); block-wise file writes never go past it.
    pub file_size: u64,
    /// The granule of file writes and locks in bytes (R10a): the filesystem's block, or the page
    /// where that holds several, because the page cache keeps or drops a page as a whole (ADR
    /// 0010).
    pub fs_block: u32,
    /// What offset and length of O_DIRECT through the file must be multiples of, in bytes.
    pub file_align: u32,
    /// The device's logical block size in bytes: the same for raw access.
    pub dev_block: u32,
    /// What raw writes are made in whole multiples of, in bytes: the block size of the device's own page cache, from `dev_block`
    /// to `fs_block`. Where a page of that cache cannot go, the kernel turns a direct write into a buffered one, which
    /// rewrites a whole block from what the page holds (ADR 0004).
    pub write_block: u32,
    /// What guest addresses and lengths must be multiples of to be used without bouncing.
    pub mem_align: u32,
    /// Size of a bounce buffer; at least `fs_block`, `write_block` and `dev_block`.
    pub bounce_bytes: u32,
    /// Bounce buffers a worker has (any number above 0).
    pub bounce_slots: u32,
    /// Operations a worker may have in flight (any number above 0).
    pub ops: u32,
    /// Most bytes zeroed at a time, between two looks at the park orders (R17); a multiple of
    /// `fs_block`.
    pub zeroes_bytes: u64,
    /// Most bytes punched at a time; a multiple of `fs_block`.
    pub punch_bytes: u64,
    /// How long a confirmed lease counts before it is asked for again (R2a: a quarter of the
    /// lease-break time); `None` for a block device, which has no lease.
    pub lease_fresh: Option<Duration>,
    /// Bounds of the raw I/O that a worker has in flight (R2b).
    pub raw: RawLimits,
}
