//! Rules for connections from the guest: what they match, and where they lead.

use std::ops::RangeInclusive;

use super::{Owner, Resolver, optional};
use crate::config::diagnostic::{did_you_mean, quoted};
use crate::config::document::NodeId;
use crate::config::given::Given;
use crate::config::values::{GuestPort, PortRange};
use crate::config::{Framing, HOST_CID, OutboundRule, ProxyProtocol, Target, schema};

/// What a rule matches.
#[derive(Clone)]
struct Match {
    cid: u32,
    ports: RangeInclusive<u32>,
}

impl Match {
    fn overlaps(&self, other: &Match) -> bool {
        self.cid == other.cid
            && self.ports.start() <= other.ports.end()
            && other.ports.start() <= self.ports.end()
    }

    /// The host's CID goes without saying.
    fn describe(&self) -> String {
        match self.cid {
            HOST_CID => describe_ports(&self.ports),
            cid => format!("{} of CID {cid}", describe_ports(&self.ports)),
        }
    }
}

impl Resolver<'_, '_> {
    pub(super) fn outbound_rules(
        &mut self,
        rules: &Given<Vec<Given<schema::Outbound>>>,
        owner: &Owner,
    ) -> Option<Vec<OutboundRule>> {
        let list = self.rule_list(rules)?;
        let mut matches: Vec<Option<Match>> = Vec::with_capacity(list.len());
        let mut ports = Vec::with_capacity(list.len());
        for rule in list {
            let of_rule = rule
                .located()
                .and_then(|(rule, at)| self.outbound_ports(rule, at));
            let cid = rule.value().and_then(|rule| self.addressed_cid(rule, owner));
            let matched = of_rule.clone().zip(cid).map(|(ports, cid)| Match { cid, ports });
            if let (Some(matched), Some((_, at))) = (&matched, rule.located()) {
                self.report_hidden(list, &matches, matched, at);
            }
            ports.push(of_rule);
            matches.push(matched);
        }
        let names = self.names(
            list,
            &ports,
            |rule| &rule.name,
            |ports| match ports {
                ports if ports.start() == ports.end() => format!("port-{}", ports.start()),
                ports => format!("ports-{}-{}", ports.start(), ports.end()),
            },
        );
        let resolved: Vec<_> = list
            .iter()
            .zip(ports.into_iter().zip(matches))
            .zip(names)
            .map(|((rule, (ports, matched)), name)| {
                let (rule, at) = rule.located()?;
                let target = self.target(rule, at, ports.as_ref(), owner);
                let proxy_protocol = self.proxy_protocol(rule);
                let framing = self.outbound_framing(rule, owner);
                let connections = self.rule_connections(&rule.connections, owner.connections);
                let matched = matched?;
                Some(OutboundRule {
                    name: name?,
                    ports: matched.ports,
                    cid: matched.cid,
                    target: target?,
                    proxy_protocol: proxy_protocol?,
                    framing: framing?,
                    connections: connections?,
                })
            })
            .collect();
        resolved.into_iter().collect()
    }

    fn outbound_ports(&mut self, rule: &schema::Outbound, at: NodeId) -> Option<RangeInclusive<u32>> {
        match (&rule.port, &rule.ports) {
            (Given::Absent, Given::Absent) => {
                self.missing(
                    at,
                    "port",
                    "name the guest's port: `port: 5432`, or a range: `ports: 8000-8099`",
                );
                None
            }
            (Given::Absent, ports) => ports.value().map(|PortRange(ports)| ports.clone()),
            (port, Given::Absent) => port.value().map(|GuestPort(port)| *port..=*port),
            (_, _) => {
                self.error(
                    at,
                    "`port` and `ports` exclude each other",
                    "keep `port` for one port, `ports` for a range",
                );
                None
            }
        }
    }

