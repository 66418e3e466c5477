//! The same tests for every [`MetadataStore`], and those of the file.

use std::path::Path;
use std::sync::Mutex;

use carrick_backing_store::{ByteLength, Term};
use carrick_ctl::fault::{Fault, Reason};
use carrick_replicator::control::Map;
use carrick_replicator::engine::{Attachment, ConfigVersion};
use carrick_replicator::limits::Limits;

use super::*;

/// The rules without a disk: what the redb store is compared with.
#[derive(Default)]
pub struct MemoryStore {
    state: Mutex<Arc<State>>,
    log: watch::Sender<Arc<EventLog>>,
}

#[tonic::async_trait]
impl MetadataStore for MemoryStore {
    fn state(&self) -> Arc<State> {
        Arc::clone(&self.state.lock().unwrap())
    }

    fn trouble(&self) -> Option<Trouble> {
        None
    }

    async fn apply_on(&self, occasion: Occasion, mutation: Mutation) -> Result<Arc<State>, MetadataError> {
        let mut guard = self.state.lock().unwrap();
        let state = guard.after(&mutation, &occasion)?;
        self.note(story::of_change(&guard, &state, &mutation, &occasion));
        *guard = Arc::new(state);
        Ok(Arc::clone(&guard))
    }

    fn log(&self) -> watch::Receiver<Arc<EventLog>> {
        self.log.subscribe()
    }

    fn note(&self, events: Vec<NewEvent>) {
        self.log.send_modify(|log| drop(Arc::make_mut(log).add(events, |_| true)));
    }

    async fn flush(&self) -> Result<(), MetadataError> {
        Ok(())
    }
}

pub fn store(number: u8) -> StoreRecord {
    let listen = (number == 3).then(|| "192.0.2.1:7100".parse().unwrap());
    StoreRecord::new(StoreId::from_bytes([number; 16]), format!("/srv/store{number}").into(), listen, number == 3, 1_700_000_000)
}

pub fn volume(number: u8, name: &str, stores: &[u8]) -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::from_bytes([number; 16]),
        name: name.parse().unwrap(),
        size: carrick_backing_store::VolumeSize::new(20 << 30).unwrap(),
        block_size: 512,
        replicas: stores.iter().map(|number| StoreId::from_bytes([*number; 16])).collect(),
        config_version: 1,
        created_unix: 1_700_000_001,
        phase: VolumePhase::Ready,
        rebuild_rate: None,
        config: None,
        left_out: BTreeMap::new(),
        joining: Vec::new(),
        retiring: Vec::new(),
        leaving: Vec::new(),
        salvages: Vec::new(),
        verified: None,
        limits: Limits::default(),
    }
}

pub fn attachment(number: u8, phase: AttachmentPhase) -> AttachmentRecord {
    AttachmentRecord {
        volume: VolumeId::from_bytes([number; 16]),
        host: false,
        queue_depth: 128,
        map: Map::Auto,
        phase,
        since_unix: 1_700_000_002,
        number: Attachment::new(1),
    }
}

/// What the fixture of format 1 holds, and how it was made.
fn example() -> Vec<Mutation> {
    let mut doomed = volume(6, "old", &[1, 2]);
    doomed.phase = VolumePhase::Deleting;
    let mut half = volume(7, "half", &[1, 2, 3]);
    half.phase = VolumePhase::Creating;
    vec![
        Mutation::PutStore(store(1)),
        Mutation::PutStore(store(2)),
        Mutation::PutStore(store(3)),
        Mutation::InsertVolume(volume(5, "vm1", &[1, 2, 3]).into()),
        Mutation::InsertVolume(doomed.into()),
        Mutation::InsertVolume(half.into()),
        Mutation::InsertVolume(volume(8, "vm2", &[3]).into()),
        Mutation::PutAttachment(attachment(5, AttachmentPhase::Attached)),
        Mutation::PutAttachment(attachment(8, AttachmentPhase::Detaching { force: true })),
    ]
}

