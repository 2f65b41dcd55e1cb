// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Getting a descriptor back that a library forgot.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

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
