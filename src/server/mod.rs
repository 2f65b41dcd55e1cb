// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main loop: signals, frontends, the control socket, the keeper's events and its time, all
//! in one thread that never waits for anything but its epoll set.
//!
//! ```text
//! signals ─┐                        ┌─► session (queue threads)
//! listener ┤                        ├─► helper thread (FIEMAP, fsync, punch)
//! control ─┼─► Server ◄─► Keeper ───┼─► mtime thread
//! inbox ───┤                        └─► lease
//! timer ───┘
//! ```

mod clients;
mod describe;
mod device;
mod door;
mod events;
mod front;
mod helper;
mod log;
mod owner;
mod poll;
mod populate;
mod socket;
mod watch;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tracing::{info, warn};

use crate::config::{Config, Endpoint, Mode};
use crate::engine::Rules;
use crate::engine::shared::Shared;
use crate::image::{Image, ModeChoice, OpenError, Options};
use crate::inbox::{Inbox, Poster, inbox};
use crate::sys::process::Signals;
use crate::sys::signals::LeaseSignals;
use crate::virtio::session::DeviceConfig;

use clients::Clients;
use describe::reason;
use door::Door;
use front::Front;
use helper::Task;
pub use log::start_log;
use owner::Owner;
use poll::{Interest, Poll, Timer, now};
use populate::Loading;
pub use socket::SocketError;
use socket::{Inherited, Listener};
use watch::InodeWatch;

/// Longest that the first decision on the mode is waited for: a process that opens the image again
/// and again could put it off forever.
const SETTLE: Duration = Duration::from_secs(10);
/// The same with `--mode direct`, where giving up is an error: time for a page cache full of the
/// image to be written.
const SETTLE_DIRECT: Duration = Duration::from_secs(120);
/// Longest that the end waits for the filesystem.
const LAST_SYNC: Duration = Duration::from_secs(10);

/// Why the daemon did not start, or ended. One line.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ServeError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("--mode direct is not to be had: {reason}")]
    NotDirect { reason: String },
    #[error(
        "--populate all: the image has {count} extents, more than --max-extents {cap}: raise that to {count} or more (17 bytes of memory each), or use --populate lazy"
    )]
    TooManyExtents { count: u64, cap: usize },
    #[error("no session over --fd: {source}")]
    Session { source: io::Error },
    #[error("cannot {action}: {source}")]
    Io { action: &'static str, source: io::Error },
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> ServeError {
    move |source| ServeError::Io { action, source }
}

/// The signals this process reads; blocked before any thread exists.
#[derive(Debug)]
pub struct AllSignals {
    /// SIGTERM and SIGINT.
    pub stop: Signals,
    /// The lease's (R1).
    pub lease: LeaseSignals,
}

impl AllSignals {
    /// Blocks them. SIGPIPE is ignored already: Rust's runtime does it before `main`.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn block() -> io::Result<Self> {
        Ok(Self {
            stop: Signals::block(&[libc::SIGTERM, libc::SIGINT])?,
            lease: crate::sys::signals::block_lease_signals()?,
        })
    }
}

/// How far the daemon is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// The keeper decides on the mode, until then at the latest.
    Starting { until: Duration },
    /// The map is too large to be loaded; by how much is being found out.
    Counting,
    /// Frontends are served.
    Serving,
    /// The last session drains.
    Draining,
    /// What was written is made durable, until then at the latest.
    Syncing { until: Duration },
    /// Nothing is left to do.
    Over,
}

/// The daemon's main thread.
struct Server<'a> {
    config: &'a Config,
    image: Arc<Image>,
    device: Arc<DeviceConfig>,
    poll: Poll,
    timer: Timer,
    signals: AllSignals,
    inbox: Inbox,
    watch: InodeWatch,
    owner: Owner,
    front: Option<Front>,
    clients: Option<Clients>,
    phase: Phase,
    loading: Loading,
    /// The end was asked for.
    stop: bool,
    unlinked: bool,
    /// What came of the last sync.
    synced: io::Result<()>,
    started: Duration,
}

/// Serves until told to stop.
///
/// # Errors
/// Why it could not start, or had to end.
pub fn run(config: &Config, signals: AllSignals) -> Result<(), ServeError> {
    run_under(config, Rules::default(), signals)
}

