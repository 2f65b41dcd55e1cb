// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A frontend whose every message and ring entry is the test's own doing, over `vhost`'s `Frontend`.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend as Wire, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::command::context;
use super::ring::{RING_MEMORY, Ring};
use super::wait::{self, PATIENCE};

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_RING_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_RING_F_INDIRECT_DESC.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_BLK_F_FLUSH.
pub const FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const CONFIG_WCE: u64 = 1 << 11;

/// Request types of virtio-blk.
pub mod kind {
    /// Data from the disk.
    pub const IN: u32 = 0;
    /// Data to the disk.
    pub const OUT: u32 = 1;
    /// Make durable.
    pub const FLUSH: u32 = 4;
    /// The serial.
    pub const GET_ID: u32 = 8;
}

/// A connection and its rings, nothing of which is set up until asked.
pub struct Frontend {
    /// For every message the methods below do not cover.
    pub wire: Wire,
    /// Guest memory from address 0; ring `i` has [`RING_MEMORY`] bytes at `i * RING_MEMORY`.
    pub memory: GuestMemoryMmap,
    /// The rings.
    pub rings: Vec<Ring>,
    /// Features acknowledged.
    pub features: u64,
    /// Hangs up when this goes, whoever else holds the socket at that moment.
    hang_up: UnixStream,
}

impl Drop for Frontend {
    fn drop(&mut self) {
        // It may have been hung up by the other side.
        let _ = self.hang_up.shutdown(Shutdown::Both);
    }
}

impl std::fmt::Debug for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frontend")
            .field("rings", &self.rings)
            .field("features", &self.features)
            .finish()
    }
}

impl Frontend {
    /// Connects without a word. A message that is never answered is an error.
    pub fn connect(path: &Path, rings: u16, size: u16) -> io::Result<Frontend> {
        let file = File::from(memfd_create("guest-ram", MemfdFlags::CLOEXEC)?);
        file.set_len(u64::from(rings) * RING_MEMORY)?;
        Frontend::over(path, file, rings, size)
    }

