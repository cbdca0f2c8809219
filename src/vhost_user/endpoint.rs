//! The vhost-user socket itself: bound once at start, so that what is wrong with it is one clear error then.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::sys::unix_socket::{self, SocketGuard, bind_unix};

use super::private_socket::{self, PrivateSocketError};

/// Permissions of the socket file. Whoever may connect gives us a guest's memory to serve, and learns which services
/// it reaches: user and group of the pod, nobody else.
const SOCKET_MODE: u32 = 0o660;

/// Who listens on the vhost-user socket.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// We listen, the VMM connects.
    Server,
    /// The VMM listens, we connect, with retry.
    Client,
}

/// What a guest's session needs to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SessionConfig {
    /// Name of the guest.
    pub guest: String,
    /// Its context identifier.
    pub cid: u32,
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Who listens on it.
    pub mode: Mode,
}

/// Why a vhost-user socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The socket itself.
    #[error("vhost-user: {0}")]
    Socket(#[from] unix_socket::BindError),
    /// The way to the protocol handler.
    #[error("vhost-user: unix socket {path}: {source}")]
    Private {
        /// The vhost-user socket.
        path: PathBuf,
        /// What was tried.
        source: PrivateSocketError,
    },
}

/// A vhost-user socket that is ours to serve.
#[derive(Debug)]
pub struct Endpoint {
    pub(super) config: SessionConfig,
    /// The listener, and its file, which goes when this is dropped; none in client mode.
    pub(super) listener: Option<(UnixListener, SocketGuard)>,
}

impl Endpoint {
    /// Takes possession of the socket: listens on it, or, in client mode, checks what can be checked of it.
    ///
    /// A socket file that nobody serves is replaced; one that is served, and whatever is no socket, is not. May block
    /// for a second while other processes set up sockets in the same directory.
    pub fn bind(config: &SessionConfig) -> Result<Endpoint, BindError> {
        let path = &config.socket;
        let listener = match config.mode {
            Mode::Server => {
                let bound = bind_unix(path, SOCKET_MODE)?;
                private_socket::remove_leftovers(directory_of(path));
                Some(bound)
            }
            Mode::Client => {
                let length = path.as_os_str().len();
                if length > unix_socket::MAX_PATH {
                    return Err(unix_socket::BindError::TooLong { path: path.clone(), length }.into());
                }
                None
            }
        };
        // Each session needs such a pair; better to know now.
        private_socket::pair(directory_of(path))
            .map_err(|source| BindError::Private { path: path.clone(), source })?;
        Ok(Endpoint { config: config.clone(), listener })
    }

    /// The next connection that waits to be accepted; `WouldBlock` when there is none, or in client mode.
    pub(super) fn accept(&self) -> io::Result<std::os::unix::net::UnixStream> {
        match &self.listener {
            Some((listener, _)) => listener.accept().map(|(stream, _)| stream),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

/// The directory that a socket's file is in.
pub(super) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
