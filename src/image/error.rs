// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why an image was not opened: one line each, naming the fix.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::eligible::NotEligible;
use super::format::Format;
use super::holders::Holder;

/// The process, as it is put behind what is said of it.
pub(super) fn name(holder: Option<&Holder>) -> String {
    holder.map_or_else(String::new, |holder| format!(", {holder}"))
}

/// Why an image could not be opened. Displayed it is one line that names the fix.
#[derive(thiserror::Error, Debug)]
#[non_exhaustive]
pub enum OpenError {
    /// Nothing at the path.
    #[error("{}: no such file; correct the path, or make one: truncate -s 10G {}", path.display(), path.display())]
    Missing {
        /// What was asked for.
        path: PathBuf,
    },
    /// A directory.
    #[error("{}: is a directory; name the image file inside it", path.display())]
    Directory {
        /// What was asked for.
        path: PathBuf,
    },
    /// A FIFO, socket or character device.
    #[error("{}: is a {kind}; an image is a regular file or a block device", path.display())]
    NotAFile {
        /// What was asked for.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// No bytes.
    #[error("{}: is empty; give it a size: truncate -s 10G {}", path.display(), path.display())]
    Empty {
        /// What was asked for.
        path: PathBuf,
    },
    /// Less than one block.
    #[error(
        "{}: its {size} bytes are less than one {unit}-byte block; enlarge it with truncate -s", path.display()
    )]
    TooSmall {
        /// What was asked for.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The block size shown to the guest, in bytes.
        unit: u32,
    },
    /// `--offset` between blocks.
    #[error("--offset {offset} is not a multiple of {unit}; use {}", offset - offset % u64::from(*unit))]
    OffsetUnaligned {
        /// As given, in bytes.
        offset: u64,
        /// The block size shown to the guest, in bytes.
        unit: u32,
    },
    /// `--offset` leaves nothing.
    #[error("{}: --offset {offset} leaves no block of its {size} bytes; use a smaller one", path.display())]
    OffsetPastEnd {
        /// What was asked for.
        path: PathBuf,
        /// As given, in bytes.
        offset: u64,
        /// The file's size in bytes.
        size: u64,
    },
    /// `--size-limit` of nothing or between blocks.
    #[error("--size-limit {limit} is not a multiple of {unit} above 0; correct it or leave it out")]
    SizeLimit {
        /// As given, in bytes.
        limit: u64,
        /// The block size shown to the guest, in bytes.
        unit: u32,
    },
    /// `--block-size` other than 512 and 4096.
    #[error("--block-size {size} is not possible; use 512 or 4096")]
    BlockSize {
        /// As given, in bytes.
        size: u32,
    },
    /// The last bytes cannot be reached with O_DIRECT.
    #[error(
        "{}: its {size} bytes are not a multiple of the {unit} bytes its disk moves at once; round it up: truncate -s %{unit} {}",
        path.display(), path.display()
    )]
    UnalignedSize {
        /// What was asked for.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// What it has to be a multiple of.
        unit: u32,
    },
    /// Not to be opened for writing.
    #[error("{}: cannot be opened for writing ({source}); change that, or serve it with --read-only", path.display())]
    NotWritable {
        /// What was asked for.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// A format with a header.
    #[error(
        "{}: looks like a {format} image; convert it (qemu-img convert -f {} -O raw), or say --format raw to serve these very bytes",
        path.display(), format.qemu_name()
    )]
    Format {
        /// What was asked for.
        path: PathBuf,
        /// What it looks like.
        format: Format,
    },
    /// Somebody holds locks or a lease.
    #[error(
        "{}: locked by another process{}, also after {} s; end that one first",
        path.display(), name(holder.as_ref()), waited.as_secs()
    )]
    Locked {
        /// What was asked for.
        path: PathBuf,
        /// Whose lock, if it can be told.
        holder: Option<Holder>,
        /// How long it was tried.
        waited: Duration,
    },
    /// A block device that is mounted or otherwise claimed.
    #[error("{}: the device is in use (mounted, swap, or part of another device); free it first", path.display())]
    DeviceBusy {
        /// What was asked for.
        path: PathBuf,
    },
    /// `--mode direct`, and it cannot be.
    #[error(
        "--mode direct is not to be had: {reason}; or let --mode auto serve it through the filesystem"
    )]
    NotDirect {
        /// Why.
        reason: NotEligible,
    },
    /// Something else.
    #[error("{}: {operation}: {source}", path.display())]
    Io {
        /// What was asked for.
        path: PathBuf,
        /// What was being done.
        operation: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
}
