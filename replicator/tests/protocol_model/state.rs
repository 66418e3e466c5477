//! What a state of the model consists of, packed into a few words, and the one name that states equal up to renaming share.

/// Replicas there are. Members of a config are a mask of them.
pub const REPLICAS: usize = 3;
/// Primaries there are at most. A primary's term is its index plus one.
pub const PRIMARIES: usize = 3;
/// All replicas.
pub const ALL: u8 = (1 << REPLICAS) - 1;
/// A packed state: a word for each replica, for each primary, and for the rest.
pub type Packed = [u64; REPLICAS + PRIMARIES + 1];

/// The orders in which the replicas can be named.
const ORDERS: [[usize; REPLICAS]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// The replicas of a mask.
pub fn each(mask: u8) -> impl Iterator<Item = usize> {
    (0..REPLICAS).filter(move |replica| mask & (1 << replica) != 0)
}

/// How many are a majority of these members.
pub fn majority(members: u8) -> u32 {
    members.count_ones() / 2 + 1
}

/// A config: its version and its members. Version 0 is none.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    pub version: u8,
    pub members: u8,
}

impl Config {
    pub const NONE: Config = Config { version: 0, members: 0 };

    pub fn next(self, members: u8) -> Config {
        Config { version: self.version + 1, members }
    }
}

/// The writes that a content consists of, oldest in the lowest four bits. Each is named by its term and its sequence.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Log(pub u32);

impl Log {
    fn len(self) -> u32 {
        (u32::BITS - self.0.leading_zeros()).div_ceil(4)
    }

    pub fn with(self, term: u8, sequence: u8) -> Log {
        let shift = self.len() * 4;
        assert!(shift < u32::BITS, "more writes than a log has room for");
        Log(self.0 | u32::from(term << 2 | sequence) << shift)
    }

    /// Term and sequence of each write, oldest first.
    pub fn writes(self) -> impl Iterator<Item = (u8, u8)> {
        (0..self.len()).map(move |place| ((self.0 >> (place * 4 + 2) & 3) as u8, (self.0 >> (place * 4) & 3) as u8))
    }

    /// What comes after these first writes; nothing if it begins otherwise.
    pub fn after(self, first: Log) -> Option<Log> {
        let length = first.len() * 4;
        let mask = if length == 0 { 0 } else { u32::MAX >> (u32::BITS - length) };
        (self.0 & mask == first.0).then(|| Log(self.0.checked_shr(length).unwrap_or(0)))
    }
}

/// What a replica holds, all of it durable.
#[derive(Clone, Copy, Default)]
pub struct Replica {
    pub promised: u8,
    pub log_term: u8,
    /// How many writes of the log term it received.
    pub position: u8,
    /// The config that it knows to be committed, and the one it has prepared.
    pub config: Config,
    pub prepared: Config,
    pub log: Log,
    /// Its content counts for nothing until it adopts a term (only with [`super::rules::Shortcut::DiscardWhileCopied`]).
    pub discarded: bool,
}

/// How far a primary is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Phase {
    /// Takes the record, asks for promises.
    #[default]
    Gathering,
    /// Has chosen a content.
    Reconciling,
    Serving,
    /// Serves, but acknowledges nothing until the next config is committed.
    Changing,
}

/// What a primary knows. It may stop for good after each step, so nothing of this needs to outlive it.
#[derive(Clone, Copy, Default)]
pub struct Primary {
    pub phase: Phase,
    /// Whether it took the record.
    pub took: bool,
    pub config: Config,
    /// The content it chose.
    pub base: Log,
    /// The replicas that adopted its term.
    pub reconciled: u8,
    /// What each of them received.
    pub received: [u8; REPLICAS],
    pub acknowledged: u8,
    pub changes: u8,
    /// The members it changes the config to, and those that prepared this.
    pub next: u8,
    pub prepared: u8,
}

/// Everything: the metadata record, the replicas, the primaries, and what users have seen.
#[derive(Clone, Copy, Default)]
pub struct State {
    pub record: Config,
    pub record_term: u8,
    pub replicas: [Replica; REPLICAS],
    pub primaries: [Primary; PRIMARIES],
    /// The content that users can have read, or been told of, under the highest term that served.
    pub seen: Log,
    /// Users of a primary saw what does not go with what others have seen.
    pub torn: bool,
}

/// Appends fields to a word, the first in the highest bits.
struct Bits(u64);

impl Bits {
    fn put(self, bits: u32, value: impl Into<u64>) -> Bits {
        Bits(self.0 << bits | value.into())
    }

    fn config(self, config: Config, order: &[usize; REPLICAS]) -> Bits {
        self.put(4, config.version).put(3, renamed(config.members, order))
    }

    fn take(&mut self, bits: u32) -> u8 {
        let value = self.0 & ((1 << bits) - 1);
        self.0 >>= bits;
        value as u8
    }

    fn take_config(&mut self) -> Config {
        let members = self.take(3);
        Config { members, version: self.take(4) }
    }

    fn take_log(&mut self) -> Log {
        let log = Log(self.0 as u32);
        self.0 >>= 32;
        log
    }
}

