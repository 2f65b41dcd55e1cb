// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! [`Image::open`], step by step.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::time::Duration;

use rustix::fs::{AtFlags, StatxFlags, fstatvfs, major, minor};
use rustix::io::{Errno, pread};

use super::acquire::{Acquired, acquire, io_error};
use super::aligned::AlignedBuf;
use super::device::{self, Device};
use super::eligible::{self, NotEligible, Subject};
use super::error::OpenError;
use super::format::{Format, HEAD};
use super::{Identity, Image, ModeChoice, Options, Topology};
use crate::engine::Geometry;
use crate::engine::keeper::Start;
use crate::engine::message::Proof;
use crate::engine::request::Limits;
use crate::engine::units::SECTOR;
use crate::sys::blockdev::{self, DeviceFacts};
use crate::sys::fiemap::Fiemap;
use crate::sys::lease::{self, Kind};
use crate::sys::page_cache;

/// Larger blocks than any of ours, and a multiple of all: for reads before the alignment is known.
const PAGE: u32 = 4096;
/// Bounce buffers: large enough for most requests in one piece, few enough to pin.
const BOUNCE_BYTES: u32 = 64 << 10;
const BOUNCE_SLOTS: u32 = 16;
/// In a moment's work even on a slow disk, so that a lease break need not wait (R17).
const ZEROES_BYTES: u64 = 4 << 20;
/// Other requests on the range wait for the filesystem to give it back.
const PUNCH_BYTES: u64 = 256 << 20;
/// Operations in flight per worker.
const OPS: u32 = 1024;
/// Another alignment for reads (Linux 6.14); rustix has no name for it.
const STATX_DIO_READ_ALIGN: u32 = 0x2_0000;
/// What `lease-break-time` 0 means: a break is never forced.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// What O_DIRECT asks of offsets, lengths and memory, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Alignment {
    offset: u32,
    memory: u32,
}

pub(super) fn open(options: &Options, wait: Duration) -> Result<Image, OpenError> {
    check_options(options)?;
    let path = &options.path;
    let acquired = acquire(path, options.read_only, wait)?;
    let Acquired { fd, stat, direct_io, is_block_device } = acquired;
    let own = if is_block_device {
        Some(blockdev::facts(fd.as_fd()).map_err(io_error(path, "block device ioctls"))?)
    } else {
        None
    };
    let size = own.map_or(u64::try_from(stat.st_size).unwrap_or(0), |facts| facts.size);
    let limits = limits(options, size)?;
    let align = alignment(path, &fd, direct_io, own.as_ref(), size)?;
    if limits.base + limits.capacity > size - size % u64::from(align.offset) {
        return Err(OpenError::UnalignedSize { path: path.clone(), size, unit: align.offset });
    }
    if !options.format_raw {
        check_format(path, &fd, align, size)?;
    }

    let canonical = fs::canonicalize(path).map_err(io_error(path, "canonicalize"))?;
    let lease_break_time = lease_break_time();
    let shares_blocks = eligible::shares_blocks(fd.as_fd());
    let fs_block = fs_block(path, &fd, align, own.as_ref())?;
    let mut image = Image {
        geometry: geometry(size, align, own.as_ref(), fs_block, lease_break_time),
        fs_block,
        topology: topology(own.as_ref(), align, align.offset, limits.base),
        file: fd,
        path: path.clone(),
        canonical,
        identity: Identity { dev: stat.st_dev, ino: stat.st_ino },
        direct_io,
        device: None,
        block_device: own.map(|_| stat.st_rdev),
        limits,
        start: Start::Filesystem,
        lease: if options.read_only && !shares_blocks { Kind::Read } else { Kind::Write },
        shares_blocks,
        uncounted: AtomicU32::new(0),
        not_eligible: None,
        lease_break_time,
        proven: AtomicBool::new(false),
        punches: AtomicU64::new(0),
        fiemap: Mutex::new(Fiemap::new()),
    };
    image.choose(options.mode)?;
    Ok(image)
}

