//! `tcp://`, `unix://`, `vsock://` and `guest://` addresses: where to listen, and what to connect to.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Deserializer;
use serde::{Deserialize, Serialize, Serializer};

use super::diagnostic::quoted;
use super::given::Refusal;
use super::path::{check_no_braces, check_path, check_path_length};
use super::values::{GuestPort, Name, Number, Text, digits, scalar_schema, text_serde};
use super::{ListenAddress, Target};

/// Patterns of the JSON Schema: at least what the parser accepts, and as little more as stays readable.
const IP_PATTERN: &str = r"([0-9]{1,3}(\.[0-9]{1,3}){3}|\[[0-9A-Fa-f:.]+\])";
const PORT_PATTERN: &str =
    "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])";
const VSOCK_PORT_PATTERN: &str = "[1-9][0-9]{0,9}";
const CID_PATTERN: &str = "(0|[1-9][0-9]{0,9})";
const NAME_PATTERN: &str = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?";
const FILLED_IN: &str = r"\{(port|cid)\}";

text_serde!(ListenAddress, Target);

impl Text for ListenAddress {
    const EXPECTED: &'static str =
        "an address to listen on, such as tcp://0.0.0.0:9464, unix:///run/web.sock or vsock://1024";

    fn parse(text: &str) -> Result<ListenAddress, Refusal> {
        match Scheme::split(text, Self::EXPECTED)? {
            Scheme::Tcp(authority) => {
                let (host, port) = split_authority(text, authority, Self::EXPECTED)?;
                let ip = match host {
                    // The kernel refuses such an address on a socket that is for IPv6 only (EINVAL), and takes it for
                    // IPv4 otherwise: it says nothing that the IPv4 address does not say.
                    Host::Ip(ip) if ip.is_ipv6() && ip.to_canonical().is_ipv4() => {
                        return Err(Refusal::new(
                            format!(
                                "{} is an IPv4 address in the clothes of IPv6",
                                quoted(&ip.to_string())
                            ),
                            format!("write tcp://{}:{port}", ip.to_canonical()),
                        ));
                    }
                    Host::Ip(ip) => ip,
                    // A name may mean several addresses, or another one tomorrow: which one would be bound?
                    Host::Name("localhost") => {
                        return Err(Refusal::new(
                            "`localhost` can mean two addresses; a listener needs one",
                            format!("write tcp://127.0.0.1:{port} or tcp://[::1]:{port}"),
                        ));
                    }
                    Host::Name(name) => {
                        return Err(Refusal::new(
                            format!("{} is a name; a listener needs an IP address", quoted(name)),
                            format!("write tcp://0.0.0.0:{port} for every interface, or the address of one"),
                        ));
                    }
                };
                Ok(ListenAddress::Tcp(SocketAddr::new(ip, port)))
            }
            Scheme::Unix(path) => {
                check_path(path)?;
                check_no_braces(path)?;
                check_path_length(path, path.len())?;
                Ok(ListenAddress::Unix(PathBuf::from(path)))
            }
            Scheme::Vsock(rest) => match rest.rsplit_once(':') {
                None => vsock_port(rest).map(ListenAddress::Vsock),
                Some((_, port)) => Err(Refusal::new(
                    format!(
                        "{} has a CID; a listener takes its port on every CID of this host",
                        quoted(text)
                    ),
                    format!("write vsock://{}", vsock_port(port).unwrap_or(22)),
                )),
            },
            Scheme::Guest(name) => Err(Refusal::new(
                "a guest is no address of ours to listen on",
                format!(
                    "to let another guest connect here, give that guest an outbound rule: `to: guest://{}`",
                    if name.is_empty() { "web" } else { name }
                ),
            )),
        }
    }
}

impl fmt::Display for ListenAddress {
    /// The form that the configuration has.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(address) => write!(f, "tcp://{address}"),
            ListenAddress::Unix(path) => write!(f, "unix://{}", path.display()),
            ListenAddress::Vsock(port) => write!(f, "vsock://{port}"),
        }
    }
}

scalar_schema!(
    ListenAddress,
    json_schema!({
        "type": "string",
        "pattern": format!(
            r"^(tcp://{IP_PATTERN}:{PORT_PATTERN}|unix:///[^{{}}]*[^/{{}}]|vsock://{VSOCK_PORT_PATTERN})$"
        ),
    })
);

impl Text for Target {
    const EXPECTED: &'static str =
        "a target such as tcp://postgres.shop.svc:5432, unix:///run/log.sock, vsock://2:22 or guest://db";

