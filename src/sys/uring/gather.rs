// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! For how many completions a thread sleeps.

/// With so many operations in flight, a thread sleeps until a thirty-second part of them has completed: to be woken costs
/// the CPU that completes them more than one of them does, and the disk has plenty to do meanwhile.
const MANY: usize = 64;
const SHARE: usize = 32;
/// At most so many sleeps are for one completion after one for several has been in vain.
const LONGEST_REST: u32 = 1024;

/// Whether to sleep for several completions. What is in flight says nothing about when it ends: it may hang, on a server that is gone
/// or a disk that is slow, beside one request after another that does not. So whenever they have not come in
/// time the next sleeps are for one again, and each time for twice as many.
#[derive(Debug)]
pub(super) struct Gather {
    /// The kernel can do it.
    able: bool,
    /// Sleeps that are for one.
    rest: u32,
    /// How many that will be the next time.
    next_rest: u32,
}

impl Gather {
    pub(super) fn new(able: bool) -> Self {
        Self { able, rest: 0, next_rest: 1 }
    }

    /// How many completions to sleep for, with so many operations in flight.
    pub(super) fn wanted(&self, in_flight: usize) -> usize {
        if self.able && self.rest == 0 && in_flight >= MANY { in_flight / SHARE } else { 1 }
    }

    /// A sleep for `wanted` completions is over, with so many.
    pub(super) fn slept(&mut self, wanted: usize, come: usize) {
        if wanted <= 1 {
            self.rest = self.rest.saturating_sub(1);
        } else if come >= wanted {
            self.next_rest = 1;
        } else {
            self.rest = self.next_rest;
            self.next_rest = self.next_rest.saturating_mul(2).min(LONGEST_REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_many_are_slept_for_together() {
        let gather = Gather::new(true);
        assert_eq!([0, 1, 63, 64, 128, 1000].map(|n| gather.wanted(n)), [1, 1, 1, 2, 4, 31]);
        assert_eq!(Gather::new(false).wanted(128), 1);
    }

    #[test]
    fn what_does_not_come_is_slept_for_ever_more_rarely() {
        let mut gather = Gather::new(true);
        let mut together = Vec::new();
        for sleep in 0..10_000 {
            let wanted = gather.wanted(100);
            if wanted > 1 {
                together.push(sleep);
            }
            gather.slept(wanted, 1);
        }
        assert_eq!(together[..6], [0, 2, 5, 10, 19, 36]);
        assert_eq!(together.len(), 10 + (10_000 - 1033) / 1025 + 1);
        gather.rest = 0;
        gather.slept(3, 3);
        gather.slept(3, 2);
        assert_eq!(gather.rest, 1, "once it has come the next time is as the first");
    }
}
