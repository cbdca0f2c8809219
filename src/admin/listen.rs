//! Binding the addresses of the configuration, before any thread runs.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;

use socket2::{Domain, Protocol, Socket, Type};

use crate::config::ListenAddress;
use crate::sys::unix_socket::{BindError, SocketGuard, bind_unix};

use super::server::{self, AdminHandle};
use super::{Admin, Limits};

/// Who may connect to the unix socket: its owner and group. `/state` names peers and rules, which is not for
/// everybody who shares the volume.
const SOCKET_MODE: u32 = 0o660;
const BACKLOG: i32 = 256;

/// Why the admin server could not be started. Every message names the address and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The port is taken.
    #[error(
        "admin: tcp://{address} is taken by another process: \
         stop that process or choose another port in admin.listen"
    )]
    InUse {
        /// The address.
        address: SocketAddr,
    },
    /// The address is none of ours.
    #[error(
        "admin: no interface has the address {address}: \
         use an address of this machine, or 0.0.0.0 or [::] for all of them"
    )]
    NoSuchAddress {
        /// The address.
        address: SocketAddr,
    },
    /// The port needs a privilege.
    #[error("admin: not allowed to listen on tcp://{address}: choose a port above 1023 in admin.listen")]
    Denied {
        /// The address.
        address: SocketAddr,
    },
    /// Another failure on TCP.
    #[error("admin: cannot listen on tcp://{address}: {source}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: io::Error,
    },
    /// The unix socket could not be bound.
    #[error("admin: {0}")]
    Unix(#[from] BindError),
    /// The thread or its runtime could not be made.
    #[error("admin: cannot start the server's thread: {0}")]
    Thread(io::Error),
}

/// A bound listener.
pub(super) enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener, SocketGuard),
}

/// An admin server whose addresses are bound, and that serves nobody yet.
pub struct AdminServer {
    listeners: Vec<Bound>,
    limits: Limits,
}

impl AdminServer {
    /// Binds every address, or none. An empty list is a server that nobody can reach.
    pub fn bind(addresses: &[ListenAddress]) -> Result<AdminServer, AdminError> {
        let mut listeners = Vec::with_capacity(addresses.len());
        for address in addresses {
            listeners.push(match address {
                ListenAddress::Tcp(tcp) => Bound::Tcp(bind_tcp(*tcp, addresses)?),
                ListenAddress::Unix(path) => {
                    let (listener, guard) = bind_unix(path, SOCKET_MODE)?;
                    Bound::Unix(listener, guard)
                }
                // The configuration refuses it here.
                ListenAddress::Vsock(_) => continue,
            });
        }
        Ok(AdminServer {
            listeners,
            limits: Limits::default(),
        })
    }

    /// The same server with other bounds.
    pub fn with_limits(self, limits: Limits) -> AdminServer {
        AdminServer { limits, ..self }
    }

    /// Where it listens, with the ports the kernel chose for port 0.
    pub fn addresses(&self) -> Vec<ListenAddress> {
        let address = |bound: &Bound| match bound {
            Bound::Tcp(listener) => listener.local_addr().ok().map(ListenAddress::Tcp),
            Bound::Unix(_, guard) => Some(ListenAddress::Unix(guard.path().to_owned())),
        };
        self.listeners.iter().filter_map(address).collect()
    }

    /// Serves on a thread of its own, until the handle is dropped or shut down.
    pub fn spawn(self, admin: Admin) -> Result<AdminHandle, AdminError> {
        server::spawn(self.listeners, admin, self.limits)
    }
}

fn bind_tcp(address: SocketAddr, all: &[ListenAddress]) -> Result<TcpListener, AdminError> {
    listen_tcp(address, all).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => AdminError::InUse { address },
        io::ErrorKind::AddrNotAvailable => AdminError::NoSuchAddress { address },
        io::ErrorKind::PermissionDenied => AdminError::Denied { address },
        _ => AdminError::Tcp { address, source },
    })
}

fn listen_tcp(address: SocketAddr, all: &[ListenAddress]) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for connections in TIME_WAIT.
    socket.set_reuse_address(true)?;
    // `[::]` takes IPv4 as well, unless the configuration has a listener of its own for that port on IPv4.
    let has_ipv4 = |other: &ListenAddress| match other {
        ListenAddress::Tcp(other) => other.is_ipv4() && other.port() == address.port(),
        ListenAddress::Unix(_) | ListenAddress::Vsock(_) => false,
    };
    if address.is_ipv6() && address.ip().is_unspecified() && all.iter().any(has_ipv4) {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
