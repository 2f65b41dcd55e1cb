// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon's [`Io`]: one io_uring per worker thread.
//!
//! Operations are queued by [`submit`](Io::submit) and go to the kernel together, in one
//! [`enter`](Ring::enter); completions are read from shared memory by [`reap`](Io::reap). In the
//! steady state nothing allocates, and `io_uring_enter` is the only system call.
//!
//! The image's open file description is a fixed file of every ring, also of one that only does raw
//! I/O: it carries the lease and the lock, and the kernel lets go of neither before the ring's
//! last request is done, not even when this process is killed (R1a).

mod enter;
mod gather;
mod guard;
mod operation;
mod pinned;
mod setup;
mod slot;
mod watch;

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use io_uring::{IoUring, cqueue, squeue};

use super::buffer::{BouncePool, Buffers, GuestBuffers};
use super::fault::GuestRegions;
use super::{lease, page_cache};
use crate::engine::io::{Buf, Target};
use crate::engine::units::FileRange;
use crate::engine::{Completion, Geometry, Io, Op, OpId};
pub use enter::Sleep;
use gather::Gather;
use operation::Way;
use pinned::Pinned;
use setup::TaskRun;
use slot::{Queued, Slot};
pub use watch::Hear;
use watch::Watch;

/// iovecs an operation keeps room for when it is done.
const KEEP_IOVECS: usize = 128;

/// One io_uring, for one thread: [`Io`] for the worker that runs there.
///
/// It belongs to the thread that made it: the kernel takes submissions from no other. It may be
/// moved, but on another thread its operations fail.
///
/// # Sleeping
///
/// [`wait`](Self::wait) is where the thread sleeps: until an operation completes, or a descriptor given to
/// [`watch`](Self::watch) is signalled. One system call hands over what is queued and sleeps.
///
/// # Dropping
///
/// Dropping a ring waits, without bound, for what the kernel has in flight: the memory must not go
/// away before. A device that never answers therefore holds the thread, and a line every 30 s
/// says so. What was queued and not yet entered is forgotten.
#[derive(Debug)]
pub struct Ring {
    uring: Uring,
    buffers: Buffers,
    slots: Box<[Slot]>,
    /// The guest memory that is registered.
    pinned: Option<Pinned>,
    /// Entries of the submission queue that the kernel has not taken yet, oldest first.
    queued: VecDeque<Queued>,
    /// Raw operations, which go into the submission queue only when it is handed over.
    raw: Vec<(squeue::Entry, OpId)>,
    /// The time that was told last when the first of these was queued, at which their lease was looked at or later.
    checked: Duration,
    /// How long that holds.
    fresh: Option<Duration>,
    /// The time that was last told.
    told: Cell<Duration>,
    /// Operations the kernel refused to take; `reap` returns them.
    failed: VecDeque<Completion>,
    /// Operations that are the kernel's.
    submitted: u32,
    /// The errno with which the kernel refused the ring for good.
    broken: Option<i32>,
    /// The same, until `enter` has told it.
    untold: Option<i32>,
    watches: Box<[Watch]>,
    /// Polls that are the kernel's, those of former watches included.
    polls: u32,
    /// A watch is without a poll.
    uneasy: bool,
    /// The kernel can be told that a thread that waits here need not be waiting for a disk.
    no_iowait: bool,
    /// Whether to sleep for several completions.
    gather: Gather,
    image: OwnedFd,
    /// The same for the device: for the time after [`bar_device`](Self::bar_device).
    device: Option<OwnedFd>,
    /// The device is no fixed file at the moment.
    barred: bool,
    /// The lease that `ConfirmLease` wants to see.
    lease: Option<lease::Kind>,
    /// The guest memory that operations are of; a part of it may turn out to be missing.
    regions: Option<Arc<GuestRegions>>,
}

/// [`IoUring`], which has no `Debug`.
struct Uring(IoUring);

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("IoUring").finish_non_exhaustive()
    }
}

