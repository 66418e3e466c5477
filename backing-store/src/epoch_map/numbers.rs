//! Maps whose keys are numbers that the store itself has given out: places, I/Os, operations.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

pub(super) type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;
pub(super) type NumberSet<K> = HashSet<K, BuildHasherDefault<NumberHasher>>;

/// Spreads one number over 64 bits by a multiplication (Fibonacci hashing: Knuth, The Art of Computer Programming 3, 6.4). The
/// standard hasher withstands keys that an enemy has chosen, at several times the cost; nobody chooses these.
#[derive(Debug, Default)]
pub(super) struct NumberHasher(u64);

/// 2^64 divided by the golden ratio.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let product = (self.0 ^ number).wrapping_mul(SPREAD);
        // The map looks at the highest and at the lowest bits.
        self.0 = product ^ (product >> 32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
