//! Configuration: YAML as the user wrote it (schema) and the checked values that the program runs (here).
//!
//! Parse, don't validate: a [`Config`] can only be legal. The way there has four steps, none of which stops at the
//! first mistake:
//!
//! 1. `source` reads the file: at most 1 MiB of UTF-8.
//! 2. `document` makes a tree of nodes of the YAML, within a budget, so that aliases cannot multiply it.
//! 3. `given` reads the types of `schema` from the tree; `values`, `address`, `path` and `cidr` hold what a scalar may say.
//!    Unknown keys, repeated keys and wrong types are gathered here.
//! 4. `resolve` holds the values against each other and fills in what follows from them; `files` asks the file system
//!    whether the directories of the sockets are there.
//!
//! What was gathered is a [`ConfigError`]; what is odd but runs is a [`Warning`].

mod address;
mod change;
mod cidr;
mod diagnostic;
mod document;
mod effective;
mod files;
mod given;
mod path;
mod resolve;
mod schema;
mod source;
mod values;

pub use change::{Change, Difference, Effect};
pub use cidr::Cidr;
pub use diagnostic::{ConfigError, Diagnostic, Excerpt, Warning};
pub use source::Text;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Everything the program runs with.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    /// Where the admin server listens; may be empty.
    pub admin: Vec<ListenAddress>,
    /// How log events are written.
    pub log: Log,
    /// How a drain goes on and ends.
    pub drain: Drain,
    /// When the sidecar calls itself ready.
    pub readiness: Readiness,
    /// Bounds of all guests together.
    pub limits: SidecarLimits,
    /// What the process gives up before it serves anybody.
    pub confinement: Confinement,
    /// The guests, at least one.
    pub guests: Vec<Guest>,
}

/// Reads and checks the file at `path` (`-` is standard input), the directories of its sockets included.
///
/// Blocks on the file. The warnings do not keep the program from running.
pub fn load(path: &Path) -> Result<(Config, Vec<Warning>), ConfigError> {
    Text::read(path)?.check()
}

impl Text {
    /// Checks it, the directories of its sockets included. Blocks on the file system. The warnings do not keep the program from
    /// running.
    pub fn check(&self) -> Result<(Config, Vec<Warning>), ConfigError> {
        check(&self.text, &self.name, files::check)
    }
}

/// Checks the text of a configuration that messages call `source_name`. Asks nothing of the file system.
pub fn parse(text: &str, source_name: &str) -> Result<(Config, Vec<Warning>), ConfigError> {
    check(text, source_name, |_, _, _| ())
}

/// The JSON Schema (draft 2020-12) of the file.
pub fn json_schema() -> serde_json::Value {
    schemars::schema_for!(schema::File).to_value()
}

fn check(
    text: &str,
    source_name: &str,
    check_sockets: impl FnOnce(&[files::Socket], &document::Document, &mut diagnostic::Report<'_>),
) -> Result<(Config, Vec<Warning>), ConfigError> {
    // The parser skips a byte order mark too; places are counted without it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    source::refuse_empty(text, source_name)?;
    let mut report = diagnostic::Report::new(source_name, text);
    let mut config = None;
    if let Some(document) = document::Document::parse(text, &mut report) {
        let file = given::read::<schema::File>(&document, &mut report);
        let resolved = resolve::resolve(&file, &document, &mut report);
        check_sockets(&resolved.sockets, &document, &mut report);
        config = resolved.config;
    }
    let warnings = report.finish()?;
    match config {
        Some(config) => Ok((config, warnings)),
        None => Err(ConfigError::of_file(
            source_name,
            "the configuration is incomplete".to_owned(),
            "compare it with docs/configuration.md",
        )),
    }
}

/// Log settings.
#[derive(Clone, PartialEq, Debug)]
pub struct Log {
    /// Text, JSON, or text only when stderr is a terminal.
    pub format: LogFormat,
    /// The level or filter (`info`, `vsock_sidecar::device=debug,info`).
    pub level: String,
}

/// Form of log events.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(inline)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How a drain goes on and ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drain {
    /// Grace period: what is open when it is over is cut off.
    pub timeout: Duration,
    /// How long a connected VMM is served though it has no open connection. Never above `timeout` in effect.
    pub linger: Duration,
}

