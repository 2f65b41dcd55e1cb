// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user messages on a socket: whole ones, with the fds that came along.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::sockopt::set_socket_oobinline;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

use crate::sys::inspect::InspectError;

/// Bytes of a message's header: request, flags, payload size; native byte order.
pub(crate) const HEADER: usize = 12;

/// What went wrong with a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// The peer closed it between two messages.
    #[error("closed")]
    Closed,
    /// The peer closed it inside a message.
    #[error("closed after {have} of {need} bytes of a message")]
    Partial {
        /// Bytes received.
        have: usize,
        /// Bytes of the message.
        need: usize,
    },
    /// A payload larger than any message has.
    #[error("message {request} with a payload of {bytes} bytes")]
    TooBig {
        /// The request's number.
        request: u32,
        /// The payload's size.
        bytes: u32,
    },
    /// More fds than any message has.
    #[error("too many file descriptors with a message")]
    TooManyFds,
    /// A descriptor that may hold up whatever touches it.
    #[error(
        "it sent a file descriptor that is {0}: guest memory must be a memfd (QEMU: -object memory-backend-memfd,share=on), or a regular file on tmpfs, hugetlbfs, ext4, XFS, btrfs or another local filesystem that this process or the frontend's has mounted; notifications must be eventfds"
    )]
    Foreign(String),
    /// Bytes that no message has.
    #[error("it sent out-of-band data (MSG_OOB), which no vhost-user message has")]
    Urgent,
    /// A wake-up after the other, and never a byte.
    #[error("its socket is readable again and again, and nothing can be received")]
    Unreadable,
    /// Descriptors that could not be looked at.
    #[error("{0}")]
    Inspect(#[from] InspectError),
    /// The socket failed.
    #[error("{0}")]
    Socket(#[from] io::Error),
}

/// Makes a socket ready that leads to a peer that is not trusted; to be called before anything is received from it.
///
/// Peeking passes over an out-of-band byte, which may carry descriptors, and receiving gives it out as soon as a newer one has
/// come, with descriptors that were not looked at. In line it is a byte like any other.
pub(crate) fn prepare(socket: &UnixStream) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    Ok(set_socket_oobinline(socket, true)?)
}

/// A message on its way in or out.
#[derive(Debug)]
pub(crate) struct Message {
    bytes: [u8; HEADER + MAX_MSG_SIZE],
    /// Bytes received, and then bytes sent.
    at: usize,
    /// Bytes received, of earlier messages too.
    received: u64,
    /// The fds that came with it and have not been sent on.
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// Nothing received yet.
    pub(crate) fn new() -> Self {
        Self { bytes: [0; HEADER + MAX_MSG_SIZE], at: 0, received: 0, fds: Vec::new() }
    }

    /// How many bytes have been received, those of earlier messages included.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// The request's number.
    pub(crate) fn request(&self) -> u32 {
        self.u32(0)
    }

    /// The `u32` of the whole message at byte `at`; 0 past its end.
    pub(crate) fn u32(&self, at: usize) -> u32 {
        self.field(at).map_or(0, u32::from_ne_bytes)
    }

    /// The `u64` of the payload at byte `at`; `None` past its end.
    pub(crate) fn payload_u64(&self, at: usize) -> Option<u64> {
        let inside = at.checked_add(8)? <= self.payload_len();
        self.field(HEADER + at).filter(|_| inside).map(u64::from_ne_bytes)
    }

    /// Lowers a payload that is one number to `most`.
    pub(crate) fn cap(&mut self, most: u64) {
        if self.payload_len() == 8
            && let Some(number) = self.payload_u64(0)
            && let Some(place) = self.bytes.get_mut(HEADER..HEADER + 8)
        {
            place.copy_from_slice(&number.min(most).to_ne_bytes());
        }
    }

    /// Bytes of payload, as the header says.
    pub(crate) fn payload_len(&self) -> usize {
        usize::try_from(self.u32(8)).unwrap_or(usize::MAX)
    }

    fn field<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.bytes.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    /// Bytes of the whole message, as far as is known yet.
    fn len(&self) -> usize {
        if self.at < HEADER { HEADER } else { HEADER.saturating_add(self.payload_len()) }
    }

