// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's side of a server: libblkio's virtio-blk driver over vhost-user, its queues all driven by one thread.
//!
//! One thread, because there may be two cores in all: with a thread for each queue the clients would take the server's.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

use super::interrupt;
use super::load::Disk;
use super::native::fill_buffers;
use super::workload::{Request, Workload};
use crate::rig::command::{close, context};
use crate::rig::wait;

/// Three descriptors a request, at the deepest.
const QUEUE_SIZE: u16 = 512;
const LIMIT: Duration = Duration::from_secs(10);
/// How often a sleeping client looks whether it is to end.
const LOOK_UP: Duration = Duration::from_millis(500);

/// How the client waits for completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Wait {
    /// Looks at the used rings all the time, interrupts off: the server alone is measured.
    Poll,
    /// Sleeps on the call eventfds, as a guest with interrupts does.
    #[value(alias = "block")]
    Event,
}

impl Wait {
    /// Its name on the command line and in the report.
    pub(super) fn name(self) -> &'static str {
        match self {
            Wait::Poll => "poll",
            Wait::Event => "event",
        }
    }

    /// The other one.
    pub(super) fn other(self) -> Wait {
        match self {
            Wait::Poll => Wait::Event,
            Wait::Event => Wait::Poll,
        }
    }
}

struct Queue {
    ring: VirtioBlkQueue<'static, u16>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    /// Whether something was put on the ring since the last notification.
    fresh: bool,
}

/// A connected frontend with a buffer per slot; slot `n` goes to queue `n` modulo their number.
pub(super) struct Guest {
    queues: Vec<Queue>,
    wait: Wait,
    block: usize,
    memory: MmapRegion,
    /// Gone only when dropped.
    transport: Option<Box<VirtioBlkTransport>>,
}

impl Guest {
    /// Connects to the vhost-user socket at `path`, with queues and buffers for `workload`.
    pub(super) fn connect(path: &Path, workload: Workload, wait: Wait) -> io::Result<Guest> {
        let (send, receive) = mpsc::channel();
        let path = path.to_owned();
        // The driver's socket has no time limits, so the handshake happens where it can be given up on.
        thread::spawn(move || drop(send.send(handshake(&path, workload, wait))));
        match receive.recv_timeout(LIMIT) {
            Ok(result) => result,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the vhost-user handshake does not end",
            )),
        }
    }

    fn await_call(&self) -> io::Result<()> {
        let mut fds = Vec::with_capacity(self.queues.len());
        for queue in &self.queues {
            // SAFETY: the descriptor is open as long as `queue.call`, which outlives this borrow.
            let call = unsafe { BorrowedFd::borrow_raw(queue.call.as_raw_fd()) };
            fds.push(PollFd::from_borrowed_fd(call, PollFlags::IN));
        }
        let slice = Timespec::try_from(LOOK_UP).map_err(io::Error::other)?;
        let start = Instant::now();
        loop {
            match poll(&mut fds, Some(&slice)) {
                Ok(0) if start.elapsed() > LIMIT => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "no call for a completion",
                    ));
                }
                Ok(0) | Err(rustix::io::Errno::INTR) => interrupt::check()?,
                ready => {
                    ready?;
                    break;
                }
            }
        }
        for (queue, fd) in self.queues.iter().zip(&fds) {
            if fd.revents().contains(PollFlags::IN) {
                queue.call.read()?;
            }
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The rings lie in the transport's memory.
        self.queues.clear();
        // A server that is just being started must not keep the connection open with its copy of the descriptor.
        close(self.transport.take());
    }
}

fn handshake(path: &Path, workload: Workload, how: Wait) -> io::Result<Guest> {
    let name = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    let features =
        (VirtioBlkFeatureFlags::MQ | VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::DISCARD)
            .bits()
            | (VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits();
    // A socket is there a moment before it listens.
    let connected = wait::until("connecting", LIMIT, || match VhostUser::new(name, features) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => None,
        done => Some(done),
    })?;
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(connected.map_err(context("vhost-user handshake"))?);
    let rings =
        VirtioBlkQueue::setup_queues(transport.as_mut(), workload.queues.into(), QUEUE_SIZE)
            .map_err(context("setting the queues up"))?;

    let block = usize::try_from(workload.block).map_err(io::Error::other)?;
    let len = block * usize::from(workload.slots());
    let file = File::from(memfd_create("bench-guest", MemfdFlags::CLOEXEC)?);
    file.set_len(len as u64)?;
    let fd = file.as_raw_fd();
    let memory = MmapRegion::from_file(FileOffset::new(file, 0), len).map_err(io::Error::other)?;
    fill_buffers(&memory);
    transport
        .map_mem_region(memory.as_ptr() as usize, len, fd, 0)
        .map_err(context("adding the memory"))?;
    let queue = |(index, mut ring): (usize, VirtioBlkQueue<'static, u16>)| {
        ring.set_used_notif_enabled(how == Wait::Event);
        let notifier = transport.get_submission_notifier(index);
        Queue { ring, notifier, call: transport.get_completion_fd(index), fresh: false }
    };
    let queues = rings.into_iter().enumerate().map(queue).collect();
    Ok(Guest { queues, wait: how, block, memory, transport: Some(transport) })
}

impl Disk for Guest {
    fn queue(&mut self, slot: u16, request: Request) -> io::Result<()> {
        let (count, start) = (self.queues.len(), usize::from(slot) * self.block);
        let queue = self.queues.get_mut(usize::from(slot) % count.max(1));
        let (Some(queue), true) = (queue, start + self.block <= self.memory.size()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let buffer = self.memory.as_ptr().wrapping_add(start);
        queue.fresh = true;
        match request {
            // SAFETY: `buffer` is slot `slot` of `self.memory`, which lives as long as the ring; only this request uses it.
            Request::Write(offset) => unsafe {
                queue.ring.write_raw(offset, buffer, self.block, slot)
            },
            // SAFETY: as for the write above.
            Request::Read(offset) => unsafe {
                queue.ring.read_raw(offset, buffer, self.block, slot)
            },
            Request::Discard(offset) => queue.ring.discard(offset, self.block as u64, slot),
            Request::Flush => queue.ring.flush(slot),
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        for queue in &mut self.queues {
            if std::mem::take(&mut queue.fresh) && queue.ring.avail_notif_needed() {
                queue.notifier.notify()?;
            }
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        for queue in &mut self.queues {
            for completion in queue.ring.completions() {
                if completion.ret != 0 {
                    return Err(io::Error::from_raw_os_error(-completion.ret));
                }
                done.push(completion.context);
            }
        }
        if done.is_empty() && self.wait == Wait::Event {
            return self.await_call();
        }
        Ok(())
    }
}
