//! The families of one guest's vhost-user session: values that a session keeps anyway, sampled when `/metrics`
//! is read.
//!
//! The session hands in a closure; nothing is pushed and nothing is kept twice. What it returns is a plain value,
//! so a test writes one as a literal. Counters never go back, whatever the samples say (see [`SessionSample`]).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::guest::QUEUE_LABELS;
use super::names::{
    ACCESS_PLATFORM_MODES, FINDINGS, OTHER_REQUEST, PROTOCOL_FEATURES, REQUESTS, VIRTIO_FEATURES,
    unknown_bits,
};
use super::page::{Family, Page, counter, gauge};

/// Where a guest's session stands. Exactly one state holds at a time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum SessionState {
    /// No VMM is connected: we listen for one, or try to reach one.
    #[default]
    Listening,
    /// A VMM is connected and has acknowledged no features yet.
    Connected,
    /// Features are agreed, no ring runs yet.
    Negotiated,
    /// The rings run.
    Running,
    /// The sidecar is shutting down.
    Draining,
    /// The session cannot serve again without a restart of the sidecar.
    Failed,
}

impl SessionState {
    /// Every state.
    pub const ALL: [SessionState; 6] = [
        SessionState::Listening,
        SessionState::Connected,
        SessionState::Negotiated,
        SessionState::Running,
        SessionState::Draining,
        SessionState::Failed,
    ];

    /// The value of the label `state`.
    pub fn label(self) -> &'static str {
        match self {
            SessionState::Listening => "listening",
            SessionState::Connected => "connected",
            SessionState::Negotiated => "negotiated",
            SessionState::Running => "running",
            SessionState::Draining => "draining",
            SessionState::Failed => "failed",
        }
    }
}

/// Reasons of `vsock_session_errors_total`. A sample that names another reason is counted as the last one,
/// `other`.
pub const SESSION_ERROR_REASONS: &[&str] = &[
    "protocol",
    "feature",
    "memory",
    "vring",
    "io",
    "timeout",
    "peer_closed",
    "memory_lost",
    "panic",
    "other",
];

/// One virtqueue, as the session sees it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RingSample {
    /// Entries the VMM set; 0 before it did.
    pub size: u16,
    /// SET_VRING_ENABLE said 1.
    pub enabled: bool,
    /// The device runs the ring.
    pub started: bool,
    /// Entries the guest has made available and the device has not taken; 0 while the ring does not run.
    pub available: u16,
}

/// How often the memory map changed, since the process began.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct MemoryMapChanges {
    /// SET_MEM_TABLE.
    pub set_table: u64,
    /// ADD_MEM_REG.
    pub add: u64,
    /// REM_MEM_REG.
    pub remove: u64,
}

