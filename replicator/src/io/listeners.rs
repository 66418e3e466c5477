//! Where a replica process listens.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::net::Shutdown;

use super::server::ServerError;
use super::socket;
use crate::endpoint::Endpoint;

/// The sockets that primaries connect to. The Unix socket's file goes away with this.
#[derive(Debug)]
pub struct ReplicaListeners {
    path: PathBuf,
    sockets: Vec<OwnedFd>,
    tcp: Option<SocketAddr>,
}

impl ReplicaListeners {
    /// Listens on a Unix socket and, if wanted, a TCP address. **The caller holds the store's lock**, which proves that a
    /// socket found at `path` belongs to a dead process. A TCP address that other hosts can reach is refused unless `insecure`
    /// is set.
    ///
    /// # Errors
    /// [`ServerError::Listen`], [`ServerError::Insecure`].
    pub fn bind(path: &Path, tcp: Option<SocketAddr>, insecure: bool) -> Result<Self, ServerError> {
        if let Some(address) = tcp.filter(|address| !insecure && !address.ip().is_loopback()) {
            return Err(ServerError::Insecure(address));
        }
        let failed = |endpoint| move |source| ServerError::Listen { endpoint, source };
        let unix = socket::listen_unix(path).map_err(failed(Endpoint::Unix(path.into())))?;
        let mut listeners = Self { path: path.into(), sockets: vec![unix], tcp: None };
        if let Some(address) = tcp {
            let (socket, bound) = socket::listen_tcp(address).map_err(failed(Endpoint::Tcp(address)))?;
            listeners.sockets.push(socket);
            listeners.tcp = Some(bound);
        }
        Ok(listeners)
    }

    pub(super) const fn count(&self) -> usize {
        self.sockets.len()
    }

    pub(super) fn get(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.sockets.get(index).map(AsFd::as_fd)
    }

    /// Lets go of the addresses now: an accept in flight would keep them until the kernel has taken the ring apart, which is
    /// after the end of the process.
    pub(super) fn shut_down(&self) {
        for socket in &self.sockets {
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
    }

    /// Where they listen: the Unix socket, then the TCP address with its real port.
    #[must_use]
    pub fn endpoints(&self) -> Vec<Endpoint> {
        [Some(Endpoint::Unix(self.path.clone())), self.tcp.map(Endpoint::Tcp)].into_iter().flatten().collect()
    }
}

impl Drop for ReplicaListeners {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