/// The same under other rules, which only a build with the feature `mutants` can make: a daemon that
/// breaks one shows whether a test on real disks notices.
///
/// # Errors
/// As [`run`].
pub fn run_under(config: &Config, rules: Rules, signals: AllSignals) -> Result<(), ServeError> {
    // A descriptor's number is only known to be the inherited one before others are opened.
    let inherited = match &config.endpoint {
        Endpoint::Fd(fd) => Some(socket::inherit(*fd)?),
        Endpoint::Path(options) => {
            // Opening the image would break the lease of the daemon that listens there.
            socket::probe(&options.path)?;
            None
        }
    };
    let (inbox, poster) = inbox().map_err(failed("make an event descriptor"))?;
    let Some(image) = open_image(config, &signals.stop)? else { return Ok(()) };
    let mut server = Server::new(config, rules, image, signals, (inbox, poster))?;
    server.serve(inherited)?;
    server.finish()
}

/// Opens the image; `None` if told to stop meanwhile. It may wait for the last writes of a killed
/// predecessor (R1a), so it has a thread of its own.
fn open_image(config: &Config, stop: &Signals) -> Result<Option<Arc<Image>>, ServeError> {
    const OPENED: u64 = 0;
    const STOPPED: u64 = 1;
    let options = image_options(config);
    let (opened, end) = io::pipe().map_err(failed("make a pipe"))?;
    let thread = thread::Builder::new().name("open".to_owned()).spawn(move || {
        // Closed when the image is open, or not to be opened.
        let _end = end;
        Image::open(&options)
    });
    let thread = thread.map_err(failed("start a thread"))?;
    let watch = failed("watch descriptors");
    let poll = Poll::new().map_err(&watch)?;
    poll.add(&opened, OPENED, Interest::Nothing).map_err(&watch)?;
    poll.add(stop, STOPPED, Interest::Read).map_err(&watch)?;
    let mut tokens = Vec::new();
    while tokens.is_empty() {
        poll.wait(&mut tokens).map_err(failed("wait for events"))?;
    }
    if tokens.contains(&STOPPED) {
        info!("told to stop");
        return Ok(None);
    }
    match thread.join() {
        Ok(image) => Ok(Some(Arc::new(image?))),
        Err(_) => Err(failed("open the image")(io::Error::other("its thread panicked"))),
    }
}

fn image_options(config: &Config) -> Options {
    Options {
        path: config.blk_file.clone(),
        read_only: config.read_only,
        mode: match config.mode {
            Mode::Auto => ModeChoice::Auto,
            Mode::Direct => ModeChoice::Direct,
            Mode::Filesystem => ModeChoice::Filesystem,
        },
        offset: config.offset,
        size_limit: config.size_limit,
        format_raw: config.format_raw,
        block_size: config.block_size,
        unmap: config.unmap,
    }
}

impl<'a> Server<'a> {
    fn new(
        config: &'a Config,
        rules: Rules,
        image: Arc<Image>,
        signals: AllSignals,
        (inbox, poster): (Inbox, Poster),
    ) -> Result<Self, ServeError> {
        let started = now();
        let shared = Arc::new(Shared::new());
        let device =
            Arc::new(device::describe(config, rules, &image, Arc::clone(&shared), poster.clone()));
        let owner = Owner::new(&image, rules, shared, config, poster, started)
            .map_err(failed("start a thread"))?;
        let watch = image.watch().map_err(failed("watch the image"))?;
        let poll = Poll::new().map_err(failed("make an epoll set"))?;
        let timer = Timer::new().map_err(failed("make a timer"))?;
        let settle = if config.mode == Mode::Direct { SETTLE_DIRECT } else { SETTLE };
        let mut server = Self {
            config,
            image,
            device,
            poll,
            timer,
            signals,
            inbox,
            watch: InodeWatch::new(watch),
            owner,
            front: None,
            clients: None,
            phase: Phase::Starting { until: started + settle },
            loading: Loading::default(),
            stop: false,
            unlinked: false,
            synced: Ok(()),
            started,
        };
        server.register().map_err(failed("watch descriptors"))?;
        Ok(server)
    }

    fn register(&mut self) -> io::Result<()> {
        self.poll.add(&self.signals.stop, events::STOP, Interest::Read)?;
        self.poll.add(&self.signals.lease, events::LEASE, Interest::Read)?;
        self.poll.add(&self.inbox, events::INBOX, Interest::Read)?;
        self.poll.add(&self.timer, events::TIMER, Interest::Read)?;
        self.poll.add(&self.owner.helper, events::HELPER, Interest::Read)?;
        self.watch.register(&self.poll, events::WATCH)
    }

