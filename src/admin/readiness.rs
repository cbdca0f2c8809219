//! Ready when every latch is dropped: linkerd's shape, with names so that a probe can say what is missing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Check;

/// A question that is answered yes when nobody holds a [`Latch`] of it. Cheap to clone.
#[derive(Clone, Default, Debug)]
pub struct Readiness {
    /// By name, how many latches are held. A name stays when its last latch is dropped, so that the answer
    /// lists it as done. Bounded by the names the program uses: one or two for each guest.
    latches: Arc<Mutex<BTreeMap<String, usize>>>,
}

/// Holds a [`Readiness`] back until it is dropped.
#[derive(Debug)]
pub struct Latch {
    name: String,
    readiness: Readiness,
}

impl Readiness {
    /// Ready, as nothing holds it back yet.
    pub fn new() -> Readiness {
        Readiness::default()
    }

    /// Not ready until the latch is dropped. `name` says what is waited for (`guest web: vhost-user socket`).
    pub fn latch(&self, name: impl Into<String>) -> Latch {
        let name = name.into();
        *self.lock().entry(name.clone()).or_default() += 1;
        Latch {
            name,
            readiness: self.clone(),
        }
    }

    /// Whether nothing holds it back.
    pub fn is_ready(&self) -> bool {
        self.lock().values().all(|held| *held == 0)
    }

    /// A check for each name there ever was.
    pub fn checks(&self) -> Vec<Check> {
        let check = |(name, held): (&String, &usize)| match held {
            0 => Check::ok(name),
            _ => Check::failed(name, "not yet"),
        };
        self.lock().iter().map(check).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.latches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Latch {
    fn drop(&mut self) {
        if let Some(held) = self.readiness.lock().get_mut(&self.name) {
            *held = held.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_ready_when_every_latch_is_dropped_and_names_those_that_are_not() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let (web, db) = (readiness.latch("guest web"), readiness.latch("guest db"));
        assert_eq!(
            readiness.checks(),
            [
                Check::failed("guest db", "not yet"),
                Check::failed("guest web", "not yet")
            ]
        );
        drop(web);
        assert!(!readiness.is_ready());
        assert_eq!(
            readiness.checks(),
            [Check::failed("guest db", "not yet"), Check::ok("guest web")]
        );
        drop(db);
        assert!(readiness.is_ready());
    }

    #[test]
    fn latches_of_one_name_are_counted_and_can_come_back() {
        let readiness = Readiness::new();
        let (first, second) = (readiness.latch("guest web"), readiness.latch("guest web"));
        drop(first);
        assert!(!readiness.is_ready());
        drop(second);
        assert!(readiness.is_ready());
        let again = readiness.latch("guest web");
        assert!(!readiness.is_ready());
        drop(again);
        assert_eq!(readiness.checks(), [Check::ok("guest web")]);
    }
}
