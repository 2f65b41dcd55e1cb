// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several devices in one process: each goes its own way, and they begin and end together.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

use integration::rig::command::run;
use integration::rig::model::Model;
use integration::rig::wait::{PATIENCE, until};
use integration::rig::workload::Workload;
use integration::rig::{
    Backing, Client, ClientOptions, Daemon, Filesystem, Fleet, Kind, Layout, Mount, Request, Rig,
    Shape, Status,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

/// Images on a filesystem of their own, and what is in them.
struct Images {
    fs: Filesystem,
    paths: Vec<PathBuf>,
    models: Vec<Model>,
}

impl Images {
    fn make(rig: &Rig, layouts: &[Layout]) -> Images {
        let fs = rig.dir("fs").unwrap();
        let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &fs).unwrap();
        let paths: Vec<PathBuf> =
            (0..layouts.len()).map(|n| fs.path().join(format!("image-{n}"))).collect();
        let make = |((seed, path), layout): ((u64, &PathBuf), &Layout)| {
            Model::new(layout.make(path, SIZE, seed).unwrap())
        };
        let models = (1..).zip(&paths).zip(layouts).map(make).collect();
        Images { fs, paths, models }
    }

    /// Serves them, the last one read-only.
    fn serve(&self, rig: &Rig) -> Fleet {
        let last = self.paths.len() - 1;
        let read_only = |index| if index == last { "read-only = true" } else { "" };
        let devices: Vec<(&Path, &str)> = self
            .paths
            .iter()
            .enumerate()
            .map(|(index, path)| (path.as_path(), read_only(index)))
            .collect();
        Fleet::start(PROGRAM, &rig.dir("run").unwrap(), &devices).unwrap()
    }

    /// The host sees what the guests have written.
    fn check(self) {
        for (path, model) in self.paths.iter().zip(&self.models) {
            model.check(0, &fs::read(path).unwrap()).unwrap();
        }
        self.fs.check().unwrap();
    }
}

/// Random I/O on all devices at once, every read compared.
fn load(clients: &mut [Client], models: &mut [Model], requests: u64) {
    let last = clients.len() - 1;
    thread::scope(|scope| {
        for (index, (client, model)) in clients.iter_mut().zip(models).enumerate() {
            let load = Workload { requests, write: index < last, ..Workload::default() };
            scope.spawn(move || load.run(client.queues(), model).unwrap());
        }
    });
}

fn connect_all(fleet: &Fleet, count: usize) -> Vec<Client> {
    (0..count).map(|index| fleet.connect(index, &ClientOptions::queues(2)).unwrap()).collect()
}

#[test]
fn devices_of_one_process_go_their_own_ways() {
    let Some(rig) = Rig::enter() else { return };
    let mut images = Images::make(&rig, &[Layout::Mixed, Layout::Written, Layout::Mixed]);
    let mut fleet = images.serve(&rig);
    let mut clients = connect_all(&fleet, 3);
    for index in 0..3 {
        fleet.await_status(index, PATIENCE, Status::direct).unwrap();
    }
    load(&mut clients, &mut images.models, 600);
    for (index, client) in clients.iter_mut().enumerate() {
        let status = fleet.status(index).unwrap();
        assert!(status.direct() && status.number("segments/direct") > 0, "{index}: {status:?}");
        assert_eq!(status.text("image"), images.paths[index].to_string_lossy());
        assert_eq!(client.write_at(0, &[1; 512]).is_err(), index == 2);
    }
    images.models[..2].iter_mut().for_each(|model| model.write(0, &[1; 512]).unwrap());

    // Somebody opens one image: that device leaves direct mode, the others do not notice.
    let before: Vec<u64> =
        (0..3).map(|index| fleet.status(index).unwrap().number("lease_breaks")).collect();
    let reader = File::open(&images.paths[1]).unwrap();
    let modes: Vec<bool> = (0..3).map(|index| fleet.status(index).unwrap().direct()).collect();
    assert_eq!(modes, [true, false, true]);
    load(&mut clients, &mut images.models, 300);
    let status = |index| fleet.status(index).unwrap();
    assert!(status(1).number("segments/file") > 0);
    assert_eq!(status(0).number("lease_breaks"), before[0]);
    assert_eq!(status(2).number("lease_breaks"), before[2]);
    assert!(status(0).direct() && status(2).direct());
    drop(reader);
    fleet.await_status(1, PATIENCE, Status::direct).unwrap();
    load(&mut clients, &mut images.models, 300);

    // One is unlinked, which its device says and no other.
    fs::remove_file(&images.paths[2]).unwrap();
    let unlinked = |status: &Status| status.0["unlinked"] == true;
    fleet.await_status(2, PATIENCE, unlinked).unwrap();
    assert!(!unlinked(&status(0)) && !unlinked(&status(1)));
    images.paths.truncate(2);
    images.models.truncate(2);

    let log = fleet.daemon.log();
    for (index, path) in images.paths.iter().enumerate() {
        let line = format!("device{{image={}}}: frontend connected", path.display());
        assert!(log.contains(&line), "{index}: {log}");
    }
    drop(clients);
    assert!(fleet.daemon.sigterm().unwrap().success(), "{}", fleet.daemon.log());
    images.check();
}

