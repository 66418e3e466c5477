//! The gRPC services: requests in, operations, messages out.
//!
//! An operation that changes something runs in a task of its own: a caller that goes away doesn't leave it half done.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;

use carrick_backing_store::{ByteLength, VolumeId};
use carrick_ctl::fault::{Fault, Reason};
use carrick_ctl::v1;
use carrick_ctl::v1::event_service_server::EventService;
use carrick_ctl::v1::node_service_server::NodeService;
use carrick_ctl::v1::operation_service_server::OperationService;
use carrick_ctl::v1::store_service_server::StoreService;
use carrick_ctl::v1::volume_service_server::VolumeService;
use tokio::sync::Notify;
use tonic::{Request, Response, Status};

use crate::context::Context;
use crate::expand::DeviceGrowth;
use crate::metadata::{Placement, State};
use crate::placement::{self, NodeChanges, StoreChanges};
use crate::settings::Changes;
use crate::stores::NewStore;
use crate::view::View;
use crate::volumes::{NewVolume, not_found, parse_name};
use crate::{attach, events, expand, explain, moves, operations, salvage, settings, shutdown, stores, survey, upgrade, verify, volumes};

/// All services. Cheap to clone.
#[derive(Clone)]
pub struct Services {
    context: Arc<Context>,
    /// Notified when this daemon shall end.
    end: Arc<Notify>,
}

impl Services {
    /// Over everything that the daemon has.
    pub fn new(context: Arc<Context>, end: Arc<Notify>) -> Self {
        Self { context, end }
    }

