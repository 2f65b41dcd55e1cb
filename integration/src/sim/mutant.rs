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
        Self::PartialRawWrites,
        Self::NoForgetting,
        Self::NoPace,
        Self::PartOfPage,
    ];

    /// Whether it is a rule of the engine that it breaks; four of the mutants are the simulated
    /// world's.
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
            Some(Self::NoForgetting) => Rules::without_forgetting(),
            Some(Self::NoPace) => Rules::without_pace(),
            Some(
                Self::NoCacheCheck | Self::NoFence | Self::PartialRawWrites | Self::PartOfPage,
            )
            | None => Rules::default(),
        }
    }
}
