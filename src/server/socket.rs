// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Listening sockets: made in place of stale ones only, taken away only while they are ours.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::config::SocketOptions;
use crate::sys::process::{adopt, peer_pid};

/// Connections that may wait while a session drains.
const BACKLOG: i32 = 16;
/// How long another process may hold the directory's lock before we give up; it does a few system
/// calls under it.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// How long a process is given to let go of its socket that does not look killed.
const DEATH: Duration = Duration::from_secs(2);
/// How long one that does: a worker of its io_uring shares its descriptors, and may have a sync or a
/// zeroing to finish on a slow disk. As long as the image's lock is waited for (R1a).
const LAST_IO: Duration = Duration::from_secs(60);

/// Why there is no socket. One line, with the fix.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SocketError {
    #[error("socket in use: another process listens on {}; stop it or choose another path", path.display())]
    InUse { path: PathBuf },
    #[error("{} exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket { path: PathBuf },
    #[error("cannot {action} socket {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("--fd {fd}: {source}; the starting program must leave it open")]
    Inherit { fd: RawFd, source: io::Error },
    #[error("--fd {fd}: not a Unix stream socket")]
    WrongKind { fd: RawFd },
}

/// An inherited socket.
#[derive(Debug)]
pub(crate) enum Inherited {
    /// Frontends connect to it.
    Listening(Listener),
    /// One frontend is there already.
    Connected(UnixStream),
}

/// Takes over descriptor `fd` and sees what it is.
pub(crate) fn inherit(fd: RawFd) -> Result<Inherited, SocketError> {
    let failed = |source| SocketError::Inherit { fd, source };
    let socket = adopt(fd).map_err(failed)?;
    // Errors mean that it is no socket at all.
    let unix = socket_domain(&socket) == Ok(AddressFamily::UNIX);
    if !unix || socket_type(&socket) != Ok(SocketType::STREAM) {
        return Err(SocketError::WrongKind { fd });
    }
    if socket_acceptconn(&socket).map_err(|errno| failed(errno.into()))? {
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Inherited::Listening(Listener { listener, file: None }))
    } else {
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false).map_err(failed)?;
        Ok(Inherited::Connected(stream))
    }
}

/// Sees early whether a live socket is in the way. [`Listener::bind`] looks again.
///
/// A killed predecessor listens until it is gone, so its owner's end is waited for a moment: one
/// connection, because each is a frontend to a daemon that does live.
pub(crate) fn probe(path: &Path) -> Result<(), SocketError> {
    match state(path)? {
        State::Live(peer) if peer.as_ref().is_some_and(ends_soon) => match state(path)? {
            State::Live(_) => Err(SocketError::InUse { path: path.to_owned() }),
            State::Free | State::Stale => Ok(()),
        },
        State::Live(_) => Err(SocketError::InUse { path: path.to_owned() }),
        State::Free | State::Stale => Ok(()),
    }
}

/// Whether a process ends within [`DEATH`], or within [`LAST_IO`] if it has been killed.
fn ends_soon(process: &Process) -> bool {
    let start = Instant::now();
    loop {
        let timeout = Timespec::try_from(DEATH).ok();
        let mut ended = [PollFd::new(&process.fd, PollFlags::IN)];
        if rustix::event::poll(&mut ended, timeout.as_ref()).is_ok_and(|count| count > 0) {
            return true;
        }
        if !is_dying(process.pid) || start.elapsed() >= LAST_IO {
            return false;
        }
    }
}

/// Whether a process is on its way out: its first thread has ended, or has begun to.
fn is_dying(pid: Pid) -> bool {
    const PF_EXITING: u32 = 4;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, which comes before, may contain spaces and parentheses.
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let state = fields.next();
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u32>().ok()).unwrap_or(0);
    matches!(state, Some("Z" | "X")) || flags & PF_EXITING != 0
}

/// A non-blocking listening socket; its file goes with it.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: UnixListener,
    /// `None` for an inherited one: whoever made it removes it.
    file: Option<SocketFile>,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Makes and publishes a socket. Its permissions are in place before anybody can connect.
    pub(crate) fn bind(options: &SocketOptions) -> Result<Self, SocketError> {
        let path = &options.path;
        let failed = |action| {
            move |source: io::Error| SocketError::Io { action, path: path.clone(), source }
        };
        let _lock = lock_directory(path).map_err(failed("lock the directory of"))?;
        match state(path)? {
            State::Live(_) => return Err(SocketError::InUse { path: path.clone() }),
            State::Stale => std::fs::remove_file(path).map_err(failed("replace stale"))?,
            State::Free => {}
        }
        let socket = stream_socket().map_err(failed("make"))?;
        // The kernel gives the file the descriptor's mode less the umask: no moment with another
        // one, and no umask that other threads would see.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(io(failed("make")))?;
        let address = SocketAddrUnix::new(path).map_err(io(failed("bind")))?;
        rustix::net::bind(&socket, &address).map_err(io(failed("bind")))?;
        let listener = UnixListener::from(socket);
        match publish(options, &listener) {
            Ok(file) => Ok(Self { listener, file: Some(file) }),
            Err(error) => {
                // Nobody can have replaced it: the directory is still locked.
                let _ = std::fs::remove_file(path);
                Err(error)
            }
        }
    }

    /// The next frontend, if one waits.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                // It gave up before we came.
                io::ErrorKind::WouldBlock
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some(file) = &self.file else { return };
        // Without the lock somebody could replace the file between the look and the removal; if
        // it is not to be had, the file stays, stale.
        let Ok(_lock) = lock_directory(&file.path) else { return };
        let ours = std::fs::symlink_metadata(&file.path)
            .is_ok_and(|now| (now.dev(), now.ino()) == (file.device, file.inode));
        if ours {
            // Already gone is as good.
            let _ = std::fs::remove_file(&file.path);
        }
    }
}

