//! From what the user wrote to what the program runs: values held against each other, and what follows from them
//! filled in. Every rule here reports and goes on.

use std::collections::{HashMap, HashSet};
use std::io::IsTerminal;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::diagnostic::{Report, quoted};
use super::document::{Document, NodeId};
use super::files::Socket;
use super::given::Given;
use super::listeners::TcpListeners;
use super::values::{ByteSize, Period};
use super::{
    Cidr, Config, Guest, InboundProtocol, InboundRule, Limits, ListenAddress, Log, LogFormat, OutboundRule,
    Target, VhostUser, schema,
};

/// The bounds of durations and sizes, which JSON Schema cannot express over text.
const MAX_DRAIN: Duration = Duration::from_secs(3600);
const MIN_TIMEOUT: Duration = Duration::from_millis(1);
/// VSOCK_DEFAULT_CONNECT_TIMEOUT of Linux (net/vmw_vsock/af_vsock.c), 2 * HZ.
const GUEST_GIVES_UP: Duration = Duration::from_secs(2);
const MAX_GUEST_TIMEOUT: Duration = Duration::from_secs(3600);
const MAX_IDLE_TIMEOUT: Duration = Duration::from_secs(720 * 3600);
const BUFFER: RangeInclusive<u64> = 4 * 1024..=16 * 1024 * 1024;

/// The outcome: a configuration unless something is in the report, and what to ask the file system.
pub(super) struct Resolved {
    pub(super) config: Option<Config>,
    pub(super) sockets: Vec<Socket>,
}

pub(super) fn resolve(file: &Given<schema::File>, document: &Document, report: &mut Report<'_>) -> Resolved {
    let mut resolver = Resolver {
        document,
        report,
        tcp: TcpListeners::default(),
        unix: HashMap::new(),
        sockets: Vec::new(),
        names: HashMap::new(),
        cids: HashMap::new(),
    };
    let config = file.located().and_then(|(file, at)| resolver.file(file, at));
    let sockets = resolver.sockets;
    // A rule that reported a mistake may still have made a value to go on with.
    Resolved {
        config: config.filter(|_| !report.has_errors()),
        sockets,
    }
}

/// What the rules need to know of what came before, over the whole file.
struct Resolver<'a, 't> {
    document: &'a Document,
    report: &'a mut Report<'t>,
    tcp: TcpListeners,
    /// Unix sockets that are listened on or belong to a VMM, by path without `.` and doubled `/`.
    unix: HashMap<PathBuf, NodeId>,
    sockets: Vec<Socket>,
    names: HashMap<String, NodeId>,
    cids: HashMap<u32, NodeId>,
}

impl Resolver<'_, '_> {
    fn file(&mut self, file: &schema::File, at: NodeId) -> Option<Config> {
        let admin = file.admin.value().and_then(|admin| self.admin(admin));
        let log = file.log.value().and_then(log);
        let drain_timeout = file
            .drain
            .value()
            .and_then(|drain| self.bounded(&drain.timeout, Duration::ZERO..=MAX_DRAIN, "the drain period"));
        let guests = self.guests(&file.guests, at);
        Some(Config {
            admin: admin?,
            log: log?,
            drain_timeout: drain_timeout?,
            guests: guests?,
        })
    }

    fn admin(&mut self, admin: &schema::Admin) -> Option<Vec<ListenAddress>> {
        let listen = admin.listen.value()?;
        let addresses: Vec<_> = listen.iter().map(|listen| self.listen(listen)).collect();
        addresses.into_iter().collect()
    }

    fn guests(&mut self, guests: &Given<Vec<Given<schema::Guest>>>, file: NodeId) -> Option<Vec<Guest>> {
        let list = self.required(
            guests,
            file,
            "guests",
            "guests: [{name: web, cid: 3, vhostUser: {socket: /run/web.sock}}]",
        )?;
        if let Some((_, at)) = guests.located() {
            if list.is_empty() {
                self.error(at, "there is no guest", "at least one guest is needed");
            }
            if list.len() > schema::MAX_GUESTS {
                let message = format!("{} guests are more than {}", list.len(), schema::MAX_GUESTS);
                self.error(at, message, "split them over several sidecars");
                return None;
            }
        }
        let guests: Vec<_> = list
            .iter()
            .map(|guest| {
                let (guest, at) = guest.located()?;
                self.guest(guest, at)
            })
            .collect();
        guests.into_iter().collect()
    }

