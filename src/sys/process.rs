// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the process is given from outside: signals, as a descriptor, inherited descriptors, how many
//! there may be, and the processes it meets.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::c_int;
use rustix::process::{Pid, Resource, getrlimit, setrlimit};
use vmm_sys_util::signal::{block_signal, create_sigset};

/// Signals that are blocked and read from a descriptor instead.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks `numbers` in this thread and the threads it will make, and opens a descriptor for
    /// them. To be called before any other thread exists.
    ///
    /// # Errors
    /// A number is not a signal's, or no descriptor is left.
    pub fn block(numbers: &[c_int]) -> io::Result<Self> {
        for &number in numbers {
            block_signal(number).map_err(|error| io::Error::other(format!("{error:?}")))?;
        }
        let set = create_sigset(numbers)?;
        // SAFETY: `set` is a sigset_t on this stack that outlives the call, and the kernel only
        // reads it.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was made by the line above and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// The number of the next signal, without waiting.
    #[must_use]
    pub fn next(&self) -> Option<c_int> {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        let read = rustix::io::read(&self.fd, &mut info[..]).ok()?;
        // The structure begins with the number; a signal is read whole or not at all.
        let number = info.first_chunk().copied().filter(|_| read == info.len())?;
        Some(i32::from_ne_bytes(number))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Ends this process now: no destructor, no handler, no lock of a thread that may never give it back.
pub fn end_process(status: c_int) -> ! {
    // SAFETY: _exit takes a number and touches no memory of ours; what other threads are doing ends with them.
    unsafe { libc::_exit(status) }
}

/// Takes over an inherited descriptor and keeps it from being inherited further.
///
/// The caller promises that nothing else in the process uses the number; the daemon asks once,
/// before it opens anything of its own.
///
/// # Errors
/// `EBADF`: there is no such descriptor.
pub fn adopt(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer; for a number that is no descriptor it fails with EBADF.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, as just seen, and was inherited: no object of this process
    // owns it, since it is taken over once, before any other descriptor is opened.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// The process at the other end of a connected Unix socket, for a listener the one that made it
/// listen. `None` if it is in a pid namespace that is not ours.
#[must_use]
pub fn peer_pid(socket: BorrowedFd<'_>) -> Option<Pid> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of_val(&peer)).ok()?;
    // SAFETY: `peer` and `len` live across the call and are ours alone; the kernel writes at most
    // `len` bytes, the size of `peer`, into it. Rustix's wrapper knows no pid 0, which is what a
    // process of another namespace has.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if done == 0 { Pid::from_raw(peer.pid) } else { None }
}

/// Whether two threads of our pid namespace, by their numbers, have one table of descriptors.
///
/// # Errors
/// kcmp's: EPERM without ptrace access to both, ESRCH, ENOSYS where the kernel is built without it.
pub fn share_descriptors(one: u32, other: u32) -> io::Result<bool> {
    /// KCMP_FILES of linux/kcmp.h.
    const FILES: c_int = 2;
    // SAFETY: a comparison of this type takes numbers only.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, FILES, 0_usize, 0_usize) };
    if order < 0 { Err(io::Error::last_os_error()) } else { Ok(order == 0) }
}

/// Takes as many descriptors as the administrator allows: several devices may need more than the 1024 that
/// are the custom, for the sake of programs that cannot name more, and those do not run in here.
pub fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Left as it is, it may do; if not, what finds no descriptor says so.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Makes peeks at a socket begin at byte `offset` of what is queued (SO_PEEK_OFF).
#[cfg(test)]
pub(crate) fn set_peek_offset(socket: BorrowedFd<'_>, offset: c_int) -> io::Result<()> {
    // SAFETY: `offset` is on this stack and outlives the call, which reads as many bytes of it as it has.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            libc::socklen_t::try_from(size_of_val(&offset)).unwrap_or(0),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn a_blocked_signal_is_read_from_the_descriptor() {
        let signals = Signals::block(&[libc::SIGUSR1]).unwrap();
        assert_eq!(signals.next(), None);
        let process = std::process::id();
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        // To the thread, not the process: the other tests' threads do not block the signal.
        // SAFETY: tgkill takes numbers only, and both name this thread.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR1) };
        assert_eq!(sent, 0);
        assert_eq!(signals.next(), Some(libc::SIGUSR1));
        assert_eq!(signals.next(), None);
    }

    #[test]
    fn only_an_open_descriptor_is_adopted() {
        assert_eq!(adopt(100_000).unwrap_err().raw_os_error(), Some(libc::EBADF));
        let (mine, mut other) = io::pipe().unwrap();
        let number = OwnedFd::from(mine).into_raw_fd();
        let mine = adopt(number).unwrap();
        io::Write::write_all(&mut other, b"x").unwrap();
        assert_eq!(rustix::io::read(&mine, &mut [0_u8; 4][..]).unwrap(), 1);
    }

    #[test]
    fn threads_share_descriptors_and_processes_do_not() {
        let process = std::process::id();
        let thread = std::thread::spawn(move || {
            let thread = rustix::thread::gettid().as_raw_nonzero().get();
            share_descriptors(process, u32::try_from(thread).unwrap())
        });
        match thread.join().unwrap() {
            Ok(shared) => assert!(shared),
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => return,
            Err(error) => panic!("{error}"),
        }
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let shared = share_descriptors(process, child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!shared.unwrap());
    }

    #[test]
    fn the_peer_of_our_own_socket_is_us() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(peer_pid(one.as_fd()), Some(rustix::process::getpid()));
        let (pipe, _end) = io::pipe().unwrap();
        assert_eq!(peer_pid(pipe.as_fd()), None);
    }
}
