//! The configuration as the user writes it. The comments of this file are the reference text: the JSON Schema and
//! `docs/configuration.md` are made of them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::given::Given;
use super::path::{Directory, SocketPath};
use super::values::{
    AddressedCid, ByteSize, Cid, Connections, GuestPort, LogLevel, Name, PerSecond, Period, PortRange,
};
use super::{
    AccessPlatform, Cidr, LandlockMode, ListenAddress, LogFormat, ProxyProtocol, SeccompMode, SocketType,
    Target, VhostUserMode,
};

/// How many guests one file may have: each has a thread.
pub(super) const MAX_GUESTS: usize = 256;

/// How many rules a guest may have in each direction.
pub(super) const MAX_RULES: usize = 1024;

/// How many directories later configurations may be allowed in advance.
pub(super) const MAX_PATHS: usize = 64;

/// How many ranges of addresses an inbound rule may allow: each client is held against them one by one.
pub(super) const MAX_ALLOWED: usize = 256;

/// The configuration of vsock-sidecar. Keys that are not named here are errors.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(title = "Configuration of vsock-sidecar")]
pub struct File {
    /// The admin server: metrics, probes and state over HTTP.
    #[serde(default = "Given::<Admin>::default_value")]
    pub admin: Given<Admin>,
    /// The log, which goes to stderr.
    #[serde(default = "Given::<Log>::default_value")]
    pub log: Given<Log>,
    /// What happens on SIGTERM.
    #[serde(default = "Given::<Drain>::default_value")]
    pub drain: Given<Drain>,
    /// When the sidecar calls itself ready (`/readyz`).
    #[serde(default = "Given::<Readiness>::default_value")]
    pub readiness: Given<Readiness>,
    /// Bounds of all guests together.
    #[serde(default = "Given::<SidecarLimits>::default_value")]
    pub limits: Given<SidecarLimits>,
    /// What the process gives up for good before it serves anybody. See docs/confinement.md.
    #[serde(default = "Given::<Confinement>::default_value")]
    pub confinement: Given<Confinement>,
    /// The guests, each with a vhost-user socket of its own.
    #[schemars(length(min = 1, max = 256))]
    pub guests: Given<Vec<Given<Guest>>>,
}

/// The admin server.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Admin {
    /// Where it listens: any number of `tcp://ADDRESS:PORT` and `unix:///PATH`. The address is an IP address; `[::]`
    /// takes the port for IPv4 too, unless the list has an IPv4 address with that port. Empty: there is no admin server.
    #[serde(default = "Given::<Vec<Given<ListenAddress>>>::default_value")]
    #[schemars(example = ["tcp://0.0.0.0:9464", "unix:///run/vsock-sidecar/admin.sock"])]
    pub listen: Given<Vec<Given<ListenAddress>>>,
}

/// The log.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Log {
    /// `text` for people, `json` for one JSON object a line. Left out: `text` when stderr is a terminal, else `json`.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"json")]
    pub format: Given<LogFormat>,
    /// The least level that is written: `off`, `error`, `warn`, `info`, `debug` or `trace`; or a list by module,
    /// such as `info,vsock_sidecar::device=debug`.
    #[serde(default = "default_level")]
    #[schemars(example = &"info,vsock_sidecar::device=debug")]
    pub level: Given<LogLevel>,
}

/// What happens on SIGTERM.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Drain {
    /// How long open connections may go on after SIGTERM, at most 1h; what is left then is cut off. Keep it below
    /// the pod's `terminationGracePeriodSeconds`.
    #[serde(default = "default_drain_timeout")]
    #[schemars(example = &"25s")]
    pub timeout: Given<Period>,
    /// How long a guest whose VMM is connected is served though it has no open connection, from the beginning of the drain or
    /// the end of its last connection; at most 1h, and never beyond `timeout`. Gives a guest that shuts down at the same time
    /// the way to its services. A VMM that leaves ends the wait.
    #[serde(default = "default_drain_linger")]
    #[schemars(example = &"10s")]
    pub linger: Given<Period>,
}

/// When the sidecar calls itself ready.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Readiness {
    /// `true`: only while every guest has a session: its VMM is connected and its driver has started. `false`: a guest whose VMM
    /// is not there yet is no reason to wait, as the VMM may wait for this very probe.
    #[serde(default = "Given::<bool>::default_value")]
    #[schemars(example = true)]
    pub require_session: Given<bool>,
}

