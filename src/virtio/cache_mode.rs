// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether writes are durable when they complete (R15), which is a matter of what the driver
//! believes (ADR 0011).
//!
//! A driver without FLUSH, or one that reads `writeback` as 0, never flushes. Frontends answer its
//! reads by themselves, with what they were told last: by our answer to GET_CONFIG when they began,
//! or by the driver's own write, which they pass on as SET_CONFIG. They tell us neither when they
//! connect again. So what the driver was told is remembered for as long as this process lives, and
//! a driver that was told by somebody else may believe in write-through.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::features::{WRITEBACK_OFFSET, has};
use super::session::MAX_QUEUES;

/// What is known of a device's drivers. It outlives the sessions.
#[derive(Debug)]
pub struct CacheMode {
    /// What a frontend is told that begins: `--cache`.
    default: bool,
    driver: Mutex<Driver>,
}

/// The present driver.
#[derive(Debug)]
struct Driver {
    told: Told,
    /// By queue, the used index that was published last in its last session; none of a queue that it has not used.
    /// Nobody else has published on its rings since, so one that goes on elsewhere is another driver's.
    ended: Ended,
}

type Ended = [Option<u16>; MAX_QUEUES as usize];
const NEVER: Ended = [None; MAX_QUEUES as usize];

/// What the present driver was told of `writeback`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Told {
    /// Nothing yet, by this process; no ring has been seen that would have been running before.
    Nothing,
    /// Something that this process does not know.
    Elsewhere,
    /// This.
    Writeback(bool),
}

impl CacheMode {
    /// Of a device that no frontend has come to yet; `write_back` is what the first is told.
    #[must_use]
    pub const fn new(write_back: bool) -> Self {
        let driver = Driver { told: Told::Nothing, ended: NEVER };
        Self { default: write_back, driver: Mutex::new(driver) }
    }

    /// A session is over for a queue that it has served; `index` is the used index that was published last.
    pub(crate) fn ended(&self, queue: u16, index: u16) {
        if let Some(ended) = self.driver().ended.get_mut(usize::from(queue)) {
            *ended = Some(index);
        }
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same for one session.
#[derive(Debug)]
pub(crate) struct SessionMode {
    state: Mutex<State>,
    /// For the workers, which look with each batch.
    write_through: AtomicBool,
}

/// How the frontend of a session has come to know `writeback`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// From somebody before this session.
    Before,
    /// It began with this session, and was told the default.
    Offer,
    /// The driver set it in this session.
    Driver,
}

#[derive(Debug)]
struct State {
    acked: u64,
    source: Source,
    /// A chain has been taken in this session.
    running: bool,
    /// From which queues, by bit.
    served: u64,
}

/// What an event has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Changed {
    /// Workers have to look now, not with the next batch.
    pub(crate) mode: bool,
    /// Write-through is a guess about a driver that was told by somebody else, made just now.
    pub(crate) guessed: bool,
}

impl SessionMode {
    /// A session that begins.
    pub(crate) fn new() -> Self {
        let state = State { acked: 0, source: Source::Before, running: false, served: 0 };
        Self { state: Mutex::new(state), write_through: AtomicBool::new(true) }
    }

    /// Whether writes complete only when durable.
    pub(crate) fn write_through(&self) -> bool {
        self.write_through.load(Ordering::Acquire)
    }

    /// SET_FEATURES.
    pub(crate) fn features(&self, device: &CacheMode, acked: u64) -> Changed {
        self.change(device, |state, _| state.acked = acked)
    }

    /// The driver has set `writeback`.
    pub(crate) fn set(&self, device: &CacheMode, writeback: bool) -> Changed {
        self.change(device, |state, driver| {
            state.source = Source::Driver;
            driver.told = Told::Writeback(writeback);
        })
    }

    /// GET_CONFIG of `size` bytes from `offset` on: what to answer for `writeback`.
    ///
    /// A frontend that asks before its driver has made a request begins with this session: those
    /// that connect again do not ask. It is told the default, which counts once it uses the device:
    /// one that only looks changes nothing for the driver of another.
    pub(crate) fn ask(&self, device: &CacheMode, offset: u32, size: u32) -> u8 {
        let part = offset..offset.saturating_add(size);
        self.change(device, |state, _| {
            if part.contains(&WRITEBACK_OFFSET) && !state.running && state.source == Source::Before
            {
                state.source = Source::Offer;
            }
        });
        let state = self.lock();
        let writeback = state.told(device, device.driver().told) == Told::Writeback(true);
        let no_flush =
            has(state.acked, VIRTIO_BLK_F_CONFIG_WCE) && !has(state.acked, VIRTIO_BLK_F_FLUSH);
        u8::from(writeback && !no_flush)
    }

