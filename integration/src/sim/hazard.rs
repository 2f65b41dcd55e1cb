// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The dangers a run must have met: one that was never met proves nothing.

macro_rules! hazards {
    ($($name:ident $text:literal,)*) => {
        /// A danger of the design page.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(super) enum Hazard { $($name,)* }

        impl Hazard {
            const NAMES: &[&str] = &[$($text,)*];
        }
    };
}

hazards! {
    BreakWithRawInFlight "break with raw in flight",
    FiemapDuringFileWrite "FIEMAP during a file write",
    OddEdgePunch "odd-edge punch",
    CrossQueueDrain "cross-queue drain",
    FlushDuringBreak "flush during break",
    ForcedBreak "forced break",
    LateBreak "late break",
    BreakWhileEntering "break while entering",
    OpenedWithoutWaiting "opener that did not wait",
    GhostWrite "ghost write",
    BufferedFallback "direct write gone buffered",
    StuckPage "page that DONTNEED left",
    StalePage "page older than the disk",
    SizeChange "size change without break",
    CutShort "FIEMAP answer cut short",
    Eviction "eviction",
    ShortTransfer "short transfer",
    IoError "I/O error",
    NoSpace "out of space",
    FailedFlush "failed flush",
    Kill "kill",
    PowerCut "power cut",
    CopyOnWrite "copy on write",
    Bounced "unaligned guest memory",
    SessionChange "session change",
    WorkerStall "stalled worker",
    LyingMap "map that lies",
    Overlap "overlapping guest writes",
    WriteThrough "write-through",
    Zeroes "zeroing by reference",
    NoZeroes "zeroing by reference not to be had",
    NoPunch "filesystem that cannot punch",
    PagesLeft "pages left by a file write",
    NoPagesLeft "file write that left no pages",
    SlowDevice "raw I/O on a slow device",
    SlowBreak "break with raw in flight on a slow device",
    SharedLease "read-only image under a shared lease",
    ExclusiveReadOnly "read-only image under an exclusive lease",
    BesideSharedLease "opener beside a shared lease",
    SecondLease "writer that waits for a second instance's lease",
    WriterOfReadOnly "writer of a read-only image",
    Deduplicated "deduplication of the image",
    NotTaken "entries that the kernel does not take at once",
    LeaseCheckStale "entry whose lease check is too old",
    LeaseCheckedAgain "the same, of one that the kernel had not taken",
    Again "EAGAIN or EINTR",
    HelperHangs "helper that hangs",
    BreakBehindBurst "lease break behind other work of the manager",
    LateJoin "worker that joins while a quiesce order stands",
    BehindFence "request behind another queue's flush (strict)",
    FlushBesidePunch "flush beside a punch, and one behind it",
    TailMapped "FIEMAP of the block that the file ends in",
    ReadBehindManager "read of what was written while the manager was stopped",
    FormerBlock "raw write over a page of the block's former life",
    ShortInsideBlock "file write that ended inside a block",
    KeptStale "direct write that could not drop a page",
    PageOfExtents "page of blocks in several extents",
}

/// How often each was met.
#[derive(Clone, Debug)]
pub(super) struct Hazards(Vec<u64>);

impl Default for Hazards {
    fn default() -> Self {
        Self(vec![0; Hazard::NAMES.len()])
    }
}

impl Hazards {
    pub(super) fn hit(&mut self, hazard: Hazard) {
        self.0[hazard as usize] += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (sum, n) in self.0.iter_mut().zip(&other.0) {
            *sum += n;
        }
    }

    /// One for each that was met.
    pub(super) fn once(&self) -> Self {
        Self(self.0.iter().map(|n| u64::from(*n > 0)).collect())
    }

    pub(super) fn total(&self) -> usize {
        self.0.len()
    }

    pub(super) fn met(&self) -> usize {
        self.0.iter().filter(|n| **n > 0).count()
    }

    /// Names and counts.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Hazard::NAMES.iter().copied().zip(self.0.iter().copied())
    }
}
