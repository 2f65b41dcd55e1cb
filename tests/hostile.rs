// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests and frontends that mean harm: each ends in an error, and the daemon serves the next one as if nothing had been.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use integration::rig::command::close;
use integration::rig::frontend::{self, Frontend, kind};
use integration::rig::ring::{Descriptor, INDIRECT, NEXT, Ring, WRITE};
use integration::rig::wait::PATIENCE;
use integration::rig::{Bed, Rig, Setup};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const PROGRAM: &str = env!("CARGO_BIN_EXE_extentd");
const FEATURES: u64 = frontend::VERSION_1 | frontend::FLUSH | frontend::INDIRECT_DESC;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A well-behaved frontend is served, and the image is what it was.
fn healthy(bed: &Bed, after: &str) {
    let mut client = bed
        .connect(2)
        .unwrap_or_else(|error| panic!("after {after}: {error}; log: {}", bed.daemon.log()));
    for offset in (0..bed.model.size()).step_by(256 << 10) {
        let bytes = client.read_at(offset, 256 << 10).unwrap();
        bed.model.check(offset, &bytes).unwrap_or_else(|error| panic!("after {after}: {error}"));
    }
    client.flush().unwrap();
}

fn data(ring: &Ring, len: u32, flags: u16) -> Descriptor {
    Descriptor { addr: ring.data(0), len, flags, next: 0 }
}

/// Describes `chain` from descriptor 0 on, linked in order, with its request's header and status place at head 0.
fn chain(ring: &Ring, chain: &[Descriptor]) {
    for (index, descriptor) in (0_u16..).zip(chain) {
        let next = if descriptor.flags & NEXT != 0 { index + 1 } else { 0 };
        ring.describe(index, Descriptor { next, ..*descriptor }).unwrap();
    }
}

/// Publishes chain 0 and waits; the status byte, if it was answered at all.
fn send(front: &mut Frontend, answered: bool) -> Option<u8> {
    let ring = front.ring_mut(0).unwrap();
    ring.publish(0).unwrap();
    ring.kick().unwrap();
    match ring.wait_used(if answered { PATIENCE } else { Duration::from_millis(300) }) {
        Ok(used) => {
            assert_eq!(used.id, 0);
            Some(ring.status(0).unwrap())
        }
        Err(error) if answered => panic!("{error}"),
        Err(_) => None,
    }
}

type Build = fn(&Ring);

fn run(what: &str, build: Build, expected: Option<u8>) {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    one(&bed, what, build, expected);
}

/// `expected`: the status the device must write; `None`: whatever it does, as long as it lives.
fn one(bed: &Bed, what: &str, build: Build, expected: Option<u8>) {
    println!("{what}");
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    build(front.ring(0).unwrap());
    let status = send(&mut front, expected.is_some());
    if let Some(expected) = expected {
        assert_eq!(status, Some(expected), "{what}");
    }
    drop(front);
    healthy(bed, what);
}

fn head(ring: &Ring, request: u32, sector: u64, len: u32) -> Descriptor {
    ring.write_header(0, request, sector).unwrap();
    Descriptor { addr: ring.header(0), len, flags: NEXT, next: 0 }
}

fn status(ring: &Ring) -> Descriptor {
    Descriptor { addr: ring.header(0) + 16, len: 1, flags: WRITE, next: 0 }
}

