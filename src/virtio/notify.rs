// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kick, call and err: eventfds the frontend gave us, and may do anything to.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// The file-type bits of `st_mode`; an eventfd has none of them set.
const TYPE_BITS: u32 = 0o170_000;

/// An eventfd of the frontend's, made non-blocking.
#[derive(Debug)]
pub(crate) struct Notifier(OwnedFd);

impl Notifier {
    /// Takes `fd` if it is an eventfd. Anything else is refused: polling or writing a FUSE file, or
    /// an epoll set with one in it, may block whatever its flags are. Non-blocking, because a
    /// counter at its maximum blocks its writer and an empty one its reader; the frontend shares
    /// the flag.
    ///
    /// # Errors
    /// It is something else, or its flags cannot be set.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        // The name first: fstat of a FUSE file may block as well.
        if !named_eventfd(&fd) || fstat(&fd)?.st_mode & TYPE_BITS != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an eventfd"));
        }
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// Signals. A counter at its maximum is signalled already; anything else wrong with the fd is
    /// the frontend's loss.
    ///
    /// eventfds know no write that never blocks whatever their flags are, and the flag is the
    /// frontend's too: so it is only written to when it has room. What is left is a frontend that
    /// fills it in between; it stops the thread that serves it until it reads.
    pub(crate) fn signal(&self) {
        let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut fds, Some(&now)) == Ok(1) {
            let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
        }
    }

    /// Consumes what was signalled. Never blocks, also when the frontend, which shares the flag, has
    /// made the eventfd block again and been faster.
    pub(crate) fn hear(&self) {
        /// "Here", for what has no offsets.
        const CURRENT: u64 = u64::MAX;
        let (mut count, nowait) = ([0u8; 8], ReadWriteFlags::NOWAIT);
        let heard = preadv2(&self.0, &mut [IoSliceMut::new(&mut count)], CURRENT, nowait);
        if heard == Err(Errno::OPNOTSUPP) {
            // Kernels before 5.8 cannot. Whatever this says: nothing is left to be heard.
            let _ = rustix::io::read(&self.0, &mut count);
        }
    }
}

/// Whether `/proc` calls it an eventfd, or there is no `/proc` to ask.
fn named_eventfd(fd: &OwnedFd) -> bool {
    match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) => name.as_os_str() == "anon_inode:[eventfd]",
        Err(_) => true,
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn an_eventfd_is_taken_and_neither_blocks_when_full_nor_when_empty() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let notifier = Notifier::new(fd.try_clone().unwrap()).unwrap();
        notifier.hear();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        notifier.signal();
        notifier.hear();
        assert_eq!(rustix::io::read(&fd, &mut [0u8; 8]), Err(Errno::AGAIN));
    }

    #[test]
    fn the_frontend_cannot_make_it_block_again() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let notifier = Notifier::new(fd.try_clone().unwrap()).unwrap();
        fcntl_setfl(&fd, OFlags::RDWR).unwrap();
        notifier.hear();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        notifier.signal();
        notifier.hear();
    }

    #[test]
    fn what_may_block_is_refused() {
        let (reader, writer) = std::io::pipe().unwrap();
        Notifier::new(reader.into()).unwrap_err();
        Notifier::new(writer.into()).unwrap_err();
        Notifier::new(File::open("/dev/zero").unwrap().into()).unwrap_err();
        Notifier::new(tempfile::tempfile().unwrap().into()).unwrap_err();
        let (left, _right) = std::os::unix::net::UnixStream::pair().unwrap();
        Notifier::new(left.into()).unwrap_err();
    }

    #[test]
    fn an_epoll_set_is_refused() {
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC);
        Notifier::new(epoll.unwrap()).unwrap_err();
    }
}
