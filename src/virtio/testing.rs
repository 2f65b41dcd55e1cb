// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! For the session's tests: a main loop that serves one frontend after the other in filesystem
//! mode.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::cache_mode::CacheMode;
use super::features::Topology;
use super::limits::MemoryLimits;
use super::session::{DeviceConfig, Files, Session};
use super::spin::Polling;
use super::testing_guest::PATIENCE;
use crate::engine::keeper::{Keeper, KeeperConfig, Start};
use crate::engine::message::{Action, JobDone, WorkerId};
use crate::engine::request::Limits;
use crate::engine::shared::Shared;
use crate::engine::units::FileRange;
use crate::engine::{Geometry, Rules};
use crate::inbox::{Event, Inbox, inbox};

pub(crate) const CAPACITY: u64 = 8 << 20;

struct OneFile(OwnedFd);

impl Files for OneFile {
    fn image_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn device_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// What the main loop saw.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Reset,
    /// A session ended; its reason.
    Ended(Option<String>),
}

/// The main loop.
pub(crate) struct Server {
    streams: Option<Sender<UnixStream>>,
    pub(crate) seen: Receiver<Seen>,
    thread: Option<JoinHandle<()>>,
}

fn geometry() -> Geometry {
    Geometry {
        file_size: CAPACITY,
        fs_block: 4096,
        file_align: 512,
        dev_block: 512,
        write_block: 512,
        mem_align: 512,
        bounce_bytes: 64 << 10,
        bounce_slots: 8,
        ops: 128,
        zeroes_bytes: 4 << 20,
        punch_bytes: 256 << 20,
        lease_fresh: None,
        raw: crate::engine::RawLimits::default(),
    }
}

/// A device of an image in filesystem mode, and where its sessions post.
pub(crate) fn device(image: OwnedFd, num_queues: u16, threads: u16) -> (Arc<DeviceConfig>, Inbox) {
    let (inbox, poster) = inbox().unwrap();
    let topology = Topology {
        physical_block: 4096,
        alignment_offset: 0,
        min_io: 4096,
        opt_io: 0,
        discard_block: 4096,
    };
    let config = DeviceConfig {
        files: Arc::new(OneFile(image)),
        geometry: geometry(),
        limits: Limits {
            base: 0,
            capacity: CAPACITY,
            block_size: 512,
            read_only: false,
            unmap: true,
        },
        topology,
        lease: None,
        rules: Rules::default(),
        shared: Arc::new(Shared::new()),
        num_queues,
        queue_size: 1024,
        threads,
        serial: "serial".to_owned(),
        strict: false,
        polling: Polling::default(),
        pin_memory: false,
        cache: CacheMode::new(true),
        memory_limits: MemoryLimits::share(1, num_queues, threads),
        inspections: Arc::default(),
        inbox: poster,
    };
    (Arc::new(config), inbox)
}

impl Server {
    pub(crate) fn new(image: OwnedFd, num_queues: u16, threads: u16) -> Self {
        let (sender, seen) = mpsc::channel();
        let (streams, accepted) = mpsc::channel();
        let (config, inbox) = device(image, num_queues, threads);
        let shared = Arc::clone(&config.shared);
        let serve = move || {
            let mut keeper = new_keeper(&shared);
            let mut next = WorkerId(0);
            for stream in accepted {
                let session = Session::start(stream, Arc::clone(&config), next).unwrap();
                next.0 += u32::from(config.threads);
                serve(&session, &inbox, &mut keeper, &sender);
                // R13, R14: or what they wrote since the last flush would be forgotten.
                assert!(shared.is_calm(), "a worker that wrote ended without its last word");
                session.finish();
            }
        };
        let thread = Some(std::thread::spawn(serve));
        Self { streams: Some(streams), seen, thread }
    }

    /// A server of an image file of random content.
    pub(crate) fn of_file(num_queues: u16, threads: u16) -> (Self, File) {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..CAPACITY).map(|at| (at / 512 * 31 + at) as u8).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
        (Self::new(file.try_clone().unwrap().into(), num_queues, threads), file)
    }

    /// A server whose reads take as long as nobody writes into the pipe.
    pub(crate) fn of_pipe(num_queues: u16, threads: u16) -> (Self, std::io::PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Self::new(reader.into(), num_queues, threads), writer)
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.streams.as_ref().unwrap().send(theirs).unwrap();
        ours
    }

    /// Waits until the session has ended and tells why.
    pub(crate) fn ended(&self) -> Option<String> {
        loop {
            if let Seen::Ended(reason) = self.seen.recv_timeout(PATIENCE).unwrap() {
                return reason;
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.streams.take());
        let result = self.thread.take().unwrap().join();
        assert!(result.is_ok() || std::thread::panicking());
    }
}

fn new_keeper(shared: &Arc<Shared>) -> Keeper {
    let config = KeeperConfig {
        geometry: geometry(),
        start: Start::Filesystem,
        window: FileRange::new(0, CAPACITY),
        max_extents: 1000,
        populate: false,
        lease_break_time: Duration::from_secs(45),
        proven: false,
        barriers: true,
        strict: false,
        rules: Rules::default(),
    };
    Keeper::new(config, Arc::clone(shared), Duration::ZERO)
}

/// The main loop, for one session.
fn serve(session: &Session, inbox: &Inbox, keeper: &mut Keeper, seen: &Sender<Seen>) {
    let begun = Instant::now();
    let epoll = Epoll::new().unwrap();
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, inbox.as_raw_fd(), readable).unwrap();
    session.workers().for_each(|worker| keeper.worker_joined(worker));
    let mut left: Vec<WorkerId> = session.workers().collect();
    let mut ended = None;
    while !left.is_empty() {
        act(session, keeper);
        epoll.wait(-1, &mut [EpollEvent::default()]).unwrap();
        inbox.hear();
        while let Some(event) = inbox.next() {
            let now = begun.elapsed();
            match event {
                Event::Worker(from, message) => {
                    keeper.message(now, from, message);
                }
                Event::SessionEnded(reason) => {
                    ended = Some(reason);
                    session.quiesce();
                }
                Event::Quiesced(worker) => {
                    left.retain(|other| *other != worker);
                    keeper.worker_left(now, worker);
                }
                Event::DeviceReset => {
                    keeper.device_reset();
                    seen.send(Seen::Reset).unwrap();
                }
                Event::Job(..)
                | Event::LeaseBreak
                | Event::InodeTouched
                | Event::Listen
                | Event::Stop => unreachable!(),
            }
        }
    }
    act(session, keeper);
    // Told once everything is over but the joining.
    let _ = seen.send(Seen::Ended(ended.unwrap()));
}

fn act(session: &Session, keeper: &mut Keeper) {
    while let Some(action) = keeper.poll_action() {
        match action {
            Action::Send(worker, message) => session.send(worker, message),
            Action::Run(id, _) => {
                keeper.job_done(Duration::ZERO, id, JobDone::Punch(Err(libc::EOPNOTSUPP)))
            }
            Action::DropLease | Action::Touch | Action::Report(_) => {}
        }
    }
}
