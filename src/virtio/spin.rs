// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether a worker goes on looking for a while before it sleeps.
//!
//! Looking saves the wake-up, which with many requests in flight is most of what a request costs. But the core it
//! takes may be the one that the disk's own work needs, and then it halves what it was to speed up. Which of the two it is
//! depends on the disk, the guest and who else is there, so it is tried: short turns with and without, compared by the
//! requests that were completed in them. No clock in here: whoever asks says what time it is.

use std::str::FromStr;
use std::time::Duration;

/// How long `auto` looks before it sleeps, when it does. Whatever it waits for, the disk's next completion or the guest's next
/// kick, often begins with the wake-up of another CPU, 20 to 30 µs in a virtual machine: looking has to last longer than that, or it only
/// delays the sleep.
const LOOK: Duration = Duration::from_micros(50);
/// The most that can be asked for.
const MAX_LOOK_US: u64 = 1000;
/// A turn of a trial. Long against a request, and against a scheduler's time slice.
const TURN: Duration = Duration::from_millis(5);
/// Turns of a trial: every second one is with looking.
const TURNS: u32 = 6;
/// A turn with fewer requests proves nothing, and such a load needs no help.
const LEAST: u64 = 32;
/// Looking has to gain so much to be worth a core: hundredths.
const GAIN: u128 = 108;
/// How long a decision holds at first, and at most; each that is confirmed holds twice as long.
const HOLD: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));

/// `--poll-us`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Polling {
    /// As long as it measurably pays.
    #[default]
    Auto,
    /// Always so long.
    Fixed(Duration),
}

impl FromStr for Polling {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let time = text.parse().ok().filter(|us| *us <= MAX_LOOK_US).map(Duration::from_micros);
        time.map(Self::Fixed)
            .ok_or_else(|| format!("must be auto, or 0 to {MAX_LOOK_US} microseconds"))
    }
}

/// Requests and the time they took.
#[derive(Clone, Copy, Default, Debug)]
struct Pace {
    requests: u64,
    time: Duration,
}

impl Pace {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.time += other.time;
    }

    /// Whether this is more than `hundredths` hundredths of `other`'s rate.
    fn beats(self, other: Self, hundredths: u128) -> bool {
        let ours = u128::from(self.requests) * other.time.as_nanos() * 100;
        ours > u128::from(other.requests) * self.time.as_nanos() * hundredths
    }
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Until then it stays as it is.
    Hold(Duration),
    /// The turn of a trial that is under way.
    Trial(u32),
}

/// One worker's decision.
#[derive(Debug)]
pub(crate) struct Spin {
    polling: Polling,
    phase: Phase,
    /// The decision, and for how long the next one holds if it is the same.
    pays: bool,
    hold: Duration,
    /// When the current turn began, if any request was completed yet, and what was since.
    since: Option<Duration>,
    requests: u64,
    without: Pace,
    with: Pace,
    /// The last turn without, and how many of the turns with looking were better than the one before them.
    before: Pace,
    better: u32,
}

impl Spin {
    pub(crate) fn new(polling: Polling) -> Self {
        Self {
            polling,
            phase: Phase::Hold(Duration::ZERO),
            pays: false,
            hold: HOLD.0,
            since: None,
            requests: 0,
            without: Pace::default(),
            with: Pace::default(),
            before: Pace::default(),
            better: 0,
        }
    }

    /// How long to look before sleeping, for now.
    pub(crate) fn look(&self) -> Duration {
        match (self.polling, self.phase) {
            (Polling::Fixed(time), _) => time,
            (Polling::Auto, Phase::Hold(_)) if self.pays => LOOK,
            (Polling::Auto, Phase::Trial(turn)) if turn % 2 == 1 => LOOK,
            (Polling::Auto, _) => Duration::ZERO,
        }
    }

    /// `requests` were completed, at `now`.
    pub(crate) fn completed(&mut self, now: Duration, requests: u64) {
        if self.polling != Polling::Auto {
            return;
        }
        let since = *self.since.get_or_insert(now);
        self.requests += requests;
        let time = now.saturating_sub(since);
        if time < TURN {
            return;
        }
        let pace = Pace { requests: std::mem::take(&mut self.requests), time };
        self.since = Some(now);
        // After a pause, or with so little to do, nothing is learnt and nothing is gained.
        if time > 4 * TURN || pace.requests < LEAST {
            self.decide(now, false);
            return;
        }
        match self.phase {
            Phase::Hold(until) if now >= until => self.turn(0),
            Phase::Hold(_) => {}
            Phase::Trial(turn) => {
                if turn % 2 == 1 {
                    self.with.add(pace);
                    self.better += u32::from(pace.beats(self.before, 100));
                } else {
                    self.without.add(pace);
                    self.before = pace;
                }
                if turn + 1 < TURNS {
                    self.phase = Phase::Trial(turn + 1);
                } else {
                    // One turn that the scheduler spoilt must not make up for two that show nothing.
                    let always = self.better == TURNS / 2;
                    self.decide(now, always && self.with.beats(self.without, GAIN));
                }
            }
        }
    }

