// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The relay: between the frontend's socket and vhost-user-backend's, on the control path only.
//!
//! It forwards every message with its fds and does what the crate has no hook for. Kick fds stay
//! here: the crate would read them blocking, under a lock, and end its thread if somebody else had;
//! it gets a silent substitute instead. Call and err fds are also given to the worker. A ring is
//! drained before the message that disables it is forwarded. Memory that a truncated file cannot
//! back is refused, and the session ends when a part of it turns out to be missing later. It knows nothing about blocks and goes away when the
//! crate grows the hooks.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use vhost::vhost_user::message::FrontendReq;

use super::limits::{Account, OverLimit};
use super::notify::Notifier;
use super::wire::{self, Message, WireError};
use crate::sys::fault::{GuestRegions, page_size};
use crate::sys::inspect::{InspectError, Inspections, Kind};

/// Bits of a SET_VRING_{KICK,CALL,ERR} payload that number the queue.
const VRING_INDEX_MASK: u64 = 0xff;

/// Bytes of a memory region's description, and where it has its size and its file offset.
const REGION_BYTES: usize = 32;
const REGION_SIZE: usize = 8;
const REGION_OFFSET: usize = 24;

/// The smallest page: what lies in the same one as a file's last byte can be touched.
const PAGE: u64 = 4096;

/// Wake-ups in a row for a frontend's byte that cannot be received. One may be spurious.
const MOST_IN_VAIN: u32 = 64;

/// Why a connection was ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RelayError {
    /// The frontend's side.
    #[error("frontend: {0}")]
    Frontend(#[source] WireError),
    /// The crate's side: it refused a message.
    #[error("the frontend broke the protocol (after its message {last})")]
    Refused {
        /// The number of the last request that was forwarded.
        last: u32,
    },
    /// A vring fd that is none.
    #[error("queue {queue}: {message}: {error}")]
    BadFd {
        /// Of which queue.
        queue: u64,
        /// In which message.
        message: &'static str,
        /// What is wrong with it.
        error: io::Error,
    },
    /// A memory region that its file cannot back.
    #[error("memory region {region} ends at byte {end} of a file of {size} bytes")]
    ShortMemory {
        /// Its place in the message.
        region: usize,
        /// The byte of the file behind its last one.
        end: u64,
        /// The file's size.
        size: u64,
    },
    /// A mapping that could not be unmapped: the kernel unmaps whole pages only, and the crate does not.
    #[error("memory region {region} ends inside a huge page of {page} bytes: make it whole ones")]
    PartOfHugePage {
        /// Its place in the message.
        region: usize,
        /// The size of its pages.
        page: u64,
    },
    /// More memory than one device's share.
    #[error(transparent)]
    OverLimit(#[from] OverLimit),
    /// Descriptors that nobody would close.
    #[error("message {request} came with {count} file descriptors; it has none")]
    UnwantedFds {
        /// The request's number.
        request: u32,
        /// How many there were.
        count: usize,
    },
    /// Memory that was there, or seemed to be.
    #[error(
        "guest memory is missing: its file was shortened, or the host has no huge page or no room in a tmpfs for it; have it allocated at the start (QEMU: prealloc=on)"
    )]
    MemoryLost,
    /// Our side.
    #[error("relay: {0}")]
    Internal(#[from] io::Error),
}

/// An fd of a vring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum VringFd {
    /// Guest to device.
    Kick,
    /// Device to guest.
    Call,
    /// Device to frontend.
    Err,
}

/// What the relay tells the rest of the session. Queue numbers come from the frontend, unchecked.
pub(crate) trait Hooks: Send + Sync {
    /// A vring has another fd from now on. Waits, while `alive` says so, if too many have not been taken yet.
    fn vring_fd(&self, queue: u64, which: VringFd, fd: Option<Notifier>, alive: &dyn Fn() -> bool);
    /// The ring is about to be disabled: returns once nothing of it is in flight, or when `alive`
    /// says that nobody waits any more.
    fn disable(&self, queue: u32, alive: &dyn Fn() -> bool);
    /// The ring is about to be enabled.
    fn enable(&self, queue: u32);
    /// The ring will begin at available index `base`.
    fn set_base(&self, queue: u32, base: u32);
}

/// Both connections, and the way to end them.
#[derive(Debug)]
pub(crate) struct Relay {
    /// The frontend. The session's: a relay that ends leaves it open.
    pub(crate) front: Arc<UnixStream>,
    /// The crate.
    pub(crate) back: UnixStream,
    /// Readable when the session is to end.
    pub(crate) exit: Arc<OwnedFd>,
    /// Readable when a part of the guest's memory is missing.
    pub(crate) memory: Arc<GuestRegions>,
    /// Looks at the descriptors of the device's frontends.
    pub(crate) inspections: Arc<Inspections>,
    /// What the guest's memory takes.
    pub(crate) account: Account,
}

