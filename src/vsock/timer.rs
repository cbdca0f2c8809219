//! Deadlines of connections on whatever clock the caller has.
//!
//! A heap that may hold stale entries: an entry that fires is checked against its connection's own deadline and put
//! back if that has moved. A connection whose deadline moves later (the common case: activity) costs nothing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use super::ConnectionId;

/// Pending wake-ups, earliest first. Holds at most a few entries a connection.
#[derive(Default, Debug)]
pub struct Deadlines {
    heap: BinaryHeap<Reverse<(Instant, ConnectionId)>>,
}

impl Deadlines {
    /// Adds a wake-up for `id` at `at`.
    pub fn push(&mut self, at: Instant, id: ConnectionId) {
        self.heap.push(Reverse((at, id)));
    }

    /// The next connection whose wake-up is due at `now`.
    pub fn pop_due(&mut self, now: Instant) -> Option<ConnectionId> {
        match self.heap.peek() {
            Some(Reverse((at, _))) if *at <= now => self.heap.pop().map(|Reverse((_, id))| id),
            _ => None,
        }
    }

    /// When the next wake-up is due.
    pub fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Forgets all wake-ups.
    pub fn clear(&mut self) {
        self.heap.clear();
    }

    /// Wake-ups held.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.heap.len()
    }
}
