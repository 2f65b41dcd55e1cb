// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flags of open files, and getting a descriptor back that a library forgot.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;

/// Sets the status flags of a file that was opened for I/O: `flags`, and O_NOATIME where this user may (the owner
/// and root). Looking whether the access time is to be changed would cost each read a twentieth.
///
/// # Errors
/// The kernel's.
pub fn set_io_flags(fd: impl AsFd, flags: OFlags) -> Result<(), Errno> {
    match fcntl_setfl(&fd, flags | OFlags::NOATIME) {
        Err(Errno::PERM) => fcntl_setfl(&fd, flags),
        done => done,
    }
}

/// A descriptor handed to a library that never closes it.
///
/// vhost-user-backend 0.24 turns the consumer of `VhostUserBackend::exit_event` into a raw number,
/// adds it to its epoll set and forgets it: one descriptor per worker thread and session.
#[derive(Debug)]
pub struct Forgotten(RawFd);

impl Forgotten {
    /// Remembers the number of `fd`, which is about to be given to the library.
    pub fn remember(fd: &impl AsRawFd) -> Self {
        Self(fd.as_raw_fd())
    }

    /// Takes the descriptor back, to be closed. The caller has seen to it that the library has
    /// taken it (so nobody else closes it) and is gone (so nobody uses it).
    #[must_use]
    pub fn reclaim(self) -> OwnedFd {
        // SAFETY: the number is that of an eventfd which the library detached from its owner with
        // `into_raw_fd` and never closes, so it still names that eventfd and has no other owner;
        // `self` is consumed, so it is adopted once.
        unsafe { OwnedFd::from_raw_fd(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::fcntl_getfl;
    use rustix::process::{Uid, geteuid};

    use super::*;

    #[test]
    fn the_access_time_stays_where_we_may_say_so() {
        let file = tempfile::tempfile().unwrap();
        set_io_flags(&file, OFlags::DIRECT).unwrap();
        let flags = fcntl_getfl(&file).unwrap();
        assert!(flags.contains(OFlags::NOATIME | OFlags::DIRECT));
        if !geteuid().is_root() {
            println!("the other half needs root");
            return;
        }
        fcntl_setfl(&file, OFlags::empty()).unwrap();
        // Nobody's thread: only this one changes its user.
        let nobody = std::thread::spawn(move || {
            let nobody = Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            set_io_flags(&file, OFlags::DIRECT).unwrap();
            fcntl_getfl(&file).unwrap()
        });
        let flags = nobody.join().unwrap();
        assert!(flags.contains(OFlags::DIRECT) && !flags.contains(OFlags::NOATIME));
    }
}
