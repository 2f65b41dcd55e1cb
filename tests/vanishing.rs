// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory that vanishes under the daemon, in every way that makes the kernel send SIGBUS: the session ends, and
//! nothing else does (R18a).

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::path::Path;

use integration::rig::command::run;
use integration::rig::filesystem::Filesystem;
use integration::rig::frontend::{self, Frontend, kind};
use integration::rig::model::Model;
use integration::rig::ring::{Descriptor, NEXT, RING_MEMORY, Ring, WRITE};
use integration::rig::wait::{PATIENCE, until};
use integration::rig::workload::Workload;
use integration::rig::{Backing, Bed, ClientOptions, Fleet, Kind, Layout, Rig, Setup};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const FEATURES: u64 = frontend::VERSION_1 | frontend::FLUSH;
const MIB: u64 = 1 << 20;
const IOERR: u8 = 1;
/// What the log says, once for each session that has lost memory.
const LINE: &str = "guest memory is missing";

/// The file behind a frontend's memory.
fn file(front: &Frontend) -> File {
    let region = front.memory.iter().next().unwrap();
    vm_memory::GuestMemoryRegion::file_offset(region).unwrap().file().try_clone().unwrap()
}

/// `act` costs its session, which says so in one line while the frontend is still there; the daemon lives and serves the
/// next one.
fn costs_its_session(bed: &Bed, what: &str, act: impl FnOnce() -> Frontend) {
    println!("{what}");
    let told = || bed.daemon.log().matches(LINE).count();
    let before = told();
    let front = act();
    until("the session's end", PATIENCE, || (told() > before).then_some(())).unwrap();
    drop(front);
    let mut client = bed.connect(2).unwrap_or_else(|error| panic!("after {what}: {error}"));
    let bytes = client.read_at(0, 256 << 10).unwrap();
    bed.model.check(0, &bytes).unwrap_or_else(|error| panic!("after {what}: {error}"));
    client.flush().unwrap();
    assert_eq!(told(), before + 1, "one line: {}", bed.daemon.log());
}

/// A request of one sector whose data lie at `data`.
fn describe(ring: &Ring, request: u32, data: u64, flags: u16) {
    ring.write_header(0, request, 0).unwrap();
    let status = ring.header(0) + 16;
    let chain = [
        Descriptor { addr: ring.header(0), len: 16, flags: NEXT, next: 1 },
        Descriptor { addr: data, len: 512, flags: NEXT | flags, next: 2 },
        Descriptor { addr: status, len: 1, flags: WRITE, next: 0 },
    ];
    for (index, descriptor) in (0..).zip(chain) {
        ring.describe(index, descriptor).unwrap();
    }
}

/// Shortens the memory to 1 MiB, which leaves the ring, and has a request's data lie behind that.
fn data_gone(bed: &Bed, what: &str, request: u32, data: u64, flags: u16) {
    costs_its_session(bed, what, || {
        let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
        file(&front).set_len(MIB).unwrap();
        let ring = front.ring_mut(0).unwrap();
        describe(ring, request, data, flags);
        ring.publish(0).unwrap();
        ring.kick().unwrap();
        ring.wait_used(PATIENCE).unwrap();
        assert_eq!(ring.status(0).unwrap(), IOERR, "{what}");
        front
    });
}

#[test]
fn a_memfd_that_is_shortened_costs_its_session() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    costs_its_session(&bed, "a ring that is gone when it is kicked", || {
        let front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
        file(&front).set_len(0).unwrap();
        front.ring(0).unwrap().kick().unwrap();
        front
    });
    // Behind what is left, and not where a disk could read or write it directly.
    let odd = 2 * MIB + 1;
    data_gone(&bed, "a read into a bounced buffer that is gone", kind::IN, odd, WRITE);
    data_gone(&bed, "a write from a bounced buffer that is gone", kind::OUT, odd, 0);
    let part = MIB - 256;
    data_gone(&bed, "a write from a buffer that is half gone", kind::OUT, part, 0);
    costs_its_session(&bed, "a ring that is gone when its address is set", || {
        let mut front = Frontend::connect(bed.daemon.socket(), 1, 64).unwrap();
        front.negotiate(FEATURES).unwrap();
        front.share_memory().unwrap();
        file(&front).set_len(0).unwrap();
        // It may be answered or not: the session ends meanwhile.
        let _ = front.set_up(0, 0);
        front
    });
    bed.finish().unwrap();
}

/// The kernel itself writes there, and says EFAULT.
#[test]
fn direct_io_into_memory_that_is_gone_is_an_error_of_that_request() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    file(&front).set_len(MIB).unwrap();
    let ring = front.ring_mut(0).unwrap();
    for round in 0..2 {
        describe(ring, kind::IN, 2 * MIB, WRITE);
        ring.publish(0).unwrap();
        ring.kick().unwrap();
        ring.wait_used(PATIENCE).unwrap();
        assert_eq!(ring.status(0).unwrap(), IOERR, "round {round}");
    }
    assert!(!bed.daemon.log().contains(LINE));
    drop(front);
    bed.finish().unwrap();
}

