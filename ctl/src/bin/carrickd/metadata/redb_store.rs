//! The metadata of a single node, in one `redb` file.
//!
//! The whole state is kept in memory too: it is small, and the file is locked, so nobody else changes it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use carrick_backing_store::VolumeId;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{
    EventLog, EventNumber, EventRecord, FORMAT, LogChanges, MetadataError, MetadataStore, Mutation, NewEvent, Occasion, State, Trouble,
    story,
};
use crate::context::unix_now;

type Documents = TableDefinition<'static, &'static str, &'static [u8]>;

const NODE: Documents = TableDefinition::new("node");
const STORES: Documents = TableDefinition::new("stores");
const VOLUMES: Documents = TableDefinition::new("volumes");
const ATTACHMENTS: Documents = TableDefinition::new("attachments");
const OPERATIONS: Documents = TableDefinition::new("operations");
const EVENTS: Documents = TableDefinition::new("events");

/// The key of the only record of its table.
const ONLY: &str = "node";

/// Events that were noted and are not durable yet: more than that come only while the disk takes nothing.
pub(super) const NOTED_MAX: usize = 1024;

/// A record with the number of its format.
#[derive(Serialize, Deserialize)]
struct Document<T> {
    format: u32,
    record: T,
}

/// Only the number: it must be readable whatever the rest looks like.
#[derive(Deserialize)]
struct FormatOnly {
    format: u32,
}

/// See the module.
pub struct RedbStore {
    inner: Arc<Inner>,
}

/// Opens the file.
type Open = Box<dyn Fn() -> Result<Database, DatabaseError> + Send + Sync>;

struct Inner {
    path: PathBuf,
    open: Open,
    /// Whoever has it writes, one at a time, while `state` can be read, and takes from the front of `noted`, where others add at the end.
    /// Closed after the disk failed: what of the last change is in the file shows when it is opened again.
    database: Mutex<Option<Database>>,
    trouble: Mutex<Option<Trouble>>,
    state: Mutex<Arc<State>>,
    noted: Mutex<Vec<NewEvent>>,
    log: watch::Sender<Arc<EventLog>>,
}

impl RedbStore {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// [`MetadataError::InUse`], [`MetadataError::UnknownFormat`], [`MetadataError::Damaged`], or the disk's.
    pub fn open(path: &Path) -> Result<Self, MetadataError> {
        let file = path.to_owned();
        Self::open_by(path, Box::new(move || Database::create(&file)))
    }

    /// The same, by other means than the path.
    pub(super) fn open_by(path: &Path, open: Open) -> Result<Self, MetadataError> {
        let inner = Inner {
            path: path.into(),
            open,
            database: Mutex::default(),
            trouble: Mutex::default(),
            state: Mutex::default(),
            noted: Mutex::default(),
            log: watch::Sender::new(Arc::default()),
        };
        inner.opened(&mut lock(&inner.database))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Does what waits for the disk.
    async fn wait<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, MetadataError> + Send + 'static,
    ) -> Result<T, MetadataError> {
        let inner = Arc::clone(&self.inner);
        let result = match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(error) => Err(storage(&self.inner.path)(redb::Error::Io(std::io::Error::other(error)))),
        };
        match &result {
            Ok(_) => *lock(&self.inner.trouble) = None,
            Err(error @ MetadataError::Storage { .. }) => {
                let mut trouble = lock(&self.inner.trouble);
                let since_unix = trouble.as_ref().map_or_else(unix_now, |trouble| trouble.since_unix);
                *trouble = Some(Trouble { since_unix, why: error.to_string() });
            }
            // A rule was broken, which says nothing of the disk.
            Err(_) => {}
        }
        result
    }
}

#[tonic::async_trait]
impl MetadataStore for RedbStore {
    fn state(&self) -> Arc<State> {
        self.inner.state()
    }

    async fn apply_on(&self, occasion: Occasion, mutation: Mutation) -> Result<Arc<State>, MetadataError> {
        self.wait(move |inner| inner.apply(&mutation, &occasion)).await
    }

    fn trouble(&self) -> Option<Trouble> {
        lock(&self.inner.trouble).clone()
    }

    fn log(&self) -> watch::Receiver<Arc<EventLog>> {
        self.inner.log.subscribe()
    }

    fn note(&self, events: Vec<NewEvent>) {
        let mut noted = lock(&self.inner.noted);
        for event in events {
            if noted.len() < NOTED_MAX {
                noted.push(event);
            } else {
                tracing::warn!(?event, "is not written down: the disk takes nothing");
            }
        }
    }

    async fn flush(&self) -> Result<(), MetadataError> {
        self.wait(Inner::flush).await
    }
}

