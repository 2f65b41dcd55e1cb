// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use super::super::holders::listed;
use super::*;

#[test]
fn lists_of_locks_are_read_for_one_file() {
    let dev = rustix::fs::makedev(254, 0);
    let text = "1: OFDLCK ADVISORY  WRITE -1 fe:00:77 0 99\n\
        1: -> OFDLCK ADVISORY  WRITE -1 fe:00:77 5 99\n\
        2: FLOCK  ADVISORY  WRITE 9737 fe:00:77 0 EOF\n\
        3: LEASE  ACTIVE    WRITE 9737 fe:00:77 0 EOF\n\
        lock:\t4: POSIX  ADVISORY  READ  12 fe:00:77 201 EOF\n\
        5: OFDLCK ADVISORY  READ -1 fe:00:78 100 100\n\
        6: DELEG  ACTIVE    READ 7 fe:00:77 0 EOF\n";
    let found: Vec<(Class, bool)> =
        listed(text, dev, 77).map(|lock| (lock.class, lock.exclusive)).collect();
    let want = [
        (Class::Bytes { start: 0, end: 99 }, true),
        (Class::Flock, true),
        (Class::Lease, true),
        (Class::Bytes { start: 201, end: u64::MAX }, false),
    ];
    assert_eq!(found, want);
}

/// The list of all locks forbids what the locks themselves would: who may be beside whom.
#[test]
fn the_list_of_locks_forbids_what_the_locks_do() {
    let dev = rustix::fs::makedev(254, 0);
    // The lock; whether a writer is kept out by it; whether a reader is.
    let table = [
        ("OFDLCK ADVISORY WRITE -1 fe:00:77 0 EOF", true, true), // cloud-hypervisor, writing
        ("OFDLCK ADVISORY WRITE -1 fe:00:77 0 8388607", true, true), // a newer one
        ("OFDLCK ADVISORY READ -1 fe:00:77 0 EOF", true, false), // one that reads
        ("OFDLCK ADVISORY READ -1 fe:00:77 101 101", true, true), // QEMU, writing
        ("OFDLCK ADVISORY READ -1 fe:00:77 201 201", true, false), // QEMU, reading
        ("OFDLCK ADVISORY READ -1 fe:00:77 100 100", false, false), // QEMU, force-share
        ("OFDLCK ADVISORY READ -1 fe:00:77 200 200", true, true), // QEMU, grants no reads
        ("OFDLCK ADVISORY WRITE -1 fe:00:77 0 99", true, true),  // extentd, writing
        ("OFDLCK ADVISORY READ -1 fe:00:77 0 100", true, false), // extentd, reading
        ("POSIX  ADVISORY WRITE 12 fe:00:77 5 5", true, true),
        ("FLOCK  ADVISORY WRITE 12 fe:00:77 0 EOF", true, true), // crosvm, writing
        ("FLOCK  ADVISORY READ 12 fe:00:77 0 EOF", true, false), // crosvm, reading
        ("LEASE  ACTIVE WRITE 12 fe:00:77 0 EOF", false, false),
    ];
    for (line, writer, reader) in table {
        let text = format!("1: {line}\n");
        let lock = listed(&text, dev, 77).next().unwrap();
        let forbidden = |read_only, block_device| forbids(&lock, Claim { read_only, block_device });
        assert_eq!((forbidden(false, false), forbidden(true, false)), (writer, reader), "{line}");
        // On a block device, readers' flocks are no obstacle: udev takes one to look at it.
        let shared_flock = lock.class == Class::Flock && !lock.exclusive;
        assert_eq!(forbidden(false, true), writer && !shared_flock, "{line}");
        assert_eq!(forbidden(true, true), reader, "{line}");
    }
}
