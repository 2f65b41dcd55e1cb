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
mod operation;
mod setup;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::task::Poll;
use std::time::Duration;

use io_uring::{IoUring, cqueue, squeue};

use super::buffer::{BouncePool, Buffers, GuestBuffers};
use crate::engine::io::Buf;
use crate::engine::{Completion, Geometry, Io, Op, OpId, Tag};
use operation::Way;
use setup::TaskRun;

/// iovecs an operation keeps room for when it is done.
const KEEP_IOVECS: usize = 256;

/// An operation's place; `taken` from `submit` until `reap` returns it.
#[derive(Debug, Default)]
struct Slot {
    taken: bool,
    /// Whose data it reads or writes, if a guest's.
    pinned: Option<Tag>,
    /// What a vectored operation points the kernel to. Never touched while `taken`.
    iovecs: Vec<libc::iovec>,
}

/// One io_uring, for one thread: [`Io`] for the worker that runs there.
///
/// It belongs to the thread that made it: the kernel takes submissions from no other. It may be
/// moved, but on another thread its operations fail.
///
/// # Before the thread sleeps
///
/// Call [`enter`](Self::enter), then [`reap`](Io::reap) until it says `None`: from then on
/// [`event_fd`](Self::event_fd) becomes readable when something completes. A thread that also calls
/// [`mute`](Self::mute) ends with [`listen`](Self::listen), and goes on while that says false.
///
/// # Dropping
///
/// Dropping a ring waits, without bound, for what the kernel has in flight: the memory must not go
/// away before. A device that never answers therefore holds the thread, and a line every 30 s
/// says so. What was queued and not yet entered is forgotten.
#[derive(Debug)]
pub struct Ring {
    uring: Uring,
    task_run: TaskRun,
    buffers: Buffers,
    slots: Box<[Slot]>,
    /// Operations in the submission queue that the kernel has not taken yet, oldest first.
    queued: VecDeque<OpId>,
    /// Operations the kernel refused to take; `reap` returns them.
    failed: VecDeque<Completion>,
    /// Operations that are the kernel's.
    submitted: u32,
    /// The errno with which the kernel refused the ring for good.
    broken: Option<i32>,
    /// The same, until `enter` has told it.
    untold: Option<i32>,
    muted: bool,
    image: OwnedFd,
    device: bool,
    /// The kind of lease that `ConfirmLease` wants to see.
    lease: Option<libc::c_int>,
    event: OwnedFd,
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
    /// `image` becomes fixed file 0, `device` (for raw access) fixed file 1. With `lease`,
    /// [`Op::ConfirmLease`] asks whether `image` still holds the lease that belongs to its access
    /// mode: a write lease if writable, else a read lease.
    ///
    /// # Errors
    ///
    /// What the kernel said; `EINVAL` if `geometry` asks for no or too many operations,
    /// `EOPNOTSUPP` if the kernel is too old.
    pub fn new(
        image: BorrowedFd<'_>,
        device: Option<BorrowedFd<'_>>,
        geometry: &Geometry,
        lease: bool,
    ) -> io::Result<Self> {
        Self::with(image, device, geometry, lease, &TaskRun::ALL)
    }

    /// A ring whose completions come back by the first of `ways` that the kernel knows.
    fn with(
        image: BorrowedFd<'_>,
        device: Option<BorrowedFd<'_>>,
        geometry: &Geometry,
        lease: bool,
        ways: &[TaskRun],
    ) -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        use rustix::fs::{OFlags, fcntl_getfl};

        let ops = usize::try_from(geometry.ops).map_err(|_| errno(libc::EINVAL))?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let files: Vec<_> = std::iter::once(image).chain(device).collect();
        let (uring, task_run) = setup::ring(geometry.ops, &files, event.as_fd(), ways)?;
        let writable = fcntl_getfl(image)?.intersection(OFlags::RWMODE) != OFlags::RDONLY;
        let kind = if writable { libc::F_WRLCK } else { libc::F_RDLCK };
        let buffers = Buffers {
            guests: GuestBuffers::new(geometry.ops),
            bounce: BouncePool::new(geometry.bounce_slots, geometry.bounce_bytes)?,
        };
        Ok(Self {
            uring: Uring(uring),
            task_run,
            buffers,
            slots: (0..ops).map(|_| Slot::default()).collect(),
            queued: VecDeque::with_capacity(ops),
            failed: VecDeque::with_capacity(ops),
            submitted: 0,
            broken: None,
            untold: None,
            muted: false,
            // A duplicate, not a second open: the same description (R1), whoever closes the other.
            image: image.try_clone_to_owned()?,
            device: device.is_some(),
            lease: lease.then_some(kind),
            event,
        })
    }
}

