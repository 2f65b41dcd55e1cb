// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rules of the core that the simulator may switch off one by one, to show that it notices.

/// Which rules hold. In the daemon all of them, always: only a build with the feature `mutants`
/// can make another value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// R9: a FIEMAP answer counts only where nothing was written through the file meanwhile.
    pub(super) generation: bool,
    /// R12: layout changes and lease breaks wait for raw I/O in flight.
    pub(super) drain: bool,
    /// R14: a flush commits the file's metadata when it may have changed.
    pub(super) metadata_sync: bool,
    /// R13: a worker that says that nothing is being written any more has waited for that.
    pub(super) still: bool,
    /// R12: only whole blocks are punched.
    pub(super) punch_rounded: bool,
    /// R14: the file's metadata counts as dirty once a punch has ended, whatever was committed while it ran.
    pub(super) punch_dirt: bool,
    /// R13: a strict flush holds back what arrives on the other queues, too.
    pub(super) fence_all: bool,
    /// R12: a worker starts no request before it has the quiesce orders that stand.
    pub(super) begin: bool,
    /// R12: a worker that joins gets the quiesce orders that stand.
    pub(super) join_quiesced: bool,
    /// R2a: zeros are answered only under a lease that was confirmed lately.
    pub(super) zero_lease: bool,
    /// Section 4: the block that the file ends in is opaque, whatever FIEMAP says of it.
    pub(super) tail_opaque: bool,
    /// R8: what is evicted is quiesced first.
    pub(super) evict_drain: bool,
    /// R8: what was evicted is published.
    pub(super) evict_publish: bool,
    /// R10: what the map says of blocks that were written through the file is forgotten before the guest is told (ADR 0006).
    pub(super) forget: bool,
    /// R2b: raw I/O in flight is bounded by what the device completes.
    pub(super) pace: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            generation: true,
            drain: true,
            metadata_sync: true,
            still: true,
            punch_rounded: true,
            punch_dirt: true,
            fence_all: true,
            begin: true,
            join_quiesced: true,
            zero_lease: true,
            tail_opaque: true,
            evict_drain: true,
            evict_publish: true,
            forget: true,
            pace: true,
        }
    }
}

#[cfg(feature = "mutants")]
mod without;

#[cfg(feature = "mutants")]
impl Rules {
    /// All rules but R9's generation check.
    #[must_use]
    pub fn without_generation() -> Self {
        Self { generation: false, ..Self::default() }
    }

    /// All rules but R12's (and R2's) drain.
    #[must_use]
    pub fn without_drain() -> Self {
        Self { drain: false, ..Self::default() }
    }

    /// All rules but R14's metadata commit.
    #[must_use]
    pub fn without_metadata_sync() -> Self {
        Self { metadata_sync: false, ..Self::default() }
    }

    /// All rules but that workers wait until nothing is being written before they say so (R13).
    #[must_use]
    pub fn without_stillness() -> Self {
        Self { still: false, ..Self::default() }
    }

    /// All rules but R12's rounding of punches.
    #[must_use]
    pub fn without_punch_rounding() -> Self {
        Self { punch_rounded: false, ..Self::default() }
    }

    /// All rules but that written holes are forgotten.
    #[must_use]
    pub fn without_forgetting() -> Self {
        Self { forget: false, ..Self::default() }
    }

    /// All rules but that raw I/O is bounded by the device's rate.
    #[must_use]
    pub fn without_pace() -> Self {
        Self { pace: false, ..Self::default() }
    }
}