    fn turn(&mut self, turn: u32) {
        self.phase = Phase::Trial(turn);
        (self.with, self.without, self.better) = (Pace::default(), Pace::default(), 0);
    }

    fn decide(&mut self, now: Duration, pays: bool) {
        self.hold = if pays == self.pays { (self.hold * 2).min(HOLD.1) } else { HOLD.0 };
        self.pays = pays;
        self.phase = Phase::Hold(now + self.hold);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_micros(100);

    /// Runs a load for `time`: requests per 100 µs without and with looking. The share of the time
    /// it looked.
    fn run(spin: &mut Spin, now: &mut Duration, time: Duration, rates: (u64, u64)) -> f64 {
        let (mut looked, mut steps) = (0, 0);
        let end = *now + time;
        while *now < end {
            let looks = !spin.look().is_zero();
            *now += STEP;
            (looked, steps) = (looked + u32::from(looks), steps + 1);
            let requests = if looks { rates.1 } else { rates.0 };
            if requests > 0 {
                spin.completed(*now, requests);
            }
        }
        f64::from(looked) / f64::from(steps)
    }

    fn after_a_while(rates: (u64, u64)) -> f64 {
        let (mut spin, mut now) = (Spin::new(Polling::Auto), Duration::ZERO);
        run(&mut spin, &mut now, Duration::from_millis(100), rates);
        run(&mut spin, &mut now, Duration::from_secs(20), rates)
    }

    #[test]
    fn it_looks_where_that_pays_and_sleeps_where_not() {
        assert!(after_a_while((20, 28)) > 0.97);
        assert!(after_a_while((20, 10)) < 0.03);
        assert!(after_a_while((20, 21)) < 0.03, "not worth a core");
    }

    #[test]
    fn it_follows_the_load() {
        let (mut spin, mut now) = (Spin::new(Polling::Auto), Duration::ZERO);
        let second = Duration::from_secs(1);
        for _ in 0..3 {
            run(&mut spin, &mut now, 5 * second, (20, 30));
            assert!(run(&mut spin, &mut now, second, (20, 30)) > 0.9);
            run(&mut spin, &mut now, 5 * second, (6, 3));
            assert!(run(&mut spin, &mut now, second, (6, 3)) < 0.1);
        }
    }

    /// One turn in six all but stands still, because others have the core.
    #[test]
    fn a_spoilt_turn_decides_nothing() {
        let (mut spin, mut now) = (Spin::new(Polling::Auto), Duration::ZERO);
        let mut looked = 0;
        for step in 0_u64..200_000 {
            now += STEP;
            looked += u32::from(!spin.look().is_zero());
            spin.completed(now, if step / 50 % 7 == 0 { 1 } else { 20 });
        }
        assert!(looked < 10_000, "{looked}");
    }

    #[test]
    fn a_light_load_is_never_looked_for() {
        let (mut spin, mut now) = (Spin::new(Polling::Auto), Duration::ZERO);
        for _ in 0..10_000 {
            now += Duration::from_millis(1);
            assert_eq!(spin.look(), Duration::ZERO);
            spin.completed(now, 1);
        }
        // Bursts with long pauses neither.
        for _ in 0..1000 {
            now += Duration::from_millis(100);
            spin.completed(now, 64);
            assert_eq!(spin.look(), Duration::ZERO);
        }
    }

    #[test]
    fn what_is_asked_for_is_done() {
        let fixed: Polling = "70".parse().unwrap();
        let mut spin = Spin::new(fixed);
        spin.completed(Duration::from_secs(1), 1_000_000);
        assert_eq!(spin.look(), Duration::from_micros(70));
        assert_eq!("auto".parse(), Ok(Polling::Auto));
        assert_eq!("0".parse(), Ok(Polling::Fixed(Duration::ZERO)));
        for bad in ["", "1001", "-1", "fast", "5us"] {
            bad.parse::<Polling>().unwrap_err();
        }
    }
}
