// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors of a frontend, before they are received: those that lead to a filesystem of its own, whose server has stopped
//! answering, hold nothing of ours up, and those of a well-behaved frontend are let in (R18a).

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use integration::rig::frontend::{self, Frontend};
use integration::rig::hung_file::HungFile;
use integration::rig::wait::{PATIENCE, until};
use integration::rig::{Bed, Daemon, Rig, Setup};
use rustix::process::Signal;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const FEATURES: u64 = frontend::VERSION_1 | frontend::FLUSH;
/// SET_MEM_TABLE, SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, and SET_FEATURES, which has no descriptor.
const REQUESTS: [u32; 5] = [5, 12, 13, 14, 2];

/// A message with its header, one memory region or eight bytes.
fn message(request: u32) -> Vec<u8> {
    let payload: Vec<u8> = match request {
        5 => {
            let table = [1_u32, 0].map(u32::to_ne_bytes).concat();
            let region = [0_u64, 1 << 20, 0x7f00_0000_0000, 0].map(u64::to_ne_bytes).concat();
            [table, region].concat()
        }
        _ => vec![0; 8],
    };
    let header = [request, 1, u32::try_from(payload.len()).unwrap()];
    [header.map(u32::to_ne_bytes).concat(), payload].concat()
}

/// Sends it over a connection of its own, in two pieces or in one.
fn send(socket: &Path, request: u32, fd: &impl AsRawFd, cut: bool) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    let bytes = message(request);
    let at = if cut { 12 } else { 0 };
    stream.write_all(&bytes[..at]).unwrap();
    stream.send_with_fds(&[&bytes[at..]], &[fd.as_raw_fd()]).unwrap();
    stream
}

#[test]
fn a_file_whose_server_hangs_holds_nobody_up() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let hung = HungFile::mount(16 << 20, &rig.dir("hung").unwrap()).unwrap();
    hung.hang();
    let told = || bed.daemon.log().matches("a file of type fuse").count();
    for (round, request) in REQUESTS.into_iter().enumerate() {
        let stream = send(bed.daemon.socket(), request, hung.file(), round % 2 == 1);
        let line = || (told() > round).then_some(());
        until("the line", PATIENCE, line)
            .unwrap_or_else(|error| panic!("message {request}: {error}: {}", bed.daemon.log()));
        drop(stream);
        let mut client = bed.connect(1).unwrap();
        bed.model.check(0, &client.read_at(0, 65536).unwrap()).unwrap();
    }
    // All it was asked is to flush, by threads that hold nothing else.
    let asked = || (hung.asked() >= REQUESTS.len() as u64).then_some(());
    until("the flushes", PATIENCE, asked).unwrap();
    assert_eq!(hung.asked(), REQUESTS.len() as u64);
    // More than there may be of those: descriptors are no longer looked at, until the filesystem has ended.
    let busy = || bed.daemon.log().contains("still being closed");
    for _ in 0..8 {
        let stream = send(bed.daemon.socket(), 5, hung.file(), false);
        std::thread::sleep(Duration::from_millis(100));
        drop(stream);
    }
    until("the bound", PATIENCE, || busy().then_some(())).unwrap();
    assert!(hung.asked() <= 8, "{}", hung.asked());
    hung.abort().unwrap();
    until("another session", PATIENCE, || bed.connect(1).ok().map(drop)).unwrap();
    bed.finish().unwrap();
}

/// The process cannot be reaped as long as the kernel waits for the filesystem, but it has given the image back.
#[test]
fn the_image_is_free_when_the_daemon_has_ended_beside_a_hung_file() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let hung = HungFile::mount(16 << 20, &rig.dir("hung").unwrap()).unwrap();
    hung.hang();
    let stream = send(bed.daemon.socket(), 5, hung.file(), false);
    until("the flush", PATIENCE, || (hung.asked() > 0).then_some(())).unwrap();
    drop(stream);
    bed.daemon.signal(Signal::TERM).unwrap();
    until("the end", PATIENCE, || bed.daemon.log().contains("stopped").then_some(())).unwrap();
    let free = || bed.host_bytes().is_ok_and(|bytes| bytes == bed.model.bytes()).then_some(());
    until("the image", PATIENCE, free).unwrap();
    let before = bed.daemon.log();
    println!("{before}");
    hung.abort().unwrap();
    bed.daemon.wait(PATIENCE).unwrap();
}

/// Brings a frontend up whose memory is a new file beside the image, and reads a block. Gives its bytes.
fn read_into_a_file(socket: &Path, ram: &Path) -> Vec<u8> {
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(ram).unwrap();
    file.set_len(integration::rig::ring::RING_MEMORY).unwrap();
    let mut front = Frontend::over(socket, file, 1, 64).unwrap();
    front.bring_up(FEATURES).unwrap();
    let ring = front.ring_mut(0).unwrap();
    ring.prepare(0, frontend::kind::IN, 0, 4096, true).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    ring.wait_used(PATIENCE).unwrap();
    ring.read_bytes(ring.data(0), 4096).unwrap()
}

