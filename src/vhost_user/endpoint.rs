//! The vhost-user socket itself: bound once at start, so that what is wrong with it is one clear error then.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::sys::unix_socket::{self, SocketGuard, bind_unix};

use super::AccessPlatform;
use super::private_socket::{self, PrivateSocket, PrivateSocketError};

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
    /// What VIRTIO_F_ACCESS_PLATFORM means.
    pub access_platform: AccessPlatform,
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
    /// The way to the protocol handler, for every session.
    private: PrivateSocket,
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
                    return Err(unix_socket::BindError::TooLong {
                        path: path.clone(),
                        length,
                    }
                    .into());
                }
                None
            }
        };
        let private = PrivateSocket::make(directory_of(path)).map_err(|source| BindError::Private {
            path: path.clone(),
            source,
        })?;
        Ok(Endpoint {
            config: config.clone(),
            listener,
            private,
        })
    }

    /// A listener for the protocol handler, and the connection that it will accept first.
    ///
    /// # Errors
    /// What was tried, in words.
    pub(super) fn private_pair(&self) -> Result<(UnixListener, UnixStream), String> {
        self.private.pair().or_else(|error| {
            private_socket::pair_by_name(directory_of(&self.config.socket))
                .map_err(|by_name| format!("{error}; {by_name}"))
        })
    }

    /// The next connection that waits to be accepted; `WouldBlock` when there is none, or in client mode.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::vhost_user::testing::config;

    #[test]
    fn what_cannot_be_bound_is_told_in_one_line_with_the_path_and_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "precious").unwrap();
        fs::create_dir(at("directory")).unwrap();
        let live = UnixListener::bind(at("live")).unwrap();
        let rows = [
            (
                at("missing").join("s"),
                "does not exist: create it or mount a volume there",
            ),
            (at("directory"), "it is a directory"),
            (at("file"), "it is a regular file"),
            (at(&"x".repeat(108)), "the kernel takes at most 107"),
            (
                at("live"),
                "is served by another process: stop that process or choose another path",
            ),
        ];
        for (path, expected) in rows {
            let error = Endpoint::bind(&config(Mode::Server, &path))
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with("vhost-user: ") && error.contains(expected),
                "{error}"
            );
            assert!(
                error.contains(&path.display().to_string()) && !error.contains('\n'),
                "{error}"
            );
        }
        assert_eq!(fs::read_to_string(at("file")).unwrap(), "precious");
        UnixStream::connect(at("live")).expect("still served");
        drop(live);
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            3,
            "something was left behind"
        );
    }

    #[test]
    fn a_stale_socket_is_replaced_and_goes_with_the_endpoint() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let endpoint = Endpoint::bind(&config(Mode::Server, &path)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(UnixStream::connect(&path).is_ok());
        drop(endpoint);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    /// Each finds the stale file; whoever comes second must find a live one.
    #[test]
    fn of_sidecars_that_start_on_one_stale_socket_one_gets_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        for _ in 0..20 {
            drop(UnixListener::bind(&path).unwrap());
            let config = config(Mode::Server, &path);
            let results: Vec<_> = std::thread::scope(|scope| {
                let starts: Vec<_> = (0..4).map(|_| scope.spawn(|| Endpoint::bind(&config))).collect();
                starts.into_iter().map(|start| start.join().unwrap()).collect()
            });
            let mut winners = results.iter().filter_map(|result| result.as_ref().ok());
            let winner = winners.next().expect("nobody got it");
            assert!(winners.next().is_none(), "two got it");
            for error in results.iter().filter_map(|result| result.as_ref().err()) {
                assert!(
                    matches!(error, BindError::Socket(unix_socket::BindError::InUse { .. })),
                    "{error}"
                );
            }
            let _client = UnixStream::connect(&path).unwrap();
            // The losers' looks, which closed at once, may be in front of it.
            winner.accept().expect("the file is the winner's");
            drop(results);
            assert!(!path.exists());
        }
    }

    #[test]
    fn in_client_mode_only_the_path_is_judged() {
        let directory = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::bind(&config(Mode::Client, directory.path().join("later"))).unwrap();
        assert_eq!(endpoint.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let long = directory.path().join("x".repeat(108));
        let error = Endpoint::bind(&config(Mode::Client, long))
            .unwrap_err()
            .to_string();
        assert!(error.contains("the kernel takes at most 107"), "{error}");
    }
}
