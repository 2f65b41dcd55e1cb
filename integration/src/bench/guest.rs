// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's side of a server: libblkio's virtio-blk driver over vhost-user, one queue.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

use super::load::{BLOCK, Disk, MAX_DEPTH};
use crate::rig::command::context;
use crate::rig::wait;

/// Three descriptors a request, at the deepest.
const QUEUE_SIZE: u16 = 512;
const LIMIT: Duration = Duration::from_secs(10);

/// How the guest waits for completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Wait {
    /// Looks at the used ring all the time, interrupts off: the server alone is measured.
    Poll,
    /// Sleeps on the call eventfd, as a guest with interrupts does.
    Block,
}

/// A connected queue with a buffer per slot.
pub(super) struct Guest {
    ring: VirtioBlkQueue<'static, u16>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    wait: Wait,
    memory: MmapRegion,
    /// Last: closing the connection while the ring's memory is still there.
    _transport: Box<VirtioBlkTransport>,
}

impl Guest {
    /// Connects to the vhost-user socket at `path`.
    pub(super) fn connect(path: &Path, wait: Wait) -> io::Result<Guest> {
        let (send, receive) = mpsc::channel();
        let path = path.to_owned();
        // The driver's socket has no time limits, so the handshake happens where it can be given up on.
        thread::spawn(move || drop(send.send(handshake(&path, wait))));
        match receive.recv_timeout(LIMIT) {
            Ok(result) => result,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the vhost-user handshake does not end",
            )),
        }
    }
}

fn handshake(path: &Path, wait: Wait) -> io::Result<Guest> {
    let name = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    let features = VirtioBlkFeatureFlags::MQ.bits()
        | VirtioBlkFeatureFlags::FLUSH.bits()
        | (VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits();
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(name, features).map_err(context("vhost-user handshake"))?);
    let mut rings = VirtioBlkQueue::setup_queues(transport.as_mut(), 1, QUEUE_SIZE)
        .map_err(context("setting the queue up"))?;
    let mut ring = rings.pop().ok_or(io::ErrorKind::UnexpectedEof)?;

    let len = BLOCK * usize::from(MAX_DEPTH);
    let file = File::from(memfd_create("bench-guest", MemfdFlags::CLOEXEC)?);
    file.set_len(len as u64)?;
    let fd = file.as_raw_fd();
    let memory = MmapRegion::from_file(FileOffset::new(file, 0), len).map_err(io::Error::other)?;
    transport
        .map_mem_region(memory.as_ptr() as usize, len, fd, 0)
        .map_err(context("adding the memory"))?;
    ring.set_used_notif_enabled(wait == Wait::Block);
    let (notifier, call) = (transport.get_submission_notifier(0), transport.get_completion_fd(0));
    Ok(Guest { ring, notifier, call, wait, memory, _transport: transport })
}

impl Disk for Guest {
    fn queue(&mut self, slot: u16, write: bool, offset: u64) -> io::Result<()> {
        let buffer = self.memory.as_ptr().wrapping_add(usize::from(slot) * BLOCK);
        if slot >= MAX_DEPTH {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if write {
            // SAFETY: `buffer` is slot `slot` of `self.memory`, which lives as long as the ring; only this request uses it.
            unsafe { self.ring.write_raw(offset, buffer, BLOCK, slot) }
        } else {
            // SAFETY: as for the write above.
            unsafe { self.ring.read_raw(offset, buffer, BLOCK, slot) }
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.ring.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        loop {
            for completion in self.ring.completions() {
                if completion.ret != 0 {
                    return Err(io::Error::from_raw_os_error(-completion.ret));
                }
                done.push(completion.context);
            }
            if !done.is_empty() || self.wait == Wait::Poll {
                return Ok(());
            }
            // SAFETY: the descriptor is open as long as `self.call`, which outlives this borrow.
            let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
            if !wait::readable(call, LIMIT)? {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no call for a completion"));
            }
            self.call.read()?;
        }
    }
}