async fn all_rules_hold(metadata: &dyn MetadataStore) {
    let apply = |mutation| metadata.apply(mutation);
    for number in 1..=3 {
        apply(Mutation::PutStore(store(number))).await.unwrap();
    }
    // M1
    apply(Mutation::InsertVolume(volume(5, "vm1", &[1, 2, 3]).into())).await.unwrap();
    let taken = apply(Mutation::InsertVolume(volume(6, "vm1", &[1]).into())).await;
    assert!(matches!(taken, Err(MetadataError::NameTaken(_))), "{taken:?}");
    // M2
    let unknown = apply(Mutation::InsertVolume(volume(6, "vm2", &[1, 9]).into())).await;
    assert!(matches!(unknown, Err(MetadataError::NoStore(_))), "{unknown:?}");
    let twice = apply(Mutation::InsertVolume(volume(6, "vm2", &[1, 1]).into())).await;
    assert!(matches!(twice, Err(MetadataError::SameStoreTwice { .. })), "{twice:?}");
    let used = apply(Mutation::RemoveStore(store(1).id)).await;
    assert!(matches!(&used, Err(MetadataError::StoreInUse { volumes, .. }) if volumes == &["vm1"]), "{used:?}");
    // M3
    apply(Mutation::PutAttachment(attachment(5, AttachmentPhase::Attached))).await.unwrap();
    let mut doomed = volume(5, "vm1", &[1, 2, 3]);
    doomed.phase = VolumePhase::Deleting;
    let replace = |expected: VolumeRecord, new: &VolumeRecord| {
        metadata.apply(Mutation::ReplaceVolume { expected: expected.into(), new: new.clone().into() })
    };
    let attached = replace(volume(5, "vm1", &[1, 2, 3]), &doomed).await;
    assert!(matches!(attached, Err(MetadataError::Attached(_))), "{attached:?}");
    assert!(matches!(apply(Mutation::RemoveVolume(doomed.id)).await, Err(MetadataError::Attached(_))));
    apply(Mutation::RemoveAttachment(doomed.id)).await.unwrap();
    // M4
    let stale = replace(volume(5, "vm1", &[1, 2]), &doomed).await;
    assert!(matches!(stale, Err(MetadataError::Changed(_))), "{stale:?}");
    let mut older = doomed.clone();
    older.config_version = 0;
    assert!(matches!(replace(volume(5, "vm1", &[1, 2, 3]), &older).await, Err(MetadataError::Changed(_))));
    replace(volume(5, "vm1", &[1, 2, 3]), &doomed).await.unwrap();
    let not_ready = apply(Mutation::PutAttachment(attachment(5, AttachmentPhase::Attaching))).await;
    assert!(matches!(not_ready, Err(MetadataError::NotReady(_))), "{not_ready:?}");
    // M5
    all_rules_of_configs_hold(metadata).await;
    all_rules_of_replacements_hold(metadata).await;
    all_rules_of_operations_hold(metadata).await;
    // A name is free again as soon as its volume is being deleted.
    let state = apply(Mutation::InsertVolume(volume(6, "vm1", &[2]).into())).await.unwrap();
    assert_eq!(state.volume_by_name(&doomed.name).unwrap().id, volume(6, "vm1", &[2]).id);
    // Removing twice changes nothing.
    for _ in 0..2 {
        apply(Mutation::RemoveVolume(doomed.id)).await.unwrap();
        apply(Mutation::RemoveStore(store(1).id)).await.unwrap();
        apply(Mutation::RemoveAttachment(doomed.id)).await.unwrap();
    }
    assert_eq!(metadata.state().stores.len(), 2);
    assert_eq!(metadata.state().volumes.len(), 1);
}