    /// The CID that the guest connects to when it means this rule. `None` where that hangs on what is reported elsewhere.
    fn addressed_cid(&mut self, rule: &schema::Outbound, owner: &Owner) -> Option<u32> {
        let cid = match &rule.cid {
            Given::Wrong => return None,
            Given::Right(cid, _) => cid.0,
            Given::Absent => match rule.to.value() {
                Some(Target::Guest { name, .. }) => return self.siblings.get(name).copied().flatten(),
                _ => return Some(HOST_CID),
            },
        };
        let (_, at) = rule.cid.located()?;
        if Some(cid) == owner.cid {
            let message = format!("{cid} is the guest's own CID: a connection to it never leaves the guest");
            self.error(at, message, "give 2 for the host, or the CID of another guest");
            return None;
        }
        let of_sibling = self.siblings.iter().find(|(_, sibling)| **sibling == Some(cid));
        if let Some((sibling, _)) = of_sibling
            && let Some(target) = rule.to.value()
            && !matches!(target, Target::Guest { name, .. } if name == sibling)
        {
            let message = format!(
                "CID {cid} is that of the guest {}, and this rule leads elsewhere",
                quoted(sibling)
            );
            let help = format!("write `to: guest://{sibling}`, unless the detour is meant");
            self.report.warning(self.document, at, message, help);
        }
        Some(cid)
    }

    /// Reports a rule all of whose matches belong to earlier ones, and warns of one for which a part does.
    fn report_hidden(
        &mut self,
        list: &[Given<schema::Outbound>],
        earlier: &[Option<Match>],
        matched: &Match,
        at: NodeId,
    ) {
        let mut overlapping: Vec<(&Match, &Given<schema::Outbound>)> = earlier
            .iter()
            .zip(list)
            .filter_map(|(earlier, rule)| Some((earlier.as_ref()?, rule)))
            .filter(|(earlier, _)| earlier.overlaps(matched))
            .collect();
        if overlapping.is_empty() {
            return;
        }
        let ports = &matched.ports;
        // One rule that takes everything says more than all that take a part.
        if let Some(whole) = overlapping
            .iter()
            .find(|(earlier, _)| earlier.ports.start() <= ports.start() && ports.end() <= earlier.ports.end())
        {
            overlapping = vec![*whole];
        }
        overlapping.sort_by_key(|(earlier, _)| *earlier.ports.start());
        let mut next = Some(*ports.start());
        for (earlier, _) in &overlapping {
            match next {
                Some(port) if *earlier.ports.start() <= port => {
                    next = Some(port.max(earlier.ports.end().saturating_add(1)));
                }
                _ => break,
            }
        }
        let hidden = next.is_some_and(|next| next > *ports.end());
        let rules = overlapping
            .iter()
            .take(3)
            .map(|(earlier, rule)| self.describe_rule(earlier, rule))
            .collect::<Vec<_>>();
        let more = if overlapping.len() > 3 {
            format!(" and {} more", overlapping.len() - 3)
        } else {
            String::new()
        };
        let by = format!("{}{more}", rules.join(", "));
        let what = matched.describe();
        if hidden {
            let message = format!("this rule is never used: {what} belongs to {by}");
            self.error(
                at,
                message,
                "the first rule that matches decides: move this rule up, or remove one of them",
            );
        } else {
            let message = format!("a part of {what} belongs to {by}");
            let help = "the first rule that matches decides: narrow a range if this is not meant";
            self.report.warning(self.document, at, message, help);
        }
    }

    fn describe_rule(&self, matched: &Match, rule: &Given<schema::Outbound>) -> String {
        let line = rule.located().map_or(0, |(_, at)| self.document.line(at));
        match rule.value().and_then(|rule| rule.name.value()) {
            Some(name) => format!(
                "the rule {} ({}) on line {line}",
                quoted(&name.0),
                matched.describe()
            ),
            None => format!("the rule for {} on line {line}", matched.describe()),
        }
    }

    fn target(
        &mut self,
        rule: &schema::Outbound,
        at: NodeId,
        ports: Option<&RangeInclusive<u32>>,
        owner: &Owner,
    ) -> Option<Target> {
        let target = self.required(&rule.to, at, "to", "to: tcp://postgres.shop.svc:5432")?;
        let Some((_, at)) = rule.to.located() else {
            return Some(target.clone());
        };
        if let Target::Guest { name, .. } = target {
            self.check_sibling(name, at, owner);
        }
        if let Some(ports) = ports {
            if let Err(refusal) = target.check_length(*ports.end(), owner.cid) {
                self.error(at, refusal.message, refusal.help);
            }
            self.check_offset(target, ports, at);
        }
        Some(target.clone())
    }

