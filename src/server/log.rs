// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the log goes: stderr, as text or JSON lines.

use std::io::IsTerminal;
use std::path::{Display, Path};

use tracing::Span;
use tracing::field::{DisplayValue, display};
use tracing_subscriber::filter::LevelFilter;

use crate::config::{LogFormat, LogLevel, Settings};

/// Starts the log. Only the first call in a process has an effect.
pub fn start_log(settings: &Settings) {
    let level = match settings.log_level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // A log that is there already goes on.
    let _ = match settings.log_format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}

/// A span whose lines name the device of this image. On while there is a log at all: who asks for warnings
/// only wants to know whose they are too.
pub(super) fn device_span(image: &Path) -> Span {
    tracing::error_span!("device", image = %image.display())
}

/// The image, for a line that is to name it: `None` where a [`device_span`] does so.
pub(super) fn image_field(image: &Path) -> Option<DisplayValue<Display<'_>>> {
    Span::current().is_none().then(|| display(image.display()))
}
