// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The only place with `unsafe`: thin, checked wrappers of what no safe crate offers.

pub mod blockdev;
pub mod buffer;
pub mod fault;
pub mod fd;
pub mod fiemap;
pub mod inode;
pub mod inspect;
pub mod inspector;
pub mod lease;
pub mod ofd_lock;
pub mod page_cache;
pub mod process;
pub mod signaller;
pub mod signals;
pub mod uring;
pub mod xfs;
