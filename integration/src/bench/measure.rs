// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One measured run of one subject.

use std::io;
use std::thread;

use super::ground::{Ground, Image};
use super::guest::{Guest, Wait};
use super::load::{self, Disk, Sample, Timing};
use super::native::Native;
use super::subject::Subject;
use super::usage::{Machine, Memory, Usage};
use super::workload::Workload;
use crate::rig::syscalls::Counter;
use crate::rig::{Daemon, Status};

/// What one run came to. What a subject without a server does not have is `None`.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    /// The client's figures.
    pub(super) sample: Sample,
    /// Server CPU time (user and system) per request in microseconds.
    pub(super) cpu_us_per_io: Option<f64>,
    /// The part of it that io_uring's kernel workers of the server used.
    pub(super) io_workers_us_per_io: Option<f64>,
    /// Times a thread of the server went to sleep, per request.
    pub(super) switches_per_io: Option<f64>,
    /// Server CPU time over wall time, in percent of one CPU.
    pub(super) busy_percent: Option<f64>,
    /// The most memory the server ever had resident.
    pub(super) peak_rss_kib: Option<u64>,
    /// The share of the data segments that went straight to the device (extentd only).
    pub(super) direct_share: Option<f64>,
    /// CPU time of the machine's kernel workers per request in microseconds.
    pub(super) kworkers_us_per_io: f64,
    /// The machine's time that others used, in percent.
    pub(super) others_percent: f64,
    /// The machine's time that its hypervisor took, in percent.
    pub(super) stolen_percent: f64,
}

/// The machine and the server when counting began and when it ended.
#[derive(Debug, Default)]
struct Marks {
    machine: Vec<Machine>,
    server: Vec<Usage>,
}

impl Marks {
    /// Notes the state of things; the server's closest to the requests that count.
    fn note(&mut self, server: Option<&Daemon>) -> io::Result<()> {
        let first = self.machine.is_empty();
        if first {
            self.machine.push(Machine::now()?);
        }
        if let Some(server) = server {
            self.server.push(Usage::of(server.pid())?);
        }
        if !first {
            self.machine.push(Machine::now()?);
        }
        Ok(())
    }

    fn outcome(&self, sample: Sample) -> Outcome {
        let requests = sample.requests().max(1) as f64;
        let us_per_io = |nanos: f64| nanos / 1000.0 / requests;
        let machine = match (self.machine.first(), self.machine.last()) {
            (Some(start), Some(end)) => end.since(*start),
            _ => Machine::default(),
        };
        let mut outcome = Outcome {
            kworkers_us_per_io: us_per_io(machine.kworkers_ns),
            stolen_percent: machine.stolen_percent(),
            ..Outcome::default()
        };
        let mut server_ns = 0.0;
        if let [start, end] = self.server.as_slice() {
            server_ns = end.cpu_ns.saturating_sub(start.cpu_ns) as f64;
            let io_workers_ns = end.io_workers_ns.saturating_sub(start.io_workers_ns) as f64;
            outcome.cpu_us_per_io = Some(us_per_io(server_ns));
            outcome.io_workers_us_per_io = Some(us_per_io(io_workers_ns));
            outcome.switches_per_io =
                Some(end.switches.saturating_sub(start.switches) as f64 / requests);
            outcome.busy_percent = Some(server_ns / sample.seconds.max(1e-9) / 1e7);
        }
        outcome.others_percent = machine.others_percent(server_ns);
        outcome.sample = sample;
        outcome
    }
}

/// What is to be measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trial<'a> {
    /// What.
    pub(super) subject: Subject,
    /// On which image; a subject that needs none uses the bare disk.
    pub(super) image: &'a Image,
    /// Doing what.
    pub(super) workload: Workload,
    /// For how long.
    pub(super) timing: Timing,
    /// How the client waits.
    pub(super) wait: Wait,
}

impl Ground {
    /// Starts the subject, runs the workload on it, ends it.
    pub(super) fn measure_on(&self, trial: &Trial<'_>) -> io::Result<Outcome> {
        let mut marks = Marks::default();
        let Some(mut server) =
            self.start(trial.subject, &trial.image.path, trial.workload.queues)?
        else {
            let sample = on_client_thread(|| {
                let device = trial.subject == Subject::NativeDevice;
                let path = if device { self.bare() } else { trial.image.path.as_path() };
                trial.run(Native::open(path, trial.workload, trial.wait)?, || marks.note(None))
            })?;
            return Ok(marks.outcome(sample));
        };
        let before = modes(trial.subject, &server)?;
        let sample = trial.drive(&server, || marks.note(Some(&server)))?;
        let direct_share = match (before, modes(trial.subject, &server)?) {
            (Some(before), Some(after)) => Some(direct_share(&before, &after)),
            _ => None,
        };
        let peak_rss_kib = Some(Memory::of(server.pid())?.peak);
        server.sigterm()?;
        Ok(Outcome { peak_rss_kib, direct_share, ..marks.outcome(sample) })
    }