/// Bounds of all guests together, beside those that each guest has. See docs/limits.md.
#[derive(Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SidecarLimits {
    /// Connections at once; more are refused (`sidecar_limit`). Left out: as many as the limits of the guests and the file
    /// descriptors of the process let through.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = 20000)]
    pub connections: Given<Connections>,
    /// Memory of buffers for bytes that services do not take, from 1MiB to 1024GiB; a connection that needs more is ended
    /// (`memory`). Left out: as much as the limits of the guests let through.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"512MiB")]
    pub memory: Given<ByteSize>,
}

/// What the process gives up for good before it serves anybody. A kernel that lacks something of it earns a warning, and the
/// sidecar runs with the rest.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Confinement {
    /// Whether the process gives up gaining privileges by executing a program (no_new_privs). `false` only together with
    /// `seccomp: off` and `landlock: off`, which need it.
    #[serde(default = "default_no_new_privileges")]
    #[schemars(example = false)]
    pub no_new_privileges: Given<bool>,
    /// System calls that the sidecar has no use for. `enforce`: refused, counted and named in the log. `log`: allowed, and
    /// written to the kernel's log. `off`: allowed.
    #[serde(default = "default_seccomp")]
    #[schemars(example = &"log")]
    pub seccomp: Given<SeccompMode>,
    /// What this file does not name at start, for as long as the process runs. `files`: files and directories are out of reach;
    /// TCP ports are left alone, so that a reload may name others. `enforce`: TCP ports too. `off`: nothing is restricted.
    #[serde(default = "default_landlock")]
    #[schemars(example = &"enforce")]
    pub landlock: Given<LandlockMode>,
    /// Directories in which a reload may add sockets though this file has none there at start: absolute paths, which must exist.
    /// Read once, at start.
    #[serde(default = "Given::<Vec<Given<Directory>>>::default_value")]
    #[schemars(length(max = 64), example = ["/run/vm"])]
    pub paths: Given<Vec<Given<Directory>>>,
}

/// A guest: a virtual machine whose VMM speaks vhost-user to one socket.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Guest {
    /// Unique in the file; the label in metrics and logs. Lower-case letters, digits and `-`, at most 63 characters.
    #[schemars(example = &"web")]
    pub name: Given<Name>,
    /// The guest's context identifier, unique in the file. 0, 1, 2 and 4294967295 have a meaning of their own.
    #[schemars(example = 3)]
    pub cid: Given<Cid>,
    /// How the VMM is reached.
    pub vhost_user: Given<VhostUser>,
    /// Connections from the guest to services and to other guests. The first rule whose CID and ports match decides; what
    /// matches no rule is refused at once (RST).
    #[serde(default = "Given::<Vec<Given<Outbound>>>::default_value")]
    #[schemars(length(max = 1024))]
    pub outbound: Given<Vec<Given<Outbound>>>,
    /// Connections from services to the guest.
    #[serde(default = "Given::<Vec<Given<Inbound>>>::default_value")]
    #[schemars(length(max = 1024))]
    pub inbound: Given<Vec<Given<Inbound>>>,
    /// Bounds of this guest.
    #[serde(default = "Given::<Limits>::default_value")]
    pub limits: Given<Limits>,
}

/// The vhost-user socket of a guest.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VhostUser {
    /// Absolute path of the socket, at most 107 bytes, of no other guest. Its directory must exist.
    #[schemars(example = &"/run/vsock-sidecar/web.sock")]
    pub socket: Given<SocketPath>,
    /// `server`: the sidecar listens and the VMM connects. `client`: the VMM listens and the sidecar connects, with
    /// retry.
    #[serde(default = "default_mode")]
    #[schemars(example = &"client")]
    pub mode: Given<VhostUserMode>,
    /// What VIRTIO_F_ACCESS_PLATFORM means, once it is acknowledged: `iotlb`: ring and buffer addresses are translated
    /// through the IOTLB, or not served. `identity`: they are not translated, for VMMs that confine memory themselves.
    /// `auto`: evidence decides when a ring starts. `off`: the feature is not offered, and refused. See
    /// docs/access-platform.md.
    #[serde(default = "default_access_platform")]
    #[schemars(example = &"iotlb")]
    pub access_platform: Given<AccessPlatform>,
}

