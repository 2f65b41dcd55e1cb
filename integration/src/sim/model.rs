// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The flat byte model: what each sector of the image may hold, as a guest or a buffered reader
//! may observe it now, and as a power cut may leave it.
//!
//! Each write to a sector is a *candidate*. A candidate goes when a write that began after it had
//! ended has itself succeeded (for the durable set: and a flush accepted after that succeeded).

use std::ops::Range;

use super::disk::{Stamp, ZERO};

/// Not ended yet.
const OPEN: u64 = u64::MAX;

#[derive(Clone, Copy, Hash, Debug)]
struct Candidate {
    stamp: Stamp,
    request: u64,
    began: u64,
    ended: u64,
    ok: bool,
}

#[derive(Clone, Hash, Debug, Default)]
struct Sector {
    live: Vec<Candidate>,
    durable: Vec<Candidate>,
    /// Anything goes: the file was cut short here behind the daemon's back.
    wild: bool,
}

/// What a reader saw that it must not see.
#[derive(Clone, Debug)]
pub(super) struct Wrong {
    pub(super) sector: usize,
    pub(super) saw: Stamp,
    pub(super) admissible: Vec<Stamp>,
}

#[derive(Hash, Debug)]
pub(super) struct Model {
    sectors: Vec<Sector>,
    clock: u64,
}

impl Model {
    pub(super) fn new(initial: impl Iterator<Item = Stamp>) -> Self {
        let sectors = initial
            .map(|stamp| {
                let first = Candidate { stamp, request: 0, began: 0, ended: 0, ok: true };
                Sector { live: vec![first], durable: vec![first], wild: false }
            })
            .collect();
        Self { sectors, clock: 0 }
    }

    /// A moment later than all before.
    pub(super) const fn moment(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Request `request` (above 0) may write `stamp(sector)` from now on.
    pub(super) fn begin(
        &mut self,
        request: u64,
        range: Range<usize>,
        stamp: impl Fn(usize) -> Stamp,
    ) {
        let began = self.moment();
        for at in range {
            let new = Candidate { stamp: stamp(at), request, began, ended: OPEN, ok: false };
            self.sectors[at].live.push(new);
            self.sectors[at].durable.push(new);
        }
    }

    /// The request has ended. Only a successful one replaces what was there before.
    pub(super) fn end(&mut self, request: u64, range: Range<usize>, ok: bool) {
        let ended = self.moment();
        for sector in &mut self.sectors[range] {
            let all = sector.live.iter_mut().chain(&mut sector.durable);
            for candidate in all.filter(|c| c.request == request) {
                candidate.ended = ended;
                candidate.ok = ok;
            }
            if ok {
                let began = sector.live.iter().find(|c| c.request == request).map(|c| c.began);
                sector.live.retain(|c| began.is_none_or(|began| c.ended >= began));
            }
        }
    }

    /// A flush that began at moment `began` has succeeded.
    pub(super) fn flushed(&mut self, began: u64) {
        for sector in &mut self.sectors {
            settle(&mut sector.durable, |c| c.ended < began);
        }
    }

    /// A write-through write has succeeded: it is durable.
    pub(super) fn durable(&mut self, request: u64, range: Range<usize>) {
        for sector in &mut self.sectors[range] {
            settle(&mut sector.durable, |c| c.request == request);
        }
    }

    /// Whether a request that may write the sector is under way.
    pub(super) fn contended(&self, at: usize) -> bool {
        self.sectors[at].live.iter().any(|c| c.ended == OPEN)
    }

    /// What the sector may hold now.
    pub(super) fn admissible(&self, at: usize) -> Vec<Stamp> {
        self.sectors[at].live.iter().map(|c| c.stamp).collect()
    }

    pub(super) fn is_wild(&self, at: usize) -> bool {
        self.sectors[at].wild
    }

    /// A request that looked at the sector from `began` until now saw `saw`: nothing else is
    /// there, unless a write was under way.
    pub(super) fn observed(&mut self, at: usize, saw: Stamp, began: u64) {
        let live = &mut self.sectors[at].live;
        if live.iter().all(|c| c.ended < began) && live.iter().any(|c| c.stamp == saw) {
            live.retain(|c| c.stamp == saw);
        }
    }

    /// Checks what a buffered reader sees at this moment.
    pub(super) fn check(&self, at: usize, saw: Stamp) -> Result<(), Wrong> {
        let sector = &self.sectors[at];
        if sector.wild || sector.live.iter().any(|c| c.stamp == saw) {
            return Ok(());
        }
        Err(Wrong { sector: at, saw, admissible: self.admissible(at) })
    }

    /// From here on anything may be read: the end of the file was moved behind us.
    pub(super) fn let_go(&mut self, range: Range<usize>) {
        for sector in &mut self.sectors[range] {
            sector.wild = true;
        }
    }

    /// Somebody else wrote the sector, atomically and without a sync.
    pub(super) fn overwrite(&mut self, at: usize, stamp: Stamp) {
        let now = self.moment();
        let new = Candidate { stamp, request: 0, began: now, ended: now, ok: false };
        self.sectors[at].live = vec![new];
        self.sectors[at].durable.push(new);
    }

    /// Ends what was under way when the daemon died: it may or may not have happened.
    pub(super) fn abandon(&mut self) {
        let now = self.moment();
        for sector in &mut self.sectors {
            let all = sector.live.iter_mut().chain(&mut sector.durable);
            all.filter(|c| c.ended == OPEN).for_each(|c| c.ended = now);
        }
    }

    /// Whether a power cut now may leave `left` in the sector.
    pub(super) fn may_be_left(&self, at: usize, left: Stamp) -> bool {
        let sector = &self.sectors[at];
        sector.wild || sector.durable.iter().any(|c| c.stamp == left)
    }

    /// The power failed and `left` is what the file holds: each sector must be a candidate no
    /// flush has settled, and stays what it is.
    pub(super) fn cut(&mut self, left: impl Fn(usize) -> Stamp) -> Result<(), Wrong> {
        let now = self.moment();
        for (at, sector) in self.sectors.iter_mut().enumerate() {
            let saw = left(at);
            if !sector.wild && sector.durable.iter().all(|c| c.stamp != saw) {
                let admissible = sector.durable.iter().map(|c| c.stamp).collect();
                return Err(Wrong { sector: at, saw, admissible });
            }
            let one = Candidate { stamp: saw, request: 0, began: now, ended: now, ok: true };
            sector.live = vec![one];
            sector.durable = vec![one];
        }
        Ok(())
    }
}

/// Drops what the newest successful candidate that `counts` has replaced.
fn settle(candidates: &mut Vec<Candidate>, counts: impl Fn(&Candidate) -> bool) {
    if candidates.len() < 2 {
        return;
    }
    let newest = candidates.iter().filter(|c| c.ok && counts(c)).map(|c| c.began).max();
    if let Some(began) = newest {
        candidates.retain(|c| c.ended >= began);
    }
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = |stamp: Stamp| match stamp {
            ZERO => "zeros".to_owned(),
            stamp => format!("{stamp:#x}"),
        };
        let admissible: Vec<String> = self.admissible.iter().map(|s| name(*s)).collect();
        let admissible = admissible.join(" or ");
        write!(f, "sector {} holds {}, must be {admissible}", self.sector, name(self.saw))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        Model::new([1, 2].into_iter())
    }

