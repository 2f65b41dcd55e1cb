// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Real disks, filesystems, daemons and frontends for tests, each behind a guard that takes it away again.
//!
//! A test starts with [`Rig::enter`] (or [`Rig::alone`]), builds what it needs from the parts below and lets them go
//! out of scope in reverse order. Whatever a killed test leaves behind takes itself away: mounts live in a mount namespace
//! of the test's thread, loop devices are autoclear, their memory is a memfd, daemons get a parent-death signal.
//!
//! | part | what it is |
//! |---|---|
//! | [`disk::LoopDisk`] | a loop device with 512 or 4096-byte sectors over memory, a disk file or a [`fault_disk::FaultDisk`] |
//! | [`filesystem::Filesystem`] | a formatted and mounted loop device that can be checked by its own fsck |
//! | [`fault_disk::FaultDisk`] | a FUSE file with a volatile write cache: its requests can be delayed, held or failed, its power cut |
//! | [`hung_file::HungFile`] | a FUSE file whose server stops answering |
//! | [`image`] | makers of written, sparse, fallocated, fragmented and mixed image files |
//! | [`daemon::Daemon`] | a running extentd (or its peer) with its log and status |
//! | [`client::Client`] | libblkio's virtio-blk driver over vhost-user, with deadlines |
//! | [`frontend::Frontend`] | hand-made rings over `vhost`'s frontend for what no well-behaved driver does |
//! | [`outside`] | what others on the host do: readers, a full disk, a frozen filesystem |
//! | [`sharing`] | a process that has an image's blocks shared without opening it for writing |
//! | [`allocations`], [`heap`], [`syscalls`] | what threads of this process ask of the heap, and others of the kernel |
//! | [`model`] | the flat byte model, and self-describing sectors |

pub mod allocations;
pub mod bed;
pub mod client;
pub mod command;
pub mod daemon;
pub mod disk;
pub mod fault_disk;
mod fault_disk_fs;
mod fault_disk_platter;
mod fault_disk_power;
mod fault_disk_rules;
pub mod filesystem;
pub mod fleet;
pub mod frontend;
pub mod heap;
pub mod hung_file;
pub mod image;
pub mod model;
pub mod outside;
pub mod program;
pub mod queue;
pub mod random;
pub mod ring;
pub mod scope;
pub mod sharing;
pub mod stamped;
pub mod syscalls;
pub mod wait;
pub mod workload;

pub use bed::{Bed, Setup};
pub use client::{Client, ClientOptions};
pub use daemon::{Daemon, Status};
pub use disk::{Backing, LoopDisk};
pub use fault_disk::FaultDisk;
pub use filesystem::{Filesystem, Kind, Mount};
pub use fleet::Fleet;
pub use image::Layout;
pub use queue::{Done, Queue, Request, Shape};
pub use random::Random;
pub use scope::Rig;

#[cfg(test)]
#[path = "fault_disk_tests.rs"]
mod fault_disk_tests;
#[cfg(test)]
#[path = "rig_tests.rs"]
mod rig_tests;
