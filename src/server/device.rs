// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the configuration asks of the image, and the device that sessions offer, put together from both.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::config::{Config, Mode};
use crate::engine::keeper::Start;
use crate::engine::shared::Shared;
use crate::engine::{Geometry, RawLimits, Rules};
use crate::image::{Image, ModeChoice, Options};
use crate::inbox::Poster;
use crate::virtio::cache_mode::CacheMode;
use crate::virtio::features::Topology;
use crate::virtio::limits::MemoryLimits;
use crate::virtio::session::{DeviceConfig, Files};

impl Files for Image {
    fn image_fd(&self) -> BorrowedFd<'_> {
        self.image_fd()
    }

    fn device_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device_fd()
    }
}

/// How the image is opened.
pub(super) fn image_options(config: &Config) -> Options {
    Options {
        path: config.blk_file.clone(),
        read_only: config.read_only,
        mode: match config.mode {
            Mode::Auto => ModeChoice::Auto,
            Mode::Direct => ModeChoice::Direct,
            Mode::Filesystem => ModeChoice::Filesystem,
        },
        offset: config.offset,
        size_limit: config.size_limit,
        format_raw: config.format_raw,
        block_size: config.block_size,
        unmap: config.unmap,
    }
}

/// What every session of this daemon is made of.
pub(super) fn describe(
    config: &Config,
    devices: usize,
    rules: Rules,
    image: &Arc<Image>,
    (shared, inbox): (Arc<Shared>, Poster),
) -> DeviceConfig {
    let topology = image.topology();
    DeviceConfig {
        files: Arc::clone(image) as Arc<dyn Files>,
        geometry: Geometry { raw: RawLimits::of_one_in(config.threads), ..*image.geometry() },
        limits: *image.limits(),
        topology: Topology {
            physical_block: topology.physical_block,
            alignment_offset: topology.alignment_offset,
            min_io: topology.min_io,
            opt_io: topology.opt_io,
            discard_block: image.geometry().fs_block,
        },
        lease: (image.start() == Start::Eligible).then(|| image.lease_kind()),
        rules,
        shared,
        num_queues: config.num_queues,
        queue_size: config.queue_size,
        threads: config.threads,
        serial: config.serial.clone().unwrap_or_else(|| image.default_serial()),
        strict: config.strict,
        polling: config.polling,
        pin_memory: config.pin_memory,
        cache: CacheMode::new(config.write_back),
        memory_limits: MemoryLimits::share(devices, config.num_queues, config.threads),
        inspections: Arc::default(),
        inbox,
    }
}
