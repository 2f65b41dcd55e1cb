// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! extentd: a vhost-user-blk backend that serves a file-backed image straight from its disk sectors.
//!
//! # The map of the house
//!
//! ```text
//! config ─► server ─► image ──────► sys (FIEMAP, lease, locks, page cache, device)
//!              │         ▲ jobs
//!              │      engine::Keeper      one per image: mode, extent map, locks, flushes
//!              │         ▲ │ messages
//!              └─► virtio│ ▼
//!                  └─► engine::Worker     one per queue thread: requests and their pieces
//!                        └─► sys::uring
//! ```
//!
//! | module | duty |
//! |---|---|
//! | [`config`] | command line, or a file of devices → checked, immutable settings |
//! | [`server`] | the process and its devices; a device's main loop: frontends, lease breaks, timers; owns the keeper |
//! | [`engine`] | the pure core: requests, extent map, planning, barrier, ownership of the layout |
//! | [`image`] | the one open description of the image: is it eligible, where is it, what may block |
//! | [`virtio`] | features and configuration space, virtqueues, the vhost-user session and its relay |
//! | [`sys`] | all `unsafe`: io_uring, ioctls, fcntls, guest memory in flight |
//! | [`control`] | the control socket's protocol, and what `extentctl` prints |
//! | [`inbox`] | how other threads reach a main loop |
//!
//! A request goes `kick → virtio (chain) → engine (plan) → sys::uring → engine (complete) → virtio
//! (used ring) → call`, on one thread. Whatever may change where bytes lie goes through the keeper. The
//! decisions behind this are in `docs/adr/`.

#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

pub mod config;
pub mod control;
pub mod engine;
pub mod image;
pub mod inbox;
pub mod server;
pub mod sys;
pub mod virtio;
