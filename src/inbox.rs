// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A main loop's inbox: a channel plus an eventfd that its epoll watches. Into a device's the queue
//! threads, the helper, the session's relay and the process post; only that device's main loop reads.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::message::{JobDone, JobId, ToKeeper, WorkerId};

/// What can be posted.
#[derive(Debug)]
pub enum Event {
    /// A worker speaks to the keeper.
    Worker(WorkerId, ToKeeper),
    /// The helper finished a job.
    Job(JobId, JobDone),
    /// The frontend is gone, or the session failed; the reason is for the log.
    SessionEnded(Option<String>),
    /// A worker has answered everything it had taken and takes nothing more.
    Quiesced(WorkerId),
    /// The frontend reset the device or a new driver took over: an old flush error is forgotten (R16).
    DeviceReset,
    /// Somebody waits for the lease.
    LeaseBreak,
    /// Something happened to the image's inode.
    InodeTouched,
    /// Frontends may be let in.
    Listen,
    /// The device is to end.
    Stop,
}

#[derive(Debug)]
struct Bell {
    /// Rung and not yet heard: further posts need no system call.
    rung: AtomicBool,
    fd: EventFd,
}

/// The reading end.
#[derive(Debug)]
pub struct Inbox<T = Event> {
    events: Receiver<T>,
    bell: Arc<Bell>,
}

/// A posting end; clone one per thread.
#[derive(Debug)]
pub struct Poster<T = Event> {
    events: Sender<T>,
    bell: Arc<Bell>,
}

/// Makes an inbox.
///
/// # Errors
/// The eventfd could not be made.
pub fn inbox<T>() -> io::Result<(Inbox<T>, Poster<T>)> {
    let (sender, receiver) = mpsc::channel();
    let fd = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    let bell = Arc::new(Bell { rung: AtomicBool::new(false), fd });
    Ok((Inbox { events: receiver, bell: Arc::clone(&bell) }, Poster { events: sender, bell }))
}

impl<T> Inbox<T> {
    /// Silences the bell; call it before draining with [`next`](Self::next).
    pub fn hear(&self) {
        // First the fd: a post in between finds the bell rung and does not ring it, and its mail is
        // found by the draining that follows. The other way round its ring would be swallowed, and
        // no later post would ring again. An empty eventfd says EAGAIN: nothing to silence.
        let _ = self.bell.fd.read();
        self.bell.rung.swap(false, Ordering::SeqCst);
    }

    /// The next event, without waiting.
    pub fn next(&self) -> Option<T> {
        self.events.try_recv().ok()
    }
}

impl<T> AsRawFd for Inbox<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.fd.as_raw_fd()
    }
}

impl<T> Clone for Poster<T> {
    fn clone(&self) -> Self {
        Self { events: self.events.clone(), bell: Arc::clone(&self.bell) }
    }
}

impl<T> Poster<T> {
    /// Posts an event. Does nothing once the inbox is gone: the process is ending.
    pub fn post(&self, event: T) {
        if self.events.send(event).is_ok() && !self.bell.rung.swap(true, Ordering::SeqCst) {
            // Only a counter at its maximum can fail here, and that is rung already.
            let _ = self.bell.fd.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_post_between_hearing_and_draining_rings_again() {
        let (inbox, poster) = inbox().unwrap();
        poster.post(Event::DeviceReset);
        inbox.hear();
        poster.post(Event::DeviceReset);
        assert!(inbox.next().is_some() && inbox.next().is_some() && inbox.next().is_none());
        assert_eq!(inbox.bell.fd.read().unwrap(), 1);
    }
}
