//! Tells when the configuration may have changed.
//!
//! What is watched is the directory and never the file: a ConfigMap is changed by a symbolic link `..data` beside it that is
//! replaced by rename, editors write another file and rename it over the old one, and in both cases a watch on the file ends with
//! the old file (kubernetes/kubernetes#112677). If the file is a symbolic link, the directory that it leads to is watched, too.
//!
//! Whether anything has really changed is for who reads the file to see, by its content: events are many and mean little. So they
//! are waited out ([`QUIET`]), and lost ones cost [`LOOK_AGAIN`] at most. A directory that cannot be watched, or is gone, is
//! asked for again and again ([`SLOW`]), and the log says so once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info, warn};

use super::events::{Cause, Event};
use crate::sys::readiness::PolledFd;

/// Events that follow each other so closely are one change: an editor makes five of one save.
const QUIET: Duration = Duration::from_millis(100);
/// A directory in which something always happens is looked at so often all the same.
const PATIENCE: Duration = Duration::from_secs(1);
/// File systems there are that tell of nothing (NFS, FUSE): so the file is read now and then in any case.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// How often what cannot be watched is looked at.
const SLOW: Duration = Duration::from_secs(2);

/// What happens to a directory when a file in it has another content, under whatever name.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// Watches the configuration's file for as long as the control runtime runs, on which it is to be spawned.
pub(super) async fn watch(file: PathBuf, events: Sender<Event>) {
    let mut told = false;
    loop {
        // Made anew each time: a watch belongs to an inode, and ConfigMaps, editors and operators replace those.
        match Directories::of(&file) {
            Ok(directories) => {
                if std::mem::take(&mut told) {
                    info!(file = %file.display(), "the configuration's directory is watched again");
                }
                // What has changed while nobody watched.
                if !ask(&events) {
                    return;
                }
                match timeout(LOOK_AGAIN, directories.changed()).await {
                    Ok(Err(error)) => debug!(%error, "the watch on the configuration has failed"),
                    Ok(Ok(())) | Err(_) => continue,
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    warn!(
                        file = %file.display(), %error, every = ?SLOW,
                        "the configuration's directory cannot be watched: the file is read every few seconds instead"
                    );
                }
                if !ask(&events) {
                    return;
                }
            }
        }
        tokio::time::sleep(SLOW).await;
    }
}

/// Has the file read. False when there is nobody any more to do it.
fn ask(events: &Sender<Event>) -> bool {
    let reload = Event::Reload {
        cause: Cause::File,
        answer: None,
    };
    events.send(reload).is_ok()
}

/// The directories in which a change of the file shows.
struct Directories {
    inotify: PolledFd,
}

impl Directories {
    fn of(file: &Path) -> io::Result<Directories> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        watch_directory(&inotify, directory_of(file))?;
        // Where the file is not there yet, its directory is all that there is.
        if let Ok(real) = file.canonicalize() {
            watch_directory(&inotify, directory_of(&real))?;
        }
        Ok(Directories {
            inotify: PolledFd::new(inotify, Interest::READABLE)?,
        })
    }

    /// Completes when something has happened, and then nothing for a while.
    async fn changed(&self) -> io::Result<()> {
        self.inotify.when_readable(take_events).await?;
        let end = Instant::now() + PATIENCE;
        loop {
            let quiet = (Instant::now() + QUIET).min(end);
            match timeout_at(quiet, self.inotify.when_readable(take_events)).await {
                Ok(more) => more?,
                Err(_) => return Ok(()),
            }
            if Instant::now() >= end {
                return Ok(());
            }
        }
    }
}

fn watch_directory(inotify: &OwnedFd, directory: &Path) -> io::Result<()> {
    // The same number again for a directory that is watched already.
    inotify::add_watch(inotify, directory, CHANGES)?;
    Ok(())
}

/// Reads all events, of which none is looked at. `WouldBlock` when there is none.
fn take_events(inotify: BorrowedFd<'_>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let mut any = false;
    loop {
        match rustix::io::read(inotify.as_fd(), &mut buffer) {
            Ok(_) => any = true,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) if any => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The directory that a file is in.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