    /// Runs an operation that changes something to its end, whatever becomes of the caller.
    async fn change<F, T>(&self, operation: impl FnOnce(Arc<Context>) -> F + Send + 'static) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Fault>> + Send,
        T: Send + 'static,
    {
        let context = Arc::clone(&self.context);
        let task = tokio::spawn(async move {
            let _pass = context.gate.enter().await?;
            operation(Arc::clone(&context)).await
        });
        match task.await {
            Ok(result) => result.map_err(Status::from),
            Err(error) => Err(Fault::new(Reason::Internal, "carrickd", error.to_string()).into()),
        }
    }

    /// Looks at everything, with all answers that can be had.
    async fn look<T>(&self, what: impl FnOnce(&View<'_>) -> T) -> T {
        survey::look(&self.context, what).await
    }

    /// Looks at one volume only.
    async fn look_at_volume(&self, state: &State, id: VolumeId) -> Result<v1::Volume, Status> {
        let gone = || Fault::new(Reason::VolumeNotFound, id, "that is done, but the volume is gone again: somebody else has deleted it");
        let record = state.volumes.get(&id).ok_or_else(gone)?;
        let has_target = survey::with_targets(state, &self.context.node.observed()).contains(&id);
        let targets = survey::targets(&self.context, has_target.then_some(id)).await;
        // The target knows more of its replicas than they do.
        let replicas = if targets.values().any(Result::is_ok) {
            BTreeMap::new()
        } else {
            survey::replicas(&self.context, record.replicas.iter().copied()).await
        };
        let observed = self.context.node.observed();
        let outdated = BTreeSet::new();
        let moment = self.context.moment();
        let view = View { state, trouble: None, observed: &observed, outdated: &outdated, replicas: &replicas, targets: &targets, moment };
        Ok(view.volume(record))
    }
}

#[tonic::async_trait]
impl StoreService for Services {
    async fn add_store(&self, request: Request<v1::AddStoreRequest>) -> Result<Response<v1::AddStoreResponse>, Status> {
        let v1::AddStoreRequest { path, listen, insecure, size_bytes } = request.into_inner();
        let parse = |text: String| {
            text.parse().map_err(|_| Fault::invalid("listen", format!("{text:?} is not an address: write IP:PORT, such as 192.0.2.1:7100")))
        };
        let new = NewStore { listen: listen.map(parse).transpose()?, insecure, size: size_bytes.map(ByteLength::new) };
        let id = self.change(move |context| async move { stores::add(&context, &path, new).await }).await?;
        let store = self.look(|view| view.state.stores.get(&id).map(|record| view.store(record))).await;
        Ok(Response::new(v1::AddStoreResponse { store }))
    }

    async fn list_stores(&self, _: Request<v1::ListStoresRequest>) -> Result<Response<v1::ListStoresResponse>, Status> {
        Ok(Response::new(v1::ListStoresResponse { stores: self.look(|view| view.stores()).await }))
    }

    async fn get_store(&self, request: Request<v1::GetStoreRequest>) -> Result<Response<v1::GetStoreResponse>, Status> {
        let v1::GetStoreRequest { store } = request.into_inner();
        let store = self.look(|view| stores::resolve(view.state, &store).map(|record| view.store(record))).await?;
        Ok(Response::new(v1::GetStoreResponse { store: Some(store) }))
    }

    async fn set_store(&self, request: Request<v1::SetStoreRequest>) -> Result<Response<v1::SetStoreResponse>, Status> {
        let v1::SetStoreRequest { store, placement, limit_percent: limit, warning_percent: warning } = request.into_inner();
        let placement = placement.map(|placement| match v1::StorePlacement::try_from(placement) {
            Ok(v1::StorePlacement::Enabled) => Ok(Placement::Enabled),
            Ok(v1::StorePlacement::Disabled) => Ok(Placement::Disabled),
            Ok(v1::StorePlacement::Evicting) => Ok(Placement::Evicting),
            Ok(v1::StorePlacement::Unspecified) | Err(_) => Err(Fault::invalid("placement", format!("{placement} is no placement"))),
        });
        let changes = StoreChanges { placement: placement.transpose()?, limit, warning };
        let id = self.change(move |context| async move { placement::set_store(&context, &store, changes).await }).await?;
        let store = self.look(|view| view.state.stores.get(&id).map(|record| view.store(record))).await;
        Ok(Response::new(v1::SetStoreResponse { store }))
    }

    async fn remove_store(&self, request: Request<v1::RemoveStoreRequest>) -> Result<Response<v1::RemoveStoreResponse>, Status> {
        let v1::RemoveStoreRequest { store } = request.into_inner();
        self.change(move |context| async move { stores::remove(&context, &store).await }).await?;
        Ok(Response::new(v1::RemoveStoreResponse {}))
    }
}

#[tonic::async_trait]
impl VolumeService for Services {
    async fn create_volume(&self, request: Request<v1::CreateVolumeRequest>) -> Result<Response<v1::CreateVolumeResponse>, Status> {
        let v1::CreateVolumeRequest { name, size_bytes, replicas, block_size, stores } = request.into_inner();
        let new = NewVolume { name, size: size_bytes, replicas, block_size, stores };
        let id = self.change(move |context| async move { volumes::create(&context, new).await }).await?;
        let volume = self.look_at_volume(&self.context.state(), id).await?;
        Ok(Response::new(v1::CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn list_volumes(&self, _: Request<v1::ListVolumesRequest>) -> Result<Response<v1::ListVolumesResponse>, Status> {
        Ok(Response::new(v1::ListVolumesResponse { volumes: self.look(|view| view.volumes()).await }))
    }

    async fn get_volume(&self, request: Request<v1::GetVolumeRequest>) -> Result<Response<v1::GetVolumeResponse>, Status> {
        let name = parse_name(&request.into_inner().name)?;
        let state = self.context.state();
        let id = state.volume_by_name(&name).ok_or_else(|| not_found(&name))?.id;
        Ok(Response::new(v1::GetVolumeResponse { volume: Some(self.look_at_volume(&state, id).await?) }))
    }

    async fn explain_volume(&self, request: Request<v1::ExplainVolumeRequest>) -> Result<Response<v1::ExplainVolumeResponse>, Status> {
        let v1::ExplainVolumeRequest { name } = request.into_inner();
        let name = parse_name(&name)?;
        let replace_after = self.context.replace_after;
        let log = Arc::clone(&self.context.metadata.log().borrow());
        let explained = self
            .look(|view| {
                // One that is being deleted has no name any more, but is still asked after.
                let named = || view.state.volumes.values().find(|volume| volume.name == name);
                let record = view.state.volume_by_name(&name).or_else(named).ok_or_else(|| not_found(&name))?;
                Ok::<_, Fault>(explain::explain(view, record, replace_after, &log))
            })
            .await?;
        Ok(Response::new(explained))
    }

    async fn expand_volume(&self, request: Request<v1::ExpandVolumeRequest>) -> Result<Response<v1::ExpandVolumeResponse>, Status> {
        let v1::ExpandVolumeRequest { name, size_bytes, dry_run, idempotency_key } = request.into_inner();
        let request = expand::Request { name, size: size_bytes, dry_run, key: idempotency_key };
        let answered = self.change(move |context| async move { expand::expand(&context, request).await }).await?;
        let device = match answered.device {
            DeviceGrowth::NotAttached => v1::DeviceGrowth::NotAttached,
            DeviceGrowth::Online => v1::DeviceGrowth::Online,
            DeviceGrowth::NextAttachment => v1::DeviceGrowth::NextAttachment,
        };
        let [from, to] = answered.sizes;
        Ok(Response::new(v1::ExpandVolumeResponse {
            operation: answered.operation.as_ref().map(|operation| operations::message(&self.context.state(), operation)),
            from_bytes: from.bytes().get(),
            to_bytes: to.bytes().get(),
            device: device.into(),
            away_stores: answered.away,
        }))
    }

    async fn set_volume(&self, request: Request<v1::SetVolumeRequest>) -> Result<Response<v1::SetVolumeResponse>, Status> {
        let v1::SetVolumeRequest { name, rebuild_rate, iops, iops_burst, bandwidth, bandwidth_burst } = request.into_inner();
        let changes = Changes { rebuild_rate, iops, iops_burst, bandwidth, bandwidth_burst };
        let id = self.change(move |context| async move { settings::set(&context, &name, changes).await }).await?;
        let volume = self.look_at_volume(&self.context.state(), id).await?;
        Ok(Response::new(v1::SetVolumeResponse { volume: Some(volume) }))
    }

    async fn verify_volume(&self, request: Request<v1::VerifyVolumeRequest>) -> Result<Response<v1::VerifyVolumeResponse>, Status> {
        let v1::VerifyVolumeRequest { name } = request.into_inner();
        let id = self.change(move |context| async move { verify::verify(&context, &name).await }).await?;
        let volume = self.look_at_volume(&self.context.state(), id).await?;
        Ok(Response::new(v1::VerifyVolumeResponse { volume: Some(volume) }))
    }

    async fn replace_replica(&self, request: Request<v1::ReplaceReplicaRequest>) -> Result<Response<v1::ReplaceReplicaResponse>, Status> {
        let v1::ReplaceReplicaRequest { name, store, with } = request.into_inner();
        let (id, operation) =
            self.change(move |context| async move { moves::replace(&context, &name, &store, with.as_deref()).await }).await?;
        let state = self.context.state();
        let volume = self.look_at_volume(&state, id).await?;
        let operation = operation.map(|operation| operations::message(&state, &operation));
        Ok(Response::new(v1::ReplaceReplicaResponse { volume: Some(volume), operation }))
    }

    async fn add_replica(&self, request: Request<v1::AddReplicaRequest>) -> Result<Response<v1::AddReplicaResponse>, Status> {
        let v1::AddReplicaRequest { name, with } = request.into_inner();
        let id = self.change(move |context| async move { moves::add(&context, &name, with.as_deref()).await }).await?;
        let volume = self.look_at_volume(&self.context.state(), id).await?;
        Ok(Response::new(v1::AddReplicaResponse { volume: Some(volume) }))
    }

    async fn salvage_volume(&self, request: Request<v1::SalvageVolumeRequest>) -> Result<Response<v1::SalvageVolumeResponse>, Status> {
        let v1::SalvageVolumeRequest { name, from, give_up_the_rest } = request.into_inner();
        if !give_up_the_rest {
            let message = "what only the other replicas have is lost for ever: say that it may be (--give-up-the-rest)";
            return Err(Fault::invalid("give_up_the_rest", message).into());
        }
        let id = self.change(move |context| async move { salvage::salvage(&context, &name, &from).await }).await?;
        let volume = self.look_at_volume(&self.context.state(), id).await?;
        Ok(Response::new(v1::SalvageVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(&self, request: Request<v1::DeleteVolumeRequest>) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        let v1::DeleteVolumeRequest { name } = request.into_inner();
        let left = self.change(move |context| async move { volumes::delete(&context, &name).await }).await?;
        Ok(Response::new(v1::DeleteVolumeResponse { pending_stores: left.iter().map(ToString::to_string).collect() }))
    }

    async fn attach_volume(&self, request: Request<v1::AttachVolumeRequest>) -> Result<Response<v1::AttachVolumeResponse>, Status> {
        let request = request.into_inner();
        let options = attach::Options::new(&request)?;
        let device = self.change(move |context| async move { attach::attach(&context, &request.name, options).await }).await?;
        Ok(Response::new(v1::AttachVolumeResponse { device: device.display().to_string() }))
    }

    async fn detach_volume(&self, request: Request<v1::DetachVolumeRequest>) -> Result<Response<v1::DetachVolumeResponse>, Status> {
        let v1::DetachVolumeRequest { name, force } = request.into_inner();
        self.change(move |context| async move { attach::detach(&context, &name, force).await }).await?;
        Ok(Response::new(v1::DetachVolumeResponse {}))
    }
}

#[tonic::async_trait]
impl OperationService for Services {
    async fn list_operations(&self, request: Request<v1::ListOperationsRequest>) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let operations = operations::list(&self.context.state(), &request.into_inner());
        Ok(Response::new(v1::ListOperationsResponse { operations }))
    }

    async fn get_operation(&self, request: Request<v1::GetOperationRequest>) -> Result<Response<v1::GetOperationResponse>, Status> {
        let state = self.context.state();
        let operation = operations::resolve(&state, &request.into_inner().operation)?;
        Ok(Response::new(v1::GetOperationResponse { operation: Some(operations::message(&state, operation)) }))
    }

    async fn cancel_operation(
        &self,
        request: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::CancelOperationResponse>, Status> {
        let v1::CancelOperationRequest { operation } = request.into_inner();
        let cancelled = self.change(move |context| async move { operations::cancel(&context, &operation).await }).await?;
        Ok(Response::new(v1::CancelOperationResponse { operation: Some(cancelled) }))
    }

    type WatchOperationsStream = operations::Watch;

    async fn watch_operations(&self, request: Request<v1::WatchOperationsRequest>) -> Result<Response<operations::Watch>, Status> {
        let state = self.context.state();
        let only = request.into_inner().operation.map(|text| operations::resolve(&state, &text).map(|operation| operation.id));
        Ok(Response::new(operations::watch(&self.context, only.transpose()?)))
    }
}

#[tonic::async_trait]
impl EventService for Services {
    type ReadEventsStream = events::Reading;

    async fn read_events(&self, request: Request<v1::ReadEventsRequest>) -> Result<Response<events::Reading>, Status> {
        Ok(Response::new(events::read(&self.context, request.into_inner()).await?))
    }
}

#[tonic::async_trait]
impl NodeService for Services {
    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Result<Response<v1::GetStatusResponse>, Status> {
        let context = &self.context;
        let response = self
            .look(|view| v1::GetStatusResponse {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                uptime_seconds: context.started.elapsed().as_secs(),
                run_dir: context.run.root().display().to_string(),
                state_dir: context.state_dir.display().to_string(),
                processes: view.processes(),
                stores: view.stores(),
                volumes: view.volumes(),
                problems: view.problems(),
                rebuild_rate: context.rebuild_rate.map_or(0, |rate| rate.get()),
                upgrade: view.upgrade(),
            })
            .await;
        Ok(Response::new(response))
    }

    async fn get_node(&self, _: Request<v1::GetNodeRequest>) -> Result<Response<v1::GetNodeResponse>, Status> {
        Ok(Response::new(v1::GetNodeResponse { node: Some(self.look(|view| view.node()).await) }))
    }

    async fn set_node(&self, request: Request<v1::SetNodeRequest>) -> Result<Response<v1::SetNodeResponse>, Status> {
        let v1::SetNodeRequest { takes_targets: targets, takes_replicas: replicas } = request.into_inner();
        self.change(move |context| async move { placement::set_node(&context, NodeChanges { targets, replicas }).await }).await?;
        Ok(Response::new(v1::SetNodeResponse { node: Some(self.look(|view| view.node()).await) }))
    }

    async fn drain_node(&self, _: Request<v1::DrainNodeRequest>) -> Result<Response<v1::DrainNodeResponse>, Status> {
        let drained = self.change(|context| async move { placement::drain(&context).await }).await?;
        Ok(Response::new(v1::DrainNodeResponse {
            node: Some(self.look(|view| view.node()).await),
            detached_volumes: drained.detached,
            in_use: drained.left.into_iter().map(|(volume, reason)| v1::VolumeInUse { volume, reason }).collect(),
        }))
    }

    async fn upgrade_node(&self, request: Request<v1::UpgradeNodeRequest>) -> Result<Response<v1::UpgradeNodeResponse>, Status> {
        let v1::UpgradeNodeRequest { dry_run } = request.into_inner();
        let outlook = self.change(move |context| async move { upgrade::begin(&context, dry_run).await }).await?;
        let processes = self.look(|view| view.processes_of(&outlook.processes)).await;
        Ok(Response::new(v1::UpgradeNodeResponse { processes, pausing_volumes: outlook.pausing }))
    }

    async fn shutdown(&self, request: Request<v1::ShutdownRequest>) -> Result<Response<v1::ShutdownResponse>, Status> {
        let v1::ShutdownRequest { detach, force } = request.into_inner();
        let (context, end) = (Arc::clone(&self.context), Arc::clone(&self.end));
        // Not through the gate: this is what closes it.
        let task = tokio::spawn(async move {
            shutdown::everything(&context, detach || force, force).await?;
            end.notify_one();
            Ok::<_, Fault>(())
        });
        task.await.map_err(|error| Fault::new(Reason::Internal, "carrickd", error.to_string()))??;
        Ok(Response::new(v1::ShutdownResponse {}))
    }
}
