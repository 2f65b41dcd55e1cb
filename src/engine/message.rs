// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Messages between the workers (one per queue thread) and the [`Keeper`](super::Keeper), and
//! the jobs the keeper gives to a helper thread that may block in the filesystem.

use super::extent::Extent;
use super::io::Tag;
use super::units::{DeviceOffset, FileRange};

/// A worker, numbered by the caller; never re-used while the keeper lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WorkerId(pub u32);

/// A park order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ParkId(pub u64);

/// A flush point.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PointId(pub u64);

/// A job for the helper.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct JobId(pub u64);

/// What a park order waits for before it is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drain {
    /// Raw I/O in the range: enough for a lease break and for layout changes (R2, R12).
    Raw,
    /// Raw and file I/O in the range: needed before direct mode begins.
    Everything,
}

/// From a worker to the keeper.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ToKeeper {
    /// `range` is not cached: load it; answered by [`ToWorker::Retry`].
    NeedMap(Tag, FileRange),
    /// Lock `range` (whole filesystem blocks) for a file write or a read-modify-write;
    /// answered by [`ToWorker::Locked`].
    Lock(Tag, FileRange),
    /// The writes under the lock have ended; answered by [`ToWorker::Settled`] once the map no longer says what was there
    /// before (R10).
    Unlock {
        /// Whose lock.
        tag: Tag,
        /// Whether the file was written.
        wrote_file: bool,
        /// The writes have succeeded, and no page of the lock's range was in the page cache after the last of them (R10a).
        /// Not so as well where the kernel does not tell.
        uncached: bool,
    },
    /// Give the whole blocks inside `range` back to the filesystem (R12); answered by
    /// [`ToWorker::Discarded`].
    Discard(Tag, FileRange),
    /// Make everything accepted before this durable (R13); answered by [`ToWorker::Flushed`].
    Flush(Tag),
    /// The park order holds here and what it waits for has ended.
    Parked(ParkId),
    /// Every data-modifying request accepted before the flush point has ended.
    PointReached {
        /// Which.
        id: PointId,
        /// A raw write has ended since the last report, here.
        raw: Option<DeviceOffset>,
        /// A file write has ended since the last report.
        file: bool,
    },
    /// The sync asked for by [`ToWorker::Sync`] ended: 0 or an errno.
    Synced(i32),
    /// F_GETLEASE no longer says the lease is ours (R2a); raw I/O has stopped here.
    LeaseLost,
    /// A raw write happened since the last [`ToWorker::Touched`] (R4).
    Dirty,
    /// Nothing that modifies data is in flight here any more; what was written since the last report. Said once for each time
    /// that the worker was stirred.
    Still {
        /// As in [`PointReached`](Self::PointReached).
        raw: Option<DeviceOffset>,
        /// As in [`PointReached`](Self::PointReached).
        file: bool,
    },
}

/// From the keeper to a worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ToWorker {
    /// The first message: park orders that stand have been sent, requests may start.
    Begin,
    /// Look at the map again for this request.
    Retry(Tag),
    /// The lock is yours; look at the map again.
    Locked(Tag),
    /// The lock is given back, the map says nothing any more that the writes made wrong: the request may complete.
    Settled(Tag),
    /// The discard ended: 0 or an errno.
    Discarded(Tag, i32),
    /// The flush ended: 0 or an errno.
    Flushed(Tag, i32),
    /// Start nothing more in `range`; answer [`ToKeeper::Parked`] when `drain` is reached.
    Park(ParkId, FileRange, Drain),
    /// The park order ends; look at the map again.
    Release(ParkId),
    /// Answer [`ToKeeper::PointReached`] when everything accepted until now has ended.
    Point(PointId),
    /// No flush is under way any more: what waited behind one may start (`--barrier=strict`).
    Passed,
    /// Carry out this sync, image first, and answer [`ToKeeper::Synced`].
    Sync {
        /// `fdatasync` the image.
        image: bool,
        /// Flush the device's cache at this place.
        device: Option<DeviceOffset>,
    },
    /// The image's mtime was brought up to date (R4).
    Touched,
}

