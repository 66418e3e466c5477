//! The history of every sector, and what a read may therefore return.
//!
//! Each write stamps its sectors with its own number, so a read tells which write each sector comes from. A read may return a
//! write that was acknowledged or in flight, but none that another write, finished before the read began, came after (I3); nor
//! may it go back behind what an earlier read returned (I5). After a loss of power of all machines, writes that no flush covers
//! may be there or not, each sector on its own, but what is once read stays (I2).

use std::collections::BTreeMap;

pub const SECTOR: u64 = 512;

/// Number of a write; 0 is the state before any.
pub type Stamp = u64;
/// Order of events, not time: many events share a time.
type Moment = u64;

/// How many events back a flushed write's predecessors are kept: more than happen while one read is under way.
const HISTORY: Moment = 20_000;

#[derive(Clone, Debug)]
struct Write {
    stamp: Stamp,
    zero: bool,
    began: Moment,
    /// `None` while it is in flight.
    ended: Option<Moment>,
    /// It is on stable media for sure.
    flushed: bool,
    /// A loss of power came before it was flushed: it may be there or not.
    uncertain: bool,
}

#[derive(Clone, Debug)]
struct Observed {
    stamp_or_zero: Option<Stamp>,
    began: Moment,
    ended: Moment,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    writes: Vec<Write>,
    observed: Option<Observed>,
}

#[derive(Debug, Default)]
pub struct Checker {
    sectors: BTreeMap<u64, Sector>,
    clock: Moment,
}

/// The bytes of a sector that was written by `stamp`.
pub fn sector_bytes(stamp: Stamp, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for chunk in bytes.chunks_exact_mut(16) {
        chunk[..8].copy_from_slice(&stamp.to_le_bytes());
        chunk[8..].copy_from_slice(&sector.to_le_bytes());
    }
    bytes
}

/// Which write a sector's bytes come from; `None` for zeros.
fn stamp_of(sector: u64, bytes: &[u8]) -> Result<Option<Stamp>, String> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    if bytes == sector_bytes(stamp, sector) {
        Ok(Some(stamp))
    } else {
        Err(format!("sector {sector} holds garbage: {:02x?}", &bytes[..32]))
    }
}

impl Checker {
    /// Time passes between any two calls.
    pub fn tick(&mut self) -> Moment {
        self.clock += 1;
        self.clock
    }

    pub fn write_begins(&mut self, stamp: Stamp, zero: bool, sectors: impl Iterator<Item = u64>) {
        let began = self.tick();
        for sector in sectors {
            self.sectors.entry(sector).or_default().writes.push(Write {
                stamp,
                zero,
                began,
                ended: None,
                flushed: false,
                uncertain: false,
            });
        }
    }

    pub fn write_ends(&mut self, stamp: Stamp, fua: bool, sectors: impl Iterator<Item = u64>) {
        let ended = self.tick();
        for sector in sectors {
            let state = self.sectors.entry(sector).or_default();
            for write in state.writes.iter_mut().filter(|write| write.stamp == stamp) {
                write.ended = Some(ended);
                write.flushed |= fua;
            }
            prune(state);
        }
    }

    /// A flush that began at `began` has ended: every write that had ended by then is on stable media.
    pub fn flush_ends(&mut self, began: Moment) {
        for sector in self.sectors.values_mut() {
            for write in &mut sector.writes {
                write.flushed |= write.ended.is_some_and(|ended| ended <= began);
            }
        }
    }

    /// Every machine lost power, the one that writes included: what was in flight is not tried again.
    pub fn power_fails(&mut self) {
        let now = self.tick();
        for sector in self.sectors.values_mut() {
            for write in sector.writes.iter_mut().filter(|write| !write.flushed) {
                write.ended.get_or_insert(now);
                write.uncertain = true;
            }
            sector.observed = None;
        }
    }

    pub fn read_ends(&mut self, began: Moment, first_sector: u64, bytes: &[u8]) -> Result<(), String> {
        let ended = self.tick();
        for (sector, bytes) in (first_sector..).zip(bytes.chunks_exact(SECTOR as usize)) {
            let found = stamp_of(sector, bytes)?;
            let state = self.sectors.entry(sector).or_default();
            check(state, found, began).map_err(|reason| format!("sector {sector}, read from {began} to {ended}: {reason}; {state:?}"))?;
            state.observed = Some(Observed { stamp_or_zero: found, began, ended });
        }
        Ok(())
    }
}

