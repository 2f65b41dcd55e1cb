// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each figure was when it was recorded, and what it may be.
//!
//! Who makes one smaller records the new value, and so lowers its ceiling. Who has to raise one says why in the commit.

/// Instructions move a little with the compiler; a change that a user would notice moves them more.
const COMPILER: f64 = 1.15;

/// One figure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ceiling {
    pub(super) name: &'static str,
    /// The value when it was recorded.
    pub(super) recorded: f64,
    /// The most it may be.
    pub(super) most: f64,
}

const fn exact(name: &'static str, recorded: f64) -> Ceiling {
    Ceiling { name, recorded, most: recorded }
}

const fn instructions(name: &'static str, recorded: f64) -> Ceiling {
    Ceiling { name, recorded, most: recorded * COMPILER }
}

const fn at_most(name: &'static str, recorded: f64, most: f64) -> Ceiling {
    Ceiling { name, recorded, most }
}

/// All figures, in the order of the table.
pub(super) const CEILINGS: &[Ceiling] = &[
    // What the thread that serves the queue takes from the heap and gives back.
    exact("allocations, core alone", 0.0),
    exact("allocations, 4 KiB reads, depth 1", 0.0),
    exact("allocations, 4 KiB reads, depth 32", 0.0),
    exact("allocations, 4 KiB writes, depth 1", 0.0),
    exact("allocations, 4 KiB writes, depth 32", 0.0),
    exact("allocations, 64 KiB in pieces, depth 32", 0.0),
    exact("allocations, 128 KiB, depth 32", 0.0),
    // A flush is five messages between that thread and the keeper, and a channel's memory is for 31 of them.
    at_most("allocations, flushes", 0.162, 0.17),
    instructions("instructions, 4 KiB read, hint", 2054.0),
    instructions("instructions, 4 KiB read, any of 1 M extents", 2370.0),
    instructions("instructions, 4 KiB write", 2115.0),
    instructions("instructions, 128 KiB read, 32 pieces of memory", 6081.0),
    instructions("instructions, 128 KiB read, 32 extents", 31291.0),
    instructions("instructions, lookup, any of 1 M extents", 401.0),
    // The kick ends one io_uring_enter; the next one submits and sleeps until the disk has answered; to signal the guest
    // takes one more (ADR 0012). Of 32 requests eight are submitted at a time, and one enter more
    // is needed since one hands some 20 completions over.
    exact("system calls, 4 KiB reads, depth 1", 3.0),
    exact("system calls, 4 KiB writes, depth 1", 3.0),
    // Where the disk is quicker than a sleeper wakes, or slower than it answers, there is one wake-up more: four calls.
    at_most("system calls, 4 KiB reads, depth 32", 7.0 / 32.0, 11.0 / 32.0),
    at_most("system calls, 4 KiB writes, depth 32", 7.0 / 32.0, 11.0 / 32.0),
    exact("system calls, 4 KiB reads of a hole, depth 32", 2.0 / 32.0),
    at_most("system calls, 4 KiB write and flush, depth 1", 18.1, 20.0),
    // Locks, page counts, inotify's events, now and then a FIEMAP, and the wake-ups of three threads. With many in flight they share those, as it happens.
    at_most("system calls, 4 KiB writes into a hole, depth 1", 24.5, 29.0),
    at_most("system calls, 4 KiB writes into a hole, depth 32", 2.8, 6.8),
    // The README says 17. Leaves that grow by one are copied into memory that the allocator has just got back.
    at_most("bytes per extent, insertions of 512", 16.6, 17.0),
    at_most("bytes per extent, single insertions", 17.0, 17.2),
];