/// When the sidecar calls itself ready.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Readiness {
    /// Whether every guest's driver has to be up.
    pub require_session: bool,
}

/// What the process gives up. Seccomp and landlock are only ever on together with `no_new_privileges`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Confinement {
    /// Executing a program gains no privileges any more (PR_SET_NO_NEW_PRIVS).
    pub no_new_privileges: bool,
    /// What happens to system calls that the program has no use for.
    pub seccomp: SeccompMode,
    /// What happens to files, directories and ports that the configuration does not name.
    pub landlock: LandlockMode,
    /// Directories in which later configurations may have sockets.
    pub paths: Vec<PathBuf>,
}

/// What happens to system calls that the program has no use for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(inline)]
pub enum SeccompMode {
    /// They are refused, counted and named in the log.
    Enforce,
    /// They are allowed, and the kernel writes them to its log.
    Log,
    /// Nothing.
    Off,
}

/// What is out of reach that the configuration does not name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(inline)]
pub enum LandlockMode {
    /// Files, directories and TCP ports.
    Enforce,
    /// Files and directories.
    Files,
    /// Nothing.
    Off,
}

/// One guest: one vhost-user socket, one device.
#[derive(Clone, PartialEq, Debug)]
pub struct Guest {
    /// Unique name; label in metrics and logs.
    pub name: String,
    /// Context identifier, 3..=0xffff_fffe, unique in the file.
    pub cid: u32,
    /// How the VMM reaches us.
    pub vhost_user: VhostUser,
    /// Guest to services; first match wins.
    pub outbound: Vec<OutboundRule>,
    /// Services to guest.
    pub inbound: Vec<InboundRule>,
    /// Bounds of this guest.
    pub limits: Limits,
}

/// The vhost-user socket of a guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VhostUser {
    /// Absolute path.
    pub socket: PathBuf,
    /// Who listens.
    pub mode: VhostUserMode,
    /// What VIRTIO_F_ACCESS_PLATFORM means.
    pub access_platform: AccessPlatform,
}

/// What VIRTIO_F_ACCESS_PLATFORM means between VMM and device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(inline)]
pub enum AccessPlatform {
    /// Evidence decides when a ring starts.
    Auto,
    /// Addresses are translated through the IOTLB, or not used.
    Iotlb,
    /// Addresses are never translated.
    Identity,
    /// The feature is not offered.
    Off,
}

/// Who listens on the vhost-user socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(inline)]
pub enum VhostUserMode {
    /// We listen, the VMM connects.
    Server,
    /// The VMM listens, we connect, with retry.
    Client,
}

/// The CID that stands for the host (VMADDR_CID_HOST).
pub const HOST_CID: u32 = 2;

/// A rule that lets the guest connect to a target.
#[derive(Clone, PartialEq, Debug)]
pub struct OutboundRule {
    /// Unique among the guest's outbound rules.
    pub name: String,
    /// Ports of the guest's connect(), never 0.
    pub ports: RangeInclusive<u32>,
    /// The CID that the guest addresses: 2 (the host), or the sibling's when the target is a guest, unless the file says
    /// otherwise.
    pub cid: u32,
    /// Where connections go.
    pub target: Target,
    /// What the target gets ahead of the guest's bytes, if anything.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// How SEQPACKET messages travel on a stream of bytes. None: SEQPACKET is refused where the target is TCP.
    pub framing: Option<Framing>,
    /// Connections of this rule at once; none: as many as the guest's limit lets through.
    pub connections: Option<usize>,
}

/// How messages travel on a stream of bytes: each behind its length, a `u32` in network byte order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Framing {
    /// Longest message, in bytes, in either direction.
    pub max_message: u32,
}

/// A type of vsock connection, and of the unix socket at its host end.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(inline)]
pub enum SocketType {
    /// A stream of bytes (SOCK_STREAM).
    #[default]
    Stream,
    /// Messages with boundaries (SOCK_SEQPACKET).
    Seqpacket,
}

/// How a target is told on whose behalf it was dialled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(inline)]
pub enum ProxyProtocol {
    /// With a header of HAProxy's PROXY protocol, version 2; see docs/proxy-protocol.md.
    V2,
}