/// Whatever a well-behaved frontend sends is let in.
#[test]
fn memory_on_a_local_filesystem_is_let_in() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let ram = bed.image.parent().unwrap().join("ram");
    bed.model.check(0, &read_into_a_file(bed.daemon.socket(), &ram)).unwrap();
    bed.finish().unwrap();
}

/// libvirt gives each QEMU a mount namespace of its own, in which every mount has another number.
#[test]
fn memory_of_another_mount_namespace_is_let_in() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let ram = bed.image.parent().unwrap().join("ram");
    let copy = rig.dir("copy").unwrap().join("bytes");
    let name = "a_frontend_that_another_test_has_started";
    let frontend = Command::new("unshare")
        .args(["--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--ignored", "--nocapture"])
        .env(PATHS[0], bed.daemon.socket())
        .env(PATHS[1], &ram)
        .env(PATHS[2], &copy)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&frontend.stderr);
    assert!(frontend.status.success(), "{said}{}", bed.daemon.log());
    bed.model.check(0, &std::fs::read(copy).unwrap()).unwrap();
    bed.finish().unwrap();
}

/// The socket, the memory, and where to put what was read.
const PATHS: [&str; 3] = ["EXTENTD_TEST_SOCKET", "EXTENTD_TEST_RAM", "EXTENTD_TEST_COPY"];

#[test]
#[ignore = "run by memory_of_another_mount_namespace_is_let_in, in a process of its own"]
fn a_frontend_that_another_test_has_started() {
    let [Some(socket), Some(ram), Some(copy)] = PATHS.map(std::env::var_os) else { return };
    let bytes = read_into_a_file(Path::new(&socket), Path::new(&ram));
    std::fs::write(copy, bytes).unwrap();
}

/// The threads that look have no copy of the image's descriptors, which they would have to close.
#[test]
fn looking_at_descriptors_does_not_flush_the_image() {
    let Some(rig) = Rig::enter() else { return };
    let image = HungFile::mount(16 << 20, &rig.dir("image").unwrap()).unwrap();
    let dir = rig.dir("run").unwrap();
    let options = ["--read-only", "--mode=filesystem"];
    let mut daemon = Daemon::start(Path::new(PROGRAM), &dir, &image.path(), &options).unwrap();
    let front = Frontend::start(daemon.socket(), 1, 64, FEATURES).unwrap();
    let before = image.flushes();
    for _ in 0..100 {
        front.set_call(0).unwrap();
    }
    assert_eq!(image.flushes() - before, 0, "{before} before");
    drop(front);
    assert!(daemon.sigterm().unwrap().success(), "{}", daemon.log());
}

/// Its descriptor is passed over by a peek and received all the same, and poll(2) calls it readable for ever.
#[test]
fn an_out_of_band_byte_costs_its_session_and_no_cpu_time() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let stream = UnixStream::connect(bed.daemon.socket()).unwrap();
    rustix::net::send(&stream, b"x", rustix::net::SendFlags::OOB).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let before = bed.daemon.cpu_ticks().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let ticks = bed.daemon.cpu_ticks().unwrap() - before;
    assert!(ticks < 20, "{ticks} hundredths of a second of CPU time in one second");
    let told = || bed.daemon.log().contains("MSG_OOB").then_some(());
    until("the line", PATIENCE, told).unwrap();
    let mut client = bed.connect(1).unwrap();
    bed.model.check(0, &client.read_at(0, 65536).unwrap()).unwrap();
    drop((client, stream));
    bed.finish().unwrap();
}

/// Nothing but `/proc` tells an eventfd from a FUSE file.
#[test]
fn without_proc_the_line_says_that_it_is_missing() {
    let Some(rig) = Rig::enter() else { return };
    let program = rig.dir("program").unwrap().join("without-proc");
    let script = format!("#!/bin/sh\nexec unshare --mount -- {PROGRAM} \"$@\"\n");
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let bed = Bed::make(&rig, program.to_str().unwrap(), &Setup::default(), &[]).unwrap();
    // It is there at the start, or nothing is served.
    let namespace = format!("--mount=/proc/{}/ns/mnt", bed.daemon.pid());
    let cover = ["mount", "-t", "tmpfs", "none", "/proc"];
    let covered = Command::new("nsenter").arg(namespace).args(cover).status().unwrap();
    assert!(covered.success());
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let _stream = send(bed.daemon.socket(), 13, &event, false);
    let told = || bed.daemon.log().contains("/proc is not mounted").then_some(());
    until("the line", PATIENCE, told).unwrap_or_else(|_| panic!("{}", bed.daemon.log()));
    bed.finish().unwrap();
}
