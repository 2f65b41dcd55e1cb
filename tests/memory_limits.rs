// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What one guest or frontend may take of what all devices of a process share: descriptors, mappings, memory, CPU.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use integration::rig::filesystem::Filesystem;
use integration::rig::frontend::{self, Frontend, kind};
use integration::rig::ring::{Descriptor, INDIRECT, NEXT, RING_MEMORY, WRITE};
use integration::rig::wait::{PATIENCE, until};
use integration::rig::{Backing, Bed, ClientOptions, Fleet, Kind, Layout, Rig, Setup};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const FEATURES: u64 = frontend::VERSION_1 | frontend::FLUSH | frontend::INDIRECT_DESC;

/// A page of guest memory, as many times as it is asked for.
struct Page(GuestMemoryMmap);

impl Page {
    fn new() -> Page {
        let file = File::from(memfd_create("page", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(4096).unwrap();
        let range = (GuestAddress(0), 4096, Some(FileOffset::new(file, 0)));
        Page(GuestMemoryMmap::from_ranges_with_files([range]).unwrap())
    }

    /// Its description as region `number` of a guest.
    fn region(&self, number: u64) -> VhostUserMemoryRegionInfo {
        let region = self.0.iter().next().unwrap();
        let mut info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        info.guest_phys_addr = number << 20;
        info.userspace_addr = 0x7f00_0000_0000 + (number << 20);
        info
    }
}

/// Adds regions until the session ends; how many there were.
fn add_regions(front: &mut Frontend, page: &Page, most: u64) -> u64 {
    let add = |number: &u64| front.wire.add_mem_region(&page.region(*number)).is_err();
    (0..most).find(add).unwrap_or(most)
}

#[test]
fn a_session_has_as_many_memory_regions_as_it_was_told_and_no_more() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let before = bed.daemon.open_files().unwrap();
    let mut front = Frontend::connect(bed.daemon.socket(), 1, 64).unwrap();
    front.negotiate(FEATURES).unwrap();
    let slots = front.wire.get_max_mem_slots().unwrap();
    let page = Page::new();
    // Regions that went do not count.
    for _ in 0..slots {
        front.wire.add_mem_region(&page.region(1)).unwrap();
        front.wire.remove_mem_region(&page.region(1)).unwrap();
    }
    assert_eq!(add_regions(&mut front, &page, slots + 10), slots);
    until("the line", PATIENCE, || bed.daemon.log().contains("memory regions").then_some(()))
        .unwrap();
    drop(front);
    let back = || bed.daemon.open_files().is_ok_and(|files| files <= before).then_some(());
    until("the descriptors", PATIENCE, back).unwrap();
    bed.finish().unwrap();
}

#[test]
fn a_session_has_so_much_address_space_and_no_more() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = Frontend::connect(bed.daemon.socket(), 1, 64).unwrap();
    front.negotiate(FEATURES).unwrap();
    let file = memfd_create("huge", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 1 << 46).unwrap();
    let info = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 1 << 46,
        userspace_addr: 0,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    front.wire.set_mem_table(&[info]).unwrap_err();
    let line = || bed.daemon.log().contains("bytes of guest memory").then_some(());
    until("the line", PATIENCE, line).unwrap();
    drop(front);
    bed.connect(1).unwrap().read_at(0, 4096).unwrap();
    bed.finish().unwrap();
}

/// The process has few descriptors; one frontend takes all of its device's.
#[test]
fn a_device_cannot_take_its_neighbours_descriptors() {
    let Some(rig) = Rig::enter() else { return };
    let fs = rig.dir("fs").unwrap();
    let fs = Filesystem::make(Kind::Ext4, 64 << 20, 512, &Backing::Memory, &fs).unwrap();
    let images = ["a", "b", "c"].map(|name| fs.path().join(name));
    for (image, seed) in images.iter().zip(1..) {
        Layout::Written.make(image, 8 << 20, seed).unwrap();
    }
    let run = rig.dir("run").unwrap();
    let script = run.join("few-descriptors");
    fs::write(&script, format!("#!/bin/sh\nulimit -n 1000\nexec {PROGRAM} \"$@\"\n")).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    let devices: Vec<(&Path, &str)> = images.iter().map(|image| (image.as_path(), "")).collect();
    let mut fleet = Fleet::start(script.to_str().unwrap(), &run, &devices).unwrap();
    let mut hostile = Vec::new();
    for device in 0..2 {
        let mut front = Frontend::connect(&fleet.socket(device), 1, 64).unwrap();
        front.negotiate(FEATURES).unwrap();
        let slots = front.wire.get_max_mem_slots().unwrap();
        assert!((8..333).contains(&slots), "{slots}");
        assert_eq!(add_regions(&mut front, &Page::new(), slots), slots);
        hostile.push(front);
    }
    let mut client = fleet.connect(2, &ClientOptions::queues(8)).unwrap();
    client.read_at(0, 65536).unwrap();
    drop((client, hostile));
    assert!(fleet.daemon.sigterm().unwrap().success(), "{}", fleet.daemon.log());
}

#[test]
fn an_eventfd_that_is_replaced_is_closed() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    let files = || bed.daemon.open_files().unwrap();
    let before = files();
    for _ in 0..200 {
        front.set_kick(0).unwrap();
        front.set_call(0).unwrap();
        front.wire.set_vring_err(0, &front.ring(0).unwrap().err).unwrap();
    }
    until("the old ones' end", PATIENCE, || (files() <= before).then_some(())).unwrap();
    drop(front);
    bed.finish().unwrap();
}

