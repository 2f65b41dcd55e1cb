// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main loop of a device: frontends, the control socket, the keeper's events and its time, all
//! in one thread that never waits for anything but its epoll set; and the process that has one or several of
//! them.
//!
//! ```text
//! leases ──┐           listener ┐                        ┌─► session (queue threads)
//! inotify ─┼─► Process  control ┤                        ├─► helper thread (FIEMAP, fsync, punch)
//! news ────┤      └───►   inbox ┼─► Server ◄─► Keeper ───┼─► mtime thread
//! signals ─┘              timer ┘                        └─► lease
//! ```

mod clients;
mod describe;
mod device;
mod door;
mod events;
mod front;
mod helper;
mod limit;
mod log;
mod owner;
mod poll;
mod populate;
mod process;
mod socket;
mod stop;
mod watch;

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use crate::config::{Config, Endpoint, Mode, Settings};
use crate::engine::Rules;
use crate::engine::shared::Shared;
use crate::image::{FileKey, Image, OpenError};
use crate::inbox::{Inbox, Poster};
use crate::virtio::session::DeviceConfig;

use clients::Clients;
use describe::reason;
use door::Door;
use front::Front;
use helper::Task;
use log::HOST;
pub use log::start_log;
use owner::Owner;
use poll::{Interest, Poll, Timer, now};
use populate::Loading;
use process::{Link, News, Process};
pub use socket::SocketError;
use socket::{Inherited, Listener};
pub use stop::AllSignals;
use stop::Stage;
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
    #[error("device {other} has the same image; serve it once, with several queues if need be")]
    SameImage { other: usize },
    #[error("device {number} ({}): {source}", image.display())]
    Device { number: usize, image: PathBuf, source: Box<ServeError> },
    #[error("{failed} of {all} devices have failed; the log says why")]
    SomeFailed { failed: usize, all: usize },
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> ServeError {
    move |source| ServeError::Io { action, source }
}

/// How far the daemon is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// The keeper decides on the mode, until then at the latest.
    Starting { until: Duration },
    /// Frontends could be let in; the other devices of the process are not as far yet.
    Ready,
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

/// The main loop of a device.
struct Server<'a> {
    config: &'a Config,
    link: &'a Link,
    image: Arc<Image>,
    device: Arc<DeviceConfig>,
    poll: Poll,
    timer: Timer,
    inbox: Inbox,
    watch: InodeWatch,
    owner: Owner,
    front: Option<Front>,
    clients: Option<Clients>,
    phase: Phase,
    loading: Loading,
    may_listen: bool,
    /// The end was asked for.
    stop: bool,
    unlinked: bool,
    /// How it ends.
    outcome: Result<(), ServeError>,
    started: Duration,
}

/// Serves until told to stop.
///
/// # Errors
/// Why it could not start, or had to end.
pub fn run(settings: &Settings, signals: AllSignals) -> Result<(), ServeError> {
    run_under(settings, Rules::default(), signals)
}

/// The same under other rules, which only a build with the feature `mutants` can make: a daemon that
/// breaks one shows whether a test on real disks notices.
///
/// # Errors
/// As [`run`].
pub fn run_under(settings: &Settings, rules: Rules, signals: AllSignals) -> Result<(), ServeError> {
    Process::start(settings, rules, signals)?.run()
}

/// A device's thread. Opening the image may wait for the last writes of a killed predecessor (R1a).
fn serve(
    config: &Config,
    rules: Rules,
    inherited: Option<Inherited>,
    link: &Link,
    inbox: (Inbox, Poster),
) -> Result<(), ServeError> {
    if let Endpoint::Path(options) = &config.endpoint {
        // Opening the image would break the lease of the daemon that listens there.
        socket::probe(&options.path)?;
    }
    link.claim(FileKey::at(&config.blk_file))?;
    let image = Arc::new(Image::open(&device::image_options(config))?);
    // The path may have come to mean another file.
    link.claim(Some(image.key()))?;
    let mut server = Server::new(config, rules, Arc::clone(&image), link, inbox)?;
    let served = server.serve(inherited);
    if served.is_err() && server.front.is_none() {
        // Nobody was let in, so nothing raw is in flight, and nobody will answer for the lease any more.
        image.drop_lease();
    }
    served?;
    server.finish()
}

