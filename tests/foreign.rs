// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors of a frontend that lead to a filesystem of its own, whose server has stopped answering: nothing of ours waits
//! for it (R18a).

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use integration::rig::frontend::{self, Frontend};
use integration::rig::hung_file::HungFile;
use integration::rig::wait::{PATIENCE, until};
use integration::rig::{Bed, Rig, Setup};
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

/// Whatever a well-behaved frontend sends is let in.
#[test]
fn memory_on_a_local_filesystem_is_let_in() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let dir = bed.image.parent().unwrap().join("ram");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(dir).unwrap();
    file.set_len(integration::rig::ring::RING_MEMORY).unwrap();
    let mut front = Frontend::over(bed.daemon.socket(), file, 1, 64).unwrap();
    front.bring_up(FEATURES).unwrap();
    let ring = front.ring_mut(0).unwrap();
    ring.prepare(0, frontend::kind::IN, 0, 4096, true).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    ring.wait_used(PATIENCE).unwrap();
    let bytes = ring.read_bytes(ring.data(0), 4096).unwrap();
    bed.model.check(0, &bytes).unwrap();
    drop(front);
    bed.finish().unwrap();
}