    /// The server's system calls per request, where they can be counted.
    pub(super) fn syscalls_per_io(&self, trial: &Trial<'_>) -> io::Result<Option<f64>> {
        let Some(mut server) =
            self.start(trial.subject, &trial.image.path, trial.workload.queues)?
        else {
            return Ok(None);
        };
        let mut counter = None;
        let mut calls = None;
        let sample = trial.drive(&server, || {
            match &counter {
                None => counter = Counter::start(server.pid()),
                Some(counter) => calls = Some(counter.read()?),
            }
            Ok(())
        })?;
        server.sigterm()?;
        Ok(calls.map(|calls| calls as f64 / sample.requests().max(1) as f64))
    }
}

impl Trial<'_> {
    /// Runs it on a server that has been started.
    fn drive(
        &self,
        server: &Daemon,
        mark: impl FnMut() -> io::Result<()> + Send,
    ) -> io::Result<Sample> {
        let sample = on_client_thread(|| {
            self.run(Guest::connect(server.socket(), self.workload, self.wait)?, mark)
        });
        sample.map_err(|error| {
            io::Error::new(error.kind(), format!("{error}; the server's log: {}", server.log()))
        })
    }

    fn run(&self, mut disk: impl Disk, mark: impl FnMut() -> io::Result<()>) -> io::Result<Sample> {
        load::run(&mut disk, self.workload, self.timing, self.image.size, mark)
    }
}

/// The CPU the client has to itself: the last one we may use, unless it is the only one. Servers may run anywhere.
pub(super) fn client_cpu() -> io::Result<Option<usize>> {
    let ours = rustix::thread::sched_getaffinity(None)?;
    let mut cpus = (0..rustix::thread::CpuSet::MAX_CPU).rev().filter(|cpu| ours.is_set(*cpu));
    Ok(cpus.next().filter(|_| cpus.next().is_some()))
}

/// Runs `work` on a thread that stays on the client's CPU.
pub(super) fn on_client_thread<T: Send>(
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let cpu = client_cpu()?;
    let pinned = || {
        if let Some(cpu) = cpu {
            let mut set = rustix::thread::CpuSet::new();
            set.set(cpu);
            rustix::thread::sched_setaffinity(None, &set)?;
        }
        work()
    };
    thread::scope(|scope| scope.spawn(pinned).join())
        .unwrap_or_else(|_| Err(io::Error::other("the client panicked")))
}

fn modes(subject: Subject, server: &Daemon) -> io::Result<Option<Status>> {
    if subject.is_extentd() { server.status().map(Some) } else { Ok(None) }
}

/// The direct share of the segments between two states, 0 if either was not in direct mode.
fn direct_share(before: &Status, after: &Status) -> f64 {
    let since = |path: &str| after.number(path).saturating_sub(before.number(path)) as f64;
    let direct = since("segments/direct");
    let all = direct + since("segments/file") + since("segments/zero");
    if before.direct() && after.direct() && all > 0.0 { direct / all } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::histogram::Histogram;

    #[test]
    fn costs_are_per_request_and_of_the_time_between_the_marks() {
        let mut latencies = Histogram::default();
        (0..1000).for_each(|_| latencies.record(5_000));
        let sample = Sample { latencies, seconds: 0.01, ..Sample::default() };
        let usage = |cpu_ns, io_workers_ns, switches| Usage { cpu_ns, io_workers_ns, switches };
        let machine = |busy_ns, kworkers_ns| Machine {
            busy_ns,
            kworkers_ns,
            all_ns: busy_ns * 2.0,
            ..Machine::default()
        };
        let marks = Marks {
            machine: vec![machine(0.0, 0.0), machine(10e6, 1e6)],
            server: vec![usage(1_000_000, 0, 7), usage(6_000_000, 500_000, 507)],
        };
        let outcome = marks.outcome(sample.clone());
        assert_eq!(outcome.cpu_us_per_io, Some(5.0));
        assert_eq!(outcome.io_workers_us_per_io, Some(0.5));
        assert_eq!(outcome.switches_per_io, Some(0.5));
        assert_eq!(outcome.busy_percent, Some(50.0));
        assert_eq!((outcome.kworkers_us_per_io, outcome.others_percent), (1.0, 20.0));
        let native = Marks { server: Vec::new(), ..marks }.outcome(sample);
        assert_eq!((native.cpu_us_per_io, native.others_percent), (None, 45.0));
    }
}
