//! Shutdown: who asks for it, who sees it, when it is complete, and what it cut off.
//!
//! Completion is counted by ownership, as in mini-redis: every piece of work that shall be finished holds a
//! [`Guard`]; when the last one is dropped, the drain is complete. Nobody has to remember to report, since
//! returning is reporting, and so is a panic.
//!
//! Watchers are async code or plain threads: [`Watch::draining`] is a future of any executor,
//! [`Watch::is_draining`] a load.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// The owner's end: begins the drain and waits for its completion. Dropping it begins the drain as well.
#[derive(Debug)]
pub struct Drain {
    draining: watch::Sender<bool>,
    work: Arc<Work>,
}

/// Sees the drain begin, and makes guards. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Watch {
    draining: watch::Receiver<bool>,
    work: Arc<Work>,
}

/// A piece of work that a drain waits for, until it is dropped.
#[derive(Debug)]
pub struct Guard {
    id: u64,
    /// What is still open within this work, for the report.
    remaining: Arc<AtomicU64>,
    work: Arc<Work>,
}

/// How a drain ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// From the beginning of the wait to its end.
    pub took: Duration,
    /// Work that had not ended; empty if all was finished in time.
    pub cut_off: Vec<CutOff>,
}

/// Work that was cut off.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CutOff {
    /// What the guard was called.
    pub name: String,
    /// What its owner last said was still open (connections, for a guest).
    pub remaining: u64,
}

#[derive(Default, Debug)]
struct Work {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default, Debug)]
struct State {
    next_id: u64,
    guards: BTreeMap<u64, (String, Arc<AtomicU64>)>,
    /// Do not wait any longer.
    cut_short: bool,
}

impl Drain {
    /// A drain that has not begun.
    pub fn new() -> Drain {
        Drain {
            draining: watch::Sender::new(false),
            work: Arc::default(),
        }
    }

    /// Tells every watcher. Again is no harm.
    pub fn begin(&self) {
        self.draining.send_replace(true);
    }

    /// An end for whoever has to see the drain or hold it up.
    pub fn watch(&self) -> Watch {
        Watch {
            draining: self.draining.subscribe(),
            work: self.work.clone(),
        }
    }

    /// A handle that ends [`Drain::wait`] at once: the second signal.
    pub fn shortcut(&self) -> Shortcut {
        Shortcut(self.work.clone())
    }

    /// Begins the drain if it has not begun, and blocks until every guard is dropped or `grace` is over.
    pub fn wait(&self, grace: Duration) -> Report {
        self.begin();
        let start = Instant::now();
        let mut state = self.work.lock();
        while !state.guards.is_empty() && !state.cut_short {
            let Some(left) = grace.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) else {
                break;
            };
            state = self
                .work
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let cut_off = state.guards.values().map(|(name, remaining)| CutOff {
            name: name.clone(),
            remaining: remaining.load(Ordering::Relaxed),
        });
        Report {
            took: start.elapsed(),
            cut_off: cut_off.collect(),
        }
    }
}

impl Default for Drain {
    fn default() -> Drain {
        Drain::new()
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        self.begin();
    }
}

/// Ends the wait of a drain.
#[derive(Clone, Debug)]
pub struct Shortcut(Arc<Work>);

impl Shortcut {
    /// The grace period is over now.
    pub fn cut(&self) {
        self.0.lock().cut_short = true;
        self.0.changed.notify_all();
    }
}

impl Watch {
    /// Whether the drain has begun.
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Completes when the drain begins.
    pub async fn draining(&self) {
        let mut draining = self.draining.clone();
        // An error means that the owner is gone, and dropping it begins the drain.
        let _ = draining.wait_for(|draining| *draining).await;
    }

    /// Work that the drain shall wait for. A guard made after the drain began counts as well.
    pub fn guard(&self, name: impl Into<String>) -> Guard {
        let remaining = Arc::new(AtomicU64::new(0));
        let mut state = self.work.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.guards.insert(id, (name.into(), remaining.clone()));
        Guard {
            id,
            remaining,
            work: self.work.clone(),
        }
    }
}

