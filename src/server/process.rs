// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process: a thread for each device, and in the main thread what the devices share: the lease signals, the
//! watches on their images, a start that succeeds for all of them or not at all, and the end.
//!
//! A device's thread may be held up by its own disk, its own frontend, the end of its own session, and no
//! other device notices: nothing here waits for one, and they meet nowhere else.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::{Span, error, info};

use super::log::{device_span, report_suppressed};
use super::poll::{Interest, Poll, Timer, now};
use super::socket::{self, Inherited};
use super::stop::{self, Progress};
use super::{AllSignals, ServeError, failed};
use crate::config::{Config, Endpoint, Settings};
use crate::engine::Rules;
use crate::image::{FileKey, LeaseSignal, LeaseSignals, WatchId, Watches};
use crate::inbox::{Event, Inbox, Poster, inbox};
use crate::sys::{inspector, process::raise_descriptors};

/// How long devices that are ready wait for those that are not. Until then a failure of one is the failure
/// of all; afterwards those that are ready serve, and the others fail or follow by themselves.
const TOGETHER: Duration = Duration::from_secs(10);

const LEASE: u64 = 1;
const WATCH: u64 = 2;
const NEWS: u64 = 3;
const TIMER: u64 = 4;

/// What a device tells the process.
#[derive(Debug)]
pub(super) enum News {
    /// Its image is open: as which descriptor, and under which watch. Told before a lease is taken.
    Open(RawFd, Option<WatchId>),
    /// It could let frontends in.
    Ready,
    /// It does.
    Serving,
    /// It is over, and nothing of it is left.
    Ended(Result<(), ServeError>),
    /// Not of a device's: the process is to end.
    Stop,
}

/// A device's end of the line to the process.
#[derive(Debug)]
pub(super) struct Link {
    index: usize,
    /// How many devices the process has.
    pub(super) devices: usize,
    news: Poster<(usize, News)>,
    /// Which device has which image.
    claims: Arc<Mutex<BTreeMap<FileKey, usize>>>,
    /// On all images.
    pub(super) watches: Arc<Watches>,
    /// How far this device is.
    pub(super) progress: Arc<Progress>,
}

impl Link {
    pub(super) fn tell(&self, news: News) {
        self.news.post((self.index, news));
    }

    /// Makes an image this device's own: a second open of it by this process would wait for the first
    /// one's lease to be broken (R1). What cannot be seen is left for the opening to complain of.
    pub(super) fn claim(&self, image: Option<FileKey>) -> Result<(), ServeError> {
        let Some(image) = image else { return Ok(()) };
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        match *claims.entry(image).or_insert(self.index) {
            own if own == self.index => Ok(()),
            other => Err(ServeError::SameImage { other: other + 1 }),
        }
    }
}

/// How far a device is, as it has told.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum State {
    /// Its image is being opened, which may take long and cannot be stopped.
    Opening,
    /// The mode is being decided on.
    Open,
    /// It waits for leave to listen.
    Ready,
    /// It has it.
    Listening,
    Serving,
    Over,
}

/// A device as the process sees it.
#[derive(Debug)]
struct Device {
    path: PathBuf,
    /// Names it in the log, if there are several.
    span: Span,
    inbox: Poster,
    state: State,
    /// It has let frontends in.
    served: bool,
    image: Option<RawFd>,
    watch: Option<WatchId>,
}

/// The main thread.
pub(super) struct Process {
    poll: Poll,
    timer: Timer,
    lease: LeaseSignals,
    watches: Arc<Watches>,
    news: Inbox<(usize, News)>,
    devices: Vec<Device>,
    /// Until then at the latest devices start together; `None` once they have.
    together: Option<Duration>,
    /// The end was asked for.
    stop: bool,
    /// Why the start failed, or the only device.
    failure: Option<ServeError>,
    /// Devices that failed by themselves.
    failed: usize,
}

