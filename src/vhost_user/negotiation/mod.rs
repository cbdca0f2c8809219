//! What VMM, driver and device have agreed on, as seen in the messages that went through the gate: values for readers.
//!
//! Control messages change these values, and IOTLB messages, a few thousand a second at most; so a small mutex holds them,
//! and readers take a copy. [`Negotiation`] is what was agreed; [`Record`] adds what follows from it and the flight
//! recorder, which is too long to be copied at every scrape. [`NegotiationWatch`] is where the session writes it down.

mod access;
mod board;
mod detail;
mod detect;
mod layers;
mod recorder;
mod watch;

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::features::{Features, VHOST_F_LOG_ALL};
use super::message::{self, Body, MemoryRegion, Message, REQUEST_NAMES, as_hex, request, request_index};
use super::{Finding, SessionConfig, Translation};

pub use access::AccessPlatformState;
pub use layers::{FeatureRow, Layers, ProtocolLayers, Record};
pub use recorder::{Direction, Entry, Outcome, Recorder};
pub use watch::NegotiationWatch;

/// Number of virtqueues: rx, tx, event.
pub const QUEUES: usize = 3;
/// The most entries a ring may have.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// The most memory regions that are listed; the crate behind the gate tells VMMs that it takes so many.
const MAX_REGIONS: usize = 509;
/// Names of the virtqueues, by index.
pub const QUEUE_NAMES: [&str; QUEUES] = ["rx", "tx", "event"];

/// The state of the session with the VMM.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum SessionState {
    /// No VMM is connected.
    Waiting,
    /// A VMM is connected and features are not yet agreed.
    Connected,
    /// The driver's features are known.
    Negotiated,
    /// At least one ring runs.
    Running,
}

impl SessionState {
    /// Every state.
    pub const ALL: [SessionState; 4] = [
        SessionState::Waiting,
        SessionState::Connected,
        SessionState::Negotiated,
        SessionState::Running,
    ];

    /// The state's name in metrics and JSON.
    pub fn label(self) -> &'static str {
        match self {
            SessionState::Waiting => "waiting",
            SessionState::Connected => "connected",
            SessionState::Negotiated => "negotiated",
            SessionState::Running => "running",
        }
    }
}

/// Why a session ended by an error; label `reason` of `vsock_session_errors_total`.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum SessionError {
    /// The VMM broke the protocol, or sent a request that is not served.
    Protocol,
    /// Features were acknowledged that were not offered.
    Feature,
    /// A memory region could not be mapped or removed.
    Memory,
    /// A ring could not be set up.
    Vring,
    /// A socket, or the device thread, failed.
    Io,
    /// The device thread did not answer in time.
    Timeout,
    /// The VMM closed the connection while rings were running.
    PeerClosed,
    /// The VMM has truncated guest memory or the dirty log, or nothing backs them.
    MemoryLost,
    /// A thread that served it has panicked, by a fault of ours or of the protocol handler's.
    Panic,
}

impl SessionError {
    /// Every reason.
    pub const ALL: [SessionError; 9] = [
        SessionError::Protocol,
        SessionError::Feature,
        SessionError::Memory,
        SessionError::Vring,
        SessionError::Io,
        SessionError::Timeout,
        SessionError::PeerClosed,
        SessionError::MemoryLost,
        SessionError::Panic,
    ];

    /// The reason's name in metrics, logs and JSON.
    pub fn label(self) -> &'static str {
        match self {
            SessionError::Protocol => "protocol",
            SessionError::Feature => "feature",
            SessionError::Memory => "memory",
            SessionError::Vring => "vring",
            SessionError::Io => "io",
            SessionError::Timeout => "timeout",
            SessionError::PeerClosed => "peer_closed",
            SessionError::MemoryLost => "memory_lost",
            SessionError::Panic => "panic",
        }
    }

    /// The reason that stands for a refused request.
    pub(super) fn of_request(number: u32) -> SessionError {
        match number {
            request::SET_FEATURES => SessionError::Feature,
            request::SET_MEM_TABLE | request::ADD_MEM_REG | request::REM_MEM_REG => SessionError::Memory,
            request::SET_VRING_NUM..=request::SET_VRING_ERR | request::SET_VRING_ENABLE => {
                SessionError::Vring
            }
            _ => SessionError::Protocol,
        }
    }
}

