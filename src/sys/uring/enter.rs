// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A ring's dealings with the kernel: entering it, sleeping in it, leaving it.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::EnterFlags;
use io_uring::types::{SubmitArgs, Timespec};

use super::setup::{DEVICE, NO_FILE};
use super::{Queued, Ring, errno};
use crate::engine::{Completion, Io, OpId};

/// How often an `io_uring_enter` is repeated at once before other work gets its turn.
const ENTER_TRIES: u32 = 8;
/// How long a closing ring waits before it says that it still waits.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a thread sleeps that the kernel could not take everything from.
pub(super) const BREATH: Duration = Duration::from_millis(2);
/// Whatever has happened, a doorbell among it, a thread sleeps no longer than so many microseconds for more. That is as long as a nap.
const GATHER_US: u32 = 100;
/// A sleep that only what it waits for is to end. With a shortest sleep the kernel wants to be told a longest one, too.
const LONG: Duration = Duration::from_secs(1);

/// How a thread sleeps in its ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sleep {
    /// Until anything happens.
    Any,
    /// With many operations in flight, until several have completed, or 100 µs have passed and anything has happened.
    Several,
    /// The same, but for no longer than 100 µs.
    Nap,
}

impl Ring {
    /// Whether [`reap`](crate::engine::Io::reap) would find something. No system call, unless the kernel says that it
    /// holds completions back: fit for spinning.
    ///
    /// It sets that flag after it has queued the work. If the work was done in between, the flag stays set with
    /// nothing behind it, so it alone is no answer.
    pub fn has_completions(&mut self) -> bool {
        if self.has_task_work() {
            self.submit_queued();
        }
        !self.failed.is_empty() || !self.uring.0.completion().is_empty()
    }

    /// Hands what is queued to the kernel and lets it finish what has completed; does not wait.
    /// One `io_uring_enter`, or no system call if there is nothing to do.
    ///
    /// If the kernel is short of memory for now, operations stay queued for the next time.
    ///
    /// # Errors
    ///
    /// The kernel refuses this ring for good, told once. Every operation that it had not taken,
    /// and every later one, ends with that error as its result.
    pub fn enter(&mut self) -> io::Result<()> {
        if !self.queued.is_empty() || !self.raw.is_empty() || self.has_task_work() {
            self.submit_queued();
        }
        self.tell()
    }

    /// Hands what is queued to the kernel and sleeps until there is something to
    /// [`reap`](crate::engine::Io::reap), or a watched descriptor is signalled, as `sleep` says. It may return sooner.
    ///
    /// # Errors
    ///
    /// As for [`enter`](Self::enter). Such a ring only dozes.
    pub fn wait(&mut self, sleep: Sleep) -> io::Result<()> {
        let nap = Duration::from_micros(GATHER_US.into());
        let limit = if sleep == Sleep::Nap { Some(nap) } else { None };
        self.arm_watches();
        self.release_raw();
        if !self.failed.is_empty() || !self.uring.0.completion().is_empty() {
            return self.enter();
        }
        if self.broken.is_some() {
            // What the kernel has in flight still ends, inside a call.
            let limit = limit.unwrap_or(BREATH);
            if !matches!(self.call(0, 1, Some(limit)), Ok(_) | Err(libc::ETIME)) {
                std::thread::sleep(limit);
            }
            return self.tell();
        }
        let limit = limit.or(self.uneasy.then_some(BREATH));
        let wanted = if sleep == Sleep::Any { 1 } else { self.gathered() };
        let long = if wanted > 1 { Some(LONG) } else { None };
        let slept = self.call(self.queued.len(), wanted, limit.or(long));
        // One that a signal or a shortage has ended says nothing about the disk.
        if sleep != Sleep::Any && matches!(slept, Ok(_) | Err(libc::ETIME)) {
            let come = self.uring.0.completion().len();
            self.gather.slept(wanted, come);
        }
        match slept {
            Ok(taken) => self.took(taken),
            Err(libc::EINTR | libc::ETIME | libc::EBUSY) => {}
            Err(libc::EAGAIN) => std::thread::sleep(limit.unwrap_or(BREATH)),
            Err(error) => self.give_up(error),
        }
        self.tell()
    }

