// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device that completes raw I/O slowly, in the order it came, from the start or from some moment
//! on: `io.max`, a rebuild, a neighbour (R2b).
//!
//! Where a break is to be served in time whatever happens, no rate may be so low that what the rule
//! lets in flight cannot be drained within lease-break-time.

use extentd::engine::RawLimits;

use super::hardship::Hardships;
use super::hazard::Hazard;
use super::rng::Rng;
use super::scenario::{Fill, LEASE_BREAK, Scenario};
use super::world::World;

/// How slow a device is.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlowDevice {
    /// From this moment on, in microseconds.
    from: u64,
    bytes_per_second: u64,
}

/// Limits to the scale of the simulator, whose lease-break time is a second and whose guests have
/// some hundred KiB in flight.
const LIMITS: RawLimits =
    RawLimits { bytes: 64 << 10, start: 16 << 10, least: 8 << 10, operation: 16 << 10 };

/// Blocks of an image; on a slow device enough for many large requests at a time.
pub(super) fn blocks(slow: bool, rng: &mut Rng) -> usize {
    if slow { 150 + rng.index(100) } else { 10 + rng.index(40) }
}

/// Makes a scenario one of a slow device, with a guest that keeps it busy.
pub(super) fn slow_down(scenario: &mut Scenario, rng: &mut Rng) {
    // One thing at a time.
    scenario.hard = Hardships::default();
    scenario.greed = 1000;
    scenario.geometry.raw = LIMITS;
    scenario.fill = Fill::Written;
    scenario.workers = 2 + rng.index(3);
    scenario.queue_depth = 8;
    scenario.geometry.ops = scenario.geometry.ops.max(16);
    scenario.phases = scenario.phases.min(6);
    scenario.focus = 100;
    // Directions and workers each have a bound of their own.
    let parts = 2 * scenario.workers as u64;
    let (from, in_flight, drain) = if rng.chance(700) {
        // Known from the first operation on: little is let in flight before its rate is known.
        (0, LIMITS.start, LEASE_BREAK / 2)
    } else {
        (rng.below(200_000), LIMITS.bytes, LEASE_BREAK * 6 / 10)
    };
    let bytes_per_second = in_flight * parts * 1_000_000 / drain;
    scenario.slow_device = Some(SlowDevice { from, bytes_per_second });
}

impl World {
    /// How long a raw operation that starts now waits for the device and takes there.
    pub(super) fn device_delay(&mut self, bytes: u64) -> u64 {
        let Some(slow) = self.scenario.slow_device else { return 0 };
        if self.peace || self.now < slow.from {
            return 0;
        }
        self.hit(Hazard::SlowDevice);
        let takes = bytes * 1_000_000 / slow.bytes_per_second;
        self.device_free = self.device_free.max(self.now) + takes;
        self.device_free - self.now
    }

    /// Whether the device is slow at the moment.
    pub(super) fn is_slow(&self) -> bool {
        self.scenario.slow_device.is_some_and(|slow| self.now >= slow.from)
    }
}