    #[test]
    fn a_write_replaces_what_ended_before_it_began_and_nothing_else() {
        let mut m = model();
        m.begin(10, 0..1, |_| 5);
        m.begin(11, 0..1, |_| 6);
        assert_eq!(m.admissible(0), [1, 5, 6]);
        m.end(10, 0..1, true);
        assert_eq!(m.admissible(0), [5, 6]);
        m.end(11, 0..1, true);
        assert_eq!(m.admissible(0), [5, 6]);
        m.observed(0, 5, m.clock + 1);
        assert_eq!(m.admissible(0), [5]);
        assert!(m.check(0, 6).is_err() && m.check(1, 2).is_ok());
    }

    #[test]
    fn a_failed_write_may_have_happened() {
        let mut m = model();
        m.begin(10, 0..2, |_| 5);
        m.end(10, 0..2, false);
        assert_eq!(m.admissible(0), [1, 5]);
        m.begin(11, 0..1, |_| 6);
        m.end(11, 0..1, true);
        assert_eq!(m.admissible(0), [6]);
    }

    #[test]
    fn only_a_flush_accepted_later_settles_a_write() {
        let mut m = model();
        let early = m.moment();
        m.begin(10, 0..1, |_| 5);
        m.end(10, 0..1, true);
        m.flushed(early);
        assert!(m.cut(|at| [1, 2][at]).is_ok());
        m.begin(11, 0..1, |_| 6);
        m.end(11, 0..1, true);
        let late = m.moment();
        m.flushed(late);
        assert!(m.cut(|at| [1, 2][at]).is_err());
    }

    #[test]
    fn a_write_under_way_when_a_flush_began_stays_open() {
        let mut m = model();
        m.begin(10, 0..1, |_| 5);
        let flush = m.moment();
        m.end(10, 0..1, true);
        m.flushed(flush);
        assert!(m.cut(|at| [1, 2][at]).is_ok());
    }
}