    /// Reports the name of a guest that cannot be a target.
    fn check_sibling(&mut self, name: &str, at: NodeId, owner: &Owner) {
        if owner.name.as_deref() == Some(name) {
            let message = format!("{} is the guest to which this rule belongs", quoted(name));
            let help = "inside a guest, CID 1 (VMADDR_CID_LOCAL) leads to the guest itself; it needs no rule";
            self.error(at, message, help);
        } else if !self.siblings.contains_key(name) {
            let mut others: Vec<&str> = self.siblings.keys().map(String::as_str).collect();
            others.retain(|other| Some(*other) != owner.name.as_deref());
            others.sort_unstable();
            let help = match (did_you_mean(name, &others), others.as_slice()) {
                (Some(meant), _) => format!("did you mean `guest://{meant}`?"),
                (None, []) => "this file has no other guest: both guests stand in one file".to_owned(),
                (None, [others @ .., last]) => {
                    let shown: Vec<String> = others.iter().take(5).map(|name| format!("`{name}`")).collect();
                    let more = if others.len() > 5 { ", …" } else { "" };
                    let and = if shown.is_empty() { "" } else { ", " };
                    format!(
                        "the other guests of this file are {}{more}{and}`{last}`",
                        shown.join(", ")
                    )
                }
            };
            self.error(
                at,
                format!("there is no guest {} in this file", quoted(name)),
                help,
            );
        }
    }

    /// Reports a range whose last port would lead past the last port of its target.
    fn check_offset(&mut self, target: &Target, ports: &RangeInclusive<u32>, at: NodeId) {
        let (port, most, kind) = match target {
            Target::Tcp { port, .. } => (u32::from(*port), u32::from(u16::MAX), "TCP"),
            Target::Vsock { port, .. } | Target::Guest { port: Some(port), .. } => {
                (*port, *GuestPort::RANGE.end(), "vsock")
            }
            Target::Unix { .. } | Target::Guest { port: None, .. } => return,
        };
        let last = u64::from(port) + u64::from(ports.end() - ports.start());
        if last > u64::from(most) {
            let message = format!("{} would reach up to {kind} port {last}", describe_ports(ports));
            let fits = most.saturating_sub(port).saturating_add(*ports.start());
            let help = format!(
                "{kind} ports end at {most}: end the range at {fits}, or begin at a lower {kind} port"
            );
            self.error(at, message, help);
        }
    }

    fn proxy_protocol(&mut self, rule: &schema::Outbound) -> Option<Option<ProxyProtocol>> {
        if let (Some((_, at)), Some(Target::Guest { .. })) = (rule.proxy_protocol.located(), rule.to.value())
        {
            let message = "a guest needs no header to learn who connects: it sees the CID and the port";
            self.error(at, message, "remove `proxyProtocol`");
        }
        optional(&rule.proxy_protocol)
    }

    fn outbound_framing(&mut self, rule: &schema::Outbound, owner: &Owner) -> Option<Option<Framing>> {
        let refused = match rule.to.value() {
            Some(Target::Tcp { .. }) | None => None,
            Some(Target::Unix { .. }) => Some((
                "a unix target is dialled with the guest's own type of socket, and keeps messages apart without frames",
                "remove `framing`; it belongs to tcp:// targets",
            )),
            Some(Target::Vsock { .. }) => Some((
                "AF_VSOCK targets are dialled for plain streams only",
                "remove `framing`; it belongs to tcp:// targets",
            )),
            Some(Target::Guest { .. }) => Some((
                "messages reach another guest with their boundaries, without frames",
                "remove `framing`; it belongs to tcp:// targets",
            )),
        };
        self.framing(&rule.framing, &rule.max_message, owner.buffer, refused)
    }
}

fn describe_ports(ports: &RangeInclusive<u32>) -> String {
    if ports.start() == ports.end() {
        format!("port {}", ports.start())
    } else {
        format!("ports {}-{}", ports.start(), ports.end())
    }
}
