// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ctrl-C: the run in progress ends as an error does, so that everything is taken away on the way out.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn handler(_: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP are noted; the second one of a kind kills as usual.
pub(super) fn listen() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let action = libc::sigaction {
            sa_sigaction: handler as extern "C" fn(libc::c_int) as usize,
            // SAFETY: a signal set is plain data for which all zeros is the empty set.
            sa_mask: unsafe { std::mem::zeroed() },
            sa_flags: libc::SA_RESETHAND,
            sa_restorer: None,
        };
        // SAFETY: `action` lives across the call, which only reads it; the handler does nothing but store to an atomic.
        let result = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether there was such a signal.
pub(super) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// The error to end with if there was.
pub(super) fn check() -> io::Result<()> {
    if asked() { Err(io::Error::other("interrupted")) } else { Ok(()) }
}
