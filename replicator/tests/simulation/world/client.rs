//! The client: what it asks of the volume, and what it makes of the answers.

use carrick_backing_store::dice::Dice;
use carrick_backing_store::{ByteLength, ByteOffset, Extent, VolumeSize};
use carrick_replicator::engine::{Engine, ReadBytes, Request, RequestError, RequestTag, Response};

use super::{Event, MILLISECOND, Micros, World};
use crate::checker::{SECTOR, sector_bytes};

/// Requests in flight.
const DEPTH: usize = 8;
/// After how many requests the client rests, on average, and how long at most.
const PAUSE_ONE_IN: u64 = 4;
const PAUSE_LONGEST: Micros = 400 * MILLISECOND;

#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) request: Request,
    began: u64,
    stamp: u64,
}

fn sectors(extent: Extent) -> std::ops::Range<u64> {
    extent.offset().get() / SECTOR..extent.end().get() / SECTOR
}

/// The sectors of whole blocks: what a discard zeroes.
fn discarded(extent: Extent) -> std::ops::Range<u64> {
    let first = extent.offset().get().next_multiple_of(4096) / SECTOR;
    let end = extent.end().get() / 4096 * 4096 / SECTOR;
    first..end.max(first)
}

/// Sectors anywhere, mostly whole blocks.
pub(super) fn random_extent(dice: &mut Dice, size: VolumeSize) -> Extent {
    let all = size.blocks() * 8;
    let mut first = dice.below(all);
    let mut count = 1 + dice.skewed(40).min(all - first - 1);
    if !dice.once_in(3) {
        first = first / 8 * 8;
        count = count.next_multiple_of(8).min(all - first);
    }
    Extent::new(ByteOffset::new(first * SECTOR), ByteLength::new(count * SECTOR)).unwrap()
}

/// What a read of these sectors gave.
pub(super) fn bytes_read(extent: Extent, found: ReadBytes) -> Vec<u8> {
    let length = usize::try_from(extent.length().get()).unwrap();
    let bytes = match found {
        ReadBytes::Zeroes => vec![0; length],
        ReadBytes::Bytes(bytes) => bytes.to_vec(),
    };
    assert_eq!(bytes.len(), length);
    bytes
}

impl World {
    pub(super) fn on_complete(&mut self, tag: RequestTag, result: Result<Response, RequestError>) -> Result<(), String> {
        let pending = self.pending.remove(&tag).ok_or_else(|| format!("{tag:?} was completed twice"))?;
        self.progress_at = self.now;
        self.answered += 1;
        // Those in a calm see no faults.
        self.completed += u64::from(self.calm.is_none());
        let response = result.map_err(|error| format!("{:?} failed: {error}", pending.request))?;
        match (pending.request, response) {
            (Request::Read { extent }, Response::Read(found)) => {
                self.checker.read_ends(pending.began, extent.offset().get() / SECTOR, &bytes_read(extent, found))?;
            }
            (Request::Write { extent, fua, .. } | Request::WriteZeroes { extent, fua }, Response::Done) => {
                self.checker.write_ends(pending.stamp, fua, sectors(extent));
            }
            (Request::Discard { extent }, Response::Done) => self.checker.write_ends(pending.stamp, false, discarded(extent)),
            (Request::Flush, Response::Done) => self.checker.flush_ends(pending.began),
            (request, response) => return Err(format!("{request:?} was answered with {response:?}")),
        }
        Ok(())
    }

    /// The client keeps a few requests in flight.
    pub(super) fn offer_requests(&mut self) -> bool {
        let Some(size) = self.engine().filter(|engine| engine.is_serving()).map(Engine::size) else { return false };
        let mut offered = false;
        while self.faults && !self.is_settling() && self.pending.len() < DEPTH && self.now >= self.pause_until {
            if self.plan.pauses && self.dice.once_in(PAUSE_ONE_IN) {
                self.pause_until = self.now + self.dice.skewed(PAUSE_LONGEST);
                self.schedule(self.pause_until, Event::Rested);
            }
            self.next_tag += 1;
            let tag = RequestTag(self.next_tag);
            let pending = self.random_request(self.next_tag, size);
            let request = pending.request.clone();
            self.pending.insert(tag, pending);
            let now = self.monotonic();
            if let Some(target) = &mut self.target {
                target.engine.submit(now, tag, request);
            }
            offered = true;
        }
        offered
    }

    fn random_request(&mut self, stamp: u64, size: VolumeSize) -> Pending {
        let extent = random_extent(&mut self.dice, size);
        let fua = self.dice.once_in(8);
        let request = match self.dice.below(16) {
            0..=4 => Request::Read { extent },
            5 => Request::Flush,
            6 => Request::Discard { extent },
            7 => Request::WriteZeroes { extent, fua },
            _ => {
                let mut data = self.pool.take(usize::try_from(extent.length().get()).unwrap());
                for (sector, bytes) in sectors(extent).zip(data.chunks_exact_mut(SECTOR as usize)) {
                    bytes.copy_from_slice(&sector_bytes(stamp, sector));
                }
                Request::Write { extent, data: data.share(), fua }
            }
        };
        match &request {
            Request::Write { .. } => self.checker.write_begins(stamp, false, sectors(extent)),
            Request::WriteZeroes { .. } => self.checker.write_begins(stamp, true, sectors(extent)),
            Request::Discard { .. } => self.checker.write_begins(stamp, true, discarded(extent)),
            Request::Read { .. } | Request::Flush => {}
        }
        Pending { request, began: self.checker.tick(), stamp }
    }
}
