//! What a simulated disk holds: of every block what is stable, and every value since the last sync, by sector.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::dice::Dice;
use crate::units::BLOCK_SIZE;

const BLOCK: usize = BLOCK_SIZE as usize;
/// What a disk writes whole or not at all, in bytes.
const SECTOR: usize = 512;
/// All sectors of a block.
pub(super) const WHOLE: u8 = u8::MAX;

/// One block's content.
pub(super) type Bytes = [u8; BLOCK];

/// The sectors of a block, one bit each.
fn sectors_of(set: u8) -> impl Iterator<Item = usize> {
    (0..BLOCK / SECTOR).filter(move |sector| set & 1 << sector != 0)
}

/// Copies sectors from one block over another.
pub(super) fn overlay(onto: &mut Bytes, from: &Bytes, set: u8) {
    for sector in sectors_of(set) {
        let range = sector * SECTOR..(sector + 1) * SECTOR;
        onto[range.clone()].copy_from_slice(&from[range]);
    }
}

/// A block from a slice of its length, copied once.
pub(super) fn block_of(slice: &[u8]) -> Arc<Bytes> {
    Arc::<[u8]>::from(slice).try_into().unwrap_or_else(|odd: Arc<[u8]>| panic!("a block has {BLOCK} bytes, not {}", odd.len()))
}

/// Blocks that mean nothing. So many that no two neighbours need be the same, and few enough to be made once.
const GARBAGE: usize = 16;

/// Bytes that mean nothing.
fn garbage(dice: &mut Dice) -> Arc<Bytes> {
    let mut bytes = [0; BLOCK];
    for chunk in bytes.as_chunks_mut::<8>().0 {
        *chunk = dice.number().to_le_bytes();
    }
    Arc::new(bytes)
}

/// One value since the last sync.
#[derive(Clone, Debug)]
struct Layer {
    /// How many writes had completed when this one had.
    at: u64,
    /// Which sectors it changed.
    sectors: u8,
    bytes: Arc<Bytes>,
    /// A sync that covered it has failed: no later one makes it stable.
    forsaken: bool,
}

#[derive(Clone, Debug)]
struct Block {
    stable: Arc<Bytes>,
    /// What was stable before the last sync that changed it.
    earlier: Option<Arc<Bytes>>,
    /// Oldest first.
    layers: Vec<Layer>,
    /// The stable sectors under all layers: what a read finds.
    now: Arc<Bytes>,
    /// Discarded and not written since.
    undefined: bool,
}

/// The blocks. Deterministic: it iterates in the order of the blocks only.
#[derive(Clone, Debug)]
pub(super) struct Medium {
    blocks: BTreeMap<u64, Block>,
    garbage: [Arc<Bytes>; GARBAGE],
    zeroes: Arc<Bytes>,
    /// Those with layers.
    unsynced: BTreeSet<u64>,
    completed: u64,
    /// What a block that was never written holds: garbage or zeros.
    pub(super) garbage_when_unwritten: bool,
}

