//! What was already said at a level that operators see: a guest must not be able to fill their log.
//!
//! Each cause is logged once; what comes again is counted by the metrics and logged at debug.

use std::collections::HashSet;

use crate::vsock::Misbehavior;

/// Ports remembered for [`Logbook::no_rule`]; more different ones are a scan, and one line says as much as a thousand.
const MAX_PORTS: usize = 64;

/// Which causes have been logged.
#[derive(Default, Debug)]
pub(super) struct Logbook {
    ports: HashSet<u32>,
    kinds: HashSet<Misbehavior>,
    failing_rules: HashSet<usize>,
    limit: bool,
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

    /// Whether the failure of a rule's target is news: it is after every success.
    pub(super) fn target_failed(&mut self, rule: Option<usize>) -> bool {
        rule.is_some_and(|rule| self.failing_rules.insert(rule))
    }

    /// A rule's target was reached.
    pub(super) fn target_reached(&mut self, rule: Option<usize>) {
        if let Some(rule) = rule {
            self.failing_rules.remove(&rule);
        }
    }

    /// Whether reaching the limit of connections is news.
    pub(super) fn limit(&mut self) -> bool {
        !std::mem::replace(&mut self.limit, true)
    }

    /// A new session: what its guest does is news again.
    pub(super) fn forget(&mut self) {
        *self = Logbook::default();
    }
}
