//! What the admin server and the metrics read: values taken from devices and sessions when somebody asks.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::capture::{self, Places};
use super::events::{Cause, DrainRequest, Event};
use super::sidecar::Views;
use super::status::Status;
use crate::admin::{Answer, CaptureRefused, CaptureRequest, Check, Chunks, ReloadAnswer, Source};
use crate::config::InboundProtocol;
use crate::confine::Confinement;
use crate::device::{Command, DeviceGauges, DeviceHandle, Rules};
use crate::drain;
use crate::metrics::{
    BuildInfo, Direction, MemoryMapChanges, Registry, RingSample, RuleMetrics, SessionSample, SessionState,
};
use crate::vhost_user::{self, NegotiationWatch, SessionTerms, Terms};

/// How long a device thread may take to describe itself. Its turns are milliseconds.
pub(super) const DEVICE_PATIENCE: Duration = Duration::from_millis(600);

/// One guest, as readers see it.
pub(super) struct GuestView {
    pub(super) config: Arc<crate::config::Guest>,
    pub(super) device: DeviceHandle,
    pub(super) session: Arc<NegotiationWatch>,
    /// What its sessions are told when they begin.
    pub(super) terms: Arc<Terms>,
    pub(super) rules: Arc<Rules>,
    pub(super) captures: Arc<Places>,
    /// The configuration has it no more, and it goes when its connections have ended.
    pub(super) is_leaving: bool,
}

impl GuestView {
    /// What of the configuration waits for its next session.
    fn waiting(&self) -> impl Iterator<Item = String> {
        let pending = self.terms.pending();
        let keys = pending.into_iter().flat_map(|(now, next)| {
            let cid = (now.cid != next.cid).then(|| format!("cid: {} -> {}", now.cid, next.cid));
            let policy = |terms: SessionTerms| format!("{:?}", terms.access_platform).to_lowercase();
            let (ours, other) = (policy(now), policy(next));
            let access = (ours != other).then(|| format!("vhostUser.accessPlatform: {ours} -> {other}"));
            [cid, access]
        });
        let name = self.config.name.clone();
        keys.flatten()
            .map(move |what| format!("guest {name}: {what} (from the guest's next session on)"))
    }
}

/// What the admin server reads.
pub(super) struct AdminSource {
    pub(super) registry: Arc<Registry>,
    pub(super) guests: Views,
    pub(super) captures: Places,
    pub(super) drain: drain::Watch,
    pub(super) events: Sender<Event>,
    pub(super) drain_request: DrainRequest,
    pub(super) status: Arc<Status>,
    pub(super) confinement: Confinement,
    pub(super) started: SystemTime,
}

impl Source for AdminSource {
    fn metrics(&self) -> Result<String, String> {
        self.registry.encode().map_err(|error| error.to_string())
    }

    fn state(&self) -> Answer<'_, Value> {
        Box::pin(async move {
            let views = self.guests.now();
            let mut guests = Vec::new();
            // All are asked before the first answer is awaited, so that one that hangs costs its own time only.
            let asked: Vec<_> = views
                .iter()
                .map(|guest| tokio::spawn(ask_device(guest.device.clone())))
                .collect();
            for (guest, answer) in views.iter().zip(asked) {
                guests.push(guest_state(guest, answer.await.ok().flatten()));
            }
            json!({
                "version": BuildInfo::CURRENT.version,
                "revision": BuildInfo::CURRENT.revision,
                "startedAt": unix_seconds(self.started),
                // Rates are differences of counters over differences of this.
                "now": unix_time(SystemTime::now()).as_secs_f64(),
                "draining": self.drain.is_draining(),
                "config": self.status.describe(views.iter().flat_map(GuestView::waiting).collect()),
                "confinement": self.confinement,
                "guests": guests,
            })
        })
    }

    fn live(&self) -> Answer<'_, Vec<Check>> {
        Box::pin(async move {
            let views = self.guests.now();
            let asked: Vec<_> = views
                .iter()
                .map(|guest| {
                    let device = guest.device.clone();
                    tokio::spawn(async move { device.ask(Command::Ping, DEVICE_PATIENCE).await })
                })
                .collect();
            let mut checks = Vec::new();
            for (guest, answer) in views.iter().zip(asked) {
                let name = format!("device thread of guest {}", guest.config.name);
                checks.push(match answer.await {
                    Ok(Ok(())) => Check::ok(name),
                    _ => Check::failed(name, "does not answer"),
                });
            }
            checks
        })
    }

    /// A guest whose VMM is not there yet is ready, unless the configuration demands a session: the VMM may well wait for this
    /// very probe. One that leaves is nobody's concern.
    fn ready(&self) -> Vec<Check> {
        let required = self.status.requires_session();
        let check = |guest: &GuestView| {
            let name = format!("vsock of guest {}", guest.config.name);
            match guest.session.unready() {
                Some(problem) => Check::failed(name, problem),
                None if required && !guest.session.is_running() => Check::failed(
                    name,
                    "readiness.requireSession is true, and there is no session: no VMM, or its guest's driver has not started",
                ),
                None => Check::ok(name),
            }
        };
        let views = self.guests.now();
        views
            .iter()
            .filter(|guest| !guest.is_leaving)
            .map(check)
            .collect()
    }

    fn reload(&self) -> Answer<'_, ReloadAnswer> {
        Box::pin(async move {
            let unavailable = || ReloadAnswer::Unavailable("the sidecar is shutting down".to_owned());
            if self.drain.is_draining() {
                return unavailable();
            }
            let (answer, outcome) = oneshot::channel();
            let reload = Event::Reload {
                cause: Cause::Request,
                answer: Some(answer),
            };
            match self.events.send(reload) {
                Ok(()) => outcome.await.unwrap_or_else(|_| unavailable()),
                Err(_) => unavailable(),
            }
        })
    }

    fn begin_drain(&self) {
        self.drain_request.begin_for("a request to the admin server");
    }

    fn capture(&self, request: CaptureRequest) -> Answer<'_, Result<Box<dyn Chunks>, CaptureRefused>> {
        Box::pin(capture::begin(self, request))
    }
}

