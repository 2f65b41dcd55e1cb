// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A golden image beside the one that is written: read-only, served in direct mode by two instances
//! that share its lease or, where the filesystem shares blocks, by one that owns it. Others on the
//! host open it, copy it and have its blocks moved; what its guests read stays what was written
//! once (ADR 0008).

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use super::host::Host;
use super::{Program, Tally};
use crate::rig::client::{Client, ClientOptions};
use crate::rig::command::{context, run};
use crate::rig::daemon::{Daemon, Status};
use crate::rig::model::SECTOR;
use crate::rig::random::Random;
use crate::rig::sharing::dedupe;
use crate::rig::wait::PATIENCE;

/// Bytes of it.
const SIZE: usize = 1 << 20;
const OPTIONS: &[&str] = &["--read-only", "--mode", "direct"];

/// One instance with its guest.
struct Reader {
    daemon: Daemon,
    client: Client,
}

/// The image, and who serves it.
pub(super) struct Golden {
    readers: Vec<Reader>,
    image: PathBuf,
    twin: PathBuf,
    bytes: Vec<u8>,
    /// Where instances keep their sockets: more than one only where they share.
    dirs: Vec<PathBuf>,
    shares_blocks: bool,
    visited: bool,
}

impl Golden {
    /// Writes it, durably.
    pub(super) fn make(host: &Host, dirs: [PathBuf; 2], seed: u64) -> io::Result<Golden> {
        let shares_blocks = host.shares_blocks();
        let instances = if shares_blocks { 1 } else { 2 };
        let golden = Golden {
            readers: Vec::new(),
            image: host.path("golden"),
            twin: host.path("twin"),
            bytes: Random::new(seed ^ 0x601d).bytes(SIZE),
            dirs: dirs.into_iter().take(instances).collect(),
            shares_blocks,
            visited: false,
        };
        std::fs::write(&golden.image, &golden.bytes)?;
        host.sync()?;
        Ok(golden)
    }

    /// The first time and now and then, something happens to it, and all its guests read it before
    /// and after. Has it served, if it is not.
    pub(super) fn visit(
        &mut self,
        host: &Host,
        program: &Program,
        random: &mut Random,
    ) -> io::Result<Tally> {
        if std::mem::replace(&mut self.visited, true) && !random.one_in(4) {
            return Ok(Tally::default());
        }
        for dir in self.dirs.iter().skip(self.readers.len()) {
            let daemon = program.start(dir, &self.image, OPTIONS)?;
            let client = Client::connect(daemon.socket(), &ClientOptions::queues(1))?;
            self.readers.push(Reader { daemon, client });
        }
        let before = self.check()?;
        if random.one_in(2) {
            self.copy()?;
        } else {
            File::open(&self.image)?.read_to_end(&mut Vec::new())?;
        }
        self.share()?;
        let takers = take_freed(host)?;
        let after = self.check()?;
        for taker in takers {
            std::fs::remove_file(taker)?;
        }
        Ok(Tally { golden: before.golden + after.golden, lost: before.lost + after.lost, ..before })
    }

    /// What each guest reads against what was written; in direct mode, to which whatever happened
    /// lets it come back.
    fn check(&mut self) -> io::Result<Tally> {
        let mut tally = Tally::default();
        for reader in &mut self.readers {
            // What was mapped before is what a wrong answer would come from.
            tally.lost += wrong(&mut reader.client, &self.bytes)?;
            let status = reader.daemon.await_status("direct mode", PATIENCE, Status::direct)?;
            let direct = status.number("segments/direct");
            tally.lost += wrong(&mut reader.client, &self.bytes)?;
            let status = reader.daemon.status()?;
            let raw = status.number("segments/direct") > direct;
            tally.golden += u64::from(raw);
        }
        Ok(tally)
    }

    /// A copy by reflink, where there is such a thing.
    fn copy(&self) -> io::Result<()> {
        let copy = self.twin.with_extension("copy");
        run("cp", &["--reflink=auto".as_ref(), self.image.as_os_str(), copy.as_os_str()])?;
        std::fs::remove_file(copy)
    }

    /// Another file of the same bytes, with which the image comes to share its blocks: its own are
    /// freed, and when the other has gone it is where that was.
    fn share(&self) -> io::Result<()> {
        std::fs::write(&self.twin, &self.bytes)?;
        match dedupe(&self.image, &self.twin, SIZE as u64) {
            Err(error) if self.shares_blocks => return Err(context("deduplication")(error)),
            Ok(()) if !self.shares_blocks => {
                return Err(io::Error::other("a filesystem that cannot share blocks has done so"));
            }
            _ => {}
        }
        std::fs::remove_file(&self.twin)
    }

    /// The power has gone, or is about to: nobody serves it any more.
    pub(super) fn kill(&mut self) {
        self.readers.clear();
    }

    /// Ends its instances in good order.
    pub(super) fn end(&mut self, end: impl Fn(&mut Daemon) -> io::Result<()>) -> io::Result<()> {
        for mut reader in self.readers.drain(..) {
            drop(reader.client);
            end(&mut reader.daemon)?;
        }
        Ok(())
    }
}

/// Others take what has been freed: files as large as the image, since the filesystem looks for
/// room of just that size, and after a commit, before which freed blocks are nobody's.
fn take_freed(host: &Host) -> io::Result<Vec<PathBuf>> {
    const TAKERS: usize = 8;
    host.sync()?;
    let data = b"a taker's data..".repeat(SIZE / 16);
    let paths: Vec<PathBuf> = (0..TAKERS).map(|n| host.path(&format!("taker-{n}"))).collect();
    for path in &paths {
        std::fs::write(path, &data)?;
    }
    host.sync()?;
    Ok(paths)
}

/// Sectors that are not what was written.
fn wrong(client: &mut Client, bytes: &[u8]) -> io::Result<u64> {
    const STEP: usize = 256 << 10;
    let mut wrong = 0;
    for (index, want) in bytes.chunks(STEP).enumerate() {
        let read = client.read_at((index * STEP) as u64, want.len())?;
        let pairs = read.chunks(SECTOR).zip(want.chunks(SECTOR));
        wrong += pairs.filter(|(read, want)| read != want).count() as u64;
    }
    Ok(wrong)
}

/// The directories of its instances.
pub(super) fn dirs(rig: &crate::rig::Rig) -> io::Result<[PathBuf; 2]> {
    Ok([rig.dir("golden-1")?, rig.dir("golden-2")?])
}
