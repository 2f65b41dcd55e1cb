// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is no workload: opening, idling, images in pieces, many devices, neighbours, the page cache.

mod devices;
mod extents;
mod idle;
mod neighbour;
mod opening;
mod page_cache;

pub(super) use devices::{DevicesRow, devices, devices_in_one};
pub(super) use extents::{ExtentsRow, extents};
pub(super) use idle::{IdleRow, idle};
pub(super) use neighbour::{NeighbourRow, Situation, neighbour};
pub(super) use opening::{OpeningRow, opening};
pub(super) use page_cache::{CacheRow, page_cache};
