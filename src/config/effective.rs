//! A checked configuration as YAML again, with every default filled in.

use super::given::Given;
use super::path::{Directory, SocketPath};
use super::schema;
use super::values::{
    AddressedCid, ByteSize, Cid, Connections, GuestPort, LogLevel, Name, PerSecond, Period, PortRange,
};
use super::{Config, Framing, Guest, InboundProtocol, InboundRule, ListenAddress, OutboundRule};

impl Config {
    /// The file that says this configuration with every key written out. Reading it gives an equal `Config`.
    pub fn to_yaml(&self) -> Result<String, serde_saphyr::SerializeError> {
        serde_saphyr::to_string(&schema::File::from(self))
    }
}

fn list<'a, T: 'a, S: From<&'a T>>(items: &'a [T]) -> Given<Vec<Given<S>>> {
    Given::new(items.iter().map(|item| Given::new(S::from(item))).collect())
}

fn connections(count: usize) -> Given<Connections> {
    Given::new(Connections(u32::try_from(count).unwrap_or(u32::MAX)))
}

/// `framing` and `maxMessage`.
fn framing(framing: Option<Framing>) -> (Given<schema::FramingKind>, Given<ByteSize>) {
    match framing {
        None => (Given::Absent, Given::Absent),
        Some(Framing { max_message }) => (
            Given::new(schema::FramingKind::LengthPrefixed),
            Given::new(ByteSize(max_message.into())),
        ),
    }
}

impl From<&Config> for schema::File {
    fn from(config: &Config) -> schema::File {
        let listen = config.admin.iter().cloned().map(Given::new).collect();
        schema::File {
            admin: Given::new(schema::Admin {
                listen: Given::new(listen),
            }),
            log: Given::new(schema::Log {
                format: Given::new(config.log.format),
                level: Given::new(LogLevel(config.log.level.clone())),
            }),
            drain: Given::new(schema::Drain {
                timeout: Given::new(Period(config.drain.timeout)),
                linger: Given::new(Period(config.drain.linger)),
            }),
            readiness: Given::new(schema::Readiness {
                require_session: Given::new(config.readiness.require_session),
            }),
            limits: Given::new(schema::SidecarLimits {
                connections: config.limits.connections.map_or(Given::Absent, connections),
                memory: (config.limits.memory).map_or(Given::Absent, |bytes| Given::new(ByteSize(bytes))),
            }),
            confinement: Given::new(schema::Confinement {
                no_new_privileges: Given::new(config.confinement.no_new_privileges),
                seccomp: Given::new(config.confinement.seccomp),
                landlock: Given::new(config.confinement.landlock),
                paths: Given::new(
                    (config.confinement.paths.iter())
                        .map(|path| Given::new(Directory(path.display().to_string())))
                        .collect(),
                ),
            }),
            guests: list(&config.guests),
        }
    }
}

impl From<&Guest> for schema::Guest {
    fn from(guest: &Guest) -> schema::Guest {
        let limits = &guest.limits;
        schema::Guest {
            name: Given::new(Name(guest.name.clone())),
            cid: Given::new(Cid(guest.cid)),
            vhost_user: Given::new(schema::VhostUser {
                socket: Given::new(SocketPath(guest.vhost_user.socket.display().to_string())),
                mode: Given::new(guest.vhost_user.mode),
                access_platform: Given::new(guest.vhost_user.access_platform),
            }),
            outbound: list(&guest.outbound),
            inbound: list(&guest.inbound),
            limits: Given::new(schema::Limits {
                connections: connections(limits.connections),
                connections_per_second: Given::new(PerSecond(limits.connections_per_second)),
                buffer: Given::new(ByteSize(limits.buffer.into())),
                memory: Given::new(ByteSize(limits.memory)),
                connect_timeout: Given::new(Period(limits.connect_timeout)),
                guest_timeout: Given::new(Period(limits.guest_timeout)),
                idle_timeout: Given::new(Period(limits.idle_timeout)),
                busy_poll: Given::new(Period(limits.busy_poll)),
            }),
        }
    }
}

impl From<&OutboundRule> for schema::Outbound {
    fn from(rule: &OutboundRule) -> schema::Outbound {
        let (port, ports) = if rule.ports.start() == rule.ports.end() {
            (Given::new(GuestPort(*rule.ports.start())), Given::Absent)
        } else {
            (Given::Absent, Given::new(PortRange(rule.ports.clone())))
        };
        let (framing, max_message) = framing(rule.framing);
        schema::Outbound {
            name: Given::new(Name(rule.name.clone())),
            cid: Given::new(AddressedCid(rule.cid)),
            port,
            ports,
            to: Given::new(rule.target.clone()),
            proxy_protocol: rule.proxy_protocol.map_or(Given::Absent, Given::new),
            framing,
            max_message,
            connections: rule.connections.map_or(Given::Absent, connections),
        }
    }
}

impl From<&InboundRule> for schema::Inbound {
    fn from(rule: &InboundRule) -> schema::Inbound {
        let (port, protocol) = match rule.protocol {
            InboundProtocol::Plain { port } => (Given::new(GuestPort(port)), Given::Absent),
            InboundProtocol::Connect => (Given::Absent, Given::new(schema::Protocol::Connect)),
        };
        let (framing, max_message) = framing(rule.framing);
        schema::Inbound {
            name: Given::new(Name(rule.name.clone())),
            listen: Given::new(rule.listen.clone()),
            allow: match rule.allow.is_empty() {
                true => Given::Absent,
                false => Given::new(rule.allow.iter().copied().map(Given::new).collect()),
            },
            port,
            protocol,
            wait_for_guest: Given::new(rule.wait_for_guest),
            socket_type: match rule.listen {
                ListenAddress::Unix(_) => Given::new(rule.socket_type),
                // There is no choice.
                ListenAddress::Tcp(_) | ListenAddress::Vsock(_) => Given::Absent,
            },
            framing,
            max_message,
            connections: rule.connections.map_or(Given::Absent, connections),
        }
    }
}