/// Queues full of chains of a thousand unaligned pieces each.
#[test]
fn long_chains_cost_little_memory() {
    const QUEUES: u16 = 16;
    const SIZE: u16 = 1024;
    const PIECES: u64 = 1000;
    /// All that they may cost, in KiB.
    const MOST: u64 = 64 << 10;
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &["--num-queues", "16"]).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), QUEUES, SIZE, FEATURES).unwrap();
    let before = bed.daemon.resident_kib().unwrap();
    for index in 0..usize::from(QUEUES) {
        let ring = front.ring_mut(index).unwrap();
        ring.write_header(0, kind::IN, 0).unwrap();
        let (table, data) = (ring.data(0), ring.data(16) + 1);
        let piece = |n| Descriptor { addr: data + n * 513, len: 512, flags: NEXT | WRITE, next: 0 };
        let mut chain = vec![Descriptor { addr: ring.header(0), len: 16, flags: NEXT, next: 0 }];
        chain.extend((0..PIECES).map(piece));
        chain.push(Descriptor { addr: ring.header(0) + 16, len: 1, flags: WRITE, next: 0 });
        for (at, part) in (0_u16..).zip(&chain) {
            let mut bytes = part.addr.to_le_bytes().to_vec();
            bytes.extend(part.len.to_le_bytes());
            bytes.extend(part.flags.to_le_bytes());
            bytes.extend((at + 1).to_le_bytes());
            ring.write_bytes(&bytes, table + u64::from(at) * 16).unwrap();
        }
        let len = u32::try_from(chain.len() * 16).unwrap();
        for head in 0..SIZE {
            let indirect = Descriptor { addr: table, len, flags: INDIRECT, next: 0 };
            ring.describe(head, indirect).unwrap();
            ring.publish(head).unwrap();
        }
    }
    (0..usize::from(QUEUES)).for_each(|index| front.ring(index).unwrap().kick().unwrap());
    let mut peak = before;
    until("all answers", 4 * PATIENCE, || {
        peak = peak.max(bed.daemon.resident_kib().ok()?);
        let done = |index| front.ring(index).unwrap().used_index().unwrap() == SIZE;
        (0..usize::from(QUEUES)).all(done).then_some(())
    })
    .unwrap();
    assert!(front.ring(0).unwrap().status(0).unwrap() == 0);
    println!("{before} KiB before, {peak} KiB at most");
    assert!(peak < before + MOST, "{before} KiB before, {peak} KiB at most");
    drop(front);
    bed.finish().unwrap();
}

/// Sets up ring 0 with its used ring at `used`, in the address space of the frontend, and offers something.
fn odd_ring(front: &mut Frontend, used: u64) {
    let start = front.memory.get_host_address(GuestAddress(0)).unwrap() as u64;
    front.set_up(0, 0).unwrap();
    let ring = front.ring(0).unwrap();
    let config = VringConfigData {
        queue_max_size: 64,
        queue_size: 64,
        flags: 0,
        desc_table_addr: start + ring.table(),
        used_ring_addr: used,
        avail_ring_addr: start + ring.avail(),
        log_addr: None,
    };
    // The available index is ahead of the used one, which it follows from then on.
    ring.set_avail_index(8).unwrap();
    front.wire.set_vring_addr(0, &config).unwrap();
    ring.set_avail_index(16).unwrap();
    for head in 0..64 {
        let ring = front.ring(0).unwrap();
        ring.describe(head, Descriptor { addr: ring.header(0), len: 17, flags: WRITE, next: 0 })
            .unwrap();
    }
    front.set_call(0).unwrap();
    front.set_kick(0).unwrap();
    front.enable(0, true).unwrap();
    front.ring(0).unwrap().kick().unwrap();
}

/// A broken queue is told of by the error signal and a line, costs no CPU, and is as new when it is set up anew.
fn breaks_its_queue(bed: &Bed, front: &Frontend) {
    let ring = front.ring(0).unwrap();
    let told = || ring.err.read().is_ok().then_some(());
    until("the error signal", PATIENCE, told).unwrap();
    let line = || bed.daemon.log().contains("lie over each other").then_some(());
    until("the line", PATIENCE, line).unwrap();
    let before = bed.daemon.cpu_ticks().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let spent = bed.daemon.cpu_ticks().unwrap() - before;
    assert!(spent <= 5, "{spent} of 100 ticks");
}

#[test]
fn a_ring_over_itself_is_broken() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = Frontend::connect(bed.daemon.socket(), 1, 64).unwrap();
    front.negotiate(FEATURES).unwrap();
    front.share_memory().unwrap();
    let start = front.memory.get_host_address(GuestAddress(0)).unwrap() as u64;
    let avail = start + front.ring(0).unwrap().avail();
    odd_ring(&mut front, avail);
    breaks_its_queue(&bed, &front);
    drop(front);
    bed.connect(1).unwrap().read_at(0, 4096).unwrap();
    bed.finish().unwrap();
}

/// The same memory is at two guest addresses.
#[test]
fn a_ring_over_itself_by_another_address_is_broken() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = Frontend::connect(bed.daemon.socket(), 1, 64).unwrap();
    front.negotiate(FEATURES).unwrap();
    let region = front.memory.iter().next().unwrap();
    let mut twin = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
    let first = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
    twin.guest_phys_addr = 1 << 30;
    twin.userspace_addr = 0x6f00_0000_0000;
    front.wire.set_mem_table(&[first, twin]).unwrap();
    assert!(front.ring(0).unwrap().avail() < RING_MEMORY);
    let avail = 0x6f00_0000_0000 + front.ring(0).unwrap().avail();
    odd_ring(&mut front, avail);
    breaks_its_queue(&bed, &front);
    drop(front);
    bed.finish().unwrap();
}
