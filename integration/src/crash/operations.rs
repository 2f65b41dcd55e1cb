// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the load may do: one line an operation, each sent only if the device offers what it needs.

use std::ops::Range;

use virtio_driver::VirtioBlkFeatureFlags as Features;

use super::ledger::{BLOCK_SECTORS, Content};
use crate::rig::random::Random;

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Read,
    Write,
    Discard,
    Zero { unmap: bool },
    Flush,
}

impl Action {
    /// What it leaves in its sectors, if it changes them.
    pub(super) fn content(self) -> Option<Content> {
        match self {
            Action::Read | Action::Flush => None,
            Action::Write => Some(Content::Stamp),
            Action::Discard => Some(Content::Discarded),
            Action::Zero { .. } => Some(Content::Zero),
        }
    }
}

/// Which sectors it takes.
#[derive(Debug, Clone, Copy)]
enum Reach {
    /// So many whole blocks at most.
    Blocks(u64),
    /// A few sectors about the edge of a block.
    Edge,
    /// So many sectors at most, from anywhere.
    Sectors(u64),
    Nothing,
}

/// A line of the table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    pub(super) action: Action,
    reach: Reach,
    weight: u64,
    needs: Features,
}

const fn line(weight: u64, action: Action, reach: Reach, needs: Features) -> Operation {
    Operation { action, reach, weight, needs }
}

const ALWAYS: Features = Features::empty();
const UNMAP: Action = Action::Zero { unmap: true };
const KEEP: Action = Action::Zero { unmap: false };

/// All there is.
const TABLE: &[Operation] = &[
    line(30, Action::Write, Reach::Blocks(1), ALWAYS),
    line(14, Action::Write, Reach::Blocks(12), ALWAYS),
    line(3, Action::Write, Reach::Blocks(56), ALWAYS),
    line(14, Action::Write, Reach::Edge, ALWAYS),
    line(8, Action::Write, Reach::Sectors(40), ALWAYS),
    line(10, Action::Read, Reach::Sectors(64), ALWAYS),
    line(5, Action::Discard, Reach::Blocks(12), Features::DISCARD),
    line(3, Action::Discard, Reach::Sectors(64), Features::DISCARD),
    line(3, UNMAP, Reach::Blocks(12), Features::WRITE_ZEROES),
    line(3, UNMAP, Reach::Sectors(64), Features::WRITE_ZEROES),
    line(4, KEEP, Reach::Sectors(64), Features::WRITE_ZEROES),
    line(4, Action::Flush, Reach::Nothing, Features::FLUSH),
];

/// Sectors from which half of the requests are taken, so that much is overwritten.
const HOT: u64 = 64 * BLOCK_SECTORS;

impl Operation {
    /// One of those that a device with `features` can do.
    pub(super) fn choose(features: u64, random: &mut Random) -> Operation {
        let features = Features::from_bits_truncate(features);
        let can = |line: &&Operation| features.contains(line.needs);
        let total = TABLE.iter().filter(can).map(|line| line.weight).sum();
        let mut at = random.below(total);
        for line in TABLE.iter().filter(can) {
            if at < line.weight {
                return *line;
            }
            at -= line.weight;
        }
        line(0, Action::Read, Reach::Blocks(1), ALWAYS)
    }

    /// The sectors of a request to an image of `sectors`, some of them near `hot`.
    pub(super) fn range(&self, sectors: u64, hot: u64, random: &mut Random) -> Range<u64> {
        let anywhere =
            if random.one_in(2) { hot + random.below(HOT) } else { random.below(sectors) };
        let block = anywhere / BLOCK_SECTORS * BLOCK_SECTORS;
        let (start, len) = match self.reach {
            Reach::Blocks(most) => (block, (1 + random.below(most)) * BLOCK_SECTORS),
            Reach::Edge => {
                let before = 1 + random.below(BLOCK_SECTORS - 1);
                (block.saturating_sub(before), 1 + random.below(2 * BLOCK_SECTORS - 3))
            }
            Reach::Sectors(most) => (anywhere, 1 + random.below(most)),
            Reach::Nothing => (0, 0),
        };
        start.min(sectors)..(start + len).min(sectors)
    }
}

/// Where the hot part of an image of `sectors` begins.
pub(super) fn hot(sectors: u64, random: &mut Random) -> u64 {
    random.below(sectors.saturating_sub(HOT))
}

/// The features that the load asks for, besides those of every client.
pub(super) fn features() -> u64 {
    (Features::DISCARD | Features::WRITE_ZEROES).bits()
}
