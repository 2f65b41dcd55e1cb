// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Image files of every kind of layout.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate, statvfs};

use super::command::run;
use super::random::Random;

/// How an image's blocks lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Every block allocated and written.
    Written,
    /// A hole from end to end.
    Sparse,
    /// Allocated and unwritten.
    Fallocated,
    /// Written, one extent per block, the blocks scattered.
    Fragmented,
    /// Stretches of written, hole and unwritten, of 4 KiB to 1 MiB.
    Mixed,
}

impl Layout {
    /// All of them.
    pub const ALL: [Layout; 5] =
        [Layout::Written, Layout::Sparse, Layout::Fallocated, Layout::Fragmented, Layout::Mixed];

    /// Makes the file and returns its bytes. It is durable, and nothing of it is in the page cache afterwards.
    pub fn make(self, path: &Path, size: u64, seed: u64) -> io::Result<Vec<u8>> {
        let mut random = Random::new(seed);
        let mut bytes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        if self == Layout::Fragmented {
            scatter_free_space(path, size)?;
        }
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        file.set_len(size)?;
        match self {
            Layout::Sparse => {}
            Layout::Fallocated => allocate(&file, 0, size)?,
            Layout::Written | Layout::Fragmented => {
                random.fill(&mut bytes);
                file.write_all_at(&bytes, 0)?;
            }
            Layout::Mixed => mix(&file, &mut bytes, &mut random)?,
        }
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        drop(file);
        if self == Layout::Fragmented {
            clear_up(path)?;
        }
        Ok(bytes)
    }
}

fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), offset, len) {
        // ext2 and ext3 have no unwritten extents: what they can do is a hole.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        done => Ok(done?),
    }
}

fn mix(file: &File, bytes: &mut [u8], random: &mut Random) -> io::Result<()> {
    let mut offset = 0;
    let mut rest = bytes;
    while !rest.is_empty() {
        let most = if random.one_in(4) { 256 } else { 8 };
        let stretch = (4096 * (1 + random.index(most))).min(rest.len());
        let (now, later) = rest.split_at_mut(stretch);
        match random.below(3) {
            0 => {}
            1 => allocate(file, offset, now.len() as u64)?,
            _ => {
                random.fill(now);
                file.write_all_at(now, offset)?;
            }
        }
        offset += now.len() as u64;
        rest = later;
    }
    Ok(())
}

/// Leaves the filesystem of `path` only every other block free, so that a new file gets single blocks.
fn scatter_free_space(path: &Path, size: u64) -> io::Result<()> {
    let (comb, filler) = (path.with_extension("comb"), path.with_extension("filler"));
    let comb = File::create(comb)?;
    let teeth = 3 * size + size / 4;
    fill(&comb, 0, teeth)?;
    let filler = File::create(filler)?;
    let mut offset = 0;
    // Space that is left over after a failure may still take smaller pieces.
    let mut piece = statvfs(path.parent().unwrap_or(path))?.f_bavail * 4096;
    while piece >= 4096 {
        match fill(&filler, offset, piece) {
            Ok(()) => offset += piece,
            Err(_) => piece = piece / 2 / 4096 * 4096,
        }
    }
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for tooth in (0..teeth).step_by(8192) {
        fallocate(&comb, punch, tooth, 4096)?;
    }
    // Freed blocks can be used again only after the transaction that frees them.
    run("sync", &["-f".as_ref(), path.parent().unwrap_or(path)])?;
    // XFS keeps a reserve in one piece, which can be had now and would be taken first.
    fill(&filler, offset, size / 2)?;
    Ok(())
}

/// Allocates, by writing where the filesystem cannot do it otherwise.
fn fill(file: &File, offset: u64, len: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), offset, len) {
        Err(rustix::io::Errno::OPNOTSUPP) => {
            let block = vec![0; 1 << 20];
            let mut done = 0;
            while done < len {
                let now = (len - done).min(block.len() as u64);
                file.write_all_at(
                    block.get(..usize::try_from(now).unwrap_or(0)).unwrap_or_default(),
                    offset + done,
                )?;
                done += now;
            }
            // Space is found missing only when it is allocated, which delayed allocation puts off.
            file.sync_data()
        }
        done => Ok(done?),
    }
}

fn clear_up(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path.with_extension("comb"))?;
    std::fs::remove_file(path.with_extension("filler"))
}

/// The number of extents filefrag finds. Opens the file: not for one that is leased.
pub fn extents(path: &Path) -> io::Result<u64> {
    let text = run("filefrag", &[path])?;
    let number = text
        .rsplit(": ")
        .next()
        .and_then(|t| t.split_whitespace().next())
        .and_then(|n| n.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("filefrag said {text:?}")))
}

/// Reads a whole file through the page cache, as `cat` does.
pub fn read_buffered(path: &Path) -> io::Result<Vec<u8>> {
    std::fs::read(path)
}