#[test]
fn requests_that_make_no_sense_end_in_their_status() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let cases: &[(&str, Build, u8)] = &[
        ("a read past the end", |r| r.prepare(0, kind::IN, 16 << 11, 512, true).unwrap(), IOERR),
        (
            "a read across the end",
            |r| r.prepare(0, kind::IN, (16 << 10) - 1, 1024, true).unwrap(),
            IOERR,
        ),
        ("a write past the end", |r| r.prepare(0, kind::OUT, 1 << 40, 512, false).unwrap(), IOERR),
        (
            "a sector that overflows",
            |r| r.prepare(0, kind::IN, u64::MAX, 512, true).unwrap(),
            IOERR,
        ),
        ("bytes that overflow", |r| r.prepare(0, kind::OUT, 1 << 55, 512, false).unwrap(), IOERR),
        ("a read of part of a sector", |r| r.prepare(0, kind::IN, 0, 100, true).unwrap(), IOERR),
        ("a write of part of a sector", |r| r.prepare(0, kind::OUT, 0, 511, false).unwrap(), IOERR),
        ("a request of no known type", |r| r.prepare(0, 4711, 0, 512, true).unwrap(), UNSUPPORTED),
        (
            "a secure erase, which was not offered",
            |r| r.prepare(0, 14, 0, 16, false).unwrap(),
            UNSUPPORTED,
        ),
        ("a discard of part of a range", |r| r.prepare(0, 11, 0, 17, false).unwrap(), IOERR),
        (
            "a discard of more ranges than were offered",
            |r| r.prepare(0, 11, 0, 65 * 16, false).unwrap(),
            IOERR,
        ),
        (
            "zeroes over ranges that are not there",
            |r| {
                let bad = Descriptor { addr: 1 << 40, len: 16, flags: NEXT, next: 0 };
                chain(r, &[head(r, 13, 0, 16), bad, status(r)]);
            },
            IOERR,
        ),
        (
            "a read into memory that is not there",
            |r| {
                let bad = Descriptor { addr: 1 << 40, len: 512, flags: NEXT | WRITE, next: 0 };
                chain(r, &[head(r, kind::IN, 0, 16), bad, status(r)]);
            },
            IOERR,
        ),
        (
            "a write from memory that is not there",
            |r| {
                let bad = Descriptor { addr: u64::MAX - 100, len: 512, flags: NEXT, next: 0 };
                chain(r, &[head(r, kind::OUT, 0, 16), bad, status(r)]);
            },
            IOERR,
        ),
        (
            "a read into a buffer the device may not write",
            |r| {
                chain(r, &[head(r, kind::IN, 0, 16), data(r, 512, NEXT), status(r)]);
            },
            IOERR,
        ),
        (
            "a header split over two descriptors",
            |r| {
                let first = head(r, kind::IN, 0, 7);
                let second = Descriptor { addr: first.addr + 7, len: 9, ..first };
                chain(r, &[first, second, data(r, 4096, NEXT | WRITE), status(r)]);
            },
            OK,
        ),
        (
            "data and status in one descriptor",
            |r| {
                let at = r.header(0) + 16 - 4096;
                let both = Descriptor { addr: at, len: 4097, flags: WRITE, next: 0 };
                chain(r, &[head(r, kind::IN, 0, 16), both]);
            },
            OK,
        ),
    ];
    for (what, build, expected) in cases {
        one(&bed, what, *build, Some(*expected));
    }
}

#[test]
fn chains_that_are_not_requests_harm_nobody() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let cases: &[(&str, Build)] = &[
        ("a short header", |r| {
            chain(r, &[head(r, kind::IN, 0, 15), data(r, 512, NEXT | WRITE), status(r)])
        }),
        ("a status alone", |r| chain(r, &[status(r)])),
        ("no status", |r| chain(r, &[head(r, kind::OUT, 0, 16), data(r, 512, 0)])),
        ("a header alone", |r| chain(r, &[Descriptor { flags: 0, ..head(r, kind::FLUSH, 0, 16) }])),
        ("a loop", |r| {
            r.describe(0, Descriptor { next: 1, ..head(r, kind::IN, 0, 16) }).unwrap();
            r.describe(1, Descriptor { next: 1, ..data(r, 512, NEXT | WRITE) }).unwrap();
        }),
        ("a next outside the table", |r| {
            r.describe(0, Descriptor { next: 65535, ..head(r, kind::IN, 0, 16) }).unwrap();
        }),
        ("four gigabytes of data", |r| {
            let huge = Descriptor { addr: 0, len: u32::MAX, flags: NEXT | WRITE, next: 0 };
            chain(r, &[head(r, kind::IN, 0, 16), huge, huge, status(r)]);
        }),
        ("empty data descriptors", |r| {
            chain(
                r,
                &[
                    head(r, kind::IN, 0, 16),
                    data(r, 0, NEXT | WRITE),
                    data(r, 0, NEXT | WRITE),
                    status(r),
                ],
            );
        }),
        ("a readable descriptor after a writable one", |r| {
            chain(
                r,
                &[
                    head(r, kind::OUT, 0, 16),
                    data(r, 512, NEXT | WRITE),
                    data(r, 512, NEXT),
                    status(r),
                ],
            );
        }),
        ("an indirect table of odd length", |r| {
            chain(r, &[Descriptor { flags: INDIRECT, ..data(r, 17, 0) }])
        }),
        ("an empty indirect table", |r| {
            chain(r, &[Descriptor { flags: INDIRECT, ..data(r, 0, 0) }])
        }),
        ("an indirect table outside the memory", |r| {
            chain(r, &[Descriptor { addr: 1 << 50, len: 160, flags: INDIRECT, next: 0 }]);
        }),
        ("an indirect table in an indirect table", |r| {
            let table = Descriptor { addr: r.table(), len: 16, flags: INDIRECT, next: 0 };
            chain(r, &[table]);
        }),
        ("an indirect table that goes on", |r| {
            let table = Descriptor { flags: INDIRECT | NEXT, ..data(r, 48, 0) };
            chain(r, &[table, status(r)]);
        }),
    ];
    for (what, build) in cases {
        one(&bed, what, *build, None);
    }
}

