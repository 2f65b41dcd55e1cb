// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Many devices on one host: their memory, their threads, and what the same load costs when it is spread over all of them.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use crate::bench::ground::{Ground, fill};
use crate::bench::guest::{Guest, Wait};
use crate::bench::interrupt;
use crate::bench::load::{self, Disk, Timing};
use crate::bench::measure::on_client_thread;
use crate::bench::sections::opening::Started;
use crate::bench::subject::Subject;
use crate::bench::usage::{Memory, cpu_ns, threads};
use crate::bench::workload::{Request, Workload};
use crate::rig::command::run;
use crate::rig::scope::Sysctl;
use crate::rig::{Daemon, Random, wait};

/// How long a server of many devices may take to start.
const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of each image.
const SIZE: u64 = 1 << 20;
/// Requests in flight, over all devices together.
const LOAD: Workload = Workload::READ_32;

/// So many devices, each with a process of its own or all in one.
#[derive(Debug, Clone, Copy, Serialize)]
pub(in crate::bench) struct DevicesRow {
    /// The subject's name.
    pub(in crate::bench) subject: &'static str,
    /// Devices.
    pub(in crate::bench) devices: usize,
    /// Processes that serve them.
    pub(in crate::bench) processes: usize,
    /// Threads of all of these.
    pub(in crate::bench) threads: u64,
    /// Resident memory of all of them, with a frontend connected and a little I/O done; what they share counts once for each.
    pub(in crate::bench) rss_kib: u64,
    /// The same; what they share counts once.
    pub(in crate::bench) pss_kib: u64,
    /// 32 requests in flight in all, each to any of the devices: requests per second.
    pub(in crate::bench) iops: f64,
    /// 99 % latency of these.
    pub(in crate::bench) p99_us: f64,
    /// CPU of all the processes per request.
    pub(in crate::bench) server_cpu_us_per_io: f64,
}

/// Measures `subject` with each number of devices, a process for each device.
pub(in crate::bench) fn devices(
    ground: &Ground,
    subject: Subject,
    numbers: &[usize],
    timing: Timing,
) -> io::Result<Vec<DevicesRow>> {
    let place = Place::new(ground, subject.name())?;
    let _more = Sysctl::more_watches()?;
    let mut rows = Vec::new();
    for number in numbers {
        let mut servers = Vec::new();
        for index in 0..*number {
            interrupt::check()?;
            let (image, directory) = place.device(index)?;
            let server = ground.start_in(subject, &image, 1, &directory)?;
            servers.push(server.ok_or_else(|| io::Error::other("many devices are many servers"))?);
        }
        let pids: Vec<u32> = servers.iter().map(Daemon::pid).collect();
        let sockets: Vec<PathBuf> = servers.iter().map(|s| s.socket().to_owned()).collect();
        rows.push(measure(subject, &pids, &sockets, timing)?);
        for mut server in servers {
            server.sigterm()?;
        }
    }
    place.clear()?;
    Ok(rows)
}

/// Measures one extentd that serves each number of devices; nothing if it is one that cannot.
pub(in crate::bench) fn devices_in_one(
    ground: &Ground,
    numbers: &[usize],
    timing: Timing,
) -> io::Result<Vec<DevicesRow>> {
    if !run(&ground.program().to_string_lossy(), &["--help"])?.contains("--config") {
        eprintln!("this extentd serves one device in a process: several are not measured");
        return Ok(Vec::new());
    }
    let place = Place::new(ground, "in-one")?;
    let mut rows = Vec::new();
    for number in numbers {
        interrupt::check()?;
        let devices = (0..*number)
            .map(|index| place.device(index))
            .collect::<io::Result<Vec<(PathBuf, PathBuf)>>>()?;
        let sockets: Vec<PathBuf> = devices.iter().map(|(_, d)| d.join("blk.sock")).collect();
        let config = place.sockets.join("config.toml");
        let texts = devices.iter().zip(&sockets).map(|((image, _), socket)| {
            format!("[[device]]\nblk-file = {image:?}\nsocket-path = {socket:?}\n")
        });
        std::fs::write(&config, texts.collect::<String>())?;
        let log = place.sockets.join("server.log");
        let mut command = Command::new(ground.program());
        command.arg("--config").arg(&config).stderr(File::create(&log)?);
        let mut server = Started::new(&mut command)?;
        let ready = wait::until("the sockets", LIMIT, || match server.has_ended() {
            Ok(false) => sockets.iter().all(|socket| socket.exists()).then_some(Ok(())),
            _ => Some(Err(io::Error::other("it has ended"))),
        });
        ready.and_then(|ended| ended).map_err(|error| {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            io::Error::other(format!("extentd --config: {error}: {}", said.trim()))
        })?;
        rows.push(measure(Subject::ExtentdDirect, &[server.pid()], &sockets, timing)?);
        server.end()?;
    }
    place.clear()?;
    Ok(rows)
}

