// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The keeper and what carries out its actions.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tracing::{error, info, warn};

use crate::config::Config;
use crate::engine::Keeper;
use crate::engine::keeper::{KeeperConfig, Start};
use crate::engine::message::{Action, Refusal, Report, Why};
use crate::engine::rules::Rules;
use crate::engine::shared::Shared;
use crate::image::Image;
use crate::inbox::Poster;

use super::describe::reason;
use super::front::Front;
use super::helper::{Helper, Task, Toucher};
use super::log::image_field;

/// The owner of the image's mode, map and layout, with its hands.
#[derive(Debug)]
pub(super) struct Owner {
    pub(super) keeper: Keeper,
    pub(super) helper: Helper,
    toucher: Toucher,
    image: Arc<Image>,
    /// The keeper has decided on a mode for the first time.
    settled: bool,
    direct: bool,
    /// What it decided on while nothing was served yet: the start may still fail, and then with
    /// one line only.
    held_back: Option<Report>,
    announced: bool,
    /// `--populate all`, and the map turned out to be too large for that before anybody was served.
    over_cap: bool,
    populate: bool,
}

impl Owner {
    pub(super) fn new(
        image: &Arc<Image>,
        rules: Rules,
        shared: Arc<Shared>,
        config: &Config,
        inbox: Poster,
        now: Duration,
    ) -> io::Result<Self> {
        let keeper = KeeperConfig {
            geometry: *image.geometry(),
            start: image.start(),
            window: image.window(),
            max_extents: config.max_extents,
            populate: config.populate,
            lease_break_time: image.lease_break_time(),
            proven: image.proven(),
            barriers: image.barriers(),
            strict: config.strict,
            rules,
        };
        Ok(Self {
            keeper: Keeper::new(keeper, shared, now),
            helper: Helper::start(Arc::clone(image), inbox)?,
            toucher: Toucher::start(Arc::clone(image))?,
            image: Arc::clone(image),
            settled: false,
            direct: false,
            held_back: None,
            announced: false,
            over_cap: false,
            populate: config.populate,
        })
    }

    /// Whether it is known how the image begins.
    pub(super) const fn settled(&self) -> bool {
        self.settled
    }

    /// Whether direct mode is on.
    pub(super) const fn direct(&self) -> bool {
        self.direct
    }

    /// Whether the whole map was to be loaded and is too large for that; only before anybody is served.
    pub(super) const fn over_cap(&self) -> bool {
        self.over_cap
    }

    /// Carries out what the keeper wants.
    pub(super) fn drive(&mut self, front: Option<&Front>) {
        while let Some(action) = self.keeper.poll_action() {
            match action {
                Action::Send(worker, message) => {
                    if let Some(front) = front {
                        front.send(worker, message);
                    }
                }
                Action::Run(id, job) => self.helper.give(Task::Job(id, job)),
                // Without a lease there is nothing to give, and the kernel would complain.
                Action::DropLease if self.image.start() != Start::Eligible => {}
                Action::DropLease => self.image.drop_lease(),
                Action::Touch => self.toucher.order(),
                Action::Report(report) => {
                    match report {
                        Report::Direct => (self.settled, self.direct) = (true, true),
                        Report::Filesystem(_) | Report::Refused(_) => {
                            (self.settled, self.direct) = (true, false);
                        }
                        Report::Unpinned => self.over_cap = !self.announced,
                        Report::ForcedBreak => {
                            forced_break(&self.image, front.map_or(0, Front::draining));
                        }
                        Report::SlowBreak | Report::FlushFailed(_) | Report::Populated => {}
                    }
                    if self.announced {
                        self.say(report);
                    } else if !matches!(report, Report::Populated | Report::Unpinned) {
                        self.held_back = Some(report);
                    }
                }
            }
        }
    }

    /// The start has succeeded: the mode goes to the log, now and whenever it changes.
    pub(super) fn announce(&mut self) {
        self.announced = true;
        match self.held_back.take() {
            Some(report) => self.say(report),
            None => self.say(Report::Filesystem(Why::Starting)),
        }
        if !self.populate {
            return;
        }
        if self.direct {
            self.say(Report::Populated);
        } else if self.image.start() == Start::Eligible {
            warn!("--populate all: the extent map is loaded when direct mode begins");
        } else {
            warn!("--populate all: there is no extent map to load");
        }
    }

    fn say(&self, report: Report) {
        let snapshot = self.keeper.snapshot();
        let reason = reason(&self.image, &snapshot);
        let image = image_field(self.image.path());
        match report {
            Report::Direct => {
                let device = self.image.device_path().unwrap_or(self.image.path()).display();
                info!(image, %device, "mode=direct: {reason}");
            }
            Report::Filesystem(Why::Stopping) => {}
            Report::Filesystem(Why::Mismatch) => error!(image, "mode=filesystem: {reason}"),
            Report::Filesystem(_) if self.image.start() == Start::Filesystem => {
                info!(image, "mode=filesystem: {reason}");
            }
            Report::Filesystem(_) | Report::Refused(_) => {
                let errno = match report {
                    Report::Refused(Refusal::Failed(errno) | Refusal::Unsynced(errno)) => {
                        format!(" ({})", io::Error::from_raw_os_error(errno))
                    }
                    _ => String::new(),
                };
                warn!(image, "mode=filesystem: {reason}{errno}");
            }
            Report::Populated => {
                info!(image, extents = snapshot.cached, "the whole extent map is loaded");
            }
            Report::Unpinned => {
                warn!(
                    image,
                    "the extent map has outgrown --max-extents; it is not kept whole any more"
                );
            }
            // Said where the bytes in flight are known.
            Report::ForcedBreak => {}
            Report::SlowBreak => {
                error!(
                    image,
                    "raw I/O has not ended in half the lease-break time; the kernel will let the other process in"
                );
            }
            Report::FlushFailed(errno) => {
                let error = io::Error::from_raw_os_error(errno);
                error!(image, %error, "a flush failed; flushes fail until the guest resets the device");
            }
        }
    }

    /// The end: what is ordered is carried out, for at most `patience`.
    pub(super) fn finish(self, patience: Duration) {
        self.toucher.finish(patience);
    }
}

/// A lease break was forced, and `bytes` of raw I/O can still reach the disk (R2b).
fn forced_break(image: &Image, bytes: u64) {
    let image = image_field(image.path());
    error!(
        image,
        bytes_in_flight = bytes,
        "the lease break was forced with raw I/O in flight: blocks that the opener frees now may be \
         overwritten; run fsck on the host's filesystem, and see Limits in the README"
    );
}
