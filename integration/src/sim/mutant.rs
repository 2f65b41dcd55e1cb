// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules switched off one at a time, to show that the simulator notices.

use clap::ValueEnum;
use extentd::engine::Rules;

/// A rule that does not hold in this run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Mutant {
    /// R9: a FIEMAP answer is believed whatever was written meanwhile.
    NoGeneration,
    /// R12 and R2: nothing waits for raw I/O in flight.
    NoDrain,
    /// R3: the page cache is not looked at after it was told to go.
    NoCacheCheck,
    /// R1a: lease and lock do not outlive a killed daemon's I/O.
    NoFence,
    /// R14: a flush does not commit the file's metadata.
    NoMetadataFsync,
    /// R13: workers say that nothing is being written any more while it is.
    NoStillness,
    /// R12: discards are punched as the guest asked for them.
    PunchUnrounded,
    /// R14: the file's metadata is not dirty any more once a punch has ended.
    NoPunchDirt,
    /// R13: a strict flush holds nothing back on other queues.
    FenceOwnQueue,
    /// R12: a worker starts requests before it is told to begin.
    EarlyStart,
    /// R12: a worker that joins gets none of the quiesce orders that stand.
    JoinUnquiesced,
    /// R2a: zeros are answered without a check of the lease.
    ZerosUnchecked,
    /// Section 4: the block that the file ends in is as good as any.
    RawTail,
    /// R8: an eviction waits for no raw I/O.
    EvictUndrained,
    /// R8: workers keep what was evicted.
    EvictUnpublished,
    /// R1: a read-only image takes a shared lease where blocks can be shared, too.
    ReadLease,
    /// R2a: what the kernel did not take at first is handed over later without a second check of the lease.
    StaleSubmission,
    /// R2: the lease is given up by the thread that may hang in the filesystem.
    LeaseByHelper,
    /// R18a: the manager's work on a message grows with the square of those that wait.
    QuadraticManager,
    /// ADR 0004: sectors are written raw, whatever the device's page cache holds of their blocks.
    PartialRawWrites,
    /// R10: a written hole stays a hole in the map.
    NoForgetting,
    /// R2b: as much raw I/O is in flight on a slow device as on a fast one.
    NoPace,
    /// ADR 0010: blocks are written through the file one by one, whatever else is in their page.
    PartOfPage,
}

impl Mutant {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::NoGeneration,
        Self::NoDrain,
        Self::NoCacheCheck,
        Self::NoFence,
        Self::NoMetadataFsync,
        Self::NoStillness,
        Self::PunchUnrounded,
        Self::NoPunchDirt,
        Self::FenceOwnQueue,
        Self::EarlyStart,
        Self::JoinUnquiesced,
        Self::ZerosUnchecked,
        Self::RawTail,
        Self::EvictUndrained,
        Self::EvictUnpublished,
        Self::ReadLease,
        Self::StaleSubmission,
        Self::LeaseByHelper,
        Self::QuadraticManager,
        Self::PartialRawWrites,
        Self::NoForgetting,
        Self::NoPace,
        Self::PartOfPage,
    ];

    /// Whether it is a rule of the engine that it breaks; others are the simulated world's.
    pub fn is_of_the_engine(self) -> bool {
        Self::rules(Some(self)) != Rules::default()
    }

    /// The engine's rules under it.
    pub fn rules(this: Option<Self>) -> Rules {
        match this {
            Some(Self::NoGeneration) => Rules::without_generation(),
            Some(Self::NoDrain) => Rules::without_drain(),
            Some(Self::NoMetadataFsync) => Rules::without_metadata_sync(),
            Some(Self::NoStillness) => Rules::without_stillness(),
            Some(Self::PunchUnrounded) => Rules::without_punch_rounding(),
            Some(Self::NoPunchDirt) => Rules::without_punch_dirt(),
            Some(Self::FenceOwnQueue) => Rules::without_fence_on_other_queues(),
            Some(Self::EarlyStart) => Rules::without_begin(),
            Some(Self::JoinUnquiesced) => Rules::without_standing_orders(),
            Some(Self::ZerosUnchecked) => Rules::without_lease_for_zeros(),
            Some(Self::RawTail) => Rules::without_opaque_tail(),
            Some(Self::EvictUndrained) => Rules::without_eviction_drain(),
            Some(Self::EvictUnpublished) => Rules::without_eviction_publish(),
            Some(Self::NoForgetting) => Rules::without_forgetting(),
            Some(Self::NoPace) => Rules::without_pace(),
            Some(Self::ReadLease | Self::StaleSubmission | Self::LeaseByHelper) => Rules::default(),
            Some(Self::QuadraticManager | Self::PartOfPage) => Rules::default(),
            Some(Self::NoCacheCheck | Self::NoFence | Self::PartialRawWrites) | None => {
                Rules::default()
            }
        }
    }
}