async fn ask_device(device: DeviceHandle) -> Option<crate::device::DeviceSnapshot> {
    device.ask(Command::Snapshot, DEVICE_PATIENCE).await.ok()
}

fn guest_state(guest: &GuestView, device: Option<crate::device::DeviceSnapshot>) -> Value {
    let config = &guest.config;
    let outbound: Vec<Value> = config
        .outbound
        .iter()
        .enumerate()
        .map(|(index, rule)| {
            json!({
                "traffic": guest.rules.outbound(index).map(|rule| traffic(rule.metrics())),
                "name": rule.name,
                "ports": [rule.ports.start(), rule.ports.end()],
                "cid": rule.cid,
                "to": rule.target.to_string(),
                "proxyProtocol": rule.proxy_protocol,
            })
        })
        .collect();
    let inbound: Vec<Value> = config
        .inbound
        .iter()
        .enumerate()
        .map(|(index, rule)| {
            json!({
                "traffic": guest.rules.inbound(index).map(|rule| traffic(rule.metrics())),
                "name": rule.name,
                "listen": rule.listen.to_string(),
                "port": match rule.protocol {
                    InboundProtocol::Plain { port } => Some(port),
                    InboundProtocol::Connect => None,
                },
                "protocol": match rule.protocol {
                    InboundProtocol::Plain { .. } => "plain",
                    InboundProtocol::Connect => "connect",
                },
                // Empty: everyone.
                "allow": rule.allow.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "waitForGuest": rule.wait_for_guest,
            })
        })
        .collect();
    json!({
        "name": config.name,
        // That of the session, or of the next one.
        "cid": guest.session.cid(),
        "leaving": guest.is_leaving,
        "session": guest.session.record(),
        // null: the device thread did not answer in time.
        "device": device,
        "outbound": outbound,
        "inbound": inbound,
    })
}

/// What a rule has carried, from the counters that `/metrics` exports. Rules past the first [`crate::metrics::MAX_RULES`] have one
/// set of counters together, and say so.
fn traffic(rule: &RuleMetrics) -> Value {
    let bytes = |direction: Direction| {
        rule.upstream_bytes
            .get(direction as usize)
            .map(|bytes| bytes.get())
    };
    let refused: u64 = rule.refused.iter().map(|counter| counter.get()).sum();
    let mut traffic = json!({
        "active": rule.active.get().max(0),
        "opened": rule.opened.get(),
        "refused": refused,
        "bytesGuestToHost": bytes(Direction::GuestToHost),
        "bytesHostToGuest": bytes(Direction::HostToGuest),
    });
    if rule.is_shared()
        && let Some(fields) = traffic.as_object_mut()
    {
        fields.insert("shared".to_owned(), true.into());
    }
    traffic
}

