// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's unbound workers, kept off the client's CPU while the bench runs.
//!
//! A loop device does its I/O on such a worker, and without this the scheduler puts it on the client's CPU or on another one as
//! chance has it, where it stays for a server's life. On two CPUs that makes half of the rounds of every subject a third slower than
//! the other half. It is also how hosts are set up that give a guest a CPU of its own.

use std::io;
use std::path::{Path, PathBuf};

use crate::rig::command::context;

/// A mask like an unbound workqueue's: 32 bits in each group, the highest ones first.
const MASK: &str = "/sys/devices/virtual/workqueue/cpumask";

/// Puts the mask back when dropped.
#[derive(Debug)]
pub(super) struct KeptOff {
    path: PathBuf,
    before: String,
}

impl KeptOff {
    /// Keeps them off `cpu` until this is dropped.
    pub(super) fn cpu(cpu: usize) -> io::Result<KeptOff> {
        KeptOff::with(Path::new(MASK), cpu)
    }

    fn with(path: &Path, cpu: usize) -> io::Result<KeptOff> {
        let about = || context(path.display());
        let before = std::fs::read_to_string(path).map_err(about())?.trim().to_owned();
        let mask = without(&before, cpu)
            .ok_or_else(|| about()(io::Error::other(format!("{before} leaves no other CPU"))))?;
        std::fs::write(path, mask).map_err(about())?;
        Ok(KeptOff { path: path.to_owned(), before })
    }
}

impl Drop for KeptOff {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(&self.path, &self.before) {
            eprintln!("bench: {}: {error}; it was {}", self.path.display(), self.before);
        }
    }
}

/// `mask` without `cpu`; `None` if it is no mask or nothing would be left.
fn without(mask: &str, cpu: usize) -> Option<String> {
    let groups = mask.split(',').map(|group| u32::from_str_radix(group, 16));
    let mut groups: Vec<u32> = groups.collect::<Result<_, _>>().ok()?;
    if let Some(place) = groups.len().checked_sub(1 + cpu / 32)
        && let Some(group) = groups.get_mut(place)
    {
        *group &= !(1 << (cpu % 32));
    }
    if groups.iter().all(|group| *group == 0) {
        return None;
    }
    let groups: Vec<String> = groups.iter().map(|group| format!("{group:08x}")).collect();
    Some(groups.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cpu_is_taken_out_of_a_mask() {
        assert_eq!(without("3", 1).as_deref(), Some("00000001"));
        assert_eq!(without("ffffffff", 31).as_deref(), Some("7fffffff"));
        assert_eq!(without("f,ffffffff", 33).as_deref(), Some("0000000d,ffffffff"));
        assert_eq!(without("f,ffffffff", 0).as_deref(), Some("0000000f,fffffffe"));
        assert_eq!(without("3", 40).as_deref(), Some("00000003"), "not in it");
        assert_eq!(without("2", 1), None, "nothing would be left");
        assert_eq!(without("none", 1), None);
    }

    #[test]
    fn the_mask_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpumask");
        std::fs::write(&path, "f\n").unwrap();
        let kept = KeptOff::with(&path, 3).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "00000007");
        drop(kept);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "f");
        std::fs::write(&path, "8\n").unwrap();
        let error = KeptOff::with(&path, 3).unwrap_err().to_string();
        assert!(error.contains("no other CPU"), "{error}");
    }
}
