// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! With nothing to do: looking, asking for kicks, sleeping.

use std::time::Instant;

use super::{Disk, Worker};
use crate::sys::uring::Sleep;
use crate::virtio::queue::{Queue, Vring};

impl<D: Disk> Worker<D> {
    /// Looks for something to do for as long as that pays. True if there is something.
    pub(super) fn look(&mut self, vrings: &[Vring]) -> bool {
        let time = self.spin.look();
        if time.is_zero() || self.holds_everything() {
            return false;
        }
        self.enter();
        if self.disk.as_mut().is_some_and(Disk::has_completions) {
            return true;
        }
        self.notify_all(vrings, true);
        let crowded = self.disk.as_mut().is_some_and(Disk::is_crowded);
        let begun = Instant::now();
        loop {
            let completed = self.disk.as_mut().is_some_and(Disk::has_completions);
            let offered = |(queue, vring): (&Queue, &Vring)| queue.has_more(vring, &self.memory);
            let waiting = || self.queues.iter().zip(vrings).any(offered);
            if completed || self.mailbox.rung() || !crowded && waiting() {
                return true;
            }
            if begun.elapsed() >= time {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Gives the kernel what is queued.
    pub(super) fn enter(&mut self) {
        self.call(Disk::enter);
    }

    /// The same, and waits for whatever happens next; for several completions, if many operations are in flight and nobody
    /// waits for this worker; briefly, if a guest is to be told after that.
    pub(super) fn sleep(&mut self, vrings: &[Vring]) {
        let hurried = self.engine.is_hurried() || !self.orders.is_empty() || self.quiescing;
        let deep = !hurried && self.disk.as_ref().is_some_and(Disk::is_deep);
        let mut sleep = if hurried { Sleep::Any } else { Sleep::Several };
        if !self.disk.as_mut().is_some_and(Disk::has_completions) {
            self.for_each(vrings, |queue, vring, memory| {
                if deep && queue.outlasts_nap() {
                    sleep = Sleep::Nap;
                    return Ok(());
                }
                let told = queue.notify(vring, memory, true);
                if queue.call.is_owed() {
                    // The kernel is short of memory, which will pass.
                    sleep = Sleep::Nap;
                }
                told
            });
        }
        self.call(|disk| disk.wait(sleep));
    }

    /// Asks every queue for a kick at its next chain; true if one is there already.
    pub(super) fn arm(&mut self, vrings: &[Vring]) -> bool {
        if self.holds_everything() {
            return false;
        }
        let mut more = false;
        self.for_each(vrings, |queue, vring, memory| {
            more |= queue.is_open() && queue.arm(vring, memory)?;
            Ok(())
        });
        more
    }
}
