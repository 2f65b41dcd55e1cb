// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bench measures what it says it does. What comes out of it is not judged here: that takes a machine of one's own.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use clap::Parser;
use integration::bench::{BenchArgs, run};
use integration::rig::Rig;
use serde_json::Value;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: BenchArgs,
}

/// Runs it on small images and for moments only; its report.
fn bench(out: &Path, options: &str) -> Value {
    let program = env!("CARGO_BIN_EXE_extentd");
    let short = format!("bench --quick --size 32 --rounds 1 --seconds 0.05 --extentd {program}");
    let words = short.split_whitespace().chain(options.split_whitespace());
    let out_option = ["--out", out.to_str().unwrap()];
    let cli = Cli::try_parse_from(words.chain(out_option)).unwrap();
    // Its verdict is about figures that are nothing to go by here.
    let _ = run(cli.args);
    let text = std::fs::read_to_string(out.join("report.json")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    assert!(rows(&report, "failures").is_empty(), "{report}");
    report
}

fn rows<'a>(report: &'a Value, list: &str) -> &'a [Value] {
    report[list].as_array().map(Vec::as_slice).unwrap_or_default()
}

#[test]
fn every_kind_of_workload_is_measured_on_every_kind_of_subject() {
    let Some(_rig) = Rig::enter() else { return };
    let out = tempfile::tempdir().unwrap();
    let names = [
        "randread-4k-qd32-q4",
        "randrw-4k-qd4-q1",
        "seqwrite-1m-qd4-q1",
        "randwrite-4k-qd32-q1-flush8",
        "fill-4k-qd32-q1",
        "randwrite-512-qd32-q1",
        "discard-64k-qd8-q1",
    ];
    let program = env!("CARGO_BIN_EXE_extentd");
    let subjects = "extentd-direct,extentd-filesystem,native-device,native-file";
    let options =
        format!("--subjects {subjects} --against {program} --workload {}", names.join(","));
    let report = bench(out.path(), &options);
    for name in names {
        let of_name = || rows(&report, "rows").iter().filter(|row| row["workload"] == name);
        let spoils = name.starts_with("fill") || name.starts_with("discard");
        let servers_only = name.contains("-512-");
        let subjects = 5 - usize::from(spoils) - 2 * usize::from(servers_only);
        assert_eq!(of_name().count(), subjects, "{name}");
        for row in of_name() {
            assert!(row["iops"].as_f64().unwrap() > 0.0, "{row}");
            let server = row["subject"].as_str().unwrap().starts_with("extentd");
            assert_eq!(row["server_cpu_us_per_io"].is_number(), server, "{row}");
            assert_eq!(row["flush_p50_us"].is_number(), name.contains("flush"), "{row}");
            if row["subject"] == "extentd-direct" {
                assert!(row["ratio_to_against"].is_number());
                assert_eq!(row["ratio_to_native"].is_number(), !servers_only);
                assert!(spoils || row["direct_share"] == 1.0, "{row}");
            }
        }
    }
    assert!(out.path().join("report.md").exists());
}

#[test]
fn every_section_is_measured() {
    let Some(_rig) = Rig::enter() else { return };
    let out = tempfile::tempdir().unwrap();
    let sections = "opening,idle,page-cache,extents,devices,neighbour";
    let report = bench(out.path(), &format!("--subjects extentd-direct --workload {sections}"));
    assert!(rows(&report, "rows").is_empty());
    assert!(report["opening"]["ratio"].as_f64().unwrap() > 0.0);
    assert_eq!(rows(&report, "idle")[0]["subject"], "extentd-direct");
    assert_eq!(rows(&report, "page_cache")[0]["image_kib"], 0);
    // 128 MiB in pieces of 4 KiB, of which some lie next to each other.
    let extents = rows(&report, "extents")[1]["extents"].as_u64().unwrap();
    assert!((30_000..=33_000).contains(&extents), "{extents}");
    let devices = rows(&report, "devices");
    assert!(devices[1]["devices"] == 30 && devices[1]["iops"].as_f64().unwrap() > 0.0);
    let beside = rows(&report, "neighbour");
    let names: Vec<&str> = beside.iter().filter_map(|row| row["beside"].as_str()).collect();
    assert_eq!(names, ["alone", "extentd-direct", "kernel-loop-buffered"]);
    assert!(beside.iter().all(|row| row["p99_us"].as_f64().unwrap() > 0.0));
    for plot in ["extents.svg", "devices-memory.svg", "neighbour.svg"] {
        assert!(out.path().join(plot).exists(), "{plot}");
    }
}
