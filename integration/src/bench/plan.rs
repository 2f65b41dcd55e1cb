// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is measured, in which order and for how long.

use std::io;
use std::time::Duration;

use clap::ValueEnum;

use super::BenchArgs;
use super::ground::Image;
use super::guest::Wait;
use super::load::Timing;
use super::measure::Trial;
use super::subject::{Device, Subject};
use super::workload::Workload;

/// The image on a disk-loop: large enough to be no matter for any cache, small enough to be written quickly.
const DISK_IMAGE: u64 = 512 << 20;
const DISK_IMAGE_QUICK: u64 = 128 << 20;

/// How much is put into a workload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// Rounds, each over all subjects.
    pub(super) rounds: usize,
    /// How long each subject runs in a round.
    pub(super) timing: Timing,
}

impl Effort {
    fn new(rounds: usize, seconds: f64) -> io::Result<Effort> {
        let measured = match Duration::try_from_secs_f64(seconds) {
            Ok(time) if !time.is_zero() && rounds > 0 => time,
            _ => return Err(io::Error::other("--seconds and --rounds must be more than 0")),
        };
        Ok(Effort { rounds, timing: Timing { warm_up: measured.mul_f64(0.2), measured } })
    }
}

/// All rounds of one workload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass {
    /// Which.
    pub(super) workload: Workload,
    /// Where.
    pub(super) device: Device,
    /// How the client waits.
    pub(super) wait: Wait,
    /// How much is put into it.
    pub(super) effort: Effort,
}

impl Pass {
    /// Its name in the report.
    pub(super) fn name(&self, plan: &Plan) -> String {
        let name = self.workload.name();
        if self.wait == plan.wait { name } else { format!("{name}-{}", self.wait.name()) }
    }

    /// One run of it.
    pub(super) fn trial<'a>(&self, subject: Subject, image: &'a Image) -> Trial<'a> {
        Trial {
            subject,
            image,
            workload: self.workload,
            timing: self.effort.timing,
            wait: self.wait,
        }
    }
}

/// What is no workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    /// How long it takes until an image is served.
    Opening,
    /// Servers whose guest does nothing.
    Idle,
    /// What is left in the host's page cache.
    PageCache,
    /// Images in pieces.
    Extents,
    /// Many devices.
    Devices,
    /// Somebody else on the same disk.
    Neighbour,
}

impl Section {
    const ALL: [Section; 6] = [
        Section::Opening,
        Section::Idle,
        Section::PageCache,
        Section::Extents,
        Section::Devices,
        Section::Neighbour,
    ];

    /// Its name for `--workload`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Section::Opening => "opening",
            Section::Idle => "idle",
            Section::PageCache => "page-cache",
            Section::Extents => "extents",
            Section::Devices => "devices",
            Section::Neighbour => "neighbour",
        }
    }
}

/// All of it.
#[derive(Debug)]
pub(super) struct Plan {
    /// Less of everything.
    pub(super) quick: bool,
    /// Everything that has a target is measured.
    pub(super) whole: bool,
    /// What is compared.
    pub(super) subjects: Vec<Subject>,
    /// The kind of disk that the targets are about.
    pub(super) device: Device,
    /// How the client usually waits.
    pub(super) wait: Wait,
    /// How much is put into workloads with targets.
    pub(super) targets: Effort,
    /// How much into the others, and into sections.
    pub(super) others: Effort,
    /// The workloads.
    pub(super) passes: Vec<Pass>,
    /// The sections.
    pub(super) sections: Vec<Section>,
}

impl Plan {
    /// What `args` ask for.
    pub(super) fn new(args: &BenchArgs) -> io::Result<Plan> {
        let quick = args.quick;
        let subjects = Subject::value_variants().iter().copied();
        let wanted = |subject: &Subject| match subject {
            // Naming the program is asking for it.
            Subject::ExtentdAgainst => args.against.is_some(),
            _ => args.subjects.is_empty() || args.subjects.contains(subject),
        };
        let (rounds, seconds) = (args.rounds, args.seconds);
        let mut plan = Plan {
            quick,
            whole: args.subjects.is_empty() && args.workload.is_empty() && args.device.is_none(),
            subjects: subjects.filter(wanted).collect(),
            device: args.device.unwrap_or(Device::TmpfsLoop),
            wait: args.client.unwrap_or(Wait::Event),
            targets: Effort::new(
                rounds.unwrap_or(if quick { 5 } else { 7 }),
                seconds.unwrap_or(if quick { 0.5 } else { 1.5 }),
            )?,
            others: Effort::new(
                rounds.unwrap_or(if quick { 2 } else { 3 }),
                seconds.unwrap_or(if quick { 0.5 } else { 1.0 }),
            )?,
            passes: Vec::new(),
            sections: Section::ALL.into(),
        };
        plan.add_passes(args);
        plan.keep(&args.workload)?;
        if !plan.subjects.contains(&Subject::ExtentdDirect) {
            // The others are about the peers as well.
            plan.sections.retain(|s| matches!(s, Section::Idle | Section::PageCache));
        }
        Ok(plan)
    }

    fn add_passes(&mut self, args: &BenchArgs) {
        let pass = |workload, device, wait, effort| Pass { workload, device, wait, effort };
        let (device, wait, targets, others) = (self.device, self.wait, self.targets, self.others);
        let mut passes = Vec::new();
        for workload in Workload::TARGETS {
            passes.push(pass(workload, device, wait, targets));
            if !self.quick && args.client.is_none() {
                passes.push(pass(workload, device, wait.other(), others));
            }
        }
        if self.quick && args.workload.is_empty() {
            passes.push(pass(Workload::FILL, device, wait, others));
        } else {
            passes.extend(Workload::OTHERS.map(|w| pass(w, device, wait, others)));
        }
        if !self.quick && args.device.is_none() {
            passes.extend(Workload::TARGETS.map(|w| pass(w, Device::DiskLoop, wait, others)));
        }
        self.passes = passes;
    }

    /// Keeps only what `names` name, if they name anything.
    fn keep(&mut self, names: &[String]) -> io::Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let named = |name: &str| names.iter().any(|n| !n.is_empty() && name.contains(n.as_str()));
        // What is measured in more than one way is measured in the usual way, unless the other one is named.
        let usual = |pass: &&Pass| {
            let other = names.iter().any(|name| name.contains(self.wait.other().name()));
            pass.device == self.device && (pass.wait == self.wait || other)
        };
        let chosen = self.passes.iter().filter(|pass| usual(pass) && named(&pass.name(self)));
        self.passes = chosen.copied().collect();
        self.sections.retain(|section| named(section.name()));
        if self.passes.is_empty() && self.sections.is_empty() {
            return Err(io::Error::other(format!("there are: {}", Plan::names().join(", "))));
        }
        Ok(())
    }

    /// Names of all workloads and sections.
    pub(super) fn names() -> Vec<String> {
        let workloads = Workload::TARGETS.into_iter().chain(Workload::OTHERS).map(Workload::name);
        workloads.chain(Section::ALL.map(|section| section.name().to_owned())).collect()
    }

    /// Where a section takes place: a neighbour is disturbed only on a disk that takes its time.
    pub(super) fn place_of(&self, section: Section) -> Device {
        if section == Section::Neighbour { Device::DiskLoop } else { self.device }
    }

    /// The size of the image on `device`, of which `size` is wanted.
    pub(super) fn image_size(&self, device: Device, size: u64) -> u64 {
        match device {
            Device::TmpfsLoop => size,
            Device::DiskLoop => size.min(if self.quick { DISK_IMAGE_QUICK } else { DISK_IMAGE }),
        }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod plan_tests;