/// A size that changes without a break of the lease is heard for the image it belongs to (R5a), in every round of direct
/// mode.
#[test]
fn a_truncated_image_stops_its_own_device_only() {
    let Some(rig) = Rig::enter() else { return };
    let fs = rig.dir("fs").unwrap();
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &fs).unwrap();
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| {
        let path = fs.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    });
    let paths = ["a", "b", "c"].map(|name| upper.join(name));
    for (seed, path) in (1..).zip(&paths) {
        Layout::Written.make(path, SIZE, seed).unwrap();
    }
    let devices: Vec<(&Path, &str)> = paths.iter().map(|path| (path.as_path(), "")).collect();
    let mut fleet = Fleet::start(PROGRAM, &rig.dir("run").unwrap(), &devices).unwrap();
    let mut client = fleet.connect(1, &ClientOptions::queues(1)).unwrap();
    for index in 0..3 {
        fleet.await_status(index, PATIENCE, Status::direct).unwrap();
    }
    // After a time in filesystem mode, when writes to the file need not be heard, they are heard again.
    let reader = File::open(&paths[1]).unwrap();
    for _ in 0..100 {
        client.write_at(0, &[3; 4096]).unwrap();
    }
    drop(reader);
    fleet.await_status(1, PATIENCE, Status::direct).unwrap();

    let overlay = Mount::overlay(&lower, &upper, &work, &rig.dir("overlay").unwrap()).unwrap();
    let script = "truncate($ARGV[0], $ARGV[1]) or die $!";
    let (path, size) = (overlay.path().join("b"), (SIZE / 2).to_string());
    run("perl", &["-e".as_ref(), script.as_ref(), path.as_os_str(), size.as_ref()]).unwrap();
    let noticed = |status: &Status| status.reason().contains("size changed");
    let status = fleet.await_status(1, PATIENCE, noticed).unwrap();
    assert!(!status.direct(), "{status:?}");
    assert!(fleet.status(0).unwrap().direct() && fleet.status(2).unwrap().direct());
    drop((client, overlay));
    assert!(fleet.daemon.sigterm().unwrap().success(), "{}", fleet.daemon.log());
}

/// Frontends of one device come and go, with requests in flight too, while the others' I/O goes on.
#[test]
fn a_frontend_that_goes_disturbs_no_other() {
    let Some(rig) = Rig::enter() else { return };
    let mut images = Images::make(&rig, &[Layout::Mixed, Layout::Mixed, Layout::Written]);
    let mut fleet = images.serve(&rig);
    let options = ClientOptions::queues(2);
    let mut others: Vec<Client> =
        (1..3).map(|index| fleet.connect(index, &options).unwrap()).collect();
    let (left, right) = images.models.split_at_mut(1);
    let data = vec![7; 64 << 10];
    thread::scope(|scope| {
        let load = scope.spawn(|| load(&mut others, right, 3000));
        for round in 0..8 {
            let mut client = fleet.connect(0, &options).unwrap();
            let queue = client.queue(0).unwrap();
            for place in 0..16 {
                let offset = place * data.len() as u64;
                queue.submit(Request::Write { offset, data: &data }, &Shape::whole(), 0).unwrap();
            }
            queue.kick().unwrap();
            // All but the last go with what they have asked for in flight.
            if round == 7 {
                queue.drain().unwrap().into_iter().for_each(|done| drop(done.result.unwrap()));
                left[0].write(0, &vec![7; 16 * data.len()]).unwrap();
                left[0].check(0, &client.read_at(0, 256 << 10).unwrap()).unwrap();
            }
        }
        load.join().unwrap();
    });
    assert_eq!(fleet.status(0).unwrap().number("sessions"), 8);
    drop(others);
    assert!(fleet.daemon.sigterm().unwrap().success(), "{}", fleet.daemon.log());
    images.check();
}

