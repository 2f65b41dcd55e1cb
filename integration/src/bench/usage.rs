// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a server costs besides time: its CPU, its kernel workers', its context switches, its memory; and how busy the machine
//! was with other things.

use std::fs::{read_dir, read_to_string};
use std::io;

/// Nanoseconds of a clock tick in /proc: the kernel reports hundredths of a second on every architecture we run on.
const TICK_NS: f64 = 1e7;

/// What a process had used at some moment, over all its threads.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    /// CPU time in nanoseconds, user and system, io_uring's workers included: they are threads of the process.
    pub(super) cpu_ns: u64,
    /// The part of it that those workers (`iou-…`) used.
    pub(super) io_workers_ns: u64,
    /// Times a thread went to sleep.
    pub(super) switches: u64,
}

impl Usage {
    /// That of process `pid` now.
    pub(super) fn of(pid: u32) -> io::Result<Usage> {
        let mut usage = Usage { cpu_ns: cpu_ns(pid)?, ..Usage::default() };
        for thread in read_dir(format!("/proc/{pid}/task"))?.flatten() {
            // A thread may end meanwhile.
            let read = |file: &str| read_to_string(thread.path().join(file)).unwrap_or_default();
            usage.switches += field(&read("status"), "voluntary_ctxt_switches:").unwrap_or(0);
            if read("comm").starts_with("iou-") {
                usage.io_workers_ns += on_cpu_ns(&read("schedstat"));
            }
        }
        Ok(usage)
    }
}

/// The CPU time of a process to the nanosecond, where /proc/PID/stat has hundredths of a second.
pub(super) fn cpu_ns(pid: u32) -> io::Result<u64> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut clock = 0;
    // SAFETY: `clock` is ours and lives across the call, which fills it in.
    let result = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: as above for `time`.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Ok(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// What the whole machine had done at some moment; nanoseconds, over all CPUs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Machine {
    /// In processes and kernel threads.
    pub(super) busy_ns: f64,
    /// All of it: also idle, in interrupts, or taken away.
    pub(super) all_ns: f64,
    /// Taken away by the hypervisor.
    pub(super) stolen_ns: f64,
    /// Kernel workers (`kworker/…`), among them those of the loop devices. Whose work they did cannot be told.
    pub(super) kworkers_ns: f64,
    /// The threads that handle interrupts when there are many (`ksoftirqd/…`).
    pub(super) ksoftirqd_ns: f64,
    /// In such interrupts, in those threads or elsewhere.
    pub(super) softirq_ns: f64,
    /// This process: the client.
    pub(super) client_ns: f64,
}

impl Machine {
    /// Now.
    pub(super) fn now() -> io::Result<Machine> {
        let client_ns = cpu_ns(std::process::id())? as f64;
        let [kworkers_ns, ksoftirqd_ns] = threads_ns(["kworker/", "ksoftirqd/"])?;
        Ok(Machine { client_ns, kworkers_ns, ksoftirqd_ns, ..cpus() })
    }

    /// What was done since `before`.
    pub(super) fn since(self, before: Machine) -> Machine {
        Machine {
            busy_ns: self.busy_ns - before.busy_ns,
            all_ns: self.all_ns - before.all_ns,
            stolen_ns: self.stolen_ns - before.stolen_ns,
            // Workers come and go, and those that went took their time with them.
            kworkers_ns: (self.kworkers_ns - before.kworkers_ns).max(0.0),
            ksoftirqd_ns: self.ksoftirqd_ns - before.ksoftirqd_ns,
            softirq_ns: self.softirq_ns - before.softirq_ns,
            client_ns: self.client_ns - before.client_ns,
        }
    }

    /// The percentage of the machine's time that neither the client, nor a server that used `server_ns`, nor kernel workers
    /// account for, nor threads around their interrupts: other processes.
    pub(super) fn others_percent(self, server_ns: f64) -> f64 {
        // Being woken and put to sleep they are not yet, or no longer, in an interrupt: that counts as busy.
        let around_interrupts = (self.ksoftirqd_ns - self.softirq_ns).max(0.0);
        let ours = self.client_ns + self.kworkers_ns + around_interrupts + server_ns;
        percent((self.busy_ns - ours).max(0.0), self.all_ns)
    }

    /// The percentage that the hypervisor took.
    pub(super) fn stolen_percent(self) -> f64 {
        percent(self.stolen_ns, self.all_ns)
    }
}

fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole * 100.0 } else { 0.0 }
}

