// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault disk as a filesystem: a root directory and one file.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, WriteFlags,
};

use super::fault_disk_power::Power;
use super::fault_disk_rules::{Fate, Operation, Rules};

/// The file's name.
pub(super) const NAME: &str = "disk";
const INODE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);

#[derive(Debug)]
pub(super) struct FaultFs {
    power: Arc<Power>,
    size: u64,
    rules: Arc<Rules>,
}

impl FaultFs {
    pub(super) fn new(power: Arc<Power>, size: u64, rules: Arc<Rules>) -> FaultFs {
        FaultFs { power, size, rules }
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o755, 0),
            INODE => (FileType::RegularFile, 0o600, self.size),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    /// Serves at once, or on a thread of its own when the request has to wait: the others must not wait for it.
    fn serve(&self, fate: Option<Fate>, work: impl FnOnce(Result<(), Errno>) + Send + 'static) {
        let rules = Arc::clone(&self.rules);
        match fate {
            None => {
                work(Ok(()));
                rules.leave();
            }
            Some(fate) => drop(thread::spawn(move || {
                work(rules.suffer(fate));
                rules.leave();
            })),
        }
    }
}

impl Filesystem for FaultFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let missing = |_| io::Error::other("this kernel's FUSE cannot do asynchronous direct I/O");
        config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).map_err(missing)?;
        // Background requests beyond this limit would queue in the kernel.
        let _ = config.set_max_background(512);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(INODE) {
            Some(attributes) if parent == INodeNo::ROOT && name == NAME => {
                reply.entry(&TTL, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(
            FileHandle(0),
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        );
    }

    fn flush(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = u64::from(size).min(self.size.saturating_sub(offset));
        let fate = self.rules.arrive(Operation::Read, offset, len, &[]);
        let power = Arc::clone(&self.power);
        self.serve(fate, move |go| {
            let mut buffer = vec![0; usize::try_from(len).unwrap_or(0)];
            match go.and_then(|()| power.read(offset, &mut buffer)) {
                Ok(()) => reply.data(&buffer),
                Err(error) => reply.error(error),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Ok(len) = u32::try_from(data.len()) else {
            return reply.error(Errno::EINVAL);
        };
        let ticket = match self.power.begin_write(offset, data) {
            Ok(ticket) => ticket,
            Err(error) => return reply.error(error),
        };
        let fate = self.rules.arrive(Operation::Write, offset, u64::from(len), data);
        let power = Arc::clone(&self.power);
        self.serve(fate, move |go| match power.end_write(ticket, go) {
            Ok(()) => reply.written(len),
            Err(error) => reply.error(error),
        });
    }

    fn fsync(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _data: bool,
        reply: ReplyEmpty,
    ) {
        let ticket = match self.power.begin_flush() {
            Ok(ticket) => ticket,
            Err(error) => return reply.error(error),
        };
        let fate = self.rules.arrive(Operation::Flush, 0, 0, &[]);
        let power = Arc::clone(&self.power);
        self.serve(fate, move |go| match power.end_flush(ticket, go) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        });
    }
}
