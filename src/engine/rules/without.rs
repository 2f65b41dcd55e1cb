// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules that no test noticed the absence of until the simulator learned to.

use super::Rules;

impl Rules {
    /// All rules but that a punch that has ended leaves the file's metadata dirty (R14).
    #[must_use]
    pub fn without_punch_dirt() -> Self {
        Self { punch_dirt: false, ..Self::default() }
    }

    /// All rules but that a strict flush holds back other queues (R13).
    #[must_use]
    pub fn without_fence_on_other_queues() -> Self {
        Self { fence_all: false, ..Self::default() }
    }

    /// All rules but that a worker waits for [`ToWorker::Begin`](crate::engine::message::ToWorker::Begin).
    #[must_use]
    pub fn without_begin() -> Self {
        Self { begin: false, ..Self::default() }
    }

    /// All rules but that a worker that joins gets the quiesce orders that stand.
    #[must_use]
    pub fn without_standing_orders() -> Self {
        Self { join_quiesced: false, ..Self::default() }
    }

    /// All rules but that zeros are answered only under a confirmed lease (R2a).
    #[must_use]
    pub fn without_lease_for_zeros() -> Self {
        Self { zero_lease: false, ..Self::default() }
    }

    /// All rules but that the block the file ends in is never raw.
    #[must_use]
    pub fn without_opaque_tail() -> Self {
        Self { tail_opaque: false, ..Self::default() }
    }

    /// All rules but that an eviction waits for the raw I/O there (R8).
    #[must_use]
    pub fn without_eviction_drain() -> Self {
        Self { evict_drain: false, ..Self::default() }
    }

    /// All rules but that an eviction is published (R8).
    #[must_use]
    pub fn without_eviction_publish() -> Self {
        Self { evict_publish: false, ..Self::default() }
    }
}
