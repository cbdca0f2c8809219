//! The vhost-user socket itself: bound once at start, so that what is wrong with it is one clear error then.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode as FileMode, OFlags, flock};
use serde::Serialize;
use socket2::{Domain, SockAddr, Socket, Type};

use super::private_socket;

/// The longest path a unix socket can have, in bytes: `sun_path` without its final zero.
pub const MAX_SOCKET_PATH: usize = 107;

/// Permissions of the socket file. Whoever may connect is given the guest's memory to serve: user and group of the
/// pod, nobody else.
const SOCKET_MODE: u32 = 0o660;

/// How long another process may be busy with a socket in the same directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

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
    /// No unix socket can have such a path.
    #[error("vhost-user socket {}: the path is {len} bytes long, a unix socket's may have {MAX_SOCKET_PATH}", path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// The directory does not exist, or is none.
    #[error("vhost-user socket {}: {} is no directory, create it or mount it first", path.display(), directory.display())]
    NoDirectory {
        /// The path.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
    },
    /// There is something that is not a socket, which is never removed.
    #[error("vhost-user socket {}: there is {what} of that name, choose another path or remove it", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// Somebody serves the socket.
    #[error("vhost-user socket {}: another process is listening on it, stop that one or choose another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Another process has been setting up a socket in the same directory for too long.
    #[error("vhost-user socket {}: another process keeps {} locked", path.display(), directory.display())]
    Locked {
        /// The path.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
    },
    /// The way to the protocol handler cannot be made.
    #[error("vhost-user socket {}: {source}", path.display())]
    Private {
        /// The path.
        path: PathBuf,
        /// What was tried.
        source: private_socket::PrivateSocketError,
    },
    /// The system refuses.
    #[error("vhost-user socket {}: no permission to {what}: {source}", path.display())]
    PermissionDenied {
        /// The path.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// Another error of the system.
    #[error("vhost-user socket {}: cannot {what}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What was attempted.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// A vhost-user socket that is ours to serve.
#[derive(Debug)]
pub struct Endpoint {
    pub(super) config: SessionConfig,
    pub(super) listener: Option<Bound>,
}

impl Endpoint {
    /// Takes possession of the socket: listens on it, or, in client mode, checks what can be checked of it.
    ///
    /// A socket file that nobody serves is replaced; one that is served, and whatever is no socket, is not. May block
    /// for two seconds while other processes set up sockets in the same directory.
    pub fn bind(config: &SessionConfig) -> Result<Endpoint, BindError> {
        let path = &config.socket;
        let len = path.as_os_str().as_bytes().len();
        if len > MAX_SOCKET_PATH {
            return Err(BindError::TooLong {
                path: path.clone(),
                len,
            });
        }
        // Each session needs such a pair; better to know now.
        private_socket::pair(directory_of(path)).map_err(|source| BindError::Private {
            path: path.clone(),
            source,
        })?;
        let listener = match config.mode {
            Mode::Server => Some(Bound::bind(path)?),
            Mode::Client => None,
        };
        Ok(Endpoint {
            config: config.clone(),
            listener,
        })
    }
}

/// A listener, and its file, which is removed at the end if it is still this listener's.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file.
    identity: (u64, u64),
}

impl Bound {
    fn bind(path: &Path) -> Result<Bound, BindError> {
        let directory = directory_of(path);
        // Between two sidecars that find the same stale socket, one must not remove what the other has just bound. The
        // lock is on the directory, so that nothing is left behind.
        let _lock = lock_directory(path, directory)?;
        private_socket::remove_leftovers(directory);
        clear_the_way(path)?;
        let io_error = |what| move |source| Bound::error(path, what, source);
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(io_error("make a socket"))?;
        socket
            .bind(&SockAddr::unix(path).map_err(io_error("use its path"))?)
            .map_err(io_error("create it"))?;
        // Nobody can connect before `listen`, so nobody sees the permissions that the umask left.
        let prepared = (|| {
            fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE))?;
            let metadata = fs::symlink_metadata(path)?;
            socket.listen(8)?;
            socket.set_nonblocking(true)?;
            Ok((metadata.dev(), metadata.ino()))
        })();
        match prepared {
            Ok(identity) => Ok(Bound {
                listener: socket.into(),
                path: path.into(),
                identity,
            }),
            Err(source) => {
                let _ = fs::remove_file(path);
                Err(Bound::error(path, "listen on it", source))
            }
        }
    }

    fn error(path: &Path, what: &'static str, source: io::Error) -> BindError {
        let path = path.to_owned();
        match source.kind() {
            // Bound in between by somebody who does not take the lock.
            io::ErrorKind::AddrInUse => BindError::InUse { path },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                BindError::PermissionDenied { path, what, source }
            }
            _ => BindError::Io { path, what, source },
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _lock = lock_directory(&self.path, directory_of(&self.path));
        if let Ok(metadata) = fs::symlink_metadata(&self.path)
            && (metadata.dev(), metadata.ino()) == self.identity
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

pub(super) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Locks the directory until the returned file is dropped.
fn lock_directory(path: &Path, directory: &Path) -> Result<File, BindError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let file: File = match rustix::fs::open(directory, flags, FileMode::empty()) {
        Ok(fd) => fd.into(),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
            return Err(BindError::NoDirectory {
                path: path.into(),
                directory: directory.into(),
            });
        }
        Err(error) => return Err(Bound::error(path, "open its directory", error.into())),
    };
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                return Err(BindError::Locked {
                    path: path.into(),
                    directory: directory.into(),
                });
            }
            // A file system without locks: go on without, as there is no other way to tell the two apart.
            Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::NOLCK | rustix::io::Errno::NOSYS) => {
                return Ok(file);
            }
            Err(error) => return Err(Bound::error(path, "lock its directory", error.into())),
        }
    }
}

/// Removes a socket file that nobody serves. Anything else in the way is an error.
fn clear_the_way(path: &Path) -> Result<(), BindError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Bound::error(path, "look at it", error)),
    };
    let kind = metadata.file_type();
    if !kind.is_socket() {
        let what = match () {
            () if kind.is_dir() => "a directory",
            () if kind.is_file() => "a regular file",
            () if kind.is_symlink() => "a symbolic link",
            () => "something that is no socket",
        };
        return Err(BindError::NotASocket {
            path: path.into(),
            what,
        });
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)
        .and_then(|socket| {
            // A listener whose queue is full would make us wait for it.
            socket.set_nonblocking(true)?;
            socket.connect(&SockAddr::unix(path)?)
        })
        .map_err(|error| (error.kind(), error));
    match probe {
        Err((io::ErrorKind::ConnectionRefused, _)) => {
            fs::remove_file(path).map_err(|error| Bound::error(path, "replace the unused socket", error))
        }
        Err((io::ErrorKind::NotFound, _)) => Ok(()),
        Err((io::ErrorKind::PermissionDenied, error)) => Err(Bound::error(
            path,
            "find out whether the socket that is there is in use",
            error,
        )),
        // Connected; or the queue is full (EAGAIN); or it is a socket of another type, bound by somebody (EPROTOTYPE).
        _ => Err(BindError::InUse { path: path.into() }),
    }
}