    /// A queue is to go on at an available index, or has been found to go on at a used index.
    /// One that is not 0 and that this session has not brought about is a driver's that began
    /// before this frontend did, or before this process: whatever it was told, it was not by us.
    pub(crate) fn index(&self, device: &CacheMode, queue: u16, index: u16) -> Changed {
        self.change(device, |state, driver| state.look_at(driver, queue, index, false))
    }

    /// The first chain has been taken from a queue since its ring was set up, at used index
    /// `index`.
    pub(crate) fn start(&self, device: &CacheMode, queue: u16, index: u16) -> Changed {
        self.change(device, |state, driver| {
            state.look_at(driver, queue, index, true);
            state.served |= bit(queue);
            let first = !std::mem::replace(&mut state.running, true);
            // One whose rings begin here is taken for new.
            if driver.told == Told::Nothing {
                state.source = Source::Offer;
            }
            if state.source == Source::Offer {
                driver.told = Told::Writeback(device.default);
            }
            if first && state.source != Source::Before {
                driver.ended = NEVER;
            }
        })
    }

    fn change(&self, device: &CacheMode, act: impl FnOnce(&mut State, &mut Driver)) -> Changed {
        let mut state = self.lock();
        let mut driver = device.driver();
        let guessed = state.guesses(device, driver.told);
        act(&mut state, &mut driver);
        let now = state.write_through(device, driver.told);
        let before = self.write_through.swap(now, Ordering::AcqRel);
        Changed { mode: now != before, guessed: !guessed && state.guesses(device, driver.told) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What holds in this session.
    fn told(&self, device: &CacheMode, told: Told) -> Told {
        match (self.source, told) {
            (Source::Offer, _) | (_, Told::Nothing) => Told::Writeback(device.default),
            (Source::Before | Source::Driver, told) => told,
        }
    }

    /// Only a used index tells one driver from another: what a frontend names as the available index when it connects
    /// again may include what its guest has offered meanwhile.
    fn look_at(&mut self, driver: &mut Driver, queue: u16, index: u16, used: bool) {
        let ended = driver.ended.get(usize::from(queue)).copied().flatten();
        let other = match (self.source, driver.told) {
            (Source::Offer, _) | (_, Told::Nothing) => true,
            (Source::Before, Told::Writeback(_)) => used && ended != Some(index),
            (Source::Before, Told::Elsewhere) | (Source::Driver, _) => false,
        };
        if index != 0 && self.served & bit(queue) == 0 && other {
            self.source = Source::Before;
            *driver = Driver { told: Told::Elsewhere, ended: NEVER };
        }
    }

    /// virtio 1.3, 5.2.5 and 5.2.6.2. A driver that did not negotiate CONFIG_WCE reads no
    /// `writeback`: with FLUSH it takes the device for one with a write cache.
    fn write_through(&self, device: &CacheMode, told: Told) -> bool {
        let sees = has(self.acked, VIRTIO_BLK_F_CONFIG_WCE);
        !has(self.acked, VIRTIO_BLK_F_FLUSH)
            || match self.told(device, told) {
                Told::Writeback(on) => !on,
                Told::Nothing | Told::Elsewhere => sees || !device.default,
            }
    }

    /// Whether it is write-through for no other reason than that nothing is known of the driver.
    fn guesses(&self, device: &CacheMode, told: Told) -> bool {
        let sees = has(self.acked, VIRTIO_BLK_F_CONFIG_WCE) && has(self.acked, VIRTIO_BLK_F_FLUSH);
        self.running && sees && device.default && self.told(device, told) == Told::Elsewhere
    }
}

fn bit(queue: u16) -> u64 {
    1u64.checked_shl(u32::from(queue)).unwrap_or(0)
}

#[cfg(test)]
#[path = "cache_mode_tests.rs"]
mod tests;
