// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Latencies, counted into buckets that are at most 1/64 wide, so that recording one costs a shift and an addition.

/// Buckets per power of two, as a power of two.
const FINE: u32 = 6;
/// Values from 2^40 ns (18 minutes) on share the last bucket.
const POWERS: u32 = 40 - FINE;

/// A histogram of nanoseconds.
#[derive(Debug, Clone)]
pub(super) struct Histogram {
    counts: Box<[u64]>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: vec![0; (POWERS as usize + 1) << FINE].into_boxed_slice(), total: 0 }
    }
}

impl Histogram {
    /// Counts one latency of `nanos`.
    pub(super) fn record(&mut self, nanos: u64) {
        let index = bucket(nanos).min(self.counts.len() - 1);
        if let Some(count) = self.counts.get_mut(index) {
            *count += 1;
            self.total += 1;
        }
    }

    /// How many were counted.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Adds what another one has counted.
    pub(super) fn merge(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// Forgets everything; allocates nothing.
    pub(super) fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
    }

    /// The microseconds that a share of `quantile` (0 to 1) of the latencies did not exceed; 0 when nothing was counted.
    pub(super) fn quantile_us(&self, quantile: f64) -> f64 {
        let wanted = quantile * self.total as f64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen as f64 >= wanted {
                return middle(index) / 1000.0;
            }
        }
        0.0
    }
}

/// Below 2^FINE every value has its own bucket; from there each power of two has 2^FINE of them.
fn bucket(nanos: u64) -> usize {
    let power = nanos.max(1).ilog2().saturating_sub(FINE);
    ((power as usize) << FINE) + usize::try_from(nanos >> power).unwrap_or(usize::MAX >> 1)
}

fn middle(index: usize) -> f64 {
    let power = (index >> FINE).saturating_sub(1);
    let low = ((index - (power << FINE)) as f64) * 2_f64.powf(power as f64);
    low + (2_f64.powf(power as f64) - 1.0) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_close_to_the_truth() {
        let mut histogram = Histogram::default();
        for nanos in 1..=1_000_000 {
            histogram.record(nanos);
        }
        for quantile in [0.01, 0.5, 0.99, 0.999] {
            let found = histogram.quantile_us(quantile) * 1000.0;
            let true_value = quantile * 1e6;
            assert!((found / true_value - 1.0).abs() < 0.02, "{quantile}: {found}");
        }
        assert_eq!(histogram.total(), 1_000_000);
        histogram.clear();
        assert_eq!((histogram.total(), histogram.quantile_us(0.5)), (0, 0.0));
    }

    #[test]
    fn merged_they_count_everything() {
        let (mut one, mut other) = (Histogram::default(), Histogram::default());
        one.record(1000);
        other.record(2000);
        other.record(3000);
        one.merge(&other);
        assert_eq!(one.total(), 3);
        assert!((one.quantile_us(0.5) / 2.0 - 1.0).abs() < 0.02);
    }

    #[test]
    fn buckets_grow_with_the_value_and_hold_any() {
        let mut last = 0;
        for shift in 0..64 {
            for value in [1_u64 << shift, (1 << shift) + ((1_u64 << shift) >> 1)] {
                assert!(bucket(value) >= last);
                last = bucket(value);
            }
        }
        let mut histogram = Histogram::default();
        histogram.record(0);
        histogram.record(u64::MAX);
        assert_eq!(histogram.total(), 2);
    }
}
