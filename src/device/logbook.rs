//! What was already said at a level that operators see: a guest must not be able to fill their log.
//!
//! Each cause is logged once; what comes again is counted by the metrics and logged at debug.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::rules::RuleId;
use crate::vsock::{Misbehavior, RefuseReason};

/// Ports remembered for [`Logbook::no_rule`]; more different ones are a scan, and one line says as much as a thousand.
const MAX_PORTS: usize = 64;

/// A bound that is in the way again after so long is news again: somebody may have changed something meanwhile. So is a target
/// that fails again after it was reached: of a range of ports a guest may ask for one that listens and one that does not in turn.
const SILENCE: Duration = Duration::from_secs(60);

/// Which causes have been logged.
#[derive(Default, Debug)]
pub(super) struct Logbook {
    ports: HashSet<u32>,
    kinds: HashSet<Misbehavior>,
    failing_rules: HashMap<RuleId, Failing>,
    /// When a bound was last said to be in the way, by rule where it is the rule's: no more than there are rules and reasons.
    bounds: HashMap<(Bound, Option<RuleId>), Instant>,
}

/// A rule whose target could not be reached.
#[derive(Debug)]
struct Failing {
    /// When that was last said.
    told_at: Instant,
    /// It has not been reached since.
    told: bool,
}

/// What can be in the way of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Bound {
    /// Of new connections.
    Connections(RefuseReason),
    /// Of buffers.
    Memory,
}

impl Logbook {
    /// Whether a port without a rule is news.
    pub(super) fn no_rule(&mut self, port: u32) -> bool {
        self.ports.len() < MAX_PORTS && self.ports.insert(port)
    }

    /// Whether this kind of misbehavior is news.
    pub(super) fn misbehavior(&mut self, kind: Misbehavior) -> bool {
        self.kinds.insert(kind)
    }

    /// Whether the failure of a rule's target is news: the first one after a success is, but for [`SILENCE`] after the last.
    pub(super) fn target_failed(&mut self, now: Instant, rule: RuleId) -> bool {
        let news = self
            .failing_rules
            .get(&rule)
            .is_none_or(|failing| !failing.told && now.saturating_duration_since(failing.told_at) >= SILENCE);
        if news {
            self.failing_rules.insert(
                rule,
                Failing {
                    told_at: now,
                    told: true,
                },
            );
        }
        news
    }

    /// A rule's target was reached.
    pub(super) fn target_reached(&mut self, rule: RuleId) {
        if let Some(failing) = self.failing_rules.get_mut(&rule) {
            failing.told = false;
        }
    }

    /// Whether it is news that a bound is in the way; `rule` says whose bound it is, if it is a rule's.
    pub(super) fn bound(&mut self, now: Instant, bound: Bound, rule: Option<RuleId>) -> bool {
        let last = self.bounds.get(&(bound, rule));
        let news = last.is_none_or(|last| now.saturating_duration_since(*last) >= SILENCE);
        if news {
            self.bounds.insert((bound, rule), now);
        }
        news
    }

    /// Other rules and limits: what is in the way of them is news again, and nothing is remembered of rules that are gone.
    pub(super) fn reconfigured(&mut self) {
        self.ports.clear();
        self.failing_rules.clear();
        self.bounds.clear();
    }

    /// A new session: what its guest does is news again.
    pub(super) fn forget(&mut self) {
        *self = Logbook::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that connects in a loop against a bound fills no log, and who looks a minute later finds it said again.
    #[test]
    fn a_bound_is_told_once_a_minute() {
        let mut logbook = Logbook::default();
        let begin = Instant::now();
        let one = Some(RuleId::new());
        let full = Bound::Connections(RefuseReason::RuleLimit);
        assert!(logbook.bound(begin, full, one));
        assert!(logbook.bound(begin, full, Some(RuleId::new())));
        assert!(logbook.bound(begin, Bound::Memory, None));
        for n in 0..60_000 {
            assert!(!logbook.bound(begin + Duration::from_millis(n), full, one));
        }
        assert!(logbook.bound(begin + SILENCE, full, one));
        assert!(!logbook.bound(begin + SILENCE + Duration::from_secs(1), full, one));
        logbook.forget();
        assert!(logbook.bound(begin + SILENCE, full, one));
    }

    /// One port of a range that listens and one that does not: a guest that asks for both in turn made a line a round.
    #[test]
    fn a_target_that_fails_and_is_reached_in_turn_is_told_once_a_minute() {
        let mut logbook = Logbook::default();
        let begin = Instant::now();
        let (one, other) = (RuleId::new(), RuleId::new());
        assert!(logbook.target_failed(begin, one));
        assert!(
            logbook.target_failed(begin, other),
            "another rule is another cause"
        );
        for n in 0..60_000 {
            logbook.target_reached(one);
            assert!(!logbook.target_failed(begin + Duration::from_millis(n), one));
        }
        // It has failed ever since it was reached, and nobody was told: now they are.
        assert!(logbook.target_failed(begin + SILENCE, one));
        // Without a success between, it is no news however long it lasts.
        assert!(!logbook.target_failed(begin + 10 * SILENCE, one));
    }
}