async fn all_rules_of_configs_hold(metadata: &dyn MetadataStore) {
    metadata.apply(Mutation::InsertVolume(volume(9, "two", &[2, 3]).into())).await.unwrap();
    let of = |version: u64, members: &[u8], term: u64| VolumeConfig {
        version: ConfigVersion::new(version),
        members: members.iter().map(|number| StoreId::from_bytes([*number; 16])).collect(),
        term: Term::new(term),
        attachment: Attachment::NONE,
    };
    let swap = |next| metadata.apply(Mutation::SwapConfig { volume: VolumeId::from_bytes([9; 16]), next, at_unix: 1_700_000_003 });
    let now = || metadata.state().volumes[&VolumeId::from_bytes([9; 16])].config();
    assert_eq!(now(), of(1, &[2, 3], 0));
    for (what, refused) in [("version", of(1, &[2], 1)), ("version", of(3, &[2], 1))] {
        let result = swap(refused).await;
        assert!(matches!(result, Err(MetadataError::Changed(_))), "{what}: {result:?}");
    }
    swap(of(2, &[2, 3], 7)).await.unwrap();
    for (what, refused) in
        [("none", of(3, &[], 7)), ("not its own", of(3, &[1], 7)), ("one twice", of(3, &[2, 2], 7)), ("a past term", of(3, &[2], 6))]
    {
        let result = swap(refused).await;
        assert!(matches!(result, Err(MetadataError::BadConfig(_))), "{what}: {result:?}");
    }
    swap(of(3, &[3], 7)).await.unwrap();
    assert_eq!(now(), of(3, &[3], 7));
    // Whoever changes the volume needn't know of that, and doesn't change it.
    let (before, mut after) = (volume(9, "two", &[2, 3]), volume(9, "two", &[2, 3]));
    after.rebuild_rate = Some(ByteLength::new(1 << 20));
    metadata.apply(Mutation::ReplaceVolume { expected: before.into(), new: after.into() }).await.unwrap();
    assert_eq!(now(), of(3, &[3], 7));
    // From a new attachment on, the one before changes nothing, whatever it says it is.
    let number = || metadata.state().attachments[&VolumeId::from_bytes([9; 16])].number;
    metadata.apply(Mutation::PutAttachment(attachment(9, AttachmentPhase::Attaching))).await.unwrap();
    metadata.apply(Mutation::PutAttachment(attachment(9, AttachmentPhase::Attached))).await.unwrap();
    assert_eq!((number(), now()), (Attachment::new(1), VolumeConfig { attachment: Attachment::new(1), ..of(4, &[3], 7) }));
    metadata.apply(Mutation::RemoveAttachment(VolumeId::from_bytes([9; 16]))).await.unwrap();
    metadata.apply(Mutation::PutAttachment(attachment(9, AttachmentPhase::Attaching))).await.unwrap();
    assert_eq!((number(), now().attachment, now().version), (Attachment::new(2), Attachment::new(2), ConfigVersion::new(5)));
    for (what, refused) in [("version", of(5, &[3], 8)), ("attachment", of(6, &[3], 8))] {
        let result = swap(refused).await;
        assert!(matches!(result, Err(MetadataError::Changed(_) | MetadataError::BadConfig(_))), "{what}: {result:?}");
    }
    swap(VolumeConfig { attachment: Attachment::new(2), ..of(6, &[3], 8) }).await.unwrap();
    metadata.apply(Mutation::RemoveAttachment(VolumeId::from_bytes([9; 16]))).await.unwrap();
    metadata.apply(Mutation::RemoveVolume(VolumeId::from_bytes([9; 16]))).await.unwrap();
}