impl Ring {
    /// Becomes readable when completions are there. Registered with the ring; for an epoll set.
    #[must_use]
    pub fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Takes back what made [`event_fd`](Self::event_fd) readable. Not needed when it is watched
    /// edge-triggered.
    pub fn hear(&self) {
        // The only way to fail is that nothing had been signalled.
        let _ = rustix::io::read(&self.event, &mut [0_u8; 8]);
    }

    /// The table of the requests' data.
    pub fn guests(&mut self) -> &mut GuestBuffers {
        &mut self.buffers.guests
    }

    /// Operations taken by `submit` and not yet returned by `reap`.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        let waiting = self.queued.len() + self.failed.len();
        u32::try_from(waiting).unwrap_or(u32::MAX).saturating_add(self.submitted)
    }

    /// Whether completions come only inside our own `io_uring_enter`, the fastest way. False on
    /// kernels before 6.1.
    #[must_use]
    pub fn is_deferred(&self) -> bool {
        self.task_run == TaskRun::Deferred
    }

    /// The operation that a completion belongs to ends.
    fn end(&mut self, id: OpId) -> bool {
        let slot = usize::try_from(id.0).ok().and_then(|index| self.slots.get_mut(index));
        let Some(slot) = slot.filter(|slot| slot.taken) else { return false };
        slot.taken = false;
        slot.iovecs.clear();
        slot.iovecs.shrink_to(KEEP_IOVECS);
        if let Some(tag) = slot.pinned.take() {
            self.buffers.guests.unpin(tag);
        }
        true
    }

    fn accept(&mut self, entry: &cqueue::Entry) -> Option<Completion> {
        let id = u32::try_from(entry.user_data()).ok().map(OpId).filter(|id| self.end(*id));
        let Some(id) = id else {
            // Cannot happen: every entry names its slot. If it does, the safe thing is to hold on
            // to all memory, which is what ignoring it means.
            tracing::error!(user_data = entry.user_data(), "completion of an unknown operation");
            return None;
        };
        self.submitted = self.submitted.saturating_sub(1);
        Some(Completion { id, result: entry.result() })
    }

    fn lease_held(&self) -> bool {
        // SAFETY: F_GETLEASE has no argument; the descriptor is the ring's own.
        let held = unsafe { libc::fcntl(self.image.as_raw_fd(), libc::F_GETLEASE) };
        self.lease == Some(held)
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
        self.push(&entry)?;
        let slot = usize::try_from(id.0).ok().and_then(|index| self.slots.get_mut(index));
        if let Some(slot) = slot {
            slot.taken = true;
            if let Op::Read(_, Buf::Guest { tag, .. }) | Op::Write(_, Buf::Guest { tag, .. }) = op {
                slot.pinned = Some(tag);
                self.buffers.guests.pin(tag);
            }
        }
        self.queued.push_back(id);
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
            Op::Zeroes(target, len) => return operation::zeroes(target, len, self.device),
            Op::SyncImage => return Some(operation::sync_image()),
            Op::SyncDevice(offset, len) => {
                return operation::sync_device(offset, len, self.device);
            }
            Op::Zero(_) | Op::Copy { .. } | Op::ConfirmLease => return None,
        };
        let spans = self.buffers.spans(buf)?;
        operation::transfer(way, target, buf.len(), self.device, spans, &mut slot.iovecs)
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
            Op::ConfirmLease => Poll::Ready(i32::from(self.lease_held())),
            Op::Read(..) | Op::Write(..) | Op::Zeroes(..) | Op::SyncImage | Op::SyncDevice(..) => {
                match self.start(id, op) {
                    Ok(()) => Poll::Pending,
                    Err(result) => Poll::Ready(result),
                }
            }
        }
    }

    /// Enters the kernel only if it says that it holds completions back, and once: it sets that flag
    /// after it has queued the work, so if the work was done in between, the flag stays set with
    /// nothing behind it, and no number of enters clears it.
    fn reap(&mut self) -> Option<Completion> {
        if let Some(completion) = self.failed.pop_front() {
            self.end(completion.id);
            return Some(completion);
        }
        let mut entered = false;
        loop {
            while let Some(entry) = self.next_entry() {
                if let Some(completion) = self.accept(&entry) {
                    return Some(completion);
                }
            }
            if entered || !self.has_task_work() {
                return None;
            }
            if self.call(0, 0).is_err() {
                self.signal_self();
                return None;
            }
            entered = true;
        }
    }

    fn now(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::try_from(now).unwrap_or_default()
    }
}

impl Ring {
    fn next_entry(&mut self) -> Option<cqueue::Entry> {
        self.uring.0.completion().next()
    }
}

fn errno(error: i32) -> io::Error {
    io::Error::from_raw_os_error(error)
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
