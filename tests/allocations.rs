// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The core allocates nothing for a request: at once, without a device. What the whole daemon does is counted by
//! `integration guard`.

#![allow(clippy::unwrap_used)]

use clap::ValueEnum;
use integration::guard::core::{Case, Core};
use integration::rig::allocations::{Count, Counting, of_this_thread};

#[global_allocator]
static HEAP: Counting = Counting;

/// What `work` does to the heap.
fn of<T>(work: impl FnOnce() -> T) -> Count {
    let before = of_this_thread();
    std::hint::black_box(work());
    of_this_thread() - before
}

#[test]
fn allocations_are_counted() {
    assert_eq!(of(|| Box::new(1)), Count { taken: 1, given: 1 });
    assert_eq!(of(|| std::mem::forget(vec![0_u8; 100])), Count { taken: 1, given: 0 });
    let thread = || std::thread::spawn(|| of(|| String::from("of another thread")));
    assert_eq!(thread().join().unwrap(), Count { taken: 1, given: 1 });
}

#[test]
fn the_core_allocates_nothing_for_a_request() {
    for case in Case::value_variants() {
        let mut core = Core::new(*case).unwrap();
        core.run(64).unwrap();
        assert_eq!(of(|| core.run(1000)), Count::default(), "{case:?}");
    }
}
