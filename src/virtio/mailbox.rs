// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A worker thread's mailbox: a channel plus an eventfd, its bell. The worker's ring watches it or, while there
//! is no ring, the crate's epoll set does.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

#[derive(Debug)]
struct Bell {
    /// Rung and not yet heard: further posts need no system call.
    rung: AtomicBool,
    /// Mail that has not been read.
    unread: AtomicUsize,
    fd: EventFd,
}

/// The reading end; belongs to the worker thread.
#[derive(Debug)]
pub(crate) struct Mailbox<T> {
    mail: Receiver<T>,
    bell: Arc<Bell>,
}

/// A posting end.
#[derive(Debug)]
pub(crate) struct Slot<T> {
    mail: Sender<T>,
    bell: Arc<Bell>,
}

/// Makes a mailbox.
///
/// # Errors
/// The eventfd could not be made.
pub(crate) fn mailbox<T>() -> io::Result<(Mailbox<T>, Slot<T>)> {
    let (sender, receiver) = mpsc::channel();
    let fd = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    let bell = Arc::new(Bell { rung: AtomicBool::new(false), unread: AtomicUsize::new(0), fd });
    Ok((Mailbox { mail: receiver, bell: Arc::clone(&bell) }, Slot { mail: sender, bell }))
}

impl<T> Mailbox<T> {
    /// Whether something was posted since the last [`hear`](Self::hear): one atomic load.
    pub(crate) fn rung(&self) -> bool {
        self.bell.rung.load(Ordering::Acquire)
    }

    /// Makes later posts ring again; call it before draining with [`next`](Self::next).
    pub(crate) fn hear(&self) {
        self.bell.rung.swap(false, Ordering::SeqCst);
    }

    /// Makes the bell's fd silent, for those who watch it by its level; call it before
    /// [`hear`](Self::hear).
    pub(crate) fn silence(&self) {
        // First the fd: a post in between finds the bell rung and does not ring it, and its mail is
        // found by the draining that follows. The other way round its ring would be swallowed, and
        // no later post would ring again. An empty eventfd says EAGAIN: nothing to silence.
        let _ = self.bell.fd.read();
    }

    /// The next piece of mail, without waiting.
    pub(crate) fn next(&self) -> Option<T> {
        let mail = self.mail.try_recv().ok()?;
        self.bell.unread.fetch_sub(1, Ordering::Relaxed);
        Some(mail)
    }
}

impl<T> Slot<T> {
    /// Posts `mail`. It is dropped if the worker is gone.
    pub(crate) fn post(&self, mail: T) {
        // Counted first, so that there is never less than nothing.
        self.bell.unread.fetch_add(1, Ordering::Relaxed);
        if self.mail.send(mail).is_ok() {
            self.ring();
        } else {
            self.bell.unread.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// How much mail the worker has not read.
    pub(crate) fn unread(&self) -> usize {
        self.bell.unread.load(Ordering::Relaxed)
    }

    /// Wakes the worker without mail.
    pub(crate) fn ring(&self) {
        if !self.bell.rung.swap(true, Ordering::SeqCst) {
            // Only a counter at its maximum can fail here, and that is rung already.
            let _ = self.bell.fd.write(1);
        }
    }
}

#[cfg(test)]
impl<T> Slot<T> {
    /// What the bell rings.
    pub(crate) fn bell(&self) -> &EventFd {
        &self.bell.fd
    }
}

/// The bell.
impl<T> AsRawFd for Slot<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.fd.as_raw_fd()
    }
}

/// The bell.
impl<T> AsRawFd for Mailbox<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;

    #[test]
    fn unread_mail_is_counted_until_it_is_read_or_nobody_is_there() {
        let (mailbox, slot) = mailbox().unwrap();
        (0..3).for_each(|number| slot.post(number));
        assert_eq!(slot.unread(), 3);
        assert_eq!(mailbox.next(), Some(0));
        assert_eq!(slot.unread(), 2);
        drop(mailbox);
        slot.post(4);
        assert_eq!(slot.unread(), 2);
    }

    /// Posts at every distance from the hearing of the one before. A ring that is swallowed is
    /// never made up for: no later post rings either.
    #[test]
    fn no_ring_is_lost() {
        const POSTS: u32 = 300_000;
        let (mailbox, slot) = mailbox().unwrap();
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, slot.as_raw_fd(), event).unwrap();
        let poster = std::thread::spawn(move || {
            for number in 0..POSTS {
                slot.post(number);
                (0..number % 211).for_each(|_| std::hint::spin_loop());
            }
        });
        let mut next = 0;
        while next < POSTS {
            let woken = epoll.wait(5000, &mut [EpollEvent::default()]).unwrap();
            assert_eq!(woken, 1, "asleep with mail {next} in the box");
            mailbox.silence();
            mailbox.hear();
            while let Some(number) = mailbox.next() {
                assert_eq!(number, next);
                next += 1;
            }
        }
        poster.join().unwrap();
    }
}
