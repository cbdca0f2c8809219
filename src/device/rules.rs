//! The rules of a guest, as the guest's requests find them and as connections know them.
//!
//! A connection holds the [`Rule`] that let it in, so that it counts, and is bounded, and is named in the log, by that rule for
//! as long as it lives, whatever becomes of the configuration. A table of them ([`Rules`]) is replaced as a whole, between two
//! turns of the device. A rule that keeps its name keeps what is held against it: its counters, and its connections.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::{InboundRule, OutboundRule};
use crate::metrics::{Direction, GuestMetrics, RuleMetrics};
use crate::quota::Pool;
use crate::vsock::Cid;

/// How the names of what stands for another guest begin. No rule of a configuration can have a name with a colon.
const SIBLING: &str = "guest://";

/// Tells rules apart, of whatever guest and configuration; a rule that keeps its name keeps its number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct RuleId(u64);

impl RuleId {
    pub(super) fn new() -> RuleId {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        RuleId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What allows a connection: a rule of the configuration, or that a sibling may dial this guest.
#[derive(Debug)]
pub struct Rule {
    pub(super) id: RuleId,
    /// Who asks for its connections: outbound rules serve the guest, inbound rules the host side.
    pub(super) opened_by: Direction,
    /// What it counts.
    pub(super) metrics: Arc<RuleMetrics>,
    /// Connections at once, bounded where the rule says so.
    pub(super) places: Arc<Pool>,
    /// Whether it stands for another guest, which may dial this one.
    pub(super) is_sibling: bool,
}

impl Rule {
    /// A rule that no configuration had before.
    pub fn new(opened_by: Direction, metrics: Arc<RuleMetrics>) -> Arc<Rule> {
        Arc::new(Rule {
            id: RuleId::new(),
            opened_by,
            is_sibling: metrics.name.starts_with(SIBLING),
            metrics,
            places: Pool::new(None),
        })
    }

    /// The same rule of a later configuration. It counts into `metrics`, which are other ones only if its label has changed.
    fn again(&self, metrics: Arc<RuleMetrics>) -> Arc<Rule> {
        Arc::new(Rule {
            id: self.id,
            opened_by: self.opened_by,
            metrics,
            places: Arc::clone(&self.places),
            is_sibling: self.is_sibling,
        })
    }

    /// What it counts.
    pub fn metrics(&self) -> &RuleMetrics {
        &self.metrics
    }

    /// Its name, for the log.
    pub(super) fn name(&self) -> &str {
        &self.metrics.name
    }
}

/// The rules of one guest: what its requests are held against, and what clients come by.
#[derive(Debug)]
pub struct Rules {
    /// First match wins.
    outbound: Vec<(OutboundRule, Arc<Rule>)>,
    inbound: Vec<(Option<usize>, Arc<Rule>)>,
    /// By name, the guests that may dial this one.
    callers: HashMap<String, Arc<Rule>>,
    /// Stands for requests that no rule matches.
    no_rule: Arc<Rule>,
}

impl Rules {
    /// The rules of a configuration, and the names of the guests that may dial this one; they count into `metrics`. What `before`
    /// has under the same name goes on.
    pub fn new(
        outbound: &[OutboundRule],
        inbound: &[InboundRule],
        callers: &[String],
        metrics: &GuestMetrics,
        before: Option<&Rules>,
    ) -> Rules {
        let of_guest: Vec<String> = outbound.iter().map(|rule| rule.name.clone()).collect();
        let siblings = callers.iter().map(|caller| format!("{SIBLING}{caller}"));
        let of_host: Vec<String> = (inbound.iter().map(|rule| rule.name.clone()))
            .chain(siblings)
            .collect();
        let known: HashMap<(Direction, &str), &Rule> = before
            .iter()
            .flat_map(|before| before.iter())
            .map(|rule| ((rule.opened_by, rule.name()), rule))
            .collect();
        let rule = |direction: Direction, metrics: Arc<RuleMetrics>| {
            let before = known.get(&(direction, metrics.name.as_str()));
            match before {
                Some(before) => before.again(metrics),
                None => Rule::new(direction, metrics),
            }
        };
        let outbound = (outbound.iter()).zip(metrics.rules(Direction::GuestToHost, &of_guest));
        let mut of_host = metrics.rules(Direction::HostToGuest, &of_host).into_iter();
        let mut next_inbound = || Some(rule(Direction::HostToGuest, of_host.next()?));
        Rules {
            outbound: outbound
                .map(|(config, metrics)| (config.clone(), rule(Direction::GuestToHost, metrics)))
                .collect(),
            inbound: (inbound.iter())
                .filter_map(|config| Some((config.connections, next_inbound()?)))
                .collect(),
            callers: (callers.iter())
                .filter_map(|caller| Some((caller.clone(), next_inbound()?)))
                .collect(),
            no_rule: match before {
                Some(before) => Arc::clone(&before.no_rule),
                None => Rule::new(Direction::GuestToHost, Arc::clone(&metrics.no_rule)),
            },
        }
    }

    /// The rule at a position of the guest's outbound rules.
    pub fn outbound(&self, index: usize) -> Option<&Arc<Rule>> {
        self.outbound.get(index).map(|(_, rule)| rule)
    }

    /// The rule at a position of the guest's inbound rules.
    pub fn inbound(&self, index: usize) -> Option<&Arc<Rule>> {
        self.inbound.get(index).map(|(_, rule)| rule)
    }

    /// What allows other guests to dial this one, by their names.
    pub fn callers(&self) -> &HashMap<String, Arc<Rule>> {
        &self.callers
    }

    /// The rule for an address.
    pub(super) fn route(&self, cid: Cid, port: u32) -> Option<(&OutboundRule, &Arc<Rule>)> {
        self.outbound
            .iter()
            .find(|(rule, _)| Cid(u64::from(rule.cid)) == cid && rule.ports.contains(&port))
            .map(|(config, rule)| (config, rule))
    }

    /// What stands for requests that no rule matches.
    pub(super) fn no_rule(&self) -> &Arc<Rule> {
        &self.no_rule
    }

    /// From now on these rules bound what they let in, with what is in already held against them.
    pub(super) fn come_into_force(&self) {
        let outbound = self.outbound.iter().map(|(rule, own)| (rule.connections, own));
        let inbound = self.inbound.iter().map(|(connections, own)| (*connections, own));
        for (connections, rule) in outbound.chain(inbound) {
            rule.places.set_limit(connections.map(|count| count as u64));
        }
    }

    /// Every rule but the one that stands for none.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Rule> {
        let outbound = self.outbound.iter().map(|(_, rule)| rule);
        let inbound = self.inbound.iter().map(|(_, rule)| rule);
        let rules = outbound.chain(inbound).chain(self.callers.values());
        rules.map(Arc::as_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Target, parse};
    use crate::metrics::LabelSets;
    use crate::quota::Share;

    const LABELS: LabelSets = LabelSets {
        refused: &["no_rule"],
        closed: &["drain"],
        misbehavior: &[],
        ring_errors: &[],
    };

    fn outbound(rules: &str) -> Vec<OutboundRule> {
        let text = format!(
            "guests: [{{name: web, cid: 3, vhostUser: {{socket: /run/web.sock}}, outbound: [{rules}]}}]\n"
        );
        let (mut config, _) = parse(&text, "test").unwrap();
        config.guests.remove(0).outbound
    }

    #[test]
    fn the_first_match_wins() {
        let rules = outbound("{port: 10, to: \"tcp://h:1\"}, {ports: 5-20, to: \"tcp://h:100\"}");
        let rules = Rules::new(&rules, &[], &[], &GuestMetrics::detached(&LABELS), None);
        let route = |cid, port| {
            rules.route(cid, port).map(|(rule, _)| match rule.target {
                Target::Tcp { port, .. } => port,
                _ => 0,
            })
        };
        assert_eq!(route(Cid::HOST, 10), Some(1));
        assert_eq!(route(Cid::HOST, 11), Some(100));
        assert_eq!(route(Cid::HOST, 21), None);
        assert_eq!(route(Cid(3), 10), None, "another guest's port");
        // The upper 32 bits are reserved: they make it another address, not this one.
        assert_eq!(route(Cid(2 | 1 << 32), 10), None);
    }

    /// What is in counts against the bound that comes later, also if it is lower than what is in.
    #[test]
    fn a_rule_that_keeps_its_name_keeps_its_connections_and_counters() {
        let metrics = GuestMetrics::detached(&LABELS);
        let db = |more: &str| outbound(&format!("{{name: db, port: 1, to: \"tcp://h:1\"{more}}}"));
        let before = Rules::new(&db(""), &[], &[], &metrics, None);
        before.come_into_force();
        let rule = Arc::clone(before.outbound(0).unwrap());
        rule.metrics().opened.inc_by(2);
        let places = [(); 2].map(|()| Share::take(&rule.places, 1).unwrap());

        let after = Rules::new(&db(", connections: 1"), &[], &[], &metrics, Some(&before));
        assert!(Share::take(&rule.places, 1).is_some(), "not in force yet");
        after.come_into_force();
        let kept = Arc::clone(after.outbound(0).unwrap());
        assert_eq!(kept.id, rule.id);
        assert_eq!(kept.metrics().opened.get(), 2);
        let [first, second] = places;
        for place in [first, second] {
            assert!(Share::take(&kept.places, 1).is_none());
            drop(place);
        }
        assert!(Share::take(&kept.places, 1).is_some());

        let renamed = outbound("{name: other, port: 1, to: \"tcp://h:1\"}");
        let renamed = Rules::new(&renamed, &[], &[], &metrics, Some(&after));
        assert_ne!(renamed.outbound(0).unwrap().id, rule.id);
        assert_eq!(renamed.outbound(0).unwrap().metrics().opened.get(), 0);
    }
}