impl<'a> Server<'a> {
    fn new(
        config: &'a Config,
        rules: Rules,
        image: Arc<Image>,
        link: &'a Link,
        (inbox, poster): (Inbox, Poster),
    ) -> Result<Self, ServeError> {
        let started = now();
        let watch = image.watch(&link.watches).map_err(failed("watch the image"))?;
        // Before the keeper takes the lease: the process has to know whose breaks are whose.
        link.tell(News::Open(image.image_fd().as_raw_fd(), watch.id()));
        let shared = Arc::new(Shared::new());
        let inbox_of = (Arc::clone(&shared), poster.clone());
        let device = device::describe(config, link.devices, rules, &image, inbox_of);
        let device = Arc::new(device);
        let owner = Owner::new(&image, rules, shared, config, poster, started)
            .map_err(failed("start a thread"))?;
        let poll = Poll::new().map_err(failed("make an epoll set"))?;
        let timer = Timer::new().map_err(failed("make a timer"))?;
        let settle = if config.mode == Mode::Direct { SETTLE_DIRECT } else { SETTLE };
        let server = Self {
            config,
            link,
            image,
            device,
            poll,
            timer,
            inbox,
            watch: InodeWatch::new(watch),
            owner,
            front: None,
            clients: None,
            phase: Phase::Starting { until: started + settle },
            loading: Loading::default(),
            may_listen: false,
            stop: false,
            unlinked: false,
            outcome: Ok(()),
            started,
        };
        server.register().map_err(failed("watch descriptors"))?;
        Ok(server)
    }

    fn register(&self) -> io::Result<()> {
        self.poll.add(&self.inbox, events::INBOX, Interest::Read)?;
        self.poll.add(&self.timer, events::TIMER, Interest::Read)?;
        self.poll.add(&self.owner.helper, events::HELPER, Interest::Read)
    }

    fn serve(&mut self, inherited: Option<Inherited>) -> Result<(), ServeError> {
        let mut inherited = inherited;
        let mut tokens = Vec::new();
        // The process did not know the watch when it may first have rung.
        self.inode_changed(self.watch.look(), now());
        loop {
            self.owner.drive(self.front.as_ref());
            while self.advance(&mut inherited)? {
                self.owner.drive(self.front.as_ref());
            }
            if self.phase == Phase::Over {
                return Ok(());
            }
            self.link.progress.set(self.phase.into());
            self.timer.set(self.deadline()).map_err(failed("set the timer"))?;
            self.poll.wait(&mut tokens).map_err(failed("wait for events"))?;
            self.handle(&tokens);
        }
    }

    /// Goes on to the next phase if this one has ended; says whether it did anything.
    fn advance(&mut self, inherited: &mut Option<Inherited>) -> Result<bool, ServeError> {
        let now = now();
        self.reap_session();
        let phase = self.phase;
        match phase {
            Phase::Starting { .. } | Phase::Counting | Phase::Ready if self.stop => {
                self.phase = Phase::Draining;
            }
            Phase::Starting { .. } if self.owner.over_cap() => {
                self.owner.helper.give(Task::Count);
                self.phase = Phase::Counting;
            }
            Phase::Counting => return self.too_many().map_or(Ok(false), Err),
            Phase::Starting { until } if self.ready(until, now) => {
                self.check_mode()?;
                self.link.tell(News::Ready);
                self.phase = Phase::Ready;
            }
            Phase::Ready if self.may_listen => {
                // The others may have taken a while.
                self.check_mode()?;
                self.listen(inherited.take())?;
                self.link.tell(News::Serving);
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
                warn!(target: HOST, "the filesystem does not finish writing; ending without it");
                self.phase = Phase::Over;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Lets the next frontend in once the last one's session has drained.
    fn reap_session(&mut self) {
        let stage = self.phase.into();
        let Some(front) = &mut self.front else { return };
        // It waits in there for the session's threads.
        self.link.progress.set(Stage::Joining);
        let finished = front.finish();
        self.link.progress.set(stage);
        if !finished {
            return;
        }
        if front.is_last() {
            self.stop = true;
        }
        if !self.stop
            && let Err(source) = front.open(&self.poll)
        {
            // Nobody can come any more; what was written still becomes durable.
            self.outcome = Err(failed("watch the socket")(source));
            self.stop = true;
        }
    }

    /// Whether it is the mode that was asked for, now that it is known.
    fn check_mode(&self) -> Result<(), ServeError> {
        let snapshot = self.owner.keeper.snapshot();
        if self.config.mode == Mode::Direct && !snapshot.direct {
            let reason = reason(&self.image, &snapshot);
            return Err(ServeError::NotDirect { reason });
        }
        Ok(())
    }

    /// Publishes the sockets.
    fn listen(&mut self, inherited: Option<Inherited>) -> Result<(), ServeError> {
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
        let clients = self.clients.as_ref().and_then(Clients::deadline);
        let keeper = self.owner.keeper.deadline();
        [phase, front, clients, keeper, self.watch.deadline()].into_iter().flatten().min()
    }

    /// The sockets go with their owners.
    fn finish(self) -> Result<(), ServeError> {
        self.link.progress.set(Stage::Touching);
        self.owner.finish(LAST_SYNC);
        self.link.progress.set(Stage::Over);
        self.outcome
    }
}