    fn guest(&mut self, guest: &schema::Guest, at: NodeId) -> Option<Guest> {
        let name = self
            .required(&guest.name, at, "name", "name: web")
            .map(|name| name.0.clone());
        if let (Some(name), Some((_, at))) = (&name, guest.name.located())
            && let Some(first) = insert_first(&mut self.names, name.clone(), at)
        {
            let message = format!(
                "the name {} belongs to the guest on line {}",
                quoted(name),
                self.document.line(first)
            );
            self.error(at, message, "give each guest a name of its own");
        }
        let cid = self.required(&guest.cid, at, "cid", "cid: 3").map(|cid| cid.0);
        if let (Some(cid), Some((_, at))) = (cid, guest.cid.located())
            && let Some(first) = insert_first(&mut self.cids, cid, at)
        {
            let message = format!(
                "the CID {cid} belongs to the guest on line {}",
                self.document.line(first)
            );
            self.error(at, message, "give each guest a CID of its own");
        }
        let vhost_user = self
            .required(
                &guest.vhost_user,
                at,
                "vhostUser",
                "vhostUser: {socket: /run/web.sock}",
            )
            .and_then(|vhost_user| self.vhost_user(vhost_user, guest.vhost_user.located()?.1));
        let outbound = self.outbound_rules(&guest.outbound, cid);
        let inbound = self.inbound_rules(&guest.inbound);
        let limits = guest.limits.value().and_then(|limits| self.limits(limits));

        let has_no_rules = |rules: Option<usize>| rules == Some(0);
        if has_no_rules(guest.outbound.value().map(Vec::len))
            && has_no_rules(guest.inbound.value().map(Vec::len))
        {
            let help = "add rules under `outbound` or `inbound`";
            self.report.warning(
                self.document,
                at,
                "this guest has no rules: it can reach nothing and nothing reaches it",
                help,
            );
        }
        Some(Guest {
            name: name?,
            cid: cid?,
            vhost_user: vhost_user?,
            outbound: outbound?,
            inbound: inbound?,
            limits: limits?,
        })
    }

    fn vhost_user(&mut self, vhost_user: &schema::VhostUser, at: NodeId) -> Option<VhostUser> {
        let socket = self
            .required(&vhost_user.socket, at, "socket", "socket: /run/web.sock")
            .map(|path| PathBuf::from(&path.0));
        if let (Some(socket), Some((_, at))) = (&socket, vhost_user.socket.located()) {
            self.claim_unix(socket, at);
        }
        Some(VhostUser {
            socket: socket?,
            mode: *vhost_user.mode.value()?,
            access_platform: *vhost_user.access_platform.value()?,
        })
    }

