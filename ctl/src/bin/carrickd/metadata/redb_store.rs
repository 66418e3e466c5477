//! The metadata of a single node, in one `redb` file.
//!
//! The whole state is kept in memory too: it is small, and the file is locked, so nobody else changes it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use carrick_backing_store::VolumeId;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{FORMAT, MetadataError, MetadataStore, Mutation, State};

type Documents = TableDefinition<'static, &'static str, &'static [u8]>;

const STORES: Documents = TableDefinition::new("stores");
const VOLUMES: Documents = TableDefinition::new("volumes");
const ATTACHMENTS: Documents = TableDefinition::new("attachments");
const OPERATIONS: Documents = TableDefinition::new("operations");

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

struct Inner {
    path: PathBuf,
    database: Database,
    state: Mutex<Arc<State>>,
    /// One change at a time, while `state` can be read.
    writing: Mutex<()>,
}

impl RedbStore {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// [`MetadataError::InUse`], [`MetadataError::UnknownFormat`], [`MetadataError::Damaged`], or the disk's.
    pub fn open(path: &Path) -> Result<Self, MetadataError> {
        let database = Database::create(path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => MetadataError::InUse(path.into()),
            other => storage(path)(other.into()),
        })?;
        let state = Arc::new(load(path, &database)?);
        Ok(Self { inner: Arc::new(Inner { path: path.into(), database, state: Mutex::new(state), writing: Mutex::new(()) }) })
    }
}

#[tonic::async_trait]
impl MetadataStore for RedbStore {
    fn state(&self) -> Arc<State> {
        self.inner.state()
    }

    async fn apply(&self, mutation: Mutation) -> Result<Arc<State>, MetadataError> {
        let inner = Arc::clone(&self.inner);
        let path = self.inner.path.clone();
        // The commit waits for the disk.
        match tokio::task::spawn_blocking(move || inner.apply(&mutation)).await {
            Ok(result) => result,
            Err(error) => Err(storage(&path)(redb::Error::Io(std::io::Error::other(error)))),
        }
    }
}

impl Inner {
    fn state(&self) -> Arc<State> {
        Arc::clone(&self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Checks the change against the state in memory, writes it, and only then shows it.
    fn apply(&self, mutation: &Mutation) -> Result<Arc<State>, MetadataError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = State::clone(&self.state());
        state.apply(mutation)?;
        self.write(mutation, &self.state(), &state).map_err(storage(&self.path))?;
        let state = Arc::new(state);
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&state);
        Ok(state)
    }

    fn write(&self, mutation: &Mutation, before: &State, after: &State) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let put = |table: Documents, key: String, document: Vec<u8>| -> Result<(), redb::Error> {
                transaction.open_table(table)?.insert(key.as_str(), document.as_slice())?;
                Ok(())
            };
            let remove = |table: Documents, key: String| -> Result<(), redb::Error> {
                transaction.open_table(table)?.remove(key.as_str())?;
                Ok(())
            };
            let put_volume = |id: VolumeId| match after.volumes.get(&id) {
                Some(record) => put(VOLUMES, id.to_string(), encode(record)?),
                None => Ok(()),
            };
            match mutation {
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
                Mutation::PutOperation(_) => {
                    for (id, record) in after.operations.iter().filter(|(id, record)| before.operations.get(id) != Some(record)) {
                        put(OPERATIONS, id.to_string(), encode(record)?)?;
                    }
                    let mut forgotten = before.operations.keys().filter(|id| !after.operations.contains_key(id));
                    forgotten.try_for_each(|id| remove(OPERATIONS, id.to_string()))?;
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }
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
    let stores = read(path, database, STORES)?.into_iter().map(|record: super::StoreRecord| (record.id, record)).collect();
    let volumes = read(path, database, VOLUMES)?.into_iter().map(|record: super::VolumeRecord| (record.id, record)).collect();
    let attachments =
        read(path, database, ATTACHMENTS)?.into_iter().map(|record: super::AttachmentRecord| (record.volume, record)).collect();
    let operations = read(path, database, OPERATIONS)?.into_iter().map(|record: super::OperationRecord| (record.id, record)).collect();
    Ok(State { stores, volumes, attachments, operations })
}

fn read<T: DeserializeOwned>(path: &Path, database: &Database, table: Documents) -> Result<Vec<T>, MetadataError> {
    let mut records = Vec::new();
    let entries = || -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
        let transaction = database.begin_read()?;
        let open = match transaction.open_table(table) {
            Ok(open) => open,
            // A new file.
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let mut entries = Vec::new();
        for entry in open.iter()? {
            let (key, value) = entry?;
            entries.push((key.value().to_owned(), value.value().to_vec()));
        }
        Ok(entries)
    };
    for (key, document) in entries().map_err(storage(path))? {
        let what = format!("record {key} of table {}", redb::TableHandle::name(&table));
        records.push(decode(path, &what, &document)?);
    }
    Ok(records)
}