impl Guard {
    /// Says how much is still open within this work, for the report of a drain that cuts it off.
    pub fn set_remaining(&self, remaining: u64) {
        self.remaining.store(remaining, Ordering::Relaxed);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.work.lock().guards.remove(&self.id);
        self.work.changed.notify_all();
    }
}

impl Report {
    /// Whether all work ended by itself.
    pub fn is_complete(&self) -> bool {
        self.cut_off.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.took.as_secs_f64();
        if self.is_complete() {
            return write!(f, "drained in {seconds:.1} s");
        }
        write!(f, "cut off after {seconds:.1} s: ")?;
        for (index, work) in self.cut_off.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{work}")?;
        }
        Ok(())
    }
}

impl fmt::Display for CutOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.remaining {
            0 => write!(f, "{}", self.name),
            remaining => write!(f, "{} ({remaining} open)", self.name),
        }
    }
}

impl Work {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn without_work_it_is_complete_at_once() {
        let drain = Drain::new();
        let watch = drain.watch();
        assert!(!watch.is_draining());
        let report = drain.wait(LONG);
        assert!(report.is_complete());
        assert!(watch.is_draining(), "waiting begins the drain");
        assert_eq!(report.to_string(), "drained in 0.0 s");
    }

    #[test]
    fn it_waits_for_the_last_guard_and_no_longer() {
        let drain = Drain::new();
        let watch = drain.watch();
        let guards: Vec<_> = (0..3).map(|n| watch.guard(format!("guest {n}"))).collect();
        let worker = thread::spawn(move || {
            while !watch.is_draining() {
                thread::yield_now();
            }
            let late = watch.guard("a reply that is still to be written");
            drop(guards);
            drop(late);
        });
        let report = drain.wait(LONG);
        worker.join().unwrap();
        assert!(report.is_complete(), "{report}");
        assert!(report.took < LONG);
    }

    #[test]
    fn the_grace_period_ends_it_and_the_report_names_what_was_cut_off() {
        let drain = Drain::new();
        let watch = drain.watch();
        let web = watch.guard("guest web");
        let _admin = watch.guard("admin");
        web.set_remaining(7);
        web.set_remaining(3);
        let report = drain.wait(Duration::from_millis(20));
        assert!(report.took >= Duration::from_millis(20));
        let names: Vec<_> = report
            .cut_off
            .iter()
            .map(|work| (work.name.as_str(), work.remaining))
            .collect();
        assert_eq!(names, [("guest web", 3), ("admin", 0)]);
        assert_eq!(
            report.to_string(),
            "cut off after 0.0 s: guest web (3 open), admin"
        );
    }

    #[test]
    fn a_second_signal_ends_the_wait() {
        let drain = Drain::new();
        let watch = drain.watch();
        let _guard = watch.guard("guest web");
        let shortcut = drain.shortcut();
        let signal = thread::spawn(move || {
            while !watch.is_draining() {
                thread::yield_now();
            }
            shortcut.cut();
        });
        let report = drain.wait(LONG);
        signal.join().unwrap();
        assert!(report.took < LONG);
        assert!(!report.is_complete());
    }

    #[test]
    fn a_worker_that_panics_does_not_hold_it_up() {
        let drain = Drain::new();
        let guard = drain.watch().guard("guest web");
        let worker = thread::spawn(move || {
            let _guard = guard;
            panic!("as a test");
        });
        assert!(worker.join().is_err());
        assert!(drain.wait(LONG).is_complete());
    }

    #[test]
    fn async_watchers_see_it_begin_and_a_dropped_owner_is_a_beginning() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (drain, dropped) = (Drain::new(), Drain::new());
        let (watch, orphan) = (drain.watch(), dropped.watch());
        runtime.block_on(async {
            let waiting = tokio::spawn({
                let watch = watch.clone();
                async move { watch.draining().await }
            });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            drain.begin();
            waiting.await.unwrap();
            watch.draining().await;
            drop(dropped);
            orphan.draining().await;
            assert!(orphan.is_draining());
        });
    }
}