/// From /proc/stat: user nice system idle iowait irq softirq steal.
fn cpus() -> Machine {
    let text = read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<f64> =
        line.split_whitespace().skip(1).take(8).filter_map(|t| t.parse().ok()).collect();
    let at = |index: usize| ticks.get(index).copied().unwrap_or(0.0) * TICK_NS;
    let all: f64 = ticks.iter().sum::<f64>() * TICK_NS;
    Machine {
        busy_ns: at(0) + at(1) + at(2),
        all_ns: all,
        softirq_ns: at(6),
        stolen_ns: at(7),
        ..Machine::default()
    }
}

/// The CPU time of all kernel threads whose names begin so.
fn threads_ns<const N: usize>(names: [&str; N]) -> io::Result<[f64; N]> {
    let mut total = [0.0; N];
    for process in read_dir("/proc")?.flatten() {
        if process.file_name().to_str().is_none_or(|n| n.parse::<u32>().is_err()) {
            continue;
        }
        let read = |file| read_to_string(process.path().join(file)).unwrap_or_default();
        let comm = read("comm");
        for (name, total) in names.iter().zip(&mut total) {
            if comm.starts_with(name) {
                *total += on_cpu_ns(&read("schedstat")) as f64;
            }
        }
    }
    Ok(total)
}

/// The first number of a schedstat file.
fn on_cpu_ns(schedstat: &str) -> u64 {
    schedstat.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(0)
}

/// The memory of processes, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// Resident.
    pub(super) rss: u64,
    /// Resident, what is shared by several processes counted in parts.
    pub(super) pss: u64,
    /// The most that was ever resident.
    pub(super) peak: u64,
}

impl Memory {
    /// That of process `pid`.
    pub(super) fn of(pid: u32) -> io::Result<Memory> {
        let status = read_to_string(format!("/proc/{pid}/status"))?;
        let maps = read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let of = |text: &str, key: &str| field(text, key).unwrap_or(0);
        Ok(Memory { rss: of(&maps, "Rss:"), pss: of(&maps, "Pss:"), peak: of(&status, "VmHWM:") })
    }
}

/// Bytes of memory that processes can still have.
pub(super) fn available_bytes() -> u64 {
    meminfo("MemAvailable:")
}

/// Bytes of memory there are.
pub(super) fn memory_bytes() -> u64 {
    meminfo("MemTotal:")
}

fn meminfo(key: &str) -> u64 {
    field(&read_to_string("/proc/meminfo").unwrap_or_default(), key).unwrap_or(0) << 10
}

/// The number after `key` on the line that begins with it.
fn field(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Threads of a process.
pub(super) fn threads(pid: u32) -> io::Result<usize> {
    Ok(read_dir(format!("/proc/{pid}/task"))?.count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_cpu_and_memory() {
        let pid = std::process::id();
        let before = Usage::of(pid).unwrap();
        let mut sum = 0_u64;
        while cpu_ns(pid).unwrap() == before.cpu_ns {
            sum = sum.wrapping_add(1);
        }
        let after = Usage::of(pid).unwrap();
        assert!(after.cpu_ns > before.cpu_ns && after.switches >= before.switches);
        assert_eq!(after.io_workers_ns, 0);
        let memory = Memory::of(pid).unwrap();
        assert!(memory.rss > 0 && memory.pss <= memory.rss && memory.peak > 0);
        assert!(threads(pid).unwrap() > 0);
    }

    #[test]
    fn what_is_left_over_is_others() {
        let before = Machine::default();
        let after = Machine {
            busy_ns: 1000.0,
            all_ns: 2000.0,
            stolen_ns: 20.0,
            kworkers_ns: 200.0,
            ksoftirqd_ns: 250.0,
            softirq_ns: 150.0,
            client_ns: 300.0,
        };
        let used = after.since(before);
        assert_eq!(used.others_percent(200.0), 10.0);
        assert_eq!(used.others_percent(900.0), 0.0);
        // Interrupts on top of other threads are nobody's.
        let elsewhere = Machine { softirq_ns: 400.0, ..used };
        assert_eq!(elsewhere.others_percent(300.0), 10.0);
        assert_eq!(used.stolen_percent(), 1.0);
        let now = Machine::now().unwrap();
        assert!(now.all_ns >= now.busy_ns && now.busy_ns > 0.0);
        assert!(now.kworkers_ns > 0.0 && now.ksoftirqd_ns > 0.0);
    }
}
