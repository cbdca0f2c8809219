//! The metric families of one guest's data path: handles resolved once at start, so that counting is a relaxed
//! add.
//!
//! Label values are handed in by whoever owns the enum; each array is indexed by that enum (`reason as usize`).

use std::sync::Arc;

use prometheus::{
    Counter, CounterVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts,
};

use super::Registry;
use super::iotlb::{IotlbFamilies, IotlbMetrics};

/// Which way bytes and packets go.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// From the guest to a host socket.
    GuestToHost = 0,
    /// From a host socket to the guest.
    HostToGuest = 1,
}

impl Direction {
    /// Every direction's label.
    pub const LABELS: [&'static str; 2] = ["guest_to_host", "host_to_guest"];
    /// Both directions.
    pub const ALL: [Direction; 2] = [Direction::GuestToHost, Direction::HostToGuest];

    /// The metric label of this direction.
    pub fn label(self) -> &'static str {
        Self::LABELS[self as usize]
    }
}

/// Labels of `op` in `vsock_packets_total`; index 0 stands for every operation the standard does not know.
pub const OP_LABELS: [&str; 8] = [
    "invalid",
    "request",
    "response",
    "rst",
    "shutdown",
    "rw",
    "credit_update",
    "credit_request",
];
/// Labels of `socket_type`; index 0 stands for every type the standard does not know.
pub const SOCKET_TYPE_LABELS: [&str; 3] = ["other", "stream", "seqpacket"];
/// Labels of `queue`, in the order of the device's virtqueues.
pub const QUEUE_LABELS: [&str; 3] = ["rx", "tx", "event"];

/// How many rule names of one guest and direction get series of their own. A rule costs about 30 series, so a
/// file with a thousand rules must not become a page with thirty thousand lines.
pub const MAX_RULES: usize = 64;
/// The rule label that all rules after the first [`MAX_RULES`] share.
pub const OVERFLOW_RULE: &str = "_overflow";

/// Label values that come from enums of other modules.
#[derive(Clone, Copy, Debug)]
pub struct LabelSets {
    /// `reason` of `vsock_connections_refused_total`.
    pub refused: &'static [&'static str],
    /// `reason` of `vsock_connections_closed_total`.
    pub closed: &'static [&'static str],
    /// `kind` of `vsock_misbehavior_total`.
    pub misbehavior: &'static [&'static str],
    /// `reason` of `vsock_vring_errors_total`.
    pub ring_errors: &'static [&'static str],
}

/// The names of one guest's rules, in the order of the configuration.
#[derive(Clone, Default, Debug)]
pub struct RuleNames {
    /// Names of the `outbound` rules.
    pub outbound: Vec<String>,
    /// Names of the `inbound` rules.
    pub inbound: Vec<String>,
}

/// Every family that has a `guest` label and is written by the device thread.
pub(super) struct GuestFamilies {
    packets: IntCounterVec,
    payload_bytes: IntCounterVec,
    misbehavior: IntCounterVec,
    opened: IntCounterVec,
    active: IntGaugeVec,
    refused: IntCounterVec,
    closed: IntCounterVec,
    duration: HistogramVec,
    dials: IntCounterVec,
    dial_failures: IntCounterVec,
    dial_duration: HistogramVec,
    upstream_bytes: IntCounterVec,
    credit_stalls: IntCounterVec,
    credit_stall_seconds: CounterVec,
    backpressure_pauses: IntCounterVec,
    buffered_bytes: IntGaugeVec,
    buffer_memory: IntGaugeVec,
    buffer_memory_limit: IntGaugeVec,
    connections_limit: IntGaugeVec,
    ring_full: IntCounterVec,
    ring_full_seconds: CounterVec,
    ring_errors: IntCounterVec,
    kicks: IntCounterVec,
    kicks_suppressed: IntCounterVec,
    interrupts: IntCounterVec,
    interrupts_suppressed: IntCounterVec,
    busy_polls: IntCounterVec,
    busy_poll_seconds: CounterVec,
    capture_dropped_packets: IntCounterVec,
    device_panics: IntCounterVec,
    rules: IntGaugeVec,
    iotlb: IotlbFamilies,
}

