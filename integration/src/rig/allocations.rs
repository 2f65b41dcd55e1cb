// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each thread of this process asks of the heap: the system's allocator, with a count per thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::Sub;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

/// Threads that are told apart; the counts of later ones are lost, so a rig starts few.
const THREADS: usize = 512;
/// The place of a thread that has not allocated yet.
const NOWHERE: usize = usize::MAX;

/// The allocator; a program that wants to count makes it its `#[global_allocator]`.
#[derive(Debug, Default)]
pub struct Counting;

/// What a thread, or several, did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Pieces of memory asked for, or asked to be of another size.
    pub taken: u64,
    /// Pieces given back.
    pub given: u64,
}

impl Sub for Count {
    type Output = Count;

    fn sub(self, before: Count) -> Count {
        Count {
            taken: self.taken.saturating_sub(before.taken),
            given: self.given.saturating_sub(before.given),
        }
    }
}

impl Count {
    /// Both together.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.taken + self.given
    }
}

/// One thread's counts: it alone writes them.
struct Place {
    thread: AtomicI32,
    taken: AtomicU64,
    given: AtomicU64,
}

static PLACES: [Place; THREADS] = [const {
    Place { thread: AtomicI32::new(0), taken: AtomicU64::new(0), given: AtomicU64::new(0) }
}; THREADS];
static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Neither made nor dropped by code of its own, so that the allocator may look at it at any time.
    static MINE: Cell<usize> = const { Cell::new(NOWHERE) };
}

fn count(which: impl FnOnce(&Place) -> &AtomicU64) {
    let mine = MINE.try_with(|mine| {
        if mine.get() == NOWHERE {
            let place = NEXT.fetch_add(1, Ordering::Relaxed);
            mine.set(place);
            if let Some(place) = PLACES.get(place) {
                let thread = rustix::thread::gettid().as_raw_nonzero().get();
                place.thread.store(thread, Ordering::Release);
            }
        }
        mine.get()
    });
    if let Some(place) = mine.ok().and_then(|mine| PLACES.get(mine)) {
        let counter = which(place);
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }
}

/// What `thread` of this process has done so far. Nothing at all where [`Counting`] is not the allocator.
#[must_use]
pub fn of_thread(thread: i32) -> Count {
    let mut sum = Count::default();
    for place in PLACES.iter().filter(|place| place.thread.load(Ordering::Acquire) == thread) {
        sum.taken += place.taken.load(Ordering::Relaxed);
        sum.given += place.given.load(Ordering::Relaxed);
    }
    sum
}

/// What the calling thread has done so far.
#[must_use]
pub fn of_this_thread() -> Count {
    of_thread(rustix::thread::gettid().as_raw_nonzero().get())
}

// SAFETY: every call goes to the system's allocator as it is; counting allocates nothing and cannot panic.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(|place| &place.taken);
        // SAFETY: the caller keeps this function's contract, which is the same one.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(|place| &place.taken);
        // SAFETY: the caller keeps this function's contract, which is the same one.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(|place| &place.given);
        // SAFETY: `memory` came from `alloc` above, so from the system's allocator, with this layout.
        unsafe { System.dealloc(memory, layout) };
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(|place| &place.taken);
        // SAFETY: `memory` came from `alloc` above, so from the system's allocator, with this layout.
        unsafe { System.realloc(memory, layout, size) }
    }
}