/// The kernel holds on to the pages that it was given, whatever becomes of their file.
#[test]
fn pinned_memory_that_is_shortened_harms_nobody() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &["--pin-memory"]).unwrap();
    bed.await_direct(PATIENCE).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    let pinned = !bed.daemon.log().contains("not pinned");
    file(&front).set_len(MIB).unwrap();
    let ring = front.ring_mut(0).unwrap();
    for round in 0..2 {
        describe(ring, kind::IN, 2 * MIB, WRITE);
        ring.publish(0).unwrap();
        ring.kick().unwrap();
        ring.wait_used(PATIENCE).unwrap();
        let status = ring.status(0).unwrap();
        assert_eq!(status, if pinned { 0 } else { IOERR }, "round {round}");
    }
    assert!(!bed.daemon.log().contains(LINE));
    drop(front);
    let odd = 2 * MIB + 1;
    data_gone(&bed, "a read into a bounced buffer that is gone", kind::IN, odd, WRITE);
    data_gone(&bed, "a write from a bounced buffer that is gone", kind::OUT, odd, 0);
    bed.finish().unwrap();
}

#[test]
fn huge_pages_that_the_host_does_not_have_cost_their_session() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(memfd_create("guest-ram", flags).unwrap());
    file.set_len(4 * MIB).unwrap();
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.is_ok_and(|free| free.trim() != "0") {
        println!("skipped: this host has huge pages to spare");
        return;
    }
    costs_its_session(&bed, "huge pages that are not there", || {
        let mut front = Frontend::over(bed.daemon.socket(), file, 1, 64).unwrap();
        front.negotiate(FEATURES).unwrap();
        front.share_memory().unwrap();
        let _ = front.set_up(0, 0);
        front
    });
    bed.finish().unwrap();
}

#[test]
fn a_tmpfs_without_room_costs_its_session() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let dir = rig.dir("small").unwrap();
    let path = dir.to_str().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=64k", "extentd-test", path]).unwrap();
    let file = dir.join("ram");
    let file = File::options().read(true).write(true).create_new(true).open(file).unwrap();
    file.set_len(RING_MEMORY).unwrap();
    costs_its_session(&bed, "a read into a file for which its tmpfs has no room", || {
        let mut front = Frontend::over(bed.daemon.socket(), file, 1, 64).unwrap();
        front.bring_up(FEATURES).unwrap();
        let ring = front.ring_mut(0).unwrap();
        let data = Descriptor { addr: 2 * MIB + 1, len: 512 << 10, flags: NEXT | WRITE, next: 2 };
        describe(ring, kind::IN, data.addr, WRITE);
        ring.describe(1, data).unwrap();
        ring.publish(0).unwrap();
        ring.kick().unwrap();
        ring.wait_used(PATIENCE).unwrap();
        assert_eq!(ring.status(0).unwrap(), IOERR);
        front
    });
    bed.finish().unwrap();
}

/// A region that begins inside its file, and one session after the other on the same memory.
#[test]
fn memory_that_comes_and_goes_with_sessions_is_watched_each_time() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    for round in 0..5 {
        costs_its_session(&bed, "a second region", || {
            let mut front = Frontend::connect(bed.daemon.socket(), 1, 64).unwrap();
            front.negotiate(FEATURES).unwrap();
            let file = File::from(memfd_create("more", MemfdFlags::CLOEXEC).unwrap());
            file.set_len(3 * MIB).unwrap();
            let len = usize::try_from(2 * MIB).unwrap();
            let more = Some(FileOffset::new(file.try_clone().unwrap(), MIB));
            let range = (GuestAddress(1 << 30), len, more);
            let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap();
            let info = |memory: &GuestMemoryMmap| {
                VhostUserMemoryRegionInfo::from_guest_region(memory.iter().next().unwrap()).unwrap()
            };
            let both = [info(&front.memory), info(&memory)];
            front.wire.set_mem_table(&both).unwrap();
            file.set_len(round * MIB / 2).unwrap();
            let address = both[1].userspace_addr + MIB + 4096 * round;
            let config = VringConfigData {
                queue_max_size: 64,
                queue_size: 64,
                flags: 0,
                desc_table_addr: both[0].userspace_addr,
                used_ring_addr: address,
                avail_ring_addr: both[0].userspace_addr + 65536,
                log_addr: None,
            };
            front.wire.set_vring_num(0, 64).unwrap();
            let _ = front.wire.set_vring_addr(0, &config);
            front
        });
    }
    bed.finish().unwrap();
}

#[test]
fn the_neighbours_of_a_device_whose_guest_loses_its_memory_go_on() {
    let Some(rig) = Rig::enter() else { return };
    let fs = rig.dir("fs").unwrap();
    let fs = Filesystem::make(Kind::Ext4, 64 * MIB, 512, &Backing::Memory, &fs).unwrap();
    let image = |name: &str, seed| {
        let path = fs.path().join(name);
        let model = Model::new(Layout::Written.make(&path, 8 * MIB, seed).unwrap());
        (path, model)
    };
    let ((hostile, _), (good, mut model)) = (image("hostile", 1), image("good", 2));
    let devices: [(&Path, &str); 2] = [(&hostile, ""), (&good, "")];
    let mut fleet = Fleet::start(PROGRAM, &rig.dir("run").unwrap(), &devices).unwrap();
    let mut client = fleet.connect(1, &ClientOptions::queues(2)).unwrap();
    let load = Workload { requests: 2000, ..Workload::default() };
    std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| load.run(client.queues(), &mut model).unwrap());
        for _ in 0..5 {
            let front = Frontend::start(&fleet.socket(0), 1, 64, FEATURES).unwrap();
            file(&front).set_len(0).unwrap();
            front.ring(0).unwrap().kick().unwrap();
            let gone = || fleet.status(0).unwrap().text("/frontend") != "connected";
            until("the session's end", PATIENCE, || gone().then_some(())).unwrap();
        }
        neighbour.join().unwrap();
    });
    drop(client);
    assert!(fleet.daemon.sigterm().unwrap().success(), "{}", fleet.daemon.log());
}