// SAFETY: the raw pointers inside point to memory that the ring itself owns or keeps alive (its
// pool, the guest mappings by their guards) and that is bound to no thread. From another thread the
// kernel refuses to submit (EEXIST), which ends as failed operations; `drop` leaks what it cannot
// wait for there.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring on the calling thread.
    ///
    /// `image` becomes fixed file 0, `device` (for raw access) fixed file 1. [`Op::ConfirmLease`] asks whether `image` still holds
    /// the `lease` that raw access depends on. Up to `watches` descriptors can be watched.
    ///
    /// # Errors
    ///
    /// What the kernel said; `EINVAL` if `geometry` asks for no or too many operations,
    /// `EOPNOTSUPP` if the kernel is too old.
    pub fn new(
        image: BorrowedFd<'_>,
        device: Option<BorrowedFd<'_>>,
        geometry: &Geometry,
        lease: Option<lease::Kind>,
        watches: usize,
    ) -> io::Result<Self> {
        Self::with(image, device, geometry, lease, watches, &TaskRun::ALL)
    }

    /// A ring whose completions come back by the first of `ways` that the kernel knows.
    fn with(
        image: BorrowedFd<'_>,
        device: Option<BorrowedFd<'_>>,
        geometry: &Geometry,
        lease: Option<lease::Kind>,
        watches: usize,
        ways: &[TaskRun],
    ) -> io::Result<Self> {
        let ops = usize::try_from(geometry.ops).map_err(|_| errno(libc::EINVAL))?;
        let files = setup::Files { image, device, watches };
        let (uring, task_run) = setup::ring(geometry.ops, files, ways)?;
        tracing::debug!(?task_run, "io_uring made");
        let no_iowait = uring.params().is_feature_no_iowait();
        // Other ways to come back end a sleep at once for any completion, and the first then waits for the second.
        let gathers = uring.params().is_feature_min_timeout() && task_run == TaskRun::Deferred;
        let buffers = Buffers {
            guests: GuestBuffers::new(geometry.ops),
            bounce: BouncePool::new(geometry.bounce_slots, geometry.bounce_bytes)?,
        };
        Ok(Self {
            uring: Uring(uring),
            buffers,
            pinned: None,
            slots: (0..ops).map(|_| Slot::default()).collect(),
            queued: VecDeque::with_capacity(ops + watches),
            raw: Vec::with_capacity(ops),
            checked: Duration::ZERO,
            fresh: geometry.lease_fresh,
            told: Cell::default(),
            failed: VecDeque::with_capacity(ops),
            submitted: 0,
            broken: None,
            untold: None,
            watches: (0..watches).map(|_| Watch::default()).collect(),
            polls: 0,
            uneasy: false,
            no_iowait,
            gather: Gather::new(gathers),
            // A duplicate, not a second open: the same description (R1), whoever closes the other.
            image: image.try_clone_to_owned()?,
            device: device.map(|device| device.try_clone_to_owned()).transpose()?,
            barred: false,
            lease,
            regions: None,
        })
    }
}

impl Ring {
    /// The table of the requests' data.
    pub fn guests(&mut self) -> &mut GuestBuffers {
        &mut self.buffers.guests
    }

