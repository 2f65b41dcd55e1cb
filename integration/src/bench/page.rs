// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `report.md`: the whole report as a page, with its plots.

use std::fmt::Write as _;

use super::plots::Plot;
use super::report::{Environment, Report};
use super::table::{LEGEND, tables};

/// The page.
pub(super) fn page(report: &Report, verdict: &str, plots: &[Plot]) -> String {
    let mut text = String::from(
        "# Report of the bench\n\n\
         Written by `integration bench --out`, not by hand. [How to read it](../performance.md).\n\n",
    );
    if report.environment.busy() {
        text.push_str(
            "**The machine was busy with other things meanwhile: these figures are not to be quoted.**\n\n",
        );
    }
    text.push_str(&environment(&report.environment));
    // Writing into a string cannot fail.
    let _ = writeln!(text, "\nVerdict: `{verdict}`");
    let legend = LEGEND.lines().map(|line| format!("> {line}\n")).collect::<String>();
    let _ = write!(text, "\n{legend}");
    for table in tables(report) {
        let _ = write!(text, "\n## {}\n\n{}", table.title(), table.markdown());
        for plot in plots.iter().filter(|plot| plot.belongs_to == table.title()) {
            let _ = write!(text, "\n![{}]({})\n", plot.title, plot.file);
        }
    }
    text
}

fn environment(environment: &Environment) -> String {
    let mut text = String::from("| | |\n|---|---|\n");
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "| {name} | {value} |");
    };
    let cpus = format!("{} × {}", environment.cpus, environment.cpu);
    line("processor", cpus);
    line("memory", format!("{} GiB", environment.memory_bytes >> 30));
    line("kernel", environment.kernel.clone());
    line("extentd", environment.extentd.clone());
    line("bench", format!("commit {}", environment.commit));
    if let Some(against) = &environment.against {
        line("compared with", against.clone());
    }
    line("qemu-storage-daemon", environment.qemu_storage_daemon.clone());
    let image = environment.image_bytes >> 20;
    line("image", format!("{image} MiB on {}, {}", environment.filesystem, environment.device));
    let mut client = format!("`{}`, one thread", environment.client);
    if let Some(cpu) = environment.client_cpu {
        let _ = write!(client, " on CPU {cpu}");
    }
    if environment.kernel_threads_held_still {
        client.push_str(", unbound kernel workers elsewhere, ksoftirqd as `SCHED_BATCH`");
    }
    line("client", client);
    let rounds = format!("{} of {} s", environment.rounds, environment.seconds);
    line("rounds where there are targets", rounds);
    let [before, after] = environment.load_average;
    line("load average before and after", format!("{before:.2}, {after:.2}"));
    line("CPU time of others, median", format!("{:.1} %", environment.others_percent));
    line("CPU time the hypervisor took", format!("{:.1} %", environment.stolen_percent));
    line("all of it took", format!("{:.1} minutes", environment.minutes));
    text
}
