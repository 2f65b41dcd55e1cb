// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bench: extentd beside qemu-storage-daemon and beside no server at all, on the same disk, with the same client.
//!
//! Subjects take turns within a round and the order turns round from one round to the next, so that a machine that is busy
//! with something else for a while spoils a round for all of them; what counts is the median of the rounds' ratios.
//!
//! | part | duty |
//! |---|---|
//! | `plan` | what is measured, and for how long |
//! | `ground`, `subject` | disks, images and servers |
//! | `workload`, `load` | which requests, and the loop that keeps them in flight |
//! | `guest`, `native` | where they go: a virtqueue, or an io_uring of the client's own |
//! | `measure`, `usage` | one run, and what it cost the server |
//! | `workers` | the kernel's own threads, held still |
//! | `sections` | what is no workload |
//! | `report`, `targets` | the figures, and what they must be |
//! | `table`, `chart`, `plots`, `page` | how people see them |

mod chart;
mod ground;
mod guest;
mod histogram;
mod interrupt;
mod load;
mod measure;
mod native;
mod page;
mod plan;
mod plots;
mod report;
mod sections;
mod stats;
mod subject;
mod table;
mod targets;
mod usage;
mod workers;
mod workload;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use self::ground::{Ground, Programs};
use self::guest::Wait;
use self::load::Timing;
use self::measure::{Outcome, Trial};
use self::plan::{Effort, Pass, Plan, Section};
use self::report::{Environment, Report, Row};
use self::subject::{Device, Subject};
use self::workers::HeldStill;
use crate::rig::command::{context, run as run_tool};
use crate::rig::program;

/// Options of `integration bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Only what has a target, and shorter: under three minutes
    #[arg(long)]
    quick: bool,
    /// Write report.json, report.md and the plots into this directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The extentd to measure [default: the workspace's, built in release]
    #[arg(long, value_name = "PROGRAM")]
    extentd: Option<PathBuf>,
    /// Another extentd, measured in the same rounds as the subject extentd-against
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,
    /// Rounds [default: 7 where there are targets, 3 elsewhere]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Seconds measured per round, workload and subject [default: 1.5 where there are targets, 1 elsewhere]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Only these subjects
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST")]
    subjects: Vec<Subject>,
    /// Only workloads and sections whose name contains one of these, for example qd32,idle; `?` lists them
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    workload: Vec<String>,
    /// Only on this kind of disk [default: most on tmpfs-loop, what has a target also on disk-loop]
    #[arg(long, value_enum)]
    device: Option<Device>,
    /// How the client waits for completions [default: event, what has a target also poll]
    #[arg(long, value_enum)]
    client: Option<Wait>,
    /// Leave the kernel's own threads where and as they are: rounds will differ more
    #[arg(long)]
    as_is: bool,
    /// Size of the image in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    size: u64,
}

