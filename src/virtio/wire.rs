// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vhost-user messages on a socket: whole ones, with the fds that came along.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

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
    /// The socket failed.
    #[error("{0}")]
    Socket(#[from] io::Error),
}

/// A message on its way in or out.
#[derive(Debug)]
pub(crate) struct Message {
    bytes: [u8; HEADER + MAX_MSG_SIZE],
    /// Bytes received, and then bytes sent.
    at: usize,
    /// The fds that came with it and have not been sent on.
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// Nothing received yet.
    pub(crate) fn new() -> Self {
        Self { bytes: [0; HEADER + MAX_MSG_SIZE], at: 0, fds: Vec::new() }
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
    pub(crate) fn receive(&mut self, socket: &UnixStream) -> Result<bool, WireError> {
        loop {
            // Never past this message: the next one's fds would come along and be taken for ours.
            let need = self.len();
            if self.at == need && self.at >= HEADER {
                return Ok(true);
            }
            let at = self.at;
            let rest = self.bytes.get_mut(at..need).unwrap_or_default();
            match receive(socket, rest, &mut self.fds)? {
                Received::Nothing => return Ok(false),
                Received::End if at == 0 => return Err(WireError::Closed),
                Received::End => return Err(WireError::Partial { have: at, need }),
                Received::Bytes(count) => self.at += count,
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

enum Received {
    Nothing,
    End,
    Bytes(usize),
}

fn receive(
    socket: &UnixStream,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<Received, WireError> {
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
