// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's request, checked: the only constructor is [`parse`], and nothing behind it
//! looks at guest-chosen numbers again (R18).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::units::{FileRange, SECTOR};

/// Bytes of a VIRTIO_BLK_T_GET_ID answer (virtio 1.3, 5.2.6).
pub const ID_BYTES: u64 = 20;

/// The part of a virtio-blk request that stands before its data, as read from guest memory once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// `type` field.
    pub kind: u32,
    /// `sector` field, in 512-byte units.
    pub sector: u64,
}

/// What the guest asks for. Ranges are byte offsets in the image *file*, `--offset` included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN.
    Read(FileRange),
    /// VIRTIO_BLK_T_OUT.
    Write(FileRange),
    /// VIRTIO_BLK_T_DISCARD, one range.
    Discard(FileRange),
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
}

impl Kind {
    /// The bytes it is about; empty for a flush.
    #[must_use]
    pub const fn range(&self) -> FileRange {
        match self {
            Self::Read(range) | Self::Write(range) | Self::Discard(range) => *range,
            Self::Flush => FileRange::new(0, 0),
        }
    }

    /// Whether a flush has to wait for it.
    #[must_use]
    pub const fn modifies(&self) -> bool {
        matches!(self, Self::Write(_) | Self::Discard(_))
    }
}

/// A checked request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// What to do.
    pub kind: Kind,
    /// Whether every piece of its guest memory is fit for O_DIRECT: address and length multiples
    /// of [`Geometry::mem_align`](super::Geometry::mem_align). If not, its data is bounced.
    pub mem_aligned: bool,
}

/// How a request ended, in virtio's terms (virtio 1.3, 5.2.6).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
}

impl Status {
    /// The status byte.
    #[must_use]
    pub const fn byte(self) -> u8 {
        // The constants are 0, 1 and 2.
        #[allow(clippy::cast_possible_truncation)]
        match self {
            Self::Ok => VIRTIO_BLK_S_OK as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
        }
    }
}

/// What the device lets a guest do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// First byte of the device in the image file (`--offset`).
    pub base: u64,
    /// Bytes the guest sees; a multiple of 512.
    pub capacity: u64,
    /// Logical block size shown to the guest: 512 or 4096.
    pub block_size: u32,
    /// VIRTIO_BLK_F_RO.
    pub read_only: bool,
}

/// What a header turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parsed {
    /// Something for a worker.
    Io(Kind),
    /// GET_ID: copy the serial into the first 20 writable bytes.
    GetId,
    /// Answer at once: it moves no data.
    Answer(Status),
}

/// Checks one request: `readable` and `writable` are the bytes of data the chain offers in each
/// direction, without header and status byte.
///
/// Unknown types are `S_UNSUPP`. A transfer that is empty, not of whole sectors, past the
/// capacity, or a write to a read-only device is `S_IOERR` (virtio 1.3, 5.2.6.2).
#[must_use]
pub fn parse(header: Header, readable: u64, writable: u64, limits: &Limits) -> Parsed {
    match header.kind {
        VIRTIO_BLK_T_IN => match transfer(header.sector, writable, limits) {
            Some(range) => Parsed::Io(Kind::Read(range)),
            None => Parsed::Answer(Status::IoError),
        },
        VIRTIO_BLK_T_OUT if limits.read_only => Parsed::Answer(Status::IoError),
        VIRTIO_BLK_T_OUT => match transfer(header.sector, readable, limits) {
            Some(range) => Parsed::Io(Kind::Write(range)),
            None => Parsed::Answer(Status::IoError),
        },
        VIRTIO_BLK_T_FLUSH => Parsed::Io(Kind::Flush),
        VIRTIO_BLK_T_GET_ID if writable >= ID_BYTES => Parsed::GetId,
        VIRTIO_BLK_T_GET_ID => Parsed::Answer(Status::IoError),
        _ => Parsed::Answer(Status::Unsupported),
    }
}

/// The file range of a transfer of `bytes` at `sector`, if it lies inside the device.
fn transfer(sector: u64, bytes: u64, limits: &Limits) -> Option<FileRange> {
    let start = sector.checked_mul(SECTOR)?;
    let end = start.checked_add(bytes)?;
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) || end > limits.capacity {
        return None;
    }
    let range = FileRange::new(limits.base.checked_add(start)?, limits.base.checked_add(end)?);
    Some(range)
}
