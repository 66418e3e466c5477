//! Tells targets which replicas of a volume count, and lets them change that: one JSON line each way (see
//! [`carrick_replicator::control`]), on a socket that only this user may use.

use std::sync::Arc;
use std::time::Duration;

use carrick_backing_store::{StoreId, VolumeId};
use carrick_replicator::control::{ControlError, ControlErrorCode, RecordsAnswer, RecordsRequest, VolumeConfig};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::context::{Context, unix_now};
use crate::metadata::{MetadataError, Mutation, Occasion};
use crate::observed::{Event, ProcessId};
use crate::survey;

/// Connections at once: each target has one for a moment, now and then.
const CONNECTIONS_MAX: usize = 64;
/// A request is a few hundred bytes.
const LINE_MAX: u64 = 16 << 10;
/// Whoever connects must have asked, and read the answer, within this.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two tries to accept, when the system is out of something.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves the socket until the daemon ends.
pub async fn serve(context: Arc<Context>, listener: UnixListener) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let context = Arc::clone(&context);
                tokio::spawn(async move {
                    // A target that gets no answer asks again.
                    let _ = tokio::time::timeout(LIMIT, converse(&context, stream)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection for records");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn converse(context: &Context, stream: UnixStream) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = Vec::new();
    BufReader::new(reader.take(LINE_MAX)).read_until(b'\n', &mut line).await?;
    let answer = match serde_json::from_slice(&line) {
        Ok(request) => answer(context, request).await,
        Err(error) => refused(ControlErrorCode::Invalid, error),
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    writer.write_all(&line).await
}

async fn answer(context: &Context, request: RecordsRequest) -> RecordsAnswer {
    let volume = match request {
        RecordsRequest::Read { volume } => volume,
        RecordsRequest::Swap { volume, next } => {
            match context.metadata.apply_on(occasion(context, volume, &next), swap(volume, next)).await {
                Ok(_) => {
                    // Who is left out may be replaced some day, or copied to.
                    context.follow();
                    context.node.send(Event::Anew(volume)).await;
                    volume
                }
                // What it is now tells the target what happened.
                Err(MetadataError::Changed(_)) => volume,
                Err(error @ MetadataError::BadConfig(_)) => return refused(ControlErrorCode::Invalid, error),
                Err(error) => return refused(ControlErrorCode::Failed, error),
            }
        }
    };
    match config(context, volume) {
        Some(config) => RecordsAnswer::Config(config),
        None => refused(ControlErrorCode::NotFound, format!("there is no volume {volume}")),
    }
}

/// Why replicas are left out, as far as this daemon knows: the target says only that.
fn occasion(context: &Context, volume: VolumeId, next: &VolumeConfig) -> Occasion {
    let (state, observed) = (context.state(), context.node.observed());
    let members = state.volumes.get(&volume).map_or_else(Vec::new, |record| record.config().members);
    let left_out: Vec<StoreId> = members.into_iter().filter(|store| !next.members.contains(store)).collect();
    let remark = match left_out[..] {
        [store] => survey::why_silent(&observed, ProcessId::Replica(store)).map(|why| format!("its carrick-replica {why}")),
        // What is known of one says nothing of another.
        _ => None,
    };
    Occasion { at_unix: unix_now(), remark }
}

fn swap(volume: VolumeId, next: VolumeConfig) -> Mutation {
    Mutation::SwapConfig { volume, next, at_unix: unix_now() }
}

fn config(context: &Context, volume: VolumeId) -> Option<VolumeConfig> {
    context.state().volumes.get(&volume).map(|record| {
        let config = record.config();
        tracing::debug!(volume = %record.name, version = config.version.get(), term = %config.term, "asked for the config");
        config
    })
}

fn refused(code: ControlErrorCode, why: impl ToString) -> RecordsAnswer {
    RecordsAnswer::Refused(ControlError { code, message: why.to_string() })
}