/// Work that may block in the filesystem, for one helper thread that does one at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Job {
    /// Empty the page cache of `range`, then FIEMAP it with FLAG_SYNC, at most `max_extents`.
    Map {
        /// Whole filesystem blocks.
        range: FileRange,
        /// Most extents asked for.
        max_extents: u32,
    },
    /// Take the lease, then `fsync`, drop the page cache and see that it is empty (R3). The
    /// lease goes again if that fails.
    Enter,
    /// With all I/O parked: the same `fsync`, drop and check again; the lease stays.
    Confirm,
    /// Punch `range`, whole filesystem blocks (R12).
    Punch {
        /// What goes.
        range: FileRange,
    },
}

/// Why direct mode could not be entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Somebody has the file open: F_SETLEASE said EAGAIN.
    Busy,
    /// It cannot be told whether somebody has the file open in a way that leases do not count.
    Unseen,
    /// The page cache would not become empty.
    PagesCached,
    /// The image is no longer what it was when it was opened (size, mount).
    Changed,
    /// Raw and file reads differ (R6): never again in this process.
    Mismatch,
    /// `fsync` said this errno: something written to the file is lost, and no later sync of the
    /// file will say so again (R16).
    Unsynced(i32),
    /// An errno.
    Failed(i32),
}

/// What FIEMAP said.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MapAnswer {
    /// How much of the range asked for the answer speaks about, from its start.
    pub covered: FileRange,
    /// Extents in order, inside `covered`; what lies between is a hole. `Mapped` only where the
    /// page cache was seen empty after the extents were read.
    pub extents: Vec<Extent>,
    /// What the comparison of raw with file reads said of this answer (R6).
    pub proof: Proof,
}

/// What comparing mapped blocks read raw and through the file showed (R6).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Proof {
    /// Nothing to compare, or only zeros.
    #[default]
    None,
    /// Equal, and not all zero.
    Equal,
    /// Different.
    Different,
}

/// How a job ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum JobDone {
    /// [`Job::Map`]; `Err` is an errno.
    Map(Result<MapAnswer, i32>),
    /// [`Job::Enter`].
    Enter(Result<(), Refusal>),
    /// [`Job::Confirm`].
    Confirm(Result<(), Refusal>),
    /// [`Job::Punch`]; `Err` is an errno.
    Punch(Result<(), i32>),
}

/// What the keeper wants done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Deliver a message. Messages to one worker stay in order.
    Send(WorkerId, ToWorker),
    /// Give the helper a job; its end comes back through
    /// [`Keeper::job_done`](super::Keeper::job_done). One at a time, in order.
    Run(JobId, Job),
    /// Give the lease up now: F_UNLCK, which never blocks (R2). Pages that file writes left are
    /// dropped first if none is dirty.
    DropLease,
    /// Bring the image's mtime up to date on a thread that may block (R4).
    Touch,
    /// Something for the log and `status`.
    Report(Report),
}

/// What the log tells; one line each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Report {
    /// Direct mode began.
    Direct,
    /// Filesystem mode began, and why.
    Filesystem(Why),
    /// Direct mode could not be entered; tried again later unless it is a mismatch.
    Refused(Refusal),
    /// A lease break took longer than half the lease-break time (R2a).
    SlowBreak,
    /// The lease-break time is over and raw I/O is still in flight: the kernel has let the opener in
    /// (R2b).
    ForcedBreak,
    /// A flush failed; FLUSH fails until the session ends (R16).
    FlushFailed(i32),
    /// The whole map is loaded (`--populate all`).
    Populated,
    /// The map has more extents than may be cached: it is not kept whole any more (R8).
    Unpinned,
}

/// Why direct mode ended, or never began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// Not begun yet.
    Starting,
    /// Direct mode is off by configuration or the image is not eligible; the caller knows why.
    NotEligible,
    /// Somebody opened the image.
    LeaseBroken,
    /// The lease was taken from us (forced break, R2a).
    LeaseLost,
    /// The file's size changed behind us (R5a).
    SizeChanged,
    /// The file lost blocks behind us (R5a).
    BlocksLost,
    /// R6's comparison failed.
    Mismatch,
    /// The image or its surroundings are no longer fit for direct mode; the log says what changed.
    Changed,
    /// Somebody else has the file open.
    Busy,
    /// Somebody else may have it open, in a way that leases do not count.
    Unseen,
    /// The page cache would not become empty.
    PagesCached,
    /// Entering failed otherwise.
    Failed,
    /// The process ends.
    Stopping,
}
