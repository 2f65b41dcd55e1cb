// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page cache of the device under the host's filesystem: what it keeps of a block's former life must never come back.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use extentd::sys::fiemap::Fiemap;
use integration::rig::model::Model;
use integration::rig::wait::PATIENCE;
use integration::rig::{Bed, Kind, Random, Rig, Setup};
use rustix::fs::{Advice, fadvise};
use rustix::thread::{CpuSet, sched_setaffinity};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
/// Directories: each has a block of its own.
const DIRECTORIES: usize = 8;

/// The extents of an open file or directory: where in it, where on the device, and how long.
fn extents(file: &File) -> Vec<(u64, u64, u64)> {
    let mut fiemap = Fiemap::new();
    let (mut all, mut start) = (Vec::new(), 0);
    loop {
        let answer = fiemap.query(file.as_fd(), start, u64::MAX - start, 256).unwrap();
        all.extend(answer.extents.iter().map(|e| (e.logical, e.physical, e.length)));
        match all.last() {
            Some((logical, _, length)) if !answer.complete => start = logical + length,
            _ => return all,
        }
    }
}

/// This thread goes on on processor `cpu`, if there is one.
fn go_on_on(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    // A machine with one processor finds less, and nothing that is wrong.
    let _ = sched_setaffinity(None, &set);
}

/// Makes and removes directories; where their blocks were. The kernel keeps a few of the buffers that a processor has used
/// last, so nothing drops these from the device's page cache while the others work.
fn former_metadata(fs: &Path) -> Vec<u64> {
    let names: Vec<_> = (0..DIRECTORIES).map(|n| fs.join(format!("directory{n}"))).collect();
    go_on_on(1);
    for name in &names {
        std::fs::create_dir(name).unwrap();
        File::create(name.join("file")).unwrap();
    }
    rustix::fs::syncfs(File::open(fs).unwrap()).unwrap();
    let first = |name| extents(&File::open(name).unwrap()).first().unwrap().1;
    let places = names.iter().map(first).collect();
    for name in &names {
        assert!(!name.join("other").exists());
    }
    go_on_on(0);
    names.iter().for_each(|name| std::fs::remove_dir_all(name).unwrap());
    rustix::fs::syncfs(File::open(fs).unwrap()).unwrap();
    places
}

/// A file of all the space there is; its bytes.
fn fill(path: &Path) -> Vec<u8> {
    let file = File::create_new(path).unwrap();
    let space = rustix::fs::fstatvfs(&file).unwrap();
    // Some is left for what the filesystem has to note.
    let bytes =
        Random::new(4).bytes(usize::try_from((space.f_bavail - 64) * space.f_bsize).unwrap());
    file.write_all_at(&bytes, 0).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    bytes
}

/// Sectors are written raw in blocks that were metadata a moment ago.
#[test]
fn what_a_block_was_before_does_not_come_back() {
    for kind in [Kind::Ext4, Kind::Ext4Small] {
        let Some(rig) = Rig::enter() else { return };
        let mut bed = Bed::make(&rig, PROGRAM, &Setup { kind, ..Setup::default() }, &[]).unwrap();
        assert!(bed.daemon.sigterm().unwrap().success());
        let places = former_metadata(bed.fs.path());
        bed.image = bed.fs.path().join("all");
        bed.model = Model::new(fill(&bed.image));
        bed.restart(&[]).unwrap();
        bed.await_direct(PATIENCE).unwrap();
        let mut client = bed.connect(1).unwrap();
        let map = extents(&File::open(&bed.image).unwrap());
        bed.await_direct(PATIENCE).unwrap();
        let mut met = 0;
        for place in places {
            let within = |(_, at, len): &&(u64, u64, u64)| (*at..at + len).contains(&place);
            let Some((logical, physical, _)) = map.iter().find(within) else { continue };
            let offset = logical + (place - physical) + 512;
            let data = Random::new(offset).bytes(512);
            client.write_at(offset, &data).unwrap();
            bed.model.write(offset, &data).unwrap();
            met += 1;
        }
        assert!(met > 0, "no block of the image was a directory's");
        bed.check_guest(&mut client).unwrap();
        drop(client);
        bed.finish().unwrap();
    }
}