/// One direction.
struct Lane {
    message: Message,
    /// The message is whole and being sent.
    sending: bool,
}

impl Lane {
    fn new() -> Self {
        Self { message: Message::new(), sending: false }
    }

    /// What to wait for on the socket it reads, and on the one it writes.
    fn wants(&self) -> (PollFlags, PollFlags) {
        let none = PollFlags::empty();
        if self.sending { (none, PollFlags::OUT) } else { (PollFlags::IN, none) }
    }
}

impl Relay {
    /// Forwards until the frontend is gone, the session is to end, or somebody misbehaves.
    pub(crate) fn run(mut self, hooks: &dyn Hooks) -> Result<(), RelayError> {
        wire::prepare(&self.front)?;
        self.back.set_nonblocking(true)?;
        let (mut to_back, mut to_front) = (Lane::new(), Lane::new());
        let (mut last, mut in_vain) = (0, 0);
        while let Some(readable) = self.wait(&to_back, &to_front)? {
            let before = to_back.message.received();
            let ended = self
                .pump_back(&mut to_back, hooks, &mut last)
                .and_then(|()| self.pump_front(&mut to_front, last));
            match ended {
                Ok(()) => {}
                Err(RelayError::Frontend(
                    WireError::Closed | WireError::Inspect(InspectError::Ended),
                )) => return Ok(()),
                Err(error) => return Err(error),
            }
            let in_vain_again = readable && to_back.message.received() == before;
            in_vain = if in_vain_again { in_vain + 1 } else { 0 };
            if in_vain > MOST_IN_VAIN {
                return Err(RelayError::Frontend(WireError::Unreadable));
            }
        }
        Ok(())
    }

    /// Waits until one of the lanes can go on, and says whether the frontend's side can be read. `None` if the
    /// session is to end.
    fn wait(&self, to_back: &Lane, to_front: &Lane) -> Result<Option<bool>, RelayError> {
        let (front_in, back_out) = to_back.wants();
        let (back_in, front_out) = to_front.wants();
        let mut fds = [
            PollFd::from_borrowed_fd(self.exit.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.front.as_fd(), front_in | front_out | PollFlags::PRI),
            PollFd::from_borrowed_fd(self.back.as_fd(), back_in | back_out),
            PollFd::from_borrowed_fd(self.memory.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(RelayError::Internal(error.into())),
        }
        let [exit, front, back, memory] = &fds;
        if !memory.revents().is_empty() {
            return Err(RelayError::MemoryLost);
        }
        // Who hung up while its message cannot be forwarded would wake us for ever.
        let hung_up = |side: &PollFd<'_>| side.revents().contains(PollFlags::HUP);
        let stuck = (hung_up(front) && to_back.sending) || (hung_up(back) && to_front.sending);
        if front.revents().contains(PollFlags::PRI) {
            return Err(RelayError::Frontend(WireError::Urgent));
        }
        let goes_on = exit.revents().is_empty() && !stuck;
        Ok(goes_on.then(|| front.revents().contains(PollFlags::IN)))
    }

    fn pump_back(
        &mut self,
        lane: &mut Lane,
        hooks: &dyn Hooks,
        last: &mut u32,
    ) -> Result<(), RelayError> {
        if !lane.sending {
            let guard = |bytes| self.admit(bytes);
            if !lane.message.receive(&self.front, Some(&guard)).map_err(RelayError::Frontend)? {
                return Ok(());
            }
            lane.message.rewind();
            lane.sending = true;
            *last = lane.message.request();
            self.look_at(&mut lane.message, hooks)?;
        }
        // A crate that closed its end is noticed by the other lane, behind its last reply.
        match lane.message.send(&self.back) {
            Ok(sent) => lane.sending = !sent,
            Err(WireError::Closed) => *lane = Lane::new(),
            Err(error) => return Err(RelayError::Internal(io::Error::other(error))),
        }
        Ok(())
    }

    fn pump_front(&self, lane: &mut Lane, last: u32) -> Result<(), RelayError> {
        if !lane.sending {
            // The crate closes its end when it is given something it does not accept.
            let refused = |_| RelayError::Refused { last };
            if !lane.message.receive(&self.back, None).map_err(refused)? {
                return Ok(());
            }
            lane.message.rewind();
            lane.sending = true;
            if lane.message.request() == FrontendReq::GET_MAX_MEM_SLOTS as u32 {
                lane.message.cap(self.account.most_regions());
            }
        }
        lane.sending = !lane.message.send(&self.front).map_err(RelayError::Frontend)?;
        Ok(())
    }

    /// Lets the descriptors that come with the frontend's next `bytes` bytes in, if nothing they lead to can make us wait.
    fn admit(&self, bytes: usize) -> Result<(), WireError> {
        for kind in self.inspections.inspect(self.front.as_fd(), bytes, &|| self.alive())? {
            if let Kind::Other(what) = kind {
                return Err(WireError::Foreign(what));
            }
        }
        Ok(())
    }

    /// What the crate has no hook for.
    fn look_at(&mut self, message: &mut Message, hooks: &dyn Hooks) -> Result<(), RelayError> {
        let request = message.request();
        if request == FrontendReq::SET_VRING_KICK as u32 {
            keep_kick(message, hooks, &|| self.alive())
        } else if request == FrontendReq::SET_VRING_CALL as u32 {
            self.copy_fd(message, hooks, VringFd::Call, "SET_VRING_CALL")
        } else if request == FrontendReq::SET_VRING_ERR as u32 {
            self.copy_fd(message, hooks, VringFd::Err, "SET_VRING_ERR")
        } else if request == FrontendReq::SET_VRING_ENABLE as u32 {
            if let Some((queue, on)) = pair(message) {
                if on == 0 { hooks.disable(queue, &|| self.alive()) } else { hooks.enable(queue) }
            }
            Ok(())
        } else if request == FrontendReq::SET_VRING_BASE as u32 {
            if let Some((queue, base)) = pair(message) {
                hooks.set_base(queue, base);
            }
            Ok(())
        } else if request == FrontendReq::SET_MEM_TABLE as u32 {
            self.account.replace(message)?;
            check_memory(message)
        } else if request == FrontendReq::ADD_MEM_REG as u32 {
            self.account.add(message)?;
            check_memory(message)
        } else if request == FrontendReq::REM_MEM_REG as u32 {
            self.account.remove(message);
            // Old frontends send one; it is to be closed without being used.
            message.fds.clear();
            Ok(())
        } else if message.fds.is_empty() {
            Ok(())
        } else {
            Err(RelayError::UnwantedFds { request, count: message.fds.len() })
        }
    }

    fn copy_fd(
        &self,
        message: &Message,
        hooks: &dyn Hooks,
        which: VringFd,
        name: &'static str,
    ) -> Result<(), RelayError> {
        let Some(queue) = vring_fd(message) else { return Ok(()) };
        let bad = |error| RelayError::BadFd { queue, message: name, error };
        let fd = match message.fds.first() {
            Some(fd) => Some(fd.try_clone().and_then(Notifier::new).map_err(bad)?),
            None => None,
        };
        hooks.vring_fd(queue, which, fd, &|| self.alive());
        Ok(())
    }

    /// Whether the frontend is still there and the session goes on. Does not wait.
    fn alive(&self) -> bool {
        let mut fds = [
            PollFd::from_borrowed_fd(self.exit.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.front.as_fd(), PollFlags::RDHUP),
        ];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready == 0)
    }
}