    fn parse(text: &str) -> Result<Target, Refusal> {
        match Scheme::split(text, Self::EXPECTED)? {
            Scheme::Tcp(authority) => {
                let (host, port) = split_authority(text, authority, Self::EXPECTED)?;
                let host = match host {
                    Host::Ip(ip) => ip.to_string(),
                    Host::Name(name) => {
                        check_name(name)?;
                        name.to_owned()
                    }
                };
                Ok(Target::Tcp { host, port })
            }
            Scheme::Unix(path) => {
                check_path(path)?;
                check_placeholders(path)?;
                Ok(Target::Unix {
                    path: path.to_owned(),
                })
            }
            Scheme::Vsock(rest) => {
                let Some((cid, port)) = rest.rsplit_once(':') else {
                    return Err(Refusal::new(
                        format!("{} lacks a port", quoted(text)),
                        "give a CID and a port, such as vsock://2:22",
                    ));
                };
                Ok(Target::Vsock {
                    cid: vsock_cid(cid)?,
                    port: vsock_port(port)?,
                })
            }
            Scheme::Guest(rest) => {
                let (name, port) = match rest.split_once(':') {
                    Some((name, port)) => (name, Some(vsock_port(port)?)),
                    None => (rest, None),
                };
                if name.is_empty() {
                    return Err(Refusal::new(
                        "the name of the guest is missing",
                        "give the name of another guest of this file, such as guest://db",
                    ));
                }
                Ok(Target::Guest {
                    name: Name::parse(name)?.0,
                    port,
                })
            }
        }
    }
}

impl Target {
    /// Refuses a unix path that would be too long for a socket address once the longest of `ports` and `cid` are
    /// filled in.
    pub(super) fn check_length(&self, last_port: u32, cid: Option<u32>) -> Result<(), Refusal> {
        match self {
            Target::Tcp { .. } | Target::Vsock { .. } | Target::Guest { .. } => Ok(()),
            Target::Unix { path } => {
                // Without a readable CID the shortest stands in: that mistake is reported already.
                let cid = cid.unwrap_or(3).to_string();
                let filled_in = path
                    .replace("{port}", &last_port.to_string())
                    .replace("{cid}", &cid);
                check_path_length(path, filled_in.len())
            }
        }
    }
}

impl fmt::Display for Target {
    /// The form that the configuration has.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Target::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Target::Unix { path } => write!(f, "unix://{path}"),
            Target::Vsock { cid, port } => write!(f, "vsock://{cid}:{port}"),
            Target::Guest { name, port: None } => write!(f, "guest://{name}"),
            Target::Guest {
                name,
                port: Some(port),
            } => write!(f, "guest://{name}:{port}"),
        }
    }
}

scalar_schema!(
    Target,
    json_schema!({
        "type": "string",
        "pattern": format!(
            r"^(tcp://([A-Za-z0-9_.-]+|{IP_PATTERN}):{PORT_PATTERN}|unix:///([^{{}}]|{FILLED_IN})*([^/{{}}]|{FILLED_IN})|vsock://{CID_PATTERN}:{VSOCK_PORT_PATTERN}|guest://{NAME_PATTERN}(:{VSOCK_PORT_PATTERN})?)$"
        ),
    })
);

