// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an eviction may not do: let go of a block that raw I/O is in flight on, since the next request may be told something else
//! of it; or keep from the workers that it has let go (R8).

use extentd::engine::extent::Hint;

use super::hazard::Hazard;
use super::run::Sim;
use super::scenario::bytes;

impl Sim {
    /// The manager has done its work for an event.
    pub(super) fn check_evictions(&mut self) {
        let Some(keeper) = &self.keeper else { return };
        if self.world.scenario.max_extents >= 1 << 20
            || keeper.snapshot().evictions == self.evictions
        {
            return;
        }
        self.evictions = keeper.snapshot().evictions;
        self.world.hit(Hazard::Eviction);
        if !self.is_direct() {
            return;
        }
        let Some(keeper) = &self.keeper else { return };
        let block_bytes = bytes(self.world.host.spb);
        let known = |block: usize| {
            keeper.map().lookup(block as u64 * block_bytes, &mut Hint::default()).is_some()
        };
        let lost = self
            .world
            .raw_in_flight()
            .find_map(|op| Some((op.class, *op.blocks.iter().find(|block| !known(**block))?)));
        let told = self.shared.latest().1.map.len();
        let has = keeper.map().len();
        if let Some((class, block)) = lost {
            self.world.fail(format!("block {block} is evicted with a {class:?} in flight (R8)"));
        } else if told != has {
            let what = "after an eviction the workers see";
            self.world.fail(format!("{what} {told} extents, and {has} are left (R8)"));
        }
    }
}
