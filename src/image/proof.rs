// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Trust but verify (R6): the same blocks, read raw and through the file.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rustix::fs::fsync;
use rustix::io::pread;

use super::Image;
use super::aligned::AlignedBuf;
use super::device::Device;
use super::extents::{Bounds, translate};
use crate::engine::extent::{Extent, State};
use crate::engine::message::Proof;
use crate::engine::units::{DeviceOffset, FileRange};
use crate::sys::fiemap::MAX_EXTENTS;

/// Blocks looked at when the image is opened, and how many of them must not be zeros.
const AT_OPEN: Sample = Sample { blocks: 64, enough: 8 };
/// The same for an answer of FIEMAP, as long as nothing has been proven.
const AT_MAP: Sample = Sample { blocks: 8, enough: 4 };
/// How often a difference must show: somebody may be writing.
const TRIES: u32 = 3;
/// How far from the file's end the second half of the sample at open is taken.
const END: u64 = 64 << 20;

#[derive(Clone, Copy)]
struct Sample {
    blocks: usize,
    enough: u32,
}

/// What one block showed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seen {
    Equal,
    Zeros,
    Different,
    /// It changes while being read.
    Unsure,
}

/// Four buffers of one filesystem block.
struct Comparison<'a> {
    file: BorrowedFd<'a>,
    device: BorrowedFd<'a>,
    /// Through the file, raw, and both once more.
    reads: [AlignedBuf; 4],
}

impl<'a> Comparison<'a> {
    fn new(image: &'a Image, device: &'a Device) -> Self {
        let block = image.geometry.fs_block as usize;
        let align = image.geometry.mem_align.max(4096) as usize;
        let reads = std::array::from_fn(|_| AlignedBuf::new(block, align));
        Self { file: image.file.as_fd(), device: device.fd.as_fd(), reads }
    }

    /// Reads a block both ways, twice: what was written between two reads makes them differ too,
    /// but not twice the same.
    fn look(&mut self, at: u64, place: DeviceOffset) -> io::Result<Seen> {
        let [file, raw, file_again, raw_again] = &mut self.reads;
        read_block(self.file, file, at)?;
        read_block(self.device, raw, place.0)?;
        if file.bytes() == raw.bytes() {
            let zeros = file.bytes().iter().all(|&byte| byte == 0);
            return Ok(if zeros { Seen::Zeros } else { Seen::Equal });
        }
        read_block(self.file, file_again, at)?;
        read_block(self.device, raw_again, place.0)?;
        let steady = file.bytes() == file_again.bytes() && raw.bytes() == raw_again.bytes();
        Ok(if steady { Seen::Different } else { Seen::Unsure })
    }

