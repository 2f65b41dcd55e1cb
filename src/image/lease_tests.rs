// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Leases: who is told, who gets in, and what giving one back must not wait for.

use std::fs::{self, File};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::fixture::{
    Disk, ENTERED, blocks, device_test, map_some, open, options, picture, read_raw, sh, try_open,
};
use super::*;
use crate::engine::message::Job;
use crate::sys::page_cache;

/// What a lease of ours that nobody serves would take much longer than.
const AT_ONCE: Duration = Duration::from_secs(20);

fn wait_for_break(signals: &LeaseSignals) -> LeaseSignal {
    let since = Instant::now();
    loop {
        if let Some(signal) = signals.next().unwrap() {
            return signal;
        }
        assert!(since.elapsed() < AT_ONCE, "no lease break arrived");
        thread::sleep(Duration::from_millis(1));
    }
}

device_test!(a_lease_taken_by_a_helper_thread_breaks_here, {
    let signals = block_lease_signals().unwrap();
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let image = open(&path);
    let helper = Arc::clone(&image);
    // The thread has ended when the break comes.
    assert_eq!(thread::spawn(move || helper.run(&Job::Enter)).join().unwrap(), ENTERED);
    assert_eq!(signals.next().unwrap(), None);
    let since = Instant::now();
    let reader = thread::spawn(move || fs::read(path).unwrap().len());
    let want = LeaseSignal::Break(std::os::fd::AsRawFd::as_raw_fd(&image.image_fd()));
    assert_eq!(wait_for_break(&signals), want);
    image.drop_lease();
    assert_eq!(reader.join().unwrap(), 65536);
    assert!(since.elapsed() < AT_ONCE);
    assert_eq!(signals.next().unwrap(), None);
    assert_eq!(image.run(&Job::Enter), ENTERED);
});

device_test!(readers_share_and_a_writer_breaks_them, {
    let signals = block_lease_signals().unwrap();
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let read_only = Options { read_only: true, ..options(&path) };
    let (one, two) = (try_open(&read_only).unwrap(), try_open(&read_only).unwrap());
    assert_eq!((one.run(&Job::Enter), two.run(&Job::Enter)), (ENTERED, ENTERED));
    assert_eq!(picture(&one, blocks(0, 16)), "mmmmmmmmmmmmmmmm");
    fs::read(&path).unwrap();
    assert_eq!(signals.next().unwrap(), None, "a reader breaks no read lease");
    let writer = thread::spawn(move || File::options().write(true).open(path).map(drop));
    let mut fds: Vec<LeaseSignal> = (0..2).map(|_| wait_for_break(&signals)).collect();
    fds.dedup();
    assert_eq!(fds.len(), 2);
    one.drop_lease();
    two.drop_lease();
    writer.join().unwrap().unwrap();
});

device_test!(dropping_the_lease_does_not_wait_for_a_frozen_filesystem, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    let mount = disk.path();
    sh(&format!("fsfreeze -f {}", mount.display()));
    let (done, dropped) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            image.drop_lease();
            done.send(()).unwrap();
        });
        let in_time = dropped.recv_timeout(AT_ONCE);
        sh(&format!("fsfreeze -u {}", mount.display()));
        in_time.unwrap();
    });
});

device_test!(dirty_pages_are_left_alone_when_the_lease_goes, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    // A buffered write by the one description there is, as an O_DIRECT fallback leaves it.
    rustix::fs::fcntl_setfl(image.image_fd(), rustix::fs::OFlags::empty()).unwrap();
    rustix::io::pwrite(image.image_fd(), &[5; 100], 0).unwrap();
    rustix::fs::fcntl_setfl(image.image_fd(), rustix::fs::OFlags::DIRECT).unwrap();
    image.drop_lease();
    let pages = page_cache::pages(image.image_fd(), FileRange::ALL).unwrap();
    assert!(pages.unwritten.is_none_or(|unwritten| unwritten == 1));
    // And direct mode gets rid of it.
    assert_eq!(image.run(&Job::Enter), ENTERED);
    let answer = map_some(&image, blocks(0, 1), 1);
    assert_eq!(read_raw(&image, answer.extents[0].device.0)[..100], [5; 100]);
});

device_test!(a_lease_of_a_dying_process_is_waited_for, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let other = File::options().read(true).write(true).open(&path).unwrap();
    // As the lease of a killed extentd whose last write is still on its way: nobody serves its break.
    lease::take(other.as_fd(), lease::Kind::Write, lease_signal()).unwrap();
    assert!(matches!(try_open(&options(&path)), Err(OpenError::Locked { .. })));
    let since = Instant::now();
    let end = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(other);
    });
    let image = Image::open_within(&options(&path), Duration::from_secs(10)).unwrap();
    assert!(since.elapsed() >= Duration::from_millis(300));
    end.join().unwrap();
    assert_eq!(image.run(&Job::Enter), ENTERED);
});

device_test!(the_end_of_the_image_is_the_end_of_lease_and_locks, {
    let disk = Disk::ext4();
    let path = disk.file("image", 16);
    let image = open(&path);
    assert_eq!(image.run(&Job::Enter), ENTERED);
    drop(image);
    let since = Instant::now();
    let image = open(&path);
    assert!(since.elapsed() < AT_ONCE);
    assert_eq!(image.run(&Job::Enter), ENTERED);
});