    fn serve(&mut self, inherited: Option<Inherited>) -> Result<(), ServeError> {
        let mut inherited = inherited;
        let mut tokens = Vec::new();
        loop {
            self.owner.drive(self.front.as_ref());
            while self.advance(&mut inherited)? {
                self.owner.drive(self.front.as_ref());
            }
            if self.phase == Phase::Over {
                return Ok(());
            }
            self.timer.set(self.deadline()).map_err(failed("set the timer"))?;
            self.poll.wait(&mut tokens).map_err(failed("wait for events"))?;
            self.handle(&tokens);
        }
    }

    /// Goes on to the next phase if this one has ended; says whether it did anything.
    fn advance(&mut self, inherited: &mut Option<Inherited>) -> Result<bool, ServeError> {
        let now = now();
        self.reap_session()?;
        let phase = self.phase;
        match phase {
            Phase::Starting { .. } | Phase::Counting if self.stop => self.phase = Phase::Draining,
            Phase::Starting { .. } if self.owner.over_cap() => {
                self.owner.helper.give(Task::Count);
                self.phase = Phase::Counting;
            }
            Phase::Counting => return self.too_many().map_or(Ok(false), Err),
            Phase::Starting { until } if self.ready(until, now) => {
                self.listen(inherited.take())?;
                self.phase = Phase::Serving;
            }
            Phase::Serving if self.stop => {
                if let Some(front) = &mut self.front {
                    front.close(&self.poll);
                    front.end(&self.poll, now);
                }
                self.phase = Phase::Draining;
            }
            Phase::Draining if self.front.as_ref().is_none_or(Front::is_free) => {
                // The lease goes first: nobody who waits for the file has to wait for the disk.
                self.owner.keeper.shut_down(now);
                self.phase = Phase::Over;
                if !self.config.read_only {
                    self.owner.helper.give(Task::Sync);
                    self.phase = Phase::Syncing { until: now + LAST_SYNC };
                }
            }
            Phase::Syncing { until } if until <= now => {
                warn!("the filesystem does not finish writing; ending without it");
                self.phase = Phase::Over;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Lets the next frontend in once the last one's session has drained.
    fn reap_session(&mut self) -> Result<(), ServeError> {
        let Some(front) = &mut self.front else { return Ok(()) };
        if !front.finish() {
            return Ok(());
        }
        if front.is_last() {
            self.stop = true;
        }
        if !self.stop {
            front.open(&self.poll).map_err(failed("watch the socket"))?;
        }
        Ok(())
    }

    /// Publishes the sockets. The mode is known by then.
    fn listen(&mut self, inherited: Option<Inherited>) -> Result<(), ServeError> {
        let snapshot = self.owner.keeper.snapshot();
        if self.config.mode == Mode::Direct && !snapshot.direct {
            let reason = reason(&self.image, &snapshot);
            return Err(ServeError::NotDirect { reason });
        }
        if let Some(options) = &self.config.control {
            self.clients = Some(Clients::bind(options, &self.poll, events::CONTROL)?);
        }
        let (listener, stream) = match (inherited, &self.config.endpoint) {
            (Some(Inherited::Listening(listener)), _) => (Some(listener), None),
            (Some(Inherited::Connected(stream)), _) => (None, Some(stream)),
            (None, Endpoint::Path(options)) => (Some(Listener::bind(options)?), None),
            // Inherited once, at the start.
            (None, Endpoint::Fd(_)) => (None, None),
        };
        let door = listener.map(|listener| Door::new(listener, events::LISTENER));
        let mut front = Front::new(Arc::clone(&self.device), door);
        front.open(&self.poll).map_err(failed("watch the socket"))?;
        if let Some(stream) = stream {
            let workers = front.begin(stream).map_err(|source| ServeError::Session { source })?;
            self.join(&workers);
        }
        self.front = Some(front);
        self.owner.announce();
        Ok(())
    }

    fn deadline(&self) -> Option<Duration> {
        let phase = match self.phase {
            Phase::Syncing { until } => Some(until),
            _ => self.start_deadline(),
        };
        let front = self.front.as_ref().and_then(Front::deadline);
        let clients = self.clients.as_ref().and_then(|clients| clients.door.deadline());
        let keeper = self.owner.keeper.deadline();
        [phase, front, clients, keeper, self.watch.deadline()].into_iter().flatten().min()
    }

    /// The sockets go with their owners.
    fn finish(self) -> Result<(), ServeError> {
        self.owner.finish(LAST_SYNC);
        info!("stopped");
        self.synced.map_err(failed("make the last writes durable"))
    }
}
