// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::cell::RefCell;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, fstat, memfd_create};

use super::*;
use crate::sys::inspect::{Inspections, Kind};

fn send_with(socket: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>, flags: SendFlags) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    assert_eq!(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).unwrap(), bytes.len());
}

/// The kernel hands an out-of-band byte out as an ordinary one as soon as there is a newer one, which the peer
/// sends between the look and the receiving.
#[test]
fn no_descriptor_is_received_that_was_not_looked_at() {
    let (peer, ours) = UnixStream::pair().unwrap();
    prepare(&ours).unwrap();
    let (foreign, _writer) = io::pipe().unwrap();
    let memory = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    send_with(&peer, b"\x05", foreign.as_fd(), SendFlags::OOB);
    send_with(&peer, &[0; 11], memory.as_fd(), SendFlags::empty());
    let inspections = Arc::new(Inspections::default());
    let seen = RefCell::new(Vec::new());
    let guard = |bytes| {
        seen.borrow_mut().extend(inspections.inspect(ours.as_fd(), bytes, &|| true)?);
        // Nothing but a newer one is asked for.
        rustix::net::send(&peer, b"x", SendFlags::OOB).map_err(io::Error::from)?;
        Ok(())
    };
    let mut message = Message::new();
    // All of the header, which says that there is no payload.
    while !message.receive(&ours, Some(&guard)).unwrap() && message.received() < 12 {}
    let inode = fstat(&foreign).unwrap().st_ino;
    let foreign_came = message.fds.iter().any(|fd| fstat(fd).unwrap().st_ino == inode);
    let foreign_seen = seen.borrow().iter().any(|kind| matches!(kind, Kind::Other(_)));
    assert!(foreign_seen || !foreign_came, "received without being looked at");
    assert!(foreign_seen, "{:?}", seen.borrow());
}

/// In line, a peek gives the byte with its descriptor, as the receiving does after it.
#[test]
fn an_out_of_band_byte_is_peeked_at_like_any_other() {
    let (peer, ours) = UnixStream::pair().unwrap();
    prepare(&ours).unwrap();
    let (foreign, _writer) = io::pipe().unwrap();
    send_with(&peer, b"H", foreign.as_fd(), SendFlags::OOB);
    let mut byte = [0; 12];
    assert!(matches!(peek(&ours, &mut byte).unwrap(), Peeked::Bytes(1, true)));
    let mut fds = Vec::new();
    let received = receive(&ours, &mut byte, &mut fds, None).unwrap();
    assert!(matches!(received, Received::Bytes(1)));
    let came = std::fs::File::from(fds.remove(0)).metadata().unwrap().ino();
    assert_eq!(came, fstat(&foreign).unwrap().st_ino);
}