fn check_options(options: &Options) -> Result<(), OpenError> {
    let unit = options.block_size;
    if unit != 512 && unit != 4096 {
        return Err(OpenError::BlockSize { size: unit });
    }
    let offset = options.offset;
    if !offset.is_multiple_of(u64::from(unit)) {
        return Err(OpenError::OffsetUnaligned { offset, unit });
    }
    match options.size_limit {
        Some(limit) if limit == 0 || !limit.is_multiple_of(u64::from(unit)) => {
            Err(OpenError::SizeLimit { limit, unit })
        }
        _ => Ok(()),
    }
}

/// The part of the file the guest gets to see: whole blocks of it.
fn limits(options: &Options, size: u64) -> Result<Limits, OpenError> {
    let Options { path, offset, block_size: unit, .. } = options;
    let (path, offset, unit) = (path.clone(), *offset, *unit);
    if size == 0 {
        return Err(OpenError::Empty { path });
    }
    if size < u64::from(unit) {
        return Err(OpenError::TooSmall { path, size, unit });
    }
    let rest = size.saturating_sub(offset);
    if rest < u64::from(unit) {
        return Err(OpenError::OffsetPastEnd { path, offset, size });
    }
    let wanted = options.size_limit.map_or(rest, |limit| limit.min(rest));
    let capacity = wanted - wanted % u64::from(unit);
    if capacity < wanted {
        let (path, lost) = (path.display(), wanted - capacity);
        tracing::warn!("{path}: its last {lost} bytes are less than a block and stay hidden");
    }
    let read_only = options.read_only;
    Ok(Limits { base: offset, capacity, block_size: unit, read_only, unmap: options.unmap })
}

fn alignment(
    path: &Path,
    fd: &OwnedFd,
    direct_io: bool,
    own: Option<&DeviceFacts>,
    size: u64,
) -> Result<Alignment, OpenError> {
    let least = u32::try_from(SECTOR).unwrap_or(512);
    if let Some(facts) = own {
        let offset = facts.logical_block.max(least);
        return Ok(Alignment { offset, memory: offset });
    }
    let wanted = StatxFlags::DIOALIGN | StatxFlags::from_bits_retain(STATX_DIO_READ_ALIGN);
    let statx =
        rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, wanted).map_err(io_error(path, "statx"))?;
    let said = statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    if said || !direct_io {
        // XFS asks whole blocks of writes to reflinked files, but takes less: it buffers them.
        let offset = match statx.stx_dio_read_offset_align {
            0 => statx.stx_dio_offset_align,
            read => read.min(statx.stx_dio_offset_align),
        };
        // 0: O_DIRECT is silently buffered here, and buffered I/O takes anything.
        let offset = offset.max(least).next_power_of_two();
        // Lengths of pieces of memory are asked to be whole blocks too (statx(2); not since 6.18).
        let memory = statx.stx_dio_mem_align.max(offset).next_power_of_two();
        return Ok(Alignment { offset, memory });
    }
    // A filesystem that does not tell is tried: one sector where only whole pages may be read.
    let mut buffer = AlignedBuf::new(PAGE as usize, PAGE as usize);
    let sector = buffer.bytes_mut().get_mut(..512).unwrap_or_default();
    match pread(fd, sector, if size > 2 * SECTOR { SECTOR } else { 0 }) {
        Err(Errno::INVAL) => Ok(Alignment { offset: PAGE, memory: PAGE }),
        _ => Ok(Alignment { offset: least, memory: least }),
    }
}