/// What a session tells about itself at one moment.
///
/// Counters are totals since the process began. One that falls is taken for a session that counts from 0 again,
/// and is added to what was seen before: what Prometheus reads never falls. (What such a session counted
/// between the last scrape and its end is lost, so totals that outlive the session are better.)
#[derive(Clone, PartialEq, Default, Debug)]
pub struct SessionSample {
    /// Where the session stands.
    pub state: SessionState,
    /// Whether a VMM is connected.
    pub connected: bool,
    /// VMM connections that were accepted, in total.
    pub sessions: u64,
    /// Sessions ended by an error, in total, by a reason of [`SESSION_ERROR_REASONS`].
    pub errors: Vec<(&'static str, u64)>,
    /// When the session that runs now began.
    pub started: Option<SystemTime>,
    /// The guest's CID.
    pub cid: u32,
    /// What the VMM seems to be (`qemu`, `cloud-hypervisor`); empty if nobody is connected or nothing is known.
    pub vmm_hint: String,
    /// Path of the vhost-user socket.
    pub socket: String,
    /// Front-end messages received, in total, by name of [`super::names::REQUESTS`]; others count as `other`.
    pub requests: Vec<(&'static str, u64)>,
    /// Front-end messages that were refused, in total.
    pub request_errors: u64,
    /// Virtio feature bits the device offers.
    pub features_offered: u64,
    /// Virtio feature bits the front-end has acknowledged; 0 if it has not.
    pub features_acked: u64,
    /// vhost-user protocol feature bits the device offers.
    pub protocol_features_offered: u64,
    /// vhost-user protocol feature bits the front-end has acknowledged.
    pub protocol_features_acked: u64,
    /// The rings: rx, tx, event.
    pub rings: [RingSample; 3],
    /// Regions of guest memory that are mapped.
    pub memory_regions: u64,
    /// Bytes of guest memory that are mapped.
    pub memory_bytes: u64,
    /// Changes of the memory map.
    pub memory_map_changes: MemoryMapChanges,
    /// LOG_ALL is acknowledged and a log is mapped: pages that are written are marked for migration.
    pub dirty_log_active: bool,
    /// How VIRTIO_F_ACCESS_PLATFORM is understood: one of [`super::names::ACCESS_PLATFORM_MODES`]; empty, the default,
    /// stands for the first.
    pub access_platform_mode: &'static str,
    /// Messages sent to the VMM on the backend channel (IOTLB misses), in total.
    pub backend_requests: u64,
    /// Codes of the findings that hold; those of [`super::names::FINDINGS`] are exported.
    pub findings: Vec<&'static str>,
}

/// Longest value of a label whose text comes from outside, in bytes.
const MAX_LABEL: usize = 64;

static ACTIVE: Family = gauge(
    "vsock_session_active",
    &["guest"],
    "Whether a VMM is connected to the guest's vhost-user socket.",
);
static STATE: Family = gauge(
    "vsock_session_state",
    &["guest", "state"],
    "State of the vhost-user session; exactly one state is 1.",
);
static SESSIONS: Family = counter(
    "vsock_sessions_total",
    &["guest"],
    "VMM connections accepted on the guest's vhost-user socket.",
);
static ERRORS: Family = counter(
    "vsock_session_errors_total",
    &["guest", "reason"],
    "vhost-user sessions that ended by an error, by reason.",
);
static STARTED: Family = gauge(
    "vsock_session_start_timestamp_seconds",
    &["guest"],
    "Unix time at which the current vhost-user session began, 0 if there is none.",
);
static INFO: Family = gauge(
    "vsock_session_info",
    &["guest", "guest_cid", "vmm_hint", "socket"],
    "Identity of the guest and its VMM, 1 while the VMM is connected.",
);
static REQUESTS_RECEIVED: Family = counter(
    "vsock_vhost_user_requests_total",
    &["guest", "request"],
    "vhost-user messages received from the VMM.",
);
static REQUEST_ERRORS: Family = counter(
    "vsock_vhost_user_request_errors_total",
    &["guest"],
    "vhost-user messages of the VMM that were refused or could not be carried out.",
);
static FEATURE_OFFERED: Family = gauge(
    "vsock_virtio_feature_offered",
    &["guest", "feature"],
    "Whether the device offers the virtio feature.",
);
static FEATURE_ACKED: Family = gauge(
    "vsock_virtio_feature_acked",
    &["guest", "feature"],
    "Whether the VMM has acknowledged the virtio feature for the guest's driver or for itself.",
);
static FEATURES_UNKNOWN: Family = gauge(
    "vsock_virtio_features_unknown_acked",
    &["guest"],
    "Number of acknowledged virtio feature bits that this version has no name for.",
);
static PROTOCOL_OFFERED: Family = gauge(
    "vsock_protocol_feature_offered",
    &["guest", "feature"],
    "Whether the device offers the vhost-user protocol feature.",
);
static PROTOCOL_ACKED: Family = gauge(
    "vsock_protocol_feature_acked",
    &["guest", "feature"],
    "Whether the VMM has acknowledged the vhost-user protocol feature.",
);
static VRING_ENABLED: Family = gauge(
    "vsock_vring_enabled",
    &["guest", "queue"],
    "Whether the VMM has enabled the virtqueue.",
);
static VRING_STARTED: Family = gauge(
    "vsock_vring_started",
    &["guest", "queue"],
    "Whether the device serves the virtqueue.",
);
static VRING_SIZE: Family = gauge(
    "vsock_vring_size",
    &["guest", "queue"],
    "Descriptors in the virtqueue, 0 before it is set up.",
);
static VRING_AVAILABLE: Family = gauge(
    "vsock_vring_available_descriptors",
    &["guest", "queue"],
    "Buffers the guest has made available and the device has not taken yet.",
);
static MEMORY_REGIONS: Family = gauge(
    "vsock_memory_regions",
    &["guest"],
    "Regions of guest memory that are mapped.",
);
static MEMORY_BYTES: Family = gauge(
    "vsock_memory_region_bytes",
    &["guest"],
    "Bytes of guest memory that are mapped.",
);
static MEMORY_CHANGES: Family = counter(
    "vsock_memory_map_changes_total",
    &["guest", "op"],
    "Changes of the guest memory map by the VMM.",
);
static DIRTY_LOG: Family = gauge(
    "vsock_dirty_log_active",
    &["guest"],
    "Whether written guest pages are logged, which a VMM asks for during a live migration.",
);
static ACCESS_PLATFORM_MODE: Family = gauge(
    "vsock_access_platform_mode",
    &["guest", "mode"],
    "How VIRTIO_F_ACCESS_PLATFORM is understood; exactly one mode is 1.",
);
static IOTLB_ENABLED: Family = gauge(
    "vsock_iotlb_enabled",
    &["guest"],
    "Whether addresses are translated through the IOTLB.",
);
static BACKEND_REQUESTS: Family = counter(
    "vsock_backend_requests_total",
    &["guest", "request"],
    "vhost-user messages sent to the VMM on the backend channel.",
);
static FINDING: Family = gauge(
    "vsock_finding",
    &["guest", "code"],
    "Whether the finding holds; docs/findings.md says what it means and what to change.",
);

static FAMILIES: [&Family; 25] = [
    &ACTIVE,
    &STATE,
    &SESSIONS,
    &ERRORS,
    &STARTED,
    &INFO,
    &REQUESTS_RECEIVED,
    &REQUEST_ERRORS,
    &FEATURE_OFFERED,
    &FEATURE_ACKED,
    &FEATURES_UNKNOWN,
    &PROTOCOL_OFFERED,
    &PROTOCOL_ACKED,
    &VRING_ENABLED,
    &VRING_STARTED,
    &VRING_SIZE,
    &VRING_AVAILABLE,
    &MEMORY_REGIONS,
    &MEMORY_BYTES,
    &MEMORY_CHANGES,
    &DIRTY_LOG,
    &ACCESS_PLATFORM_MODE,
    &IOTLB_ENABLED,
    &BACKEND_REQUESTS,
    &FINDING,
];

type Sampler = Box<dyn Fn() -> SessionSample + Send + Sync>;

/// One guest's session and what its counters have shown so far.
struct Session {
    guest: String,
    sample: Sampler,
    totals: Totals,
}

/// All sessions of the process; a collector of the registry.
#[derive(Clone)]
pub(super) struct Sessions {
    descs: Arc<[Desc]>,
    /// Locked for the whole of a scrape: samples of two scrapes at once would otherwise be seen out of order,
    /// and an older one would look like a counter that fell.
    sessions: Arc<Mutex<Vec<Session>>>,
}

impl Sessions {
    pub(super) fn register(to: &prometheus::Registry) -> prometheus::Result<Sessions> {
        let descs: Vec<Desc> = FAMILIES.into_iter().map(Family::desc).collect::<Result<_, _>>()?;
        let sessions = Sessions {
            descs: descs.into(),
            sessions: Arc::default(),
        };
        to.register(Box::new(sessions.clone()))?;
        Ok(sessions)
    }

    /// Exports `guest` from now on; a sampler that stood for the same name before is replaced.
    pub(super) fn add(&self, guest: &str, sample: Sampler) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        match sessions.iter_mut().find(|session| session.guest == guest) {
            Some(session) => session.sample = sample,
            None => sessions.push(Session {
                guest: guest.to_owned(),
                sample,
                totals: Totals::default(),
            }),
        }
    }
}

impl Sessions {
    /// Exports `guest` no more. Its counters begin anew should it come back.
    pub(super) fn remove(&self, guest: &str) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|session| session.guest != guest);
    }
}