    fn look_patiently(&mut self, at: u64, place: DeviceOffset) -> io::Result<Seen> {
        for _ in 0..TRIES {
            let seen = self.look(at, place)?;
            if seen != Seen::Different {
                return Ok(seen);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Seen::Different)
    }
}

fn read_block(fd: BorrowedFd<'_>, buffer: &mut AlignedBuf, at: u64) -> io::Result<()> {
    let got = pread(fd, &mut *buffer.bytes_mut(), at)?;
    if got == buffer.bytes().len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Up to `count` blocks of the mapped extents, spread over all of them and inside each.
fn spread(extents: &[Extent], block: u64, count: usize) -> Vec<(u64, DeviceOffset)> {
    let placed: Vec<&Extent> = extents
        .iter()
        .filter(|e| matches!(e.state, State::Mapped | State::Shared) && e.range.len() >= block)
        .collect();
    let stride = placed.len().div_ceil(count.max(1)).max(1);
    let chosen: Vec<&&Extent> = placed.iter().step_by(stride).collect();
    let each = (count / chosen.len().max(1)).max(1) as u64;
    let mut out = Vec::with_capacity(count);
    for extent in chosen {
        let blocks = extent.range.len() / block;
        for nth in 0..each.min(blocks) {
            let at = extent.range.start + blocks * nth / each.min(blocks) * block;
            out.push((at, extent.place(at)));
        }
    }
    out
}

impl Image {
    /// The sizes that extents must fit.
    pub(super) fn bounds(&self) -> Bounds {
        Bounds {
            file_size: self.geometry.file_size,
            device_size: self.device.as_ref().map_or(u64::MAX, |device| device.facts.size),
            fs_block: u64::from(self.fs_block),
            unit: u64::from(self.geometry.fs_block),
            write_block: u64::from(self.geometry.write_block),
        }
    }

    /// What FIEMAP says of `range`, after whatever is dirty was written back, and how much of it
    /// the answer speaks about.
    pub(super) fn fiemap(
        &self,
        range: FileRange,
        max: u32,
    ) -> io::Result<(Vec<Extent>, FileRange)> {
        let mut buffer = self.fiemap.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = buffer.query(self.file.as_fd(), range.start, range.len(), max)?;
        drop(buffer);
        let covered = match answer.extents.last() {
            Some(last) if !answer.complete => {
                let end = (last.logical + last.length).min(range.end);
                FileRange::new(range.start, end - end % u64::from(self.geometry.fs_block))
            }
            _ => range,
        };
        if covered.is_empty() && !range.is_empty() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok((translate(&answer.extents, covered, &self.bounds()), covered))
    }

    /// Writes every dirty page back and waits for it. By FIEMAP_FLAG_SYNC, because fsync(2) and
    /// sync_file_range(2) would tell an error of the disk to us, and then no more to the
    /// `fdatasync` of the guest's next FLUSH (R16).
    pub(super) fn write_back(&self) -> io::Result<()> {
        let mut buffer = self.fiemap.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.query(self.file.as_fd(), 0, self.geometry.fs_block.into(), 1).map(drop)
    }

    /// The comparison at open. Nobody is kept from writing yet, so a difference counts only if
    /// it stays and the block has not moved.
    pub(super) fn prove_at_open(&self) -> io::Result<Proof> {
        fsync(&self.file)?;
        let block = u64::from(self.geometry.fs_block);
        let file = FileRange::new(0, self.geometry.file_size).round_out(block);
        let (mut extents, covered) = self.fiemap(file, MAX_EXTENTS)?;
        let end = file.end.saturating_sub(END).max(covered.end);
        if end < file.end {
            extents.extend(self.fiemap(FileRange::new(end, file.end), MAX_EXTENTS)?.0);
        }
        self.prove(&extents, AT_OPEN)
    }

    /// The comparison of one answer of FIEMAP, until one has shown that both ways agree.
    pub(super) fn prove_answer(&self, extents: &[Extent]) -> io::Result<Proof> {
        // Said each time: whoever heard it first may have asked for the control socket only.
        if self.proven() { Ok(Proof::Equal) } else { self.prove(extents, AT_MAP) }
    }

    fn prove(&self, extents: &[Extent], sample: Sample) -> io::Result<Proof> {
        let Some(device) = &self.device else { return Ok(Proof::None) };
        let block = u64::from(self.geometry.fs_block);
        let mut comparison = Comparison::new(self, device);
        let mut equal = 0;
        for (at, place) in spread(extents, block, sample.blocks) {
            // An unreadable block proves nothing; whoever wants it gets the error.
            match comparison.look_patiently(at, place).unwrap_or(Seen::Unsure) {
                Seen::Equal => equal += 1,
                Seen::Different if self.still_at(at, place)? => return Ok(Proof::Different),
                Seen::Zeros | Seen::Unsure | Seen::Different => {}
            }
            if equal >= sample.enough {
                break;
            }
        }
        if equal == 0 {
            return Ok(Proof::None);
        }
        self.proven.store(true, Ordering::Relaxed);
        Ok(Proof::Equal)
    }

    /// Whether the block of the file at `at` still lies there.
    fn still_at(&self, at: u64, place: DeviceOffset) -> io::Result<bool> {
        let block = FileRange::new(at, at + u64::from(self.geometry.fs_block));
        let (extents, _) = self.fiemap(block, MAX_EXTENTS)?;
        Ok(extents.first().is_some_and(|extent| {
            extent.range == block
                && extent.device == place
                && matches!(extent.state, State::Mapped | State::Shared)
        }))
    }
}

#[cfg(test)]
#[path = "proof_tests.rs"]
mod tests;
