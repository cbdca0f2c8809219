//! The private way to the crate: `VhostUserDaemon` takes a listener, never a stream.
//!
//! A directory that only we may enter, a socket in it, and both are gone again before a connection is used. An abstract address
//! would be open to everybody in the pod's network namespace.
//!
//! The socket outlives its name: each session connects to the file that is held open, by way of /proc. So a session can begin
//! on a volume that has filled up, or has become read-only, since the start.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};

/// What private directories are called, before process id and number.
const PREFIX: &str = ".vsock-sidecar-";
/// A private directory lives for a few system calls. One so old was left by a process that was killed between them.
const LEFTOVER_AGE: Duration = Duration::from_secs(10);

/// No directory would do.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a private socket ({tried}); one writable directory is needed: beside the socket, {}, or /dev/shm", std::env::temp_dir().display())]
pub struct PrivateSocketError {
    tried: String,
}

/// A socket that only this process can reach.
#[derive(Debug)]
pub struct PrivateSocket {
    listener: UnixListener,
    /// Its file, which has no name any more.
    file: OwnedFd,
}

impl PrivateSocket {
    /// Makes one. `near` is the directory to try first.
    pub fn make(near: &Path) -> Result<PrivateSocket, PrivateSocketError> {
        in_some_directory(near, |path| {
            let listener = UnixListener::bind(path)?;
            let file = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            Ok(PrivateSocket { listener, file })
        })
    }

    /// A listener and a connection to it, which is the first it will accept.
    ///
    /// # Errors
    /// Without /proc there is no way to a file that has no name; and what else connect(2) says.
    pub fn pair(&self) -> io::Result<(UnixListener, UnixStream)> {
        // Of a session that failed before it accepted its own.
        while self.has_caller()? {
            drop(self.listener.accept()?);
        }
        let stream = UnixStream::connect(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        Ok((self.listener.try_clone()?, stream))
    }

    fn has_caller(&self) -> io::Result<bool> {
        let mut waiting = [PollFd::new(&self.listener, PollFlags::IN)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        Ok(poll(&mut waiting, Some(&at_once))? > 0)
    }
}

/// A listener and a connection to it, made while it has a name. For where there is no /proc.
pub fn pair_by_name(near: &Path) -> Result<(UnixListener, UnixStream), PrivateSocketError> {
    in_some_directory(near, |path| {
        let listener = UnixListener::bind(path)?;
        Ok((listener, UnixStream::connect(path)?))
    })
}

/// Does something with a path in a private directory, which is made in the first directory that will do.
fn in_some_directory<T>(near: &Path, with: impl Fn(&Path) -> io::Result<T>) -> Result<T, PrivateSocketError> {
    let mut tried: Vec<String> = Vec::new();
    for parent in [near, &std::env::temp_dir(), Path::new("/dev/shm")] {
        match PrivateDirectory::make_in(parent).and_then(|directory| with(&directory.0.join("s"))) {
            Ok(made) => return Ok(made),
            Err(error) => tried.push(format!("{}: {error}", parent.display())),
        }
    }
    Err(PrivateSocketError {
        tried: tried.join("; "),
    })
}

/// Removed with what is in it when dropped.
struct PrivateDirectory(PathBuf);

impl PrivateDirectory {
    fn make_in(parent: &Path) -> io::Result<PrivateDirectory> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Several sidecars, each process 1 of its container, may share the parent directory.
        for _ in 0..64 {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!("{PREFIX}{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(PrivateDirectory(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(directory: &Path) {
    let _ = fs::remove_file(directory.join("s"));
    let _ = fs::remove_dir(directory);
}

fn age(metadata: &fs::Metadata) -> Option<Duration> {
    SystemTime::now().duration_since(metadata.modified().ok()?).ok()
}

/// Removes private directories that a killed process left in `parent`. Only ours, only old ones.
pub fn remove_leftovers(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    let uid = rustix::process::geteuid().as_raw();
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // `DirEntry::metadata` does not follow symbolic links.
        let Ok(metadata) = entry.metadata() else { continue };
        let is_old = age(&metadata).is_some_and(|age| age > LEFTOVER_AGE);
        if metadata.is_dir() && metadata.uid() == uid && is_old {
            remove(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn entries(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    fn passes_a_byte((listener, mut ours): (UnixListener, UnixStream)) -> bool {
        let (mut theirs, _) = listener.accept().unwrap();
        ours.write_all(b"x").unwrap();
        let mut byte = [0];
        theirs.read_exact(&mut byte).unwrap();
        byte == *b"x"
    }

    #[test]
    fn each_pair_is_connected_and_nothing_is_left_behind() {
        let directory = tempfile::tempdir().unwrap();
        let socket = PrivateSocket::make(directory.path()).unwrap();
        assert_eq!(entries(directory.path()), 0);
        assert!(passes_a_byte(socket.pair().unwrap()));
        assert!(passes_a_byte(socket.pair().unwrap()));
    }

    /// Found by a soak on a disk that was full: every VMM that came afterwards was sent away.
    #[test]
    fn a_pair_needs_no_directory_any_more() {
        let directory = tempfile::tempdir().unwrap();
        let socket = PrivateSocket::make(directory.path()).unwrap();
        directory.close().unwrap();
        assert!(passes_a_byte(socket.pair().unwrap()));
    }

    #[test]
    fn a_connection_that_was_never_accepted_is_not_taken_for_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let socket = PrivateSocket::make(directory.path()).unwrap();
        let (_, unwanted) = socket.pair().unwrap();
        assert!(passes_a_byte(socket.pair().unwrap()));
        drop(unwanted);
    }

    #[test]
    fn a_directory_that_is_not_there_or_too_deep_is_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        assert!(PrivateSocket::make(&directory.path().join("missing")).is_ok());
        let deep = directory.path().join("d".repeat(100));
        fs::create_dir(&deep).unwrap();
        assert!(PrivateSocket::make(&deep).is_ok());
        assert_eq!(entries(&deep), 0, "the attempt that failed was not cleaned up");
    }

    #[test]
    fn leftovers_are_removed_when_old_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let old = directory.path().join(".vsock-sidecar-1-0");
        let young = directory.path().join(".vsock-sidecar-1-1");
        let other = directory.path().join("other");
        for path in [&old, &young, &other] {
            fs::create_dir(path).unwrap();
        }
        drop(UnixListener::bind(old.join("s")).unwrap());
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        for path in [&old, &other] {
            fs::File::open(path).unwrap().set_modified(long_ago).unwrap();
        }
        remove_leftovers(directory.path());
        assert_eq!(
            (old.exists(), young.exists(), other.exists()),
            (false, true, true)
        );
    }
}