enum Scheme<'a> {
    Tcp(&'a str),
    Unix(&'a str),
    Vsock(&'a str),
    Guest(&'a str),
}

impl<'a> Scheme<'a> {
    fn split(text: &'a str, expected: &str) -> Result<Scheme<'a>, Refusal> {
        if let Some(authority) = text.strip_prefix("tcp://") {
            return Ok(Scheme::Tcp(authority));
        }
        if let Some(path) = text.strip_prefix("unix://") {
            return Ok(Scheme::Unix(path));
        }
        if let Some(address) = text.strip_prefix("vsock://") {
            return Ok(Scheme::Vsock(address));
        }
        if let Some(name) = text.strip_prefix("guest://") {
            return Ok(Scheme::Guest(name));
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(Refusal::new(
                format!("unknown scheme {}", quoted(scheme)),
                format!("give {expected}"),
            ));
        }
        let meant = match text {
            _ if text.starts_with('/') => Some(format!("unix://{text}")),
            _ if text.starts_with("unix:/") => Some(text.replacen("unix:", "unix://", 1)),
            _ if text
                .rsplit_once(':')
                .is_some_and(|(_, port)| digits(port).is_some()) =>
            {
                Some(format!("tcp://{}", text.strip_prefix("tcp:").unwrap_or(text)))
            }
            _ => None,
        };
        let help = match meant {
            Some(meant) => format!("did you mean {}?", quoted(&meant)),
            None => format!("give {expected}"),
        };
        Err(Refusal::new(format!("{} has no scheme", quoted(text)), help))
    }
}

enum Host<'a> {
    Ip(IpAddr),
    Name(&'a str),
}

/// Splits `host:port`, `1.2.3.4:port` or `[v6]:port`.
fn split_authority<'a>(text: &str, authority: &'a str, expected: &str) -> Result<(Host<'a>, u16), Refusal> {
    let no_address = |message: String| Refusal::new(message, format!("give {expected}"));
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (ip, rest) = rest
                .split_once(']')
                .ok_or_else(|| no_address(format!("{} lacks a `]`", quoted(text))))?;
            let ip: Ipv6Addr = ip
                .parse()
                .map_err(|_| no_address(format!("{} is no IPv6 address", quoted(ip))))?;
            (Host::Ip(IpAddr::V6(ip)), rest.strip_prefix(':'))
        }
        None => match authority.rsplit_once(':') {
            Some((host, _)) if host.contains(':') => {
                return Err(Refusal::new(
                    format!("{} has more than one `:` outside of brackets", quoted(text)),
                    "an IPv6 address stands in brackets: tcp://[::1]:8080",
                ));
            }
            Some((host, port)) => (parse_host(host)?, Some(port)),
            None => (Host::Name(authority), None),
        },
    };
    let Some(port) = port.filter(|port| !port.is_empty()) else {
        return Err(no_address(format!("{} lacks a port", quoted(text))));
    };
    match digits(port).map(u16::try_from) {
        Some(Ok(number)) if number > 0 => Ok((host, number)),
        Some(_) => Err(Refusal::new(
            format!("{port} is no TCP port"),
            "give a TCP port from 1 to 65535",
        )),
        None if port.contains('/') => Err(Refusal::new(
            format!("{} has a path after the port", quoted(text)),
            format!("a TCP address ends with its port: give {expected}"),
        )),
        None => Err(no_address(format!("{} is no TCP port", quoted(port)))),
    }
}

/// A CID as the host sees it. 0, 1 and 2 are addresses here too: a sidecar inside a VM talks to its own host.
fn vsock_cid(text: &str) -> Result<u32, Refusal> {
    let help =
        "give a number from 0 to 4294967294: 2 is the host that this machine runs on, 1 this machine itself";
    match digits(text).map(u32::try_from) {
        Some(Ok(u32::MAX)) => Err(Refusal::new(
            format!("nobody has the CID {text}: it stands for any CID (VMADDR_CID_ANY)"),
            help,
        )),
        Some(Ok(cid)) => Ok(cid),
        _ => Err(Refusal::new(format!("{} is no CID", quoted(text)), help)),
    }
}

fn vsock_port(text: &str) -> Result<u32, Refusal> {
    match digits(text) {
        Some(number) => GuestPort::from_number(number).map(|port| port.0),
        None => Err(Refusal::new(
            format!("{} is no vsock port", quoted(text)),
            format!("give {}", GuestPort::EXPECTED),
        )),
    }
}

fn parse_host(host: &str) -> Result<Host<'_>, Refusal> {
    if let Ok(ip) = host.parse::<Ipv4Addr>() {
        return Ok(Host::Ip(IpAddr::V4(ip)));
    }
    // A name whose last label is a number is no name but a mistyped address (RFC 1123, 2.1).
    let last = host.rsplit('.').next().unwrap_or_default();
    if !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Refusal::new(
            format!("{} is no IPv4 address", quoted(host)),
            "give four numbers from 0 to 255, such as 127.0.0.1",
        ));
    }
    Ok(Host::Name(host))
}

/// Refuses what no resolver could find. Underscores are none of DNS's, but Docker's and Windows' names have them.
fn check_name(name: &str) -> Result<(), Refusal> {
    let label_fits = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let labels = name.strip_suffix('.').unwrap_or(name);
    if labels.len() <= 253 && labels.split('.').all(label_fits) {
        return Ok(());
    }
    let message = if name.is_empty() {
        "the host is missing".to_owned()
    } else {
        format!("{} is no host", quoted(name))
    };
    Err(Refusal::new(
        message,
        "give a host name such as postgres.shop.svc, an IPv4 address, or an IPv6 address in brackets",
    ))
}

/// Braces belong to `{port}` and `{cid}` alone, so that a mistyped placeholder never becomes part of a path.
fn check_placeholders(path: &str) -> Result<(), Refusal> {
    let rest = path.replace("{port}", "").replace("{cid}", "");
    let Some(at) = rest.find(['{', '}']) else {
        return Ok(());
    };
    let from = rest.get(at..).unwrap_or_default();
    let shown = match from.find('}') {
        Some(end) => from.get(..=end).unwrap_or_default(),
        None => from,
    };
    Err(Refusal::new(
        format!("unknown placeholder {}", quoted(shown)),
        "the placeholders of a unix path are {port} and {cid}; other braces cannot stand in it",
    ))
}
