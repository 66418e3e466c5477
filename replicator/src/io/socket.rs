//! Sockets for the ring: made, bound and tuned here.
//!
//! None of them is non-blocking: the ring waits for a blocking socket by itself, and gives `EAGAIN` for the others.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::Mode;
use rustix::net::addr::SocketAddrArg;
use rustix::net::{AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::endpoint::Endpoint;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// A peer whose host is gone is noticed after 10 s + 3 × 5 s without anything sent: the kernel asks, the process sleeps.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_COUNT: u32 = 3;
/// The kernel takes the ring of a killed process apart after the process is gone, and the port is taken until then.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(5);
const PREDECESSOR_STEP: Duration = Duration::from_millis(20);
/// Sent data that a peer's host doesn't take for so long ends the connection, too.
const USER_TIMEOUT: Duration = Duration::from_secs(30);

/// A socket to connect, and where to.
///
/// # Errors
/// What the kernel says; `InvalidInput` for a path too long for a Unix socket.
pub(super) fn for_connecting(endpoint: &Endpoint) -> io::Result<(OwnedFd, SocketAddrAny)> {
    match endpoint {
        Endpoint::Unix(path) => Ok((stream(AddressFamily::UNIX)?, unix_address(path)?.as_any())),
        Endpoint::Tcp(address) => {
            let socket = stream(family(*address))?;
            tune(&socket)?;
            Ok((socket, address.as_any()))
        }
    }
}

/// A listening Unix socket that only this user (and root) may connect to, from the first moment on. A socket that a dead
/// process left at `path` is replaced: **the caller holds a lock that proves that no living process serves there.**
///
/// # Errors
/// What the kernel says; `AlreadyExists` if something else than a socket is at `path`.
pub fn listen_unix(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket is there")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let socket = stream(AddressFamily::UNIX)?;
    // Linux gives the bound file the mode of the socket, so there is no moment in which others could connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &unix_address(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A listening TCP socket, and its address with the real port. Waits a little for an address that is in use: the caller holds
/// a lock, so it is most likely that of its own predecessor.
///
/// # Errors
/// What the kernel says.
pub(super) fn listen_tcp(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let until = Instant::now() + PREDECESSOR_LIMIT;
    loop {
        match try_listen_tcp(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => thread::sleep(PREDECESSOR_STEP),
            listening => return listening,
        }
    }
}

fn try_listen_tcp(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let socket = stream(family(address))?;
    // Connections of a predecessor that are still being closed must not keep this process from starting.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    let bound = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?;
    Ok((socket, bound))
}

/// Sets an accepted TCP connection's options.
///
/// # Errors
/// What the kernel says.
pub(super) fn tune(socket: impl AsFd) -> io::Result<()> {
    let socket = socket.as_fd();
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_COUNT)?;
    sockopt::set_tcp_user_timeout(socket, u32::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX))?;
    Ok(())
}

fn stream(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

const fn family(address: SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

fn unix_address(path: &Path) -> io::Result<SocketAddrUnix> {
    SocketAddrUnix::new(path)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the path is too long for a Unix socket (107 bytes at most)"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_unix_socket_is_private_and_replaces_only_a_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(listen_unix(&path).unwrap());
        let second = listen_unix(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(second);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(listen_unix(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(listen_unix(&folder.path().join("x".repeat(120))).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