/// All that is known of one guest's vhost-user session, and counters over all its sessions.
#[derive(Clone, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Negotiation {
    /// Name of the guest in the configuration.
    pub guest: String,
    /// The guest's context identifier.
    pub cid: u32,
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Who listens on it.
    pub mode: super::Mode,
    /// Where the session stands.
    pub state: SessionState,
    /// Whether a VMM is connected.
    pub connected: bool,
    /// Number of the current session, or of the last one; 0 before the first.
    pub session: u64,
    /// Unix time in seconds at which the current session began.
    pub since: Option<u64>,
    /// The VMM.
    pub peer: Option<Peer>,
    /// The VMM went on in the middle of a session that an earlier process of ours had; what that one agreed on is
    /// assumed to be all that was offered.
    pub assumed: bool,
    /// Virtio features that were offered to this VMM.
    pub features_offered: Features,
    /// Virtio features that driver and VMM acknowledged.
    pub features_acked: Features,
    /// Protocol features that were offered to this VMM.
    pub protocol_features_offered: Features,
    /// Protocol features that the VMM acknowledged.
    pub protocol_features_acked: Features,
    /// Virtqueues the VMM was told of; 0 if it did not ask.
    pub queue_count: u64,
    /// The rings, by virtqueue.
    pub rings: [RingState; QUEUES],
    /// The guest's memory.
    pub memory: Vec<MemoryRegion>,
    /// Whether written pages are logged for a migration.
    pub dirty_log_active: bool,
    /// Requests over all sessions, by name; every known name is there. In the order of the request numbers, unknown
    /// ones first.
    pub requests: Vec<RequestCount>,
    /// Changes of the memory map over all sessions.
    pub memory_map_changes: MemoryMapChanges,
    /// Sessions so far. A connection without a message is none.
    pub sessions_total: u64,
    /// Sessions that ended by an error, by reason; every reason is there.
    pub session_errors: Vec<ErrorCount>,
    /// Connections that were closed because another VMM had the session.
    pub rejected_connections: u64,
    /// Connections that ended without a message.
    pub silent_connections: u64,
    /// How the last session ended.
    pub last_end: Option<SessionEnd>,
    /// What VIRTIO_F_ACCESS_PLATFORM means, and what was said over the IOTLB.
    pub access_platform: AccessPlatformState,
    /// What is odd, active findings first.
    pub findings: Vec<Finding>,
    #[serde(skip)]
    log_base_seen: bool,
    /// A ring has been started since features were agreed, so a driver has.
    #[serde(skip)]
    driver_is_up: bool,
}

/// A ring, as the VMM has set it up.
#[derive(Clone, Copy, Default, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct RingState {
    /// `rx`, `tx` or `event`.
    pub queue: &'static str,
    /// Entries.
    pub size: u32,
    /// How it lies in memory: `split`, the only layout that is offered.
    pub layout: &'static str,
    /// Whether its addresses are I/O virtual addresses.
    pub translated: bool,
    /// Address of the descriptor table, in the VMM's address space.
    #[serde(serialize_with = "as_hex")]
    pub desc: u64,
    /// Address of the available ring, in the VMM's address space.
    #[serde(serialize_with = "as_hex")]
    pub avail: u64,
    /// Address of the used ring, in the VMM's address space.
    #[serde(serialize_with = "as_hex")]
    pub used: u64,
    /// The base that was last set or read.
    pub base: u32,
    /// Whether the VMM has enabled it.
    pub enabled: bool,
    /// Whether the device runs it.
    pub started: bool,
    /// Whether the guest can notify us.
    pub has_kick: bool,
    /// Whether we can notify the guest.
    pub has_call: bool,
    /// Whether the VMM gave a descriptor for errors.
    pub has_err: bool,
}

/// How often one request was made.
#[derive(Clone, Copy, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct RequestCount {
    /// The request's name in lower case, `unknown` for all others.
    pub request: &'static str,
    /// Requests.
    pub count: u64,
    /// Requests that were answered with an error or ended the session.
    pub errors: u64,
}

/// Changes of the memory map.
#[derive(Clone, Copy, Default, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct MemoryMapChanges {
    /// SET_MEM_TABLE.
    pub set_table: u64,
    /// ADD_MEM_REG.
    pub add: u64,
    /// REM_MEM_REG.
    pub remove: u64,
}

/// How often sessions ended for one reason.
#[derive(Clone, Copy, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct ErrorCount {
    /// The reason's label.
    pub reason: &'static str,
    /// Sessions.
    pub count: u64,
}

/// How a session ended.
#[derive(Clone, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct SessionEnd {
    /// Number of the session.
    pub session: u64,
    /// `vmm_closed`, `shutdown`, or the label of a [`SessionError`].
    pub reason: &'static str,
    /// A sentence for people.
    pub detail: String,
}

/// The process at the other end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Process id; `None` when it is in another PID namespace.
    pub pid: Option<u32>,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Name of its program, where it can be read.
    pub program: Option<String>,
}

