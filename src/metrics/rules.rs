//! The families of the rules of the configuration, which come and go with reloads.
//!
//! A rule's series live as long as somebody holds its [`RuleMetrics`]: the configuration, or a connection that the rule let
//! in before it was removed. A rule that keeps its name keeps its counters, since who asks for them by name gets those that
//! live. When the last holder lets go the series disappear.
//!
//! What bounds the number of series: of the present configuration, [`MAX_RULES`] rules of a guest and direction have a label of
//! their own; of earlier ones, those that still have connections, until there are `MAX_LABELS` labels in all. Beyond, rules
//! share [`OVERFLOW_RULE`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::families::{Registrar, forget};
use super::guest::{Direction, LabelSets};

/// How many rule names of one guest and direction get series of their own. A rule costs about 30 series, so a
/// file with a thousand rules must not become a page with thirty thousand lines.
pub const MAX_RULES: usize = 64;
/// The rule label that all rules after the first [`MAX_RULES`] share.
pub const OVERFLOW_RULE: &str = "_overflow";
/// Labels of one guest and direction at once, those of earlier configurations included.
const MAX_LABELS: usize = 2 * MAX_RULES;

/// Every family that has a `rule` label.
pub(super) struct RuleFamilies {
    opened: IntCounterVec,
    active: IntGaugeVec,
    refused: IntCounterVec,
    closed: IntCounterVec,
    dials: IntCounterVec,
    dial_failures: IntCounterVec,
    dial_duration: HistogramVec,
    upstream_bytes: IntCounterVec,
    rules: IntGaugeVec,
    known: Mutex<HashMap<Side, Known>>,
}

/// A guest, and which of its rules.
type Side = (Arc<str>, Direction);

/// The rules of a side that somebody holds.
#[derive(Default)]
struct Known {
    by_name: HashMap<String, Weak<RuleMetrics>>,
    /// How many rules use a label; those of [`OVERFLOW_RULE`] share it.
    labels: HashMap<String, usize>,
}

/// Counters of one rule of the configuration.
///
/// Rules past [`MAX_RULES`] hold the same counters and gauges as each other, so gauges are added to, never set.
#[derive(Debug)]
pub struct RuleMetrics {
    /// The rule's name in the configuration, also when its label is [`OVERFLOW_RULE`].
    pub name: String,
    /// Connections established.
    pub opened: IntCounter,
    /// Connections open now.
    pub active: IntGauge,
    /// Connections refused, indexed by the refuse reason.
    pub refused: Vec<IntCounter>,
    /// Connections ended, indexed by the close reason.
    pub closed: Vec<IntCounter>,
    /// Host-socket bytes, indexed by [`Direction`].
    pub upstream_bytes: [IntCounter; 2],
    /// Attempts to reach the target (outbound rules).
    pub dials: Option<IntCounter>,
    /// Failed attempts (outbound rules).
    pub dial_failures: Option<IntCounter>,
    /// Time of successful attempts in seconds (outbound rules).
    pub dial_duration: Option<Histogram>,
    /// Where they are exported; `None`: they are not, or not by this.
    series: Option<Series>,
}

impl RuleMetrics {
    /// Whether its counters are those of other rules, too.
    pub fn is_shared(&self) -> bool {
        self.series
            .as_ref()
            .is_some_and(|series| series.label == OVERFLOW_RULE)
    }
}

/// The exported series of a rule, which end with it.
struct Series {
    families: Arc<RuleFamilies>,
    side: Side,
    label: String,
    labels: LabelSets,
}

