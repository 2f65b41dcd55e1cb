// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A well-behaved frontend: libblkio's virtio-blk driver over vhost-user, several queues, every wait with a deadline.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

use super::command::{close, context};
use super::queue::Queue;
use super::wait::{self, PATIENCE};

/// What a frontend asks for.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Queues to set up.
    pub queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
    /// Feature bits acknowledged if offered.
    pub features: u64,
    /// The largest request in bytes.
    pub max_request: usize,
    /// Requests in flight per queue.
    pub depth: usize,
    /// How long anything may take.
    pub limit: Duration,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        let blk = VirtioBlkFeatureFlags::SIZE_MAX
            | VirtioBlkFeatureFlags::SEG_MAX
            | VirtioBlkFeatureFlags::RO
            | VirtioBlkFeatureFlags::BLK_SIZE
            | VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::TOPOLOGY
            | VirtioBlkFeatureFlags::CONFIG_WCE
            | VirtioBlkFeatureFlags::DISCARD
            | VirtioBlkFeatureFlags::WRITE_ZEROES
            | VirtioBlkFeatureFlags::MQ;
        let ring = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        ClientOptions {
            queues: 1,
            queue_size: 256,
            features: blk.bits() | ring.bits(),
            max_request: 256 << 10,
            depth: 32,
            limit: PATIENCE,
        }
    }
}

impl ClientOptions {
    /// The default with `queues` queues.
    pub fn queues(queues: u16) -> ClientOptions {
        ClientOptions { queues, ..ClientOptions::default() }
    }
}

/// What all queues of a connection share. The connection closes when the last of them goes.
pub(super) struct Shared {
    /// Guest memory for data. The transport's own memory holds rings and headers.
    pub(super) memory: MmapRegion,
    transport: Mutex<Option<Box<VirtioBlkTransport>>>,
}

impl Shared {
    /// Calls `ask` with the transport, which is there until the last queue goes.
    pub(super) fn with<T>(&self, ask: impl FnOnce(&VirtioBlkTransport) -> T) -> Option<T> {
        let transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
        transport.as_deref().map(ask)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        close(self.transport.get_mut().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// A connected frontend.
pub struct Client {
    shared: Arc<Shared>,
    queues: Vec<Queue>,
    config: VirtioBlkConfig,
}

impl Client {
    /// Connects to the vhost-user socket at `path` and sets its queues up.
    ///
    /// A socket that is bound but does not listen yet is tried again for a moment.
    pub fn connect(path: &Path, options: &ClientOptions) -> io::Result<Client> {
        let (send, receive) = mpsc::channel();
        let path = path.to_owned();
        let wanted = options.clone();
        // The driver's socket has no time limits, so the handshake happens where it can be given up on.
        thread::spawn(move || drop(send.send(handshake(&path, &wanted))));
        match receive.recv_timeout(options.limit) {
            Ok(result) => result,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the vhost-user handshake does not end",
            )),
        }
    }

    /// The queue `index`.
    pub fn queue(&mut self, index: usize) -> io::Result<&mut Queue> {
        self.queues
            .get_mut(index)
            .ok_or_else(|| io::Error::other(format!("there is no queue {index}")))
    }

    /// All queues.
    pub fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    /// Takes the queues, to drive each from a thread of its own.
    pub fn take_queues(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }

    /// The configuration space as it was at connection.
    pub fn config(&self) -> VirtioBlkConfig {
        self.config
    }

    /// The disk's size in bytes.
    pub fn capacity(&self) -> u64 {
        u64::from(self.config.capacity) * 512
    }

    /// The features acknowledged.
    pub fn features(&self) -> u64 {
        self.shared.with(|transport| transport.get_features()).unwrap_or(0)
    }

    /// Reads on the first queue.
    pub fn read_at(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.queue(0)?.read_at(offset, len)
    }

    /// Writes on the first queue.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.queue(0)?.write_at(offset, data)
    }

    /// Flushes on the first queue.
    pub fn flush(&mut self) -> io::Result<()> {
        self.queue(0)?.flush()
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("queues", &self.queues.len())
            .field("capacity", &self.capacity())
            .finish()
    }
}

fn handshake(path: &Path, options: &ClientOptions) -> io::Result<Client> {
    let name = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    let mut transport: Box<VirtioBlkTransport> =
        wait::until("connecting", PATIENCE, || match VhostUser::new(name, options.features) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                ) =>
            {
                None
            }
            done => Some(done),
        })?
        .map(Box::new)
        .map_err(context("vhost-user handshake"))?;
    let config = transport.get_config()?;

    let per_queue = Queue::memory_needed(options);
    let len = per_queue * usize::from(options.queues);
    let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
    file.set_len(len as u64)?;
    let fd = file.as_raw_fd();
    let memory = MmapRegion::from_file(FileOffset::new(file, 0), len).map_err(io::Error::other)?;

    let rings =
        VirtioBlkQueue::setup_queues(transport.as_mut(), options.queues.into(), options.queue_size)
            .map_err(context("setting the queues up"))?;
    // After the queues, as libblkio does it: memory is added while rings run.
    transport
        .map_mem_region(memory.as_ptr() as usize, len, fd, 0)
        .map_err(context("adding the memory"))?;

    let shared = Arc::new(Shared { memory, transport: Mutex::new(Some(transport)) });
    let make =
        |(index, ring)| Queue::new(index, ring, Arc::clone(&shared), index * per_queue, options);
    let queues = rings.into_iter().enumerate().map(make).collect::<io::Result<Vec<Queue>>>()?;
    Ok(Client { shared, queues, config })
}