impl Peer {
    /// Which VMM it seems to be, by the name of its program.
    pub fn vmm_hint(&self) -> Option<VmmHint> {
        let program = self.program.as_deref()?;
        // /proc/PID/comm holds 15 bytes, so longer names may arrive cut.
        let known = [
            ("qemu", VmmHint::Qemu),
            ("cloud-hyperviso", VmmHint::CloudHypervisor),
            ("crosvm", VmmHint::Crosvm),
            ("firecracker", VmmHint::Firecracker),
        ];
        let by_start = known.iter().find(|(start, _)| program.starts_with(start));
        // A library: its users are called krun, krunvm, krunkit, crun-krun.
        let krun = || program.contains("krun").then_some(VmmHint::Libkrun);
        by_start.map(|(_, hint)| *hint).or_else(krun)
    }
}

impl Serialize for Peer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Peer", 5)?;
        object.serialize_field("pid", &self.pid)?;
        object.serialize_field("uid", &self.uid)?;
        object.serialize_field("gid", &self.gid)?;
        object.serialize_field("program", &self.program)?;
        object.serialize_field("vmmHint", &self.vmm_hint())?;
        object.end()
    }
}

/// VMMs that are told by the name of their program.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum VmmHint {
    /// QEMU.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// crosvm.
    Crosvm,
    /// A program that uses libkrun.
    Libkrun,
    /// Firecracker, which has no vhost-user vsock; perhaps one of its descendants.
    Firecracker,
}

impl VmmHint {
    /// The name in metrics and JSON.
    pub fn label(self) -> &'static str {
        match self {
            VmmHint::Qemu => "qemu",
            VmmHint::CloudHypervisor => "cloud-hypervisor",
            VmmHint::Crosvm => "crosvm",
            VmmHint::Libkrun => "libkrun",
            VmmHint::Firecracker => "firecracker",
        }
    }

    /// The name as its authors write it.
    pub fn name(self) -> &'static str {
        match self {
            VmmHint::Qemu => "QEMU",
            VmmHint::CloudHypervisor => "Cloud Hypervisor",
            VmmHint::Crosvm => "crosvm",
            VmmHint::Libkrun => "libkrun",
            VmmHint::Firecracker => "Firecracker",
        }
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let program = self.program.as_deref().unwrap_or("unknown program");
        match self.pid {
            Some(pid) => write!(f, "{program} (pid {pid}, uid {}, gid {})", self.uid, self.gid),
            None => write!(f, "{program} (uid {}, gid {})", self.uid, self.gid),
        }
    }
}

impl Negotiation {
    fn new(config: &SessionConfig) -> Negotiation {
        Negotiation {
            guest: config.guest.clone(),
            cid: config.cid,
            socket: config.socket.clone(),
            mode: config.mode,
            state: SessionState::Waiting,
            connected: false,
            session: 0,
            since: None,
            peer: None,
            assumed: false,
            features_offered: Features::virtio(0),
            features_acked: Features::virtio(0),
            protocol_features_offered: Features::protocol(0),
            protocol_features_acked: Features::protocol(0),
            queue_count: 0,
            rings: fresh_rings(),
            memory: Vec::new(),
            dirty_log_active: false,
            requests: REQUEST_NAMES
                .iter()
                .map(|&request| RequestCount {
                    request,
                    count: 0,
                    errors: 0,
                })
                .collect(),
            memory_map_changes: MemoryMapChanges::default(),
            sessions_total: 0,
            session_errors: SessionError::ALL
                .iter()
                .map(|reason| ErrorCount {
                    reason: reason.label(),
                    count: 0,
                })
                .collect(),
            rejected_connections: 0,
            silent_connections: 0,
            last_end: None,
            access_platform: AccessPlatformState::new(config.access_platform),
            findings: Vec::new(),
            log_base_seen: false,
            driver_is_up: false,
        }
    }

    /// Forgets what belongs to one session; counters and how it ended stay.
    fn forget_session(&mut self) {
        self.connected = false;
        self.since = None;
        self.peer = None;
        self.assumed = false;
        self.features_offered = Features::virtio(0);
        self.features_acked = Features::virtio(0);
        self.protocol_features_offered = Features::protocol(0);
        self.protocol_features_acked = Features::protocol(0);
        self.queue_count = 0;
        self.rings = fresh_rings();
        self.memory.clear();
        self.log_base_seen = false;
        self.dirty_log_active = false;
        self.driver_is_up = false;
        self.access_platform.set(Translation::default());
        self.access_platform.backend_channel = false;
        self.state = SessionState::Waiting;
    }

    fn count_request(&mut self, number: u32) {
        if let Some(counter) = self.requests.get_mut(request_index(number)) {
            counter.count += 1;
        }
    }

