// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What some hosts make harder than others: leases that are shared, a manager that is short of CPU time, a ring that is not
//! taken at once, a helper that hangs, workers that join late. A scenario without any of it is [`Hardships::default`].

use super::rng::Rng;
use super::scenario::{Fill, Scenario};

/// Chances are per mille.
#[derive(Clone, Debug, Default)]
pub(super) struct Hardships {
    /// The image is served read-only.
    pub(super) read_only: bool,
    /// The filesystem can share blocks between files.
    pub(super) reflink: bool,
    /// Most microseconds that the manager's thread spends on an event; 0: it takes no time.
    pub(super) cpu: u64,
    /// Now and then the guest fills all of its queues at once.
    pub(super) bursts: bool,
    /// How often the kernel takes only some of what a ring hands over.
    pub(super) refuses: u64,
    /// How often an operation ends with EAGAIN or EINTR.
    pub(super) again: u64,
    /// How often the helper never comes back from a step of a job.
    pub(super) hangs: u64,
    /// All workers of a session but the first join while it is under way.
    pub(super) late: bool,
    /// The guest flushes while a discard is being punched, and once more behind it; then the power may fail.
    pub(super) trims: bool,
    /// How often FIEMAP fails where the map is small.
    pub(super) unmapped: u64,
    /// FIEMAP tells all or next to nothing.
    pub(super) ragged: bool,
    /// The helper takes long over each step.
    pub(super) slow_helper: bool,
}

impl Hardships {
    /// Draws what is hard here, and fits the rest of the scenario to it.
    pub(super) fn add_to(scenario: &mut Scenario, rng: &mut Rng) {
        let often =
            |rng: &mut Rng, chance: u64, value: u64| if rng.chance(chance) { value } else { 0 };
        let identity = scenario.identity();
        let vast = scenario.max_extents < 1 << 20;
        let mut hard = Self {
            read_only: !identity && rng.chance(100),
            reflink: rng.chance(500),
            cpu: if rng.chance(300) { [5, 40, 300][rng.index(3)] } else { 0 },
            bursts: rng.chance(70),
            refuses: often(rng, 250, 300),
            again: often(rng, 250, 30),
            hangs: often(rng, 120, 15),
            late: rng.chance(450),
            trims: !identity && rng.chance(200),
            unmapped: if vast { often(rng, 600, 500) } else { 0 },
            ragged: vast,
            slow_helper: vast && rng.chance(400),
        };
        if vast && rng.chance(800) {
            // Many extents, and most of them are not what has been asked for last.
            scenario.fill = [Fill::Mixed, Fill::Cloned][rng.index(2)];
            scenario.batch = usize::MAX;
            scenario.slow = 250;
            scenario.focus = 500;
            scenario.hot = 1;
        }
        if hard.read_only {
            hard.trims = false;
            scenario.lies = false;
            if matches!(scenario.fill, Fill::Holes | Fill::Unwritten) {
                scenario.fill = Fill::Written;
            }
        }
        if hard.bursts {
            scenario.queue_depth = 16 + rng.index(9);
            hard.cpu = hard.cpu.max(40);
        }
        if hard.trims {
            // The canary that takes a freed block has the journal committed first.
            scenario.greed = 0;
            scenario.punches = true;
            scenario.fill = Fill::Written;
            scenario.discards = scenario.discards.max(120);
        }
        scenario.hard = hard;
    }
}
