// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault disk's own tests: what is flushed survives, what is not may tear, and the log tells all.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::fault_disk::{Cut, Event, FaultDisk, Loss, Operation, Piece, Platter, Rule, When};
use super::model::{BLOCK, SECTOR, stamp, stamp_of};
use super::random::Random;
use super::scope::Rig;

const BLOCKS: u64 = 256;
const SIZE: u64 = BLOCKS * BLOCK as u64;

fn disk(rig: &Rig) -> (FaultDisk, File) {
    let disk = FaultDisk::mount(SIZE, &rig.dir("disk").unwrap()).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(disk.path()).unwrap();
    (disk, file)
}

/// The version of each sector of `bytes`; zeros are version 0, and nothing but whole sectors is there.
fn sector_versions(bytes: &[u8]) -> Vec<u64> {
    let version = |bytes: &[u8]| match stamp_of(bytes) {
        Some((_, _, version)) => version,
        None => {
            assert!(bytes.iter().all(|byte| *byte == 0), "a torn sector");
            0
        }
    };
    bytes.chunks(SECTOR).map(version).collect()
}

#[test]
fn flushed_survives_and_unflushed_may_tear() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, file) = disk(&rig);
    let (mut torn, mut kept, mut lost) = (0, 0, 0);
    for round in 0..40_u64 {
        let (old, new) = (2 * round + 1, 2 * round + 2);
        for block in 0..BLOCKS {
            file.write_all_at(&stamp(block, old), block * BLOCK as u64).unwrap();
        }
        file.sync_all().unwrap();
        for block in 0..BLOCKS / 2 {
            file.write_all_at(&stamp(block, new), block * BLOCK as u64).unwrap();
        }
        disk.cut(Loss::Any, round);
        assert!(!disk.has_power());
        assert!(file.read_exact_at(&mut [0; 512], 0).is_err());
        assert!(file.write_all_at(&[0; 512], 0).is_err());
        assert!(file.sync_all().is_err());
        disk.power_on();
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for (block, bytes) in bytes.chunks(BLOCK).enumerate() {
            let versions = sector_versions(bytes);
            let news = versions.iter().filter(|version| **version == new).count();
            let olds = versions.iter().filter(|version| **version == old).count();
            assert_eq!(news + olds, versions.len(), "block {block}: {versions:?}");
            if block as u64 >= BLOCKS / 2 {
                assert_eq!(news, 0, "nobody wrote that");
            } else if news == 0 {
                lost += 1;
            } else if olds == 0 {
                kept += 1;
            } else {
                torn += 1;
            }
        }
    }
    assert!(torn > 100 && kept > 100 && lost > 100, "torn {torn}, kept {kept}, lost {lost}");
}

#[test]
fn the_newest_goes_first_where_order_is_kept() {
    let mut platter = Platter::new(BLOCK);
    for version in 1..=8 {
        let piece = Piece { offset: 0, data: stamp(0, version).into() };
        platter.apply(&Event::Write(piece));
    }
    for seed in 0..200 {
        let mut after = platter.clone();
        let survivors = after.survivors(Loss::Newest, [].iter(), &mut Random::new(seed));
        after.apply(&Event::Cut { survivors });
        let versions = sector_versions(after.bytes());
        assert!(versions.is_sorted_by(|a, b| a >= b), "{versions:?}");
        assert!(versions.first().unwrap() - versions.last().unwrap() <= 1, "{versions:?}");
        assert_eq!(after.bytes(), after.durable());
    }
}

/// Unflushed writes over one another: after a cut each sector has one of them, not only the newest.
#[test]
fn older_versions_come_back() {
    let mut platter = Platter::new(BLOCK);
    let write = |version| Event::Write(Piece { offset: 0, data: stamp(0, version).into() });
    [write(1), Event::Flush { covers: 1 }, write(2), write(3)]
        .iter()
        .for_each(|e| platter.apply(e));
    let mut seen = [0; 4];
    for seed in 0..200 {
        let mut after = platter.clone();
        let survivors = after.survivors(Loss::Any, [].iter(), &mut Random::new(seed));
        after.apply(&Event::Cut { survivors });
        for version in sector_versions(after.bytes()) {
            *seen.get_mut(usize::try_from(version).unwrap()).unwrap() += 1;
        }
    }
    let [zero, rest @ ..] = seen;
    assert!(zero == 0 && rest.iter().all(|count| *count > 0), "{seen:?}");
}

#[test]
fn the_log_replays_to_the_same_bytes() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, file) = disk(&rig);
    file.write_all_at(&stamp(9, 1), 9 * BLOCK as u64).unwrap();
    let mut platter = disk.platter();
    disk.record(1 << 30);
    let mut random = Random::new(4);
    for cut in 0..20 {
        let when = if random.one_in(2) { When::Requests(60) } else { When::Flushes(4) };
        disk.arm(Cut { when, loss: Loss::Any, seed: cut });
        let mut version = 100 * cut;
        while disk.has_power() {
            version += 1;
            let block = random.below(BLOCKS - 1);
            let bytes = [stamp(block, version), stamp(block + 1, version)].concat();
            let from = random.index(bytes.len() / SECTOR) * SECTOR;
            let at = block * BLOCK as u64 + from as u64;
            let written = file.write_all_at(bytes.get(from..).unwrap(), at);
            let flushed = if random.one_in(10) { file.sync_all() } else { Ok(()) };
            assert!(written.and(flushed).is_ok() || !disk.has_power());
        }
        disk.power_on();
    }
    let now = disk.platter();
    let log = disk.take_log();
    log.replay(&mut platter).unwrap();
    assert!(platter.bytes() == now.bytes() && platter.durable() == now.durable());
    assert_eq!(log.events().filter(|e| matches!(e, Event::Cut { .. })).count(), 20);
    let prefix: Vec<u8> = [7_u64, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert!(log.story(&prefix).iter().any(|line| line.contains("write at 28672")));

    // With less room the oldest goes, and a replay is refused rather than wrong.
    disk.record(64 << 10);
    for block in 0..100 {
        file.write_all_at(&stamp(block, 1), block * BLOCK as u64).unwrap();
    }
    let log = disk.take_log();
    assert!(log.forgotten() > 0 && log.events().count() < 20);
    assert!(log.replay(&mut platter).is_err());
}

/// A write that waits when the power goes ends in an error, and not in the next life.
#[test]
fn a_write_in_flight_dies_with_the_power() {
    let Some(rig) = Rig::enter() else { return };
    let (disk, file) = disk(&rig);
    disk.add(Rule::hold(Operation::Write).starting(b"held"));
    let (disk, file) = (Arc::new(disk), Arc::new(file));
    let held = Arc::clone(&file);
    let writer = std::thread::spawn(move || held.write_all_at(b"held", 0));
    super::wait::until("the held write", super::wait::PATIENCE, || {
        (disk.counts().in_flight > 0).then_some(())
    })
    .unwrap();
    disk.cut(Loss::Newest, 1);
    disk.power_on();
    assert!(writer.join().unwrap().is_err());
    let mut bytes = [1; 4];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 4]);
}