async fn all_rules_of_operations_hold(metadata: &dyn MetadataStore) {
    let put = |record: OperationRecord| metadata.apply(Mutation::PutOperation(record.into()));
    let running = |number| metadata.state().expansion(VolumeId::from_bytes([number; 16])).cloned();
    put(expansion(5, "vm1")).await.unwrap();
    put(expansion(9, "two")).await.unwrap();
    let (first, second) = (running(5).unwrap(), running(9).unwrap());
    assert!(first.id < second.id, "numbers grow");
    // M7
    let another = put(expansion(5, "vm1")).await;
    assert!(matches!(another, Err(MetadataError::OperationOver(_))), "{another:?}");
    let ended = first.given_up(200);
    put(ended.clone()).await.unwrap();
    assert_eq!(running(5), None);
    for wrong in [first, ended] {
        let result = put(wrong).await;
        assert!(matches!(result, Err(MetadataError::OperationOver(_))), "{result:?}");
    }
    // The oldest of those that have ended are forgotten; numbers go on, and what runs stays.
    for _ in 0..=ENDED_MAX {
        put(expansion(5, "vm1")).await.unwrap();
        put(running(5).unwrap().given_up(300)).await.unwrap();
    }
    let state = metadata.state();
    let expansions = |state: &State| state.operations.values().filter(|operation| matches!(operation.task, Task::Expand { .. })).count();
    assert_eq!((expansions(&state), state.operations.contains_key(&second.id)), (ENDED_MAX + 1, true));
    assert!(state.operations.len() > ENDED_MAX + 1, "those of another kind stay");
    put(second.given_up(400)).await.unwrap();
    assert_eq!(expansions(&metadata.state()), ENDED_MAX);
}

async fn all_rules_of_replacements_hold(metadata: &dyn MetadataStore) {
    let id = VolumeId::from_bytes([8; 16]);
    let store = |number: u8| StoreId::from_bytes([number; 16]);
    for number in [4, 5] {
        let record = StoreRecord { id: store(number), ..metadata.state().stores[&store(2)].clone() };
        metadata.apply(Mutation::PutStore(record)).await.unwrap();
    }
    metadata.apply(Mutation::InsertVolume(volume(8, "three", &[2, 5]).into())).await.unwrap();
    let now = || metadata.state().volumes[&id].clone();
    let replaced = || VolumeRecord { replicas: vec![store(2), store(4)], leaving: vec![store(5)], ..now() };
    let replace = |new: VolumeRecord| metadata.apply(Mutation::ReplaceVolume { expected: now().into(), new: new.into() });
    let result = replace(replaced()).await;
    assert!(matches!(result, Err(MetadataError::StillCounts(_))), "{result:?}");
    let alone = VolumeConfig { version: ConfigVersion::new(2), members: vec![store(2)], ..now().config() };
    metadata.apply(Mutation::SwapConfig { volume: id, next: alone, at_unix: 70 }).await.unwrap();
    assert_eq!(now().left_out, [(store(5), 70)].into());
    for (what, wrong) in [
        ("twice", VolumeRecord { replicas: vec![store(2), store(2)], ..replaced() }),
        ("still to be deleted there", VolumeRecord { replicas: vec![store(2), store(5)], ..replaced() }),
    ] {
        let result = replace(wrong).await;
        assert!(matches!(result, Err(MetadataError::SameStoreTwice { .. })), "{what}: {result:?}");
    }
    replace(replaced()).await.unwrap();
    assert_eq!((now().left_out, now().leaving), (BTreeMap::new(), vec![store(5)]));
    // The next primary writes its term down: since then the new one is known not to count.
    let next = VolumeConfig { version: ConfigVersion::new(3), ..now().config() };
    metadata.apply(Mutation::SwapConfig { volume: id, next, at_unix: 80 }).await.unwrap();
    assert_eq!(now().left_out, [(store(4), 80)].into());
    // One more doesn't count until a target says so, even if nobody ever wrote down who does.
    replace(VolumeRecord { replicas: vec![store(2), store(4), store(3)], joining: vec![store(3)], ..now() }).await.unwrap();
    assert_eq!(now().config().members, [store(2)]);
    // What can't be salvaged: a replica that isn't there, or not made yet.
    metadata.apply(Mutation::PutAttachment(attachment(8, AttachmentPhase::Attached))).await.unwrap();
    for wrong in [1, 3] {
        let result = metadata.apply(Mutation::Salvage { volume: id, from: store(wrong), at_unix: 90 }).await;
        assert!(matches!(result, Err(MetadataError::Changed(_))), "{wrong}: {result:?}");
    }
    let before = now().config();
    metadata.apply(Mutation::Salvage { volume: id, from: store(4), at_unix: 90 }).await.unwrap();
    let expected = SalvageRecord { at_unix: 90, from: store(4), given_up: vec![store(2)] };
    assert_eq!((now().salvages, now().replicas), (vec![expected], vec![store(4)]));
    assert_eq!(now().leaving, [store(5), store(2), store(3)], "whoever might pass for one that agrees");
    assert_eq!(now().joining, [store(4)], "a target that is there is still to be told");
    let after = now().config();
    assert_eq!((after.members, after.term), (vec![store(4)], before.term));
    assert!(after.version == before.version.next() && after.attachment == before.attachment.next(), "targets of before are no more");
    assert_eq!(metadata.state().attachments[&id].number, after.attachment);
    metadata.apply(Mutation::RemoveAttachment(id)).await.unwrap();
    metadata.apply(Mutation::RemoveStore(store(5))).await.unwrap();
    assert_eq!(now().leaving, [store(2), store(3)], "what was to be deleted there is gone with it");
    metadata.apply(Mutation::RemoveVolume(id)).await.unwrap();
    metadata.apply(Mutation::RemoveStore(store(4))).await.unwrap();
}