impl GuestFamilies {
    pub(super) fn register(to: &prometheus::Registry) -> prometheus::Result<GuestFamilies> {
        let counters = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntCounterVec> {
            let family = IntCounterVec::new(Opts::new(name, help), labels)?;
            to.register(Box::new(family.clone()))?;
            Ok(family)
        };
        let seconds = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<CounterVec> {
            let family = CounterVec::new(Opts::new(name, help), labels)?;
            to.register(Box::new(family.clone()))?;
            Ok(family)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| -> prometheus::Result<IntGaugeVec> {
            let family = IntGaugeVec::new(Opts::new(name, help), labels)?;
            to.register(Box::new(family.clone()))?;
            Ok(family)
        };
        let histograms =
            |name: &str, help: &str, labels: &[&str], buckets: &[f64]| -> prometheus::Result<HistogramVec> {
                let family =
                    HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?;
                to.register(Box::new(family.clone()))?;
                Ok(family)
            };
        Ok(GuestFamilies {
            packets: counters(
                "vsock_packets_total",
                "vsock packets, by direction, operation and socket type.",
                &["guest", "direction", "op", "socket_type"],
            )?,
            payload_bytes: counters(
                "vsock_payload_bytes_total",
                "Payload bytes of vsock RW packets.",
                &["guest", "direction", "socket_type"],
            )?,
            misbehavior: counters(
                "vsock_misbehavior_total",
                "Packets of the guest that break the virtio-vsock protocol, by what is wrong with them.",
                &["guest", "kind"],
            )?,
            opened: counters(
                "vsock_connections_opened_total",
                "Connections established; direction says who asked for them.",
                &["guest", "direction", "rule"],
            )?,
            active: gauges(
                "vsock_connections_active",
                "Connections that are established now.",
                &["guest", "direction", "rule"],
            )?,
            refused: counters(
                "vsock_connections_refused_total",
                "Connections that were asked for and not made, by reason.",
                &["guest", "direction", "rule", "reason"],
            )?,
            closed: counters(
                "vsock_connections_closed_total",
                "Established connections that ended, by reason.",
                &["guest", "direction", "rule", "reason"],
            )?,
            duration: histograms(
                "vsock_connection_duration_seconds",
                "How long established connections lasted.",
                &["guest", "direction"],
                &[0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0],
            )?,
            dials: counters(
                "vsock_tcp_dials_total",
                "Attempts to reach the target of an outbound rule.",
                &["guest", "rule"],
            )?,
            dial_failures: counters(
                "vsock_tcp_dial_failures_total",
                "Attempts to reach the target of an outbound rule that failed.",
                &["guest", "rule"],
            )?,
            dial_duration: histograms(
                "vsock_tcp_dial_duration_seconds",
                "Time to connect to the target of an outbound rule, name resolution included, successes only.",
                &["guest", "rule"],
                &[
                    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                ],
            )?,
            upstream_bytes: counters(
                "vsock_upstream_bytes_total",
                "Bytes written to and read from host sockets.",
                &["guest", "direction", "rule"],
            )?,
            credit_stalls: counters(
                "vsock_credit_stalls_total",
                "Times a sender had data and no credit from its peer.",
                &["guest", "direction"],
            )?,
            credit_stall_seconds: seconds(
                "vsock_credit_stall_seconds_total",
                "Time senders waited for credit, summed over connections.",
                &["guest", "direction"],
            )?,
            backpressure_pauses: counters(
                "vsock_backpressure_pauses_total",
                "Times a receiver took less than it was given, so that the sender had to wait.",
                &["guest", "direction"],
            )?,
            buffered_bytes: gauges(
                "vsock_buffered_bytes",
                "Bytes held in buffers of the sidecar because their receiver does not take them.",
                &["guest", "direction"],
            )?,
            buffer_memory: gauges(
                "vsock_buffer_memory_bytes",
                "Memory of buffers for bytes that services do not take, all connections of the guest together.",
                &["guest"],
            )?,
            buffer_memory_limit: gauges(
                "vsock_buffer_memory_limit_bytes",
                "Memory that such buffers of the guest may have (limits.memory).",
                &["guest"],
            )?,
            connections_limit: gauges(
                "vsock_connections_limit",
                "Connections that the guest may have at once (limits.connections).",
                &["guest"],
            )?,
            ring_full: counters(
                "vsock_vring_full_total",
                "Times a packet waited because the guest offered no buffer.",
                &["guest", "queue"],
            )?,
            ring_full_seconds: seconds(
                "vsock_vring_full_seconds_total",
                "Time packets waited for a buffer of the guest.",
                &["guest", "queue"],
            )?,
            ring_errors: counters(
                "vsock_vring_errors_total",
                "Malformed descriptor chains and rings, by what is wrong with them.",
                &["guest", "queue", "reason"],
            )?,
            kicks: counters(
                "vsock_kicks_total",
                "Notifications received from the guest.",
                &["guest", "queue"],
            )?,
            kicks_suppressed: counters(
                "vsock_kicks_suppressed_total",
                "Rounds that found work in a ring without a notification.",
                &["guest", "queue"],
            )?,
            interrupts: counters(
                "vsock_interrupts_total",
                "Interrupts sent to the guest.",
                &["guest", "queue"],
            )?,
            interrupts_suppressed: counters(
                "vsock_interrupts_suppressed_total",
                "Bursts after which the guest wanted no interrupt.",
                &["guest", "queue"],
            )?,
            busy_polls: counters(
                "vsock_busy_polls_total",
                "Times the device looked for the guest's next packet before it slept (limits.busyPoll).",
                &["guest", "result"],
            )?,
            busy_poll_seconds: seconds(
                "vsock_busy_poll_seconds_total",
                "Processor time spent looking for the guest's next packet.",
                &["guest"],
            )?,
            capture_dropped_packets: counters(
                "vsock_capture_dropped_packets_total",
                "Packets that are missing in captures because their reader was too slow.",
                &["guest"],
            )?,
            device_panics: counters(
                "vsock_device_panics_total",
                "Panics of the guest's device thread, each of which ended the guest's session and nothing else.",
                &["guest"],
            )?,
            rules: gauges(
                "vsock_rules",
                "Rules of the configuration.",
                &["guest", "direction"],
            )?,
            iotlb: IotlbFamilies::register(to)?,
        })
    }
}

/// Counters of one virtqueue.
#[derive(Clone, Debug)]
pub struct QueueMetrics {
    /// Notifications received.
    pub kicks: IntCounter,
    /// Rounds that found work without a notification.
    pub kicks_suppressed: IntCounter,
    /// Interrupts sent.
    pub interrupts: IntCounter,
    /// Bursts without an interrupt.
    pub interrupts_suppressed: IntCounter,
    /// Times a packet waited for a buffer.
    pub full: IntCounter,
    /// Seconds packets waited for a buffer.
    pub full_seconds: Counter,
    /// Malformed chains, indexed by the ring's error enum.
    pub errors: Vec<IntCounter>,
}

/// What looking for the guest's next packet has come to.
#[derive(Debug)]
pub struct BusyPollMetrics {
    /// Times there was one.
    pub hits: IntCounter,
    /// Times there was none, and the device went to sleep.
    pub misses: IntCounter,
    /// Seconds spent.
    pub seconds: Counter,
}

/// Counters of one rule of the configuration.
///
/// Rules past [`MAX_RULES`] hold the same counters and gauges as each other, so gauges are added to, never set.
#[derive(Clone, Debug)]
pub struct RuleMetrics {
    /// The rule's name in the configuration, also when its label is [`OVERFLOW_RULE`].
    pub name: String,
    /// Connections established.
    pub opened: IntCounter,
    /// Connections open now.
    pub active: IntGauge,
    /// Connections refused, indexed by the refuse reason.
    pub refused: Vec<IntCounter>,
    /// Connections ended, indexed by the close reason.
    pub closed: Vec<IntCounter>,
    /// Host-socket bytes, indexed by [`Direction`].
    pub upstream_bytes: [IntCounter; 2],
    /// Attempts to reach the target (outbound rules).
    pub dials: Option<IntCounter>,
    /// Failed attempts (outbound rules).
    pub dial_failures: Option<IntCounter>,
    /// Time of successful attempts in seconds (outbound rules).
    pub dial_duration: Option<Histogram>,
}

/// Everything that one guest's device thread counts. Cheap to share; every method is a relaxed atomic add.
#[derive(Debug)]
pub struct GuestMetrics {
    packets: Vec<IntCounter>,
    payload_bytes: Vec<IntCounter>,
    /// Packets that break the protocol, indexed by the misbehavior enum.
    pub misbehavior: Vec<IntCounter>,
    /// Outbound rules in the order of the configuration.
    pub outbound: Vec<RuleMetrics>,
    /// Inbound rules in the order of the configuration.
    pub inbound: Vec<RuleMetrics>,
    /// Requests of the guest that no rule matches (`rule=""`); only `refused` is exported, the rest cannot happen.
    pub no_rule: RuleMetrics,
    /// Lifetime of established connections in seconds, indexed by [`Direction`].
    pub duration: [Histogram; 2],
    /// Senders that ran out of credit, indexed by [`Direction`].
    pub credit_stalls: [IntCounter; 2],
    /// Seconds senders waited for credit, indexed by [`Direction`].
    pub credit_stall_seconds: [Counter; 2],
    /// Receivers that took less than they were given, indexed by [`Direction`].
    pub backpressure_pauses: [IntCounter; 2],
    /// Bytes in our buffers, indexed by [`Direction`].
    pub buffered_bytes: [IntGauge; 2],
    /// Memory of buffers in bytes; set by the device at the end of a turn.
    pub buffer_memory: IntGauge,
    buffer_memory_limit: IntGauge,
    connections_limit: IntGauge,
    /// Per virtqueue: rx, tx, event.
    pub queues: [QueueMetrics; 3],
    /// Looking for the guest's next packet.
    pub busy_poll: BusyPollMetrics,
    /// Packets that are missing in captures.
    pub capture_dropped_packets: IntCounter,
    /// Panics of the device thread that were contained.
    pub device_panics: IntCounter,
    /// Translations of I/O virtual addresses.
    pub iotlb: IotlbMetrics,
}

impl GuestMetrics {
    /// A guest's metrics that no registry exports, for tests and benches.
    pub fn detached(rules: &RuleNames, labels: &LabelSets) -> Arc<GuestMetrics> {
        Registry::new()
            .expect("families have valid names")
            .guest("detached", rules, labels)
    }

