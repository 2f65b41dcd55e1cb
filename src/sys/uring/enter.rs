// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A ring's dealings with the kernel: entering it, being signalled by it, leaving it.

use std::io;
use std::sync::atomic::{Ordering, fence};

use io_uring::EnterFlags;
use io_uring::types::{SubmitArgs, Timespec};

use super::{Ring, errno};
use crate::engine::Completion;

/// How often an `io_uring_enter` is repeated at once before other work gets its turn.
const ENTER_TRIES: u32 = 8;
/// Pieces of work that one enter handles at least, if there are so many.
const WORK_PER_ENTER: usize = 16;
/// How long a closing ring waits before it says that it still waits.
const PATIENCE_SECONDS: u64 = 30;

impl Ring {
    /// Whether [`reap`](crate::engine::Io::reap) would find something. No system call: fit for spinning.
    pub fn has_completions(&mut self) -> bool {
        !self.failed.is_empty() || !self.uring.0.completion().is_empty() || self.has_task_work()
    }

    /// Stops the signals on [`event_fd`](Self::event_fd) while the thread is awake and looks for
    /// completions itself: they cost the kernel time and wake a thread for what it has already
    /// reaped. A no-op where it would not be safe.
    pub fn mute(&mut self) {
        // That no signal gets lost needs the kernel to set its flag before it looks at ours. With
        // DEFER_TASKRUN everything goes by the one flag SQ_TASKRUN, set by a locked instruction,
        // and that is a full barrier on x86; other machines promise nothing of the kind.
        if cfg!(target_arch = "x86_64") && self.is_deferred() && !self.muted {
            self.uring.0.completion().disable_eventfd();
            self.muted = true;
        }
    }

    /// Lets signals through again. True if the thread may sleep: whatever completes from now on
    /// makes [`event_fd`](Self::event_fd) readable. False if there is something to reap already.
    #[must_use]
    pub fn listen(&mut self) -> bool {
        if self.muted {
            self.uring.0.completion().enable_eventfd();
            self.muted = false;
            fence(Ordering::SeqCst);
        }
        // The kernel's flag may be set with nothing behind it (see `reap`), so it alone must not keep
        // the thread awake. Enters find out: one handles some 20 pieces of work, so after this many
        // without a completion none is left, and later ones signal.
        for _ in 0..=self.slots.len() / WORK_PER_ENTER {
            if !self.failed.is_empty() || !self.uring.0.completion().is_empty() {
                return false;
            }
            if !self.has_task_work() {
                return true;
            }
            if self.call(0, 0).is_err() {
                self.signal_self();
                return true;
            }
        }
        self.uring.0.completion().is_empty()
    }

    /// Hands what is queued to the kernel and lets it finish what has completed; does not wait.
    /// One `io_uring_enter`, or no system call if there is nothing to do.
    ///
    /// If the kernel is short of memory for now, operations stay queued, and
    /// [`event_fd`](Self::event_fd) is made readable so that the thread comes back.
    ///
    /// # Errors
    ///
    /// The kernel refuses this ring for good, told once. Every operation that it had not taken,
    /// and every later one, ends with that error as its result.
    pub fn enter(&mut self) -> io::Result<()> {
        if self.queued.is_empty() && self.untold.is_none() && !self.has_task_work() {
            return Ok(());
        }
        self.submit_queued();
        match self.untold.take() {
            Some(error) => Err(errno(error)),
            None => Ok(()),
        }
    }

    /// Enters until the kernel has taken everything queued, or takes nothing more for now.
    pub(super) fn submit_queued(&mut self) {
        for _ in 0..ENTER_TRIES {
            match self.call(self.queued.len(), 0) {
                Ok(taken) => self.took(taken),
                Err(libc::EINTR) => {}
                Err(libc::EAGAIN | libc::EBUSY) => break,
                Err(error) => return self.give_up(error),
            }
            if self.queued.is_empty() {
                return;
            }
        }
        self.signal_self();
    }

    /// One `io_uring_enter`: what the kernel took, or an errno.
    pub(super) fn call(&self, submit: usize, wait_seconds: u64) -> Result<usize, i32> {
        let submit = u32::try_from(submit).unwrap_or(u32::MAX);
        let submitter = self.uring.0.submitter();
        let done = if wait_seconds == 0 {
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: there is no argument. What the first `submit` entries of the submission queue
            // point to was checked by `entry`, and stays until they complete: their slots and tags
            // are held.
            unsafe { submitter.enter::<libc::sigset_t>(submit, 0, flags, None) }
        } else {
            let flags = EnterFlags::GETEVENTS.union(EnterFlags::EXT_ARG).bits();
            let timeout = Timespec::new().sec(wait_seconds);
            let args = SubmitArgs::new().timespec(&timeout);
            // SAFETY: `args` is what EXT_ARG says it is and lives, like `timeout`, until the call
            // returns. The entries are as above.
            unsafe { submitter.enter(submit, 1, flags, Some(&args)) }
        };
        done.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
    }

    /// The kernel took the `count` oldest queued operations.
    fn took(&mut self, count: usize) {
        let count = count.min(self.queued.len());
        self.queued.drain(..count);
        self.submitted = self.submitted.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// The kernel will take nothing from this ring any more. The entries in the submission queue
    /// stay there unread, as no later call submits any.
    fn give_up(&mut self, error: i32) {
        self.broken = Some(error);
        self.untold = Some(error);
        self.failed.extend(self.queued.drain(..).map(|id| Completion { id, result: -error }));
        self.signal_self();
    }

    pub(super) fn signal_self(&self) {
        // It can only fail because the counter is at its maximum, and then it is readable.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Whether an enter would bring completions that the kernel holds back: with DEFER_TASKRUN an
    /// enter handles only some 20 of them, and no signal tells of the rest.
    pub(super) fn has_task_work(&mut self) -> bool {
        let queue = self.uring.0.submission();
        queue.taskrun() || queue.cq_overflow()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.submitted > 0 {
            match self.call(0, PATIENCE_SECONDS) {
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
        // that is switched, should have its lease and lock free by the time this returns.
        let _ = self.uring.0.submitter().unregister_files();
    }
}
