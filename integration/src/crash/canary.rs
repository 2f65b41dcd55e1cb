// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The canary (R12): a discard comes while the disk still holds a raw write on to the same blocks, and another file takes what
//! is free as soon as it is. The write must land in the image, for which the discard has to wait, and never in that file.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use super::Program;
use super::host::Flavour;
use crate::rig::client::{Client, ClientOptions};
use crate::rig::command::{context, run};
use crate::rig::daemon::Status;
use crate::rig::disk::Backing;
use crate::rig::fault_disk::{FaultDisk, Operation, Rule};
use crate::rig::filesystem::Filesystem;
use crate::rig::image::Layout;
use crate::rig::outside::{allocated, settle};
use crate::rig::queue::{Request, Shape};
use crate::rig::scope::Rig;
use crate::rig::wait::{PATIENCE, until};

const MIB: u64 = 1 << 20;
/// How long the discard is given for what it must not do. Too short a time for a mutant is a mutant that is not caught.
const TEMPTATION: Duration = Duration::from_millis(500);
/// What the disk holds on to.
const GHOST: [u8; 4096] = [0x67; 4096];
/// What the canary is full of.
const SONG: [u8; 4096] = [0xca; 4096];

/// Bytes of the canary that were overwritten; 0 is as it must be.
pub(super) fn canary(flavour: Flavour, program: &Program) -> io::Result<u64> {
    let rig = Rig::enter().ok_or_else(|| io::Error::other("root is needed"))?;
    let disk = FaultDisk::mount(flavour.size, &rig.dir("disk")?)?;
    let fs = Filesystem::make(flavour.kind, 0, 512, &Backing::File(disk.path()), &rig.dir("fs")?)?;
    let image = fs.path().join("image");
    Layout::Written.make(&image, 8 * MIB, 1)?;
    let daemon = program.start(&rig.dir("run")?, &image, &["--mode", "direct"])?;
    daemon.await_status("direct mode", PATIENCE, Status::direct)?;
    let mut client = Client::connect(daemon.socket(), &ClientOptions::queues(2))?;
    let before = allocated(&image)?;

    disk.add(Rule::hold(Operation::Write).starting(&GHOST).times(1));
    let write = Request::Write { offset: MIB, data: &GHOST };
    client.queue(0)?.submit(write, &Shape::whole(), 1)?;
    client.queue(0)?.kick()?;
    until("the write on the disk", PATIENCE, || (disk.counts().hit > 0).then_some(()))?;
    let discard = Request::Discard { offset: 0, len: 4 * MIB };
    client.queue(1)?.submit(discard, &Shape::whole(), 2)?;
    client.queue(1)?.kick()?;
    daemon.await_status("the discard", PATIENCE, |s| s.number("requests/discard") == 1)?;
    let freed = || allocated(&image).is_ok_and(|now| now < before).then_some(());
    // The blocks of a discard that waits are not free, and this ends with the time.
    let waited = until("the blocks", TEMPTATION, freed).is_err();

    let path = fs.path().join("canary");
    let length = sing(&path)?;
    disk.heal();
    for queue in client.queues() {
        for done in queue.drain()? {
            done.result.map_err(context("the guest"))?;
        }
    }
    settle(&path)?;
    let bytes = std::fs::read(&path)?;
    let dead = bytes.chunks(SONG.len()).filter(|block| **block != SONG).count();
    let lost = dead as u64 * SONG.len() as u64 + length.abs_diff(bytes.len() as u64);
    drop((client, daemon));
    match (lost, waited) {
        (0, false) => Err(io::Error::other("the discard did not wait for the write in flight")),
        // Only then: nobody vouches for a filesystem into which somebody wrote.
        (0, true) => fs.check().map(|()| 0),
        _ => Ok(lost),
    }
}

/// Takes all the space there is; how much that was.
fn sing(path: &Path) -> io::Result<u64> {
    // What was freed in the journal's running transaction is free for others after its end.
    run("sync", &["-f".as_ref(), path.parent().unwrap_or(path).as_os_str()])?;
    let mut file = File::create(path)?;
    let mut length = 0;
    loop {
        match file.write_all(&SONG) {
            Ok(()) => length += SONG.len() as u64,
            Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
            Err(error) => return Err(context("the canary")(error)),
        }
    }
    // A part of the last piece may have found room.
    file.set_len(length)?;
    file.sync_all()?;
    Ok(length)
}
