// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Watches an image for what breaks no lease: a change of its size (R5a), the loss of its name
//! (R24).

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::stat;
use rustix::io::Errno;

use super::{Identity, Image};

/// Most events taken in one look.
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

/// An inotify watch on the image. Non-blocking; readable when the file was touched in some way.
///
/// Every write through the file makes it readable too, so it is worth listening to in direct
/// mode only: without raw I/O a change of size is the filesystem's business.
#[derive(Debug)]
pub struct Watch {
    inotify: OwnedFd,
    image: Arc<Image>,
    /// Punches begun or ended, and blocks of the file, at the last look.
    seen: Cell<(u64, u64)>,
}

impl Watch {
    pub(super) fn new(image: Arc<Image>) -> io::Result<Self> {
        let flags = CreateFlags::NONBLOCK | CreateFlags::CLOEXEC;
        let inotify = inotify::init(flags).map_err(not_made)?;
        if image.block_device.is_none() {
            // A change of size says MODIFY, the loss of a name ATTRIB.
            let what = WatchFlags::MODIFY | WatchFlags::ATTRIB | WatchFlags::DELETE_SELF;
            // A watch looks the path up and opens nothing, so it breaks no lease; but the name may
            // have come to mean another file, and that one is not to be watched.
            let watch = inotify::add_watch(&inotify, &image.canonical, what)?;
            let named = stat(&image.canonical)?;
            if image.identity != (Identity { dev: named.st_dev, ino: named.st_ino }) {
                inotify::remove_watch(&inotify, watch)?;
                return Err(io::Error::other("the path names another file now"));
            }
        }
        let seen = Cell::new((image.punches(), image.blocks_now()?));
        Ok(Self { inotify, image, seen })
    }

    /// Takes the events and looks at the file.
    ///
    /// # Errors
    /// The read's, or fstat's.
    pub fn check(&self) -> io::Result<Change> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 1024];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        // Others can make events as fast as we read them; what is left wakes the caller again.
        for _ in 0..EVENTS {
            match events.next() {
                Ok(_) => {}
                Err(Errno::WOULDBLOCK) => break,
                Err(error) => return Err(error.into()),
            }
        }
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

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.inotify.as_raw_fd()
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
