// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two threads that may block in the filesystem, so that the main loop never does: the helper,
//! with the keeper's jobs and the control socket's questions, and the one that sets the mtime.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{Span, debug};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::control::check::{self, Ownership};
use crate::control::{failure, map, reply};
use crate::engine::message::{Job, JobId};
use crate::image::Image;
use crate::inbox::{Event, Poster};

use super::clients::ClientId;

/// The mtime is set at most this often (R4).
const TOUCH_EVERY: Duration = Duration::from_secs(1);

/// Something for the helper.
#[derive(Debug)]
pub(super) enum Task {
    /// The keeper's; answered in the inbox.
    Job(JobId, Job),
    /// A piece of the map for a client of the control socket.
    Map(ClientId, u64),
    /// The check for one.
    Check(ClientId, Ownership),
    /// Count the extents of the whole map.
    Count,
    /// Make everything durable: the end.
    Sync,
}

/// What came of what is not the keeper's.
#[derive(Debug)]
pub(super) enum Answer {
    /// A reply line.
    Reply(ClientId, String),
    /// So many extents.
    Counted(io::Result<u64>),
    /// Everything is durable, or not.
    Synced(io::Result<()>),
}

/// The helper: one thread, one task at a time, in order.
#[derive(Debug)]
pub(super) struct Helper {
    tasks: Sender<Task>,
    answers: Receiver<Answer>,
    bell: Arc<EventFd>,
}

impl Helper {
    pub(super) fn start(image: Arc<Image>, inbox: Poster) -> io::Result<Self> {
        let (tasks, to_do) = mpsc::channel();
        let (done, answers) = mpsc::channel();
        let bell = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let ring = Arc::clone(&bell);
        let span = Span::current();
        // Never joined: it may hang in a frozen filesystem, and the process must still end.
        thread::Builder::new().name("helper".to_owned()).spawn(move || {
            let _named = span.enter();
            for task in to_do {
                let answer = match task {
                    Task::Job(id, job) => {
                        inbox.post(Event::Job(id, image.run(&job)));
                        continue;
                    }
                    Task::Map(client, start) => Answer::Reply(client, map_piece(&image, start)),
                    Task::Check(client, ownership) => {
                        Answer::Reply(client, reply(check::look(&image, &ownership)))
                    }
                    Task::Count => Answer::Counted(image.count_extents()),
                    Task::Sync => Answer::Synced(sync(&image)),
                };
                if done.send(answer).is_ok() {
                    // A counter cannot overflow by ones.
                    let _ = ring.write(1);
                }
            }
        })?;
        Ok(Self { tasks, answers, bell })
    }

    pub(super) fn give(&self, task: Task) {
        // The thread ends with this end of the channel, never before.
        let _ = self.tasks.send(task);
    }

    pub(super) fn answers(&self) -> impl Iterator<Item = Answer> {
        // Nothing to hear is fine.
        let _ = self.bell.read();
        self.answers.try_iter()
    }
}

impl AsRawFd for Helper {
    fn as_raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}

fn map_piece(image: &Image, start: u64) -> String {
    match map::load(image, start) {
        Ok(piece) => reply(piece),
        Err(error) => failure(&error),
    }
}

/// The guest asked for no flush, but an orderly end leaves nothing volatile behind. With
/// barriers on, the image's reaches the disk's cache too.
fn sync(image: &Image) -> io::Result<()> {
    rustix::fs::fdatasync(image.image_fd())?;
    match image.device_fd() {
        Some(device) if !image.barriers() => Ok(rustix::fs::fdatasync(device)?),
        _ => Ok(()),
    }
}

/// The thread that sets the mtime.
#[derive(Debug)]
pub(super) struct Toucher {
    /// One order waits at most: more would do the same again.
    orders: SyncSender<()>,
    ended: Receiver<()>,
}

impl Toucher {
    pub(super) fn start(image: Arc<Image>) -> io::Result<Self> {
        let (orders, to_do) = mpsc::sync_channel(1);
        let (end, ended) = mpsc::channel();
        let span = Span::current();
        thread::Builder::new().name("mtime".to_owned()).spawn(move || {
            let _named = span.enter();
            // Dropped at the end, which is what `ended` waits for.
            let _end: Sender<()> = end;
            coalesce(&to_do, TOUCH_EVERY, || {
                if let Err(error) = image.touch() {
                    // It would fail every second from now on.
                    debug!(%error, "the image's mtime could not be set");
                }
            });
        })?;
        Ok(Self { orders, ended })
    }

    pub(super) fn order(&self) {
        // Full: it will be touched after this moment anyway.
        let _ = self.orders.try_send(());
    }

    /// Carries out what was ordered, and ends. Gives up waiting after `patience`.
    pub(super) fn finish(self, patience: Duration) {
        drop(self.orders);
        let _ = self.ended.recv_timeout(patience);
    }
}

/// Acts on orders, at most once in `every`, but at once when no more can come.
fn coalesce(orders: &Receiver<()>, every: Duration, mut act: impl FnMut()) {
    let mut ordered = orders.recv().is_ok();
    while ordered {
        act();
        ordered = false;
        let until = Instant::now() + every;
        while let Ok(()) = orders.recv_timeout(until.saturating_duration_since(Instant::now())) {
            ordered = true;
        }
        ordered = ordered || orders.recv().is_ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_coalesced_and_the_last_is_not_lost() {
        let begin = |every| {
            let (orders, to_do) = mpsc::sync_channel(1);
            let (act, acts) = mpsc::channel();
            thread::spawn(move || coalesce(&to_do, every, || act.send(()).unwrap()));
            (orders, acts)
        };
        // One at once; what comes in the hour after it is one more, and that does not wait when no more can come.
        let (orders, acts) = begin(Duration::from_secs(3600));
        orders.send(()).unwrap();
        acts.recv().unwrap();
        for _ in 0..50 {
            let _ = orders.try_send(());
            thread::sleep(Duration::from_millis(1));
        }
        acts.try_recv().unwrap_err();
        drop(orders);
        assert_eq!(acts.iter().count(), 1);
        // And without an end, when the time is over.
        let (orders, acts) = begin(Duration::from_millis(5));
        for _ in 0..3 {
            orders.send(()).unwrap();
            acts.recv().unwrap();
        }
    }
}
