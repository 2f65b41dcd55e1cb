// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The limit: the same load straight through an io_uring of the client's own, no server in between.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::{IoUring, opcode, types};
use rustix::fs::OFlags;
use vm_memory::{MmapRegion, VolatileMemory};

use super::guest::Wait;
use super::load::Disk;
use super::workload::{Request, Workload};
use crate::rig::Random;
use crate::rig::command::context;

const FILE: types::Fixed = types::Fixed(0);
const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// An open file or device with its ring. There are no queues here: the requests of all share the one ring.
pub(super) struct Native {
    /// First: no request is in flight any more when the memory goes.
    ring: IoUring,
    memory: MmapRegion,
    block: u32,
    /// What each slot's completion has to say.
    expected: Vec<u32>,
    wait: Wait,
    _file: File,
}

impl Native {
    /// Opens `path` with O_DIRECT. To be called on the thread that will use it: the ring takes requests from one thread only.
    pub(super) fn open(path: &Path, workload: Workload, wait: Wait) -> io::Result<Native> {
        let direct = OFlags::DIRECT.bits().cast_signed();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(direct)
            .open(path)
            .map_err(context(path.display()))?;
        let slots = usize::from(workload.slots());
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(u32::from(workload.slots()).next_power_of_two())?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let block = usize::try_from(workload.block).map_err(io::Error::other)?;
        let memory = MmapRegion::new(block * slots).map_err(io::Error::other)?;
        fill_buffers(&memory);
        let expected = vec![0; slots];
        Ok(Native { ring, memory, block: workload.block, expected, wait, _file: file })
    }
}

/// What is written is not all zeros, which a disk may treat as a case of its own.
pub(super) fn fill_buffers(memory: &MmapRegion) {
    memory.as_volatile_slice().copy_from(&Random::new(1).bytes(memory.size()));
}

impl Disk for Native {
    fn queue(&mut self, slot: u16, request: Request) -> io::Result<()> {
        let Some(expected) = self.expected.get_mut(usize::from(slot)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let start = usize::from(slot) * self.block as usize;
        let buffer = self.memory.as_ptr().wrapping_add(start);
        let (entry, result) = match request {
            Request::Write(offset) => {
                (opcode::Write::new(FILE, buffer, self.block).offset(offset).build(), self.block)
            }
            Request::Read(offset) => {
                (opcode::Read::new(FILE, buffer, self.block).offset(offset).build(), self.block)
            }
            Request::Discard(offset) => {
                let punch = opcode::Fallocate::new(FILE, self.block.into());
                (punch.offset(offset).mode(PUNCH_HOLE).build(), 0)
            }
            Request::Flush => {
                (opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(), 0)
            }
        };
        *expected = result;
        let entry = entry.user_data(u64::from(slot));
        // SAFETY: `buffer` is slot `slot` of `self.memory`, which outlives the ring; only this request uses it.
        unsafe { self.ring.submission().push(&entry) }.map_err(io::Error::other)
    }

    fn submit(&mut self) -> io::Result<()> {
        // Looking for the next completion submits too: one system call for both.
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        let want = usize::from(self.wait == Wait::Event);
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
            let slot = u16::try_from(entry.user_data()).unwrap_or(u16::MAX);
            let expected = self.expected.get(usize::from(slot)).copied();
            match u32::try_from(entry.result()) {
                Ok(result) if Some(result) == expected => done.push(slot),
                Ok(short) => {
                    return Err(io::Error::other(format!("short transfer: {short} bytes")));
                }
                Err(_) => return Err(io::Error::from_raw_os_error(-entry.result())),
            }
        }
        Ok(())
    }
}
