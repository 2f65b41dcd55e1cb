// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that drives virtqueues by hand, through `vhost`'s frontend.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Memory;

/// Descriptors of each ring.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Where things are in guest memory.
const MEMORY: u64 = 8 << 20;
const USER: u64 = 0x10_0000_0000;
const RINGS: u64 = 0x70_0000;
const HEADERS: u64 = 0x8_0000;
const STATUS: u64 = 0x9_0000;
const DATA: u64 = 0x10_0000;
pub(crate) const DATA_BYTES: u32 = 64 << 10;
/// Marks a status byte nobody has written.
pub(crate) const UNTOUCHED: u8 = 0xee;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

pub(crate) const READ_KIND: u32 = 0;
pub(crate) const WRITE_KIND: u32 = 1;
pub(crate) const DISCARD_KIND: u32 = 11;
pub(crate) const ZEROES_KIND: u32 = 13;
pub(crate) const FLUSH_KIND: u32 = 4;
pub(crate) const GET_ID_KIND: u32 = 8;

/// One virtqueue, seen from the guest.
pub(crate) struct GuestQueue {
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) err: EventFd,
    next: u16,
    used: u16,
}

/// A guest with its frontend. Requests are numbered by their place in guest memory, below 85.
pub(crate) struct Guest {
    pub(crate) front: Frontend,
    pub(crate) memory: Memory,
    pub(crate) file: File,
    pub(crate) queues: Vec<GuestQueue>,
}

fn event() -> EventFd {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap()
}

impl Guest {
    /// Connects and negotiates everything offered but `without`; memory is set, rings are not.
    pub(crate) fn new(stream: UnixStream, num_queues: usize, without: u64) -> Self {
        let guest = Self::connect(stream, num_queues);
        guest.negotiate(without);
        guest
    }

    /// Connects; no features are acknowledged yet.
    pub(crate) fn connect(stream: UnixStream, num_queues: usize) -> Self {
        Self::connect_with(stream, num_queues, |front| {
            let protocol = front.get_protocol_features().unwrap();
            front.set_protocol_features(protocol & VhostUserProtocolFeatures::all()).unwrap();
        })
    }