/// What is told to stop stops all at once: everything that was written is on disk, nothing of a socket stays.
#[test]
fn one_signal_ends_all() {
    let Some(rig) = Rig::enter() else { return };
    let mut images = Images::make(&rig, &[Layout::Sparse, Layout::Written, Layout::Mixed]);
    let mut fleet = images.serve(&rig);
    let mut clients = connect_all(&fleet, 3);
    load(&mut clients, &mut images.models, 300);
    // With the frontends still there, and requests of two of them in flight.
    let data = vec![9; 4096];
    for (client, model) in clients.iter_mut().zip(&mut images.models).take(2) {
        let queue = client.queue(1).unwrap();
        queue.submit(Request::Write { offset: 0, data: &data }, &Shape::whole(), 0).unwrap();
        queue.kick().unwrap();
        queue.drain().unwrap().into_iter().for_each(|done| drop(done.result.unwrap()));
        model.write(0, &data).unwrap();
    }
    assert!(fleet.daemon.sigterm().unwrap().success(), "{}", fleet.daemon.log());
    let log = fleet.daemon.log();
    assert_eq!(log.matches("told to stop").count(), 1, "{log}");
    assert_eq!(log.matches("stopped").count(), 1, "{log}");
    drop(clients);
    assert_eq!(sockets(fleet.socket(0).parent().unwrap()), [""; 0]);
    images.check();
}

/// The sockets in a directory.
fn sockets(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(".sock") || name.ends_with(".ctl")).collect()
}

/// Runs extentd on a file of devices that it refuses; all it says, and the sockets that it leaves.
fn refused(dir: &Path, devices: &[(&Path, &str)]) -> (Output, Vec<String>) {
    let config = dir.join("devices.toml");
    let table = |(index, (image, more)): (usize, &(&Path, &str))| {
        let socket = dir.join(format!("{index}.sock"));
        format!("[[device]]\nblk-file = {image:?}\nsocket-path = {socket:?}\n{more}\n")
    };
    fs::write(&config, devices.iter().enumerate().map(table).collect::<String>()).unwrap();
    let output = Command::new(PROGRAM).arg("--config").arg(&config).output().unwrap();
    (output, sockets(dir))
}

#[test]
fn a_start_that_fails_for_one_fails_for_all() {
    let Some(rig) = Rig::enter() else { return };
    let images = Images::make(&rig, &[Layout::Written, Layout::Written, Layout::Written]);
    let dir = rig.dir("run").unwrap();
    let [a, b, c] = [0, 1, 2].map(|index| images.paths[index].as_path());
    let link = images.fs.path().join("link");
    std::os::unix::fs::symlink(b, &link).unwrap();
    let hard = images.fs.path().join("hard");
    fs::hard_link(b, &hard).unwrap();
    let missing = images.fs.path().join("missing");
    let empty = images.fs.path().join("empty");
    File::create(&empty).unwrap();
    let same = "device 2 has the same image; serve it once";
    let control = format!("control-path = '{}/none/ctl'", dir.display());
    for (devices, message) in [
        ([(a, ""), (b, ""), (missing.as_path(), "")], "no such file; correct the path"),
        ([(a, ""), (b, ""), (empty.as_path(), "")], "is empty; give it a size"),
        ([(a, ""), (b, ""), (c, "offset = '1 GiB'")], "--offset 1073741824 leaves no block"),
        ([(a, ""), (b, ""), (b, "")], same),
        ([(a, ""), (b, ""), (link.as_path(), "")], same),
        ([(a, ""), (b, "read-only = true"), (hard.as_path(), "read-only = true")], same),
        ([(a, ""), (b, ""), (c, &control)], "cannot"),
    ] {
        let (output, left) = refused(&dir, &devices);
        let said = String::from_utf8(output.stderr).unwrap();
        let end = said.lines().last().unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        // Which of two equals comes first is open.
        let place = format!("extentd: device 3 ({}): ", devices[2].0.display());
        let swapped = same == message && end.contains("device 3 has the same image");
        assert!(swapped || end.starts_with(&place) && end.contains(message), "{said}");
        // Before they listen they say nothing.
        assert!(message == "cannot" || said.lines().count() == 1, "{said}");
        assert_eq!(left, [""; 0], "{said}");
    }
    images.check();
}

#[test]
fn a_file_with_mistakes_is_a_wrong_command_line() {
    let Some(rig) = Rig::enter() else { return };
    let dir = rig.dir("run").unwrap();
    let (output, _) = refused(&dir, &[(Path::new("/i"), "qos = 1")]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.starts_with("extentd: ") && said.lines().count() == 1, "{said}");
    assert!(said.contains("devices.toml: device 1 (/i): unknown key qos; "), "{said}");
}