    fn outbound_rules(
        &mut self,
        rules: &Given<Vec<Given<schema::Outbound>>>,
        cid: Option<u32>,
    ) -> Option<Vec<OutboundRule>> {
        let list = self.rule_list(rules)?;
        let mut ports: Vec<Option<RangeInclusive<u32>>> = Vec::with_capacity(list.len());
        for rule in list {
            let range = rule
                .located()
                .and_then(|(rule, at)| self.outbound_ports(rule, at));
            if let (Some(range), Some((_, at))) = (&range, rule.located()) {
                self.report_hidden(list, &ports, range, at);
            }
            ports.push(range);
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
            .zip(ports)
            .zip(names)
            .map(|((rule, ports), name)| {
                let (rule, at) = rule.located()?;
                let target = self.target(rule, at, ports.as_ref(), cid);
                let proxy_protocol = optional(&rule.proxy_protocol);
                Some(OutboundRule {
                    name: name?,
                    ports: ports?,
                    cid: super::HOST_CID,
                    target: target?,
                    proxy_protocol: proxy_protocol?,
                    framing: None,
                    connections: None,
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
            (Given::Absent, ports) => ports.value().map(|ports| ports.0.clone()),
            (port, Given::Absent) => port.value().map(|port| port.0..=port.0),
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

    /// Reports a rule whose ports all belong to earlier ones, and warns of one whose ports partly do.
    fn report_hidden(
        &mut self,
        list: &[Given<schema::Outbound>],
        earlier: &[Option<RangeInclusive<u32>>],
        ports: &RangeInclusive<u32>,
        at: NodeId,
    ) {
        let mut overlapping: Vec<(&RangeInclusive<u32>, &Given<schema::Outbound>)> = earlier
            .iter()
            .zip(list)
            .filter_map(|(range, rule)| Some((range.as_ref()?, rule)))
            .filter(|(range, _)| range.start() <= ports.end() && ports.start() <= range.end())
            .collect();
        if overlapping.is_empty() {
            return;
        }
        // One rule that takes everything says more than all that take a part.
        if let Some(whole) = overlapping
            .iter()
            .find(|(range, _)| range.start() <= ports.start() && ports.end() <= range.end())
        {
            overlapping = vec![*whole];
        }
        overlapping.sort_by_key(|(range, _)| *range.start());
        let mut next = Some(*ports.start());
        for (range, _) in &overlapping {
            match next {
                Some(port) if *range.start() <= port => next = Some(port.max(range.end().saturating_add(1))),
                _ => break,
            }
        }
        let hidden = next.is_some_and(|next| next > *ports.end());
        let rules = overlapping
            .iter()
            .take(3)
            .map(|(range, rule)| self.describe_rule(range, rule))
            .collect::<Vec<_>>();
        let more = if overlapping.len() > 3 {
            format!(" and {} more", overlapping.len() - 3)
        } else {
            String::new()
        };
        let by = format!("{}{more}", rules.join(", "));
        if hidden {
            let what = describe_ports(ports);
            let message = format!("this rule is never used: {what} belongs to {by}");
            self.error(
                at,
                message,
                "the first rule that matches decides: move this rule up, or remove one of them",
            );
        } else {
            let what = describe_ports(ports);
            let message = format!("a part of {what} belongs to {by}");
            let help = "the first rule that matches decides: narrow a range if this is not meant";
            self.report.warning(self.document, at, message, help);
        }
    }

    fn describe_rule(&self, ports: &RangeInclusive<u32>, rule: &Given<schema::Outbound>) -> String {
        let line = rule.located().map_or(0, |(_, at)| self.document.line(at));
        match rule.value().and_then(|rule| rule.name.value()) {
            Some(name) => format!(
                "the rule {} ({}) on line {line}",
                quoted(&name.0),
                describe_ports(ports)
            ),
            None => format!("the rule for {} on line {line}", describe_ports(ports)),
        }
    }

    fn target(
        &mut self,
        rule: &schema::Outbound,
        at: NodeId,
        ports: Option<&RangeInclusive<u32>>,
        cid: Option<u32>,
    ) -> Option<Target> {
        let target = self.required(&rule.to, at, "to", "to: tcp://postgres.shop.svc:5432")?;
        let (Some(ports), Some((_, at))) = (ports, rule.to.located()) else {
            return Some(target.clone());
        };
        if let Err(refusal) = target.check_length(*ports.end(), cid) {
            self.error(at, refusal.message, refusal.help);
        }
        if let Target::Tcp { port, .. } = target {
            let last = u64::from(*port) + u64::from(ports.end() - ports.start());
            if last > u64::from(u16::MAX) {
                let message = format!("{} would reach up to TCP port {last}", describe_ports(ports));
                let fits = u32::from(u16::MAX - port).saturating_add(*ports.start());
                let help =
                    format!("TCP ports end at 65535: end the range at {fits}, or begin at a lower TCP port");
                self.error(at, message, help);
            }
        }
        Some(target.clone())
    }

    fn inbound_rules(&mut self, rules: &Given<Vec<Given<schema::Inbound>>>) -> Option<Vec<InboundRule>> {
        let list = self.rule_list(rules)?;
        let protocols: Vec<_> = list
            .iter()
            .map(|rule| {
                let (rule, at) = rule.located()?;
                self.inbound_protocol(rule, at)
            })
            .collect();
        let names = self.names(
            list,
            &protocols,
            |rule| &rule.name,
            |protocol| match protocol {
                InboundProtocol::Plain { port } => format!("port-{port}"),
                InboundProtocol::Connect => "connect".to_owned(),
            },
        );
        let resolved: Vec<_> = list
            .iter()
            .zip(protocols)
            .zip(names)
            .map(|((rule, protocol), name)| {
                let (rule, at) = rule.located()?;
                let listen = match &rule.listen {
                    Given::Absent => {
                        self.missing(at, "listen", "for example `listen: tcp://0.0.0.0:2222`");
                        None
                    }
                    listen => self.listen(listen),
                };
                let allow = self.allowed(rule);
                let wait_for_guest = rule.wait_for_guest.value().copied();
                Some(InboundRule {
                    name: name?,
                    listen: listen?,
                    allow: allow?,
                    protocol: protocol?,
                    wait_for_guest: wait_for_guest?,
                    socket_type: super::SocketType::Stream,
                    framing: None,
                    connections: None,
                })
            })
            .collect();
        resolved.into_iter().collect()
    }

    /// Who may connect to the listener of a rule.
    fn allowed(&mut self, rule: &schema::Inbound) -> Option<Vec<Cidr>> {
        let Some((list, at)) = rule.allow.located() else {
            return rule.allow.is_absent().then(Vec::new);
        };
        let ranges: Option<Vec<Cidr>> = list.iter().map(|range| range.value().copied()).collect();
        if let (Some(listen), Some(ranges)) = (rule.listen.value(), &ranges)
            && let Err(refusal) = Cidr::check_list(ranges, listen)
        {
            self.error(at, refusal.message, refusal.help);
        }
        ranges
    }

    fn inbound_protocol(&mut self, rule: &schema::Inbound, at: NodeId) -> Option<InboundProtocol> {
        match (&rule.port, &rule.protocol) {
            (Given::Absent, Given::Absent) => {
                let help =
                    "name the port in the guest: `port: 22`; or let clients name it: `protocol: connect`";
                self.missing(at, "port", help);
                None
            }
            (Given::Absent, protocol) => protocol
                .value()
                .map(|schema::Protocol::Connect| InboundProtocol::Connect),
            (port, Given::Absent) => port.value().map(|port| InboundProtocol::Plain { port: port.0 }),
            (_, _) => {
                let help = "with `protocol: connect` the client names the port: remove one of the two";
                self.error(at, "`port` and `protocol: connect` exclude each other", help);
                None
            }
        }
    }

    fn limits(&mut self, limits: &schema::Limits) -> Option<Limits> {
        let connections = limits.connections.value().map(|count| count.0);
        let buffer = self.buffer(&limits.buffer);
        let connect_timeout = self.connect_timeout(&limits.connect_timeout);
        let guest_timeout = self.bounded(
            &limits.guest_timeout,
            MIN_TIMEOUT..=MAX_GUEST_TIMEOUT,
            "the time for the guest to accept",
        );
        let idle_timeout = self.bounded(
            &limits.idle_timeout,
            Duration::ZERO..=MAX_IDLE_TIMEOUT,
            "the idle time",
        );
        Some(Limits {
            connections: usize::try_from(connections?).ok()?,
            buffer: buffer?,
            connect_timeout: connect_timeout?,
            guest_timeout: guest_timeout?,
            idle_timeout: idle_timeout?,
        })
    }

    fn buffer(&mut self, buffer: &Given<ByteSize>) -> Option<u32> {
        let size = buffer.value()?.0;
        if let Some((size, at)) = buffer.located()
            && !BUFFER.contains(&size.0)
        {
            let message = format!("{size} is no usable size of a buffer");
            self.error(at, message, "give a size from 4KiB to 16MiB");
        }
        u32::try_from(size).ok()
    }

    fn connect_timeout(&mut self, timeout: &Given<Period>) -> Option<Duration> {
        if let Some((period, at)) = timeout.located()
            && period.0 >= GUEST_GIVES_UP
        {
            let message = format!("{period} is too long: a guest's connect() gives up after 2s");
            self.error(
                at,
                message,
                "give less than 2s, such as 1500ms, so that the guest learns the reason",
            );
            return None;
        }
        self.bounded(
            timeout,
            MIN_TIMEOUT..=GUEST_GIVES_UP,
            "the time to reach a target",
        )
    }

    fn bounded(
        &mut self,
        given: &Given<Period>,
        bounds: RangeInclusive<Duration>,
        what: &str,
    ) -> Option<Duration> {
        if let Some((period, at)) = given.located()
            && !bounds.contains(&period.0)
        {
            let message = format!("{period} is out of range for {what}");
            let help = format!(
                "give a duration from {} to {}",
                Period(*bounds.start()),
                Period(*bounds.end())
            );
            self.error(at, message, help);
        }
        given.value().map(|period| period.0)
    }

    /// A listener of the admin server or of an inbound rule, which no other may be in the way of.
    fn listen(&mut self, listen: &Given<ListenAddress>) -> Option<ListenAddress> {
        let (address, at) = listen.located()?;
        match address {
            ListenAddress::Tcp(tcp) => {
                if let Some((other, first)) = self.tcp.insert(*tcp, at) {
                    let line = self.document.line(first);
                    let message = if other == *tcp {
                        format!("tcp://{tcp} is listened on already, on line {line}")
                    } else {
                        format!("tcp://{tcp} and tcp://{other} on line {line} take the same port")
                    };
                    self.error(at, message, "give each listener an address of its own");
                }
            }
            ListenAddress::Unix(path) => self.claim_unix(path, at),
            ListenAddress::Vsock(_) => {}
        }
        Some(address.clone())
    }

    fn claim_unix(&mut self, path: &Path, at: NodeId) {
        self.sockets.push(Socket {
            path: path.to_owned(),
            at,
        });
        // `components` leaves out `.` and doubled slashes; links are for `files` to see.
        if let Some(first) = insert_first(&mut self.unix, path.components().collect(), at) {
            let message = format!(
                "the socket {} is in use on line {}",
                quoted(&path.display().to_string()),
                self.document.line(first)
            );
            self.error(at, message, "give each socket a path of its own");
        }
    }

    fn rule_list<'g, R>(&mut self, rules: &'g Given<Vec<Given<R>>>) -> Option<&'g [Given<R>]> {
        let list = rules.value()?;
        if let Some((_, at)) = rules.located()
            && list.len() > schema::MAX_RULES
        {
            let message = format!("{} rules are more than {}", list.len(), schema::MAX_RULES);
            self.error(
                at,
                message,
                "join rules to ranges of ports, or split the guest's services",
            );
            return None;
        }
        Some(list)
    }

    /// The names of a list of rules: those given, which must differ, and for the rest one made of `basis`.
    fn names<R, B>(
        &mut self,
        list: &[Given<R>],
        bases: &[Option<B>],
        given: impl Fn(&R) -> &Given<super::values::Name>,
        default: impl Fn(&B) -> String,
    ) -> Vec<Option<String>> {
        let mut taken: HashMap<String, NodeId> = HashMap::new();
        for rule in list {
            let Some((name, at)) = rule.value().and_then(|rule| given(rule).located()) else {
                continue;
            };
            if let Some(first) = insert_first(&mut taken, name.0.clone(), at) {
                let message = format!(
                    "the name {} belongs to the rule on line {}",
                    quoted(&name.0),
                    self.document.line(first)
                );
                self.error(at, message, "give each rule of this list a name of its own");
            }
        }
        let mut used: HashSet<String> = taken.into_keys().collect();
        // Two listeners may lead to one port: the later ones count on.
        let mut counts: HashMap<String, u32> = HashMap::new();
        list.iter()
            .zip(bases)
            .map(|(rule, basis)| match given(rule.value()?) {
                Given::Right(name, _) => Some(name.0.clone()),
                Given::Wrong => None,
                Given::Absent => {
                    let base = default(basis.as_ref()?);
                    let count = counts.entry(base.clone()).or_insert(0);
                    loop {
                        *count += 1;
                        let name = if *count == 1 {
                            base.clone()
                        } else {
                            format!("{base}-{count}")
                        };
                        if used.insert(name.clone()) {
                            return Some(name);
                        }
                    }
                }
            })
            .collect()
    }

    fn required<'g, T>(
        &mut self,
        given: &'g Given<T>,
        parent: NodeId,
        key: &str,
        example: &str,
    ) -> Option<&'g T> {
        if given.is_absent() {
            self.missing(parent, key, &format!("for example `{example}`"));
        }
        given.value()
    }

    fn missing(&mut self, parent: NodeId, key: &str, help: &str) {
        let path = self.document.path_of_key(parent, key);
        self.report.error_at(
            self.document.span(parent),
            path,
            format!("the key `{key}` is missing"),
            help,
        );
    }

    fn error(&mut self, at: NodeId, message: impl Into<String>, help: impl Into<String>) {
        self.report.error(self.document, at, message, help);
    }
}

/// What stands under a key that may be left out; `None` when it cannot be read.
fn optional<T: Copy>(given: &Given<T>) -> Option<Option<T>> {
    match given {
        Given::Absent => Some(None),
        Given::Wrong => None,
        Given::Right(value, _) => Some(Some(*value)),
    }
}

fn log(log: &schema::Log) -> Option<Log> {
    let format = match &log.format {
        Given::Absent if std::io::stderr().is_terminal() => LogFormat::Text,
        Given::Absent => LogFormat::Json,
        format => *format.value()?,
    };
    Some(Log {
        format,
        level: log.level.value()?.0.clone(),
    })
}

fn describe_ports(ports: &RangeInclusive<u32>) -> String {
    if ports.start() == ports.end() {
        format!("port {}", ports.start())
    } else {
        format!("ports {}-{}", ports.start(), ports.end())
    }
}

/// Records `at` under `key`, unless the key is taken; then by what.
fn insert_first<K: std::hash::Hash + Eq>(map: &mut HashMap<K, NodeId>, key: K, at: NodeId) -> Option<NodeId> {
    match map.entry(key) {
        std::collections::hash_map::Entry::Occupied(first) => Some(*first.get()),
        std::collections::hash_map::Entry::Vacant(vacant) => {
            vacant.insert(at);
            None
        }
    }
}
