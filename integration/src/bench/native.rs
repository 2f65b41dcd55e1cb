// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The limit: the same load straight through an io_uring of the client's own, no server in between.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::{IoUring, opcode, types};
use rustix::fs::OFlags;
use vm_memory::MmapRegion;

use super::guest::Wait;
use super::load::{BLOCK, Disk, MAX_DEPTH};
use crate::rig::command::context;

/// An open file or device with its ring.
pub(super) struct Native {
    /// First: no request is in flight any more when the memory goes.
    ring: IoUring,
    memory: MmapRegion,
    wait: Wait,
    _file: File,
}

impl Native {
    /// Opens `path` with O_DIRECT. To be called on the thread that will use it: the ring takes requests from one thread only.
    pub(super) fn open(path: &Path, wait: Wait) -> io::Result<Native> {
        let direct = OFlags::DIRECT.bits().cast_signed();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(direct)
            .open(path)
            .map_err(context(path.display()))?;
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(u32::from(MAX_DEPTH))?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let memory = MmapRegion::new(BLOCK * usize::from(MAX_DEPTH)).map_err(io::Error::other)?;
        Ok(Native { ring, memory, wait, _file: file })
    }
}

impl Disk for Native {
    fn queue(&mut self, slot: u16, write: bool, offset: u64) -> io::Result<()> {
        let buffer = self.memory.as_ptr().wrapping_add(usize::from(slot) * BLOCK);
        if slot >= MAX_DEPTH {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len = u32::try_from(BLOCK).map_err(io::Error::other)?;
        let entry = if write {
            opcode::Write::new(types::Fixed(0), buffer, len).offset(offset).build()
        } else {
            opcode::Read::new(types::Fixed(0), buffer, len).offset(offset).build()
        };
        let entry = entry.user_data(u64::from(slot));
        // SAFETY: `buffer` is slot `slot` of `self.memory`, which outlives the ring; only this request uses it.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    fn submit(&mut self) -> io::Result<()> {
        // Looking for the next completion submits too: one system call for both.
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        let want = usize::from(self.wait == Wait::Block);
        let entered = {
            let queue = self.ring.submission();
            // Polling enters the kernel only with something to submit, or when it says that completions are to be had.
            let nothing_to_do = want == 0 && queue.is_empty() && !queue.taskrun();
            drop(queue);
            if nothing_to_do { Ok(0) } else { self.ring.submit_and_wait(want) }
        };
        match entered {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        }
        for entry in self.ring.completion() {
            match usize::try_from(entry.result()) {
                Ok(BLOCK) => done.push(u16::try_from(entry.user_data()).unwrap_or(u16::MAX)),
                Ok(short) => {
                    return Err(io::Error::other(format!("short transfer: {short} bytes")));
                }
                Err(_) => return Err(io::Error::from_raw_os_error(-entry.result())),
            }
        }
        Ok(())
    }
}
