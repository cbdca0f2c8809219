//! The private way to the crate: `VhostUserDaemon` takes a listener, never a stream.
//!
//! A directory that only we may enter, a socket in it, our connection to it, and both are gone again before the
//! connection is used. An abstract address would be open to everybody in the pod's network namespace.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

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

/// A listener and a connection to it, which is the first it will accept. `near` is the directory to try first.
pub fn pair(near: &Path) -> Result<(UnixListener, UnixStream), PrivateSocketError> {
    let mut tried: Vec<String> = Vec::new();
    for directory in [near, &std::env::temp_dir(), Path::new("/dev/shm")] {
        match pair_in(directory) {
            Ok(pair) => return Ok(pair),
            Err(error) => tried.push(format!("{}: {error}", directory.display())),
        }
    }
    Err(PrivateSocketError {
        tried: tried.join("; "),
    })
}

fn pair_in(directory: &Path) -> io::Result<(UnixListener, UnixStream)> {
    let directory = PrivateDirectory::make_in(directory)?;
    let path = directory.0.join("s");
    let listener = UnixListener::bind(&path)?;
    let stream = UnixStream::connect(&path)?;
    Ok((listener, stream))
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

    #[test]
    fn the_pair_is_connected_and_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let (listener, mut ours) = pair(directory.path()).unwrap();
        assert_eq!(entries(directory.path()), 0);
        let (mut theirs, _) = listener.accept().unwrap();
        ours.write_all(b"x").unwrap();
        let mut byte = [0];
        theirs.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
    }

    #[test]
    fn a_directory_that_is_not_there_or_too_deep_is_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        assert!(pair(&directory.path().join("missing")).is_ok());
        let deep = directory.path().join("d".repeat(100));
        fs::create_dir(&deep).unwrap();
        assert!(pair(&deep).is_ok());
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