impl Process {
    /// Starts all devices.
    pub(super) fn start(
        settings: &Settings,
        rules: Rules,
        signals: AllSignals,
    ) -> Result<Self, ServeError> {
        // A descriptor's number is only known to be the inherited one before others are opened.
        let inherited = settings.devices.iter().map(inherited).collect::<Result<Vec<_>, _>>()?;
        let several = inherited.len() > 1;
        raise_descriptors();
        // Before an image is open, which it must not share.
        inspector::start().map_err(failed("start a thread"))?;
        let watches = Arc::new(Watches::new().map_err(failed("watch the image"))?);
        let (news, poster) = inbox().map_err(failed("make an event descriptor"))?;
        let poll = Poll::new().map_err(failed("make an epoll set"))?;
        let timer = Timer::new().map_err(failed("make a timer"))?;
        let claims = Arc::default();
        let progress: Vec<_> = settings.devices.iter().map(progress).collect();
        let ends = poster.clone();
        stop::start(signals.stop, progress.clone(), move || ends.post((0, News::Stop)))
            .map_err(failed("start a thread"))?;
        let mut devices = Vec::new();
        let configs = settings.devices.iter().enumerate();
        for (((index, config), inherited), progress) in configs.zip(inherited).zip(progress) {
            let link = Link {
                index,
                devices: settings.devices.len(),
                news: poster.clone(),
                claims: Arc::clone(&claims),
                watches: Arc::clone(&watches),
                progress,
            };
            devices.push(Device::start(config, rules, inherited, link, several)?);
        }
        let process = Self {
            poll,
            timer,
            lease: signals.lease,
            watches,
            news,
            devices,
            together: several.then(|| now() + TOGETHER),
            stop: false,
            failure: None,
            failed: 0,
        };
        process.register().map_err(failed("watch descriptors"))?;
        Ok(process)
    }

    fn register(&self) -> io::Result<()> {
        self.poll.add(&self.lease, LEASE, Interest::Read)?;
        self.poll.add(&*self.watches, WATCH, Interest::Read)?;
        self.poll.add(&self.news, NEWS, Interest::Read)?;
        self.poll.add(&self.timer, TIMER, Interest::Read)
    }

    /// Until every device is over.
    pub(super) fn run(mut self) -> Result<(), ServeError> {
        let mut tokens = Vec::new();
        while !self.is_over() {
            let deadline = self.together.filter(|_| !self.is_ending());
            self.timer.set(deadline).map_err(failed("set the timer"))?;
            self.poll.wait(&mut tokens).map_err(failed("wait for events"))?;
            if tokens.contains(&TIMER) {
                self.timer.hear();
            }
            // Whose they are is looked up after the news: a device tells of its image before it takes a lease.
            let (broken, touched) = (self.broken_leases(), self.touched_images());
            self.hear_news();
            for device in &self.devices {
                if names(&broken, device.image) {
                    device.inbox.post(Event::LeaseBreak);
                }
                if names(&touched, device.watch) {
                    device.inbox.post(Event::InodeTouched);
                }
            }
            self.let_listen();
        }
        let served = self.devices.iter().any(|device| device.served);
        if served || self.failure.is_none() {
            report_suppressed();
            info!("stopped");
        }
        match (self.failure, self.failed) {
            (Some(error), _) => Err(error),
            (None, 0) => Ok(()),
            (None, failed) => Err(ServeError::SomeFailed { failed, all: self.devices.len() }),
        }
    }

    fn stop_devices(&self) {
        self.devices.iter().for_each(|device| device.inbox.post(Event::Stop));
    }

    /// The descriptors whose leases are being broken; `None` among them: every lease has to be looked at.
    fn broken_leases(&self) -> Vec<Option<RawFd>> {
        let signals = std::iter::from_fn(|| self.lease.next().ok().flatten());
        let fd = |signal| match signal {
            LeaseSignal::Break(fd) => Some(fd),
            LeaseSignal::CheckAll => None,
        };
        signals.map(fd).collect()
    }

    /// The watches that rang; `None` among them: any may have.
    fn touched_images(&self) -> Vec<Option<WatchId>> {
        let mut touched = Vec::new();
        let heard = self.watches.hear(|watch| {
            if !touched.contains(&watch) {
                touched.push(watch);
            }
        });
        if heard.is_err() {
            // Not knowing counts as the worst that can be (R5a).
            touched.push(None);
        }
        touched
    }

