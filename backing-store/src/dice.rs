//! [`Dice`]: the one source of chance in simulations, tests and benches.

/// A small seeded generator (SplitMix64), so that a seed replays for ever, on every version of every library.
#[derive(Clone, Copy, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Begins with a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub const fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// The index of one of so many things; 0 if there are none.
    pub fn index(&mut self, count: usize) -> usize {
        usize::try_from(self.below(count.max(1) as u64)).unwrap_or(0)
    }

    /// One or the other.
    pub const fn coin(&mut self) -> bool {
        self.number() & 1 == 1
    }

    /// True once in `times`.
    pub const fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// Mostly short, sometimes almost `longest`, which is not 0.
    pub const fn skewed(&mut self, longest: u64) -> u64 {
        let bound = 1 + self.below(longest);
        let bound = 1 + self.below(bound);
        self.below(bound)
    }
}