/// A rule for connections from the guest: either `port` or `ports`, and `to`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("oneOf" = [{"required": ["port"]}, {"required": ["ports"]}]))]
pub struct Outbound {
    /// Unique among the guest's outbound rules; the label in metrics and logs. Left out: `port-5432`,
    /// `ports-8000-8099`.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"db")]
    pub name: Given<Name>,
    /// The CID that the guest connects to: 2 for the host, or that of another guest. Left out: 2, and with a `guest://`
    /// target that guest's CID.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = 2)]
    pub cid: Given<AddressedCid>,
    /// The port that the guest connects to.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = 5432)]
    pub port: Given<GuestPort>,
    /// A range of ports that the guest connects to, both ends included.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"8000-8099")]
    pub ports: Given<PortRange>,
    /// Where the connection goes: `tcp://HOST:PORT`, `unix:///PATH`, `vsock://CID:PORT` (AF_VSOCK as this machine sees it) or
    /// `guest://NAME`, another guest of this file, on the same port or with `guest://NAME:PORT` on another. With `ports`, the
    /// first port of the range goes to `PORT` and the others keep their distance to it. `{port}` and `{cid}` in `PATH` are
    /// replaced by the port that the guest connects to and by its CID.
    #[schemars(example = &"unix:///run/vm/web.sock_{port}")]
    pub to: Given<Target>,
    /// `v2`: the target gets a header of the PROXY protocol ahead of the guest's bytes, which names the guest, its CID and
    /// both ports; the target must expect it. See docs/proxy-protocol.md. Left out: the target gets the guest's bytes alone.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"v2")]
    pub proxy_protocol: Given<ProxyProtocol>,
    /// `length-prefixed`: the guest may open SEQPACKET connections to a TCP target, and each message travels behind its length,
    /// four bytes in network byte order. Left out: a TCP target takes streams only.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"length-prefixed")]
    pub framing: Given<FramingKind>,
    /// The longest message that `framing` lets through, in either direction; at most `limits.buffer`, and that when left out.
    /// A longer one ends the connection.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"64KiB")]
    pub max_message: Given<ByteSize>,
    /// Connections of this rule at once; more are refused. Left out: as many as `limits.connections` lets through.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = 100)]
    pub connections: Given<Connections>,
}

/// A rule for connections to the guest: `listen`, and either `port` or `protocol`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("oneOf" = [{"required": ["port"]}, {"required": ["protocol"]}]))]
pub struct Inbound {
    /// Unique among the guest's inbound rules; the label in metrics and logs. Left out: `port-22`, `connect`.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"ssh")]
    pub name: Given<Name>,
    /// Where clients connect: `tcp://ADDRESS:PORT` with an IP address, `unix:///PATH`, or `vsock://PORT` (AF_VSOCK, every CID of
    /// this machine).
    #[schemars(example = &"tcp://0.0.0.0:2222")]
    pub listen: Given<ListenAddress>,
    /// Who may connect to a TCP listener, by IP address: ranges such as `10.0.0.0/8` and `fd00::/8`, and single addresses.
    /// Others are closed at once and counted (`acl`). Left out: everyone.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(length(min = 1, max = 256), example = ["10.0.0.0/8", "192.0.2.7"])]
    pub allow: Given<Vec<Given<Cidr>>>,
    /// The port in the guest that every client of this listener reaches.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = 22)]
    pub port: Given<GuestPort>,
    /// `connect`: the client says which port it wants with a first line `CONNECT 22`, and reads `OK` and a number
    /// when the guest has accepted (the protocol of Firecracker's vsock).
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"connect")]
    pub protocol: Given<Protocol>,
    /// Whether clients wait while the guest does not listen on the port, or does not run: the request is repeated until it
    /// accepts, at most for `limits.guestTimeout`. `false`: a guest that refuses ends the client at once.
    #[serde(default = "Given::<bool>::default_value")]
    #[schemars(example = true)]
    pub wait_for_guest: Given<bool>,
    /// The type of a unix listener's socket. `seqpacket` keeps messages apart, and the guest gets SEQPACKET connections.
    #[serde(
        default = "Given::<SocketType>::default_value",
        skip_serializing_if = "Given::is_absent"
    )]
    #[schemars(example = &"seqpacket")]
    pub socket_type: Given<SocketType>,
    /// `length-prefixed`: clients of a TCP listener, or of a unix one of type `stream`, send and read each message behind its
    /// length, four bytes in network byte order, and the guest gets SEQPACKET connections.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"length-prefixed")]
    pub framing: Given<FramingKind>,
    /// The longest message that `framing` lets through, in either direction; at most `limits.buffer`, and that when left out.
    /// A longer one ends the connection.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = &"64KiB")]
    pub max_message: Given<ByteSize>,
    /// Connections of this rule at once; more clients are closed. Left out: as many as `limits.connections` lets through.
    #[serde(default, skip_serializing_if = "Given::is_absent")]
    #[schemars(example = 100)]
    pub connections: Given<Connections>,
}

/// How messages travel on a stream of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(inline)]
pub enum FramingKind {
    /// Each behind its length.
    LengthPrefixed,
}

/// How a client of an inbound rule names the guest's port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(inline)]
pub enum Protocol {
    /// With a line `CONNECT <port>`.
    Connect,
}

