//! Requests as callers make them: through `carrick.v1` in this process, or by the `carrick` command, with the same answer. On
//! user-mode Linux a process takes as long to start as a hundred calls.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use carrick_ctl::fault::{self, Reason};
use carrick_ctl::v1;
use carrick_ctl::v1::node_service_client::NodeServiceClient;
use carrick_ctl::v1::operation_service_client::OperationServiceClient;
use carrick_ctl::v1::volume_service_client::VolumeServiceClient;
use serde::Serialize;
use serde_json::Value;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::site::Refusal;

/// What is asked.
#[derive(Clone, Debug)]
pub enum Request {
    Status,
    Operations,
    Show,
    Explain,
    Create { bytes: u64, replicas: u32, block_size: u32 },
    Attach { queue_depth: u32, mapped: bool },
    Detach { force: bool },
    Delete,
    Expand { bytes: u64, wait: bool },
    Cancel { operation: String },
    Iops(u64),
    RebuildRate(u64),
    Verify { wait: bool },
    Replace { store: String },
}

impl Request {
    /// Whether only the command does it: it asks more than once.
    pub fn is_long(&self) -> bool {
        matches!(self, Self::Expand { wait: true, .. } | Self::Verify { wait: true })
    }

    /// As the command's arguments.
    pub fn arguments(&self, name: &str) -> Vec<String> {
        let line = match self {
            Self::Status => "status".into(),
            Self::Operations => "operation list".into(),
            Self::Show => format!("volume show {name}"),
            Self::Explain => format!("explain {name}"),
            Self::Create { bytes, replicas, block_size } => {
                format!("volume create {name} --size {bytes} --replicas {replicas} --block-size {block_size}")
            }
            Self::Attach { queue_depth, mapped } => {
                format!("attach {name} --queue-depth {queue_depth} --map {}", if *mapped { "always" } else { "auto" })
            }
            Self::Detach { force } => format!("detach {name}{}", if *force { " --force" } else { "" }),
            Self::Delete => format!("volume delete {name}"),
            Self::Expand { bytes, wait } => format!("volume expand {name} {bytes}{}", if *wait { " --wait" } else { "" }),
            Self::Cancel { operation } => format!("operation cancel {operation}"),
            Self::Iops(0) => format!("volume set {name} iops=none"),
            Self::Iops(iops) => format!("volume set {name} iops={iops}"),
            Self::RebuildRate(0) => format!("volume set {name} rebuild-rate=none"),
            Self::RebuildRate(rate) => format!("volume set {name} rebuild-rate={rate}"),
            Self::Verify { wait } => format!("volume verify {name}{}", if *wait { " --wait" } else { "" }),
            Self::Replace { store } => format!("volume replace {name} {store}"),
        };
        line.split(' ').map(str::to_owned).collect()
    }

    /// Asks `carrickd` itself; nobody answered in time: `None`.
    pub fn ask(&self, socket: &Path, name: &str, limit: Duration) -> anyhow::Result<Option<Result<Value, Refusal>>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()))?;
        let answer = runtime.block_on(async {
            let asking = async {
                match endpoint.connect().await {
                    Ok(channel) => self.call(channel, name.to_owned()).await.map_err(|status| refusal(&status)),
                    Err(error) => Err(away(&error)),
                }
            };
            tokio::time::timeout(limit, asking).await
        });
        Ok(answer.ok())
    }

    async fn call(&self, channel: Channel, name: String) -> Result<Value, Status> {
        let mut volumes = VolumeServiceClient::new(channel.clone());
        match self {
            Self::Status => json(NodeServiceClient::new(channel).get_status(v1::GetStatusRequest {}).await?.into_inner()),
            Self::Operations => {
                let request = v1::ListOperationsRequest { only_running: true, volume: None };
                json(OperationServiceClient::new(channel).list_operations(request).await?.into_inner().operations)
            }
            Self::Cancel { operation } => {
                let request = v1::CancelOperationRequest { operation: operation.clone() };
                json(OperationServiceClient::new(channel).cancel_operation(request).await?.into_inner().operation)
            }
            Self::Show => json(volumes.get_volume(v1::GetVolumeRequest { name }).await?.into_inner().volume),
            Self::Explain => json(volumes.explain_volume(v1::ExplainVolumeRequest { name }).await?.into_inner()),
            &Self::Create { bytes: size_bytes, replicas, block_size } => {
                let (replicas, block_size) = (Some(replicas), Some(block_size));
                let request = v1::CreateVolumeRequest { name, size_bytes, replicas, block_size, stores: Vec::new() };
                json(volumes.create_volume(request).await?.into_inner().volume)
            }
            &Self::Attach { queue_depth, mapped } => {
                let map = if mapped { v1::Map::Always } else { v1::Map::Auto };
                let request = v1::AttachVolumeRequest { name, host: false, queue_depth: Some(queue_depth), map: map.into() };
                json(volumes.attach_volume(request).await?.into_inner())
            }
            &Self::Detach { force } => json(volumes.detach_volume(v1::DetachVolumeRequest { name, force }).await?.into_inner()),
            Self::Delete => json(volumes.delete_volume(v1::DeleteVolumeRequest { name }).await?.into_inner()),
            &Self::Expand { bytes: size_bytes, .. } => {
                let request = v1::ExpandVolumeRequest { name, size_bytes, ..v1::ExpandVolumeRequest::default() };
                json(volumes.expand_volume(request).await?.into_inner())
            }
            &Self::Iops(iops) => {
                let request = v1::SetVolumeRequest { name, iops: Some(iops), ..v1::SetVolumeRequest::default() };
                json(volumes.set_volume(request).await?.into_inner().volume)
            }
            &Self::RebuildRate(rate) => {
                let request = v1::SetVolumeRequest { name, rebuild_rate: Some(rate), ..v1::SetVolumeRequest::default() };
                json(volumes.set_volume(request).await?.into_inner().volume)
            }
            Self::Verify { .. } => json(volumes.verify_volume(v1::VerifyVolumeRequest { name }).await?.into_inner().volume),
            Self::Replace { store } => {
                let request = v1::ReplaceReplicaRequest { name, store: store.clone(), with: None };
                json(volumes.replace_replica(request).await?.into_inner().volume)
            }
        }
    }
}

fn json(message: impl Serialize) -> Result<Value, Status> {
    serde_json::to_value(message).context("an answer as JSON").map_err(|error| Status::internal(format!("{error:#}")))
}

fn away(error: &dyn std::error::Error) -> Refusal {
    let reason = Reason::DaemonUnreachable;
    Refusal { code: reason.exit_code() as i32, reason: reason.as_str().into(), message: format!("{error:?}") }
}

fn refusal(status: &Status) -> Refusal {
    match fault::detail(status) {
        Some(detail) => Refusal { code: fault::exit_code(status) as i32, reason: detail.reason, message: detail.message },
        // A cause on this side: the connection broke.
        None if let Some(error) = std::error::Error::source(status) => away(&error),
        None => Refusal { code: fault::exit_code(status) as i32, reason: format!("{:?}", status.code()), message: status.message().into() },
    }
}