#[test]
fn a_request_in_an_indirect_table() {
    run(
        "an indirect read",
        |ring| {
            let table = ring.data(8);
            let parts = [head(ring, kind::IN, 0, 16), data(ring, 4096, NEXT | WRITE), status(ring)];
            for (index, part) in (0_u16..).zip(parts) {
                let mut bytes = part.addr.to_le_bytes().to_vec();
                bytes.extend(part.len.to_le_bytes());
                bytes.extend(part.flags.to_le_bytes());
                bytes.extend((index + 1).to_le_bytes());
                ring.write_bytes(&bytes, table + u64::from(index) * 16).unwrap();
            }
            chain(ring, &[Descriptor { addr: table, len: 48, flags: INDIRECT, next: 0 }]);
        },
        Some(OK),
    );
}

#[test]
fn an_available_ring_that_lies_harms_nobody() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    for jump in [65, 1000, 65535] {
        let front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
        let ring = front.ring(0).unwrap();
        ring.set_avail_index(jump).unwrap();
        ring.kick().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        drop(front);
        healthy(&bed, "a jump of the available index");
    }
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    let ring = front.ring_mut(0).unwrap();
    ring.publish(64).unwrap();
    ring.publish(65535).unwrap();
    ring.kick().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(front);
    healthy(&bed, "heads outside the table");
}

#[test]
fn a_vring_outside_the_memory_harms_nobody() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = Frontend::start(bed.daemon.socket(), 1, 64, FEATURES).unwrap();
    let start = front.memory.get_host_address(GuestAddress(0)).unwrap() as u64;
    let ring = front.ring(0).unwrap();
    let config = VringConfigData {
        queue_max_size: 64,
        queue_size: 64,
        flags: 0,
        desc_table_addr: start + integration::rig::ring::RING_MEMORY - 16,
        used_ring_addr: start + ring.used(),
        avail_ring_addr: start + ring.avail(),
        log_addr: None,
    };
    let _ = front.wire.set_vring_addr(0, &config);
    let _ = front.enable(0, true);
    if let Ok(ring) = front.ring_mut(0) {
        ring.publish(8).unwrap();
        ring.kick().unwrap();
    }
    std::thread::sleep(Duration::from_millis(100));
    drop(front);
    healthy(&bed, "a descriptor table that ends outside the memory");
}

/// A region longer than its file: touching its end is SIGBUS.
#[test]
fn a_region_longer_than_its_file_does_not_kill_us() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut front = Frontend::connect(bed.daemon.socket(), 1, 64).unwrap();
    front.negotiate(FEATURES).unwrap();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(rig.path().join("ram"))
        .unwrap();
    file.set_len(8 << 20).unwrap();
    let range = (GuestAddress(0), 8 << 20, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap();
    let region = memory.iter().next().unwrap();
    let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
    file.set_len(4096).unwrap();
    let refused = front.wire.set_mem_table(&[info]).is_err();
    assert!(refused, "a region of 8 MiB in a file of 4 KiB was accepted");
    drop(front);
    healthy(&bed, "a region longer than its file");
}

#[test]
fn noise_on_the_socket_ends_only_its_session() {
    let Some(rig) = Rig::enter() else { return };
    let bed = Bed::make(&rig, PROGRAM, &Setup::default(), &[]).unwrap();
    let mut random = integration::rig::Random::new(9);
    for len in [1, 11, 12, 13, 100, 4096] {
        let mut stream = UnixStream::connect(bed.daemon.socket()).unwrap();
        let _ = stream.write_all(&random.bytes(len));
        close(stream);
        healthy(&bed, "noise");
    }
    // A valid header of an unknown request, and one that promises more than it sends.
    for header in [[77_u32, 1, 8], [1, 1, 4096], [5, 1, 0], [5, 1, u32::MAX]] {
        let mut stream = UnixStream::connect(bed.daemon.socket()).unwrap();
        let bytes: Vec<u8> =
            header.iter().flat_map(|word| word.to_le_bytes()).chain([0; 8]).collect();
        let _ = stream.write_all(&bytes);
        std::thread::sleep(Duration::from_millis(50));
        close(stream);
        healthy(&bed, "a strange header");
    }
}
