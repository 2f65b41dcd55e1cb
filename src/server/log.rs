// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the log goes: stderr, as text or JSON lines, and what keeps it from growing without bound.
//!
//! Every line goes through [`Gate`], whichever crate logs it: nobody has to remember that a frontend can cause a
//! line. What a line's cause is decides [`HOST_MODULES`]; a module that is not there, and every
//! other crate, speaks for guests, frontends and control clients.

use std::fmt::{self, Write};
use std::io::IsTerminal;
use std::path::{Display, Path};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::field::{DisplayValue, Field, Visit, display};
use tracing::span::Id;
use tracing::{Event, Level, Span, Subscriber, callsite, error, warn};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use super::limit::{Cause, Limiter, Suppressed};
use super::poll::now;
use crate::config::{LogFormat, LogLevel, Settings};

/// Modules all of whose lines have causes that no guest, frontend or control client can repeat at will.
const HOST_MODULES: [&str; 6] = [
    "extentd::image",
    "extentd::server::owner",
    "extentd::server::process",
    "extentd::server::stop",
    "extentd::server::watch",
    "extentd::sys::uring::enter",
];
/// The target of such a line in another module.
pub(super) const HOST: &str = "extentd::host";
/// The reports' own; they are not limited, for there is one of each kind in [`REPORT_EVERY`].
const REPORT: &str = "extentd::suppressed";
/// How long lines are counted before it is said how many were left out.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// Bytes of a line that is left out of which the report tells.
const EXAMPLE: usize = 200;

/// A span that names a device, and nothing else.
const DEVICE: &str = "device";

static LIMITS: OnceLock<Arc<Limits>> = OnceLock::new();

/// Starts the log. Only the first call in a process has an effect.
///
/// It starts a thread: signals have to be blocked before (R1).
pub fn start_log(settings: &Settings) {
    let level = match settings.log_level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let limits = Arc::default();
    let gate = Gate(Arc::clone(&limits));
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let started = match settings.log_format {
        LogFormat::Text => log.finish().with(gate).try_init(),
        LogFormat::Json => log.json().flatten_event(true).finish().with(gate).try_init(),
    };
    // A log that is there already goes on.
    if started.is_ok() && LIMITS.set(Arc::clone(&limits)).is_ok() {
        // Without the thread it is said at the end how much was left out.
        let _ = thread::Builder::new().name("log".to_owned()).spawn(move || limits.run());
    }
}

/// Says how many lines were left out since it was last said. For the end, which does not wait for the next report.
pub(super) fn report_suppressed() {
    if let Some(limits) = LIMITS.get() {
        limits.say();
    }
}

/// A span whose lines name the device of this image. On while there is a log at all: who asks for warnings
/// only wants to know whose they are too.
pub(super) fn device_span(image: &Path) -> Span {
    tracing::error_span!(DEVICE, image = %image.display())
}

/// The image, for a line that is to name it: `None` where a [`device_span`] does so.
pub(super) fn image_field(image: &Path) -> Option<DisplayValue<Display<'_>>> {
    Span::current().is_none().then(|| display(image.display()))
}

/// A line that was left out.
#[derive(Debug, Default)]
struct Line {
    is_error: bool,
    /// Its message, cut to [`EXAMPLE`] bytes.
    text: String,
}

/// What the threads that log share with the one that reports.
#[derive(Debug, Default)]
struct Limits {
    state: Mutex<State>,
    /// A line was left out, the first since the last report.
    left_out: Condvar,
}

#[derive(Debug, Default)]
struct State {
    limiter: Limiter<callsite::Identifier, Option<Id>, Line>,
    /// Something is to be reported.
    pending: bool,
}

impl Limits {
    /// Never held across anything that can wait, the log itself least of all.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, event: &Event<'_>, device: Option<Id>) -> bool {
        let metadata = event.metadata();
        let target = metadata.target();
        if target == REPORT {
            return true;
        }
        let mut state = self.lock();
        let kind = (metadata.callsite(), device);
        let admitted = state.limiter.admit(kind, cause(target), now(), |line| {
            line.is_error = *metadata.level() == Level::ERROR;
            line.text.clear();
            event.record(line);
        });
        if !admitted && !state.pending {
            state.pending = true;
            self.left_out.notify_one();
        }
        admitted
    }

    /// The thread that reports. It sleeps while nothing is left out.
    fn run(&self) {
        loop {
            let state = self.left_out.wait_while(self.lock(), |state| !state.pending);
            drop(state.unwrap_or_else(PoisonError::into_inner));
            thread::sleep(REPORT_EVERY);
            self.say();
        }
    }

    fn say(&self) {
        let report = {
            let mut state = self.lock();
            state.pending = false;
            state.limiter.report()
        };
        for Suppressed { device, lines, last } in report {
            let text = &last.text;
            if last.is_error {
                error!(target: REPORT, parent: device, "{lines} lines left out, the last: {text}");
            } else {
                warn!(target: REPORT, parent: device, "{lines} lines left out, the last: {text}");
            }
        }
    }
}

fn cause(target: &str) -> Cause {
    let is_in = |module: &&str| {
        target.strip_prefix(*module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    };
    if target == HOST || HOST_MODULES.iter().any(is_in) { Cause::Host } else { Cause::Outside }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Also what comes by way of the crate `log` describes itself in fields.
        if field.name().starts_with("log.") {
            return;
        }
        let gap = if self.text.is_empty() { "" } else { " " };
        // Cut short is meant to be: what is left out can be long, and there is one of each kind in memory.
        let _ = match field.name() {
            "message" => write!(Cut(&mut self.text), "{gap}{value:?}"),
            name => write!(Cut(&mut self.text), "{gap}{name}={value:?}"),
        };
    }
}

/// Writes what fits into [`EXAMPLE`] bytes.
struct Cut<'a>(&'a mut String);

impl Write for Cut<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = EXAMPLE.saturating_sub(self.0.len());
        let end = (0..=room.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
        self.0.push_str(text.get(..end.unwrap_or(0)).unwrap_or_default());
        Ok(())
    }
}

/// The layer that every line has to pass.
struct Gate(Arc<Limits>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Gate {
    fn event_enabled(&self, event: &Event<'_>, context: Context<'_, S>) -> bool {
        let device = context
            .event_scope(event)
            .and_then(|mut scope| scope.find(|span| span.name() == DEVICE).map(|span| span.id()));
        self.0.admit(event, device)
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