/// Bounds of a guest.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Limits {
    /// Connections at once, both directions together; more are refused.
    #[serde(default = "default_connections")]
    #[schemars(example = 10000)]
    pub connections: Given<Connections>,
    /// New connections a second in each direction; as many may come at once as a second brings, more are refused
    /// (`rate_limit`). 0: any number.
    #[serde(default = "default_per_second")]
    #[schemars(example = 200)]
    pub connections_per_second: Given<PerSecond>,
    /// Bytes that the guest may send ahead of a slow service on each connection (its credit), from 4KiB to 16MiB.
    #[serde(default = "default_buffer")]
    #[schemars(example = &"1MiB")]
    pub buffer: Given<ByteSize>,
    /// Memory of buffers for bytes that services do not take, all connections of the guest together; from `buffer` to 1024GiB.
    /// A connection that needs more is ended (`memory`).
    #[serde(default = "default_memory")]
    #[schemars(example = &"64MiB")]
    pub memory: Given<ByteSize>,
    /// Time to reach the target of an outbound rule, name resolution included; from 1ms to less than 2s, after which
    /// the guest has given up.
    #[serde(default = "default_connect_timeout")]
    #[schemars(example = &"900ms")]
    pub connect_timeout: Given<Period>,
    /// Time that the guest has to accept an inbound connection, from 1ms to 1h.
    #[serde(default = "default_guest_timeout")]
    #[schemars(example = &"10s")]
    pub guest_timeout: Given<Period>,
    /// A connection on which nothing moves for so long is ended; at most 720h. `0s`: never.
    #[serde(default = "default_idle_timeout")]
    #[schemars(example = &"1h")]
    pub idle_timeout: Given<Period>,
    /// The longest that the device thread looks for the guest's next packet before it sleeps, in which it uses its processor;
    /// at most 1ms. Only after the guest was given something, and only while the guest has been as quick. `0s`: not at all.
    #[serde(default = "default_busy_poll")]
    #[schemars(example = &"50us")]
    pub busy_poll: Given<Period>,
}

impl Default for Admin {
    fn default() -> Admin {
        Admin {
            listen: Given::default_value(),
        }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log {
            format: Given::Absent,
            level: default_level(),
        }
    }
}

impl Default for Drain {
    fn default() -> Drain {
        Drain {
            timeout: default_drain_timeout(),
            linger: default_drain_linger(),
        }
    }
}

impl Default for Readiness {
    fn default() -> Readiness {
        Readiness {
            require_session: Given::default_value(),
        }
    }
}

impl Default for Confinement {
    fn default() -> Confinement {
        Confinement {
            no_new_privileges: default_no_new_privileges(),
            seccomp: default_seccomp(),
            landlock: default_landlock(),
            paths: Given::default_value(),
        }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: default_connections(),
            connections_per_second: default_per_second(),
            buffer: default_buffer(),
            memory: default_memory(),
            connect_timeout: default_connect_timeout(),
            guest_timeout: default_guest_timeout(),
            idle_timeout: default_idle_timeout(),
            busy_poll: default_busy_poll(),
        }
    }
}

fn default_level() -> Given<LogLevel> {
    Given::new(LogLevel("info".to_owned()))
}

fn default_drain_timeout() -> Given<Period> {
    Given::new(Period::from_millis(25_000))
}

fn default_drain_linger() -> Given<Period> {
    Given::new(Period::from_millis(3_000))
}

fn default_no_new_privileges() -> Given<bool> {
    Given::new(true)
}

fn default_seccomp() -> Given<SeccompMode> {
    Given::new(SeccompMode::Enforce)
}

fn default_landlock() -> Given<LandlockMode> {
    Given::new(LandlockMode::Files)
}

fn default_access_platform() -> Given<AccessPlatform> {
    Given::new(AccessPlatform::Auto)
}

fn default_mode() -> Given<VhostUserMode> {
    Given::new(VhostUserMode::Server)
}

fn default_connections() -> Given<Connections> {
    Given::new(Connections(4096))
}

fn default_per_second() -> Given<PerSecond> {
    Given::new(PerSecond(0))
}

fn default_buffer() -> Given<ByteSize> {
    Given::new(ByteSize(256 * 1024))
}

fn default_memory() -> Given<ByteSize> {
    Given::new(ByteSize(256 << 20))
}

fn default_connect_timeout() -> Given<Period> {
    Given::new(Period::from_millis(1_500))
}

fn default_guest_timeout() -> Given<Period> {
    Given::new(Period::from_millis(5_000))
}

fn default_busy_poll() -> Given<Period> {
    Given::new(Period::from_millis(0))
}

fn default_idle_timeout() -> Given<Period> {
    Given::new(Period::from_millis(0))
}
