//! Goal: both stores give the same answers. Method: random operations, one after the other, on a `FileStore` (over a folder with
//! short calls) and on a `MemoryStore`, with closes and kills in between; every answer is compared, errors by their kind.

use proptest::prelude::*;

use super::nasty::NastyFolder;
use super::*;
use crate::memory::{MemoryStore, PowerLoss};

const BLOCKS: u64 = 40;
const LOG_RECORDS: usize = 8;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A write whose sequence follows the position, or is off by `gap`.
    Write {
        logged: Option<u64>,
        first: u64,
        count: u64,
    },
    Zero {
        logged: Option<u64>,
        first: u64,
        count: u64,
    },
    Read {
        first: u64,
        count: u64,
    },
    Sync,
    SetState {
        content: Content,
        position: Option<u64>,
    },
    LoggedAfter {
        after: u64,
    },
    Create {
        blocks: u64,
    },
    Delete,
    Close,
    Kill,
    /// Right after a sync, so that both stores know what is there.
    PowerLoss,
}

fn steps() -> impl Strategy<Value = Step> {
    // Past the end now and then.
    let range = || (0..BLOCKS, 0..6_u64);
    let gap = || prop::option::weighted(0.7, prop_oneof![9 => Just(0_u64), 1 => 1..3_u64]);
    let content = prop_oneof![Just(Content::Complete), Just(Content::Mixed), Just(Content::Rebuilding)];
    prop_oneof![
        10 => (gap(), range()).prop_map(|(logged, (first, count))| Step::Write { logged, first, count }),
        4 => (gap(), range()).prop_map(|(logged, (first, count))| Step::Zero { logged, first, count }),
        8 => range().prop_map(|(first, count)| Step::Read { first, count }),
        2 => Just(Step::Sync),
        2 => (content, prop::option::of(prop_oneof![9 => 0..20_u64, 1 => Just(u64::MAX)])).prop_map(|(content, position)| Step::SetState { content, position }),
        4 => prop_oneof![9 => 0..30_u64, 1 => Just(u64::MAX)].prop_map(|after| Step::LoggedAfter { after }),
        1 => (0..3_u64).prop_map(|less| Step::Create { blocks: BLOCKS - less / 2 }),
        1 => Just(Step::Delete),
        1 => Just(Step::Close),
        1 => Just(Step::Kill),
        1 => Just(Step::PowerLoss),
    ]
}

fn open(folder: &NastyFolder, boot: u8) -> FileStore {
    let options = Options { boot: BootId([boot; 16]), log_records: LOG_RECORDS as u64, data_alignment: 4096 };
    FileStore::open_folder(Path::new("nasty"), Box::new(folder.clone()), StoreId::from_bytes([9; 16]), options, None).unwrap()
}

fn same_error(a: &StoreError, b: &StoreError) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}

fn assert_same(a: &Result<Outcome, StoreError>, b: &Result<Outcome, StoreError>) {
    let same = match (a, b) {
        (Err(a), Err(b)) => same_error(a, b),
        (Ok(Outcome::Written), Ok(Outcome::Written)) | (Ok(Outcome::StateSet), Ok(Outcome::StateSet)) => true,
        (Ok(Outcome::Synced { durable: a }), Ok(Outcome::Synced { durable: b })) => a == b,
        (Ok(Outcome::Read(ReadData::Zeroes)), Ok(Outcome::Read(ReadData::Zeroes))) => true,
        (Ok(Outcome::Read(ReadData::Blocks { checksums: a, data: x })), Ok(Outcome::Read(ReadData::Blocks { checksums: b, data: y }))) => {
            a == b && **x == **y
        }
        (Ok(Outcome::Logged(a)), Ok(Outcome::Logged(b))) => match (a, b) {
            (LoggedExtents::All(a), LoggedExtents::All(b)) => {
                let sorted = |list: &[Extent]| {
                    let mut list = list.to_vec();
                    list.sort();
                    list
                };
                sorted(a) == sorted(b)
            }
            (a, b) => a == b,
        },
        _ => false,
    };
    assert!(same, "the file store says {a:?}, the oracle {b:?}");
}

fn operation(step: Step, position: u64, number: usize) -> Option<Operation> {
    let seq = |logged: Option<u64>| logged.map(|gap| position + 1 + gap);
    Some(match step {
        Step::Write { logged, first, count } => write(seq(logged), first, count, u8::try_from(number % 250).unwrap() + 1),
        Step::Zero { logged, first, count } => zeroes(seq(logged), first, count),
        Step::Read { first, count } => Operation::Read { extent: extent(first, count), snapshot: None },
        Step::Sync => Operation::Sync,
        Step::SetState { content, position } => set_state(number as u64, content, position),
        Step::LoggedAfter { after } => Operation::LoggedAfter { after: Seq::new(after) },
        _ => return None,
    })
}

fn both(file: &mut FileStore, memory: &mut MemoryStore, operation: impl Fn() -> Operation) {
    let (a, b) = (run(file, operation()), run(memory, operation()));
    assert_same(&a, &b);
}

fn live(seed: u64, steps: &[Step]) {
    let folder = NastyFolder::new(seed);
    let mut boot = 1;
    let mut file = open(&folder, boot);
    let mut memory = MemoryStore::with_id(StoreId::from_bytes([9; 16])).with_log_capacity(LOG_RECORDS);
    file.create(spec(BLOCKS)).unwrap();
    memory.create(spec(BLOCKS)).unwrap();
    for (number, step) in steps.iter().enumerate() {
        let position = memory.replicas().first().map_or(0, |opened| opened.position.get());
        match *step {
            Step::Create { blocks } => match (file.create(spec(blocks)), memory.create(spec(blocks))) {
                (Ok(()), Ok(())) => {}
                (Err(a), Err(b)) => assert!(same_error(&a, &b)),
                (a, b) => panic!("the file store says {a:?}, the oracle {b:?}"),
            },
            Step::Delete => assert!(file.delete(VOLUME).is_ok() && memory.delete(VOLUME).is_ok()),
            Step::Close => {
                // A close syncs; the oracle has no such thing but this.
                both(&mut file, &mut memory, || Operation::Sync);
                file.close().unwrap();
                memory.crash(PowerLoss::No, 0);
                file = open(&folder, boot);
            }
            Step::Kill => {
                file.abandon();
                folder.restart();
                memory.crash(PowerLoss::No, 0);
                file = open(&folder, boot);
            }
            Step::PowerLoss => {
                // An empty write leaves no doubt about any block, but the position falls back.
                both(&mut file, &mut memory, || Operation::Sync);
                both(&mut file, &mut memory, || write(Some(position + 1), 0, 0, 1));
                file.abandon();
                folder.reboot(512);
                boot += 1;
                memory.crash(PowerLoss::Yes, 0);
                file = open(&folder, boot);
            }
            step => both(&mut file, &mut memory, || operation(step, position, number).unwrap()),
        }
        assert_eq!(file.replicas(), memory.replicas());
    }
}

proptest! {
    #[test]
    fn the_file_store_answers_as_the_oracle_does(seed: u64, steps in prop::collection::vec(steps(), 1..60)) {
        live(seed, &steps);
    }
}