impl RuleFamilies {
    pub(super) fn register(to: &mut Registrar<'_>) -> prometheus::Result<Arc<RuleFamilies>> {
        Ok(Arc::new(RuleFamilies {
            opened: to.counters(
                "vsock_connections_opened_total",
                "Connections established; direction says who asked for them.",
                &["guest", "direction", "rule"],
            )?,
            active: to.gauges(
                "vsock_connections_active",
                "Connections that are established now.",
                &["guest", "direction", "rule"],
            )?,
            refused: to.counters(
                "vsock_connections_refused_total",
                "Connections that were asked for and not made, by reason.",
                &["guest", "direction", "rule", "reason"],
            )?,
            closed: to.counters(
                "vsock_connections_closed_total",
                "Established connections that ended, by reason.",
                &["guest", "direction", "rule", "reason"],
            )?,
            dials: to.counters(
                "vsock_tcp_dials_total",
                "Attempts to reach the target of an outbound rule.",
                &["guest", "rule"],
            )?,
            dial_failures: to.counters(
                "vsock_tcp_dial_failures_total",
                "Attempts to reach the target of an outbound rule that failed.",
                &["guest", "rule"],
            )?,
            dial_duration: to.histograms(
                "vsock_tcp_dial_duration_seconds",
                "Time to connect to the target of an outbound rule, name resolution included, successes only.",
                &["guest", "rule"],
                &[
                    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                ],
            )?,
            upstream_bytes: to.counters(
                "vsock_upstream_bytes_total",
                "Bytes written to and read from host sockets.",
                &["guest", "direction", "rule"],
            )?,
            rules: to.gauges(
                "vsock_rules",
                "Rules of the configuration.",
                &["guest", "direction"],
            )?,
            known: Mutex::default(),
        }))
    }

    /// The metrics of the rules of one side, in the order of `names`.
    pub(super) fn resolve(
        self: &Arc<RuleFamilies>,
        guest: &Arc<str>,
        direction: Direction,
        names: &[String],
        labels: &LabelSets,
    ) -> Vec<Arc<RuleMetrics>> {
        self.rules
            .with_label_values(&[guest.as_ref(), direction.label()])
            .set(i64::try_from(names.len()).unwrap_or(i64::MAX));
        let side = (Arc::clone(guest), direction);
        // Let go of below, when nothing is locked: the last holder of a rule locks.
        let mut not_taken = Vec::new();
        let mut all = self.lock();
        let known = all.entry(side.clone()).or_default();
        let resolved = names.iter().enumerate().map(|(index, name)| {
            let room = index < MAX_RULES && known.labels.len() < MAX_LABELS;
            if let Some(lives) = known.by_name.get(name).and_then(Weak::upgrade) {
                if !(lives.is_shared() && room) {
                    return lives;
                }
                not_taken.push(lives);
            }
            let label = if room { name.as_str() } else { OVERFLOW_RULE };
            *known.labels.entry(label.to_owned()).or_default() += 1;
            let series = Series {
                families: Arc::clone(self),
                side: side.clone(),
                label: label.to_owned(),
                labels: *labels,
            };
            let rule = Arc::new(self.rule(name, series));
            known.by_name.insert(name.clone(), Arc::downgrade(&rule));
            rule
        });
        let resolved = resolved.collect();
        // Without rules there is nobody whose end would do it.
        if known.labels.is_empty() && known.by_name.is_empty() {
            all.remove(&side);
        }
        drop(all);
        drop(not_taken);
        resolved
    }

    fn rule(&self, name: &str, series: Series) -> RuleMetrics {
        let (guest, direction) = (series.side.0.as_ref(), series.side.1);
        let (by, label) = (direction.label(), series.label.as_str());
        let reasons = |family: &IntCounterVec, reasons: &[&str]| {
            let counter = |reason: &&str| family.with_label_values(&[guest, by, label, reason]);
            reasons.iter().map(counter).collect()
        };
        let dials = direction == Direction::GuestToHost;
        RuleMetrics {
            name: name.to_owned(),
            opened: self.opened.with_label_values(&[guest, by, label]),
            active: self.active.with_label_values(&[guest, by, label]),
            refused: reasons(&self.refused, series.labels.refused),
            closed: reasons(&self.closed, series.labels.closed),
            upstream_bytes: Direction::LABELS
                .map(|direction| self.upstream_bytes.with_label_values(&[guest, direction, label])),
            dials: dials.then(|| self.dials.with_label_values(&[guest, label])),
            dial_failures: dials.then(|| self.dial_failures.with_label_values(&[guest, label])),
            dial_duration: dials.then(|| self.dial_duration.with_label_values(&[guest, label])),
            series: Some(series),
        }
    }

