//! All replicas of one store, and the connections to them.

use std::collections::{BTreeMap, VecDeque};

use carrick_backing_store::{Completion, OpenedReplica, Operation, ReplicaSpec, StoreError, StoreId, Token, VolumeId};

use super::volume::{Effect, VolumeReplica};
use crate::control::ReplicaReport;
use crate::wire::{Body, ErrorCode, FEATURES_INCOMPATIBLE, Frame, Header, Hello, HelloAnswer, Kind, VERSION, WireError};

/// Unfinished store operations of one connection above which no more is read from it: four times the deepest ublk queue.
const OPERATIONS_MAX: usize = 2048;
/// Data of unfinished store operations of one connection above which no more is read from it, in bytes.
const OPERATION_BYTES_MAX: usize = 32 << 20;

/// A connection to a primary, numbered by the driver; never reused within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// What the service wants done.
#[derive(Debug)]
pub enum ServiceAction {
    /// Queue this frame on the connection.
    Send(ConnectionId, Frame),
    /// Close the connection once everything queued on it is sent. Frames that still come from it are ignored.
    Close(ConnectionId),
    /// Submit this to the store.
    Store(VolumeId, Token, Operation),
    /// What came of [`ReplicaService::expand`] under this number.
    Expanded(u64, Result<(), StoreError>),
}

#[derive(Debug, Default)]
struct Connection {
    greeted: bool,
    operations: usize,
    bytes: usize,
}

/// Sans-I/O: all replicas of one store, and the sessions on them.
#[derive(Debug)]
pub struct ReplicaService {
    store: StoreId,
    replicas: BTreeMap<VolumeId, VolumeReplica>,
    connections: BTreeMap<ConnectionId, Connection>,
    /// Whose connection an operation in the store belongs to, and the bytes that it holds.
    in_store: BTreeMap<Token, (ConnectionId, usize)>,
    next_token: u64,
    actions: VecDeque<ServiceAction>,
}

impl ReplicaService {
    /// Serves these replicas of this store.
    #[must_use]
    pub fn new(store: StoreId, replicas: Vec<OpenedReplica>) -> Self {
        let replicas = replicas.iter().map(|opened| (opened.spec.volume, VolumeReplica::new(opened))).collect();
        Self { store, replicas, connections: BTreeMap::new(), in_store: BTreeMap::new(), next_token: 0, actions: VecDeque::new() }
    }

    /// A primary connected.
    pub fn on_connected(&mut self, connection: ConnectionId) {
        self.connections.insert(connection, Connection::default());
    }

    /// It sent a frame.
    pub fn on_frame(&mut self, connection: ConnectionId, frame: Frame) {
        let header = frame.header;
        let Some(state) = self.connections.get_mut(&connection) else { return };
        match (&frame.body, state.greeted) {
            (Body::Hello(hello), _) => match answer_hello(*hello, self.store) {
                Ok(answer) => {
                    state.greeted = true;
                    let answer = Frame::new(Header { kind: Kind::HelloAnswer, ..header }, Body::HelloAnswer(answer));
                    self.actions.push_back(ServiceAction::Send(connection, answer));
                }
                Err((code, text)) => self.refuse_and_close(connection, &header, code, text),
            },
            (_, false) => {
                let text = format!("header.kind is {:?}, the first frame of a connection is Hello", header.kind);
                self.refuse_and_close(connection, &header, ErrorCode::BadFrame, text);
            }
            (_, true) => self.on_volume_frame(connection, frame),
        }
    }

    fn on_volume_frame(&mut self, connection: ConnectionId, frame: Frame) {
        let header = frame.header;
        let next_token = &mut self.next_token;
        if let Some(replica) = self.replicas.get_mut(&header.volume) {
            replica.on_frame(connection, frame, &mut || take_token(next_token));
            self.collect(header.volume);
        } else {
            let text = format!("store {} has no replica of volume {}", self.store, header.volume);
            self.actions.push_back(ServiceAction::Send(connection, Frame::error(&header, ErrorCode::UnknownVolume, text)));
        }
    }

    /// It sent something that is no frame: it is told so, and the connection closed.
    pub fn on_wire_error(&mut self, connection: ConnectionId, error: WireError) {
        let code = if let WireError::Version(_) = error { ErrorCode::UnsupportedVersion } else { ErrorCode::BadFrame };
        let header = Header::new(Kind::Error, VolumeId::from_bytes([0; 16]), carrick_backing_store::Term::ZERO);
        self.refuse_and_close(connection, &header, code, error.to_string());
    }

    /// Its connection is gone.
    pub fn on_disconnected(&mut self, connection: ConnectionId) {
        self.connections.remove(&connection);
        for replica in self.replicas.values_mut() {
            replica.on_disconnected(connection);
        }
    }

