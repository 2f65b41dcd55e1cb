// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host that crashes: a filesystem on a fault disk, a canary, a neighbour, and the image.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use super::ledger::{BLOCK_SECTORS, Content, Ledger, POISON};
use crate::rig::command::{context, run};
use crate::rig::disk::{Backing, LoopDisk};
use crate::rig::fault_disk::{FaultDisk, Loss};
use crate::rig::filesystem::{Kind, Mount};
use crate::rig::model::SECTOR;
use crate::rig::random::Random;
use crate::rig::scope::Rig;

const MIB: u64 = 1 << 20;
/// Bytes of the image.
pub(super) const IMAGE: u64 = 12 * MIB;
/// Bytes of the canary.
const CANARY: usize = 512 << 10;

/// A kind of host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flavour {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) size: u64,
    mount: &'static str,
    /// What its power cuts may take. Without barriers a filesystem survives only a cache that keeps the order of writes: on any
    /// other its own metadata goes, and no daemon can help that.
    pub(super) loss: Loss,
}

/// All of them.
pub(super) const FLAVOURS: &[Flavour] = &[
    Flavour { name: "ext4", kind: Kind::Ext4, size: 64 * MIB, mount: "defaults", loss: Loss::Any },
    Flavour {
        name: "ext4,barrier=0",
        kind: Kind::Ext4,
        size: 64 * MIB,
        mount: "barrier=0",
        loss: Loss::Newest,
    },
    Flavour {
        name: "xfs",
        kind: Kind::XfsReflink,
        size: 300 * MIB,
        mount: "defaults",
        loss: Loss::Any,
    },
];

/// A mounted host filesystem. What lies above goes first: fields are dropped in their order.
#[derive(Debug)]
pub(super) struct Host {
    mount: Option<Mount>,
    device: Option<LoopDisk>,
    pub(super) disk: FaultDisk,
    flavour: Flavour,
    target: PathBuf,
    canary: Vec<u8>,
}

impl Host {
    /// A poisoned disk with a new filesystem and its canary.
    pub(super) fn make(rig: &Rig, flavour: Flavour, seed: u64) -> io::Result<Host> {
        let disk = FaultDisk::mount(flavour.size, &rig.dir("disk")?)?;
        disk.fill(POISON);
        let device = LoopDisk::attach(0, 512, &Backing::File(disk.path()))?;
        flavour.kind.format(device.path())?;
        let canary = Random::new(seed).bytes(CANARY);
        let target = rig.dir("fs")?;
        let mut host = Host { mount: None, device: Some(device), disk, flavour, target, canary };
        host.mount()?;
        std::fs::write(host.path("canary"), &host.canary)?;
        host.sync()?;
        Ok(host)
    }

    /// A file on it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.target.join(name)
    }

    /// Whether files can share blocks on it.
    pub(super) fn shares_blocks(&self) -> bool {
        self.flavour.kind == Kind::XfsReflink
    }

    /// The image file.
    pub(super) fn image(&self) -> PathBuf {
        self.path("image")
    }

    fn device(&self) -> io::Result<&Path> {
        self.device.as_ref().map(LoopDisk::path).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn mount(&mut self) -> io::Result<()> {
        let mount = Mount::with_options(self.device()?, &self.target, self.flavour.mount)?;
        self.mount = Some(mount);
        Ok(())
    }

    fn unmount(&mut self) -> io::Result<()> {
        self.mount.take().map_or(Ok(()), |mut mount| mount.unmount())
    }

    /// Makes all files durable, directories too. Without barriers the filesystem leaves it in the disk's cache.
    pub(super) fn sync(&self) -> io::Result<()> {
        run("sync", &["-f".as_ref(), self.target.as_os_str()])?;
        File::open(self.device()?)?.sync_all()
    }

    /// After a power cut: tears the dead host down, and boots the next on what the disk has kept.
    ///
    /// The loop device is a new one, since the page cache of the old has died with the host. The journal is replayed by a mount; then the
    /// filesystem's own check, on the unmounted device, must find nothing.
    pub(super) fn reboot(&mut self) -> io::Result<()> {
        self.unmount()?;
        self.device = None;
        self.disk.power_on();
        self.device = Some(LoopDisk::attach(0, 512, &Backing::File(self.disk.path()))?);
        self.mount().map_err(context("the filesystem after the cut"))?;
        self.unmount()?;
        self.flavour.kind.check(self.device()?).map_err(context("fsck after the cut"))?;
        self.mount()?;
        let canary = std::fs::read(self.path("canary"))?;
        let wrong = canary.iter().zip(&self.canary).position(|(a, b)| a != b);
        if let Some(at) = wrong.or((canary.len() != CANARY).then_some(CANARY)) {
            return Err(io::Error::other(format!("the canary file has changed at byte {at}")));
        }
        Ok(())
    }

    /// Another file comes, takes blocks that may have been anybody's, and goes again with the next.
    pub(super) fn neighbour(&self, random: &mut Random) -> io::Result<()> {
        let path = self.path("neighbour");
        if random.one_in(2) && path.exists() {
            std::fs::remove_file(&path)?;
        }
        let bytes = b"neighbour's data".repeat(32 * (1 + random.index(4096)));
        std::fs::write(path, bytes)
    }

    /// Processes that read the image, one after the other, until the power goes: each ends direct mode for a while.
    pub(super) fn visit(&self, times: u64, random: &mut Random) -> io::Result<()> {
        for _ in 0..times {
            let mut bytes = vec![0; 64 << 10];
            let at = random.below(IMAGE - bytes.len() as u64);
            let read = File::open(self.image()).and_then(|file| file.read_exact_at(&mut bytes, at));
            match read {
                Ok(()) => {}
                Err(_) if !self.disk.has_power() => return Ok(()),
                Err(error) => return Err(context("a reader on the host")(error)),
            }
            // Long enough, now and then, for direct mode to come back.
            std::thread::sleep(std::time::Duration::from_millis(random.below(120)));
        }
        Ok(())
    }

    /// A new image in stretches of written, unwritten and no blocks, durable, in place of the old one.
    pub(super) fn renew_image(&self, ledger: &mut Ledger, random: &mut Random) -> io::Result<()> {
        let path = self.image();
        if path.exists() {
            std::fs::remove_file(&path)?;
        }
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        file.set_len(IMAGE)?;
        let sectors = IMAGE / SECTOR as u64;
        ledger.renew(sectors);
        // From an image without a block to one with all of them.
        let written = random.below(5);
        let mut start = 0;
        while start < sectors {
            let most = if random.one_in(4) { 256 } else { 24 };
            let end = (start + (1 + random.below(most)) * BLOCK_SECTORS).min(sectors);
            stretch(&file, ledger, start..end, random.below(4) < written, random)?;
            start = end;
        }
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        drop(file);
        self.sync()
    }
}

fn stretch(
    file: &File,
    ledger: &mut Ledger,
    sectors: std::ops::Range<u64>,
    written: bool,
    random: &mut Random,
) -> io::Result<()> {
    let offset = sectors.start * SECTOR as u64;
    if written {
        let version = ledger.issue(&sectors, Content::Stamp);
        file.write_all_at(&Ledger::data(&sectors, version), offset)?;
        ledger.complete(&sectors, true);
    } else if random.one_in(2) {
        let len = (sectors.end - sectors.start) * SECTOR as u64;
        fallocate(file, FallocateFlags::empty(), offset, len)?;
    }
    Ok(())
}
