//! Deadlines of connections on whatever clock the caller has.
//!
//! An ordered set that holds one wake-up for each connection that has a deadline, and none for others. A deadline
//! that moves later (the common case: activity) costs nothing: the wake-up stays, finds the deadline moved, and is put
//! back. A set rather than a heap, because a heap cannot forget: a guest that opens and resets in a loop would leave
//! an entry for each connection until it was due.

use std::collections::BTreeSet;
use std::time::Instant;

use super::ConnectionId;

/// Pending wake-ups, earliest first.
#[derive(Default, Debug)]
pub struct Deadlines {
    wake_ups: BTreeSet<(Instant, ConnectionId)>,
}

impl Deadlines {
    /// Adds a wake-up for `id` at `at`.
    pub fn insert(&mut self, at: Instant, id: ConnectionId) {
        self.wake_ups.insert((at, id));
    }

    /// Takes back the wake-up that was added for `id` at `at`.
    pub fn remove(&mut self, at: Instant, id: ConnectionId) {
        self.wake_ups.remove(&(at, id));
    }

    /// The next connection whose wake-up is due at `now`.
    pub fn pop_due(&mut self, now: Instant) -> Option<ConnectionId> {
        let first = self.next().filter(|at| *at <= now);
        first.and_then(|_| self.wake_ups.pop_first()).map(|(_, id)| id)
    }

    /// When the next wake-up is due.
    pub fn next(&self) -> Option<Instant> {
        self.wake_ups.first().map(|(at, _)| *at)
    }

    /// Wake-ups held.
    pub(super) fn len(&self) -> usize {
        self.wake_ups.len()
    }
}