/// The session families of one guest, as of now.
pub(super) fn sample(session: &NegotiationWatch, gauges: &DeviceGauges, draining: bool) -> SessionSample {
    let now = session.snapshot();
    let state = match now.state {
        _ if draining => SessionState::Draining,
        vhost_user::SessionState::Waiting => SessionState::Listening,
        vhost_user::SessionState::Connected => SessionState::Connected,
        vhost_user::SessionState::Negotiated => SessionState::Negotiated,
        vhost_user::SessionState::Running => SessionState::Running,
    };
    let mut rings = [RingSample::default(); 3];
    for (index, (sample, ring)) in rings.iter_mut().zip(&now.rings).enumerate() {
        *sample = RingSample {
            size: u16::try_from(ring.size).unwrap_or(u16::MAX),
            enabled: ring.enabled,
            started: ring.started,
            available: gauges.available(index),
        };
    }
    SessionSample {
        state,
        connected: now.connected,
        sessions: now.sessions_total,
        errors: now
            .session_errors
            .iter()
            .map(|error| (error.reason, error.count))
            .collect(),
        started: now.since.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds)),
        cid: now.cid,
        vmm_hint: now
            .peer
            .as_ref()
            .and_then(|peer| match peer.vmm_hint() {
                Some(hint) => Some(hint.label().to_owned()),
                None => peer.program.clone(),
            })
            .unwrap_or_default(),
        socket: now.socket.display().to_string(),
        requests: now
            .requests
            .iter()
            .map(|request| (request.request, request.count))
            .collect(),
        request_errors: now.requests.iter().map(|request| request.errors).sum(),
        features_offered: now.features_offered.bits(),
        features_acked: now.features_acked.bits(),
        protocol_features_offered: now.protocol_features_offered.bits(),
        protocol_features_acked: now.protocol_features_acked.bits(),
        rings,
        memory_regions: now.memory.len() as u64,
        memory_bytes: now.memory.iter().map(|region| region.size).sum(),
        memory_map_changes: MemoryMapChanges {
            set_table: now.memory_map_changes.set_table,
            add: now.memory_map_changes.add,
            remove: now.memory_map_changes.remove,
        },
        dirty_log_active: now.dirty_log_active,
        access_platform_mode: now.access_platform.mode.label(),
        backend_requests: now.access_platform.misses_sent,
        findings: now
            .findings
            .iter()
            .filter(|finding| finding.active)
            .map(|finding| finding.code)
            .collect(),
    }
}

fn unix_time(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn unix_seconds(time: SystemTime) -> u64 {
    unix_time(time).as_secs()
}

#[cfg(test)]
mod tests {
    use super::traffic;
    use crate::metrics::{Direction, GuestMetrics, LabelSets, MAX_RULES, names};
    use crate::vhost_user::{Features, FindingCode, TranslationMode};

    /// The session knows the bits and the metrics know the labels; neither may know the other, so this holds them together.
    #[test]
    fn session_and_metrics_call_every_feature_by_the_same_name() {
        for (metrics, session) in [
            (names::VIRTIO_FEATURES, Features::VIRTIO),
            (names::PROTOCOL_FEATURES, Features::PROTOCOL),
        ] {
            let metrics: Vec<_> = metrics.iter().map(|known| (known.bit, known.name)).collect();
            let session: Vec<_> = session
                .iter()
                .map(|(bit, name)| (u32::from(*bit), *name))
                .collect();
            assert_eq!(metrics, session);
        }
    }

    #[test]
    fn every_request_label_of_the_metrics_is_a_request_of_the_session() {
        for name in names::REQUESTS {
            assert!(crate::vhost_user::message::REQUEST_NAMES.contains(name), "{name}");
        }
    }

    #[test]
    fn session_and_metrics_call_every_finding_and_mode_by_the_same_name() {
        assert_eq!(names::FINDINGS, FindingCode::ALL.map(FindingCode::code));
        assert_eq!(
            names::ACCESS_PLATFORM_MODES,
            TranslationMode::ALL.map(TranslationMode::label)
        );
        for mode in TranslationMode::ALL {
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.label());
        }
    }

    #[test]
    fn traffic_is_what_the_counters_say_and_shared_counters_say_so() {
        let names: Vec<String> = (0..=MAX_RULES).map(|n| format!("rule{n}")).collect();
        let labels = LabelSets {
            refused: &["no_rule", "limit"],
            closed: &["drain"],
            misbehavior: &["unknown_op"],
            ring_errors: &["ring_memory"],
        };
        let rules = GuestMetrics::detached(&labels).rules(Direction::GuestToHost, &names);
        let first = &rules[0];
        first.opened.inc_by(3);
        first.active.set(2);
        first.refused.iter().for_each(|reason| reason.inc());
        first.upstream_bytes[Direction::GuestToHost as usize].inc_by(10);
        assert_eq!(
            traffic(&rules[0]),
            serde_json::json!({
                "active": 2, "opened": 3, "refused": 2, "bytesGuestToHost": 10, "bytesHostToGuest": 0
            })
        );
        assert_eq!(traffic(&rules[MAX_RULES])["shared"], true);
    }
}