/// Gives a bound socket its owner and mode, and opens it.
fn publish(options: &SocketOptions, listener: &UnixListener) -> Result<SocketFile, SocketError> {
    let path = &options.path;
    let failed = |action| move |source| SocketError::Io { action, path: path.clone(), source };
    let metadata = std::fs::symlink_metadata(path).map_err(failed("find"))?;
    if options.owner.is_some() || options.group.is_some() {
        let changed = rustix::fs::chown(path, options.owner, options.group);
        changed.map_err(io(failed("change the owner of")))?;
    }
    rustix::fs::chmod(path, Mode::from_raw_mode(options.mode))
        .map_err(io(failed("change the mode of")))?;
    rustix::net::listen(listener, BACKLOG).map_err(io(failed("listen on")))?;
    Ok(SocketFile { path: path.clone(), device: metadata.dev(), inode: metadata.ino() })
}

fn io<F: FnOnce(io::Error) -> SocketError>(failed: F) -> impl FnOnce(Errno) -> SocketError {
    move |errno| failed(errno.into())
}

enum State {
    Free,
    Stale,
    /// Somebody listens: the process, if it can be seen.
    Live(Option<Process>),
}

/// A process that is there, whatever becomes of its number.
struct Process {
    pid: Pid,
    fd: OwnedFd,
}

impl Process {
    fn open(pid: Pid) -> Option<Process> {
        let fd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(Process { pid, fd })
    }
}

/// What is at `path`. A socket nobody listens on refuses connections.
fn state(path: &Path) -> Result<State, SocketError> {
    let failed = |source| SocketError::Io { action: "look at", path: path.to_owned(), source };
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::Free),
        Err(error) => return Err(failed(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path.to_owned() });
    }
    let socket = stream_socket().map_err(failed)?;
    let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
    match rustix::net::connect(&socket, &address) {
        // A full backlog, or a socket of another kind, has an owner too.
        Err(Errno::AGAIN | Errno::PROTOTYPE) => Ok(State::Live(None)),
        Ok(()) => {
            let peer = peer_pid(socket.as_fd());
            Ok(State::Live(peer.and_then(Process::open)))
        }
        Err(Errno::CONNREFUSED) => Ok(State::Stale),
        Err(Errno::NOENT) => Ok(State::Free),
        Err(errno) => Err(failed(errno.into())),
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// A directory in which nobody else makes or removes sockets.
struct DirectoryLock {
    /// Closed, and so unlocked, before our next thread has its turn.
    _directory: File,
    _turn: Turn,
}

/// Two daemons that start at once must not both find the same socket stale and remove the
/// other's new one. The directory's own lock needs no file that would stay behind.
fn lock_directory(path: &Path) -> io::Result<DirectoryLock> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = File::open(parent.unwrap_or(Path::new(".")))?;
    let mut turn = turn(&directory)?;
    // However many want it, they wait so long together; after that each tries once, until as much time has passed again.
    let since = turn.filter(|since| since.elapsed() < 2 * LOCK_WAIT).unwrap_or_else(Instant::now);
    loop {
        match rustix::fs::flock(directory.as_fd(), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                *turn = None;
                return Ok(DirectoryLock { _directory: directory, _turn: turn });
            }
            Err(Errno::AGAIN) if since.elapsed() < LOCK_WAIT => {
                *turn = Some(since);
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// One of our threads' turn at a directory, and since when somebody else keeps all of them from it.
type Turn = MutexGuard<'static, Since>;
type Since = Option<Instant>;

/// The devices of one process take turns at a directory, however many they are. At another directory nobody has
/// to wait for them.
fn turn(directory: &File) -> io::Result<Turn> {
    static TURNS: Mutex<BTreeMap<(u64, u64), &'static Mutex<Since>>> = Mutex::new(BTreeMap::new());
    let metadata = directory.metadata()?;
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    // Kept for ever: a few bytes for each directory that has sockets.
    let turn: &'static Mutex<Since> =
        turns.entry((metadata.dev(), metadata.ino())).or_insert_with(|| Box::leak(Box::default()));
    drop(turns);
    Ok(turn.lock().unwrap_or_else(PoisonError::into_inner))
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
