// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's side: vhost-user sessions, virtqueues, descriptor chains.
//!
//! ```text
//! frontend ══socket══► relay ══private socket══► vhost-user-backend's daemon thread
//!    │ kick, call fds    └──mail──┐                  │ stop, memory, features
//!    ▼                            ▼                  ▼ mail
//!  virtqueues ◄──pop, publish── worker threads (one engine::Worker and one ring each)
//! ```
//!
//! A [`session::Session`] is one connection. Its worker threads are vhost-user-backend's; each owns
//! its queues, its requests and its ring, and hears everything else through its mailbox.

pub mod backend;
pub mod cache_mode;
mod cells;
pub mod chain;
mod disk;
pub mod features;
#[cfg(test)]
mod frontends_tests;
pub mod limits;
mod mailbox;
mod notify;
mod overlap;
mod queue;
mod relay;
mod requests;
pub mod session;
pub mod spin;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod testing_guest;
mod wire;
mod worker;

/// Guest memory, as every part of the daemon uses it.
pub type Memory = vm_memory::GuestMemoryMmap<()>;