    /// A request of the VMM that is taken.
    fn request(&mut self, message: &Message) {
        let number = message.request();
        match (number, message.request_body()) {
            (request::SET_FEATURES, Body::U64(bits)) => {
                self.features_acked = Features::virtio(bits);
                if self.state == SessionState::Connected {
                    self.state = SessionState::Negotiated;
                }
                // Between a stop and the next start it may be another driver: that of a guest that reboots.
                self.driver_is_up &= self.rings.iter().any(|ring| ring.started);
            }
            (request::SET_PROTOCOL_FEATURES, Body::U64(bits)) => {
                self.protocol_features_acked = Features::protocol(bits);
            }
            (request::SET_MEM_TABLE, Body::MemoryTable(regions)) => {
                self.memory = regions;
                self.memory_map_changes.set_table += 1;
            }
            (request::ADD_MEM_REG, Body::MemoryRegion(region)) => {
                if self.memory.len() < MAX_REGIONS {
                    self.memory.push(region);
                }
                self.memory_map_changes.add += 1;
            }
            (request::REM_MEM_REG, Body::MemoryRegion(region)) => {
                self.memory
                    .retain(|known| known.guest_address != region.guest_address);
                self.memory_map_changes.remove += 1;
            }
            (request::SET_LOG_BASE, _) => self.log_base_seen = true,
            (request::RESET_DEVICE, _) => {
                self.features_acked = Features::virtio(0);
                self.driver_is_up = false;
                for ring in &mut self.rings {
                    ring.enabled = false;
                    ring.has_kick = false;
                    ring.has_call = false;
                }
            }
            (number, Body::VringState { index, num }) => {
                if let Some(ring) = self.ring(index) {
                    match number {
                        request::SET_VRING_NUM => ring.size = num,
                        request::SET_VRING_BASE => ring.base = num,
                        request::SET_VRING_ENABLE => ring.enabled = num == 1,
                        _ => {}
                    }
                }
            }
            (
                _,
                Body::VringAddr {
                    index,
                    desc,
                    used,
                    avail,
                },
            ) => {
                if let Some(ring) = self.ring(index) {
                    (ring.desc, ring.used, ring.avail) = (desc, used, avail);
                }
            }
            (number, Body::VringFd { index, has_fd }) => {
                if let Some(ring) = self.ring(u32::from(index)) {
                    match number {
                        request::SET_VRING_KICK => ring.has_kick = has_fd,
                        request::SET_VRING_CALL => ring.has_call = has_fd,
                        _ => ring.has_err = has_fd,
                    }
                }
            }
            _ => {}
        }
        self.dirty_log_active = self.log_base_seen && self.features_acked.bits() & VHOST_F_LOG_ALL != 0;
    }

    /// An answer to the VMM.
    fn reply(&mut self, message: &Message) {
        let value = message.u64_body();
        match (message.request(), value) {
            (request::GET_FEATURES, Some(bits)) => self.features_offered = Features::virtio(bits),
            (request::GET_PROTOCOL_FEATURES, Some(bits)) => {
                self.protocol_features_offered = Features::protocol(bits);
            }
            (request::GET_QUEUE_NUM, Some(queues)) => self.queue_count = queues,
            (request::GET_VRING_BASE, _) => {
                if let Some((index, base)) = message::vring_state(message.body())
                    && let Some(ring) = self.ring(index)
                {
                    ring.base = base;
                    // The ring's stop also drops its descriptors.
                    ring.has_kick = false;
                    ring.has_call = false;
                }
            }
            (request::GET_MAX_MEM_SLOTS | request::SET_DEVICE_STATE_FD, _) => {}
            (number, Some(error)) if error != 0 => self.request_failed(number),
            _ => {}
        }
    }

    fn request_failed(&mut self, number: u32) {
        if let Some(counter) = self.requests.get_mut(request_index(number)) {
            counter.errors += 1;
        }
    }

    /// Whether it is known what was acknowledged: not when the VMM goes on with an earlier session.
    fn knows_acknowledged(&self) -> bool {
        !self.assumed || self.features_acked.bits() != 0
    }

    fn ring(&mut self, index: u32) -> Option<&mut RingState> {
        self.rings.get_mut(usize::try_from(index).ok()?)
    }
}

fn unix_seconds() -> Option<u64> {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .map(|time| time.as_secs())
}

fn fresh_rings() -> [RingState; QUEUES] {
    QUEUE_NAMES.map(|queue| RingState {
        queue,
        layout: "split",
        ..RingState::default()
    })
}

#[cfg(test)]
#[path = "../tests/talk.rs"]
mod talk;

#[cfg(test)]
#[path = "../tests/negotiation.rs"]
mod tests;