fn check(state: &Sector, found: Option<Stamp>, began: Moment) -> Result<(), String> {
    let matches = |write: &&Write| match found {
        Some(stamp) => write.stamp == stamp && !write.zero,
        None => write.zero,
    };
    // The state before any write counts as zeros that were written, and flushed, before time began.
    let origin = Write { stamp: 0, zero: true, began: 0, ended: Some(0), flushed: true, uncertain: false };
    let candidates: Vec<&Write> = state.writes.iter().chain([&origin]).filter(matches).collect();
    if candidates.is_empty() {
        return Err(format!("{found:?} was never written there, or long ago"));
    }
    // Some write came wholly after this one, and wholly before the read.
    let superseded = |write: &Write| {
        let after = |other: &&Write| {
            !other.uncertain && write.ended.is_some_and(|ended| ended < other.began) && other.ended.is_some_and(|ended| ended < began)
        };
        state.writes.iter().any(|other| after(&other))
    };
    if candidates.iter().all(|write| superseded(write)) {
        return Err(format!("{found:?} had been overwritten by a finished write"));
    }
    let Some(observed) = state.observed.as_ref().filter(|observed| observed.ended < began) else { return Ok(()) };
    if observed.stamp_or_zero == found {
        return Ok(());
    }
    // It may have changed only to a write that had not ended when the value before was read.
    let newer = |write: &Write| write.ended.is_none_or(|ended| ended > observed.began) && write.stamp != 0;
    if !candidates.iter().any(|write| newer(write)) {
        return Err(format!("{found:?} after {:?} had been read: it went back", observed.stamp_or_zero));
    }
    Ok(())
}

/// Forgets writes that no read can return any more, not even after a loss of power.
fn prune(state: &mut Sector) {
    let floor = state.writes.iter().filter(|write| write.flushed && write.ended.is_some()).map(|write| write.began).max();
    if let Some(floor) = floor {
        // A read that began some time ago is still checked against what was finished when it began.
        let keep_from = floor.saturating_sub(HISTORY);
        state.writes.retain(|write| write.ended.is_none_or(|ended| ended >= keep_from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(checker: &mut Checker, stamp: Option<Stamp>) -> Result<(), String> {
        let began = checker.tick();
        let bytes = stamp.map_or([0; 512], |stamp| sector_bytes(stamp, 7));
        checker.read_ends(began, 7, &bytes)
    }

    fn write(checker: &mut Checker, stamp: Stamp) {
        checker.write_begins(stamp, false, 7..8);
        checker.write_ends(stamp, false, 7..8);
    }

    #[test]
    fn an_acknowledged_write_must_be_read() {
        let mut checker = Checker::default();
        write(&mut checker, 1);
        assert!(read(&mut checker, None).is_err());
        let mut checker = Checker::default();
        write(&mut checker, 1);
        write(&mut checker, 2);
        assert!(read(&mut checker, Some(1)).is_err());
        assert!(read(&mut checker, Some(2)).is_ok());
        assert!(read(&mut checker, Some(3)).is_err());
    }

    #[test]
    fn a_write_in_flight_may_show_but_not_go_away_again() {
        let mut checker = Checker::default();
        write(&mut checker, 1);
        checker.write_begins(2, false, 7..8);
        assert!(read(&mut checker, Some(1)).is_ok());
        assert!(read(&mut checker, Some(2)).is_ok());
        assert!(read(&mut checker, Some(1)).is_err());
    }

    #[test]
    fn only_flushed_writes_survive_a_loss_of_power_for_sure_and_what_is_read_stays() {
        let mut checker = Checker::default();
        write(&mut checker, 1);
        let flush = checker.tick();
        checker.flush_ends(flush);
        write(&mut checker, 2);
        write(&mut checker, 3);
        checker.power_fails();
        assert!(read(&mut checker, None).is_err(), "1 was flushed");
        assert!(read(&mut checker, Some(2)).is_ok());
        assert!(read(&mut checker, Some(3)).is_err(), "2 was read, and nothing was written since");
        assert!(read(&mut checker, Some(2)).is_ok());
    }

    #[test]
    fn garbage_is_found() {
        let mut checker = Checker::default();
        write(&mut checker, 1);
        assert!(checker.read_ends(3, 7, &sector_bytes(1, 8)).is_err(), "another sector's bytes");
    }
}
