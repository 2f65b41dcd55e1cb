// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory fit for O_DIRECT.

/// Bytes at an address that is a multiple of what was asked for.
#[derive(Debug)]
pub(super) struct AlignedBuf {
    /// Never grows, so its address stays.
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// `len` zeros at a multiple of `align`, a power of two.
    pub(super) fn new(len: usize, align: usize) -> Self {
        let storage = vec![0; len + align];
        let start = storage.as_ptr().align_offset(align);
        Self { storage, start, len }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.storage.get(self.start..self.start + self.len).unwrap_or_default()
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.storage.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}
