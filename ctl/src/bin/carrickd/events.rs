//! Reading and following the log of what happened, and writing down what was noted. What is in it, `metadata/events.rs` decides.

use std::sync::Arc;
use std::time::Duration;

use carrick_ctl::fault::Fault;
use carrick_ctl::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::context::Context;
use crate::metadata::{EventLog, EventNumber, EventRecord, State, Subject};
use crate::stores;
use crate::volumes::{not_found, parse_name};

/// What was noted is written down after this, all of it at once: long enough for a burst to be one write, and for an attachment to take it
/// along; short enough that a carrickd that is killed forgets next to nothing.
const WRITE_AFTER: Duration = Duration::from_millis(250);
/// Before another attempt, when the disk took nothing.
const WRITE_AGAIN: Duration = Duration::from_secs(60);
/// Events that a reader has not read before its stream waits for it. The rest stays in the log, where it may be forgotten.
const READ_QUEUE: usize = 64;

/// What a reader reads.
pub type Reading = ReceiverStream<Result<v1::ReadEventsResponse, Status>>;

/// Writes down what was noted, until the daemon ends. It sleeps as long as nothing is.
pub async fn write_down(context: Arc<Context>) {
    loop {
        context.noted.notified().await;
        tokio::time::sleep(WRITE_AFTER).await;
        while let Err(error) = context.metadata.flush().await {
            tracing::warn!(%error, "what happened can't be written down");
            tokio::time::sleep(WRITE_AGAIN).await;
        }
    }
}

/// Which events somebody wants.
enum Filter {
    All,
    /// Of volumes of this name, or the one of this id.
    Volume(String),
    /// About the store of this path, or whose id begins so.
    Store(String),
}

impl Filter {
    fn new(request: &v1::ReadEventsRequest) -> Result<Self, Fault> {
        match (&request.volume, &request.store) {
            (Some(_), Some(_)) => Err(Fault::invalid("store", "give a volume or a store, not both")),
            (Some(volume), None) => Ok(Self::Volume(volume.clone())),
            (None, Some(store)) => Ok(Self::Store(store.clone())),
            (None, None) => Ok(Self::All),
        }
    }

    fn wants(&self, event: &EventRecord) -> bool {
        match (self, &event.subject) {
            (Self::All, _) => true,
            (Self::Volume(text), Subject::Volume { id, name }) => name.as_str() == text || id.to_string() == *text,
            (Self::Volume(_), Subject::Store(_) | Subject::Node) => false,
            (Self::Store(text), _) => event.place().is_some_and(|place| place.path == *text || stores::is_beginning(place.id, text)),
        }
    }

    /// A name that nobody ever had is a slip of the pen.
    fn check(&self, state: &State, log: &EventLog) -> Result<(), Fault> {
        if !log.after(EventNumber::default(), 1, |event| self.wants(event)).is_empty() {
            return Ok(());
        }
        match self {
            Self::All => Ok(()),
            Self::Volume(text) => {
                let name = parse_name(text)?;
                state.volume_by_name(&name).map(drop).ok_or_else(|| not_found(&name))
            }
            Self::Store(text) => stores::resolve(state, text).map(drop),
        }
    }
}

/// Sends what is in the log, and, if that is wanted, what is added, for as long as somebody listens and the daemon doesn't end.
pub async fn read(context: &Arc<Context>, request: v1::ReadEventsRequest) -> Result<Reading, Fault> {
    let filter = Filter::new(&request)?;
    // Whoever asks after something that has just happened finds it. If the disk fails, the log is still there to be read.
    if let Err(error) = context.metadata.flush().await {
        tracing::warn!(%error, "what happened can't be written down");
    }
    let mut log = context.metadata.log();
    filter.check(&context.state(), &log.borrow())?;
    // A number from another log, as before the state directory was made anew.
    let since = Some(EventNumber::new(request.since)).filter(|since| *since <= log.borrow().newest());
    let mut since = since.unwrap_or_default();
    let mut ending = context.ending.subscribe();
    let (sender, receiver) = mpsc::channel(READ_QUEUE);
    tokio::spawn(async move {
        loop {
            // By numbers, a few at a time: nothing is kept for a slow reader.
            let events = log.borrow_and_update().after(since, READ_QUEUE, |event| filter.wants(event));
            for event in &events {
                since = event.number;
                let response = v1::ReadEventsResponse { event: Some(message(event)) };
                if sender.send(Ok(response)).await.is_err() {
                    return;
                }
            }
            if !events.is_empty() {
                continue;
            }
            if !request.follow {
                return;
            }
            tokio::select! {
                changed = log.changed() => if changed.is_err() { return },
                _ = ending.wait_for(|ending| *ending) => return,
                () = sender.closed() => return,
            }
        }
    });
    Ok(ReceiverStream::new(receiver))
}

/// As callers see it.
fn message(event: &EventRecord) -> v1::Event {
    let (volume_id, volume) = match &event.subject {
        Subject::Volume { id, name } => (Some(id.to_string()), Some(name.to_string())),
        Subject::Store(_) | Subject::Node => (None, None),
    };
    v1::Event {
        number: event.number.get(),
        kind: event.kind.as_str().into(),
        time_unix: event.last_unix,
        first_unix: event.first_unix,
        times: event.times,
        volume_id,
        volume,
        store_id: event.place().map(|place| place.id.to_string()),
        store: event.place().map(|place| place.path.clone()),
        text: event.text.clone(),
    }
}