    /// The store finished an operation.
    pub fn on_completion(&mut self, completion: Completion) {
        if let Some((connection, bytes)) = self.in_store.remove(&completion.token)
            && let Some(connection) = self.connections.get_mut(&connection)
        {
            connection.operations -= 1;
            connection.bytes -= bytes;
        }
        let next_token = &mut self.next_token;
        if let Some(replica) = self.replicas.get_mut(&completion.volume) {
            replica.on_completion(completion.token, completion.result, &mut || take_token(next_token));
            self.collect(completion.volume);
        }
    }

    /// A replica was created in the store. One that is known already stays as it is.
    pub fn add(&mut self, replica: OpenedReplica) {
        self.replicas.entry(replica.spec.volume).or_insert_with(|| VolumeReplica::new(&replica));
    }

    /// A replica is to have this size, if it is smaller. [`ServiceAction::Expanded`] tells, under the same number, when it has, durably.
    pub fn expand(&mut self, spec: ReplicaSpec, number: u64) {
        let next_token = &mut self.next_token;
        match self.replicas.get_mut(&spec.volume) {
            Some(replica) => {
                replica.expand(spec.size, number, take_token(next_token));
                self.collect(spec.volume);
            }
            None => self.actions.push_back(ServiceAction::Expanded(number, Err(StoreError::UnknownVolume(spec.volume)))),
        }
    }

    /// A replica is about to be deleted from the store: sessions on it end. False while operations on it are in the store;
    /// ask again after they completed.
    pub fn remove(&mut self, volume: VolumeId) -> bool {
        let Some(replica) = self.replicas.get_mut(&volume) else { return true };
        replica.end_session();
        let idle = replica.is_idle();
        self.collect(volume);
        if idle {
            self.replicas.remove(&volume);
        }
        idle
    }

    /// Whether more frames may be read from this connection now: false while it has too much unfinished.
    #[must_use]
    pub fn may_receive(&self, connection: ConnectionId) -> bool {
        self.connections
            .get(&connection)
            .is_none_or(|connection| connection.operations < OPERATIONS_MAX && connection.bytes < OPERATION_BYTES_MAX)
    }

    /// What to do next. Call it until `None` after every batch of other calls: acknowledgements of a batch are given as one.
    pub fn next_action(&mut self) -> Option<ServiceAction> {
        if let Some(action) = self.actions.pop_front() {
            return Some(action);
        }
        self.replicas.values_mut().find_map(VolumeReplica::take_ack).map(|(connection, frame)| ServiceAction::Send(connection, frame))
    }

    /// How the replicas stand.
    #[must_use]
    pub fn report(&self) -> Vec<ReplicaReport> {
        self.replicas.values().map(VolumeReplica::report).collect()
    }

    /// Turns what a replica wants into actions.
    fn collect(&mut self, volume: VolumeId) {
        let Some(replica) = self.replicas.get_mut(&volume) else { return };
        while let Some(effect) = replica.next_effect() {
            let action = match effect {
                Effect::Send(connection, frame) => ServiceAction::Send(connection, frame),
                Effect::Close(connection) => ServiceAction::Close(connection),
                Effect::Expanded(number, result) => ServiceAction::Expanded(number, result),
                Effect::Store(token, operation) => {
                    if let Some(owner) = replica.owner(token)
                        && let Some(connection) = self.connections.get_mut(&owner)
                    {
                        let bytes = operation_bytes(&operation);
                        connection.operations += 1;
                        connection.bytes += bytes;
                        self.in_store.insert(token, (owner, bytes));
                    }
                    ServiceAction::Store(volume, token, operation)
                }
            };
            self.actions.push_back(action);
        }
    }

    fn refuse_and_close(&mut self, connection: ConnectionId, request: &Header, code: ErrorCode, text: String) {
        self.connections.remove(&connection);
        self.actions.push_back(ServiceAction::Send(connection, Frame::error(request, code, text)));
        self.actions.push_back(ServiceAction::Close(connection));
    }
}

fn take_token(next: &mut u64) -> Token {
    *next += 1;
    Token(*next)
}

fn operation_bytes(operation: &Operation) -> usize {
    match operation {
        Operation::Write { data, .. } => data.len(),
        Operation::Read { extent, .. } => usize::try_from(extent.length().get()).unwrap_or(OPERATION_BYTES_MAX),
        _ => 0,
    }
}

fn answer_hello(hello: Hello, store: StoreId) -> Result<HelloAnswer, (ErrorCode, String)> {
    if hello.version_min > VERSION || hello.version_max < VERSION {
        let text = format!(
            "hello.version_min..max is {}..{}, this replica speaks {VERSION}: upgrade the older side",
            hello.version_min, hello.version_max
        );
        return Err((ErrorCode::UnsupportedVersion, text));
    }
    let unknown = hello.features_incompatible & !FEATURES_INCOMPATIBLE;
    if unknown != 0 {
        let text = format!("hello.features_incompatible has bits {unknown:#x} that this replica doesn't know: upgrade carrick-replica");
        return Err((ErrorCode::UnsupportedFeature, text));
    }
    Ok(HelloAnswer { version: VERSION, features_incompatible: FEATURES_INCOMPATIBLE, features_compatible: 0, store })
}