    pub(super) fn resolve(
        f: &GuestFamilies,
        guest: &str,
        rules: &RuleNames,
        labels: &LabelSets,
    ) -> GuestMetrics {
        let mut packets = Vec::new();
        let mut payload_bytes = Vec::new();
        for direction in Direction::LABELS {
            for op in OP_LABELS {
                for socket_type in SOCKET_TYPE_LABELS {
                    packets.push(f.packets.with_label_values(&[guest, direction, op, socket_type]));
                }
            }
            for socket_type in SOCKET_TYPE_LABELS {
                payload_bytes.push(
                    f.payload_bytes
                        .with_label_values(&[guest, direction, socket_type]),
                );
            }
        }
        f.rules
            .with_label_values(&[guest, Direction::GuestToHost.label()])
            .set(rules.outbound.len() as i64);
        f.rules
            .with_label_values(&[guest, Direction::HostToGuest.label()])
            .set(rules.inbound.len() as i64);
        let rule = |(index, name): (usize, &String), opened_by: Direction, dials: bool| {
            let by = opened_by.label();
            let config_name = name.clone();
            let name = if index < MAX_RULES {
                name.as_str()
            } else {
                OVERFLOW_RULE
            };
            RuleMetrics {
                name: config_name,
                opened: f.opened.with_label_values(&[guest, by, name]),
                active: f.active.with_label_values(&[guest, by, name]),
                refused: labels
                    .refused
                    .iter()
                    .map(|reason| f.refused.with_label_values(&[guest, by, name, reason]))
                    .collect(),
                closed: labels
                    .closed
                    .iter()
                    .map(|reason| f.closed.with_label_values(&[guest, by, name, reason]))
                    .collect(),
                upstream_bytes: Direction::LABELS
                    .map(|direction| f.upstream_bytes.with_label_values(&[guest, direction, name])),
                dials: dials.then(|| f.dials.with_label_values(&[guest, name])),
                dial_failures: dials.then(|| f.dial_failures.with_label_values(&[guest, name])),
                dial_duration: dials.then(|| f.dial_duration.with_label_values(&[guest, name])),
            }
        };
        let queue = |name: &str| QueueMetrics {
            kicks: f.kicks.with_label_values(&[guest, name]),
            kicks_suppressed: f.kicks_suppressed.with_label_values(&[guest, name]),
            interrupts: f.interrupts.with_label_values(&[guest, name]),
            interrupts_suppressed: f.interrupts_suppressed.with_label_values(&[guest, name]),
            full: f.ring_full.with_label_values(&[guest, name]),
            full_seconds: f.ring_full_seconds.with_label_values(&[guest, name]),
            errors: labels
                .ring_errors
                .iter()
                .map(|reason| f.ring_errors.with_label_values(&[guest, name, reason]))
                .collect(),
        };
        let by_direction =
            |family: &IntCounterVec| Direction::LABELS.map(|d| family.with_label_values(&[guest, d]));
        GuestMetrics {
            packets,
            payload_bytes,
            misbehavior: labels
                .misbehavior
                .iter()
                .map(|kind| f.misbehavior.with_label_values(&[guest, kind]))
                .collect(),
            outbound: rules
                .outbound
                .iter()
                .enumerate()
                .map(|r| rule(r, Direction::GuestToHost, true))
                .collect(),
            inbound: rules
                .inbound
                .iter()
                .enumerate()
                .map(|r| rule(r, Direction::HostToGuest, false))
                .collect(),
            no_rule: no_rule(f, guest, labels),
            duration: Direction::LABELS.map(|d| f.duration.with_label_values(&[guest, d])),
            credit_stalls: by_direction(&f.credit_stalls),
            credit_stall_seconds: Direction::LABELS
                .map(|d| f.credit_stall_seconds.with_label_values(&[guest, d])),
            backpressure_pauses: by_direction(&f.backpressure_pauses),
            buffered_bytes: Direction::LABELS.map(|d| f.buffered_bytes.with_label_values(&[guest, d])),
            buffer_memory: f.buffer_memory.with_label_values(&[guest]),
            buffer_memory_limit: f.buffer_memory_limit.with_label_values(&[guest]),
            connections_limit: f.connections_limit.with_label_values(&[guest]),
            queues: QUEUE_LABELS.map(queue),
            busy_poll: BusyPollMetrics {
                hits: f.busy_polls.with_label_values(&[guest, "hit"]),
                misses: f.busy_polls.with_label_values(&[guest, "miss"]),
                seconds: f.busy_poll_seconds.with_label_values(&[guest]),
            },
            capture_dropped_packets: f.capture_dropped_packets.with_label_values(&[guest]),
            device_panics: f.device_panics.with_label_values(&[guest]),
            iotlb: f.iotlb.resolve(guest),
        }
    }

