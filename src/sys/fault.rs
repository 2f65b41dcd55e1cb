// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory that vanishes (R18a): a SIGBUS in it costs its session, and nothing else.
//!
//! The file behind guest memory belongs to the frontend, which may shorten it, or it may turn out that the host has no
//! huge page or no room in a tmpfs for a page that is touched for the first time. The kernel then sends SIGBUS to the
//! thread that touches it. The handler here puts zero pages in place of what is missing if the address lies in a region
//! that a session has registered, says so through a descriptor that the session's relay polls, and returns: the thread
//! goes on with zeros. Every other SIGBUS keeps its default action, a core dump included.
//!
//! The handler is async-signal-safe: it reads tables that are never freed, with atomic loads only, and makes two system
//! calls. The sessions' threads pay loads of one flag for it until a page is missing.

mod handler;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence,
};
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::fstatfs;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::buffer::Memory;
pub use handler::install;

/// Regions that one session can have registered: twice what it can have, because those of its next memory are
/// registered while those of the last one are still in use.
const SLOTS: usize = 1024;

/// Pages that are replaced one by one in a session; after that whole regions are, where the kernel lets us. Each may split a mapping in three, and
/// the kernel allows a process 65 530 of them.
const SINGLE_PAGES: u32 = 256;

/// `f_type` of a hugetlbfs.
const HUGETLBFS: u64 = 0x9584_58f6;

/// A registered region. Its one writer is the session's; the handler may read it at any time.
///
/// A thread that touches a region knows that it stays registered meanwhile. So a handler that finds a slot changing
/// knows that the address it looks for is not in there, and never has to wait.
#[derive(Debug)]
struct Slot {
    /// Odd while the rest is being written.
    version: AtomicU32,
    start: AtomicUsize,
    /// The address behind it; 0 if the slot is free.
    end: AtomicUsize,
    /// The size of its pages, in bytes: a power of two.
    page: AtomicUsize,
}

impl Slot {
    const fn new() -> Self {
        Self {
            version: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
        }
    }

    fn set(&self, area: Area) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.start.store(area.start, Ordering::Release);
        self.end.store(area.end, Ordering::Release);
        self.page.store(area.page, Ordering::Release);
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    /// What is registered here, unless it is free or changing.
    fn get(&self) -> Option<Area> {
        let version = self.version.load(Ordering::Acquire);
        let area = Area {
            start: self.start.load(Ordering::Acquire),
            end: self.end.load(Ordering::Acquire),
            page: self.page.load(Ordering::Acquire),
        };
        let same = self.version.load(Ordering::Acquire) == version && version.is_multiple_of(2);
        (same && area.end != 0).then_some(area)
    }
}

/// A mapping of guest memory in this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Area {
    start: usize,
    end: usize,
    page: usize,
}

impl Area {
    const FREE: Self = Self { start: 0, end: 0, page: 0 };

    fn holds(self, address: usize) -> bool {
        (self.start..self.end).contains(&address)
    }

    /// The page that `address` is in, or all of it.
    fn hole(self, address: usize, whole: bool) -> (usize, usize) {
        let mask = self.page.wrapping_sub(1);
        if whole {
            let end = self.end.wrapping_add(mask) & !mask;
            return (self.start, end.wrapping_sub(self.start));
        }
        (address & !mask, self.page)
    }
}

/// A session's regions. Never freed: the handler may be reading it. The next session takes it over.
#[derive(Debug)]
struct Table {
    next: *const Table,
    /// The session's descriptor, -1 if it belongs to none.
    bell: AtomicI32,
    replaced: AtomicU32,
    lost: AtomicBool,
    slots: [Slot; SLOTS],
}

// SAFETY: `next` points to a table that lives for ever and is not written once this one can be found; all else is atomic.
unsafe impl Sync for Table {}

/// All tables, the newest first.
static TABLES: AtomicPtr<Table> = AtomicPtr::new(ptr::null_mut());

/// Those that no session has.
static FREE: Mutex<Vec<&'static Table>> = Mutex::new(Vec::new());

impl Table {
    fn claim() -> &'static Self {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = free.pop() {
            return table;
        }
        let table = Box::leak(Box::new(Self {
            next: TABLES.load(Ordering::Acquire),
            bell: AtomicI32::new(-1),
            replaced: AtomicU32::new(0),
            lost: AtomicBool::new(false),
            slots: [const { Slot::new() }; SLOTS],
        }));
        // Under the lock, so no other table has come in between.
        TABLES.store(ptr::from_mut(table), Ordering::Release);
        table
    }

    fn find(&self, address: usize) -> Option<Area> {
        self.slots.iter().filter_map(Slot::get).find(|area| area.holds(address))
    }
}

