// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Medians, spreads, and ratios taken round by round.

use serde::Serialize;

/// The median; 0 of nothing.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle).copied().unwrap_or(0.0);
    if sorted.len().is_multiple_of(2) {
        let lower = middle.checked_sub(1).and_then(|i| sorted.get(i)).copied().unwrap_or(0.0);
        f64::midpoint(lower, upper)
    } else {
        upper
    }
}

/// A figure with the least and the greatest of what it is the median of.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    /// The median.
    pub(super) median: f64,
    /// The least.
    pub(super) low: f64,
    /// The greatest.
    pub(super) high: f64,
}

impl Spread {
    /// Of `values`; `None` of nothing.
    pub(super) fn of(values: &[f64]) -> Option<Spread> {
        let low = values.iter().copied().min_by(f64::total_cmp)?;
        let high = values.iter().copied().max_by(f64::total_cmp)?;
        Some(Spread { median: median(values), low, high })
    }

    /// Of the one over the other, round by round; rounds in which the other has nothing are left out.
    pub(super) fn of_ratios(own: &[f64], other: &[f64]) -> Option<Spread> {
        let pairs = own.iter().zip(other).filter(|(_, other)| **other > 0.0);
        Spread::of(&pairs.map(|(own, other)| own / other).collect::<Vec<f64>>())
    }

    /// A figure that is known without rounds.
    pub(super) fn exact(value: f64) -> Spread {
        Spread { median: value, low: value, high: value }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_or_between_the_two_middle_ones() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn a_ratio_is_of_the_rounds_and_not_of_the_medians() {
        // The medians' ratio would be 1: the machine was busy in other rounds for the one than for the other.
        let ratio = Spread::of_ratios(&[100.0, 200.0, 300.0], &[50.0, 200.0, 150.0]).unwrap();
        assert_eq!(ratio, Spread { median: 2.0, low: 1.0, high: 2.0 });
        assert_eq!(Spread::of_ratios(&[1.0, 4.0], &[0.0, 2.0]), Some(Spread::exact(2.0)));
        assert_eq!(Spread::of_ratios(&[1.0], &[0.0]), None);
        assert_eq!(Spread::of(&[]), None);
    }
}
