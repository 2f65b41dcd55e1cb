// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's own threads, held still while the bench runs. Both for all subjects alike.
//!
//! *Unbound workers* are kept off the client's CPU. A loop device does its I/O on such a worker, and without this the scheduler
//! puts it on the client's CPU or on another one as chance has it, where it stays for a server's life. On two CPUs that
//! makes half of the rounds of every subject a third slower than the other half. It is also how hosts are set up that give
//! a guest a CPU of its own.
//!
//! *ksoftirqd*, which finishes what a loop device's worker has done, preempts nobody (`SCHED_BATCH`). By default it may take the CPU
//! from the worker after each request, and whether it does depends on which of the two has used more time: a machine
//! of 300 k requests a second then has 230 k changes between them (ADR 0007).

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::rig::command::context;

/// A mask like an unbound workqueue's: 32 bits in each group, the highest ones first.
const MASK: &str = "/sys/devices/virtual/workqueue/cpumask";
/// Locked by the bench that has changed anything, and what it was before: who finds something in it has to put that back for one that was
/// killed. The boot it is of, the mask, and the ids of the threads that were made `SCHED_BATCH`.
const BEFORE: &str = "/run/extentd-bench.before";
/// `/run` may outlive the machine's running.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// Puts everything back when dropped. One at a time: the next one waits.
#[derive(Debug)]
pub(super) struct HeldStill {
    mask: PathBuf,
    before: Before,
    lock: File,
}

/// What it was before.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Before {
    boot: String,
    mask: String,
    /// Threads that had the usual policy.
    threads: Vec<i32>,
}

impl HeldStill {
    /// Keeps unbound workers off `cpu`, and ksoftirqd from preempting anybody, until this is dropped.
    pub(super) fn but_for(cpu: usize) -> io::Result<HeldStill> {
        let threads = ksoftirqd()?;
        if threads.is_empty() {
            return Err(io::Error::other("no ksoftirqd is seen: is this a PID namespace?"));
        }
        HeldStill::with(Path::new(MASK), Path::new(BEFORE), cpu, &threads)
    }

    /// Puts back what a bench that was killed has left.
    pub(super) fn recover() -> io::Result<()> {
        let (lock, left) = lock(Path::new(BEFORE))?;
        if let Some(before) = left {
            drop(HeldStill { mask: MASK.into(), before, lock });
        }
        Ok(())
    }

    fn with(mask: &Path, path: &Path, cpu: usize, threads: &[i32]) -> io::Result<HeldStill> {
        let (mut lock, left) = lock(path)?;
        let before = match left {
            Some(before) => before,
            None => Before::now(mask, threads)?,
        };
        let without = without(&before.mask, cpu).map_err(context(mask.display()))?;
        lock.set_len(0)?;
        lock.rewind()?;
        lock.write_all(before.text().as_bytes())?;
        // From here on it is put back, whatever happens.
        let held = HeldStill { mask: mask.to_owned(), before, lock };
        std::fs::write(mask, without).map_err(context(mask.display()))?;
        for thread in &held.before.threads {
            set_policy(*thread, libc::SCHED_BATCH).map_err(context(format!("thread {thread}")))?;
        }
        Ok(held)
    }
}

impl Drop for HeldStill {
    fn drop(&mut self) {
        let mask = std::fs::write(&self.mask, &self.before.mask);
        let threads =
            self.before.threads.iter().map(|thread| set_policy(*thread, libc::SCHED_OTHER));
        match threads.fold(mask, Result::and) {
            Ok(()) => _ = self.lock.set_len(0),
            Err(error) => {
                let Before { mask, threads, .. } = &self.before;
                let place = self.mask.display();
                eprintln!("bench: {error}; {place} was {mask}, threads {threads:?} SCHED_OTHER");
            }
        }
    }
}

/// Locks the file, and says what is in it. Waits for a bench that is measuring.
fn lock(path: &Path) -> io::Result<(File, Option<Before>)> {
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let mut file = open.map_err(context(path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        eprintln!("waiting for another bench ({} is locked)", path.display());
        flock(&file, FlockOperation::LockExclusive).map_err(context(path.display()))?;
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let left = Before::parse(&text, &boot()?);
    Ok((file, left))
}

fn boot() -> io::Result<String> {
    Ok(std::fs::read_to_string(BOOT).map_err(context(BOOT))?.trim().to_owned())
}

impl Before {
    fn now(mask: &Path, threads: &[i32]) -> io::Result<Before> {
        let text = std::fs::read_to_string(mask).map_err(context(mask.display()))?;
        let usual = |thread: &i32| policy(*thread).is_ok_and(|policy| policy == libc::SCHED_OTHER);
        let threads = threads.iter().copied().filter(usual).collect();
        Ok(Before { boot: boot()?, mask: text.trim().to_owned(), threads })
    }

    /// What is in the file, if it is of this boot.
    fn parse(text: &str, boot: &str) -> Option<Before> {
        let mut words = text.split_whitespace();
        if words.next()? != boot {
            return None;
        }
        let mask = words.next()?.to_owned();
        let threads = words.filter_map(|word| word.parse().ok()).collect();
        Some(Before { boot: boot.to_owned(), mask, threads })
    }

    fn text(&self) -> String {
        let threads: Vec<_> = self.threads.iter().map(i32::to_string).collect();
        format!("{}\n{}\n{}\n", self.boot, self.mask, threads.join(" "))
    }
}

/// The ids of the kernel's softirq threads.
fn ksoftirqd() -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let id = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let comm = || std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if let Some(id) = id
            && comm().starts_with("ksoftirqd/")
        {
            found.push(id);
        }
    }
    Ok(found)
}

