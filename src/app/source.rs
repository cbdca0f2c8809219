//! What the admin server and the metrics read: values taken from devices and sessions when somebody asks.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::admin::{Answer, Check, Source};
use crate::config::{InboundProtocol, ListenAddress, Target};
use crate::device::{Command, DeviceGauges, DeviceHandle};
use crate::drain;
use crate::metrics::{BuildInfo, MemoryMapChanges, Registry, RingSample, SessionSample, SessionState};
use crate::vhost_user::{self, NegotiationWatch};

/// How long a device thread may take to describe itself. Its turns are milliseconds.
const DEVICE_PATIENCE: Duration = Duration::from_millis(600);

/// One guest, as readers see it.
#[derive(Clone)]
pub(super) struct GuestView {
    pub(super) config: Arc<crate::config::Guest>,
    pub(super) device: DeviceHandle,
    pub(super) session: Arc<NegotiationWatch>,
}

/// What the admin server reads.
pub(super) struct AdminSource {
    pub(super) registry: Arc<Registry>,
    pub(super) guests: Vec<GuestView>,
    pub(super) drain: drain::Watch,
    pub(super) started: SystemTime,
}

impl Source for AdminSource {
    fn metrics(&self) -> Result<String, String> {
        self.registry.encode().map_err(|error| error.to_string())
    }

    fn state(&self) -> Answer<'_, Value> {
        Box::pin(async move {
            let mut guests = Vec::new();
            // All are asked before the first answer is awaited, so that one that hangs costs its own time only.
            let asked: Vec<_> = self
                .guests
                .iter()
                .map(|guest| tokio::spawn(ask_device(guest.device.clone())))
                .collect();
            for (guest, answer) in self.guests.iter().zip(asked) {
                guests.push(guest_state(guest, answer.await.ok().flatten()));
            }
            json!({
                "version": BuildInfo::CURRENT.version,
                "revision": BuildInfo::CURRENT.revision,
                "startedAt": unix_seconds(self.started),
                "draining": self.drain.is_draining(),
                "guests": guests,
            })
        })
    }

    fn live(&self) -> Answer<'_, Vec<Check>> {
        Box::pin(async move {
            let asked: Vec<_> = self
                .guests
                .iter()
                .map(|guest| {
                    let device = guest.device.clone();
                    tokio::spawn(async move { device.ask(Command::Ping, DEVICE_PATIENCE).await })
                })
                .collect();
            let mut checks = Vec::new();
            for (guest, answer) in self.guests.iter().zip(asked) {
                let name = format!("device thread of guest {}", guest.config.name);
                checks.push(match answer.await {
                    Ok(Ok(())) => Check::ok(name),
                    _ => Check::failed(name, "does not answer"),
                });
            }
            checks
        })
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
        .map(|rule| {
            json!({
                "name": rule.name,
                "ports": [rule.ports.start(), rule.ports.end()],
                "to": match &rule.target {
                    Target::Tcp { host, port } if host.contains(':') => format!("tcp://[{host}]:{port}"),
                    Target::Tcp { host, port } => format!("tcp://{host}:{port}"),
                    Target::Unix { path } => format!("unix://{path}"),
                },
            })
        })
        .collect();
    let inbound: Vec<Value> = config
        .inbound
        .iter()
        .map(|rule| {
            json!({
                "name": rule.name,
                "listen": match &rule.listen {
                    ListenAddress::Tcp(address) => format!("tcp://{address}"),
                    ListenAddress::Unix(path) => format!("unix://{}", path.display()),
                },
                "port": match rule.protocol {
                    InboundProtocol::Plain { port } => Some(port),
                    InboundProtocol::Connect => None,
                },
                "protocol": match rule.protocol {
                    InboundProtocol::Plain { .. } => "plain",
                    InboundProtocol::Connect => "connect",
                },
            })
        })
        .collect();
    json!({
        "name": config.name,
        "cid": config.cid,
        "session": guest.session.snapshot(),
        // null: the device thread did not answer in time.
        "device": device,
        "outbound": outbound,
        "inbound": inbound,
    })
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
            .and_then(|peer| peer.program.clone())
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
    }
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use crate::metrics::names;
    use crate::vhost_user::Features;

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
}