    /// How many completions a thread that is in no hurry sleeps for.
    #[must_use]
    pub fn gathered(&self) -> usize {
        self.gather.wanted(self.queued.len() + usize::try_from(self.submitted).unwrap_or(0))
    }

    fn tell(&mut self) -> io::Result<()> {
        self.untold.take().map_or(Ok(()), |error| Err(errno(error)))
    }

    /// Puts the raw operations into the submission queue, just before it is handed over: this thread may have been stopped
    /// since the lease was looked at for them, and its break may have been forced meanwhile. If that is too long ago they end
    /// with `EAGAIN`, and whoever tries again looks at the lease again (R2a).
    ///
    /// `fresh` is a quarter of the lease-break time. The lease was seen at most so long before `checked`, and that is no
    /// longer ago: of the time after which a break is forced, half is left at least.
    pub(super) fn release_raw(&mut self) {
        self.check_left();
        if self.raw.is_empty() {
            return;
        }
        if self.barred && self.lease_held() {
            // The device is to come back first, which takes memory. This thread only dozes meanwhile.
            self.uneasy = true;
            return;
        }
        let checked = self.checked;
        let stale = self.fresh.is_some_and(|fresh| self.now().saturating_sub(checked) > fresh);
        let mut raw = std::mem::take(&mut self.raw);
        for (entry, id) in raw.drain(..) {
            let pushed = match self.broken {
                Some(error) => Err(-error),
                None if stale || self.barred => Err(-libc::EAGAIN),
                None if self.memory_is_lost() => Err(-libc::EFAULT),
                None => self.push(&entry),
            };
            match pushed {
                Ok(()) => {
                    self.queued.push_back(Queued::Raw(id));
                    // To make room for it may have taken an enter, and that a look at the lease.
                    self.mark_barred(id);
                }
                Err(result) => self.failed.push_back(Completion { id, result }),
            }
        }
        // Its room is kept: nothing was added meanwhile.
        self.raw = raw;
    }

    /// Raw operations that the kernel did not take when it was last entered (it was short of memory, or had
    /// completions to get rid of first) were released by a look at the lease that is over: it is looked at
    /// again, and if it is not ours they must not go out any more (R2a).
    ///
    /// An entry cannot be taken back from the submission queue. What it names can: with the device no longer
    /// a fixed file, the kernel answers each with EBADF, which [`accept`](Self::accept) turns into ECANCELED.
    fn check_left(&mut self) {
        let left = |ring: &Self| ring.queued.iter().any(|entry| matches!(entry, Queued::Raw(_)));
        if self.queued.is_empty() || self.lease.is_none() || !left(self) {
            // The kernel has looked all of them up.
            self.unbar_device();
        } else if self.broken.is_none() && !self.barred && !self.lease_held() {
            self.bar_device();
        }
    }

    /// Notes of an operation in the submission queue that the device is barred, if it is.
    pub(super) fn mark_barred(&mut self, id: OpId) {
        if self.barred
            && let Some(slot) = usize::try_from(id.0).ok().and_then(|at| self.slots.get_mut(at))
        {
            slot.barred = true;
        }
    }

    fn bar_device(&mut self) {
        // A flush of the device is among them. Of the image's none will say EBADF.
        for index in self.queued.iter().filter_map(|entry| usize::try_from(entry.op()?.0).ok()) {
            if let Some(slot) = self.slots.get_mut(index) {
                slot.barred = true;
            }
        }
        match self.uring.0.submitter().register_files_update(DEVICE, &[NO_FILE]) {
            Ok(_) => self.barred = true,
            // Nothing goes out any more, which is what matters.
            Err(error) => self.give_up(error.raw_os_error().unwrap_or(libc::EIO)),
        }
    }

    fn unbar_device(&mut self) {
        if !self.barred {
            return;
        }
        let Some(device) = &self.device else { return };
        let files = [device.as_raw_fd()];
        // If not now, then the next time; raw operations end with EAGAIN until then.
        self.barred = self.uring.0.submitter().register_files_update(DEVICE, &files).is_err();
        self.uneasy |= self.barred;
    }

