// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One host through all of its crashes.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::golden::{self, Golden};
use super::host::{Flavour, Host, IMAGE};
use super::ledger::{BLOCK_SECTORS, Fault, Floor, Ledger};
use super::load::{DEPTH, Ended, FLUSH, Guest};
use super::{Program, Tally, operations};
use crate::rig::client::{Client, ClientOptions};
use crate::rig::command::context;
use crate::rig::daemon::Daemon;
use crate::rig::fault_disk::{Cut, Operation, Rule, When};
use crate::rig::model::SECTOR;
use crate::rig::random::Random;
use crate::rig::scope::Rig;
use crate::rig::wait;

/// The disk's log of a crash, at most.
const LOG: usize = 96 << 20;
/// No load goes on for longer without its crash.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a disk holds writes on to that a killed daemon has left it.
const SLOW: Duration = Duration::from_millis(300);

/// A crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crash {
    /// The host's power goes.
    Cut,
    /// The daemon alone is killed.
    Kill,
}

/// How the guest is served, for a while.
#[derive(Debug, Clone)]
struct Service {
    direct: bool,
    /// What makes writes durable on completion: the daemon's option, or a frontend without FLUSH.
    write_through: Option<bool>,
    queues: u16,
}

impl Service {
    fn choose(random: &mut Random) -> Service {
        Service {
            direct: !random.one_in(3),
            write_through: random.one_in(3).then(|| random.one_in(2)),
            queues: 1 + u16::try_from(random.below(4)).unwrap_or(0),
        }
    }

    fn options(&self) -> Vec<&'static str> {
        let mode = if self.direct { "direct" } else { "filesystem" };
        let cache = if self.write_through == Some(true) { "writethrough" } else { "writeback" };
        vec!["--mode", mode, "--cache", cache]
    }

    fn client(&self) -> ClientOptions {
        let plain = ClientOptions::queues(self.queues);
        let mut features = plain.features | operations::features();
        if self.write_through == Some(false) {
            let wce = virtio_driver::VirtioBlkFeatureFlags::CONFIG_WCE.bits();
            features &= !(FLUSH | wce);
        }
        ClientOptions { features, depth: DEPTH + 1, ..plain }
    }
}

/// A daemon with its guest.
struct Session {
    daemon: Daemon,
    client: Client,
}

/// A host with what it serves.
pub(super) struct Lane<'a> {
    /// What lies above goes first: fields are dropped in their order.
    session: Option<Session>,
    golden: Golden,
    host: Host,
    program: &'a Program,
    run: PathBuf,
    ledger: Mutex<Ledger>,
    random: Random,
    service: Service,
    tally: &'a Mutex<Tally>,
    name: &'static str,
    seed: u64,
    _rig: Rig,
}

