//! Which configuration runs and what became of the last reload, for `/state` and the probes.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

/// Differences that are listed; the rest is counted. A file may have a hundred thousand.
pub(super) const MAX_LISTED: usize = 50;

/// What readers on other threads see of the configuration. Cheap to read.
#[derive(Debug)]
pub(super) struct Status {
    file: Option<PathBuf>,
    require_session: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    sha256: Option<String>,
    since: SystemTime,
    last: Option<LastReload>,
    pending: Vec<String>,
}

/// The last reload.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LastReload {
    /// Unix time in seconds.
    pub(super) at: f64,
    /// Who asked for it.
    pub(super) cause: &'static str,
    /// `applied`, `unchanged` or `refused`.
    pub(super) result: &'static str,
    /// Why it was refused.
    pub(super) error: Option<String>,
    /// What it changed.
    pub(super) changes: Vec<String>,
}

impl Status {
    pub(super) fn new(file: Option<&Path>, now: SystemTime) -> Arc<Status> {
        Arc::new(Status {
            file: file.map(Path::to_owned),
            require_session: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                sha256: None,
                since: now,
                last: None,
                pending: Vec::new(),
            }),
        })
    }

    /// Another configuration runs from now on; `pending` is what of it waits for a restart.
    pub(super) fn in_force(&self, sha256: String, since: SystemTime, pending: Vec<String>) {
        let mut inner = self.lock();
        inner.sha256 = Some(sha256);
        inner.since = since;
        inner.pending = pending;
    }

    pub(super) fn reloaded(&self, last: LastReload) {
        self.lock().last = Some(last);
    }

    pub(super) fn set_require_session(&self, required: bool) {
        self.require_session.store(required, Ordering::Relaxed);
    }

    /// `readiness.requireSession`.
    pub(super) fn requires_session(&self) -> bool {
        self.require_session.load(Ordering::Relaxed)
    }

    /// The section `config` of `/state`; `waiting` is what waits for guests' next sessions.
    pub(super) fn describe(&self, waiting: Vec<String>) -> Value {
        let inner = self.lock();
        let mut pending = inner.pending.clone();
        pending.extend(waiting);
        json!({
            "file": self.file,
            "sha256": inner.sha256,
            "since": unix_seconds(inner.since),
            "lastReload": inner.last,
            "pending": pending,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Unix time in seconds.
pub(super) fn unix_seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The first of a list, with a word on the rest.
pub(super) fn listed(items: impl Iterator<Item = String>) -> Vec<String> {
    let mut list: Vec<String> = items.collect();
    if list.len() > MAX_LISTED {
        let more = list.len() - MAX_LISTED;
        list.truncate(MAX_LISTED);
        list.push(format!("and {more} more"));
    }
    list
}