/// Where an outbound connection goes.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Target {
    /// A TCP service: `tcp://host:port`. For a range of guest ports, the range's first port goes to `port` and the
    /// others keep their offset.
    Tcp {
        /// Name or address, IPv6 without brackets.
        host: String,
        /// TCP port of the first guest port.
        port: u16,
    },
    /// A unix stream socket: `unix:///path`, in which `{port}` and `{cid}` are filled in at connect time.
    Unix {
        /// Absolute path, possibly with placeholders.
        path: String,
    },
    /// An address of AF_VSOCK as this host sees it: `vsock://CID:PORT`. Ranges keep their offset, as with TCP.
    Vsock {
        /// Context identifier.
        cid: u32,
        /// Port of the first guest port.
        port: u32,
    },
    /// Another guest of this sidecar: `guest://NAME` or `guest://NAME:PORT`.
    Guest {
        /// Its name in the file.
        name: String,
        /// Port of the first guest port, ranges keep their offset; none: the port that the guest asked for.
        port: Option<u32>,
    },
}

/// A rule that lets clients of a listener connect to the guest.
#[derive(Clone, PartialEq, Debug)]
pub struct InboundRule {
    /// Unique among the guest's inbound rules.
    pub name: String,
    /// Where clients connect.
    pub listen: ListenAddress,
    /// Who may connect; empty means everyone. Never set for a unix listener.
    pub allow: Vec<Cidr>,
    /// How the guest port is found.
    pub protocol: InboundProtocol,
    /// Clients wait for a guest that does not listen yet, until [`Limits::guest_timeout`].
    pub wait_for_guest: bool,
    /// The type of a unix listener's socket. Seqpacket: the guest gets SEQPACKET connections.
    pub socket_type: SocketType,
    /// Set: clients speak in frames on a stream of bytes, and the guest gets SEQPACKET connections.
    pub framing: Option<Framing>,
    /// Connections of this rule at once; none: as many as the guest's limit lets through.
    pub connections: Option<usize>,
}

impl InboundRule {
    /// The type of the connections that the guest gets.
    pub fn guest_socket_type(&self) -> SocketType {
        match self.framing {
            Some(_) => SocketType::Seqpacket,
            None => self.socket_type,
        }
    }
}

/// How an inbound connection finds its guest port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InboundProtocol {
    /// All bytes are payload, the port is the rule's.
    Plain {
        /// Port in the guest.
        port: u32,
    },
    /// The client first sends `CONNECT <port>\n` and is answered `OK <port>\n`.
    Connect,
}

/// Where to listen.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ListenAddress {
    /// `tcp://address:port`.
    Tcp(SocketAddr),
    /// `unix:///path`, absolute.
    Unix(PathBuf),
    /// `vsock://PORT`: AF_VSOCK, any CID of this host.
    Vsock(u32),
}

/// Bounds of all guests together; the default bounds nothing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SidecarLimits {
    /// Connections at once; none: as many as the guests' limits and the descriptors of the process let through.
    pub connections: Option<usize>,
    /// Bytes of memory for buffers; none: the sum of what the guests may have.
    pub memory: Option<u64>,
}

/// Bounds of one guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Connections at once, both directions together.
    pub connections: usize,
    /// New connections a second in each direction; 0: any number.
    pub connections_per_second: u32,
    /// Receive buffer promised to the guest for each connection, in bytes (`buf_alloc`).
    pub buffer: u32,
    /// Bytes of memory for what services do not take, all connections together.
    pub memory: u64,
    /// Time for an outbound dial, name resolution included.
    pub connect_timeout: Duration,
    /// Time the guest has to accept an inbound connection.
    pub guest_timeout: Duration,
    /// A connection on which nothing moves for so long is ended; zero means never.
    pub idle_timeout: Duration,
    /// The longest that the device looks for the guest's next packet before it sleeps; zero means not at all.
    pub busy_poll: Duration,
}

impl Default for Limits {
    /// Those of a guest whose file says nothing of limits.
    fn default() -> Limits {
        Limits {
            connections: 4096,
            connections_per_second: 0,
            buffer: 256 * 1024,
            memory: 256 << 20,
            connect_timeout: Duration::from_millis(1500),
            guest_timeout: Duration::from_secs(5),
            idle_timeout: Duration::ZERO,
            busy_poll: Duration::ZERO,
        }
    }
}