/// Where the images and the sockets are.
struct Place {
    images: PathBuf,
    sockets: PathBuf,
}

impl Place {
    fn new(ground: &Ground, name: &str) -> io::Result<Place> {
        let images = ground.filesystem().path().join(format!("devices-{name}"));
        std::fs::create_dir(&images)?;
        Ok(Place { images, sockets: ground.rig().dir(&format!("sockets-{name}"))? })
    }

    /// The image of a device, and the directory for its socket.
    fn device(&self, index: usize) -> io::Result<(PathBuf, PathBuf)> {
        let image = self.images.join(index.to_string());
        if !image.exists() {
            fill(&image, true, SIZE)?;
        }
        let directory = self.sockets.join(index.to_string());
        std::fs::create_dir_all(&directory)?;
        Ok((image, directory))
    }

    fn clear(self) -> io::Result<()> {
        std::fs::remove_dir_all(self.images)
    }
}

fn measure(
    subject: Subject,
    pids: &[u32],
    sockets: &[PathBuf],
    timing: Timing,
) -> io::Result<DevicesRow> {
    let mut used = Vec::new();
    let mut fleet = on_client_thread(|| Fleet::connect(sockets))?;
    let sample = on_client_thread(|| {
        load::run(&mut fleet, LOAD, timing, SIZE, || {
            used.push(total(pids, cpu_ns)?);
            Ok(())
        })
    })?;
    let cpu = match used.as_slice() {
        [start, end] => end.saturating_sub(*start) as f64,
        _ => 0.0,
    };
    let memory = |of: fn(Memory) -> u64| total(pids, |pid| Memory::of(pid).map(of));
    Ok(DevicesRow {
        subject: subject.name(),
        devices: sockets.len(),
        processes: pids.len(),
        threads: total(pids, |pid| Ok(threads(pid)? as u64))?,
        rss_kib: memory(|m| m.rss)?,
        pss_kib: memory(|m| m.pss)?,
        iops: sample.iops(),
        p99_us: sample.latencies.quantile_us(0.99),
        server_cpu_us_per_io: cpu / 1000.0 / sample.requests().max(1) as f64,
    })
}

fn total(pids: &[u32], of: impl Fn(u32) -> io::Result<u64>) -> io::Result<u64> {
    pids.iter().map(|pid| of(*pid)).sum()
}

/// All the guests, as one disk: each request goes to any of them.
struct Fleet {
    guests: Vec<Guest>,
    /// Requests in flight at each.
    busy: Vec<u16>,
    /// Those with any, so that the others need not be looked at.
    active: Vec<usize>,
    random: Random,
    done: Vec<u16>,
}

impl Fleet {
    fn connect(sockets: &[PathBuf]) -> io::Result<Fleet> {
        let connect = |socket: &PathBuf| Guest::connect(socket, LOAD, Wait::Poll);
        let mut guests = sockets.iter().map(connect).collect::<io::Result<Vec<Guest>>>()?;
        for guest in &mut guests {
            load::transfer(guest, Workload::READ_1, SIZE, 8)?;
        }
        let busy = vec![0; guests.len()];
        Ok(Fleet { guests, busy, active: Vec::new(), random: Random::new(3), done: Vec::new() })
    }
}

impl Disk for Fleet {
    fn queue(&mut self, slot: u16, request: Request) -> io::Result<()> {
        let index = self.random.index(self.guests.len());
        let (Some(guest), Some(busy)) = (self.guests.get_mut(index), self.busy.get_mut(index))
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if *busy == 0 {
            self.active.push(index);
        }
        *busy += 1;
        guest.queue(slot, request)
    }

    fn submit(&mut self) -> io::Result<()> {
        for index in &self.active {
            self.guests.get_mut(*index).map_or(Ok(()), Disk::submit)?;
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<u16>) -> io::Result<()> {
        let mut position = 0;
        while let Some(index) = self.active.get(position).copied() {
            let (Some(guest), Some(busy)) = (self.guests.get_mut(index), self.busy.get_mut(index))
            else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            guest.reap(&mut self.done)?;
            *busy = busy.saturating_sub(u16::try_from(self.done.len()).unwrap_or(u16::MAX));
            done.append(&mut self.done);
            if *busy == 0 {
                self.active.swap_remove(position);
            } else {
                position += 1;
            }
        }
        Ok(())
    }
}