impl<'a> Lane<'a> {
    pub(super) fn make(
        flavour: Flavour,
        seed: u64,
        program: &'a Program,
        tally: &'a Mutex<Tally>,
    ) -> io::Result<Lane<'a>> {
        let rig = Rig::enter().ok_or_else(|| io::Error::other("root is needed"))?;
        let mut random = Random::new(seed);
        let host = Host::make(&rig, flavour, seed)?;
        let golden = Golden::make(&host, golden::dirs(&rig)?, seed)?;
        Ok(Lane {
            program,
            golden,
            host,
            run: rig.dir("run")?,
            ledger: Mutex::default(),
            service: Service::choose(&mut random),
            random,
            session: None,
            tally,
            name: flavour.name,
            seed,
            _rig: rig,
        })
    }

    /// One crash after the other until the first that lost something.
    pub(super) fn run(
        &mut self,
        crashes: &[Crash],
        loss: crate::rig::fault_disk::Loss,
        each: impl Fn() -> bool,
    ) -> io::Result<()> {
        for (number, crash) in crashes.iter().enumerate() {
            // Each crash has a stream of its own: what one run takes from it does not depend on how far the last one came.
            self.random = Random::new(self.seed ^ ((number as u64 + 1) << 20));
            let result = match crash {
                Crash::Cut => self.cut(loss),
                Crash::Kill => self.kill(),
            };
            result.map_err(|error| {
                let what = format!(
                    "{} crash {number} ({crash:?}) of seed {}, {:?}: {error}",
                    self.name, self.seed, self.service
                );
                let log = self.session.as_ref().map_or_else(String::new, |s| s.daemon.log());
                let what = format!("{what}\nthe daemon's log:\n{log}");
                self.session = None;
                io::Error::other(what)
            })?;
            if !each() {
                break;
            }
        }
        if let Some(mut session) = self.session.take() {
            drop(session.client);
            end(&mut session.daemon)?;
        }
        self.golden.end(end)
    }

    /// Some crashes meet a new image or service, the others what the last one has left.
    fn prepare(&mut self) -> io::Result<()> {
        let renew = self.random.one_in(2) || !self.host.image().exists();
        if renew && let Some(mut session) = self.session.take() {
            drop(session.client);
            end(&mut session.daemon)?;
        }
        self.host.neighbour(&mut self.random)?;
        let golden = self.golden.visit(&self.host, self.program, &mut self.random);
        let golden = golden.map_err(context("the golden image"))?;
        self.count(|tally| tally.add_golden(&golden));
        golden.verdict()?;
        if renew {
            let ledger = self.ledger.get_mut().unwrap_or_else(PoisonError::into_inner);
            self.host.renew_image(ledger, &mut self.random)?;
            self.service = Service::choose(&mut self.random);
        }
        if self.session.is_none() {
            self.session = Some(self.start()?);
        }
        Ok(())
    }

    fn start(&self) -> io::Result<Session> {
        let daemon = self.program.start(&self.run, &self.host.image(), &self.service.options())?;
        let client = Client::connect(daemon.socket(), &self.service.client())
            .map_err(|error| io::Error::other(format!("{error}; {}", daemon.log())))?;
        Ok(Session { daemon, client })
    }

    /// The disk answers a part of its requests later than others, so that they end in another order.
    fn stagger(&mut self) {
        for operation in [Operation::Write, Operation::Flush] {
            if self.random.one_in(2) {
                let time = Duration::from_micros(500 + self.random.below(4000));
                let start = self.random.below(48 << 20);
                let range = start..start + self.random.below(32 << 20);
                let count = 1 + self.random.below(60);
                self.host.disk.add(Rule::delay(operation, time).within(range).times(count));
            }
        }
    }

    /// Runs the guest on all queues until `crash` returns; what it left unanswered.
    fn load(
        &mut self,
        crash: impl FnOnce(&Daemon, &Host, &Mutex<Ledger>, &AtomicBool) -> io::Result<()>,
    ) -> io::Result<Vec<Range<u64>>> {
        let session = self.session.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let killed = AtomicBool::new(false);
        let features = session.client.features();
        let guest = Guest {
            ledger: &self.ledger,
            disk: &self.host.disk,
            features,
            write_through: self.service.write_through.is_some(),
            hot: operations::hot(IMAGE / SECTOR as u64, &mut self.random),
            killed: &killed,
        };
        if self.service.write_through.is_none() && features & FLUSH == 0 {
            return Err(io::Error::other("FLUSH is not offered"));
        }
        let seeds: Vec<u64> = session.client.queues().iter().map(|_| self.random.bits()).collect();
        let (host, ledger) = (&self.host, &self.ledger);
        let (crashed, ends) = thread::scope(|scope| {
            let guest = &guest;
            let start = |(queue, seed)| scope.spawn(move || guest.run(queue, seed));
            let threads: Vec<_> =
                session.client.queues().iter_mut().zip(seeds).map(start).collect();
            let crashed = crash(&session.daemon, host, ledger, &killed);
            if crashed.is_err() {
                killed.store(true, Ordering::SeqCst);
            }
            let join = |thread: thread::ScopedJoinHandle<'_, io::Result<Ended>>| {
                thread.join().unwrap_or_else(|_| Err(io::Error::other("a queue's thread panicked")))
            };
            (crashed, threads.into_iter().map(join).collect::<Vec<_>>())
        });
        let mut unanswered = Vec::new();
        for end in ends {
            let end = end.map_err(context("guest"))?;
            self.count(|tally| tally.flushes += end.flushes);
            unanswered.extend(end.unanswered);
        }
        crashed.map(|()| unanswered)
    }

    fn count(&self, add: impl FnOnce(&mut Tally)) {
        add(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The power goes between two of the disk's requests.
    fn cut(&mut self, loss: crate::rig::fault_disk::Loss) -> io::Result<()> {
        self.prepare()?;
        self.host.disk.record(LOG);
        self.stagger();
        let when = if self.random.one_in(3) {
            When::Flushes(1 + self.random.below(24))
        } else {
            When::Requests(1 + self.random.below(1500))
        };
        // A guest without FLUSH may cause none.
        let when = match when {
            When::Flushes(count) if self.service.write_through == Some(false) => {
                When::Requests(10 * count)
            }
            when => when,
        };
        self.host.disk.arm(Cut { when, loss, seed: self.random.bits() });
        let visits = if self.random.one_in(3) { 1 + self.random.below(6) } else { 0 };
        let mut random = Random::new(self.random.bits());
        self.load(|_, host, _, _| {
            host.visit(visits, &mut random)?;
            if host.disk.await_cut(PATIENCE) {
                return Ok(());
            }
            host.disk.cut(loss, 0);
            Err(io::Error::other(format!("{when:?} never came")))
        })?;
        if let Some(session) = self.session.take() {
            session.daemon.sigkill()?;
            drop(session.client);
            drop(session.daemon);
        }
        self.golden.kill();
        self.host.reboot()?;
        self.session = Some(self.start()?);
        self.compare(Floor::Durable)?;
        self.count(|tally| tally.cuts += 1);
        Ok(())
    }

    /// The daemon is killed with writes in flight, and its successor started while they still are.
    fn kill(&mut self) -> io::Result<()> {
        self.prepare()?;
        self.host.disk.record(LOG);
        self.stagger();
        let (wanted, slow) = (50 + self.random.below(400), 1 + self.random.below(24));
        let unanswered = self.load(|daemon, host, ledger, killed| {
            let done = || ledger.lock().unwrap_or_else(PoisonError::into_inner).done();
            let (from, before) = (done(), host.disk.counts().hit);
            wait::until("requests before the kill", PATIENCE, || {
                (done() >= from + wanted).then_some(())
            })?;
            host.disk.heal();
            host.disk.add(Rule::delay(Operation::Write, SLOW).times(slow));
            wait::until("a write to leave in flight", PATIENCE, || {
                (host.disk.counts().hit > before && host.disk.counts().in_flight > 0).then_some(())
            })?;
            daemon.sigkill()?;
            // It answers nothing any more; what it has answered by now the guest still finds.
            thread::sleep(Duration::from_millis(5));
            killed.store(true, Ordering::SeqCst);
            Ok(())
        })?;
        // The dead one's last requests hold it up: not waited for.
        let dead = self.session.take();
        let haunted = self.host.disk.counts().in_flight > 0;
        self.session = Some(self.start()?);
        drop(dead);
        self.compare(Floor::Completed)?;
        self.rewrite(&unanswered)?;
        wait::until("the last write of the dead", PATIENCE, || {
            (self.host.disk.counts().in_flight == 0).then_some(())
        })?;
        self.host.disk.heal();
        self.compare(Floor::Completed)?;
        self.count(|tally| {
            tally.kills += 1;
            tally.haunted += u64::from(haunted);
        });
        Ok(())
    }

    /// Writes newer versions where the dead daemon's writes were in flight.
    fn rewrite(&mut self, ranges: &[Range<u64>]) -> io::Result<()> {
        let session = self.session.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let ledger = self.ledger.get_mut().unwrap_or_else(PoisonError::into_inner);
        for range in ranges {
            let version = ledger.issue(range, super::ledger::Content::Stamp);
            let data = Ledger::data(range, version);
            session.client.write_at(range.start * SECTOR as u64, &data)?;
            ledger.complete(range, self.service.write_through.is_some());
        }
        Ok(())
    }

    /// Reads the whole image through the daemon and holds it against the ledger.
    fn compare(&mut self, floor: Floor) -> io::Result<()> {
        const STEP: u64 = 256 << 10;
        let session = self.session.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let mut bytes = Vec::new();
        for offset in (0..IMAGE).step_by(usize::try_from(STEP).map_err(io::Error::other)?) {
            let len = usize::try_from(STEP.min(IMAGE - offset)).map_err(io::Error::other)?;
            bytes.extend(session.client.read_at(offset, len)?);
        }
        let ledger = self.ledger.get_mut().unwrap_or_else(PoisonError::into_inner);
        let faults = ledger.settle(&bytes, floor);
        self.count(|tally| {
            tally.checked += IMAGE / SECTOR as u64;
            tally.lost += faults.len() as u64;
        });
        if faults.is_empty() { Ok(()) } else { Err(self.explain(&faults)) }
    }

    /// What is known of a loss: the first sectors of it, and what the disk did with the first of these.
    fn explain(&self, faults: &[Fault]) -> io::Error {
        let mut text = format!("{} sectors are wrong", faults.len());
        for fault in faults.iter().take(8) {
            text += &format!("\n  {fault}");
        }
        if let Some(fault) = faults.first() {
            let (block, within) = (fault.sector / BLOCK_SECTORS, fault.sector % BLOCK_SECTORS);
            let prefix: Vec<u8> = [block, within].iter().flat_map(|w| w.to_le_bytes()).collect();
            let story = self.host.disk.take_log().story(&prefix);
            let skip = story.len().saturating_sub(40);
            text += &format!("\nthe disk's log of sector {}:", fault.sector);
            for line in story.iter().skip(skip) {
                text += &format!("\n  {line}");
            }
        }
        io::Error::other(text)
    }
}

/// Ends a daemon in good order.
fn end(daemon: &mut Daemon) -> io::Result<()> {
    let status = daemon.sigterm()?;
    if status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("the daemon ended with {status}: {}", daemon.log())))
}
