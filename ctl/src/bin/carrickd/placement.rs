//! What may come to this node and to its stores, and emptying them. The stores' replicas are moved by the node's loop, one volume after
//! the other (see `moves`).

use carrick_backing_store::StoreId;
use carrick_ctl::fault::{Fault, Reason};

use crate::attach;
use crate::context::Context;
use crate::metadata::{Mutation, NodeRecord, Percent, Placement, State, StoreRecord};
use crate::observed::Event;
use crate::stores;

/// What is to change of the node; what isn't given stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct NodeChanges {
    /// Whether volumes may be attached.
    pub targets: Option<bool>,
    /// Whether replicas may be made.
    pub replicas: Option<bool>,
}

/// Changes what may come to the node.
pub async fn set_node(context: &Context, changes: NodeChanges) -> Result<(), Fault> {
    let _one_at_a_time = context.stores.lock().await;
    let before = context.state().node.clone();
    let after = NodeRecord {
        refuses_targets: changes.targets.map_or(before.refuses_targets, |takes| !takes),
        refuses_replicas: changes.replicas.map_or(before.refuses_replicas, |takes| !takes),
        upgrade: before.upgrade.clone(),
    };
    if after != before {
        tracing::info!(?after, "what may come to this node has changed");
        context.apply(Mutation::PutNode(after)).await?;
    }
    Ok(())
}

/// What became of the attached volumes when the node was drained.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Names of those that are detached.
    pub detached: Vec<String>,
    /// Those that are not, and why.
    pub left: Vec<(String, String)>,
}

/// Lets nothing come any more, and detaches what nobody uses.
pub async fn drain(context: &Context) -> Result<Drained, Fault> {
    set_node(context, NodeChanges { targets: Some(false), replicas: Some(false) }).await?;
    let state = context.state();
    let mut names: Vec<_> = state.attached().map(|volume| volume.name.to_string()).collect();
    names.sort();
    let mut drained = Drained::default();
    for name in names {
        match attach::detach(context, &name, false).await {
            Ok(()) => drained.detached.push(name),
            // Somebody else has deleted it.
            Err(fault) if fault.reason == Reason::VolumeNotFound => {}
            Err(fault) => drained.left.push((name, fault.message)),
        }
    }
    Ok(drained)
}

/// What is to change of a store; what isn't given stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct StoreChanges {
    /// What becomes of replicas, those to come and those that are there.
    pub placement: Option<Placement>,
    /// So much of it may be taken.
    pub limit: Option<u32>,
    /// From so much on it is told.
    pub warning: Option<u32>,
}

impl StoreChanges {
    /// The record after them.
    fn apply(self, record: &StoreRecord) -> Result<StoreRecord, Fault> {
        let percent = |field: &str, given: Option<u32>, known: Percent| match given {
            None => Ok(known),
            Some(given) => Percent::new(given).ok_or_else(|| Fault::invalid(field, format!("{given} % is not possible: it is 1 to 100"))),
        };
        let (limit, warning) =
            (percent("limit_percent", self.limit, record.limit)?, percent("warning_percent", self.warning, record.warning)?);
        Ok(StoreRecord { placement: self.placement.unwrap_or(record.placement), limit, warning, ..record.clone() })
    }
}

/// Changes what may come to a store, and what becomes of what is there.
pub async fn set_store(context: &Context, text: &str, changes: StoreChanges) -> Result<StoreId, Fault> {
    let _one_at_a_time = context.stores.lock().await;
    let state = context.state();
    let record = stores::resolve(&state, text)?;
    let new = changes.apply(record)?;
    if new != *record {
        context.apply(Mutation::PutStore(new)).await?;
        // What waited for a store need wait no longer.
        for volume in state.volumes.keys() {
            context.node.send(Event::Anew(*volume)).await;
        }
    }
    Ok(record.id)
}

/// Whether volumes may be attached here.
pub fn check_targets(state: &State) -> Result<(), Fault> {
    if !state.node.refuses_targets {
        return Ok(());
    }
    Err(Fault::new(Reason::NodeDisabled, "node", "this node attaches no more volumes: carrick node enable lets it"))
}

/// Whether replicas may be made here.
pub fn check_replicas(state: &State) -> Result<(), Fault> {
    if !state.node.refuses_replicas {
        return Ok(());
    }
    Err(Fault::new(Reason::NodeDisabled, "node", "this node takes no more replicas: carrick node enable lets it"))
}

/// Whether replicas may be made in a store that somebody has named.
pub fn check_store(record: &StoreRecord) -> Result<(), Fault> {
    if record.placement == Placement::Enabled {
        return Ok(());
    }
    let path = record.path.display();
    let message = format!("store {path} takes no more replicas: carrick store enable {path} lets it");
    Err(Fault::new(Reason::StoreDisabled, record.id, message))
}
