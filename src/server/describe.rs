// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Words for states: what the log says and `status` shows.

use std::io;

use crate::control::check::{busy, mode_name, refusal};
use crate::control::status::{Extents, Flush, Status};
use crate::engine::keeper::{Lease, Snapshot, Start};
use crate::engine::message::{Refusal, Why};
use crate::image::Image;
use crate::sys::lease::Kind;

use super::front::Front;

/// Why the mode is what it is; what follows the first semicolon says what helps.
pub(super) fn reason(image: &Image, snapshot: &Snapshot) -> String {
    if snapshot.direct {
        return match image.start() {
            Start::Identity => "a block device, opened exclusively".to_owned(),
            _ if image.lease_kind() == Kind::Read => {
                "the lease is held: nobody has the file open for writing".to_owned()
            }
            _ => "the lease is held: nobody else has the file open".to_owned(),
        };
    }
    match (snapshot.why, image.not_eligible()) {
        (Why::NotEligible, Some(reason)) => reason.to_string(),
        (Why::Busy, _) => busy(image).to_owned(),
        (why, _) => words(why).to_owned(),
    }
}

const fn words(why: Why) -> &'static str {
    match why {
        Why::Starting => "direct mode is being entered",
        Why::NotEligible => "asked for with --mode filesystem",
        Why::LeaseBroken => {
            "another process opened the image; direct mode comes back when it has closed it"
        }
        Why::LeaseLost => {
            "the kernel took the lease because its break was not answered in time; direct mode comes back when the file is closed"
        }
        Why::SizeChanged => "the file's size changed and it was not us; restart to map it anew",
        Why::BlocksLost => {
            "blocks of the file were taken away by a way that breaks no lease; direct mode comes back with a new map"
        }
        Why::Changed => refusal(Refusal::Changed),
        Why::Mismatch => refusal(Refusal::Mismatch),
        Why::Busy => refusal(Refusal::Busy),
        Why::Unseen => refusal(Refusal::Unseen),
        Why::PagesCached => refusal(Refusal::PagesCached),
        Why::Failed => refusal(Refusal::Failed(0)),
        Why::Stopping => "extentd is stopping",
    }
}

pub(super) const fn lease(lease: Lease) -> &'static str {
    match lease {
        Lease::None => "none",
        Lease::Held => "held",
        Lease::Breaking => "breaking",
    }
}

/// What only the server knows of the state.
#[derive(Clone, Copy, Debug)]
pub(super) struct Particulars {
    pub(super) uptime_seconds: u64,
    pub(super) unlinked: bool,
    pub(super) block_size: u32,
    pub(super) read_only: bool,
}

pub(super) fn status(
    image: &Image,
    snapshot: &Snapshot,
    front: &Front,
    particulars: Particulars,
) -> Status {
    let counts = front.counts();
    let Particulars { uptime_seconds, unlinked, block_size, read_only } = particulars;
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds,
        mode: mode_name(snapshot.direct).to_owned(),
        reason: reason(image, snapshot),
        lease: lease(snapshot.lease).to_owned(),
        image: image.path().display().to_string(),
        unlinked,
        device: image.device_path().map(|path| path.display().to_string()),
        capacity_bytes: image.window().len(),
        block_size,
        read_only,
        frontend: front.state().to_owned(),
        sessions: front.sessions(),
        extents: Extents {
            cached: snapshot.cached as u64,
            mapped_bytes: snapshot.mapped_bytes,
            fiemap_calls: snapshot.fiemap_calls,
            evictions: snapshot.evictions,
        },
        requests: counts.requests,
        segments: counts.segments,
        flush: Flush {
            requests: snapshot.flush_requests,
            device_flushes: snapshot.device_flushes,
            metadata_commits: snapshot.metadata_commits,
            error: snapshot
                .flush_error
                .map(|errno| io::Error::from_raw_os_error(errno).to_string()),
        },
        queues: counts.queues,
        lease_breaks: snapshot.lease_breaks,
        forced_breaks: snapshot.forced_breaks,
    }
}
