// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `--pin-memory`: guests' data through buffers that are registered with the rings.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::time::Duration;

use integration::rig::{Bed, Layout, Random, Rig, Setup, wait};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const SOON: Duration = Duration::from_secs(20);
const SIZE: usize = 16 << 20;

/// KiB that io_uring has pinned of a process.
fn pinned_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

/// Session after session, each with memory of its own: what is written is read, by the next one too, and the host finds
/// it in the file. What is pinned goes with the session.
#[test]
fn each_session_has_its_own_memory_pinned() {
    let Some(rig) = Rig::enter() else { return };
    let setup = Setup { size: SIZE as u64, layout: Layout::Sparse, ..Setup::default() };
    let bed = Bed::make(&rig, PROGRAM, &setup, &["--pin-memory", "--threads=2"]).unwrap();
    bed.await_direct(SOON).unwrap();
    let mut random = Random::new(11);
    let mut model = vec![0; SIZE];
    for session in 0..3 {
        let mut client = bed.connect(2).unwrap();
        for round in 0..100 {
            // Odd places and lengths go through bounce buffers, which are not pinned.
            let len = 512 * (1 + random.index(64));
            let at = 512 * random.index(SIZE / 512 - 64);
            let bytes = random.bytes(len);
            client.write_at(at as u64, &bytes).unwrap();
            model[at..at + len].copy_from_slice(&bytes);
            let at = 4096 * random.index(SIZE / 4096 - 16);
            let read = client.read_at(at as u64, 65536).unwrap();
            assert!(read == model[at..at + 65536], "session {session}, round {round}");
        }
        assert!(pinned_kib(bed.daemon.pid()) > 0, "nothing is pinned");
        client.flush().unwrap();
        drop(client);
        wait::until("the session's end", SOON, || {
            (pinned_kib(bed.daemon.pid()) == 0).then_some(())
        })
        .unwrap();
    }
    let image = bed.image.clone();
    let (mut daemon, _fs) = (bed.daemon, bed.fs);
    assert!(!daemon.log().contains("not pinned"), "{}", daemon.log());
    assert!(daemon.sigterm().unwrap().success());
    assert!(fs::read(image).unwrap() == model, "the file");
}
