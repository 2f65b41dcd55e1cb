// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The extent map of images with many extents: loaded whole (`--populate all`), or as needed and within its cap.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use integration::rig::model::Model;
use integration::rig::wait;
use integration::rig::{
    Backing, Client, ClientOptions, Daemon, Filesystem, Kind, Mount, Random, Rig,
};
use rustix::fs::{FallocateFlags, fallocate};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 12_000;
const SOON: Duration = Duration::from_secs(20);

/// A filesystem with an image whose every block is an extent: they are written and unwritten in turns.
struct Place {
    image: PathBuf,
    model: Model,
    run: PathBuf,
    _fs: Filesystem,
    rig: Rig,
}

impl Place {
    fn make() -> Option<Self> {
        let rig = Rig::enter()?;
        let fs = rig.dir("fs").unwrap();
        let fs = Filesystem::make(Kind::Ext4, 128 << 20, 512, &Backing::Memory, &fs).unwrap();
        let image = fs.path().join("image");
        let file = OpenOptions::new().write(true).create_new(true).open(&image).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, BLOCKS * BLOCK).unwrap();
        let mut bytes = vec![0; usize::try_from(BLOCKS * BLOCK).unwrap()];
        let mut random = Random::new(5);
        for (number, block) in bytes.chunks_mut(4096).enumerate().step_by(2) {
            random.fill(block);
            file.write_all_at(block, number as u64 * BLOCK).unwrap();
        }
        file.sync_all().unwrap();
        let run = rig.dir("run").unwrap();
        Some(Self { image, model: Model::new(bytes), run, _fs: fs, rig })
    }

    fn start(&self, options: &[&str]) -> std::io::Result<Daemon> {
        Daemon::start(Path::new(PROGRAM), &self.run, &self.image, options)
    }

    /// Reads and writes all over the disk, and compares.
    fn use_it(&mut self, client: &mut Client, seed: u64) {
        let mut random = Random::new(seed);
        for _ in 0..300 {
            let at = random.below(BLOCKS - 8) * BLOCK;
            let len = 4096 * (1 + random.index(8));
            if random.one_in(3) {
                let data = random.bytes(len);
                client.write_at(at, &data).unwrap();
                self.model.write(at, &data).unwrap();
            } else {
                self.model.check(at, &client.read_at(at, len).unwrap()).unwrap();
            }
        }
    }

    fn check_all(&self, client: &mut Client) {
        for (index, want) in self.model.bytes().chunks(256 << 10).enumerate() {
            let at = index as u64 * (256 << 10);
            self.model.check(at, &client.read_at(at, want.len()).unwrap()).unwrap();
        }
    }
}

fn connect(daemon: &Daemon) -> Client {
    Client::connect(daemon.socket(), &ClientOptions::default()).unwrap()
}

#[test]
fn populate_all_has_the_whole_map_before_it_listens_and_keeps_it() {
    let Some(mut place) = Place::make() else { return };
    let mut daemon = place.start(&["--populate=all", "--mode=direct"]).unwrap();
    let status = daemon.status().unwrap();
    assert_eq!(status.number("extents/cached"), BLOCKS);
    let line = "the whole extent map is loaded";
    wait::until("the line", SOON, || daemon.log().contains(line).then_some(())).unwrap();
    let loads = status.number("extents/fiemap_calls");
    assert!(loads <= BLOCKS / 512 + 2, "{loads} FIEMAPs");

    let mut client = connect(&daemon);
    place.check_all(&mut client);
    let status = daemon.status().unwrap();
    assert_eq!(status.number("extents/fiemap_calls"), loads, "nothing is left to ask for");

    // Somebody reads the image, and the map goes; it comes back without being asked for.
    drop(File::open(&place.image).unwrap());
    let whole = |status: &integration::rig::Status| {
        status.direct() && status.number("extents/cached") == BLOCKS
    };
    let status = daemon.await_status("the map's return", SOON, whole).unwrap();
    assert_eq!(status.number("lease_breaks"), 1);
    place.use_it(&mut client, 1);
    assert_eq!(daemon.status().unwrap().number("extents/evictions"), 0);
    place.check_all(&mut client);
    drop(client);
    assert!(daemon.sigterm().unwrap().success());
    place.model.check(0, &std::fs::read(&place.image).unwrap()).unwrap();
}

