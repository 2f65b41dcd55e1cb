// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rigs, simulator and benches that hold extentd to its rules.

pub mod bench;
pub mod crash;
pub mod guard;
pub mod map_scale;
pub mod rig;
pub mod sim;
