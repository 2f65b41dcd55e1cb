// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who holds a lease on a file, seen without opening it: opening would break it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{major, minor};

/// The process that would lose its lease if the file at `path` were opened; 0 if the kernel does
/// not name it (another pid namespace).
///
/// # Errors
/// The file or `/proc/locks` cannot be looked at.
pub fn holder(path: &Path) -> io::Result<Option<u32>> {
    let metadata = fs::metadata(path)?;
    let device = (major(metadata.dev()), minor(metadata.dev()));
    Ok(holder_in(&fs::read_to_string("/proc/locks")?, device, metadata.ino()))
}

/// `1: LEASE  ACTIVE    WRITE 1234 fe:01:5678 0 EOF` (proc_locks(5)).
///
/// A read lease stays when the file is opened for reading, which is all that is done here.
fn holder_in(locks: &str, (major, minor): (u32, u32), inode: u64) -> Option<u32> {
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.get(1..)? {
            ["LEASE", _, "WRITE", pid, place, ..] if *place == file => {
                Some(pid.parse().unwrap_or(0))
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_lease_is_found() {
        let locks = "1: FLOCK  ADVISORY  WRITE 99 fe:01:5678 0 EOF\n\
                     2: LEASE  ACTIVE    READ 12 fe:01:5679 0 EOF\n\
                     3: LEASE  ACTIVE    WRITE 1234 fe:01:5678 0 EOF\n\
                     4: LEASE  BREAKING  UNLCK -1 fe:01:5680 0 EOF\n\
                     4: -> LEASE\n";
        assert_eq!(holder_in(locks, (254, 1), 5678), Some(1234));
        assert_eq!(holder_in(locks, (254, 1), 5679), None);
        assert_eq!(holder_in(locks, (254, 1), 567), None);
        assert_eq!(holder_in("", (254, 1), 5678), None);
    }
}
