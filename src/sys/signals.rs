// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lease's signal, read from a descriptor instead of handled (R1).

use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::{c_int, signalfd_siginfo};

const INFO: usize = size_of::<signalfd_siginfo>();

/// The real-time signal a lease break sends: it queues, and carries the descriptor.
#[must_use]
pub fn lease_signal() -> c_int {
    libc::SIGRTMIN() + 1
}

/// What arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseSignal {
    /// Somebody waits for the lease on this descriptor.
    Break(RawFd),
    /// A signal that names none: the queue overflowed (SIGIO), or a process sent it by hand.
    /// Every lease must be looked at.
    CheckAll,
}

/// Where lease breaks arrive. Non-blocking; readable when one is there.
#[derive(Debug)]
pub struct LeaseSignals {
    fd: OwnedFd,
}

/// Blocks the lease's signal and SIGIO in this thread and all it starts, and makes the
/// descriptor that reads them. To be called before any other thread exists: an unblocked SIGIO ends
/// the process.
///
/// # Errors
/// signalfd's.
pub fn block_lease_signals() -> io::Result<LeaseSignals> {
    let mut empty = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `empty` is a local with room for a sigset_t, which the call fills in.
    unsafe { libc::sigemptyset(empty.as_mut_ptr()) };
    // SAFETY: sigemptyset has just initialised all of it.
    let mut set = unsafe { empty.assume_init() };
    for signal in [lease_signal(), libc::SIGIO] {
        // SAFETY: `set` is an initialised local, and the number is a signal's.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: `set` is an initialised local that is only read; the old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: `set` is an initialised local that is only read; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made `fd` for us, and nothing else owns it.
    Ok(LeaseSignals { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
}

impl LeaseSignals {
    /// The next signal, if one is there.
    ///
    /// # Errors
    /// The read's.
    pub fn next(&self) -> io::Result<Option<LeaseSignal>> {
        let mut info = [0_u8; INFO];
        match rustix::io::read(&self.fd, &mut info) {
            Ok(INFO) => Ok(Some(parse(&info))),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsRawFd for LeaseSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn parse(info: &[u8; INFO]) -> LeaseSignal {
    let field = |at: usize| {
        let bytes = info.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, i32::from_ne_bytes)
    };
    let signal = field(offset_of!(signalfd_siginfo, ssi_signo));
    // Codes above 0 come from the kernel; kill(2) and sigqueue(3) cannot set them.
    let from_kernel = field(offset_of!(signalfd_siginfo, ssi_code)) > 0;
    if from_kernel && signal == lease_signal() {
        LeaseSignal::Break(field(offset_of!(signalfd_siginfo, ssi_fd)))
    } else {
        LeaseSignal::CheckAll
    }
}