/// A mask of replicas when the one at place n of `order` is called n.
fn renamed(mask: u8, order: &[usize; REPLICAS]) -> u8 {
    order.iter().enumerate().fold(0, |renamed, (name, replica)| renamed | (mask >> replica & 1) << name)
}

impl State {
    /// A volume that was just made with these members. The other replicas know nothing of it.
    pub fn new(members: u8) -> State {
        let config = Config { version: 1, members };
        let mut state = State { record: config, ..State::default() };
        each(members).for_each(|replica| state.replicas[replica].config = config);
        state
    }

    /// The highest term that served, or zero.
    pub fn last_served(&self) -> u8 {
        (0..PRIMARIES).rev().find(|primary| self.primaries[*primary].phase >= Phase::Serving).map_or(0, |primary| primary as u8 + 1)
    }

    fn pack(&self, order: &[usize; REPLICAS]) -> Packed {
        let mut packed = Packed::default();
        for (word, replica) in packed.iter_mut().zip(order.map(|replica| &self.replicas[replica])) {
            let bits = Bits(replica.discarded.into()).put(32, replica.log.0).config(replica.prepared, order).config(replica.config, order);
            *word = bits.put(2, replica.position).put(2, replica.log_term).put(2, replica.promised).0;
        }
        for (word, primary) in packed[REPLICAS..].iter_mut().zip(&self.primaries) {
            let bits = Bits(0).put(32, primary.base.0).config(primary.config, order).put(3, renamed(primary.reconciled, order));
            let bits = order.iter().rev().fold(bits, |bits, replica| bits.put(2, primary.received[*replica]));
            let bits = bits.put(2, primary.acknowledged).put(2, primary.changes).put(3, renamed(primary.next, order));
            *word = bits.put(3, renamed(primary.prepared, order)).put(2, primary.phase as u8).put(1, primary.took).0;
        }
        packed[REPLICAS + PRIMARIES] = Bits(self.torn.into()).put(32, self.seen.0).put(2, self.record_term).config(self.record, order).0;
        packed
    }

    pub fn unpack(packed: &Packed) -> State {
        let mut state = State::default();
        for (replica, word) in state.replicas.iter_mut().zip(packed) {
            let mut bits = Bits(*word);
            (replica.promised, replica.log_term, replica.position) = (bits.take(2), bits.take(2), bits.take(2));
            (replica.config, replica.prepared) = (bits.take_config(), bits.take_config());
            replica.log = bits.take_log();
            replica.discarded = bits.take(1) != 0;
        }
        for (primary, word) in state.primaries.iter_mut().zip(&packed[REPLICAS..]) {
            let mut bits = Bits(*word);
            primary.took = bits.take(1) != 0;
            primary.phase = [Phase::Gathering, Phase::Reconciling, Phase::Serving, Phase::Changing][usize::from(bits.take(2))];
            (primary.prepared, primary.next) = (bits.take(3), bits.take(3));
            (primary.changes, primary.acknowledged) = (bits.take(2), bits.take(2));
            primary.received = std::array::from_fn(|_| bits.take(2));
            (primary.reconciled, primary.config, primary.base) = (bits.take(3), bits.take_config(), bits.take_log());
        }
        let mut bits = Bits(packed[REPLICAS + PRIMARIES]);
        (state.record, state.record_term, state.seen) = (bits.take_config(), bits.take(2), bits.take_log());
        state.torn = bits.take(1) != 0;
        state
    }

    /// All about one replica that does not depend on the names of the others.
    fn key(&self, index: usize) -> (u64, u64) {
        let replica = &self.replicas[index];
        let own = Bits(replica.discarded.into()).put(32, replica.log.0).put(4, replica.prepared.version).put(4, replica.config.version);
        let own = own.put(2, replica.position).put(2, replica.log_term).put(2, replica.promised);
        let bit = |mask: u8| mask >> index & 1;
        let held = own.put(1, bit(replica.prepared.members)).put(1, bit(replica.config.members)).put(1, bit(self.record.members));
        let seen = self.primaries.iter().fold(Bits(0), |bits, primary| {
            let bits = bits.put(1, bit(primary.config.members)).put(1, bit(primary.reconciled)).put(2, primary.received[index]);
            bits.put(1, bit(primary.next)).put(1, bit(primary.prepared))
        });
        (held.0, seen.0)
    }

    /// The packed form that this state and all that differ from it only in the names of the replicas have in common.
    pub fn canonical(&self) -> Packed {
        let keys: [(u64, u64); REPLICAS] = std::array::from_fn(|replica| self.key(replica));
        let sorted = ORDERS.iter().filter(|order| order.windows(2).all(|pair| keys[pair[0]] <= keys[pair[1]]));
        sorted.map(|order| self.pack(order)).min().unwrap()
    }
}

/// A 64-bit fingerprint. Two of `n` states share one with a chance of about `n²/2⁶⁵`: 10⁻⁵ for 20 million.
pub fn fingerprint(packed: &Packed) -> u64 {
    let mut hash = 0x9e37_79b9_7f4a_7c15_u64;
    for word in packed {
        let product = u128::from(hash ^ word) * 0xa076_1d64_78bd_642f;
        hash = (product >> 64) as u64 ^ product as u64 ^ hash.rotate_left(23);
    }
    hash ^ hash >> 29
}