fn policy(thread: i32) -> io::Result<i32> {
    // SAFETY: a system call without pointers.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    if policy < 0 { Err(io::Error::last_os_error()) } else { Ok(policy) }
}

fn set_policy(thread: i32, policy: i32) -> io::Result<()> {
    // SAFETY: a plain struct of integers.
    let mut none: libc::sched_param = unsafe { std::mem::zeroed() };
    none.sched_priority = 0;
    // SAFETY: the pointer is to a `sched_param` that outlives the call, which only reads it.
    let done = unsafe { libc::sched_setscheduler(thread, policy, &raw const none) };
    match io::Error::last_os_error() {
        _ if done >= 0 => Ok(()),
        // With its CPU it went away.
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error),
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

    /// A process of our own whose policy may be changed.
    struct Sleeper(std::process::Child);

    impl Sleeper {
        fn new() -> Sleeper {
            Sleeper(std::process::Command::new("sleep").arg("60").spawn().unwrap())
        }

        fn id(&self) -> i32 {
            i32::try_from(self.0.id()).unwrap()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn everything_is_put_back_for_those_who_were_killed_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let (mask, lock) = (dir.path().join("cpumask"), dir.path().join("before"));
        let (usual, batch) = (Sleeper::new(), Sleeper::new());
        set_policy(batch.id(), libc::SCHED_BATCH).unwrap();
        let threads = [usual.id(), batch.id()];
        let now = || (std::fs::read_to_string(&mask).unwrap(), policy(usual.id()).unwrap());
        std::fs::write(&mask, "f\n").unwrap();
        let held = HeldStill::with(&mask, &lock, 3, &threads).unwrap();
        assert_eq!(now(), ("00000007".to_owned(), libc::SCHED_BATCH));
        drop(held);
        assert_eq!(now(), ("f".to_owned(), libc::SCHED_OTHER));
        assert_eq!(policy(batch.id()).unwrap(), libc::SCHED_BATCH, "it was so before");
        assert_eq!(std::fs::read_to_string(&lock).unwrap(), "");

        let killed = HeldStill::with(&mask, &lock, 3, &threads).unwrap();
        flock(&killed.lock, FlockOperation::Unlock).unwrap();
        drop(HeldStill::with(&mask, &lock, 2, &threads).unwrap());
        assert_eq!(now(), ("f".to_owned(), libc::SCHED_OTHER));
        std::mem::forget(killed);

        // One that was killed before the machine was started again, with threads that are somebody else's now.
        std::fs::write(&lock, format!("another-boot\n1\n{}\n", batch.id())).unwrap();
        drop(HeldStill::with(&mask, &lock, 3, &threads).unwrap());
        assert_eq!(now(), ("f".to_owned(), libc::SCHED_OTHER));
        assert_eq!(policy(batch.id()).unwrap(), libc::SCHED_BATCH);
        // A thread that is gone.
        let gone = Sleeper::new();
        let with_gone = [usual.id(), gone.id()];
        let held = HeldStill::with(&mask, &lock, 3, &with_gone).unwrap();
        drop(gone);
        drop(held);
        assert_eq!(std::fs::read_to_string(&lock).unwrap(), "");

        std::fs::write(&mask, "8\n").unwrap();
        let error = HeldStill::with(&mask, &lock, 3, &threads).unwrap_err().to_string();
        assert!(error.contains("no CPU but 3"), "{error}");
        assert_eq!(now(), ("8\n".to_owned(), libc::SCHED_OTHER));
    }

    #[test]
    fn softirq_threads_are_found_wherever_kernel_threads_are_seen() {
        // In a PID namespace of their own tests see none.
        let kthreadd = std::fs::read_to_string("/proc/2/comm").unwrap_or_default();
        let found = ksoftirqd().unwrap();
        assert!(!found.is_empty() || kthreadd != "kthreadd\n", "{kthreadd}");
        assert!(found.iter().all(|thread| policy(*thread).is_ok()), "{found:?}");
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
                        let held = HeldStill::with(&mask, &lock, 3, &[]).unwrap();
                        assert_eq!(
                            (held.before.mask.as_str(), &held.before.threads[..]),
                            ("f", &[][..])
                        );
                        assert_eq!(std::fs::read_to_string(&mask).unwrap(), "00000007");
                    }
                });
            }
        });
        assert_eq!(std::fs::read_to_string(&mask).unwrap(), "f");
    }
}
