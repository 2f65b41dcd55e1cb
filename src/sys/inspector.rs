// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A thread that never shares the images' descriptors, and the threads that are spawned from it.
//!
//! A new thread shares the descriptor table of the one that spawns it, and a table of its own
//! begins as a copy of that. The images' descriptors must not be in such a copy, not even for a
//! moment: closing a copy is a `close` for the filesystem (FUSE_FLUSH, write-back on NFS), and a
//! thread that hangs in it would hold the image. So one thread leaves the process's table before
//! an image is opened, and keeps nothing but the standard descriptors and one end of a socket
//! pair, over which it is sent what the threads need that it spawns.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::Builder;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// The stack of these threads.
const STACK: usize = 128 << 10;
/// The first descriptor after the standard ones.
const FIRST: RawFd = 3;

/// What a thread does with the descriptor that it was to be given.
type Work = Box<dyn FnOnce(io::Result<OwnedFd>) + Send>;

/// The way to the thread. It lives as long as the process.
#[derive(Debug)]
struct Inspector {
    /// The descriptors go here, in the order of the work.
    channel: OwnedFd,
    work: Sender<Work>,
}

static INSPECTOR: Mutex<Option<Inspector>> = Mutex::new(None);

/// Starts the thread, if it is not there yet. A process that opens images calls this before.
///
/// # Errors
/// There is no descriptor, no thread, or no `close_range(2)` (Linux 5.9).
pub fn start() -> io::Result<()> {
    with(|_| Ok(()))
}

/// Does `work` in a thread whose descriptor table has nothing in it but the standard ones and a
/// duplicate of `fd`. Does not wait for it.
pub(super) fn spawn(fd: BorrowedFd<'_>, work: Work) -> io::Result<()> {
    with(|inspector| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&inspector.channel, &[IoSlice::new(&[0])], &mut control, flags)?;
        inspector.work.send(work).map_err(|_| io::Error::other("the inspector has ended"))
    })
}

/// Calls `use_it` while no other thread does, so that descriptors and work keep their order.
fn with<T>(use_it: impl FnOnce(&Inspector) -> io::Result<T>) -> io::Result<T> {
    let mut inspector = INSPECTOR.lock().unwrap_or_else(PoisonError::into_inner);
    if inspector.is_none() {
        *inspector = Some(begin()?);
    }
    inspector.as_ref().map_or_else(|| Err(io::Error::other("no inspector")), use_it)
}

fn begin() -> io::Result<Inspector> {
    let kind = (AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    let (channel, theirs) = socketpair(kind.0, kind.1, kind.2, None)?;
    let (work, orders) = mpsc::channel();
    let (ready, is_ready) = mpsc::channel();
    let number = theirs.as_raw_fd();
    let run = move || match unshare() {
        Ok(()) => {
            // What is closed from now on is closed for this thread only.
            let _ = ready.send(Ok(()));
            if let Ok(channel) = keep_only(number) {
                serve(&channel, &orders);
            }
        }
        Err(error) => drop(ready.send(Err(error))),
    };
    Builder::new().name("inspector".to_owned()).stack_size(STACK).spawn(run)?;
    is_ready.recv().map_err(|_| io::Error::other("the inspector has ended"))??;
    // Ours of the number; the thread's is in its own table now.
    drop(theirs);
    Ok(Inspector { channel, work })
}

fn serve(channel: &OwnedFd, orders: &Receiver<Work>) {
    while let Ok(work) = orders.recv() {
        let fd = match receive(channel) {
            Ok(fd) => fd,
            Err(error) => {
                work(Err(error));
                continue;
            }
        };
        let number = fd.as_raw_fd();
        let (left, has_left) = mpsc::channel::<()>();
        let run = move || {
            let fd = unshare().and_then(|()| keep_only(number));
            drop(left);
            work(fd);
        };
        // Without a thread the work is dropped, which those who wait for it notice.
        if Builder::new().name("inspect".to_owned()).stack_size(STACK).spawn(run).is_ok() {
            // The descriptor must be there until the new thread has its copy. Always an error.
            let _ = has_left.recv();
        }
        drop(fd);
    }
}

fn receive(channel: &OwnedFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::io::retry_on_intr(|| {
        recvmsg(channel, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)
    })?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    // Without one, this process has as many descriptors as it may have.
    fds.last().ok_or_else(|| io::Error::from_raw_os_error(libc::EMFILE))
}

/// Gives this thread a descriptor table of its own, a copy of the one it shared.
fn unshare() -> io::Result<()> {
    // Nothing is open there, so nothing is closed. unshare(2) would do the same, but sandboxes
    // tend to forbid it.
    close_range(RawFd::MAX, RawFd::MAX, libc::CLOSE_RANGE_UNSHARE)
}

/// Closes everything but `number` and the standard descriptors in this thread's own table, and
/// takes over `number`, which no object of this thread owns yet.
fn keep_only(number: RawFd) -> io::Result<OwnedFd> {
    if number > FIRST {
        close_range(FIRST, number - 1, 0)?;
    }
    close_range(number.saturating_add(1), RawFd::MAX, 0)?;
    super::process::adopt(number)
}

fn close_range(first: RawFd, last: RawFd, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: it takes numbers only. Nothing that another thread owns is closed: with the flag,
    // which comes first, the range is empty and this thread gets a table of its own; from then on
    // numbers are those of that table, of which no object owns any.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::path::PathBuf;

    use super::*;

    /// What this thread has open, but for the directory that says so.
    fn open_files() -> Vec<PathBuf> {
        let entries = std::fs::read_dir("/proc/thread-self/fd").unwrap();
        let links = entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        links.filter(|link| !link.starts_with("/proc")).collect()
    }

    #[test]
    fn such_a_thread_has_one_descriptor_and_this_process_keeps_its_own() {
        start().unwrap();
        let image = tempfile::tempfile().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let before = open_files();
        for _ in 0..3 {
            let (tell, told) = mpsc::channel();
            let work = move |fd: io::Result<OwnedFd>| {
                let open = open_files();
                let mine = open.iter().filter(|link| link.to_string_lossy().starts_with("pipe:"));
                let pipes = mine.count();
                let standard: Vec<_> = (0..3)
                    .filter_map(|fd| std::fs::read_link(format!("/proc/thread-self/fd/{fd}")).ok())
                    .collect();
                let pipes_there =
                    standard.iter().filter(|link| link.to_string_lossy().starts_with("pipe:"));
                let more = pipes - pipes_there.count();
                tell.send((fd.is_ok(), open.len() - standard.len(), more)).unwrap();
            };
            spawn(reader.as_fd(), Box::new(work)).unwrap();
            assert_eq!(told.recv().unwrap(), (true, 1, 1));
        }
        assert_eq!(open_files(), before);
        drop((image, writer));
    }
}