#[test]
fn a_store_has_room_up_to_its_limit_and_warns_before() {
    let usage = carrick_backing_store::StoreUsage {
        capacity: ByteLength::new(1000),
        free: ByteLength::new(500),
        reserved: ByteLength::new(200),
        ..Default::default()
    };
    let room = |percent| StoreRecord { limit: Percent::new(percent).unwrap(), ..store(1) }.room(&usage).get();
    assert_eq!([100, 90, 71, 70, 1].map(room), [300, 200, 10, 0, 0], "700 of 1000 are taken");
    let warns = |percent| StoreRecord { warning: Percent::new(percent).unwrap(), ..store(1) }.warning(&usage).is_some();
    assert_eq!([100, 71, 70, 1].map(warns), [false, false, true, true]);
    assert_eq!([0, 101, 300].map(Percent::new), [None; 3]);
}

#[tokio::test]
async fn the_rules_hold_in_memory_and_in_redb() {
    all_rules_hold(&MemoryStore::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.redb");
    let redb = RedbStore::open(&path).unwrap();
    all_rules_hold(&redb).await;
    let state = redb.state();
    drop(redb);
    assert_eq!(RedbStore::open(&path).unwrap().state(), state, "what was forgotten is gone from the file, too");
}

#[tokio::test]
async fn what_is_reopened_is_what_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.redb");
    let memory = MemoryStore::default();
    let upgrade = Mutation::SetUpgrade(Some(super::UpgradeRecord { since_unix: 1_700_000_003 }));
    for mutation in example().into_iter().chain([upgrade]) {
        // Every change alone, with a reopening after each.
        let redb = RedbStore::open(&path).unwrap();
        assert_eq!(redb.state(), memory.state());
        redb.apply(mutation.clone()).await.unwrap();
        memory.apply(mutation).await.unwrap();
    }
    let redb = RedbStore::open(&path).unwrap();
    assert_eq!(redb.state(), memory.state());
    assert!(matches!(RedbStore::open(&path), Err(MetadataError::InUse(_))), "a second one must be refused");
}