fn check_format(path: &Path, fd: &OwnedFd, align: Alignment, size: u64) -> Result<(), OpenError> {
    let unit = align.offset.max(PAGE);
    let mut head = AlignedBuf::new(unit as usize, align.memory.max(PAGE) as usize);
    let read = pread(fd, head.bytes_mut(), 0).map_err(io_error(path, "read"))?;
    let mut tail = AlignedBuf::new(align.offset as usize, align.memory.max(PAGE) as usize);
    // A VHD's footer is its last sector; `size` is a multiple of that, or it is none.
    let at = (size - 1) / u64::from(align.offset) * u64::from(align.offset);
    let end = pread(fd, tail.bytes_mut(), at).map_err(io_error(path, "read"))?;
    let head = head.bytes().get(..read.min(HEAD)).unwrap_or_default();
    let tail = tail.bytes().get(..end).unwrap_or_default();
    let footer = tail.get(end.saturating_sub(512)..).unwrap_or_default();
    match Format::detect(head, footer) {
        Some(format) => Err(OpenError::Format { path: path.to_owned(), format }),
        None => Ok(()),
    }
}

/// The filesystem's block size; for a block device, which has no filesystem, its own.
fn fs_block(
    path: &Path,
    fd: &OwnedFd,
    align: Alignment,
    own: Option<&DeviceFacts>,
) -> Result<u32, OpenError> {
    if own.is_some() {
        return Ok(align.offset);
    }
    let said = fstatvfs(fd).map_err(io_error(path, "statvfs"))?.f_bsize;
    // Network filesystems call their preferred transfer a block.
    let said = u32::try_from(said).ok().filter(|b| b.is_power_of_two() && *b <= BOUNCE_BYTES);
    Ok(said.unwrap_or(PAGE).max(align.offset))
}

fn geometry(
    size: u64,
    align: Alignment,
    own: Option<&DeviceFacts>,
    fs_block: u32,
    lease_break_time: Duration,
) -> Geometry {
    // A page that holds several blocks stays in the page cache, stale, when a direct write to one
    // of them ends while another is dirty. So none is written without the others (ADR 0010).
    let unit = match own {
        Some(_) => fs_block,
        None => fs_block.max(u32::try_from(page_cache::page_size()).unwrap_or(PAGE)),
    };
    Geometry {
        file_size: size,
        fs_block: unit,
        file_align: align.offset,
        dev_block: align.offset,
        write_block: align.offset,
        mem_align: align.memory,
        bounce_bytes: BOUNCE_BYTES.max(unit),
        bounce_slots: BOUNCE_SLOTS,
        ops: OPS,
        zeroes_bytes: ZEROES_BYTES,
        punch_bytes: PUNCH_BYTES,
        lease_fresh: own.is_none().then_some(lease_break_time / 4),
        raw: crate::engine::RawLimits::default(),
    }
}

/// The device as files on it see it: their blocks lie at multiples of the filesystem's blocks and no better, and
/// less than a raw write moves is read first. Blocks of the device's page cache begin at its first byte.
pub(super) fn in_blocks(facts: DeviceFacts, fs_block: u32, write_block: u32) -> DeviceFacts {
    let physical_block = facts.physical_block.min(fs_block).max(write_block);
    let own = physical_block == facts.physical_block && physical_block > write_block;
    let alignment_offset = if own { facts.alignment_offset } else { 0 };
    DeviceFacts { physical_block, alignment_offset, ..facts }
}

/// `fs_block` bounds what can be aligned at all: a file's blocks lie anywhere.
fn topology(facts: Option<&DeviceFacts>, align: Alignment, fs_block: u32, base: u64) -> Topology {
    let Some(facts) = facts else {
        let unit = fs_block.max(align.offset);
        return Topology { physical_block: unit, min_io: unit, opt_io: 0, alignment_offset: 0 };
    };
    let physical_block = facts.physical_block.next_power_of_two().max(align.offset);
    let unit = u64::from(physical_block);
    let first = (u64::from(facts.alignment_offset) % unit + unit - base % unit) % unit;
    Topology {
        physical_block,
        min_io: facts.min_io.max(physical_block),
        opt_io: facts.opt_io,
        alignment_offset: u32::try_from(first).unwrap_or(0),
    }
}

