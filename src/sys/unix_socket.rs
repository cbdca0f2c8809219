//! Unix sockets that are bound once: a stale one is replaced, a live one is never stolen, and what is no socket
//! is never deleted.
//!
//! A process that was killed leaves its socket file behind, and bind() then fails for ever. Removing the file
//! blindly takes the socket away from a process that lives: its clients connect to us from then on, and it
//! never learns why. So a connection decides: only a socket that refuses (ECONNREFUSED, nobody has it open) is
//! removed.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Length of `sun_path` minus the byte that ends it (unix(7)).
pub const MAX_PATH: usize = 107;

/// Connections that wait to be accepted; the kernel takes less if net.core.somaxconn says so.
const BACKLOG: i32 = 1024;

/// How long another process may hold the directory's lock before we go on without it. It is held for a few
/// system calls; who holds it longer is no sidecar, and must not keep us from starting.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Why a unix socket could not be bound. Every message names the path and what to do.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Longer than `sun_path`.
    #[error(
        "path of unix socket {path} is {length} bytes long, the kernel takes at most {MAX_PATH}: choose a shorter one"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// The directory does not exist.
    #[error("directory {directory} of unix socket {path} does not exist: create it or mount a volume there")]
    NoDirectory {
        /// The path.
        path: PathBuf,
        /// Its parent.
        directory: PathBuf,
    },
    /// A live process serves the socket.
    #[error("unix socket {path} is served by another process: stop that process or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is no socket has the path.
    #[error(
        "{path} exists and is not a socket (it is a {kind}), it is left alone: remove it or choose another path"
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The directory or the socket belongs to somebody else, or the file system is read-only.
    #[error(
        "cannot {action} unix socket {path}: {source}; the directory must be writable by the user the sidecar runs as"
    )]
    Denied {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {action} unix socket {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

/// Removes the socket file when dropped, if it is still the one that was bound.
#[derive(Debug)]
pub struct SocketGuard {
    path: PathBuf,
    /// `O_PATH` descriptor of the socket file. While it is open the inode's number cannot be given to another
    /// file, so that comparing device and inode is exact and a successor's socket is never taken for ours.
    pin: OwnedFd,
}

impl SocketGuard {
    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn is_ours(&self) -> bool {
        match (rustix::fs::fstat(&self.pin), lstat(&self.path)) {
            (Ok(ours), Ok(there)) => (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino),
            _ => false,
        }
    }
}

impl Drop for SocketGuard {
    fn drop(&mut self) {
        let _lock = DirectoryLock::take(&self.path);
        if self.is_ours() {
            // Nothing to do about a failure: the next start finds a stale socket and replaces it.
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// Listens on `path` with the permissions `mode` (for example 0o660; connecting needs the write bit). The
/// listener is non-blocking and close-on-exec. Keep the guard as long as the listener.
pub fn bind_unix(path: &Path, mode: u32) -> Result<(UnixListener, SocketGuard), BindError> {
    let (socket, guard) = bind(path, mode, SocketType::STREAM)?;
    Ok((UnixListener::from(socket), guard))
}

/// As [`bind_unix`], for connections of whole messages (SOCK_SEQPACKET), which std has no type for.
pub fn bind_unix_packets(path: &Path, mode: u32) -> Result<(OwnedFd, SocketGuard), BindError> {
    bind(path, mode, SocketType::SEQPACKET)
}

fn bind(path: &Path, mode: u32, socket_type: SocketType) -> Result<(OwnedFd, SocketGuard), BindError> {
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(BindError::TooLong {
            path: path.to_owned(),
            length,
        });
    }
    let failed = |action: &'static str| move |errno: Errno| failure(action, path, errno);
    let address = SocketAddrUnix::new(path).map_err(failed("name"))?;
    // Two sidecars that start at once must not both find the same stale socket and the slower one remove the
    // other's new one.
    let _lock = DirectoryLock::take(path);
    make_room(path, &address)?;

    let socket = new_socket(socket_type).map_err(failed("create"))?;
    // Linux makes the file with the socket's own mode less the umask (net/unix/af_unix.c: unix_bind_bsd), so
    // that there is no moment at which more may connect than asked for. What the umask took away is given back
    // below.
    let mode = Mode::from_raw_mode(mode);
    rustix::fs::fchmod(&socket, mode).map_err(failed("set the mode of"))?;
    rustix::net::bind(&socket, &address).map_err(failed("bind"))?;
    let pin = rustix::fs::open(
        path,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed("open"))?;
    let guard = SocketGuard {
        path: path.to_owned(),
        pin,
    };
    rustix::fs::chmod(path, mode).map_err(failed("set the mode of"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed("listen on"))?;
    Ok((socket, guard))
}

/// Removes a stale socket at `path`; anything else that is there is an error.
fn make_room(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let there = match lstat(path) {
        Ok(there) => there,
        Err(Errno::NOENT) => return directory_exists(path),
        Err(errno) => return Err(failure("examine", path, errno)),
    };
    match FileType::from_raw_mode(there.st_mode) {
        FileType::Socket => {}
        other => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
                kind: kind_of(other),
            });
        }
    }
    let probe = new_socket(SocketType::STREAM).map_err(|errno| failure("create", path, errno))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        // Gone since we looked.
        Err(Errno::NOENT) => return Ok(()),
        Err(errno @ (Errno::ACCESS | Errno::PERM)) => {
            return Err(failure("connect to the existing", path, errno));
        }
        // It answers; or its queue is full (EAGAIN), or it is of another type (EPROTOTYPE): somebody has it open.
        Ok(()) | Err(_) => {
            return Err(BindError::InUse {
                path: path.to_owned(),
            });
        }
    }
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failure("replace the stale", path, errno)),
    }
}