#[tokio::test]
async fn a_file_of_format_1_opens() {
    let mut expected = State::default();
    for mutation in example() {
        expected.apply(&mutation).unwrap();
    }
    // The first version had no configs, and no numbers of attachments.
    expected.volumes.values_mut().for_each(|volume| volume.config = None);
    expected.attachments.values_mut().for_each(|attachment| attachment.number = Attachment::NONE);
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/metadata-format-1.redb");
    // Written once, by the first version; a test that makes its own fixture would prove nothing.
    if std::env::var_os("CARRICK_WRITE_FIXTURE").is_some() && !fixture.exists() {
        let redb = RedbStore::open(&fixture).unwrap();
        for mutation in example() {
            redb.apply(mutation).await.unwrap();
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("metadata.redb");
    std::fs::copy(fixture, &copy).unwrap();
    assert_eq!(*RedbStore::open(&copy).unwrap().state(), expected);
}

fn expansion(number: u8, name: &str) -> OperationRecord {
    let sizes = [1 << 30, 2 << 30].map(|bytes| carrick_backing_store::VolumeSize::new(bytes).unwrap());
    OperationRecord::expand(VolumeId::from_bytes([number; 16]), name.parse().unwrap(), sizes, Some("key".into()), 1_700_000_010)
}

/// One operation of each state, as the first version with operations wrote them.
fn operations() -> Vec<Mutation> {
    let fault = || Fault::new(Reason::NoSpace, "store", "no room");
    let of = |number: u64, record: OperationRecord| {
        let id = (0..number).fold(OperationId::NEW, |id, _| id.next());
        Mutation::PutOperation(OperationRecord { id, ..record }.into())
    };
    vec![
        of(1, expansion(5, "vm1").after(Outcome::Refused(fault()), 1_700_000_011)),
        of(2, expansion(5, "vm1").given_up(1_700_000_012)),
        of(3, (0..3).fold(expansion(5, "vm1"), |record, _| record.after(Outcome::Done(vec!["a note".into()]), 1_700_000_013))),
        of(4, expansion(5, "vm1").after(Outcome::Waits(fault()), 1_700_000_014)),
        of(5, expansion(8, "vm2").after(Outcome::Done(Vec::new()), 1_700_000_015)),
    ]
}

#[tokio::test]
async fn operations_of_format_1_open() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/metadata-operations-1.redb");
    opens_as_what_was_written(&fixture, operations()).await;
}

/// What is under way in the records, as the first version that listed all of it wrote it.
#[tokio::test]
async fn operations_that_follow_the_records_open() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/metadata-mirror-1.redb");
    let mut mutations = example();
    let built = VolumeRecord { replicas: vec![store(3).id, store(2).id], joining: vec![store(2).id], ..volume(8, "vm2", &[]) };
    mutations.push(Mutation::RemoveAttachment(VolumeId::from_bytes([8; 16])));
    mutations.push(Mutation::ReplaceVolume { expected: volume(8, "vm2", &[3]).into(), new: built.into() });
    let expected = mutations.iter().fold(State::default(), |state, mutation| state.after(mutation, &Occasion::default()).unwrap());
    let steps: Vec<_> = expected.operations.values().map(|operation| (operation.task.step_name(), operation.is_running())).collect();
    assert_eq!(steps, [("replicas", true), ("replicas", true), ("device", false), ("make", true)]);
    holds(&fixture, mutations, &expected).await;
}

async fn opens_as_what_was_written(fixture: &Path, mutations: Vec<Mutation>) {
    let mut expected = State::default();
    mutations.iter().for_each(|mutation| expected.apply(mutation).unwrap());
    holds(fixture, mutations, &expected).await;
}

