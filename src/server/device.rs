// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device that sessions offer, put together from the configuration and the image.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::config::Config;
use crate::engine::Rules;
use crate::engine::keeper::Start;
use crate::engine::shared::Shared;
use crate::image::Image;
use crate::inbox::Poster;
use crate::virtio::features::Topology;
use crate::virtio::session::{DeviceConfig, Files};

impl Files for Image {
    fn image_fd(&self) -> BorrowedFd<'_> {
        self.image_fd()
    }

    fn device_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device_fd()
    }
}

/// What every session of this daemon is made of.
pub(super) fn describe(
    config: &Config,
    rules: Rules,
    image: &Arc<Image>,
    shared: Arc<Shared>,
    inbox: Poster,
) -> DeviceConfig {
    let topology = image.topology();
    DeviceConfig {
        files: Arc::clone(image) as Arc<dyn Files>,
        geometry: *image.geometry(),
        limits: *image.limits(),
        topology: Topology {
            physical_block: topology.physical_block,
            alignment_offset: topology.alignment_offset,
            min_io: topology.min_io,
            opt_io: topology.opt_io,
            discard_block: image.geometry().fs_block,
        },
        lease: image.start() == Start::Eligible,
        rules,
        shared,
        num_queues: config.num_queues,
        queue_size: config.queue_size,
        threads: config.threads,
        serial: config.serial.clone().unwrap_or_else(|| image.default_serial()),
        strict: config.strict,
        polling: config.polling,
        pin_memory: config.pin_memory,
        write_back: config.write_back,
        inbox,
    }
}
