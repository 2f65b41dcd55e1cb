// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one door between the pure core and the world: what a worker may ask of its engine.
//!
//! The daemon implements [`Io`] with io_uring, the simulator with a seeded disk. Neither plans,
//! orders or chooses a mode: they carry out what they are given.

use std::task::Poll;
use std::time::Duration;

use super::units::{DeviceOffset, FileRange};

/// A request's place in its worker's tables; the caller chose it when it handed the request in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tag(pub u32);

/// An operation in flight: a slot of the worker's fixed table, free again at its completion.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u32);

/// A bounce buffer: an index into the worker's fixed pool of [`Geometry::bounce_bytes`]-byte slots.
///
/// [`Geometry::bounce_bytes`]: super::Geometry::bounce_bytes
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BounceSlot(pub u32);

/// Where data goes to or comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// The image through the host filesystem, at a byte offset in the file.
    Image(u64),
    /// The block device below it: a *raw* access.
    Device(DeviceOffset),
}

impl Target {
    /// The same target `bytes` further on.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        match self {
            Self::Image(at) => Self::Image(at.saturating_add(bytes)),
            Self::Device(at) => Self::Device(at.plus(bytes)),
        }
    }
}

/// A piece of memory. It must stay valid until the operation that names it has completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Buf {
    /// Bytes `at..at + len` of a request's guest data, counted over its descriptors in order.
    Guest {
        /// Whose data.
        tag: Tag,
        /// First byte.
        at: u64,
        /// Bytes.
        len: u32,
    },
    /// Bytes `at..at + len` of a bounce buffer.
    Bounce {
        /// Which buffer.
        slot: BounceSlot,
        /// First byte.
        at: u32,
        /// Bytes.
        len: u32,
    },
}

impl Buf {
    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u32 {
        match self {
            Self::Guest { len, .. } | Self::Bounce { len, .. } => *len,
        }
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is left of it after its first `bytes`.
    #[must_use]
    pub const fn skip(self, bytes: u32) -> Self {
        match self {
            Self::Guest { tag, at, len } => {
                Self::Guest { tag, at: at + bytes as u64, len: len.saturating_sub(bytes) }
            }
            Self::Bounce { slot, at, len } => {
                Self::Bounce { slot, at: at + bytes, len: len.saturating_sub(bytes) }
            }
        }
    }
}

/// One operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Read `buf.len()` bytes.
    Read(Target, Buf),
    /// Write `buf.len()` bytes.
    Write(Target, Buf),
    /// Make this many bytes read as zeros and keep their blocks (R17); whole blocks only. 0 when done;
    /// EOPNOTSUPP if zeros have to be written instead.
    Zeroes(Target, u32),
    /// `fdatasync` of the image (R14).
    SyncImage,
    /// A device cache flush, restricted to a range inside the image (R14).
    SyncDevice(DeviceOffset, u32),
    /// Zero guest memory. Always [`Poll::Ready`].
    Zero(Buf),
    /// Copy memory `from` → `to`, of equal length. Always [`Poll::Ready`].
    Copy {
        /// Source.
        from: Buf,
        /// Destination.
        to: Buf,
    },
    /// Is the lease still ours (R2a)? Always [`Poll::Ready`]: 1 yes, 0 no.
    ConfirmLease,
    /// How many pages of the host's page cache hold bytes of this range of the image (R10a)? Always [`Poll::Ready`]: their
    /// number, or a negated errno where the kernel does not tell without waiting.
    CachedPages(FileRange),
}

/// A finished operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// Which.
    pub id: OpId,
    /// The kernel's word: bytes transferred, or a negated errno.
    pub result: i32,
}

/// What a worker needs from the world.
pub trait Io {
    /// Starts an operation. [`Poll::Ready`] carries the result of one that is already done and
    /// of which [`reap`](Self::reap) says nothing any more; otherwise `id` stays taken until
    /// `reap` returns it. Never more operations are in flight than [`Geometry::ops`].
    ///
    /// [`Geometry::ops`]: super::Geometry::ops
    fn submit(&mut self, id: OpId, op: Op) -> Poll<i32>;

    /// The next finished operation, if one is there; does not wait.
    fn reap(&mut self) -> Option<Completion>;

    /// Time since some fixed point, going on during suspend (CLOCK_BOOTTIME).
    fn now(&self) -> Duration;

    /// What [`now`](Self::now) said last, for raw operations: before each of them it has to be known whether the lease was
    /// confirmed lately (R2a). Whatever has passed since is counted when it starts: where that is too long, it ends with EAGAIN.
    fn lately(&self) -> Duration {
        self.now()
    }
}