/// `/proc/sys/fs/lease-break-time` as it is now.
pub(super) fn lease_break_time() -> Duration {
    let text = fs::read_to_string("/proc/sys/fs/lease-break-time").unwrap_or_default();
    match text.trim().parse() {
        Ok(0) => NEVER,
        Ok(seconds) => Duration::from_secs(seconds),
        // The kernel's own default.
        Err(_) => Duration::from_secs(45),
    }
}

impl Image {
    /// Finds out how it may be served.
    fn choose(&mut self, mode: ModeChoice) -> Result<(), OpenError> {
        if self.block_device.is_some() {
            if mode != ModeChoice::Filesystem {
                self.start = Start::Identity;
            }
            return Ok(());
        }
        if mode == ModeChoice::Filesystem {
            self.open_for_flushes();
            return Ok(());
        }
        match self.make_eligible() {
            Ok(()) => self.start = Start::Eligible,
            Err(reason) if mode == ModeChoice::Direct => {
                return Err(OpenError::NotDirect { reason });
            }
            Err(reason) => {
                self.open_for_flushes();
                self.not_eligible = Some(reason);
            }
        }
        Ok(())
    }

    /// Nothing raw will ever be done: the device is not kept open for nothing. But where the filesystem does not flush it, that
    /// is ours to do (R14), and takes no right to write.
    fn open_for_flushes(&mut self) {
        self.device = None;
        let number = self.identity.dev;
        if eligible::barriers(number) {
            return;
        }
        match device::open_number(number, true) {
            Ok(device) => self.device = Some(device),
            Err((node, error)) => tracing::warn!(
                "{}: its filesystem is mounted without barriers, and the disk below ({}) cannot be opened to be flushed: \
                 {error}; what the guest flushes may be lost with the power",
                self.path.display(),
                node.display()
            ),
        }
    }

    /// Every item of R5, the device, the lease and R6's first comparison.
    fn make_eligible(&mut self) -> Result<(), NotEligible> {
        eligible::check(&self.subject())?;
        let number = self.identity.dev;
        let device =
            device::open_number(number, self.limits.read_only).map_err(|(path, source)| {
                NotEligible::Device { major: major(number), minor: minor(number), path, source }
            })?;
        self.adopt(device);
        self.try_lease().map_err(|source| NotEligible::NoLease { source })?;
        match self.prove_at_open() {
            Ok(Proof::Different) => {
                let device = self.device_path().unwrap_or_else(|| Path::new("")).to_owned();
                let reason = NotEligible::Mismatch { device };
                tracing::error!("{}: {reason}", self.path.display());
                Err(reason)
            }
            Ok(_) => Ok(()),
            Err(source) => Err(NotEligible::Unknown { operation: "FIEMAP", source }),
        }
    }

    /// Takes the sizes of the device below into account.
    fn adopt(&mut self, device: Device) {
        let geometry = &mut self.geometry;
        geometry.dev_block = device.facts.logical_block;
        geometry.mem_align = geometry.mem_align.max(geometry.dev_block);
        geometry.write_block = device.facts.cache_block.max(geometry.dev_block);
        geometry.fs_block = geometry.fs_block.max(geometry.write_block);
        geometry.bounce_bytes = geometry.bounce_bytes.max(geometry.fs_block);
        let align = Alignment { offset: geometry.file_align, memory: geometry.mem_align };
        let fs_block = self.fs_block.max(geometry.write_block);
        let facts = in_blocks(device.facts, fs_block, geometry.write_block);
        self.topology = topology(Some(&facts), align, fs_block, self.limits.base);
        self.device = Some(device);
    }

    /// Whether the filesystem has leases for us. That somebody else has the file open is no reason
    /// against it: they may go.
    fn try_lease(&self) -> io::Result<()> {
        match self.take_lease() {
            Ok(()) => lease::release(self.file.as_fd()),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What [`eligible::check`] looks at.
    pub(super) fn subject(&self) -> Subject<'_> {
        let Identity { dev, ino } = self.identity;
        let (fd, path, direct_io) = (self.file.as_fd(), &self.canonical, self.direct_io);
        Subject { fd, path, dev, ino, direct_io }
    }
}