/// Runs the bench; fails when a figure is not what it must be.
pub fn run(args: BenchArgs) -> ExitCode {
    if args.workload.iter().any(|name| name == "?") {
        Plan::names().iter().for_each(|name| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    match Bench::prepare(args).and_then(Bench::run) {
        Ok((line, ok)) => {
            println!("{line}");
            if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Bench {
    plan: Plan,
    programs: Programs,
    size: u64,
    out: Option<PathBuf>,
    started: Instant,
    report: Report,
}

impl Bench {
    fn prepare(args: BenchArgs) -> io::Result<Bench> {
        let plan = Plan::new(&args)?;
        interrupt::listen()?;
        HeldStill::recover()?;
        let peer = if plan.subjects.contains(&Subject::QemuStorageDaemon) {
            subject::peer_version()?
        } else {
            String::new()
        };
        let extentd = match &args.extentd {
            Some(program) => program.clone(),
            None => program::build()?,
        };
        let size = args.size << 20;
        let environment = Environment {
            kernel: run_tool("uname", &["-r"])?.trim().to_owned(),
            cpu: cpu(),
            cpus: std::thread::available_parallelism()?.get(),
            client_cpu: measure::client_cpu()?,
            kernel_threads_held_still: !args.as_is && measure::client_cpu()?.is_some(),
            memory_bytes: usage::memory_bytes(),
            qemu_storage_daemon: peer,
            extentd: version(&extentd),
            commit: commit(),
            against: args.against.as_deref().map(version),
            filesystem: "ext4",
            whole: plan.whole,
            device: plan.device.name(),
            image_bytes: size,
            rounds: plan.targets.rounds,
            seconds: plan.targets.timing.measured.as_secs_f64(),
            client: plan.wait.name(),
            load_average: [load_average(), 0.0],
            ..Environment::default()
        };
        Ok(Bench {
            plan,
            programs: Programs { extentd, against: args.against },
            size,
            out: args.out,
            started: Instant::now(),
            report: Report::new(environment),
        })
    }

    fn run(mut self) -> io::Result<(String, bool)> {
        for device in [Device::TmpfsLoop, Device::DiskLoop] {
            let passes: Vec<Pass> =
                self.plan.passes.iter().filter(|pass| pass.device == device).copied().collect();
            let sections: Vec<Section> = self
                .plan
                .sections
                .iter()
                .filter(|s| self.plan.place_of(**s) == device)
                .copied()
                .collect();
            if passes.is_empty() && sections.is_empty() {
                continue;
            }
            eprintln!("{}: making disks and images", device.name());
            let size = self.plan.image_size(device, self.size);
            let ground = Ground::make(self.programs.clone(), device, size)?;
            for (index, pass) in passes.iter().enumerate() {
                eprintln!(
                    "{} of {}: {} on {}",
                    index + 1,
                    passes.len(),
                    pass.name(&self.plan),
                    device.name()
                );
                let held = self.hold_still();
                let done = self.pass(&ground, pass);
                drop(held);
                self.survive(&pass.workload.name(), done)?;
            }
            for section in sections {
                eprintln!("{}", section.name());
                // There the peer is a kernel worker, and nobody has a CPU of his own.
                let held = (section != Section::Neighbour).then(|| self.hold_still());
                let done = self.section(&ground, section);
                drop(held);
                self.survive(section.name(), done)?;
            }
        }
        self.finish()
    }

    /// Holds the kernel's own threads still, if that is wanted and the machine lets us.
    fn hold_still(&mut self) -> Option<HeldStill> {
        let environment = &mut self.report.environment;
        if !environment.kernel_threads_held_still {
            return None;
        }
        let held = HeldStill::but_for(environment.client_cpu?);
        if let Err(error) = &held {
            eprintln!("the kernel's threads cannot be held still: {error}");
            environment.kernel_threads_held_still = false;
        }
        held.ok()
    }

    /// What went wrong with one part is said at the end, and is no reason to lose the others'; an interruption is.
    fn survive(&mut self, what: &str, done: io::Result<()>) -> io::Result<()> {
        interrupt::check()?;
        if let Err(error) = done {
            eprintln!("{what}: {error}");
            self.report.failures.push(format!("{what}: {error}"));
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<(String, bool)> {
        self.report.compare();
        self.report.note_disturbance();
        self.report.checks = targets::checks(&self.report);
        let environment = &mut self.report.environment;
        environment.load_average = [environment.load_average[0], load_average()];
        environment.minutes = self.started.elapsed().as_secs_f64() / 60.0;
        let (line, ok) = targets::verdict(&self.report);
        for table in table::tables(&self.report) {
            println!("{}", table.text());
        }
        println!("{}", table::LEGEND);
        if self.report.environment.busy() {
            println!("the machine was busy with other things: these figures are not to be quoted");
        }
        if let Some(dir) = &self.out {
            write(&self.report, &line, dir).map_err(context(dir.display()))?;
        }
        Ok((line, ok))
    }

    /// All rounds of one workload, each over all subjects.
    fn pass(&mut self, ground: &Ground, pass: &Pass) -> io::Result<()> {
        let subjects = self.plan.subjects.iter().filter(|subject| pass.workload.suits(**subject));
        let mut outcomes: Vec<(Subject, Vec<Outcome>)> =
            subjects.map(|subject| (*subject, Vec::new())).collect();
        for _ in 0..pass.effort.rounds {
            outcomes.reverse();
            for (subject, results) in &mut outcomes {
                interrupt::check()?;
                let what = || format!("{}: {}", subject.name(), pass.workload.name());
                let image = ground.image_for(pass.workload)?;
                let trial = pass.trial(*subject, &image);
                results.push(ground.measure_on(&trial).map_err(context(what()))?);
            }
        }
        outcomes.sort_by_key(|(subject, _)| *subject);
        for (subject, results) in &outcomes {
            let mut row = Row::new(*subject, pass.workload, pass.device, results);
            row.workload = pass.name(&self.plan);
            row.client = pass.wait.name();
            if subject.has_server() {
                let image = ground.image_for(pass.workload)?;
                let trial = Trial { timing: COUNTING, ..pass.trial(*subject, &image) };
                row.syscalls_per_io = ground.syscalls_per_io(&trial)?;
            }
            self.report.rows.push(row);
        }
        Ok(())
    }

    fn section(&mut self, ground: &Ground, section: Section) -> io::Result<()> {
        let (report, plan) = (&mut self.report, &self.plan);
        let servers = || plan.subjects.iter().filter(|subject| subject.has_server());
        let timing = plan.others.timing;
        match section {
            Section::Opening => {
                report.opening = Some(sections::opening(ground, if plan.quick { 9 } else { 21 })?);
            }
            Section::Idle => {
                let time = Duration::from_secs(if plan.quick { 1 } else { 2 });
                for subject in servers() {
                    report.idle.extend(sections::idle(ground, *subject, time, plan.wait)?);
                }
            }
            Section::PageCache => {
                for subject in servers() {
                    report.page_cache.extend(sections::page_cache(ground, *subject)?);
                }
            }
            Section::Extents => {
                // Of 4 GiB: a thousand extents, thirty thousand, a million.
                let pieces: &[u64] = if plan.quick { &[4096] } else { &[4 << 20, 140 << 10, 4096] };
                let Effort { rounds, timing } = plan.targets;
                report.extents = sections::extents(ground, pieces, rounds, timing, plan.wait)?;
            }
            Section::Devices => {
                let numbers: &[usize] = if plan.quick { &[1, 30] } else { &[1, 10, 100, 300] };
                let own = Subject::ExtentdDirect;
                report.devices = sections::devices(ground, own, numbers, timing)?;
                report.devices.extend(sections::devices_in_one(ground, &[300], timing)?);
                if !plan.quick && plan.subjects.contains(&Subject::QemuStorageDaemon) {
                    let peer = Subject::QemuStorageDaemon;
                    report.devices.extend(sections::devices(ground, peer, &[1, 10, 100], timing)?);
                }
            }
            Section::Neighbour => {
                let time = Duration::from_secs(if plan.quick { 2 } else { 4 });
                let rounds = plan.others.rounds;
                report.neighbour = sections::neighbour(ground, rounds, time)?;
            }
        }
        Ok(())
    }
}

/// Counting system calls needs no precision.
const COUNTING: Timing =
    Timing { warm_up: Duration::from_millis(100), measured: Duration::from_millis(300) };

/// Everything that is to be kept, into `dir`.
fn write(report: &Report, verdict: &str, dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let plots = plots::plots(report)?;
    for plot in &plots {
        std::fs::write(dir.join(plot.file), &plot.svg)?;
    }
    std::fs::write(dir.join("report.json"), report.json()?)?;
    std::fs::write(dir.join("report.md"), page::page(report, verdict, &plots))
}

fn version(program: &Path) -> String {
    run_tool(&program.to_string_lossy(), &["--version"]).unwrap_or_default().trim().to_owned()
}

/// The workspace's commit, with a `+` if it has been changed since; nothing where there is no git.
fn commit() -> String {
    let git =
        |args: &[&str]| run_tool("git", &[&["-C", env!("CARGO_MANIFEST_DIR")], args].concat());
    let head = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_default().trim().to_owned();
    let changed = git(&["status", "--porcelain", "--", ":/src", ":/integration"]);
    let changed = changed.is_ok_and(|text| !text.is_empty());
    if changed { head + "+" } else { head }
}

fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split(": ").nth(1)).unwrap_or_default().to_owned()
}
