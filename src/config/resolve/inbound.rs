//! Rules for connections to the guest.

use super::listeners::Families;
use super::{Owner, Resolver};
use crate::config::document::NodeId;
use crate::config::given::Given;
use crate::config::{Cidr, Framing, InboundProtocol, InboundRule, ListenAddress, SocketType, schema};

impl Resolver<'_, '_> {
    pub(super) fn inbound_rules(
        &mut self,
        rules: &Given<Vec<Given<schema::Inbound>>>,
        owner: &Owner,
    ) -> Option<Vec<InboundRule>> {
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
                    listen => self.listen(listen, Families::Own),
                };
                let allow = self.allowed(rule);
                let wait_for_guest = rule.wait_for_guest.value().copied();
                let socket_type = self.socket_type(rule, protocol);
                let framing = self.inbound_framing(rule, protocol, owner);
                let connections = self.rule_connections(&rule.connections, owner.connections);
                Some(InboundRule {
                    name: name?,
                    listen: listen?,
                    allow: allow?,
                    protocol: protocol?,
                    wait_for_guest: wait_for_guest?,
                    socket_type: socket_type?,
                    framing: framing?,
                    connections: connections?,
                })
            })
            .collect();
        resolved.into_iter().collect()
    }

    /// The type of the listener's socket, which only unix sockets have a choice of.
    fn socket_type(
        &mut self,
        rule: &schema::Inbound,
        protocol: Option<InboundProtocol>,
    ) -> Option<SocketType> {
        let Some((SocketType::Seqpacket, at)) = rule.socket_type.located() else {
            return rule.socket_type.value().copied();
        };
        let refused = match rule.listen.value() {
            Some(ListenAddress::Tcp(_)) => Some((
                "TCP is a stream of bytes",
                "for messages on TCP write `framing: length-prefixed` in place of `socketType`",
            )),
            Some(ListenAddress::Vsock(_)) => Some((
                "AF_VSOCK is listened on for streams only",
                "remove `socketType`, or listen on a unix socket",
            )),
            Some(ListenAddress::Unix(_)) | None => None,
        };
        let connect = (protocol == Some(InboundProtocol::Connect)).then_some((
            "`protocol: connect` is a line of text on a stream of bytes, and its guests take streams",
            "give the rule a `port`, or remove `socketType`",
        ));
        match refused.or(connect) {
            Some((message, help)) => {
                self.error(at, message, help);
                None
            }
            None => Some(SocketType::Seqpacket),
        }
    }

    fn inbound_framing(
        &mut self,
        rule: &schema::Inbound,
        protocol: Option<InboundProtocol>,
        owner: &Owner,
    ) -> Option<Option<Framing>> {
        let refused = if protocol == Some(InboundProtocol::Connect) {
            Some((
                "`protocol: connect` begins with a line of text, where a frame would have its length",
                "give the rule a `port`, or remove `framing`",
            ))
        } else if rule.socket_type.value() == Some(&SocketType::Seqpacket) {
            Some((
                "a socket of type seqpacket keeps the boundaries of messages without frames",
                "keep one of `socketType: seqpacket` and `framing`",
            ))
        } else if matches!(rule.listen.value(), Some(ListenAddress::Vsock(_))) {
            Some((
                "AF_VSOCK is listened on for plain streams only",
                "remove `framing`, or listen on TCP or on a unix socket",
            ))
        } else {
            None
        };
        self.framing(&rule.framing, &rule.max_message, owner.buffer, refused)
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
}
