//! Tells when the configuration may have changed.
//!
//! What is watched is the directory and never the file: a ConfigMap is changed by a symbolic link `..data` beside it that is
//! replaced by rename, editors write another file and rename it over the old one, and in both cases a watch on the file ends with
//! the old file (kubernetes/kubernetes#112677). If the file is a symbolic link, the directory that it leads to is watched, too.
//!
//! Whether anything has really changed is for who reads the file to see, by its content: events are many and mean little. So they
//! are waited out ([`QUIET`]), and lost ones cost [`LOOK_AGAIN`] at most. A directory that cannot be watched, or is gone, is
//! asked for again and again ([`SLOW`]), and the log says so once.
//!
//! It has a thread of its own, which nobody waits for, and one inotify descriptor for life: to close one waits for a grace period of
//! the kernel (`fsnotify_wait_marks_destroyed` in Linux's fs/notify/mark.c), which is seconds on a machine that is
//! starved, and dials and clients would wait with it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tracing::{info, warn};

use super::events::{Cause, Event};

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

/// Watches the configuration's file for as long as the process runs.
pub(super) fn spawn(file: PathBuf, events: Sender<Event>) -> io::Result<()> {
    std::thread::Builder::new()
        .name("watch".into())
        .spawn(move || watch(&file, &events))
        .map(drop)
}

fn watch(file: &Path, events: &Sender<Event>) {
    let mut directories = None;
    let mut told = false;
    loop {
        let looked = Directories::look(&mut directories, file);
        match &looked {
            Ok(_) if std::mem::take(&mut told) => {
                info!(file = %file.display(), "the configuration's directory is watched again");
            }
            Err(error) if !std::mem::replace(&mut told, true) => warn!(
                file = %file.display(), %error, every = ?SLOW,
                "the configuration's directory cannot be watched: the file is read every few seconds instead"
            ),
            _ => {}
        }
        // What has changed while nobody watched.
        if !ask(events) {
            return;
        }
        match looked.and_then(Directories::changed) {
            Ok(()) => {}
            Err(_) => std::thread::sleep(SLOW),
        }
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
    inotify: OwnedFd,
    watches: Vec<i32>,
}

impl Directories {
    /// Watches the directories that the file has now: a watch belongs to an inode, and ConfigMaps, editors and operators replace
    /// those. What comes of changes before this is forgotten.
    fn look<'d>(place: &'d mut Option<Directories>, file: &Path) -> io::Result<&'d Directories> {
        let directories = match place {
            Some(directories) => directories,
            None => place.insert(Directories {
                inotify: inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?,
                watches: Vec::new(),
            }),
        };
        let inotify = &directories.inotify;
        // The same number again for a directory that is watched already.
        let mut watches = vec![inotify::add_watch(inotify, directory_of(file), CHANGES)?];
        // Where the file is not there yet, its directory is all that there is.
        if let Ok(real) = file.canonicalize() {
            watches.push(inotify::add_watch(inotify, directory_of(&real), CHANGES)?);
        }
        let before = std::mem::replace(&mut directories.watches, watches);
        for watch in before {
            if !directories.watches.contains(&watch) {
                // One whose directory is gone went with it.
                let _ = inotify::remove_watch(inotify, watch);
            }
        }
        // That a watch has ended is an event as well.
        directories.take_events()?;
        Ok(directories)
    }

    /// Waits until something has happened, and then nothing for a while; or for [`LOOK_AGAIN`].
    fn changed(&self) -> io::Result<()> {
        if !self.wait(LOOK_AGAIN)? {
            return Ok(());
        }
        let end = Instant::now() + PATIENCE;
        loop {
            self.take_events()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.wait(QUIET.min(left))? {
                return Ok(());
            }
        }
    }

    /// Whether something happens within this time.
    fn wait(&self, most: Duration) -> io::Result<bool> {
        let timeout = Timespec::try_from(most).map_err(io::Error::other)?;
        let mut inotify = [PollFd::new(&self.inotify, PollFlags::IN)];
        match poll(&mut inotify, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads all events, of which none is looked at.
    fn take_events(&self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(self.inotify.as_fd(), &mut buffer) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
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