impl Inner {
    fn state(&self) -> Arc<State> {
        Arc::clone(&lock(&self.state))
    }

    fn noted(&self) -> Vec<NewEvent> {
        lock(&self.noted).clone()
    }

    /// The open database. One that is opened only now says what is so.
    fn opened<'a>(&self, database: &'a mut Option<Database>) -> Result<&'a Database, MetadataError> {
        let open = match database.take() {
            Some(open) => open,
            None => {
                let open = (self.open)().map_err(|error| match error {
                    DatabaseError::DatabaseAlreadyOpen => MetadataError::InUse(self.path.clone()),
                    other => storage(&self.path)(other.into()),
                })?;
                let (state, log) = (load(&self.path, &open)?, load_log(&self.path, &open)?);
                *lock(&self.state) = Arc::new(state);
                self.log.send_replace(Arc::new(log));
                open
            }
        };
        Ok(database.insert(open))
    }

    /// Checks the change against the state in memory, writes it, and only then shows it.
    fn apply(&self, mutation: &Mutation, occasion: &Occasion) -> Result<Arc<State>, MetadataError> {
        let mut database = lock(&self.database);
        self.opened(&mut database)?;
        let before = self.state();
        let state = before.after(mutation, occasion)?;
        let told = story::of_change(&before, &state, mutation, occasion);
        self.commit(&mut database, &state, told, |transaction| {
            put_change(transaction, mutation, &state)?;
            put_operations(transaction, &before, &state)
        })?;
        let state = Arc::new(state);
        *lock(&self.state) = Arc::clone(&state);
        Ok(state)
    }

    fn flush(&self) -> Result<(), MetadataError> {
        let mut database = lock(&self.database);
        self.opened(&mut database)?;
        if self.noted().is_empty() {
            return Ok(());
        }
        self.commit(&mut database, &self.state(), Vec::new(), |_| Ok(()))
    }

    /// Writes a change along with what was noted and what the change tells, and shows the log with that.
    fn commit(
        &self,
        database: &mut Option<Database>,
        state: &State,
        told: Vec<NewEvent>,
        put: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), MetadataError> {
        let mut events = self.noted();
        let noted = events.len();
        events.extend(told);
        let mut log = EventLog::clone(&self.log.borrow());
        let changes = log.add(events, |subject| state.has(subject));
        let write = |database: &Database| {
            let transaction = database.begin_write()?;
            put(&transaction)?;
            put_events(&transaction, &changes)?;
            Ok(transaction.commit()?)
        };
        if let Err(error) = write(self.opened(database)?) {
            // It takes no more writes after the disk failed, and nobody knows what became of this one.
            *database = None;
            return Err(storage(&self.path)(error));
        }
        lock(&self.noted).drain(..noted);
        if changes != LogChanges::default() {
            self.log.send_replace(Arc::new(log));
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn put(transaction: &WriteTransaction, table: Documents, key: String, document: Vec<u8>) -> Result<(), redb::Error> {
    transaction.open_table(table)?.insert(key.as_str(), document.as_slice())?;
    Ok(())
}

fn remove(transaction: &WriteTransaction, table: Documents, key: String) -> Result<(), redb::Error> {
    transaction.open_table(table)?.remove(key.as_str())?;
    Ok(())
}

/// Writes the operations that a change makes, changes, or makes forgotten: any change may.
fn put_operations(transaction: &WriteTransaction, before: &State, after: &State) -> Result<(), redb::Error> {
    for (id, record) in after.operations.iter().filter(|(id, record)| before.operations.get(id) != Some(record)) {
        put(transaction, OPERATIONS, id.to_string(), encode(record)?)?;
    }
    let mut forgotten = before.operations.keys().filter(|id| !after.operations.contains_key(id));
    forgotten.try_for_each(|id| remove(transaction, OPERATIONS, id.to_string()))
}

/// Writes the other records that a change is about, as they are afterwards.
fn put_change(transaction: &WriteTransaction, mutation: &Mutation, after: &State) -> Result<(), redb::Error> {
    let put = |table, key, document| put(transaction, table, key, document);
    let remove = |table, key| remove(transaction, table, key);
    let put_volume = |id: VolumeId| match after.volumes.get(&id) {
        Some(record) => put(VOLUMES, id.to_string(), encode(record)?),
        None => Ok(()),
    };
    match mutation {
        Mutation::PutNode(_) | Mutation::SetUpgrade(_) => put(NODE, ONLY.to_owned(), encode(&after.node)?)?,
        Mutation::PutStore(record) => put(STORES, record.id.to_string(), encode(record)?)?,
        Mutation::RemoveStore(id) => {
            remove(STORES, id.to_string())?;
            after.volumes.keys().try_for_each(|volume| put_volume(*volume))?;
        }
        Mutation::InsertVolume(record) => put(VOLUMES, record.id.to_string(), encode(record)?)?,
        Mutation::ReplaceVolume { new, .. } => put_volume(new.id)?,
        Mutation::SwapConfig { volume, .. } => put_volume(*volume)?,
        Mutation::RemoveVolume(id) => remove(VOLUMES, id.to_string())?,
        Mutation::PutAttachment(super::AttachmentRecord { volume, .. }) | Mutation::Salvage { volume, .. } => {
            put_volume(*volume)?;
            if let Some(record) = after.attachments.get(volume) {
                put(ATTACHMENTS, volume.to_string(), encode(record)?)?;
            }
        }
        Mutation::RemoveAttachment(id) => remove(ATTACHMENTS, id.to_string())?,
        Mutation::PutOperation(_) => {}
        Mutation::All(mutations) => mutations.iter().try_for_each(|mutation| put_change(transaction, mutation, after))?,
    }
    Ok(())
}

fn put_events(transaction: &WriteTransaction, changes: &LogChanges) -> Result<(), redb::Error> {
    if *changes == LogChanges::default() {
        return Ok(());
    }
    let mut table = transaction.open_table(EVENTS)?;
    for number in &changes.removed {
        table.remove(number.to_string().as_str())?;
    }
    for (number, record) in &changes.put {
        table.insert(number.to_string().as_str(), encode(record.as_ref())?.as_slice())?;
    }
    Ok(())
}

fn storage(path: &Path) -> impl Fn(redb::Error) -> MetadataError {
    move |source| MetadataError::Storage { path: path.into(), source: Box::new(source) }
}

fn encode<T: Serialize>(record: &T) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(&Document { format: FORMAT, record }).map_err(|error| redb::Error::Io(error.into()))
}

fn decode<T: DeserializeOwned>(path: &Path, what: &str, document: &[u8]) -> Result<T, MetadataError> {
    let damaged = |source| MetadataError::Damaged { path: path.into(), what: what.into(), source };
    let FormatOnly { format } = serde_json::from_slice(document).map_err(damaged)?;
    if format > FORMAT {
        return Err(MetadataError::UnknownFormat { path: path.into(), what: what.into(), found: format, known: FORMAT });
    }
    serde_json::from_slice::<Document<T>>(document).map(|document| document.record).map_err(damaged)
}

fn load(path: &Path, database: &Database) -> Result<State, MetadataError> {
    let node = read(path, database, NODE)?.into_iter().next().unwrap_or_default();
    let stores = read(path, database, STORES)?.into_iter().map(|record: super::StoreRecord| (record.id, record)).collect();
    let volumes = read(path, database, VOLUMES)?.into_iter().map(|record: super::VolumeRecord| (record.id, record)).collect();
    let attachments =
        read(path, database, ATTACHMENTS)?.into_iter().map(|record: super::AttachmentRecord| (record.volume, record)).collect();
    let operations = read(path, database, OPERATIONS)?.into_iter().map(|record: super::OperationRecord| (record.id, record)).collect();
    Ok(State { node, stores, volumes, attachments, operations })
}

/// The log is no reason not to start: what can't be understood, as what a newer version wrote, stays where it is and is not shown.
fn load_log(path: &Path, database: &Database) -> Result<EventLog, MetadataError> {
    let (mut newest, mut records) = (EventNumber::default(), Vec::new());
    for (key, document) in entries(database, EVENTS).map_err(storage(path))? {
        newest = newest.max(key.parse().map_or(newest, EventNumber::new));
        match decode::<EventRecord>(path, &format!("event {key}"), &document) {
            Ok(record) => records.push(record),
            Err(error) => tracing::warn!(%error, "an event is not shown"),
        }
    }
    Ok(EventLog::load(newest, records))
}

fn read<T: DeserializeOwned>(path: &Path, database: &Database, table: Documents) -> Result<Vec<T>, MetadataError> {
    let mut records = Vec::new();
    for (key, document) in entries(database, table).map_err(storage(path))? {
        let what = format!("record {key} of table {}", redb::TableHandle::name(&table));
        records.push(decode(path, &what, &document)?);
    }
    Ok(records)
}

/// All keys and documents of a table.
fn entries(database: &Database, table: Documents) -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
    let transaction = database.begin_read()?;
    let open = match transaction.open_table(table) {
        Ok(open) => open,
        // A new file, or one of a version without this table.
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut entries = Vec::new();
    for entry in open.iter()? {
        let (key, value) = entry?;
        entries.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok(entries)
}
