// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Carries out what the keeper decided, on a thread that may block in the filesystem. Nothing
//! here decides anything.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate, fstat, fsync};

use super::extents::with_holes;
use super::{Identity, Image, eligible, open, openers};
use crate::engine::extent::{Extent, ExtentMap, State};
use crate::engine::keeper::Start;
use crate::engine::message::{Job, JobDone, MapAnswer, Proof, Refusal};
use crate::engine::units::{DeviceOffset, FileRange};
use crate::sys::{fiemap, lease, page_cache};

/// How often and how far apart the page cache is emptied: other CPUs hold pages a moment longer.
const DROPS: u32 = 10;
const DROP_PAUSE: Duration = Duration::from_millis(5);

/// In place of a process, in `Image::uncounted`: it could not be told whether there is one.
const UNSEEN: u32 = u32::MAX;

/// The errno of an error, for the keeper; EIO if it is our own.
fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

impl Image {
    /// Does a job. May block as long as the filesystem does.
    pub fn run(&self, job: &Job) -> JobDone {
        match *job {
            Job::Map { range, max_extents } => {
                JobDone::Map(self.map(range, max_extents).map_err(|error| errno(&error)))
            }
            Job::Enter => JobDone::Enter(self.enter()),
            Job::Confirm => JobDone::Confirm(self.settle()),
            Job::Punch { range } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                self.punches.fetch_add(1, Ordering::SeqCst);
                let done = fallocate(&self.file, flags, range.start, range.len());
                self.punches.fetch_add(1, Ordering::SeqCst);
                JobDone::Punch(done.map_err(rustix::io::Errno::raw_os_error))
            }
        }
    }

    /// Gives the lease back and drops the pages that file writes left. Never blocks: dirty pages
    /// are left alone, for dropping them would begin to write them (R2). Direct mode empties the
    /// cache again before it begins.
    pub fn drop_lease(&self) {
        let fd = self.file.as_fd();
        if page_cache::has_clean_only(fd) {
            // What stays is seen when direct mode begins again.
            let _ = page_cache::drop_clean(fd, FileRange::ALL);
        }
        match lease::release(fd) {
            // EAGAIN: it is gone already.
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) => {
                tracing::error!("{}: the lease was not given back: {error}", self.path.display());
            }
        }
    }

    fn map(&self, range: FileRange, max_extents: u32) -> io::Result<MapAnswer> {
        if self.block_device.is_some() {
            let all = FileRange::new(0, self.geometry.file_size);
            let device = DeviceOffset(range.start);
            let extent = Extent { range, device, state: State::Mapped }.clip(&all);
            return Ok(MapAnswer { covered: range, extents: vec![extent], proof: Proof::None });
        }
        self.empty_cache(range)?;
        if self.start == Start::Eligible {
            // What has become another kind of file has no map to go by: requests go through it.
            eligible::check_inode(self.file.as_fd()).map_err(io::Error::other)?;
        }
        let (mut extents, covered) = self.fiemap(range, max_extents)?;
        let proof = self.prove_answer(&extents)?;
        // R10a: pages that are there now would one day be read, or written, in place of the disk's.
        if self.cached(covered)? > 0 {
            extents = with_holes(&extents, covered);
            for extent in &mut extents {
                if self.cached(extent.range)? > 0 {
                    extent.state = State::Opaque;
                }
            }
            extents.retain(|extent| extent.state != State::Hole);
        }
        Ok(MapAnswer { covered, extents, proof })
    }

    /// How many extents the whole map has, counted as it would be cached: holes too, neighbours as one. May block.
    ///
    /// # Errors
    /// FIEMAP's.
    pub fn count_extents(&self) -> io::Result<u64> {
        let all = self.window().round_out(u64::from(self.geometry.fs_block));
        let (mut at, mut count, mut end) = (all.start, 0, ExtentMap::new());
        while at < all.end {
            let (extents, covered) =
                self.fiemap(FileRange::new(at, all.end), fiemap::MAX_EXTENTS)?;
            if covered.end <= at {
                return Err(io::ErrorKind::InvalidData.into());
            }
            at = covered.end;
            end.replace(covered, &with_holes(&extents, covered));
            // The last one may go on in the next answer.
            let last = end.iter().last().map_or(at, |extent| extent.range.start);
            count += end.len() as u64;
            end.remove(FileRange::new(0, last));
            count -= end.len() as u64;
        }
        Ok(count + end.len() as u64)
    }

    fn cached(&self, range: FileRange) -> io::Result<u64> {
        page_cache::pages(self.file.as_fd(), range).map(|pages| pages.cached)
    }

    /// Writes back and drops what is cached of `range`.
    fn empty_cache(&self, range: FileRange) -> io::Result<()> {
        let fd = self.file.as_fd();
        if self.cached(range)? == 0 {
            return Ok(());
        }
        self.write_back()?;
        page_cache::drop_clean(fd, range)?;
        if self.cached(range)? == 0 {
            return Ok(());
        }
        // A large folio that reaches out of the range is dropped only as a whole.
        page_cache::drop_clean(fd, FileRange::ALL)
    }

    fn enter(&self) -> Result<(), Refusal> {
        let fd = self.file.as_fd();
        self.take_lease().map_err(|error| match error.raw_os_error() {
            Some(libc::EAGAIN) => Refusal::Busy,
            _ => Refusal::Failed(errno(&error)),
        })?;
        let ready = self.counted().and_then(|()| self.unchanged()).and_then(|()| self.settle());
        if ready.is_err() {
            // It was ours a moment ago; if it was taken meanwhile there is nothing to give back.
            let _ = lease::release(fd);
        }
        ready
    }

    /// Whether the lease counts everybody: looked at while it is held, since from then on every open
    /// breaks it. Where files cannot share blocks nothing that such a descriptor is good for moves
    /// any.
    fn counted(&self) -> Result<(), Refusal> {
        if !self.shares_blocks {
            return Ok(());
        }
        let Identity { dev, ino } = self.identity;
        let last = self.uncounted.load(Ordering::Relaxed);
        let found = openers::uncounted(dev, ino, last, openers::LIMIT);
        let (now, counted) = match found {
            Ok(None) => (0, Ok(())),
            Ok(Some(pid)) => (pid, Err(Refusal::Busy)),
            Err(_) => (UNSEEN, Err(Refusal::Unseen)),
        };
        // Once for each, not at each try.
        if self.uncounted.swap(now, Ordering::Relaxed) != now {
            let path = self.path.display();
            match found {
                Ok(None) => {}
                Ok(Some(pid)) => tracing::warn!(
                    "{path}: process {pid} has it open for ioctls only (access mode 3), by which \
                     its blocks can be moved unseen; end that one"
                ),
                Err(unseen) => {
                    tracing::warn!("{path}: descriptors for ioctls only cannot be seen: {unseen}");
                }
            }
        }
        counted
    }

    /// Whether what was found out at open still holds.
    fn unchanged(&self) -> Result<(), Refusal> {
        let failed = |error: rustix::io::Errno| Refusal::Failed(error.raw_os_error());
        let stat = fstat(&self.file).map_err(failed)?;
        let same_size = u64::try_from(stat.st_size) == Ok(self.geometry.file_size);
        // Workers confirm the lease as often as the time at open asks for (R2a).
        let same_patience = open::lease_break_time() >= self.lease_break_time;
        if !same_size || !same_patience || stat.st_dev != self.identity.dev {
            return Err(Refusal::Changed);
        }
        eligible::check(&self.subject()).map_err(|reason| {
            tracing::warn!("{}: no direct mode any more: {reason}", self.path.display());
            Refusal::Changed
        })
    }

    /// Everything on disk, nothing in the page cache (R3).
    fn settle(&self) -> Result<(), Refusal> {
        let failed = |error: io::Error| Refusal::Failed(errno(&error));
        fsync(&self.file).map_err(|error| Refusal::Unsynced(error.raw_os_error()))?;
        for _ in 0..DROPS {
            page_cache::drop_clean(self.file.as_fd(), FileRange::ALL).map_err(failed)?;
            if self.cached(FileRange::ALL).map_err(failed)? == 0 {
                return Ok(());
            }
            thread::sleep(DROP_PAUSE);
        }
        Err(Refusal::PagesCached)
    }
}