    /// The same with guest memory in `file`, which is long enough.
    pub fn over(path: &Path, file: File, rings: u16, size: u16) -> io::Result<Frontend> {
        let stream = wait::until("connecting", PATIENCE, || UnixStream::connect(path).ok())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let len = u64::from(rings) * RING_MEMORY;
        let region = (
            GuestAddress(0),
            usize::try_from(len).map_err(io::Error::other)?,
            Some(FileOffset::new(file, 0)),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([region]).map_err(io::Error::other)?;
        let rings = make_rings(&memory, rings, size)?;
        let hang_up = stream.try_clone()?;
        let wire = Wire::from_stream(stream, rings.len() as u64);
        Ok(Frontend { wire, memory, rings, features: 0, hang_up })
    }

    /// Connects, negotiates `features`, shares the memory and starts every ring.
    pub fn start(path: &Path, rings: u16, size: u16, features: u64) -> io::Result<Frontend> {
        let mut frontend = Frontend::connect(path, rings, size)?;
        frontend.bring_up(features)?;
        Ok(frontend)
    }

    /// Negotiates `features`, shares the memory and starts every ring.
    pub fn bring_up(&mut self, features: u64) -> io::Result<()> {
        self.negotiate(features)?;
        self.share_memory()?;
        for index in 0..self.rings.len() {
            self.set_up(index, 0)?;
            self.set_kick(index)?;
            self.set_call(index)?;
            self.enable(index, true)?;
        }
        Ok(())
    }

    /// Forgets the rings' state and eventfds, as a driver does that starts over. Their memory is zero again.
    pub fn renew_rings(&mut self) -> io::Result<()> {
        let (count, size) = (self.rings.len(), self.rings.first().map_or(0, Ring::size));
        let zeros = vec![0; 1 << 20];
        for ring in &self.rings {
            // Table and rings are all in the first part of its memory.
            ring.write_bytes(&zeros, ring.table())?;
        }
        self.rings =
            make_rings(&self.memory, u16::try_from(count).map_err(io::Error::other)?, size)?;
        Ok(())
    }

    /// Owner, features (those offered, of `wanted`), protocol features; from here on each message wants its reply.
    pub fn negotiate(&mut self, wanted: u64) -> io::Result<()> {
        self.wire.set_owner().map_err(context("SET_OWNER"))?;
        let offered = self.wire.get_features().map_err(context("GET_FEATURES"))?;
        self.features = offered & (wanted | PROTOCOL_FEATURES);
        let protocol =
            self.wire.get_protocol_features().map_err(context("GET_PROTOCOL_FEATURES"))?;
        let ours = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE;
        self.wire
            .set_protocol_features(protocol & ours)
            .map_err(context("SET_PROTOCOL_FEATURES"))?;
        self.wire.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.wire.set_features(self.features).map_err(context("SET_FEATURES"))
    }

    /// SET_MEM_TABLE with the one region.
    pub fn share_memory(&self) -> io::Result<()> {
        let regions: Result<Vec<_>, _> =
            self.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        let regions = regions.map_err(io::Error::other)?;
        self.wire.set_mem_table(&regions).map(drop).map_err(context("SET_MEM_TABLE"))
    }

    /// SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ADDR and the error fd of ring `index`.
    pub fn set_up(&self, index: usize, base: u16) -> io::Result<()> {
        let ring = self.ring(index)?;
        self.wire.set_vring_num(index, ring.size()).map_err(context("SET_VRING_NUM"))?;
        self.wire.set_vring_base(index, base).map_err(context("SET_VRING_BASE"))?;
        let start = self.memory.get_host_address(GuestAddress(0)).map_err(io::Error::other)? as u64;
        let config = VringConfigData {
            queue_max_size: ring.size(),
            queue_size: ring.size(),
            flags: 0,
            desc_table_addr: start + ring.table(),
            used_ring_addr: start + ring.used(),
            avail_ring_addr: start + ring.avail(),
            log_addr: None,
        };
        self.wire.set_vring_addr(index, &config).map_err(context("SET_VRING_ADDR"))?;
        self.wire.set_vring_err(index, &ring.err).map_err(context("SET_VRING_ERR"))
    }

    /// SET_VRING_KICK.
    pub fn set_kick(&self, index: usize) -> io::Result<()> {
        self.wire.set_vring_kick(index, &self.ring(index)?.kick).map_err(context("SET_VRING_KICK"))
    }

    /// SET_VRING_CALL.
    pub fn set_call(&self, index: usize) -> io::Result<()> {
        self.wire.set_vring_call(index, &self.ring(index)?.call).map_err(context("SET_VRING_CALL"))
    }

    /// SET_VRING_ENABLE.
    pub fn enable(&mut self, index: usize, on: bool) -> io::Result<()> {
        self.wire.set_vring_enable(index, on).map_err(context("SET_VRING_ENABLE"))
    }

    /// GET_VRING_BASE: the ring is stopped and drained when it answers.
    pub fn stop(&self, index: usize) -> io::Result<u16> {
        let base = self.wire.get_vring_base(index).map_err(context("GET_VRING_BASE"))?;
        u16::try_from(base).map_err(io::Error::other)
    }

    /// `len` bytes of the configuration space.
    pub fn config(&mut self, offset: u32, len: u32) -> io::Result<Vec<u8>> {
        let room = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        let flags = VhostUserConfigFlags::empty();
        Ok(self.wire.get_config(offset, len, flags, &room).map_err(context("GET_CONFIG"))?.1)
    }

    /// Sends a message that the methods above cannot say: its request number, payload and
    /// descriptors as they are given.
    pub fn send_raw(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let len = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let header = [request, 1, len].map(u32::to_ne_bytes).concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors"));
        }
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        Ok(sendmsg(&self.hang_up, &parts, &mut control, SendFlags::NOSIGNAL).map(drop)?)
    }

    /// Waits until the backend has closed its end, or cut it.
    pub fn wait_hang_up(&self, limit: Duration) -> io::Result<bool> {
        wait::hung_up(self.hang_up.as_fd(), limit)
    }

    /// Ring `index`.
    pub fn ring(&self, index: usize) -> io::Result<&Ring> {
        self.rings.get(index).ok_or_else(|| io::Error::other(format!("there is no ring {index}")))
    }

    /// Ring `index`, to use it.
    pub fn ring_mut(&mut self, index: usize) -> io::Result<&mut Ring> {
        self.rings
            .get_mut(index)
            .ok_or_else(|| io::Error::other(format!("there is no ring {index}")))
    }
}

fn make_rings(memory: &GuestMemoryMmap, count: u16, size: u16) -> io::Result<Vec<Ring>> {
    (0..u64::from(count)).map(|i| Ring::new(memory.clone(), i * RING_MEMORY, size)).collect()
}
