// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The usual arrangement: an image on a filesystem on a loop disk, served by extentd, with a model of its bytes.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::client::{Client, ClientOptions};
use super::daemon::{Daemon, Status};
use super::disk::Backing;
use super::filesystem::{Filesystem, Kind};
use super::image::Layout;
use super::model::Model;
use super::scope::Rig;

/// What to build.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The filesystem.
    pub kind: Kind,
    /// Bytes of a sector of the disk.
    pub sector: u32,
    /// Bytes of the disk.
    pub disk: u64,
    /// What holds them.
    pub backing: Backing,
    /// The image's layout.
    pub layout: Layout,
    /// Bytes of the image.
    pub size: u64,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            kind: Kind::Ext4,
            sector: 512,
            disk: 64 << 20,
            backing: Backing::Memory,
            layout: Layout::Written,
            size: 8 << 20,
        }
    }
}

/// A served image. Its parts go in this order: the daemon before the filesystem under it.
#[derive(Debug)]
pub struct Bed {
    /// The server.
    pub daemon: Daemon,
    /// The image file.
    pub image: PathBuf,
    /// What the image must hold.
    pub model: Model,
    /// Where it lies.
    pub fs: Filesystem,
    program: PathBuf,
    dir: PathBuf,
}

impl Bed {
    /// Builds `setup` in the directories `fs` and `run` of `rig` and starts `program` with `options`.
    pub fn make(rig: &Rig, program: &str, setup: &Setup, options: &[&str]) -> io::Result<Bed> {
        let fs = Filesystem::make(
            setup.kind,
            setup.disk,
            setup.sector,
            &setup.backing,
            &rig.dir("fs")?,
        )?;
        let image = fs.path().join("image");
        let model = Model::new(setup.layout.make(&image, setup.size, 11)?);
        let dir = rig.dir("run")?;
        let daemon = Daemon::start(Path::new(program), &dir, &image, options)?;
        Ok(Bed { daemon, image, model, fs, program: program.into(), dir })
    }

    /// A frontend with `queues` queues.
    pub fn connect(&self, queues: u16) -> io::Result<Client> {
        Client::connect(self.daemon.socket(), &ClientOptions::queues(queues))
    }

    /// Starts another daemon in the place of the one that was killed or has ended.
    pub fn restart(&mut self, options: &[&str]) -> io::Result<()> {
        self.daemon = Daemon::start(&self.program, &self.dir, &self.image, options)?;
        Ok(())
    }

    /// Waits for direct mode.
    pub fn await_direct(&self, limit: Duration) -> io::Result<Status> {
        self.daemon.await_status("direct mode", limit, Status::direct)
    }

    /// Compares what the guest reads, all of it, with the model.
    pub fn check_guest(&self, client: &mut Client) -> io::Result<()> {
        for (index, want) in self.model.bytes().chunks(256 << 10).enumerate() {
            let offset = index as u64 * (256 << 10);
            self.model.check(offset, &client.read_at(offset, want.len())?)?;
        }
        Ok(())
    }

    /// The image's bytes as the host reads them through the page cache.
    pub fn host_bytes(&self) -> io::Result<Vec<u8>> {
        std::fs::read(&self.image)
    }

    /// Ends the daemon, which must succeed, compares the image with the model through the page cache, checks the filesystem.
    pub fn finish(mut self) -> io::Result<()> {
        let status = self.daemon.sigterm()?;
        if !status.success() {
            let log = self.daemon.log();
            return Err(io::Error::other(format!("the daemon ended with {status}: {log}")));
        }
        self.model.check(0, &self.host_bytes()?)?;
        drop(self.daemon);
        self.fs.check()
    }
}
