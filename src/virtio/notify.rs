// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kick, call and err: eventfds the frontend gave us, and may do anything to.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::fstat;
use rustix::io::{ReadWriteFlags, preadv2};

use crate::sys::signaller::Signaller;

/// The file-type bits of `st_mode`; an eventfd has none of them set.
const TYPE_BITS: u32 = 0o170_000;

/// An eventfd of the frontend's. Its flags are the frontend's as well, so nothing here rests on
/// them.
#[derive(Debug)]
pub(crate) struct Notifier(OwnedFd);

impl Notifier {
    /// Takes `fd` if it is an eventfd. Anything else is refused: polling or writing a FUSE file, or
    /// an epoll set with one in it, may block whatever its flags are.
    ///
    /// # Errors
    /// It is something else.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        // The name first: fstat of a FUSE file may block as well.
        if !named_eventfd(&fd) || fstat(&fd)?.st_mode & TYPE_BITS != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an eventfd"));
        }
        Ok(Self(fd))
    }

    /// Consumes what was signalled. Never waits, whatever the flags are: that is asked of this read
    /// alone, which kernels can do since 5.8.
    pub(crate) fn hear(&self) {
        /// "Here", for what has no offsets.
        const CURRENT: u64 = u64::MAX;
        let (mut count, nowait) = ([0u8; 8], ReadWriteFlags::NOWAIT);
        // There may be nothing to be consumed.
        let _ = preadv2(&self.0, &mut [IoSliceMut::new(&mut count)], CURRENT, nowait);
    }
}

/// Signals one eventfd of the frontend's after the other, and never waits for it (ADR 0012).
#[derive(Debug, Default)]
pub(crate) struct Signal {
    /// Made for the first eventfd and kept: the next one is registered with the same ring.
    signaller: Option<Signaller>,
    aimed: bool,
    /// The last signal could not be sent.
    owed: bool,
    /// How many signals the kernel is to be short of memory for.
    #[cfg(test)]
    pub(crate) refused: u32,
}

impl Signal {
    /// Signals `to` from now on; with `None`, nothing.
    ///
    /// # Errors
    /// The kernel has no descriptor or no memory left. Nothing is signalled then.
    pub(crate) fn aim(&mut self, to: Option<&Notifier>) -> io::Result<()> {
        (self.aimed, self.owed) = (false, false);
        let signaller = match (&mut self.signaller, to) {
            (Some(signaller), _) => signaller,
            (None, Some(_)) => self.signaller.insert(Signaller::new()?),
            (None, None) => return Ok(()),
        };
        signaller.aim(to.map(AsFd::as_fd))?;
        self.aimed = to.is_some();
        Ok(())
    }

    /// Signals; false if there is nothing to signal, or no memory to do it with: then the signal is owed.
    pub(crate) fn send(&mut self) -> bool {
        let was_owed = std::mem::take(&mut self.owed);
        let Some(signaller) = self.signaller.as_mut().filter(|_| self.aimed) else { return false };
        #[cfg(not(test))]
        let result = signaller.signal();
        #[cfg(test)]
        let result = match self.refused.checked_sub(1) {
            None => signaller.signal(),
            Some(left) => {
                self.refused = left;
                Err(io::ErrorKind::OutOfMemory.into())
            }
        };
        if let Err(error) = result {
            self.owed = true;
            if !was_owed {
                tracing::error!(%error, "a guest cannot be signalled for now");
            }
        }
        !self.owed
    }

    /// Whether the last signal could not be sent.
    pub(crate) const fn is_owed(&self) -> bool {
        self.owed
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
    use rustix::fs::{OFlags, fcntl_getfl};

    use super::*;

    /// The counter is full and empty in turn, and a read or a write of it waits.
    #[test]
    fn an_eventfd_that_blocks_is_waited_for_neither_when_full_nor_when_empty() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let notifier = Notifier::new(fd.try_clone().unwrap()).unwrap();
        let mut signal = Signal::default();
        assert!(!signal.send());
        signal.aim(Some(&notifier)).unwrap();
        assert!(!fcntl_getfl(&fd).unwrap().contains(OFlags::NONBLOCK));
        notifier.hear();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        assert!(signal.send());
        notifier.hear();
        notifier.hear();
        assert!(signal.send());
        let mut count = [0u8; 8];
        rustix::io::read(&fd, &mut count[..]).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
        signal.aim(None).unwrap();
        assert!(!signal.send());
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
