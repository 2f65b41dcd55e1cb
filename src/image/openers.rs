// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds descriptors that a lease does not count: the access mode 3 of open(2), "for ioctls only",
//! makes its holder neither a reader nor a writer, so that a lease is granted beside it, and
//! FIDEDUPERANGE is content with it (ADR 0008).

use std::fs;
use std::os::unix::fs::MetadataExt;

/// The access mode's bits among the flags of an open file, all set: neither reads nor writes.
const NEITHER: u32 = 3;

/// A process, not this one, that has the file open without being counted, as far as `/proc` shows
/// them: descriptors that are on their way through a socket, or in another pid namespace's
/// processes, cannot be seen.
pub(super) fn uncounted(dev: u64, ino: u64) -> Option<u32> {
    let own = std::process::id();
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|&pid| pid != own).find(|pid| {
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        files.flatten().any(|file| {
            // Following the link opens nothing, and so breaks no lease.
            let same = fs::metadata(file.path()).is_ok_and(|m| (m.dev(), m.ino()) == (dev, ino));
            same && {
                let info = format!("/proc/{pid}/fdinfo/{}", file.file_name().display());
                access_mode(&fs::read_to_string(info).unwrap_or_default()) == Some(NEITHER)
            }
        })
    })
}

/// From `flags:\t0100003`, in octal, of a file in `/proc/PID/fdinfo`. A descriptor that only names
/// a file (O_PATH) says 0.
fn access_mode(info: &str) -> Option<u32> {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    Some(u32::from_str_radix(flags.trim(), 8).ok()? & NEITHER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_access_mode_is_read_from_the_flags() {
        assert_eq!(access_mode("pos:\t0\nflags:\t0100003\nmnt_id:\t29\n"), Some(3));
        assert_eq!(access_mode("pos:\t0\nflags:\t02100002\n"), Some(2));
        assert_eq!(access_mode("pos:\t0\nflags:\t012000000\n"), Some(0));
        assert_eq!(access_mode("pos:\t0\n"), None);
    }
}
