// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bench: extentd beside qemu-storage-daemon and beside no server at all, on the same disk, with the same client.
//!
//! Subjects take turns within a round and the order turns round from one round to the next, so that a machine that is busy
//! with something else for a while spoils a round for all of them; what counts is the median of the rounds' ratios.

mod guest;
mod histogram;
mod load;
mod native;
mod opening;
mod report;
mod stats;
mod subject;
mod syscalls;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use self::guest::Wait;
use self::load::{Timing, Workload};
use self::report::{Environment, IdleRow, Report, Row};
use self::subject::{Bed, Device, Outcome, Subject};
use crate::rig::command::{context, run as run_tool};
use crate::rig::program;

/// Options of `integration bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Three rounds of one second instead of five of two
    #[arg(long)]
    quick: bool,
    /// Write report.json into this directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The extentd to measure [default: the workspace's, built in release]
    #[arg(long, value_name = "PROGRAM")]
    extentd: Option<PathBuf>,
    /// Another extentd, measured in the same rounds as the subject extentd-against
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,
    /// Rounds
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Seconds measured per round, workload and subject
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Only these subjects
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST")]
    subjects: Vec<Subject>,
    /// Only workloads whose name contains this, for example qd32
    #[arg(long, value_name = "TEXT", default_value = "")]
    workload: String,
    /// What the disk is made of
    #[arg(long, value_enum, default_value = "tmpfs-loop")]
    device: Device,
    /// How the client waits for completions
    #[arg(long, value_enum, default_value = "poll")]
    client: Wait,
    /// Size of the image in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    size: u64,
}

/// Runs the bench; fails when a figure is not what it must be.
pub fn run(args: BenchArgs) -> ExitCode {
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
    args: BenchArgs,
    bed: Bed,
    subjects: Vec<Subject>,
    workloads: Vec<Workload>,
    rounds: usize,
    timing: Timing,
    report: Report,
}

impl Bench {
    fn prepare(args: BenchArgs) -> io::Result<Bench> {
        let all = <Subject as clap::ValueEnum>::value_variants();
        let wanted = |subject: &&Subject| match subject {
            // Naming the program is asking for it.
            Subject::ExtentdAgainst => args.against.is_some(),
            _ => args.subjects.is_empty() || args.subjects.contains(subject),
        };
        let subjects: Vec<Subject> = all.iter().filter(wanted).copied().collect();
        let workloads: Vec<Workload> =
            Workload::ALL.into_iter().filter(|w| w.name().contains(&args.workload)).collect();
        if workloads.is_empty() {
            let names: Vec<String> = Workload::ALL.iter().map(|w| w.name()).collect();
            return Err(io::Error::other(format!("the workloads are {}", names.join(", "))));
        }
        let peer = if subjects.contains(&Subject::QemuStorageDaemon) {
            subject::peer_version()?
        } else {
            String::new()
        };
        let rounds = args.rounds.unwrap_or(if args.quick { 3 } else { 5 });
        let measured = positive(args.seconds.unwrap_or(if args.quick { 1.0 } else { 2.0 }))?;
        let program = match &args.extentd {
            Some(program) => program.clone(),
            None => program::build()?,
        };
        let size = args.size << 20;
        let bed = Bed::make(&program, args.against.as_deref(), args.device, size)?;
        let environment = Environment {
            kernel: run_tool("uname", &["-r"])?.trim().to_owned(),
            cpu: cpu(),
            cpus: std::thread::available_parallelism()?.get(),
            qemu_storage_daemon: peer,
            extentd: version(&program),
            against: args.against.as_deref().map(version),
            image_bytes: size,
            rounds,
            seconds: measured.as_secs_f64(),
            client: format!("{:?}", args.client).to_lowercase(),
            load_average: [load_average(), 0.0],
        };
        let timing = Timing { warm_up: measured.mul_f64(0.2), measured };
        let report = Report::new(environment);
        Ok(Bench { args, bed, subjects, workloads, rounds, timing, report })
    }

    fn run(mut self) -> io::Result<(String, bool)> {
        for workload in self.workloads.clone() {
            self.workload(workload)?;
        }
        self.report.compare();
        if self.subjects.contains(&Subject::ExtentdDirect) {
            let repeats = if self.args.quick { 9 } else { 21 };
            self.report.opening = Some(opening::opening(&self.bed, repeats)?.into());
        }
        for subject in self.subjects.clone() {
            let time = Duration::from_secs(2);
            if let Some(idle) = opening::idle(&self.bed, subject, time, self.args.client)? {
                self.report.idle.push(IdleRow::new(subject, idle));
            }
        }
        self.report.judge();
        let [before, _] = self.report.environment.load_average;
        self.report.environment.load_average = [before, load_average()];
        print!("{}", self.report.table());
        if let Some(dir) = &self.args.out {
            self.report.write(dir).map_err(context(dir.display()))?;
        }
        let whole = self.args.subjects.is_empty() && self.args.workload.is_empty();
        Ok(self.report.verdict(whole))
    }

    /// All rounds of one workload, each over all subjects.
    fn workload(&mut self, workload: Workload) -> io::Result<()> {
        let mut outcomes: Vec<(Subject, Vec<Outcome>)> =
            self.subjects.iter().map(|subject| (*subject, Vec::new())).collect();
        for round in 0..self.rounds {
            eprintln!("{}: round {} of {}", workload.name(), round + 1, self.rounds);
            outcomes.reverse();
            for (subject, results) in &mut outcomes {
                let result = self.bed.measure(*subject, workload, self.timing, self.args.client);
                results.push(result.map_err(context(format!(
                    "{}: {}",
                    subject.name(),
                    workload.name()
                )))?);
            }
        }
        outcomes.sort_by_key(|(subject, _)| *subject);
        let short =
            Timing { warm_up: Duration::from_millis(100), measured: Duration::from_millis(400) };
        for (subject, results) in &outcomes {
            let mut row = Row::new(*subject, workload, self.args.device.name(), results);
            row.syscalls_per_io =
                self.bed.syscalls_per_io(*subject, workload, short, self.args.client)?;
            self.report.rows.push(row);
        }
        Ok(())
    }
}

fn version(program: &Path) -> String {
    run_tool(&program.to_string_lossy(), &["--version"]).unwrap_or_default().trim().to_owned()
}

fn positive(seconds: f64) -> io::Result<Duration> {
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(io::Error::other("--seconds must be more than 0")),
    }
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
