// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's unbound workers, kept off the client's CPU while the bench runs.
//!
//! A loop device does its I/O on such a worker, and without this the scheduler puts it on the client's CPU or on another one as
//! chance has it, where it stays for a server's life. On two CPUs that makes half of the rounds of every subject a third slower than
//! the other half. It is also how hosts are set up that give a guest a CPU of its own.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::rig::command::context;

/// A mask like an unbound workqueue's: 32 bits in each group, the highest ones first.
const MASK: &str = "/sys/devices/virtual/workqueue/cpumask";
/// Locked by the bench that has changed the mask, and what it was before: who finds something in it has to put that back for one that was
/// killed.
const BEFORE: &str = "/run/extentd-bench.cpumask";

/// Puts the mask back when dropped. One at a time: the next one waits.
#[derive(Debug)]
pub(super) struct KeptOff {
    mask: PathBuf,
    before: String,
    lock: File,
}

impl KeptOff {
    /// Keeps them off `cpu` until this is dropped.
    pub(super) fn cpu(cpu: usize) -> io::Result<KeptOff> {
        KeptOff::with(Path::new(MASK), Path::new(BEFORE), cpu)
    }

    fn with(mask: &Path, lock: &Path, cpu: usize) -> io::Result<KeptOff> {
        let open =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(lock);
        let mut lock_file = open.map_err(context(lock.display()))?;
        flock(&lock_file, FlockOperation::LockExclusive).map_err(context(lock.display()))?;
        let mut before = String::new();
        lock_file.read_to_string(&mut before)?;
        if before.trim().is_empty() {
            before = std::fs::read_to_string(mask).map_err(context(mask.display()))?;
        }
        let before = before.trim().to_owned();
        let without = without(&before, cpu).map_err(context(mask.display()))?;
        lock_file.rewind()?;
        lock_file.write_all(before.as_bytes())?;
        // From here on it is put back, whatever happens.
        let kept = KeptOff { mask: mask.to_owned(), before, lock: lock_file };
        std::fs::write(mask, without).map_err(context(mask.display()))?;
        Ok(kept)
    }
}

impl Drop for KeptOff {
    fn drop(&mut self) {
        match std::fs::write(&self.mask, &self.before) {
            Ok(()) => _ = self.lock.set_len(0),
            Err(error) => {
                eprintln!("bench: {}: {error}; it was {}", self.mask.display(), self.before);
            }
        }
    }
}

/// `mask` without `cpu`.
fn without(mask: &str, cpu: usize) -> Result<String, String> {
    let groups = mask.split(',').map(|group| u32::from_str_radix(group, 16));
    let groups = groups.collect::<Result<Vec<u32>, _>>();
    let mut groups = groups.map_err(|_| format!("{mask} is no mask"))?;
    if let Some(place) = groups.len().checked_sub(1 + cpu / 32)
        && let Some(group) = groups.get_mut(place)
    {
        *group &= !(1 << (cpu % 32));
    }
    if groups.iter().all(|group| *group == 0) {
        return Err(format!("{mask} has no CPU but {cpu}"));
    }
    let groups: Vec<String> = groups.iter().map(|group| format!("{group:08x}")).collect();
    Ok(groups.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cpu_is_taken_out_of_a_mask() {
        assert_eq!(without("3", 1).unwrap(), "00000001");
        assert_eq!(without("ffffffff", 31).unwrap(), "7fffffff");
        assert_eq!(without("f,ffffffff", 33).unwrap(), "0000000d,ffffffff");
        assert_eq!(without("f,ffffffff", 0).unwrap(), "0000000f,fffffffe");
        assert_eq!(without("3", 40).unwrap(), "00000003", "not in it");
        assert_eq!(without("2", 1).unwrap_err(), "2 has no CPU but 1");
        assert_eq!(without("none", 1).unwrap_err(), "none is no mask");
    }

    #[test]
    fn the_mask_is_put_back_for_those_who_were_killed_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let (mask, lock) = (dir.path().join("cpumask"), dir.path().join("before"));
        let now = || std::fs::read_to_string(&mask).unwrap();
        std::fs::write(&mask, "f\n").unwrap();
        let kept = KeptOff::with(&mask, &lock, 3).unwrap();
        assert_eq!(now(), "00000007");
        drop(kept);
        assert_eq!((now().as_str(), std::fs::read_to_string(&lock).unwrap().as_str()), ("f", ""));

        let killed = KeptOff::with(&mask, &lock, 3).unwrap();
        flock(&killed.lock, FlockOperation::Unlock).unwrap();
        drop(KeptOff::with(&mask, &lock, 2).unwrap());
        assert_eq!(now(), "f");
        std::mem::forget(killed);

        std::fs::write(&mask, "8\n").unwrap();
        let error = KeptOff::with(&mask, &lock, 3).unwrap_err().to_string();
        assert!(error.contains("no CPU but 3"), "{error}");
        assert_eq!(now(), "8\n");
    }

    #[test]
    fn one_bench_waits_for_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let (mask, lock) = (dir.path().join("cpumask"), dir.path().join("before"));
        std::fs::write(&mask, "f").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let kept = KeptOff::with(&mask, &lock, 3).unwrap();
                        assert_eq!(kept.before, "f");
                        assert_eq!(std::fs::read_to_string(&mask).unwrap(), "00000007");
                    }
                });
            }
        });
        assert_eq!(std::fs::read_to_string(&mask).unwrap(), "f");
    }
}
