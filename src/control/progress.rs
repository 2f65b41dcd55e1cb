// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A bar for what takes long, on stderr and only if that is a terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const WIDTH: u64 = 40;
/// What ends sooner needs no bar.
const FIRST: Duration = Duration::from_millis(500);
const STEP: Duration = Duration::from_millis(100);

/// A bar; it is wiped out when it goes.
#[derive(Debug)]
pub struct Progress {
    next: Option<Instant>,
    drawn: bool,
}

impl Progress {
    /// A bar that appears after half a second.
    #[must_use]
    pub fn new() -> Self {
        let next = std::io::stderr().is_terminal().then(|| Instant::now() + FIRST);
        Self { next, drawn: false }
    }

    /// `done` of `all` are done.
    pub fn show(&mut self, done: u64, all: u64) {
        let now = Instant::now();
        if self.next.is_some_and(|next| next <= now) {
            self.next = Some(now + STEP);
            self.drawn = true;
            // It is decoration: a terminal that has gone away is no error.
            let _ = write!(std::io::stderr(), "\r{}", bar(done, all));
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn bar(done: u64, all: u64) -> String {
    let done = done.min(all);
    let share = |parts: u64| {
        let share = u128::from(done) * u128::from(parts) / u128::from(all.max(1));
        usize::try_from(share).unwrap_or(0)
    };
    let filled = "=".repeat(share(WIDTH));
    format!("[{filled:<width$}] {:>3} %", share(100), width = usize::try_from(WIDTH).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::bar;

    #[test]
    fn the_bar_fills() {
        assert_eq!(bar(0, 0), format!("[{}]   0 %", " ".repeat(40)));
        assert_eq!(bar(u64::MAX, u64::MAX), format!("[{}] 100 %", "=".repeat(40)));
        assert!(bar(1 << 62, 1 << 63).ends_with("]  50 %"));
    }
}
