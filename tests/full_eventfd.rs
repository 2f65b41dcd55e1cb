// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A frontend that wants its signals to be waited for: its call eventfd blocks, and is full at some
//! moment between any look at it and the write that follows.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use integration::rig::frontend::{self, Frontend, kind};
use integration::rig::wait::PATIENCE;
use integration::rig::{Bed, Rig, Setup};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::{read, write};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const FEATURES: u64 = frontend::VERSION_1 | frontend::FLUSH;
/// How long it is tried. With a poll before the write it took 1 s, and 10 s on a busy machine.
const TRIED: Duration = Duration::from_secs(8);
/// A worker that answers nothing for so long is stuck.
const STUCK: Duration = Duration::from_secs(3);
const FULL: u64 = u64::MAX - 1;
/// Requests that are always there to be taken.
const AHEAD: u16 = 16;

/// What the two threads of the frontend know of each other.
#[derive(Default)]
struct Scene {
    answered: AtomicU64,
    over: AtomicBool,
}

impl Scene {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Waits for one more answer; it does not come if the worker is stuck.
    fn await_answer(&self) {
        let before = self.answered.load(Ordering::Relaxed);
        while self.answered.load(Ordering::Relaxed) == before && !self.is_over() {
            std::hint::spin_loop();
        }
    }
}

/// Empties and fills the counter in turn, and makes it block before it looks whether the worker
/// goes on. It never waits for the counter itself, and leaves it as is worst.
fn torment(call: BorrowedFd<'_>, scene: &Scene) {
    let (waits, never) = (OFlags::RDWR, OFlags::RDWR | OFlags::NONBLOCK);
    let mut turn = 0_u32;
    let mut filled = false;
    while !(scene.is_over() && filled) {
        turn = turn.wrapping_add(1);
        fcntl_setfl(call, never).unwrap();
        let _ = read(call, &mut [0; 8][..]);
        (0..turn % 20 * 3).for_each(|_| std::hint::spin_loop());
        // What was signalled since leaves no room, and then there is another turn.
        filled = write(call, &FULL.to_ne_bytes()).is_ok();
        if filled {
            fcntl_setfl(call, waits).unwrap();
            scene.await_answer();
        }
    }
}

/// Has requests answered for [`TRIED`], or until they are not any more; says whether the last one
/// was.
fn drive(front: &mut Frontend, scene: &Scene) -> bool {
    let ring = front.ring_mut(0).unwrap();
    ring.prepare(0, kind::GET_ID, 0, 20, true).unwrap();
    (0..AHEAD).for_each(|_| ring.publish(0).unwrap());
    let begun = Instant::now();
    let mut last = begun;
    while begun.elapsed() < TRIED {
        ring.kick().unwrap();
        if ring.take_used().unwrap().is_some() {
            last = Instant::now();
            scene.answered.fetch_add(1, Ordering::Relaxed);
            ring.publish(0).unwrap();
        } else if last.elapsed() > STUCK {
            return false;
        }
    }
    true
}

#[test]
fn nobody_waits_for_a_frontend_that_does_not_read() {
    let Some(rig) = Rig::enter() else { return };
    let mut bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    let call = front.ring(0).unwrap().call_fd().try_clone_to_owned().unwrap();
    let scene = Scene::default();
    let answered = thread::scope(|scope| {
        scope.spawn(|| torment(call.as_fd(), &scene));
        let answered = drive(&mut front, &scene);
        scene.over.store(true, Ordering::Relaxed);
        answered
    });
    assert!(answered, "a worker waits for its frontend");
    // An opener of the image, the next frontend and SIGTERM find a worker that listens.
    let (sender, opened) = mpsc::channel();
    let image = bed.image.clone();
    thread::spawn(move || {
        let first = File::open(image).and_then(|mut file| file.read_exact(&mut [0; 1]));
        sender.send(first.is_ok()).unwrap();
    });
    assert_eq!(opened.recv_timeout(PATIENCE), Ok(true), "the lease is held by a stuck worker");
    drop(front);
    let mut client = bed.connect(1).unwrap();
    client.read_at(0, 4096).unwrap();
    drop(client);
    assert!(bed.daemon.sigterm().unwrap().success());
}