/// A payload of two `u32`s.
fn pair(message: &Message) -> Option<(u32, u32)> {
    (message.payload_len() == 8).then(|| (message.u32(wire::HEADER), message.u32(wire::HEADER + 4)))
}

/// The queue a message gives an fd, and whether it gives one. A message that says one thing and
/// carries another is left to the crate, which ends the session.
fn vring_fd(message: &Message) -> Option<u64> {
    let payload = message.payload_u64(0)?;
    (message.fds.len() <= 1).then_some(payload & VRING_INDEX_MASK)
}

fn keep_kick(
    message: &mut Message,
    hooks: &dyn Hooks,
    alive: &dyn Fn() -> bool,
) -> Result<(), RelayError> {
    let Some(queue) = vring_fd(message) else { return Ok(()) };
    let Some(kick) = message.fds.pop() else {
        hooks.vring_fd(queue, VringFd::Kick, None, alive);
        return Ok(());
    };
    let bad = |error| RelayError::BadFd { queue, message: "SET_VRING_KICK", error };
    let kick = Notifier::new(kick).map_err(bad)?;
    let silent = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    message.fds.push(silent.map_err(io::Error::from)?);
    hooks.vring_fd(queue, VringFd::Kick, Some(kick), alive);
    Ok(())
}

/// Refuses regions that reach past the end of their file. Regions need not be whole pages, and
/// the last page of a file can be touched as a whole.
fn check_memory(message: &Message) -> Result<(), RelayError> {
    for (region, fd) in message.fds.iter().enumerate() {
        // Both messages have eight bytes before their first region.
        let at = 8 + region * REGION_BYTES;
        let size = message.payload_u64(at + REGION_SIZE);
        let offset = message.payload_u64(at + REGION_OFFSET);
        let Some(end) = size.zip(offset).and_then(|(size, offset)| size.checked_add(offset)) else {
            continue;
        };
        let stat = fstat(fd).map_err(io::Error::from)?;
        let file = u64::try_from(stat.st_size).unwrap_or(0);
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if regular && file.checked_next_multiple_of(PAGE).is_some_and(|backed| end > backed) {
            return Err(RelayError::ShortMemory { region, end, size: file });
        }
        let page = page_size(fd.as_fd())? as u64;
        if page > PAGE && !end.is_multiple_of(page) {
            return Err(RelayError::PartOfHugePage { region, page });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
