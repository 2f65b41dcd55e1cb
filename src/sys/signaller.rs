// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signalling an eventfd of somebody else's without ever waiting for them.
//!
//! A write(2) to an eventfd waits when the counter is full and O_NONBLOCK is clear, and anybody who
//! shares the descriptor may bring about both between any look at it and the write. The kernel's
//! own way to signal one, `eventfd_signal()`, has no such case: a full counter stays full. io_uring
//! goes that way for the eventfd that is registered with a ring, each time something completes.
//! So there is a ring in which nothing but no-ops complete.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};

/// The kernel's names of what the ring may still register: IORING_REGISTER_EVENTFD and
/// IORING_UNREGISTER_EVENTFD.
const REGISTER_EVENTFD: u8 = 4;
const UNREGISTER_EVENTFD: u8 = 5;

/// How often a no-op is offered to a kernel that is short of memory.
const TRIES: u32 = 8;

/// A ring of no-ops, and the eventfd that each of them signals.
pub struct Signaller {
    ring: IoUring,
    aimed: bool,
}

impl std::fmt::Debug for Signaller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signaller").field("aimed", &self.aimed).finish_non_exhaustive()
    }
}

impl Signaller {
    /// One that signals nothing yet.
    ///
    /// # Errors
    /// What the kernel said: no descriptor is left, or no memory.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(1)?;
        let mut allowed = [
            Restriction::sqe_op(opcode::Nop::CODE),
            Restriction::register_op(REGISTER_EVENTFD),
            Restriction::register_op(UNREGISTER_EVENTFD),
        ];
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self { ring, aimed: false })
    }

    /// Signals `eventfd` from now on, or nothing. The kernel keeps what it needs of it: the
    /// descriptor may be closed.
    ///
    /// # Errors
    /// `EINVAL` if it is no eventfd; nothing is signalled then.
    pub fn aim(&mut self, eventfd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if std::mem::take(&mut self.aimed) {
            self.ring.submitter().unregister_eventfd()?;
        }
        if let Some(eventfd) = eventfd {
            self.ring.submitter().register_eventfd(eventfd.as_raw_fd())?;
            self.aimed = true;
        }
        Ok(())
    }

    /// Adds one to the counter, unless it is full. One system call, which never waits: the no-op
    /// completes inside it.
    ///
    /// # Errors
    /// The kernel has no memory for a no-op. It keeps that of the first one for those that follow.
    pub fn signal(&mut self) -> io::Result<()> {
        if !self.aimed {
            return Ok(());
        }
        let mut queue = self.ring.submission();
        if queue.is_empty() {
            // SAFETY: a no-op points to nothing.
            let pushed = unsafe { queue.push(&opcode::Nop::new().build()) };
            pushed.map_err(io::Error::other)?;
        }
        drop(queue);
        let mut result = Ok(0);
        for _ in 0..TRIES {
            result = self.ring.submit();
            if !matches!(result, Err(ref error) if is_passing(error)) {
                break;
            }
        }
        // Room for the next one's.
        self.ring.completion().for_each(drop);
        result.map(drop)
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR))
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn aimed(flags: EventfdFlags) -> (Signaller, OwnedFd) {
        let fd = eventfd(0, flags).unwrap();
        let mut signaller = Signaller::new().unwrap();
        signaller.aim(Some(fd.as_fd())).unwrap();
        (signaller, fd)
    }

    fn count(fd: &OwnedFd) -> Option<u64> {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count[..]).ok().map(|_| u64::from_ne_bytes(count))
    }

    #[test]
    fn each_signal_counts_and_no_ring_is_ever_full() {
        let (mut signaller, fd) = aimed(EventfdFlags::NONBLOCK);
        for _ in 0..1000 {
            signaller.signal().unwrap();
        }
        assert_eq!(count(&fd), Some(1000));
        assert_eq!(count(&fd), None);
    }

    /// What write(2) would wait for.
    #[test]
    fn a_full_counter_that_blocks_is_not_waited_for() {
        let (mut signaller, fd) = aimed(EventfdFlags::empty());
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        for _ in 0..3 {
            signaller.signal().unwrap();
        }
        assert!(count(&fd).unwrap() >= u64::MAX - 1);
        signaller.signal().unwrap();
        assert_eq!(count(&fd), Some(1));
    }

    #[test]
    fn another_eventfd_is_signalled_in_place_of_the_first() {
        let (mut signaller, first) = aimed(EventfdFlags::NONBLOCK);
        let second = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        signaller.aim(Some(second.as_fd())).unwrap();
        signaller.signal().unwrap();
        assert_eq!((count(&first), count(&second)), (None, Some(1)));
        signaller.aim(None).unwrap();
        signaller.signal().unwrap();
        assert_eq!(count(&second), None);
        let (pipe, _end) = io::pipe().unwrap();
        signaller.aim(Some(pipe.as_fd())).unwrap_err();
        signaller.signal().unwrap();
    }

    #[test]
    fn it_may_be_made_on_another_thread() {
        let (mut signaller, fd) = aimed(EventfdFlags::NONBLOCK);
        std::thread::spawn(move || signaller.signal().unwrap()).join().unwrap();
        assert_eq!(count(&fd), Some(1));
    }
}
