// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Watches images for what breaks no lease: a change of an image's size (R5a), the loss of its name
//! (R24).

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

use super::Image;

/// Most events taken in one go.
const EVENTS: u32 = 1024;

/// Blocks lost from one look to the next that mean nothing, in units of 512 bytes: a file's blocks include those of
/// its extent tree, which shrinks when extents grow together.
const TREE: u64 = (1 << 20) / 512;

/// What a look at the file showed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Nothing that matters.
    Unchanged,
    /// Its size is not what it was when it was opened: raw I/O must stop at once.
    SizeChanged,
    /// It has far fewer blocks than at the last look, and it was not a punch of ours: as after it was
    /// cut and grown again. What the map says must not be used any more.
    BlocksLost,
    /// It has no name any more; it is served on.
    Unlinked,
}

/// A watch's name among [`Watches`].
pub type WatchId = i32;

/// What is heard when the kernel had no room for an event: any image may have changed.
const OVERFLOW: WatchId = -1;

/// The watches on all images of the process: one inotify instance, for a user may not have many.
/// Non-blocking; readable when a file was touched in some way.
#[derive(Debug)]
pub struct Watches {
    inotify: OwnedFd,
}

impl Watches {
    /// None yet.
    ///
    /// # Errors
    /// inotify's; with what to raise if it is the user's limit.
    pub fn new() -> io::Result<Self> {
        let flags = CreateFlags::NONBLOCK | CreateFlags::CLOEXEC;
        Ok(Self { inotify: inotify::init(flags).map_err(not_made)? })
    }

    /// Takes the events. Calls `touched` with the watches that have to be looked at, or with `None`
    /// if that is every one.
    ///
    /// # Errors
    /// The read's.
    pub fn hear(&self, mut touched: impl FnMut(Option<WatchId>)) -> io::Result<()> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 1024];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        // Others can make events as fast as we read them; what is left wakes the caller again.
        for _ in 0..EVENTS {
            match events.next() {
                Ok(event) => touched(Some(event.wd()).filter(|id| *id != OVERFLOW)),
                Err(Errno::WOULDBLOCK) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsRawFd for Watches {
    fn as_raw_fd(&self) -> RawFd {
        self.inotify.as_raw_fd()
    }
}

/// The watch on one image.
///
/// Every write through the file rings, so that is worth listening to in direct mode only: without raw
/// I/O a change of size is the filesystem's business.
#[derive(Debug)]
pub struct Watch {
    watches: Arc<Watches>,
    /// `None` for a block device: nothing happens to it that inotify knows.
    id: Option<WatchId>,
    image: Arc<Image>,
    /// Punches begun or ended, and blocks of the file, at the last look.
    seen: Cell<(u64, u64)>,
}

impl Watch {
    pub(super) fn new(image: Arc<Image>, watches: Arc<Watches>) -> io::Result<Self> {
        let id = match image.block_device {
            None => Some(add(&watches, &image, true)?),
            Some(_) => None,
        };
        let seen = Cell::new((image.punches(), image.blocks_now()?));
        Ok(Self { watches, id, image, seen })
    }

    /// What [`Watches::hear`] calls it.
    #[must_use]
    pub const fn id(&self) -> Option<WatchId> {
        self.id
    }

    /// Whether changes of the file's bytes are heard from now on, or only those of its names. What was missed is
    /// seen by a [`check`](Self::check) after this.
    ///
    /// # Errors
    /// inotify's; it goes on as before then.
    pub fn listen(&self, closely: bool) -> io::Result<()> {
        match self.id {
            Some(_) => add(&self.watches, &self.image, closely).map(drop),
            None => Ok(()),
        }
    }

    /// Looks at the file.
    ///
    /// # Errors
    /// fstat's.
    pub fn check(&self) -> io::Result<Change> {
        let before = self.image.punches();
        let blocks = self.image.blocks_now()?;
        let after = self.image.punches();
        let (punches_then, blocks_then) = self.seen.replace((after, blocks));
        let punched = !before.is_multiple_of(2) || [after, punches_then] != [before; 2];
        if self.image.file_size_now()? != self.image.geometry.file_size {
            Ok(Change::SizeChanged)
        } else if blocks.saturating_add(TREE) < blocks_then && !punched {
            Ok(Change::BlocksLost)
        } else if self.image.is_unlinked()? {
            Ok(Change::Unlinked)
        } else {
            Ok(Change::Unchanged)
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            // The kernel has removed it itself if the filesystem is gone.
            let _ = inotify::remove_watch(&self.watches.inotify, id);
        }
    }
}

/// Adds the watch on an image, or changes what it listens to.
fn add(watches: &Watches, image: &Image, closely: bool) -> io::Result<WatchId> {
    // A change of size says MODIFY, the loss of a name ATTRIB.
    let names = WatchFlags::ATTRIB | WatchFlags::DELETE_SELF;
    let what = if closely { names | WatchFlags::MODIFY } else { names };
    // By the descriptor: the image's name may have come to mean another file. It is looked up and not
    // opened, so it breaks no lease.
    let path = format!("/proc/self/fd/{}", image.file.as_raw_fd());
    Ok(inotify::add_watch(&watches.inotify, path, what)?)
}

/// The error names the fix: the kernel calls too many watches of a user "too many open files", and by default 128 daemons
/// of one user are too many.
fn not_made(error: Errno) -> io::Error {
    if error == Errno::MFILE {
        io::Error::other(
            "too many inotify instances of this user or open files: raise the sysctl fs.inotify.max_user_instances",
        )
    } else {
        error.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_too_many_for_inotify_is_told_what_to_raise() {
        assert!(not_made(Errno::MFILE).to_string().contains("fs.inotify.max_user_instances"));
        assert_eq!(not_made(Errno::NOMEM).raw_os_error(), Some(libc::ENOMEM));
    }
}