#[test]
fn populate_all_refuses_over_the_cap_and_says_by_how_much() {
    let Some(place) = Place::make() else { return };
    let error = place.start(&["--populate=all", "--max-extents=11999"]).unwrap_err().to_string();
    let said = "--populate all: the image has 12000 extents, more than --max-extents 11999: raise that to 12000 or more";
    assert!(error.contains(said), "{error}");
    assert!(!error.contains("mode="), "one line: {error}");
    let daemon = place.start(&["--populate=all", "--max-extents=12000"]).unwrap();
    assert_eq!(daemon.status().unwrap().number("extents/cached"), BLOCKS);
}

/// A map that outgrows its cap while it is served is no reason to end.
#[test]
fn a_map_that_outgrows_its_cap_is_no_longer_kept_whole() {
    let Some(rig) = Rig::enter() else { return };
    let fs = rig.dir("fs").unwrap();
    let fs = Filesystem::make(Kind::Ext4, 128 << 20, 512, &Backing::Memory, &fs).unwrap();
    let image = fs.path().join("image");
    File::create_new(&image).unwrap().set_len(64 << 20).unwrap();
    let run = rig.dir("run").unwrap();
    let options = ["--populate=all", "--max-extents=100"];
    let daemon = Daemon::start(Path::new(PROGRAM), &run, &image, &options).unwrap();
    assert_eq!(daemon.status().unwrap().number("extents/cached"), 1);
    let mut client = connect(&daemon);
    let mut model = Model::new(vec![0; 64 << 20]);
    for block in 0..600 {
        let data = Random::new(block).bytes(4096);
        client.write_at(block * 3 * BLOCK, &data).unwrap();
        model.write(block * 3 * BLOCK, &data).unwrap();
    }
    let status = daemon.status().unwrap();
    assert!(status.direct() && status.number("extents/evictions") > 0, "{status:?}");
    assert!(status.number("extents/cached") <= 100 + 512, "{status:?}");
    assert_eq!(daemon.log().matches("has outgrown --max-extents").count(), 1, "{}", daemon.log());
    model.check(0, &client.read_at(0, 256 << 10).unwrap()).unwrap();
}

#[test]
fn a_lazy_map_stays_near_its_cap() {
    let Some(mut place) = Place::make() else { return };
    let daemon = place.start(&["--max-extents=1000"]).unwrap();
    let mut client = connect(&daemon);
    for seed in 0..3 {
        place.use_it(&mut client, seed);
        // One answer of FIEMAP may be too much for a moment.
        let status = daemon.status().unwrap();
        assert!(status.number("extents/cached") <= 1000 + 512, "{status:?}");
    }
    place.check_all(&mut client);
    assert!(daemon.status().unwrap().number("extents/evictions") > BLOCKS);
}

#[test]
fn populate_all_without_a_map_to_load_says_so_and_goes_on() {
    let Some(rig) = Rig::enter() else { return };
    let tmpfs = Mount::tmpfs(&rig.dir("tmpfs").unwrap()).unwrap();
    let image = tmpfs.path().join("image");
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let run = rig.dir("run").unwrap();
    let mut daemon = Daemon::start(Path::new(PROGRAM), &run, &image, &["--populate=all"]).unwrap();
    // The socket is there a moment before the log says what it serves.
    let line = "--populate all: there is no extent map to load";
    wait::until("the line", SOON, || daemon.log().contains(line).then_some(())).unwrap();
    assert_eq!(daemon.log().matches(line).count(), 1, "{}", daemon.log());
    assert_eq!(connect(&daemon).read_at(0, 4096).unwrap(), vec![1; 4096]);
    assert!(daemon.sigterm().unwrap().success());
    let direct = ["--populate=all", "--mode=direct"];
    let error = Daemon::start(Path::new(PROGRAM), &run, &image, &direct).unwrap_err().to_string();
    assert!(error.contains("--mode direct is not to be had"), "{error}");
}

/// A block device has a map of one extent, and no FIEMAP.
#[test]
fn populate_all_on_a_block_device_is_no_work() {
    let Some(place) = Place::make() else { return };
    let disk = integration::rig::LoopDisk::attach(1 << 20, 512, &Backing::Memory).unwrap();
    let run = place.rig.dir("device").unwrap();
    let daemon = Daemon::start(Path::new(PROGRAM), &run, disk.path(), &["--populate=all"]).unwrap();
    let status = daemon.status().unwrap();
    assert!(status.direct() && status.number("extents/cached") == 1, "{status:?}");
    assert_eq!(status.number("extents/fiemap_calls"), 0);
}
