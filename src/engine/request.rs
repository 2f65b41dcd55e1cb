// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's request, checked: the only constructor is [`parse`], and nothing behind it
//! looks at guest-chosen numbers again (R18).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::units::{FileRange, SECTOR};

/// Bytes of a VIRTIO_BLK_T_GET_ID answer (virtio 1.3, 5.2.6).
pub const ID_BYTES: u64 = 20;

/// Bytes of a `struct virtio_blk_discard_write_zeroes`.
pub const SEGMENT_BYTES: usize = 16;

/// Ranges in one DISCARD or WRITE_ZEROES, at most.
pub const MAX_SEGMENTS: usize = 64;

/// Sectors in one range of them, at most: 1 GiB, so that a request ends in reasonable time.
pub const MAX_SEGMENT_SECTORS: u32 = 1 << 21;

/// The part of a virtio-blk request that stands before its data, as read from guest memory once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// `type` field.
    pub kind: u32,
    /// `sector` field, in 512-byte units.
    pub sector: u64,
}

impl Header {
    /// Its length in bytes.
    pub const BYTES: usize = 16;

    /// The header that these bytes are (virtio 1.3, 5.2.6).
    #[must_use]
    pub const fn of(bytes: [u8; Self::BYTES]) -> Self {
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = bytes;
        Self { kind: u32::from_le_bytes([k0, k1, k2, k3]), sector: u64::from_le_bytes(sector) }
    }
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
    /// VIRTIO_BLK_T_WRITE_ZEROES, one range.
    WriteZeroes {
        /// What is to read as zeros.
        range: FileRange,
        /// Whether its blocks may be given back to the filesystem.
        unmap: bool,
    },
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
}

impl Kind {
    /// The bytes it is about; empty for a flush.
    #[must_use]
    pub const fn range(&self) -> FileRange {
        match self {
            Self::Read(range)
            | Self::Write(range)
            | Self::Discard(range)
            | Self::WriteZeroes { range, .. } => *range,
            Self::Flush => FileRange::new(0, 0),
        }
    }

    /// The same for another range; a flush has none.
    #[must_use]
    pub const fn with_range(self, range: FileRange) -> Self {
        match self {
            Self::Read(_) => Self::Read(range),
            Self::Write(_) => Self::Write(range),
            Self::Discard(_) => Self::Discard(range),
            Self::WriteZeroes { unmap, .. } => Self::WriteZeroes { range, unmap },
            Self::Flush => Self::Flush,
        }
    }

    /// Whether a flush has to wait for it.
    #[must_use]
    pub const fn modifies(&self) -> bool {
        matches!(self, Self::Write(_) | Self::Discard(_) | Self::WriteZeroes { .. })
    }

    /// Whether it is carried out as writes (of data, or of zeros).
    #[must_use]
    pub const fn writes(&self) -> bool {
        matches!(self, Self::Write(_) | Self::WriteZeroes { .. })
    }
}

/// A checked request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// What to do.
    pub kind: Kind,
    /// Whether every piece of its guest memory is fit for O_DIRECT: address and length multiples
    /// of [`Geometry::mem_align`](super::Geometry::mem_align). If not, its data is bounced. True
    /// of a request without data.
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
    /// Whether discarded blocks go back to the filesystem (`--discard unmap`).
    pub unmap: bool,
}

/// What a header turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parsed {
    /// Something for a worker.
    Io(Kind),
    /// GET_ID: copy the serial into the first 20 writable bytes.
    GetId,
    /// DISCARD or WRITE_ZEROES: [`segments`] knows more, given the request's readable data.
    Segments(u32),
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
        VIRTIO_BLK_T_DISCARD if !limits.unmap => Parsed::Answer(Status::Unsupported),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.read_only => {
            Parsed::Answer(Status::IoError)
        }
        kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
            match usize::try_from(readable) {
                Ok(bytes) if bytes <= MAX_SEGMENTS * SEGMENT_BYTES => Parsed::Segments(kind),
                _ => Parsed::Answer(Status::IoError),
            }
        }
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

/// Reads the ranges of a DISCARD or WRITE_ZEROES (`kind`) into `out`, which is cleared first.
///
/// # Errors
/// The status to answer with: `S_UNSUPP` if a flag is set that is unknown or, in a DISCARD, that is
/// `unmap`; `S_IOERR` if there is no range, a part of one, or one that is too long or not inside the
/// device (virtio 1.3, 5.2.6.2).
pub fn segments(
    kind: u32,
    data: &[u8],
    limits: &Limits,
    out: &mut Vec<Kind>,
) -> Result<(), Status> {
    out.clear();
    let (segments, rest) = data.as_chunks::<SEGMENT_BYTES>();
    if segments.is_empty() || !rest.is_empty() || segments.len() > MAX_SEGMENTS {
        return Err(Status::IoError);
    }
    for segment in segments {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        let discard = kind == VIRTIO_BLK_T_DISCARD;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
            return Err(Status::Unsupported);
        }
        if count > MAX_SEGMENT_SECTORS {
            return Err(Status::IoError);
        }
        let bytes = u64::from(count) * SECTOR;
        let range = transfer(sector, bytes, limits).ok_or(Status::IoError)?;
        let unmap = unmap && limits.unmap;
        out.push(if discard { Kind::Discard(range) } else { Kind::WriteZeroes { range, unmap } });
    }
    Ok(())
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