/// The fixture, which was made by these changes, holds what is expected.
async fn holds(fixture: &Path, mutations: Vec<Mutation>, expected: &State) {
    if std::env::var_os("CARRICK_WRITE_FIXTURE").is_some() && !fixture.exists() {
        let redb = RedbStore::open(fixture).unwrap();
        for mutation in mutations {
            redb.apply(mutation).await.unwrap();
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("metadata.redb");
    std::fs::copy(fixture, &copy).unwrap();
    assert_eq!(*RedbStore::open(&copy).unwrap().state(), *expected);
}

/// A node that refuses, a store that is being emptied, and a replica that moves: as the first version that could wrote them.
fn moves() -> Vec<Mutation> {
    let moving = VolumeRecord {
        replicas: [1, 2, 3].map(|number| store(number).id).to_vec(),
        joining: vec![store(3).id],
        retiring: vec![store(1).id],
        ..volume(5, "vm1", &[])
    };
    let operation = OperationRecord::relocate(moving.id, moving.name.clone(), [store(1).id, store(3).id], 1_700_000_040);
    let mut mutations = example()[..3].to_vec();
    mutations.extend([
        Mutation::PutNode(NodeRecord { refuses_targets: true, ..NodeRecord::default() }),
        Mutation::PutStore(StoreRecord { placement: Placement::Evicting, ..store(1) }),
        Mutation::PutStore(StoreRecord { placement: Placement::Disabled, ..store(2) }),
        Mutation::InsertVolume(volume(5, "vm1", &[1, 2]).into()),
        Mutation::All(vec![
            Mutation::ReplaceVolume { expected: volume(5, "vm1", &[1, 2]).into(), new: moving.into() },
            Mutation::PutOperation(operation.into()),
        ]),
    ]);
    mutations
}

#[tokio::test]
async fn moves_of_format_1_open() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/metadata-moves-1.redb");
    opens_as_what_was_written(&fixture, moves()).await;
}

/// Of several changes that go together all are made or none, in memory and in the file.
#[tokio::test]
async fn changes_that_go_together_are_made_together() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.redb");
    let redb = RedbStore::open(&path).unwrap();
    let before = redb.state();
    let wrong = Mutation::InsertVolume(volume(5, "vm1", &[9]).into());
    let refused = redb.apply(Mutation::All(vec![Mutation::PutStore(store(1)), wrong])).await;
    assert!(matches!(refused, Err(MetadataError::NoStore(_))), "{refused:?}");
    assert_eq!(redb.state(), before);
    let right = Mutation::InsertVolume(volume(5, "vm1", &[1]).into());
    let after = redb.apply(Mutation::All(vec![Mutation::PutStore(store(1)), right])).await.unwrap();
    assert_eq!((after.stores.len(), after.volumes.len()), (1, 1));
    drop(redb);
    assert_eq!(RedbStore::open(&path).unwrap().state(), after);
}

#[test]
fn a_newer_format_and_damage_are_refused_by_name() {
    use redb::{Database, TableDefinition};
    let write = |document: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.redb");
        let database = Database::create(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        let table: TableDefinition<&str, &[u8]> = TableDefinition::new("volumes");
        transaction.open_table(table).unwrap().insert("x", document.as_bytes()).unwrap();
        transaction.commit().unwrap();
        drop(database);
        RedbStore::open(&path).err().unwrap().to_string()
    };
    let newer = write(r#"{"format":2,"something":"else"}"#);
    assert!(newer.contains("record x of table volumes has format 2, this carrickd knows up to 1: upgrade carrickd"), "{newer}");
    for damage in ["", "{", r#"{"format":1}"#, r#"{"format":1,"record":{"id":7}}"#] {
        let error = write(damage);
        assert!(error.contains("record x of table volumes can't be understood"), "{error}");
    }
}

/// One event of each kind and subject, as the first version with a log wrote them.
fn events() -> Vec<NewEvent> {
    let place = events::Place { id: store(1).id, path: "/srv/store1".into() };
    let volume = Subject::Volume { id: VolumeId::from_bytes([5; 16]), name: "vm1".parse().unwrap() };
    let text = |kind: EventKind| format!("{} of \u{fc}", kind.as_str());
    let of = |subject: &Subject, kind: EventKind, replica, at_unix| NewEvent {
        at_unix,
        kind,
        subject: subject.clone(),
        replica,
        text: text(kind),
    };
    // Those of before there were moves, and what was compared was written down.
    let before = EventKind::ALL.iter().take_while(|kind| **kind != EventKind::StoreEnabled);
    let first = before.filter(|kind| !matches!(kind, EventKind::ReplicaRetiring | EventKind::VolumeVerified));
    let mut all: Vec<_> = first.map(|kind| of(&volume, *kind, None, 1_700_000_020)).collect();
    all.push(of(&Subject::Store(place.clone()), EventKind::ProcessCrashed, None, 1_700_000_021));
    all.push(of(&volume, EventKind::ReplicaLeftOut, Some(place), 1_700_000_022));
    // Several times the same.
    all.extend((0..3).map(|seconds| of(&volume, EventKind::ProcessCrashed, None, 1_700_000_023 + seconds)));
    all
}

#[tokio::test]
async fn a_log_of_format_1_opens() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/metadata-events-1.redb");
    if std::env::var_os("CARRICK_WRITE_FIXTURE").is_some() && !fixture.exists() {
        // The file becomes smaller each time it is closed.
        for event in events() {
            let redb = RedbStore::open(&fixture).unwrap();
            redb.note(vec![event]);
            redb.flush().await.unwrap();
        }
    }
    let mut expected = EventLog::default();
    expected.add(events(), |_| false);
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("metadata.redb");
    std::fs::copy(fixture, &copy).unwrap();
    assert_eq!(**RedbStore::open(&copy).unwrap().log().borrow(), expected);
}