impl Medium {
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        Self {
            blocks: BTreeMap::new(),
            garbage: std::array::from_fn(|_| garbage(&mut dice)),
            zeroes: Arc::new([0; BLOCK]),
            unsynced: BTreeSet::new(),
            completed: 0,
            garbage_when_unwritten: true,
        }
    }

    /// How many writes have completed: what a sync submitted now covers.
    pub(super) const fn completed(&self) -> u64 {
        self.completed
    }

    /// What a block that was never written holds: always the same.
    fn unwritten(&self, block: u64) -> &Arc<Bytes> {
        if self.garbage_when_unwritten { self.garbage(&mut Dice::new(block)) } else { &self.zeroes }
    }

    fn garbage(&self, dice: &mut Dice) -> &Arc<Bytes> {
        &self.garbage[dice.index(GARBAGE)]
    }

    /// What a block holds if it isn't discarded.
    pub(super) fn content(&self, block: u64) -> Arc<Bytes> {
        Arc::clone(self.blocks.get(&block).map_or_else(|| self.unwritten(block), |found| &found.now))
    }

    /// What a read finds: of a discarded block anything, and another thing each time.
    pub(super) fn read(&self, blocks: Range<u64>, dice: &mut Dice, mut found: impl FnMut(u64, &Bytes, &mut Dice)) {
        let mut written = self.blocks.range(blocks.clone()).peekable();
        for block in blocks {
            let bytes = match written.next_if(|(at, _)| **at == block) {
                Some((_, known)) if known.undefined => match dice.below(4) {
                    0 => &self.zeroes,
                    1 => self.garbage(dice),
                    2 => &known.stable,
                    _ => &known.now,
                },
                Some((_, known)) => &known.now,
                None => self.unwritten(block),
            };
            found(block, bytes, dice);
        }
    }

    fn block(&mut self, block: u64) -> &mut Block {
        let stable = Arc::clone(self.unwritten(block));
        let new = || Block { now: Arc::clone(&stable), stable, earlier: None, layers: Vec::new(), undefined: false };
        self.blocks.entry(block).or_insert_with(new)
    }

    /// A write, or a part of one, has reached the disk's cache.
    pub(super) fn write(&mut self, block: u64, bytes: &Arc<Bytes>, sectors: u8) {
        if sectors == 0 {
            return;
        }
        self.completed += 1;
        let at = self.completed;
        self.unsynced.insert(block);
        let found = self.block(block);
        if sectors == WHOLE {
            found.now = Arc::clone(bytes);
            found.undefined = false;
        } else {
            overlay(Arc::make_mut(&mut found.now), bytes, sectors);
        }
        found.layers.push(Layer { at, sectors, bytes: Arc::clone(bytes), forsaken: false });
    }

    /// The block may hold anything from here on, also after a crash.
    pub(super) fn discard(&mut self, block: u64, dice: &mut Dice) {
        if self.blocks.contains_key(&block) {
            match dice.below(3) {
                0 => self.write(block, &Arc::clone(&self.zeroes), WHOLE),
                1 => self.write(block, &Arc::clone(self.garbage(dice)), WHOLE),
                _ => {}
            }
            self.block(block).undefined = true;
        }
    }

    /// Makes stable what had completed by `mark`, and nothing else. If it fails, that is forsaken: it is read, but may be gone
    /// after a loss of power, whatever is synced later.
    pub(super) fn sync(&mut self, mark: u64, succeeds: bool) {
        for block in std::mem::take(&mut self.unsynced) {
            let found = self.block(block);
            if !succeeds {
                found.layers.iter_mut().filter(|layer| layer.at <= mark).for_each(|layer| layer.forsaken = true);
            } else if found.layers.iter().any(|layer| layer.at <= mark && !layer.forsaken) {
                found.settle(mark);
            }
            if !found.layers.is_empty() {
                self.unsynced.insert(block);
            }
        }
    }

    /// Takes the power away: every unsynced sector becomes any of its values since the last sync, the old one included.
    pub(super) fn lose_power(&mut self, dice: &mut Dice) {
        // Runs in which all is old or all is new find what a mixture hides behind its many torn blocks.
        let fate = dice.below(8);
        for block in std::mem::take(&mut self.unsynced) {
            let found = self.block(block);
            let mut survivor = Bytes::clone(&found.stable);
            match if fate < 2 { fate } else { dice.below(4) } {
                0 => {}
                1 => survivor = *found.now,
                2 => {
                    let count = dice.index(found.layers.len() + 1);
                    found.layers[..count].iter().for_each(|layer| overlay(&mut survivor, &layer.bytes, layer.sectors));
                }
                _ => {
                    for sector in sectors_of(WHOLE) {
                        let values: Vec<&Layer> = found.layers.iter().filter(|layer| layer.sectors & 1 << sector != 0).collect();
                        if let Some(layer) = values.get(dice.index(values.len() + 1)) {
                            overlay(&mut survivor, &layer.bytes, 1 << sector);
                        }
                    }
                }
            }
            found.stable = Arc::new(survivor);
            found.now = Arc::clone(&found.stable);
            found.layers.clear();
        }
    }

    /// Changes a block wherever it is remembered, so that no crash undoes it.
    pub(super) fn damage(&mut self, block: u64, change: impl Fn(&mut Bytes)) {
        let found = self.block(block);
        change(Arc::make_mut(&mut found.stable));
        change(Arc::make_mut(&mut found.now));
        found.layers.iter_mut().for_each(|layer| change(Arc::make_mut(&mut layer.bytes)));
    }

    /// Puts a block back to what was stable before the sync that changed it last. `false` if nothing is remembered.
    pub(super) fn revert(&mut self, block: u64) -> bool {
        let Some(found) = self.blocks.get_mut(&block) else { return false };
        let Some(earlier) = found.earlier.take() else { return false };
        found.stable = earlier;
        found.now = Arc::clone(&found.stable);
        found.layers.clear();
        found.undefined = false;
        self.unsynced.remove(&block);
        true
    }
}

impl Block {
    /// Merges the layers up to a mark into what is stable.
    fn settle(&mut self, mark: u64) {
        self.earlier = Some(Arc::clone(&self.stable));
        let mut kept: Vec<Layer> = Vec::new();
        for layer in self.layers.drain(..) {
            if layer.at > mark || layer.forsaken {
                kept.push(layer);
                continue;
            }
            if layer.sectors == WHOLE {
                self.stable = Arc::clone(&layer.bytes);
            } else {
                overlay(Arc::make_mut(&mut self.stable), &layer.bytes, layer.sectors);
            }
            // What was written before to these sectors can't come back.
            kept.iter_mut().for_each(|older| older.sectors &= !layer.sectors);
        }
        kept.retain(|layer| layer.sectors != 0);
        self.layers = kept;
    }
}