    /// Operations taken by `submit` and not yet returned by `reap`.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        let waiting = self.queued.iter().filter(|entry| entry.op().is_some()).count()
            + self.raw.len()
            + self.failed.len();
        u32::try_from(waiting).unwrap_or(u32::MAX).saturating_add(self.submitted)
    }

    /// The operation that a completion belongs to ends.
    fn end(&mut self, id: OpId) -> bool {
        let slot = usize::try_from(id.0).ok().and_then(|index| self.slots.get_mut(index));
        let Some(slot) = slot.filter(|slot| slot.taken) else { return false };
        (slot.taken, slot.barred) = (false, false);
        slot.iovecs.clear();
        slot.iovecs.shrink_to(KEEP_IOVECS);
        if let Some(tag) = slot.pinned.take() {
            self.buffers.guests.unpin(tag);
        }
        true
    }

    fn accept(&mut self, entry: &cqueue::Entry) -> Option<Completion> {
        if watch::is_watch(entry) {
            self.heard(entry);
            return None;
        }
        let id = u32::try_from(entry.user_data()).ok().map(OpId);
        let slot = id.and_then(|id| self.slots.get(usize::try_from(id.0).ok()?));
        let barred = slot.is_some_and(|slot| slot.barred) && entry.result() == -libc::EBADF;
        let id = id.filter(|id| self.end(*id));
        let Some(id) = id else {
            // Cannot happen: every entry names its slot. If it does, the safe thing is to hold on
            // to all memory, which is what ignoring it means.
            tracing::error!(user_data = entry.user_data(), "completion of an unknown operation");
            return None;
        };
        self.submitted = self.submitted.saturating_sub(1);
        let result = if barred { -libc::ECANCELED } else { entry.result() };
        Some(Completion { id, result })
    }

    fn lease_held(&self) -> bool {
        self.lease.is_some_and(|kind| lease::is_held(self.image.as_fd(), kind))
    }

    fn cached_pages(&self, range: FileRange) -> i32 {
        match page_cache::count(self.image.as_fd(), range) {
            Ok(pages) => i32::try_from(pages).unwrap_or(i32::MAX),
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// Starting operations.
impl Ring {
    /// Queues `op`; an error is the result of an operation that is already over.
    fn start(&mut self, id: OpId, op: Op) -> Result<(), i32> {
        if let Some(error) = self.broken {
            return Err(-error);
        }
        let entry = self.entry(id, op).ok_or(-libc::EINVAL)?.user_data(u64::from(id.0));
        if is_raw(op) {
            if self.raw.is_empty() {
                self.checked = self.told.get();
            }
            self.raw.push((entry, id));
        } else {
            self.push(&entry)?;
            self.queued.push_back(Queued::Op(id));
            self.mark_barred(id);
        }
        let slot = usize::try_from(id.0).ok().and_then(|index| self.slots.get_mut(index));
        if let Some(slot) = slot {
            slot.taken = true;
            if let Op::Read(_, Buf::Guest { tag, .. }) | Op::Write(_, Buf::Guest { tag, .. }) = op {
                slot.pinned = Some(tag);
                self.buffers.guests.pin(tag);
            }
        }
        Ok(())
    }

    /// The entry for `op`; `None` if it is not valid or `id` is not free.
    fn entry(&mut self, id: OpId, op: Op) -> Option<squeue::Entry> {
        let slot = self.slots.get_mut(usize::try_from(id.0).ok()?)?;
        if slot.taken {
            return None;
        }
        let (way, target, buf) = match op {
            Op::Read(target, buf) => (Way::Read, target, buf),
            Op::Write(target, buf) => (Way::Write, target, buf),
            Op::Zeroes(target, len) => {
                return operation::zeroes(target, len, self.device.is_some());
            }
            Op::SyncImage => return Some(operation::sync_image()),
            Op::SyncDevice(offset, len) => {
                return operation::sync_device(offset, len, self.device.is_some());
            }
            Op::Zero(_) | Op::Copy { .. } | Op::ConfirmLease | Op::CachedPages(_) => return None,
        };
        let spans = self.buffers.spans(buf)?;
        let pinned = self.pinned.as_ref();
        operation::transfer(
            way,
            target,
            buf.len(),
            self.device.is_some(),
            spans,
            pinned,
            &mut slot.iovecs,
        )
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<(), i32> {
        if self.uring.0.submission().is_full() {
            self.submit_queued();
            if let Some(error) = self.broken {
                return Err(-error);
            }
        }
        let mut queue = self.uring.0.submission();
        // SAFETY: what the entry points to was checked by `entry`: the slot's iovecs, which nobody
        // touches before the slot is free again; guest memory, kept mapped by its tag, which is
        // pinned until then; the bounce pool, which lives as long as the ring. `drop` waits.
        unsafe { queue.push(entry) }.map_err(|_| -libc::EAGAIN)
    }
}

impl Io for Ring {
    /// Invalid operations are over at once, with `-EINVAL`: a tag that is not set, a range beyond
    /// the buffer, a device there is none of, an `id` that is not free.
    fn submit(&mut self, id: OpId, op: Op) -> Poll<i32> {
        let done = |valid: Option<()>| Poll::Ready(valid.map_or(-libc::EINVAL, |()| 0));
        match op {
            Op::Zero(buf) => done(self.buffers.zero(buf)),
            Op::Copy { from, to } => done(self.buffers.copy(from, to)),
            // What is there, or was copied from there, may be zeros in place of memory that is gone.
            Op::Write(..) if self.memory_is_lost() => Poll::Ready(-libc::EFAULT),
            Op::ConfirmLease => Poll::Ready(i32::from(self.lease_held())),
            Op::CachedPages(range) => Poll::Ready(self.cached_pages(range)),
            Op::Read(..) | Op::Write(..) | Op::Zeroes(..) | Op::SyncImage | Op::SyncDevice(..) => {
                match self.start(id, op) {
                    Ok(()) => Poll::Pending,
                    Err(result) => Poll::Ready(result),
                }
            }
        }
    }

    /// Reads shared memory only: what the kernel holds back comes with the next `enter` or `wait`.
    fn reap(&mut self) -> Option<Completion> {
        if let Some(completion) = self.failed.pop_front() {
            self.end(completion.id);
            return Some(completion);
        }
        while let Some(entry) = self.next_entry() {
            if let Some(completion) = self.accept(&entry) {
                return Some(completion);
            }
        }
        None
    }

    fn now(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let now = Duration::try_from(now).unwrap_or_default();
        self.told.set(now);
        now
    }

    /// Not read anew for each raw operation. A thread may be stopped anywhere in a turn of its loop, also by its own signal to a
    /// guest: what was the time before that says nothing about the lease after it. So `release_raw` counts from here.
    fn lately(&self) -> Duration {
        self.told.get()
    }
}

impl Ring {
    fn next_entry(&mut self) -> Option<cqueue::Entry> {
        self.uring.0.completion().next()
    }
}

/// Whether `op` moves data between memory and the device, which takes a lease (R2a).
const fn is_raw(op: Op) -> bool {
    matches!(
        op,
        Op::Read(Target::Device(_), _)
            | Op::Write(Target::Device(_), _)
            | Op::Zeroes(Target::Device(_), _)
    )
}

fn errno(error: i32) -> io::Error {
    io::Error::from_raw_os_error(error)
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