fn directory_exists(path: &Path) -> Result<(), BindError> {
    let directory = parent(path);
    match rustix::fs::stat(directory) {
        Err(Errno::NOENT) => Err(BindError::NoDirectory {
            path: path.to_owned(),
            directory: directory.to_owned(),
        }),
        _ => Ok(()),
    }
}

fn failure(action: &'static str, path: &Path, errno: Errno) -> BindError {
    let (path, source) = (path.to_owned(), io::Error::from(errno));
    match errno {
        Errno::ACCESS | Errno::PERM | Errno::ROFS => BindError::Denied { action, path, source },
        Errno::ADDRINUSE => BindError::InUse { path },
        _ => BindError::Io { action, path, source },
    }
}

fn new_socket(socket_type: SocketType) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, socket_type, flags, None)
}

fn lstat(path: &Path) -> rustix::io::Result<Stat> {
    rustix::fs::statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn kind_of(file_type: FileType) -> &'static str {
    match file_type {
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "fifo",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        FileType::Socket => "socket",
        FileType::Unknown => "file of unknown kind",
    }
}

/// An advisory lock on the socket's directory, which all sidecars take around "is it stale? then remove it". A
/// lock on a file beside the socket would itself have to be cleaned up.
struct DirectoryLock(#[expect(dead_code, reason = "closing it unlocks")] OwnedFd);

impl DirectoryLock {
    /// `None` where the lock cannot be had: some network file systems know none, and a directory may be
    /// writable and not readable. The rest of the procedure is right without it but for two processes that
    /// start in the same millisecond.
    // Looks again and again: flock() takes no deadline, and a lock that is let go wakes nobody else.
    fn take(path: &Path) -> Option<DirectoryLock> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(parent(path), flags, Mode::empty()).ok()?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Some(DirectoryLock(directory)),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(_) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A socket file that nobody serves, as a killed process leaves it.
    fn leave_stale_socket(path: &Path) {
        drop(UnixListener::bind(path).unwrap());
        assert_eq!(
            UnixStream::connect(path).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
    }

    #[test]
    fn it_listens_with_the_mode_asked_for_and_removes_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for mode in [0o600, 0o660, 0o666] {
            let (listener, guard) = bind_unix(&path, mode).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, mode);
            UnixStream::connect(&path).unwrap();
            listener.accept().unwrap();
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
            drop(guard);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        leave_stale_socket(&path);
        let (listener, _guard) = bind_unix(&path, 0o660).unwrap();
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn a_live_socket_is_never_stolen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let live = UnixListener::bind(&path).unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        let error = bind_unix(&path, 0o660).unwrap_err();
        assert!(matches!(error, BindError::InUse { .. }), "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
        live.accept()
            .expect("the probe, which closes at once, is all it saw");
    }

    /// A listener whose queue is full does not accept, and a blocking probe would hang.
    #[test]
    fn a_live_socket_with_a_full_queue_is_live() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = new_socket(SocketType::STREAM).unwrap();
        let address = SocketAddrUnix::new(&path).unwrap();
        rustix::net::bind(&socket, &address).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let mut waiting = Vec::new();
        loop {
            let client = new_socket(SocketType::STREAM).unwrap();
            match rustix::net::connect(&client, &address) {
                Ok(()) => waiting.push(client),
                Err(errno) => break assert_eq!(errno, Errno::AGAIN),
            }
        }
        assert!(matches!(bind_unix(&path, 0o660), Err(BindError::InUse { .. })));
        assert!(path.exists());
    }

    #[test]
    fn what_is_no_socket_is_never_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        let link = dir.path().join("link");
        let stale = dir.path().join("stale");
        leave_stale_socket(&stale);
        std::os::unix::fs::symlink(&stale, &link).unwrap();
        let subdir = dir.path().join("dir");
        fs::create_dir(&subdir).unwrap();
        for (path, kind) in [
            (&file, "regular file"),
            (&link, "symbolic link"),
            (&subdir, "directory"),
        ] {
            let error = bind_unix(path, 0o660).unwrap_err().to_string();
            assert!(
                error.contains(kind) && error.contains(&path.display().to_string()),
                "{error}"
            );
            assert!(fs::symlink_metadata(path).is_ok());
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        assert!(stale.exists());
    }

    #[test]
    fn a_successors_socket_outlives_our_guard() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, guard) = bind_unix(&path, 0o660).unwrap();
        // Somebody removed our file, and then another process came; its inode may well have the number of ours
        // if that is free.
        drop(listener);
        fs::remove_file(&path).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(guard);
        UnixStream::connect(&path).expect("the successor still listens");
    }

    #[test]
    fn errors_name_the_path_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing/s");
        let error = bind_unix(&missing, 0o660).unwrap_err();
        assert!(matches!(error, BindError::NoDirectory { .. }), "{error}");
        assert!(error.to_string().contains("mount a volume there"), "{error}");

        let long = dir.path().join("x".repeat(MAX_PATH));
        let error = bind_unix(&long, 0o660).unwrap_err();
        assert!(matches!(error, BindError::TooLong { .. }), "{error}");
        assert!(error.to_string().contains("at most 107"), "{error}");

        let through_file = dir.path().join("file");
        fs::write(&through_file, "").unwrap();
        let error = bind_unix(&through_file.join("s"), 0o660).unwrap_err();
        assert!(matches!(error, BindError::Io { .. }), "{error}");
    }

    /// All of them see the same stale socket; one may have it.
    #[test]
    fn of_many_that_start_at_once_one_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for _ in 0..20 {
            leave_stale_socket(&path);
            let barrier = std::sync::Barrier::new(8);
            let outcomes: Vec<_> = std::thread::scope(|scope| {
                let starters: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            bind_unix(&path, 0o660)
                        })
                    })
                    .collect();
                starters
                    .into_iter()
                    .map(|starter| starter.join().unwrap())
                    .collect()
            });
            assert_eq!(
                outcomes.iter().filter(|outcome| outcome.is_ok()).count(),
                1,
                "{outcomes:?}"
            );
            UnixStream::connect(&path).expect("the winner's file is there");
            drop(outcomes);
            assert!(!path.exists());
        }
    }
}