    /// Enters until the kernel has taken everything queued, or takes nothing more for now.
    pub(super) fn submit_queued(&mut self) {
        if self.broken.is_some() {
            // Nothing is submitted any more: what stands in the queue has been answered.
            let _ = self.call(0, 0, None);
            return;
        }
        self.release_raw();
        for tried in 0..ENTER_TRIES {
            if tried > 0 {
                self.check_left();
            }
            match self.call(self.queued.len(), 0, None) {
                Ok(taken) => self.took(taken),
                Err(libc::EINTR) => {}
                Err(libc::EAGAIN | libc::EBUSY) => return,
                Err(error) => return self.give_up(error),
            }
            if self.queued.is_empty() {
                return;
            }
        }
    }

    /// One `io_uring_enter` that waits for `wanted` completions, but not beyond `timeout`, and with one for no more than
    /// [`GATHER_US`]: what the kernel took, or an errno. More than one is for kernels that know the latter, with a timeout.
    pub(super) fn call(
        &self,
        submit: usize,
        wanted: usize,
        timeout: Option<Duration>,
    ) -> Result<usize, i32> {
        let submit = u32::try_from(submit).unwrap_or(u32::MAX);
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        let submitter = self.uring.0.submitter();
        let mut flags = EnterFlags::GETEVENTS;
        // Without this an idle guest looks like one that waits for a disk, in `top`.
        flags.set(EnterFlags::NO_IOWAIT, self.no_iowait);
        let done = if let Some(timeout) = timeout {
            let timeout = Timespec::from(timeout);
            let least = if wanted > 1 { GATHER_US } else { 0 };
            let args = SubmitArgs::new().timespec(&timeout).min_wait_usec(least);
            let flags = flags.union(EnterFlags::EXT_ARG).bits();
            // SAFETY: `args` is what EXT_ARG says it is and lives, like `timeout`, until the call
            // returns. What the first `submit` entries of the submission queue point to was checked
            // by `entry`, and stays until they complete: their slots and tags are held.
            unsafe { submitter.enter(submit, wanted, flags, Some(&args)) }
        } else {
            // SAFETY: there is no argument. The entries are as above.
            unsafe { submitter.enter::<libc::sigset_t>(submit, wanted, flags.bits(), None) }
        };
        done.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
    }

    /// The kernel took the `count` oldest queued entries.
    fn took(&mut self, count: usize) {
        let count = count.min(self.queued.len());
        for entry in self.queued.drain(..count) {
            match entry {
                Queued::Op(_) | Queued::Raw(_) => self.submitted += 1,
                Queued::Watch => self.polls += 1,
            }
        }
    }

    /// The kernel will take nothing from this ring any more. The entries in the submission queue
    /// stay there unread, as no later call submits any.
    fn give_up(&mut self, error: i32) {
        self.broken = Some(error);
        self.untold = Some(error);
        let raw = self.raw.drain(..).map(|(_, id)| id);
        let queued = self.queued.drain(..).filter_map(Queued::op).chain(raw);
        self.failed.extend(queued.map(|id| Completion { id, result: -error }));
    }

    /// Whether an enter would bring completions that the kernel holds back: with DEFER_TASKRUN an
    /// enter handles only some 20 of them.
    pub(super) fn has_task_work(&mut self) -> bool {
        let queue = self.uring.0.submission();
        queue.taskrun() || queue.cq_overflow()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.submitted > 0 {
            match self.call(0, 1, Some(PATIENCE)) {
                Ok(_) | Err(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                Err(libc::ETIME) => {
                    tracing::warn!(operations = self.submitted, "waiting for the disk to answer");
                }
                Err(error) => {
                    // On another thread the kernel does not let us wait. It holds on to the files
                    // by itself (R1a), and the memory is left to it for good.
                    tracing::error!(
                        operations = self.submitted,
                        error = %errno(error),
                        "cannot wait for I/O in flight, leaving its memory to the kernel"
                    );
                    self.buffers.leak();
                    std::mem::forget(std::mem::take(&mut self.slots));
                    return;
                }
            }
            while let Some(entry) = self.next_entry() {
                self.accept(&entry);
            }
        }
        // Closing the ring lets go of the files some time later; a session that ends, or an image
        // that is switched, should have its lease and lock free by the time this returns. Older kernels
        // do not return before the last poll of a file has ended.
        if self.disarm_all() {
            let _ = self.unpin();
            let _ = self.uring.0.submitter().unregister_files();
        }
    }
}