    /// The same; `protocol` acknowledges the protocol features.
    pub(crate) fn connect_with(
        stream: UnixStream,
        num_queues: usize,
        protocol: impl FnOnce(&mut Frontend),
    ) -> Self {
        let mut front = Frontend::from_stream(stream, 64);
        front.set_owner().unwrap();
        front.get_features().unwrap();
        protocol(&mut front);
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, MEMORY).unwrap();
        let file = File::from(fd);
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let range = (GuestAddress(0), MEMORY as usize, Some(offset));
        let memory = Memory::from_ranges_with_files([range]).unwrap();
        let queue = |_| GuestQueue { kick: event(), call: event(), err: event(), next: 0, used: 0 };
        Self { front, memory, file, queues: (0..num_queues).map(queue).collect() }
    }

    /// Acknowledges everything offered but `without` and sets the memory.
    pub(crate) fn negotiate(&self, without: u64) {
        let features = self.front.get_features().unwrap();
        self.front.set_features(features & !without).unwrap();
        self.front.set_mem_table(&[self.region()]).unwrap();
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn ring(queue: usize) -> u64 {
        RINGS + 0x4000 * queue as u64
    }

    pub(crate) fn set_ring(&self, queue: usize, base: u16) {
        let at = USER + Self::ring(queue);
        self.front.set_vring_num(queue, QUEUE_SIZE).unwrap();
        let addresses = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: at,
            avail_ring_addr: at + 0x1000,
            used_ring_addr: at + 0x2000,
            log_addr: None,
        };
        self.front.set_vring_addr(queue, &addresses).unwrap();
        self.front.set_vring_base(queue, base).unwrap();
    }

    /// Sets up and enables every ring.
    pub(crate) fn start(&mut self) {
        for index in 0..self.queues.len() {
            self.set_ring(index, 0);
            let queue = &self.queues[index];
            self.front.set_vring_kick(index, &queue.kick).unwrap();
            self.front.set_vring_call(index, &queue.call).unwrap();
            self.front.set_vring_err(index, &queue.err).unwrap();
            self.front.set_vring_enable(index, true).unwrap();
        }
    }

    pub(crate) fn data(&self, request: u16) -> Vec<u8> {
        let mut bytes = vec![0; DATA_BYTES as usize];
        self.memory.read_slice(&mut bytes, Self::data_at(request)).unwrap();
        bytes
    }

    pub(crate) fn data_at(request: u16) -> GuestAddress {
        GuestAddress(DATA + u64::from(request) * u64::from(DATA_BYTES))
    }

    pub(crate) fn status(&self, request: u16) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS + u64::from(request))).unwrap()
    }

    pub(crate) fn describe(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let at = Self::ring(queue) + 16 * u64::from(index);
        self.memory.write_obj(descriptor, GuestAddress(at)).unwrap();
    }

    pub(crate) fn descriptor(&self, queue: usize, index: u16) -> Descriptor {
        let at = Self::ring(queue) + 16 * u64::from(index);
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Puts a head into the available ring, without a kick.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let ring = Self::ring(queue) + 0x1000;
        let next = &mut self.queues[queue].next;
        let at = ring + 4 + 2 * u64::from(*next % QUEUE_SIZE);
        self.memory.write_obj(head, GuestAddress(at)).unwrap();
        *next = next.wrapping_add(1);
        let order = std::sync::atomic::Ordering::Release;
        self.memory.store(*next, GuestAddress(ring + 2), order).unwrap();
    }

    /// Says that more chains are available than there are descriptors, at once: a worker that is awake
    /// takes what is there between two offers.
    pub(crate) fn run_ahead(&self, queue: usize) {
        let index = GuestAddress(Self::ring(queue) + 0x1002);
        let order = std::sync::atomic::Ordering::Release;
        self.memory.store(QUEUE_SIZE + 1, index, order).unwrap();
    }

    /// Makes a request of `len` bytes available, without a kick. Its head is three times its
    /// number, so there are 85 of them.
    pub(crate) fn request(&mut self, queue: usize, request: u16, kind: u32, at: u64, len: u32) {
        let head = self.prepare(queue, request, kind, at, len);
        self.offer(queue, head);
    }

    /// Describes a request that is not offered yet; its head.
    pub(crate) fn prepare(&self, queue: usize, request: u16, kind: u32, at: u64, len: u32) -> u16 {
        let header = GuestAddress(HEADERS + 16 * u64::from(request));
        self.memory.write_obj(u64::from(kind), header).unwrap();
        self.memory.write_obj(at / 512, GuestAddress(header.0 + 8)).unwrap();
        let status = GuestAddress(STATUS + u64::from(request));
        self.memory.write_obj(UNTOUCHED, status).unwrap();
        let head = request * 3;
        let data = if matches!(kind, WRITE_KIND | DISCARD_KIND | ZEROES_KIND) {
            NEXT
        } else {
            NEXT | WRITE
        };
        self.describe(queue, head, Descriptor::new(header.0, 16, NEXT, head + 1));
        let at = Self::data_at(request).0;
        self.describe(queue, head + 1, Descriptor::new(at, len, data, head + 2));
        self.describe(queue, head + 2, Descriptor::new(status.0, 1, WRITE, 0));
        head
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    pub(crate) fn read(&mut self, queue: usize, request: u16, at: u64, len: u32) {
        self.request(queue, request, READ_KIND, at, len);
        self.kick(queue);
    }

    /// The next used element, if there is one: head and length.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = Self::ring(queue) + 0x2000;
        let order = std::sync::atomic::Ordering::Acquire;
        let index: u16 = self.memory.load(GuestAddress(ring + 2), order).unwrap();
        let used = &mut self.queues[queue].used;
        if index == *used {
            return None;
        }
        let at = ring + 4 + 8 * u64::from(*used % QUEUE_SIZE);
        *used = used.wrapping_add(1);
        // Wants to hear of every later one (EVENT_IDX).
        let event = Self::ring(queue) + 0x1000 + 4 + 2 * u64::from(QUEUE_SIZE);
        self.memory.write_obj(*used, GuestAddress(event)).unwrap();
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head, len))
    }

    /// Waits for the call and takes the next used element.
    pub(crate) fn wait(&mut self, queue: usize) -> (u32, u32) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            assert!(wait_for(&self.queues[queue].call, end), "no call");
        }
    }
}

/// Waits for an event and consumes it.
pub(crate) fn wait_for(event: &EventFd, end: Instant) -> bool {
    while Instant::now() < end {
        if event.read().is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    false
}

/// Whether `event` stays silent for a while.
pub(crate) fn stays_silent(event: &EventFd) -> bool {
    !wait_for(event, Instant::now() + Duration::from_millis(100))
}