    fn hear_news(&mut self) {
        self.news.hear();
        while let Some((index, news)) = self.news.next() {
            let Some(device) = self.devices.get_mut(index) else { continue };
            match news {
                News::Stop => {
                    self.stop = true;
                    // Before the line, which may have to wait for the reader of the log.
                    self.stop_devices();
                    info!("told to stop");
                }
                News::Open(image, watch) => {
                    (device.image, device.watch) = (Some(image), watch);
                    device.state = State::Open;
                }
                News::Ready => device.state = State::Ready,
                News::Serving => (device.state, device.served) = (State::Serving, true),
                News::Ended(result) => {
                    let state = std::mem::replace(&mut device.state, State::Over);
                    // Their numbers may come back as another device's.
                    (device.image, device.watch) = (None, None);
                    // What was still being opened when the end was asked for is not waited for either.
                    if let Err(error) = result
                        && !(self.is_ending() && state == State::Opening)
                    {
                        self.device_failed(index, error);
                    }
                }
            }
        }
    }

    fn device_failed(&mut self, index: usize, error: ServeError) {
        let Some(device) = self.devices.get(index) else { return };
        if self.devices.len() == 1 {
            self.failure = Some(error);
        } else if self.together.is_some() && !self.is_ending() {
            let image = device.path.clone();
            let source = Box::new(error);
            self.failure = Some(ServeError::Device { number: index + 1, image, source });
            self.stop_devices();
        } else {
            self.failed += 1;
            device.span.in_scope(|| error!("this device has failed: {error}"));
        }
    }

    /// Gives leave to listen, to all at once if that can be had.
    fn let_listen(&mut self) {
        if self.is_ending() {
            return;
        }
        self.together = self.together.filter(|until| now() < *until);
        let least = self.devices.iter().map(|device| device.state).min();
        if self.together.is_some() && least < Some(State::Ready) {
            return;
        }
        for device in self.devices.iter_mut().filter(|device| device.state == State::Ready) {
            device.state = State::Listening;
            device.inbox.post(Event::Listen);
        }
        if least >= Some(State::Serving) {
            self.together = None;
        }
    }

    fn is_ending(&self) -> bool {
        self.stop || self.failure.is_some()
    }

    /// Whether nothing is left to wait for. An image that is still being opened is no reason: no byte of it
    /// has been touched.
    fn is_over(&self) -> bool {
        self.devices.iter().all(|device| match device.state {
            State::Over => true,
            State::Opening => self.is_ending(),
            _ => false,
        })
    }
}

impl Device {
    /// Begins its thread.
    fn start(
        config: &Config,
        rules: Rules,
        inherited: Option<Inherited>,
        link: Link,
        several: bool,
    ) -> Result<Self, ServeError> {
        let path = config.blk_file.clone();
        let span = match several {
            true => device_span(&path),
            false => Span::none(),
        };
        let (inbox, poster) = inbox().map_err(failed("make an event descriptor"))?;
        let device = Self {
            path,
            span: span.clone(),
            inbox: poster.clone(),
            state: State::Opening,
            served: false,
            image: None,
            watch: None,
        };
        let config = config.clone();
        let serve = move || {
            let _named = span.enter();
            let serve = || super::serve(&config, rules, inherited, &link, (inbox, poster));
            let Ok(result) = catch_unwind(AssertUnwindSafe(serve)) else {
                // Its workers wait for answers that do not come, and hold a lease that nobody would give up. The
                // end of the process is what the kernel can put in order (R1a).
                error!("the main loop panicked; ending at once");
                std::process::exit(1);
            };
            link.tell(News::Ended(result));
        };
        // Never joined: it may hang in an image's filesystem, and the process must still end.
        let thread = thread::Builder::new().name("device".to_owned()).spawn(serve);
        thread.map_err(failed("start a thread"))?;
        Ok(device)
    }
}

/// Whether what was heard concerns the one that is known by `own`.
fn names(heard: &[Option<i32>], own: Option<i32>) -> bool {
    own.is_some() && heard.iter().any(|id| id.is_none() || *id == own)
}

fn progress(config: &Config) -> Arc<Progress> {
    Arc::new(Progress::new(config.blk_file.clone()))
}

fn inherited(config: &Config) -> Result<Option<Inherited>, ServeError> {
    match &config.endpoint {
        Endpoint::Fd(fd) => Ok(Some(socket::inherit(*fd)?)),
        Endpoint::Path(_) => Ok(None),
    }
}
