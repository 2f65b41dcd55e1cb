// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a ring does once a part of the guest's memory is missing: it writes nothing to the image any more (R18a).

use std::sync::Arc;

use super::Ring;
use crate::sys::fault::GuestRegions;

impl Ring {
    /// Operations are of this guest memory, in which a missing page is survived.
    ///
    /// Once there is one, no write is accepted, and no raw operation handed over, any more: they end with `EFAULT`. What would
    /// be written may be zeros in place of what is missing.
    pub fn guard(&mut self, regions: &Arc<GuestRegions>) {
        self.regions = Some(Arc::clone(regions));
    }

    pub(super) fn memory_is_lost(&self) -> bool {
        self.regions.as_ref().is_some_and(|regions| regions.are_lost())
    }
}