impl Collector for Sessions {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut page = Page::default();
        for session in sessions.iter_mut() {
            let sample = (session.sample)();
            let mut writer = Writer {
                page: &mut page,
                guest: &session.guest,
                totals: &mut session.totals,
            };
            write(&sample, &mut writer);
        }
        page.finish()
    }
}

/// Writes every family of one session.
fn write(sample: &SessionSample, to: &mut Writer<'_>) {
    to.flag(&ACTIVE, &[], sample.connected);
    for state in SessionState::ALL {
        to.flag(&STATE, &[state.label()], sample.state == state);
    }
    to.total(&SESSIONS, &[], sample.sessions);
    for (reason, count) in closed(&sample.errors, SESSION_ERROR_REASONS, "other") {
        to.total(&ERRORS, &[reason], count);
    }
    let started = sample.started.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    to.value(&STARTED, &[], started.map_or(0.0, |since| since.as_secs_f64()));
    let (cid, vmm) = (sample.cid.to_string(), truncated(&sample.vmm_hint));
    to.flag(&INFO, &[&cid, vmm, &sample.socket], sample.connected);

    for (request, count) in closed(&sample.requests, REQUESTS, OTHER_REQUEST) {
        to.total(&REQUESTS_RECEIVED, &[request], count);
    }
    to.total(&REQUEST_ERRORS, &[], sample.request_errors);

    for known in VIRTIO_FEATURES {
        to.flag(
            &FEATURE_OFFERED,
            &[known.name],
            sample.features_offered >> known.bit & 1 == 1,
        );
        to.flag(
            &FEATURE_ACKED,
            &[known.name],
            sample.features_acked >> known.bit & 1 == 1,
        );
    }
    to.value(
        &FEATURES_UNKNOWN,
        &[],
        f64::from(unknown_bits(VIRTIO_FEATURES, sample.features_acked)),
    );
    for known in PROTOCOL_FEATURES {
        to.flag(
            &PROTOCOL_OFFERED,
            &[known.name],
            sample.protocol_features_offered >> known.bit & 1 == 1,
        );
        to.flag(
            &PROTOCOL_ACKED,
            &[known.name],
            sample.protocol_features_acked >> known.bit & 1 == 1,
        );
    }

    for (queue, ring) in QUEUE_LABELS.into_iter().zip(sample.rings) {
        to.flag(&VRING_ENABLED, &[queue], ring.enabled);
        to.flag(&VRING_STARTED, &[queue], ring.started);
        to.value(&VRING_SIZE, &[queue], f64::from(ring.size));
        to.value(&VRING_AVAILABLE, &[queue], f64::from(ring.available));
    }
    to.value(&MEMORY_REGIONS, &[], sample.memory_regions as f64);
    to.value(&MEMORY_BYTES, &[], sample.memory_bytes as f64);
    to.total(
        &MEMORY_CHANGES,
        &["set_table"],
        sample.memory_map_changes.set_table,
    );
    to.total(&MEMORY_CHANGES, &["add"], sample.memory_map_changes.add);
    to.total(&MEMORY_CHANGES, &["remove"], sample.memory_map_changes.remove);
    to.flag(&DIRTY_LOG, &[], sample.dirty_log_active);

    let mode = ACCESS_PLATFORM_MODES
        .into_iter()
        .find(|mode| *mode == sample.access_platform_mode)
        .unwrap_or(ACCESS_PLATFORM_MODES[0]);
    for known in ACCESS_PLATFORM_MODES {
        to.flag(&ACCESS_PLATFORM_MODE, &[known], known == mode);
    }
    to.flag(&IOTLB_ENABLED, &[], mode == "translate");
    to.total(&BACKEND_REQUESTS, &["iotlb_msg"], sample.backend_requests);
    for code in FINDINGS {
        to.flag(&FINDING, &[code], sample.findings.contains(&code));
    }
}

