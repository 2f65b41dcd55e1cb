// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main loop's one wait: an epoll set whose entries are named by numbers of ours.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use epoll::{ControlOptions, Event, Events};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

/// Events taken at once; what does not fit comes with the next wait.
const BATCH: usize = 32;

/// What a descriptor is watched for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Interest {
    /// Nothing but its end.
    Nothing,
    /// Something to read.
    Read,
    /// Room to write.
    Write,
}

impl Interest {
    fn events(self) -> Events {
        match self {
            Self::Nothing => Events::empty(),
            Self::Read => Events::EPOLLIN,
            Self::Write => Events::EPOLLOUT,
        }
    }
}

/// An epoll set.
#[derive(Debug)]
pub(crate) struct Poll {
    fd: RawFd,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { fd: epoll::create(true)? })
    }

    /// Watches `fd` under the number `token`. It must leave with [`remove`](Self::remove) before
    /// it is closed.
    pub(crate) fn add(&self, fd: &impl AsRawFd, token: u64, interest: Interest) -> io::Result<()> {
        let event = Event::new(interest.events(), token);
        epoll::ctl(self.fd, ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), event)
    }

    pub(crate) fn change(
        &self,
        fd: &impl AsRawFd,
        token: u64,
        interest: Interest,
    ) -> io::Result<()> {
        let event = Event::new(interest.events(), token);
        epoll::ctl(self.fd, ControlOptions::EPOLL_CTL_MOD, fd.as_raw_fd(), event)
    }

    pub(crate) fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        let event = Event::new(Events::empty(), 0);
        epoll::ctl(self.fd, ControlOptions::EPOLL_CTL_DEL, fd.as_raw_fd(), event)
    }

    /// Waits until something is there; the tokens of what is.
    pub(crate) fn wait(&self, tokens: &mut Vec<u64>) -> io::Result<()> {
        let mut events = [Event::new(Events::empty(), 0); BATCH];
        tokens.clear();
        let count = match epoll::wait(self.fd, -1, &mut events) {
            Ok(count) => count,
            // A debugger or a stop signal; the caller comes again.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        tokens.extend(events.iter().take(count).map(|event| event.data));
        Ok(())
    }
}

impl Drop for Poll {
    fn drop(&mut self) {
        // Nothing can be done about a failure, and the process is ending.
        let _ = epoll::close(self.fd);
    }
}

/// Time since boot, suspend included: the clock of the whole engine (R2a).
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// An alarm at a point of [`now`]'s clock.
#[derive(Debug)]
pub(crate) struct Timer {
    fd: std::os::fd::OwnedFd,
    set: Option<Duration>,
}

impl Timer {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { fd: timerfd_create(TimerfdClockId::Boottime, flags)?, set: None })
    }

    /// Rings at `deadline`, or not at all. A system call only when it has changed.
    pub(crate) fn set(&mut self, deadline: Option<Duration>) -> io::Result<()> {
        if self.set == deadline {
            return Ok(());
        }
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = deadline.map_or(zero, |at| Timespec {
            tv_sec: at.as_secs().try_into().unwrap_or(i64::MAX),
            // All zeros would switch the timer off instead of ringing at once.
            tv_nsec: i64::from(at.subsec_nanos()).max(1),
        });
        let value = Itimerspec { it_interval: zero, it_value: value };
        timerfd_settime(&self.fd, TimerfdTimerFlags::ABSTIME, &value)?;
        self.set = deadline;
        Ok(())
    }

    /// Silences it after it rang.
    pub(crate) fn hear(&mut self) {
        self.set = None;
        // Empty when the deadline was moved after it rang.
        let _ = rustix::io::read(&self.fd, &mut [0_u8; 8][..]);
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_rings_once_at_its_time() {
        let poll = Poll::new().unwrap();
        let mut timer = Timer::new().unwrap();
        poll.add(&timer, 7, Interest::Read).unwrap();
        let at = now() + Duration::from_millis(20);
        timer.set(Some(at)).unwrap();
        let mut tokens = Vec::new();
        poll.wait(&mut tokens).unwrap();
        assert_eq!(tokens, [7]);
        assert!(now() >= at);
        timer.hear();
        // In the past: at once.
        timer.set(Some(Duration::ZERO)).unwrap();
        poll.wait(&mut tokens).unwrap();
        assert_eq!(tokens, [7]);
    }
}