/// The table and the region that an address lies in. Async-signal-safe.
fn find(address: usize) -> Option<(&'static Table, Area)> {
    let mut next: *const Table = TABLES.load(Ordering::Acquire);
    loop {
        // SAFETY: null, or a table that was leaked when it was made, and so lives for ever.
        let table = unsafe { next.as_ref() }?;
        if let Some(area) = table.find(address) {
            return Some((table, area));
        }
        next = table.next;
    }
}

/// The guest memory of one session, in which a missing page is survived.
#[derive(Debug)]
pub struct GuestRegions {
    table: &'static Table,
    /// Keeps what is registered mapped: other memory may lie at the same addresses later.
    held: Mutex<Memory>,
    bell: OwnedFd,
}

impl GuestRegions {
    /// None yet.
    ///
    /// # Errors
    /// The handler cannot be installed, or no descriptor is left.
    pub fn new() -> io::Result<Self> {
        install()?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let table = Table::claim();
        table.lost.store(false, Ordering::Release);
        table.replaced.store(0, Ordering::Release);
        table.bell.store(bell.as_raw_fd(), Ordering::Release);
        Ok(Self { table, held: Mutex::new(Memory::new()), bell })
    }

    /// Registers the regions of `memory` besides those that are already. To be called before any thread touches them.
    ///
    /// # Errors
    /// There are too many, or the kernel does not tell their page size. None has been added then.
    pub fn add(&self, memory: &Memory) -> io::Result<()> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let known: Vec<Area> = self.table.slots.iter().filter_map(Slot::get).collect();
        let mut new = Vec::new();
        for region in memory.iter() {
            let area = area(region)?;
            if !known.contains(&area) {
                new.push(area);
            }
        }
        let free = self.table.slots.iter().filter(|slot| slot.get().is_none());
        let free: Vec<&Slot> = free.take(new.len()).collect();
        if free.len() < new.len() {
            return Err(io::Error::other("too many memory regions"));
        }
        free.iter().zip(new).for_each(|(slot, area)| slot.set(area));
        drop(held);
        Ok(())
    }

    /// Forgets the regions that are not in `memory`. To be called when no thread can touch them any more.
    pub fn keep(&self, memory: &Memory) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: Vec<Area> = memory.iter().filter_map(|region| area(region).ok()).collect();
        for slot in &self.table.slots {
            if slot.get().is_some_and(|area| !kept.contains(&area)) {
                slot.set(Area::FREE);
            }
        }
        // Only now may what was registered be unmapped.
        *held = memory.clone();
    }

    /// Whether a part of it was found missing, by whatever thread. If not, nothing that the calling thread has read of
    /// it so far was zeros in place of what is missing.
    #[must_use]
    pub fn are_lost(&self) -> bool {
        // The handler sets this before the zeros are there, so what matters is that it is loaded after them.
        fence(Ordering::Acquire);
        self.table.lost.load(Ordering::Acquire)
    }
}

/// Readable once a part of the memory was found missing.
impl AsFd for GuestRegions {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Drop for GuestRegions {
    /// No thread may touch the memory any more.
    fn drop(&mut self) {
        self.table.slots.iter().for_each(|slot| slot.set(Area::FREE));
        self.table.bell.store(-1, Ordering::Release);
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.table);
    }
}

/// Where a region is mapped, and in pages of which size.
fn area(region: &vm_memory::GuestRegionMmap<()>) -> io::Result<Area> {
    let bad = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let slice = region.as_volatile_slice().map_err(io::Error::other)?;
    let start = slice.ptr_guard_mut().as_ptr().addr();
    let len = usize::try_from(region.len()).map_err(bad)?;
    let page = match region.file_offset() {
        Some(file) => page_size(file.file().as_fd())?,
        None => rustix::param::page_size(),
    };
    Ok(Area { start, end: start.saturating_add(len), page })
}

/// The size of the pages that a file is mapped in: the part of a mapping that can be replaced.
///
/// # Errors
/// The kernel's.
pub fn page_size(file: BorrowedFd<'_>) -> io::Result<usize> {
    let stat = fstatfs(file)?;
    // `f_type` has the machine's word, sign-extended or not; the magic number has 32 bits.
    let kind = stat.f_type.cast_unsigned() & 0xffff_ffff;
    let huge = usize::try_from(stat.f_bsize).ok().filter(|size| size.is_power_of_two());
    Ok(huge.filter(|_| kind == HUGETLBFS).unwrap_or_else(rustix::param::page_size))
}

#[cfg(test)]
#[path = "fault_tests.rs"]
mod tests;
