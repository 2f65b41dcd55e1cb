// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A FUSE file whose server stops answering: whatever asks it then waits, most of it without heeding signals.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, Request, Session,
};

use super::command::{context, run};
use super::fault_disk::connection;

const NAME: &str = "ram";
const INODE: INodeNo = INodeNo(2);

/// The file, mounted. Dropping it ends every request that waits for it.
#[derive(Debug)]
pub struct HungFile {
    state: Arc<State>,
    mountpoint: PathBuf,
    abort: PathBuf,
    file: File,
    session: Option<BackgroundSession>,
}

#[derive(Debug, Default)]
struct State {
    hung: AtomicBool,
    asked: AtomicU64,
    flushes: AtomicU64,
}

#[derive(Debug)]
struct HungFs {
    state: Arc<State>,
    size: u64,
}

impl HungFile {
    /// Serves a file of `size` bytes under `mountpoint`, an existing directory.
    pub fn mount(size: u64, mountpoint: &Path) -> io::Result<HungFile> {
        let state = Arc::new(State::default());
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("hung-file".to_owned()), MountOption::RW];
        let filesystem = HungFs { state: Arc::clone(&state), size };
        let session = Session::new(filesystem, mountpoint, &config);
        let session = session.map_err(context("mounting the hung file"))?.spawn()?;
        let abort = connection(mountpoint)?.join("abort");
        let file = File::options().read(true).write(true).open(mountpoint.join(NAME))?;
        let mountpoint = mountpoint.into();
        Ok(HungFile { state, mountpoint, abort, file, session: Some(session) })
    }

    /// The file, open. Closing it asks the server, so that has to be aborted first, which `drop` does.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// From now on nothing is answered.
    pub fn hang(&self) {
        self.state.hung.store(true, Ordering::SeqCst);
    }

    /// What it has been asked since it hangs.
    pub fn asked(&self) -> u64 {
        self.state.asked.load(Ordering::SeqCst)
    }

    /// Its name.
    pub fn path(&self) -> PathBuf {
        self.mountpoint.join(NAME)
    }

    /// How many descriptors of it have been closed, duplicates of one description included.
    pub fn flushes(&self) -> u64 {
        self.state.flushes.load(Ordering::SeqCst)
    }

    /// Ends every request that waits, and all later ones.
    pub fn abort(&self) -> io::Result<()> {
        std::fs::write(&self.abort, "1")
    }
}

impl Drop for HungFile {
    fn drop(&mut self) {
        // Aborted before, perhaps.
        let _ = self.abort();
        let _ = run("umount", &[Path::new("--lazy"), &self.mountpoint]);
        drop(self.session.take());
    }
}

impl HungFs {
    /// Whether to answer.
    fn answers(&self) -> bool {
        let hung = self.state.hung.load(Ordering::SeqCst);
        self.state.asked.fetch_add(u64::from(hung), Ordering::SeqCst);
        !hung
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let root = inode == INodeNo::ROOT;
        FileAttr {
            ino: inode,
            size: if root { 0 } else { self.size },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if root { FileType::Directory } else { FileType::RegularFile },
            perm: 0o755,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for HungFs {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            // Nothing is remembered, so that each question comes here.
            reply.entry(&Duration::ZERO, &self.attributes(INODE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        if self.answers() {
            reply.attr(&Duration::ZERO, &self.attributes(inode));
        } else {
            std::mem::forget(reply);
        }
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn flush(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.state.flushes.fetch_add(1, Ordering::SeqCst);
        if self.answers() {
            reply.ok();
        } else {
            std::mem::forget(reply);
        }
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if self.answers() {
            reply.data(&vec![0; usize::try_from(size).unwrap_or(0)]);
        } else {
            std::mem::forget(reply);
        }
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        if self.answers() {
            reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
        } else {
            std::mem::forget(reply);
        }
    }
}
