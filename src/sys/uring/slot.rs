// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a ring keeps of an operation, and of an entry that the kernel has yet to take.

use crate::engine::{OpId, Tag};

/// An operation's place; `taken` from `submit` until `reap` returns it.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) taken: bool,
    /// It was in the submission queue when the device was barred: the kernel says EBADF of it.
    pub(super) barred: bool,
    /// Whose data it reads or writes, if a guest's.
    pub(super) pinned: Option<Tag>,
    /// What a vectored operation points the kernel to. Never touched while `taken`.
    pub(super) iovecs: Vec<libc::iovec>,
}

/// An entry of the submission queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Queued {
    /// A watch's poll.
    Watch,
    /// Of the image.
    Op(OpId),
    /// Of the device, which takes a lease (R2a).
    Raw(OpId),
}

impl Queued {
    pub(super) const fn op(self) -> Option<OpId> {
        match self {
            Self::Watch => None,
            Self::Op(id) | Self::Raw(id) => Some(id),
        }
    }
}