    /// Requests that match no rule are refused and nothing else: only that family gets a series with `rule=""`, so
    /// that no sum over rules shows a row without a name.
    pub(super) fn no_rule(&self, guest: &str, labels: &LabelSets) -> RuleMetrics {
        let unexported = || IntCounter::new("unexported", "Not exported.").expect("a valid name");
        let direction = Direction::GuestToHost.label();
        let refused = |reason: &&str| self.refused.with_label_values(&[guest, direction, "", reason]);
        RuleMetrics {
            name: String::new(),
            opened: unexported(),
            active: IntGauge::new("unexported", "Not exported.").expect("a valid name"),
            refused: labels.refused.iter().map(refused).collect(),
            closed: labels.closed.iter().map(|_| unexported()).collect(),
            upstream_bytes: Direction::LABELS.map(|_| unexported()),
            dials: None,
            dial_failures: None,
            dial_duration: None,
            series: None,
        }
    }

    /// Forgets what no rule is needed for. Rules end with their holders.
    pub(super) fn forget_guest(&self, guest: &str) {
        forget(&self.refused, &[("guest", guest), ("rule", "")]);
        forget(&self.rules, &[("guest", guest)]);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Side, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A rule has ended: so do its series, unless another one uses them.
    fn ended(&self, name: &str, series: &Series) {
        let (guest, direction) = (series.side.0.as_ref(), series.side.1);
        let label = series.label.as_str();
        // The lock is held while series go, so that nobody takes hold of one that is about to.
        let mut all = self.lock();
        let Some(known) = all.get_mut(&series.side) else {
            return;
        };
        if known
            .by_name
            .get(name)
            .is_some_and(|rule| rule.strong_count() == 0)
        {
            known.by_name.remove(name);
        }
        if let Some(users) = known.labels.get_mut(label) {
            *users = users.saturating_sub(1);
            if *users > 0 {
                return;
            }
        }
        known.labels.remove(label);
        if known.labels.is_empty() && known.by_name.is_empty() {
            all.remove(&series.side);
        }
        // Errors are series that were not there.
        let by = direction.label();
        let _ = self.opened.remove_label_values(&[guest, by, label]);
        let _ = self.active.remove_label_values(&[guest, by, label]);
        for reason in series.labels.refused {
            let _ = self.refused.remove_label_values(&[guest, by, label, reason]);
        }
        for reason in series.labels.closed {
            let _ = self.closed.remove_label_values(&[guest, by, label, reason]);
        }
        if direction == Direction::GuestToHost {
            let _ = self.dials.remove_label_values(&[guest, label]);
            let _ = self.dial_failures.remove_label_values(&[guest, label]);
            let _ = self.dial_duration.remove_label_values(&[guest, label]);
        }
        // An outbound and an inbound rule of one name share these.
        let shared = Direction::ALL.iter().any(|direction| {
            let side = (Arc::clone(&series.side.0), *direction);
            all.get(&side)
                .is_some_and(|known| known.labels.contains_key(label))
        });
        if !shared {
            for direction in Direction::LABELS {
                let _ = self
                    .upstream_bytes
                    .remove_label_values(&[guest, direction, label]);
            }
        }
    }
}

impl std::fmt::Debug for RuleFamilies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RuleFamilies").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Series {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Series")
            .field("label", &self.label)
            .finish_non_exhaustive()
    }
}

impl Drop for RuleMetrics {
    fn drop(&mut self) {
        if let Some(series) = self.series.take() {
            series.families.ended(&self.name, &series);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABELS: LabelSets = LabelSets {
        refused: &["no_rule"],
        closed: &["drain"],
        misbehavior: &[],
        ring_errors: &[],
    };

    /// Guests come and go with reloads, and most have no rules of one side.
    #[test]
    fn nothing_is_kept_of_a_guest_without_rules_nor_of_rules_that_have_ended() {
        let registry = prometheus::Registry::new();
        let families = RuleFamilies::register(&mut Registrar::new(&registry)).unwrap();
        for n in 0..1000 {
            let guest: Arc<str> = format!("guest{n}").into();
            for direction in Direction::ALL {
                let rules = families.resolve(&guest, direction, &["db".to_owned()], &LABELS);
                assert_eq!(rules.len(), 1);
                drop(rules);
                let none = families.resolve(&guest, direction, &[], &LABELS);
                assert!(none.is_empty());
            }
            families.forget_guest(&guest);
        }
        assert_eq!(families.lock().len(), 0);
        let series: usize = registry
            .gather()
            .iter()
            .map(|family| family.get_metric().len())
            .sum();
        assert_eq!(series, 0);
    }
}