/// An image that is locked keeps the others waiting for a while only; what comes of it is its own affair then, and
/// the exit status tells of it.
#[test]
fn a_late_device_is_alone() {
    let Some(rig) = Rig::enter() else { return };
    let images = Images::make(&rig, &[Layout::Written, Layout::Written, Layout::Written]);
    let rival = |index: usize| {
        let dir = rig.dir(&format!("rival-{index}")).unwrap();
        Daemon::start(Path::new(PROGRAM), &dir, &images.paths[index], &[]).unwrap()
    };
    let (mut first, mut second) = (rival(1), rival(2));
    let mut fleet = images.serve(&rig);
    let mut client = fleet.connect(0, &ClientOptions::queues(1)).unwrap();
    images.models[0].check(0, &client.read_at(0, 4096).unwrap()).unwrap();
    assert!(!fleet.socket(1).exists() && !fleet.socket(2).exists());
    // One follows when its image is free,
    first.sigterm().unwrap();
    let mut late = fleet.connect(1, &ClientOptions::queues(1)).unwrap();
    images.models[1].check(0, &late.read_at(0, 4096).unwrap()).unwrap();
    // and one fails.
    fs::write(fleet.socket(2), "").unwrap();
    second.sigterm().unwrap();
    let line = format!(
        "ERROR device{{image={}}}: this device has failed: {} exists and is not a socket",
        images.paths[2].display(),
        fleet.socket(2).display()
    );
    let said = || fleet.daemon.log().contains(&line).then_some(());
    until("the failure", PATIENCE, said).unwrap_or_else(|_| panic!("{}", fleet.daemon.log()));
    // Its image is free again, and the others go on.
    let third =
        Daemon::start(Path::new(PROGRAM), &rig.dir("third").unwrap(), &images.paths[2], &[]);
    drop(third.unwrap());
    images.models[0].check(4096, &client.read_at(4096, 4096).unwrap()).unwrap();
    images.models[1].check(4096, &late.read_at(4096, 4096).unwrap()).unwrap();
    drop((client, late));
    assert_eq!(fleet.daemon.sigterm().unwrap().code(), Some(1));
    let log = fleet.daemon.log();
    assert!(log.ends_with("extentd: 1 of 3 devices have failed; the log says why\n"), "{log}");
}

/// Golden images and small ones: three hundred in one process, whose limits and memory are not those of three hundred
/// processes.
#[test]
fn serial_three_hundred_devices_fit_into_one_process() {
    const DEVICES: usize = 300;
    const SMALL: u64 = MIB / 8;
    let Some(rig) = Rig::enter() else { return };
    let fs = rig.dir("fs").unwrap();
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &fs).unwrap();
    let paths: Vec<PathBuf> = (0..DEVICES).map(|n| fs.path().join(n.to_string())).collect();
    let contents: Vec<Vec<u8>> = (1..)
        .zip(&paths)
        .map(|(seed, path)| Layout::Written.make(path, SMALL, seed).unwrap())
        .collect();
    let devices: Vec<(&Path, &str)> = paths.iter().map(|path| (path.as_path(), "")).collect();
    let mut fleet = Fleet::start(PROGRAM, &rig.dir("run").unwrap(), &devices).unwrap();
    let mut clients = Vec::new();
    for (index, content) in contents.iter().enumerate() {
        let mut client = fleet.connect(index, &ClientOptions::default()).unwrap();
        fleet.await_status(index, PATIENCE, Status::direct).unwrap();
        assert!(client.read_at(0, 64 << 10).unwrap() == content[..64 << 10], "device {index}");
        client.write_at(64 << 10, &[5; 4096]).unwrap();
        client.flush().unwrap();
        clients.push(client);
    }
    let threads = fs::read_dir(format!("/proc/{}/task", fleet.daemon.pid())).unwrap().count();
    let files = fleet.daemon.open_files().unwrap();
    let kib = fleet.daemon.resident_kib().unwrap();
    println!("{DEVICES} devices: {} MiB, {threads} threads, {files} descriptors", kib >> 10);
    assert!(kib <= 1 << 20, "{kib} KiB resident");
    drop(clients);
    assert!(fleet.daemon.sigterm().unwrap().success(), "{}", fleet.daemon.log());
    for (path, mut content) in paths.iter().zip(contents) {
        content[64 << 10..][..4096].fill(5);
        assert!(fs::read(path).unwrap() == content, "{}", path.display());
    }
    fs.check().unwrap();
}