/// One count for each name of `known`, 0 where the sample has none, and the rest of the sample summed as `other`.
fn closed(
    sample: &[(&'static str, u64)],
    known: &'static [&'static str],
    other: &'static str,
) -> impl Iterator<Item = (&'static str, u64)> {
    let mut counts: Vec<(&'static str, u64)> = known.iter().map(|name| (*name, 0)).collect();
    if !known.contains(&other) {
        counts.push((other, 0));
    }
    for &(name, count) in sample {
        let name = if known.contains(&name) { name } else { other };
        if let Some((_, sum)) = counts.iter_mut().find(|(known, _)| *known == name) {
            *sum = sum.saturating_add(count);
        }
    }
    counts.into_iter()
}

/// `text` cut to [`MAX_LABEL`] bytes at a character's boundary.
fn truncated(text: &str) -> &str {
    let end = (0..=MAX_LABEL.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    text.get(..end.unwrap_or(0)).unwrap_or("")
}

/// What the counters of one guest have shown, by family and label values.
#[derive(Default)]
struct Totals(HashMap<(&'static str, String), Total>);

#[derive(Clone, Copy, Default)]
struct Total {
    /// Sum of the runs that ended.
    before: u64,
    /// Last sample of the present run.
    last: u64,
}

impl Totals {
    fn advance(&mut self, family: &'static str, labels: &[&str], sample: u64) -> u64 {
        let total = self.0.entry((family, labels.join("\0"))).or_default();
        if sample < total.last {
            total.before = total.before.saturating_add(total.last);
        }
        total.last = sample;
        total.before.saturating_add(sample)
    }
}

/// Writes the series of one guest.
struct Writer<'a> {
    page: &'a mut Page,
    guest: &'a str,
    totals: &'a mut Totals,
}

impl Writer<'_> {
    fn flag(&mut self, family: &'static Family, labels: &[&str], is: bool) {
        self.value(family, labels, if is { 1.0 } else { 0.0 });
    }

    fn total(&mut self, family: &'static Family, labels: &[&str], sample: u64) {
        let total = self.totals.advance(family.name, labels, sample);
        self.value(family, labels, total as f64);
    }

    fn value(&mut self, family: &'static Family, labels: &[&str], value: f64) {
        let labels: Vec<&str> = std::iter::once(self.guest)
            .chain(labels.iter().copied())
            .collect();
        self.page.push(family, &labels, value);
    }
}
