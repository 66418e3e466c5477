//! The connection to `carrickd`.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use carrick_ctl::v1::event_service_client::EventServiceClient;
use carrick_ctl::v1::node_service_client::NodeServiceClient;
use carrick_ctl::v1::operation_service_client::OperationServiceClient;
use carrick_ctl::v1::store_service_client::StoreServiceClient;
use carrick_ctl::v1::volume_service_client::VolumeServiceClient;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::report::Problem;

/// For a question: the daemon asks its processes for at most 3 s.
const QUESTION_LIMIT: Duration = Duration::from_secs(15);
/// For a change: above the sum of the daemon's own limits, which tell more than this one.
const CHANGE_LIMIT: Duration = Duration::from_secs(300);

/// See the module.
pub struct Client {
    socket: PathBuf,
    channel: Channel,
}

impl Client {
    /// Connects.
    pub async fn connect(socket: &Path) -> Result<Self, Problem> {
        // First by hand, because the reason is lost inside the channel.
        if let Err(error) = UnixStream::connect(socket) {
            let why = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    "it isn't running; start it with systemctl start carrickd, or as root with carrickd".to_owned()
                }
                io::ErrorKind::PermissionDenied => "permission denied; use sudo, or join the group carrick".to_owned(),
                _ => error.to_string(),
            };
            return Err(Problem::unreachable(socket, why));
        }
        let absolute = std::path::absolute(socket).map_err(Problem::local)?;
        let endpoint = Endpoint::from_shared(format!("unix:{}", absolute.display())).map_err(Problem::local)?;
        let channel = endpoint.connect().await.map_err(|error| Problem::unreachable(socket, error))?;
        Ok(Self { socket: socket.into(), channel })
    }

    /// Where the daemon is.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Calls about stores.
    pub fn stores(&self) -> StoreServiceClient<Channel> {
        StoreServiceClient::new(self.channel.clone())
    }

    /// Calls about volumes.
    pub fn volumes(&self) -> VolumeServiceClient<Channel> {
        VolumeServiceClient::new(self.channel.clone())
    }

    /// Calls about operations.
    pub fn operations(&self) -> OperationServiceClient<Channel> {
        OperationServiceClient::new(self.channel.clone())
    }

    /// Calls about what happened.
    pub fn events(&self) -> EventServiceClient<Channel> {
        EventServiceClient::new(self.channel.clone())
    }

    /// Calls about the node.
    pub fn node(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel.clone())
    }
}

/// A request that only asks.
pub fn question<T>(message: T) -> Request<T> {
    limited(message, QUESTION_LIMIT)
}

/// A request that changes something.
pub fn change<T>(message: T) -> Request<T> {
    limited(message, CHANGE_LIMIT)
}

fn limited<T>(message: T, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}
