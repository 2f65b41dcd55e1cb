// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Read-only images on filesystems that share blocks, and on those that do not: what may happen
//! behind a lease that readers do not break (ADR 0008).

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use integration::rig::command::spawn;
use integration::rig::sharing::{Access, Waiting, dedupe, fill_with};
use integration::rig::wait::PATIENCE;
use integration::rig::{
    Backing, Client, ClientOptions, Daemon, Filesystem, Kind, Layout, Rig, Status,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
/// What the blocks that an image has lost are filled with.
const SECRET: &[u8] = b"SECRET--";

/// A filesystem with an image, and a file of the same bytes to share blocks with.
struct Twins {
    image: PathBuf,
    twin: PathBuf,
    bytes: Vec<u8>,
    fs: Filesystem,
}

impl Twins {
    fn make(rig: &Rig, kind: Kind) -> Self {
        let fs = rig.dir("fs").unwrap();
        let fs = Filesystem::make(kind, 400 * MIB, 512, &Backing::Memory, &fs).unwrap();
        let (image, twin) = (fs.path().join("image"), fs.path().join("twin"));
        let bytes = Layout::Written.make(&image, SIZE, 7).unwrap();
        assert!(Layout::Written.make(&twin, SIZE, 7).unwrap() == bytes);
        fs.sync().unwrap();
        Self { image, twin, bytes, fs }
    }

    fn daemon(&self, rig: &Rig, name: &str, options: &[&str]) -> Daemon {
        let dir = rig.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Daemon::start(Path::new(PROGRAM), &dir, &self.image, options).unwrap()
    }

    /// What the guest reads is the image, wherever its blocks are by now.
    fn check(&self, client: &mut Client) {
        for (index, want) in self.bytes.chunks(256 << 10).enumerate() {
            let read = client.read_at(index as u64 * (256 << 10), want.len()).unwrap();
            let seen = read.windows(SECRET.len()).filter(|bytes| *bytes == SECRET).count();
            assert_eq!(seen, 0, "bytes of another file at {} KiB", index * 256);
            assert!(read == want, "wrong bytes at {} KiB", index * 256);
        }
    }
}

fn connect(daemon: &Daemon) -> Client {
    Client::connect(daemon.socket(), &ClientOptions::queues(1)).unwrap()
}

/// FIDEDUPERANGE takes a destination that is open for reading only, and frees the blocks it had.
#[test]
fn a_deduplicated_read_only_image_shows_no_other_files_bytes() {
    let Some(rig) = Rig::enter() else { return };
    let twins = Twins::make(&rig, Kind::XfsReflink);
    let daemon = twins.daemon(&rig, "run", &["--read-only"]);
    daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    let mut client = connect(&daemon);
    twins.check(&mut client);
    dedupe(&twins.image, &twins.twin, SIZE).unwrap();
    fill_with(twins.fs.path(), SECRET).unwrap();
    twins.check(&mut client);
    // It comes back to direct mode, with the blocks that it shares now.
    let status = daemon.await_status("direct mode again", PATIENCE, Status::direct).unwrap();
    assert!(status.number("lease_breaks") > 0, "{status:?}");
    twins.check(&mut client);
    drop((client, daemon));
    twins.fs.check().unwrap();
}

/// Without shared blocks nothing that may be done to a file open for reading moves its blocks:
/// instances share the lease, and deduplication is refused.
#[test]
fn read_only_instances_share_direct_mode_where_blocks_cannot_be_shared() {
    for kind in [Kind::Xfs, Kind::Ext4] {
        let Some(rig) = Rig::enter() else { return };
        let twins = Twins::make(&rig, kind);
        let daemons = ["one", "two"].map(|name| twins.daemon(&rig, name, &["--read-only"]));
        for daemon in &daemons {
            let status = daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
            assert!(status.reason().contains("for writing"), "{status:?}");
        }
        dedupe(&twins.image, &twins.twin, SIZE).unwrap_err();
        for daemon in &daemons {
            twins.check(&mut connect(daemon));
            let status = daemon.status().unwrap();
            assert_eq!((status.direct(), status.number("lease_breaks")), (true, 0), "{kind:?}");
        }
        drop(daemons);
        twins.fs.check().unwrap();
    }
}

/// Two instances on a filesystem that shares blocks: each is in the other's way, and neither breaks
/// the other's lease again and again.
#[test]
fn read_only_instances_where_blocks_can_be_shared_stay_in_filesystem_mode() {
    let Some(rig) = Rig::enter() else { return };
    let twins = Twins::make(&rig, Kind::XfsReflink);
    let first = twins.daemon(&rig, "first", &["--read-only"]);
    first.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    let second = twins.daemon(&rig, "second", &["--read-only"]);
    let named = |status: &Status| !status.direct() && status.reason().contains("reflink=0");
    let breaks = [&first, &second].map(|daemon| {
        let status = daemon.await_status("the reason", PATIENCE, named).unwrap();
        status.number("lease_breaks")
    });
    assert_eq!(breaks, [1, 0], "the second one's start, and nothing since");
    let mut clients = [&first, &second].map(connect);
    // Each tries for the lease several times in this time.
    for _ in 0..40 {
        std::thread::sleep(Duration::from_millis(100));
        for (daemon, client) in [&first, &second].into_iter().zip(&mut clients) {
            assert!(!daemon.status().unwrap().direct(), "{}", daemon.log());
            client.read_at(0, 4096).unwrap();
        }
    }
    for (daemon, breaks) in [&first, &second].into_iter().zip(breaks) {
        let log = daemon.log();
        assert_eq!(daemon.status().unwrap().number("lease_breaks"), breaks, "{log}");
        assert!(log.matches("mode=").count() <= 3, "{log}");
    }
    dedupe(&twins.image, &twins.twin, SIZE).unwrap();
    fill_with(twins.fs.path(), SECRET).unwrap();
    clients.iter_mut().for_each(|client| twins.check(client));
    let [mut left, gone] = clients;
    drop((gone, second));
    first.await_status("direct mode when it is alone", PATIENCE, Status::direct).unwrap();
    twins.check(&mut left);
    drop((left, first));
    twins.fs.check().unwrap();
}

/// A descriptor from before, by which blocks can be moved: one that reads refuses the lease, and
/// one for ioctls only, which no lease counts, is found otherwise.
#[test]
fn direct_mode_waits_for_openers_that_could_deduplicate() {
    let ways = [
        (Access::ReadOnly, &["--read-only"][..]),
        (Access::Neither, &["--read-only"]),
        (Access::Neither, &[]),
    ];
    for (access, options) in ways {
        let Some(rig) = Rig::enter() else { return };
        let twins = Twins::make(&rig, Kind::XfsReflink);
        let signs = rig.dir("signs").unwrap();
        let other = Waiting::start(&signs, &twins.image, access, &twins.twin, SIZE).unwrap();
        let daemon = twins.daemon(&rig, "run", options);
        let mut client = connect(&daemon);
        twins.check(&mut client);
        assert!(!daemon.status().unwrap().direct(), "{access:?} {options:?}");
        if access == Access::Neither {
            let named = format!("process {} has it open for ioctls only", other.pid());
            assert_eq!(daemon.log().matches(&named).count(), 1, "{}", daemon.log());
        }
        other.go().unwrap();
        fill_with(twins.fs.path(), SECRET).unwrap();
        twins.check(&mut client);
        daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
        twins.check(&mut client);
        drop((client, daemon));
        twins.fs.check().unwrap();
    }
}

/// What the units of systemd gave before the search for such descriptors needed more.
const WITHOUT_PTRACE: &str = "CAP_LEASE CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_CHOWN CAP_FOWNER";

/// The capabilities that a shipped unit gives.
fn unit_capabilities(unit: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/systemd").join(unit);
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    line.unwrap().to_owned()
}

/// The daemon with no more than these capabilities.
fn confined(twins: &Twins, rig: &Rig, name: &str, capabilities: &str) -> Daemon {
    let names = capabilities.to_lowercase().replace("cap_", "+");
    let names: Vec<&str> = names.split_whitespace().collect();
    let set = format!("--bounding-set=-all,{}", names.join(","));
    let dir = rig.dir(name).unwrap();
    let role = [set.as_str(), "--", PROGRAM];
    Daemon::start_as(Path::new("setpriv"), &role, &dir, &twins.image, &[]).unwrap()
}

fn unseen(status: &Status) -> bool {
    !status.direct() && status.reason().contains("CAP_SYS_PTRACE")
}

/// A descriptor for ioctls only that extentd may not look at is as good as one that it has seen,
/// and the reason says what is missing; with what the units give it is seen.
#[test]
fn direct_mode_waits_where_descriptors_cannot_be_seen() {
    let Some(rig) = Rig::enter() else { return };
    let twins = Twins::make(&rig, Kind::XfsReflink);
    let signs = rig.dir("signs").unwrap();
    let holder = || Waiting::start(&signs, &twins.image, Access::Neither, &twins.twin, SIZE);
    let other = holder().unwrap();
    let daemon = confined(&twins, &rig, "blind", WITHOUT_PTRACE);
    daemon.await_status("the reason", PATIENCE, unseen).unwrap();
    let mut client = connect(&daemon);
    // It tries again several times in this while, and says it once.
    for _ in 0..30 {
        std::thread::sleep(Duration::from_millis(100));
        assert!(unseen(&daemon.status().unwrap()), "{}", daemon.log());
    }
    let log = daemon.log();
    assert!(log.matches("mode=").count() <= 2, "{log}");
    // Which process is the first that it may not look into depends on the host.
    assert_eq!(log.matches("ioctls only cannot be seen: process ").count(), 1, "{log}");
    other.go().unwrap();
    fill_with(twins.fs.path(), SECRET).unwrap();
    twins.check(&mut client);
    drop((client, daemon));
    std::fs::remove_file(twins.fs.path().join("secret")).unwrap();
    for unit in ["extentd.service", "extentd@.service"] {
        for sign in ["open", "go"] {
            std::fs::remove_file(signs.join(sign)).unwrap();
        }
        let other = holder().unwrap();
        let daemon = confined(&twins, &rig, unit, &unit_capabilities(unit));
        let busy = |status: &Status| status.reason().contains("another process has the image open");
        daemon.await_status("the reason", PATIENCE, busy).unwrap();
        let named = format!("process {} has it open for ioctls only", other.pid());
        assert!(daemon.log().contains(&named), "{}", daemon.log());
        other.go().unwrap();
        daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    }
    twins.fs.check().unwrap();
}

/// In a pid namespace of its own extentd sees its own processes only.
#[test]
fn direct_mode_waits_where_processes_cannot_be_seen() {
    for (kind, direct) in [(Kind::XfsReflink, false), (Kind::Xfs, true)] {
        let Some(rig) = Rig::enter() else { return };
        let twins = Twins::make(&rig, kind);
        let dir = rig.dir("run").unwrap();
        let role = ["--pid", "--fork", "--kill-child", "--mount-proc", "--", PROGRAM];
        let unshare = Path::new("unshare");
        let daemon = Daemon::start_as(unshare, &role, &dir, &twins.image, &[]).unwrap();
        let expected = if direct { Status::direct } else { unseen };
        daemon.await_status("the mode", PATIENCE, expected).unwrap();
    }
}

/// A thread whose table of descriptors is its own, or that of a process whose first thread has
/// ended: what `/proc/PID/fd` shows is another one, or nothing.
const APART: &str = r#"
import ctypes, os, platform, sys, threading, time
libc = ctypes.CDLL(None)
def hold():
    if sys.argv[2] == "unshare" and libc.unshare(0x400):
        return
    os.open(sys.argv[1], 3)
    print("open", flush=True)
    time.sleep(600)
threading.Thread(target=hold).start()
if sys.argv[2] == "exit":
    libc.syscall(60 if platform.machine() == "x86_64" else 93, 0)
"#;

#[test]
fn direct_mode_waits_for_a_thread_with_descriptors_of_its_own() {
    for how in ["unshare", "exit"] {
        let Some(rig) = Rig::enter() else { return };
        let twins = Twins::make(&rig, Kind::XfsReflink);
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "python3", "-c", APART]).arg(&twins.image);
        let mut other = spawn(command.arg(how).stdout(Stdio::piped())).unwrap();
        other.stdout.as_mut().unwrap().read_exact(&mut [0; 1]).unwrap();
        let daemon = twins.daemon(&rig, "run", &[]);
        let busy = |status: &Status| status.reason().contains("another process has the image open");
        daemon.await_status("the reason", PATIENCE, busy).unwrap();
        let named = format!("process {} has it open for ioctls only", other.id());
        assert!(daemon.log().contains(&named), "{how}: {}", daemon.log());
        other.kill().unwrap();
        other.wait().unwrap();
        daemon.await_status("direct mode", PATIENCE, Status::direct).unwrap();
    }
}

/// What `extentctl check` says of an image that is to be shared.
#[test]
fn a_check_says_where_read_only_images_can_be_shared() {
    for (kind, shared) in [(Kind::XfsReflink, false), (Kind::Xfs, true)] {
        let Some(rig) = Rig::enter() else { return };
        let twins = Twins::make(&rig, kind);
        let check = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_extentctl"));
            command.args(["check", "--read-only"]).arg(&twins.image).stdout(Stdio::piped());
            let output = spawn(&mut command).unwrap().wait_with_output().unwrap();
            (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let (direct, said) = check();
        let reason = if shared { "nobody has the file open for writing" } else { "nobody else" };
        assert!(direct && said.contains(reason), "{said}");
        let reader = File::open(&twins.image).unwrap();
        let (direct, said) = check();
        assert!(direct == shared && said.contains("reflink=0") != shared, "{said}");
        drop(reader);
    }
}