    /// Shows the bounds of the guest: connections at once, and bytes of memory for buffers.
    pub fn set_limits(&self, connections: usize, memory: u64) {
        let shown = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.connections_limit.set(shown(connections as u64));
        self.buffer_memory_limit.set(shown(memory));
    }

    /// Counts one packet. `op` and `socket_type` are the header's fields as sent; what the standard does not know
    /// is counted as `invalid` and `other`.
    pub fn packet(&self, direction: Direction, op: u16, socket_type: u16) {
        let op = if usize::from(op) < OP_LABELS.len() {
            usize::from(op)
        } else {
            0
        };
        let kind = if usize::from(socket_type) < SOCKET_TYPE_LABELS.len() {
            usize::from(socket_type)
        } else {
            0
        };
        let index = (direction as usize * OP_LABELS.len() + op) * SOCKET_TYPE_LABELS.len() + kind;
        if let Some(counter) = self.packets.get(index) {
            counter.inc();
        }
    }

    /// Counts payload bytes of RW packets.
    pub fn payload(&self, direction: Direction, socket_type: u16, bytes: u64) {
        let kind = if usize::from(socket_type) < SOCKET_TYPE_LABELS.len() {
            usize::from(socket_type)
        } else {
            0
        };
        if let Some(counter) = self
            .payload_bytes
            .get(direction as usize * SOCKET_TYPE_LABELS.len() + kind)
        {
            counter.inc_by(bytes);
        }
    }
}

/// Requests that match no rule are refused and nothing else: only that family gets a series with `rule=""`, so
/// that no sum over rules shows a row without a name.
fn no_rule(f: &GuestFamilies, guest: &str, labels: &LabelSets) -> RuleMetrics {
    let unexported = || IntCounter::new("unexported", "Not exported.").expect("a valid name");
    RuleMetrics {
        name: String::new(),
        opened: unexported(),
        active: IntGauge::new("unexported", "Not exported.").expect("a valid name"),
        refused: labels
            .refused
            .iter()
            .map(|reason| {
                f.refused
                    .with_label_values(&[guest, Direction::GuestToHost.label(), "", reason])
            })
            .collect(),
        closed: labels.closed.iter().map(|_| unexported()).collect(),
        upstream_bytes: Direction::LABELS.map(|_| unexported()),
        dials: None,
        dial_failures: None,
        dial_duration: None,
    }
}
