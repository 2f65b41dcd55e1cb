// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The seeded source of every choice in a run (splitmix64): same seed, same run.

/// A small, fast generator; its quality is ample for choosing delays and targets.
#[derive(Clone, Debug)]
pub(super) struct Rng {
    state: u64,
    still: bool,
}

impl Rng {
    pub(super) const fn new(seed: u64) -> Self {
        let state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
        Self { state, still: false }
    }

    /// Always the first choice, and yes wherever there is any chance: nothing is left open but what
    /// happens when.
    pub(super) const fn still() -> Self {
        Self { state: 0, still: true }
    }

    pub(super) const fn next(&mut self) -> u64 {
        if self.still {
            return 0;
        }
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 if `n` is 0.
    pub(super) const fn below(&mut self, n: u64) -> u64 {
        let word = self.next();
        if n == 0 { 0 } else { word % n }
    }

    /// A number in `low..high`.
    pub(super) const fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low))
    }

    /// An index below `n`.
    pub(super) fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).unwrap_or(0)
    }

    /// True in `per_mille` of 1000 cases.
    pub(super) const fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// A delay in microseconds: mostly near `low`, now and then far out, never past `high`.
    pub(super) fn delay(&mut self, low: u64, high: u64) -> u64 {
        let spread = match self.below(10) {
            0 => high,
            1..4 => low.saturating_add(high.saturating_sub(low) / 8),
            _ => low.saturating_mul(3),
        };
        self.range(low, spread.clamp(low + 1, high + 1))
    }

    /// One of `choices` by weight; `None` only if all weights are 0.
    pub(super) fn weighted<T: Copy>(&mut self, choices: &[(T, u64)]) -> Option<T> {
        let mut at = self.below(choices.iter().map(|c| c.1).sum());
        for (choice, weight) in choices {
            if at < *weight {
                return Some(*choice);
            }
            at -= weight;
        }
        None
    }
}
