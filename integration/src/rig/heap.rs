// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What this process has on its heap.

/// Bytes handed out and not given back, with the allocator's own overhead: what a structure really costs.
#[must_use]
pub fn in_use() -> usize {
    // SAFETY: mallinfo2 takes nothing and returns numbers.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}
