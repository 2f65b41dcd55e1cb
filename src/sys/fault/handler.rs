// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SIGBUS handler. What it calls is async-signal-safe: atomics, `mmap`, `write`, `sigaction`, `raise`.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use libc::{c_int, c_void, siginfo_t};

use super::{SINGLE_PAGES, find};

/// Installs the handler, once in the life of the process, and lets this thread and those it will make receive the signal:
/// a SIGBUS that is blocked kills at once.
///
/// # Errors
/// The kernel's.
pub fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let code = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    let installed = INSTALLED.get_or_init(|| unblock().and_then(|()| handle()).map_err(code));
    installed.map_err(io::Error::from_raw_os_error)
}

fn unblock() -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is a local with room for a sigset_t, which the call fills in.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset has just initialised all of it.
    let mut set = unsafe { set.assume_init() };
    // SAFETY: `set` is an initialised local, and the number is a signal's.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGBUS) };
    // SAFETY: `set` is an initialised local that is only read; the old mask is not asked for.
    let error =
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

fn handle() -> io::Result<()> {
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigbus;
    // On the alternate stack that Rust gives its threads, where there is one.
    let flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    act(handler as *const () as usize, flags)
}

/// Sets the action for SIGBUS. Async-signal-safe.
fn act(handler: usize, flags: c_int) -> io::Result<()> {
    let action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: it consists of numbers and of an optional function, for all of which zero is a value.
    let mut action = unsafe { action.assume_init() };
    (action.sa_sigaction, action.sa_flags) = (handler, flags);
    // SAFETY: `action` is an initialised local that is only read, and its handler has the type that its flags announce.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    let errno = Errno::save();
    // SAFETY: the kernel passes a siginfo_t that lives until the handler returns.
    let Some(info) = (unsafe { info.as_ref() }) else { return };
    let code = info.si_code;
    // SAFETY: for a SIGBUS with a positive code the address is set; with another one these bytes are not used.
    let address = unsafe { info.si_addr() }.addr();
    match code {
        // What a file does not back, and a page whose memory has failed: the guest has lost it either way, and its VMM
        // is told by the kernel as we are.
        libc::BUS_ADRERR | libc::BUS_MCEERR_AR if replace(address) => {}
        // Memory that has failed and that nobody has touched yet: when somebody does, the kernel says so again.
        libc::BUS_MCEERR_AO if find(address).is_some() => {}
        _ => die(signal, code),
    }
    errno.restore();
}

/// Puts zeros in place of a missing part of guest memory; false if it is none.
fn replace(address: usize) -> bool {
    let Some((table, area)) = find(address) else { return false };
    // First of all: another thread may read the zeros as soon as they are there, and must find this set then.
    let first = !table.lost.swap(true, Ordering::SeqCst);
    let whole = table.replaced.fetch_add(1, Ordering::Relaxed) >= SINGLE_PAGES;
    // The kernel may refuse the one for its size (overcommit_memory=2), and the other for how many mappings there are.
    if !put_zeros(area.hole(address, whole)) && !put_zeros(area.hole(address, !whole)) {
        return false;
    }
    if first {
        let (bell, one) = (table.bell.load(Ordering::Acquire), 1_u64);
        // SAFETY: `one` is a local of eight bytes. The descriptor is the eventfd of the session whose memory this thread
        // is touching, so it is open; a counter at its maximum is readable already.
        unsafe { libc::write(bell, (&raw const one).cast(), size_of::<u64>()) };
    }
    true
}

fn put_zeros((start, len): (usize, usize)) -> bool {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // Shared, though with nobody: a private mapping counts as data of this process, all of it at once, and under RLIMIT_DATA
    // nothing else could be allocated any more.
    let flags = libc::MAP_FIXED | libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let at = ptr::with_exposed_provenance_mut(start);
    // SAFETY: the pages are part of a mapping of guest memory that is registered, and so held by its session; this thread
    // is touching it. Whatever else uses it expects its bytes to change at any time, and unmapping it later takes these
    // pages as well.
    let mapped = unsafe { libc::mmap(at, len, access, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}

/// What the signal does to a process that does not handle it.
fn die(signal: c_int, code: c_int) {
    if act(libc::SIG_DFL, 0).is_err() {
        // SAFETY: it takes nothing and does not return.
        unsafe { libc::abort() };
    }
    if code <= 0 || code == libc::BUS_MCEERR_AO {
        // No instruction will fault again when the handler returns. It is delivered then.
        // SAFETY: it takes a number only.
        unsafe { libc::raise(signal) };
    }
}

/// The interrupted code's `errno`.
struct Errno(*mut c_int, c_int);

impl Errno {
    fn save() -> Self {
        // SAFETY: it takes nothing, and gives the address of this thread's own.
        let place = unsafe { libc::__errno_location() };
        // SAFETY: `place` is this thread's errno, which lives as long as the thread.
        Self(place, unsafe { place.read() })
    }

    fn restore(self) {
        // SAFETY: as in `save`; the handler runs on one thread from its beginning to its end.
        unsafe { self.0.write(self.1) };
    }
}