fn kinds(metadata: &dyn MetadataStore) -> Vec<EventKind> {
    metadata.log().borrow().after(EventNumber::default(), usize::MAX, |_| true).iter().map(|event| event.kind).collect()
}

fn noted(kind: EventKind) -> NewEvent {
    let subject = Subject::Store(events::Place { id: store(1).id, path: "/srv/store1".into() });
    NewEvent { at_unix: 7, kind, subject, replica: None, text: String::new() }
}

#[tokio::test]
async fn what_is_noted_goes_with_the_next_change_or_when_it_is_flushed_and_stays() {
    use EventKind::{ProcessCrashed, ProcessRecovered, StoreAdded};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.redb");
    let redb = RedbStore::open(&path).unwrap();
    redb.note(vec![noted(ProcessCrashed)]);
    let refused = redb.apply(Mutation::PutAttachment(attachment(5, AttachmentPhase::Attaching))).await;
    assert!(refused.is_err() && kinds(&redb).is_empty(), "a change that is refused is none");
    redb.apply(Mutation::PutStore(store(1))).await.unwrap();
    assert_eq!(kinds(&redb), [ProcessCrashed, StoreAdded], "in the order in which it happened");
    let mut log = redb.log();
    log.mark_unchanged();
    redb.flush().await.unwrap();
    assert!(!log.has_changed().unwrap(), "there was nothing to write");
    redb.note(vec![noted(ProcessRecovered)]);
    redb.flush().await.unwrap();
    assert!(log.has_changed().unwrap());
    let before = EventLog::clone(&log.borrow());
    drop(redb);
    let redb = RedbStore::open(&path).unwrap();
    assert_eq!(*redb.log().borrow(), before.into());
    for _ in 0..2 * super::redb_store::NOTED_MAX {
        redb.note(vec![noted(StoreAdded)]);
    }
    redb.flush().await.unwrap();
    let newest = redb.log().borrow().newest();
    assert_eq!(newest, EventNumber::new(3 + super::redb_store::NOTED_MAX as u64), "a disk that takes nothing fills no memory");
}

#[tokio::test]
async fn what_cannot_be_understood_in_the_log_is_not_shown_and_its_number_is_not_used_again() {
    use redb::{Database, TableDefinition};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metadata.redb");
    let redb = RedbStore::open(&path).unwrap();
    redb.apply(Mutation::PutStore(store(1))).await.unwrap();
    drop(redb);
    let database = Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let table: TableDefinition<&str, &[u8]> = TableDefinition::new("events");
    for (key, document) in [("7", r#"{"format":2,"record":{}}"#), ("8", r#"{"format":1,"record":{"kind":"NEWS"}}"#), ("x", "")] {
        transaction.open_table(table).unwrap().insert(key, document.as_bytes()).unwrap();
    }
    transaction.commit().unwrap();
    drop(database);
    let redb = RedbStore::open(&path).unwrap();
    redb.note(vec![noted(EventKind::StoreRemoved)]);
    redb.flush().await.unwrap();
    let numbers: Vec<_> =
        redb.log().borrow().after(EventNumber::default(), usize::MAX, |_| true).iter().map(|event| event.number.get()).collect();
    assert_eq!(numbers, [1, 9]);
}