    /// Receives what is there. True once the message is whole; call [`rewind`](Self::rewind) then.
    ///
    /// Where the peer is not trusted, `guard` is asked before descriptors are received: it is given the number of bytes
    /// that they come with.
    pub(crate) fn receive(
        &mut self,
        socket: &UnixStream,
        guard: Option<&Guard<'_>>,
    ) -> Result<bool, WireError> {
        loop {
            // Never past this message: the next one's fds would come along and be taken for ours.
            let need = self.len();
            if self.at == need && self.at >= HEADER {
                return Ok(true);
            }
            let at = self.at;
            let rest = self.bytes.get_mut(at..need).unwrap_or_default();
            match receive(socket, rest, &mut self.fds, guard)? {
                Received::Nothing => return Ok(false),
                Received::End if at == 0 => return Err(WireError::Closed),
                Received::End => return Err(WireError::Partial { have: at, need }),
                Received::Bytes(count) => {
                    self.at += count;
                    self.received += count as u64;
                }
            }
            if self.at >= HEADER && self.payload_len() > MAX_MSG_SIZE {
                return Err(WireError::TooBig { request: self.request(), bytes: self.u32(8) });
            }
        }
    }

    /// A whole message will be sent from its first byte on.
    pub(crate) fn rewind(&mut self) {
        self.at = 0;
    }

    /// Sends what the socket takes. True once everything is sent; the message is empty then.
    pub(crate) fn send(&mut self, socket: &UnixStream) -> Result<bool, WireError> {
        let need = HEADER.saturating_add(self.payload_len());
        while self.at < need {
            let rest = self.bytes.get(self.at..need).unwrap_or_default();
            let Some(count) = send(socket, rest, &self.fds)? else { return Ok(false) };
            // The fds went with the first byte.
            self.fds.clear();
            self.at += count;
        }
        self.at = 0;
        Ok(true)
    }
}

/// What decides on descriptors that come with so many bytes.
pub(crate) type Guard<'a> = dyn Fn(usize) -> Result<(), WireError> + 'a;

enum Peeked {
    Nothing,
    End,
    /// So many bytes are there, and whether descriptors come with them.
    Bytes(usize, bool),
}

/// What can be received, without receiving it.
fn peek(socket: &UnixStream, into: &mut [u8]) -> Result<Peeked, WireError> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    // Without room for descriptors the kernel only says that there are some.
    let mut none = RecvAncillaryBuffer::default();
    let got = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(into)], &mut none, flags) {
            Ok(got) => break got,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Peeked::Nothing),
            Err(Errno::CONNRESET) => return Ok(Peeked::End),
            Err(error) => return Err(WireError::Socket(error.into())),
        }
    };
    let carries_fds = got.flags.contains(ReturnFlags::CTRUNC);
    Ok(if got.bytes == 0 { Peeked::End } else { Peeked::Bytes(got.bytes, carries_fds) })
}

enum Received {
    Nothing,
    End,
    Bytes(usize),
}

fn receive(
    socket: &UnixStream,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    guard: Option<&Guard<'_>>,
) -> Result<Received, WireError> {
    let mut into = into;
    if let Some(guard) = guard {
        let (bytes, carries_fds) = match peek(socket, into)? {
            Peeked::Bytes(bytes, carries_fds) => (bytes, carries_fds),
            Peeked::Nothing => return Ok(Received::Nothing),
            Peeked::End => return Ok(Received::End),
        };
        if carries_fds {
            guard(bytes)?;
        }
        // No more than was peeked at: other descriptors may have arrived behind it.
        into = into.get_mut(..bytes).unwrap_or_default();
    }
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags) {
            Ok(got) => break got,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Received::Nothing),
            Err(Errno::CONNRESET) => return Ok(Received::End),
            Err(error) => return Err(WireError::Socket(error.into())),
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_ATTACHED_FD_ENTRIES {
        return Err(WireError::TooManyFds);
    }
    Ok(if got.bytes == 0 { Received::End } else { Received::Bytes(got.bytes) })
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> Result<Option<usize>, WireError> {
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(WireError::TooManyFds);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(count) => return Ok(Some(count)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(WireError::Closed),
            Err(error) => return Err(WireError::Socket(error.into())),
        }
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
