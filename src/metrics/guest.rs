//! The metric families of one guest's data path: handles resolved once at start, so that counting is a relaxed
//! add.
//!
//! Label values are handed in by whoever owns the enum; each array is indexed by that enum (`reason as usize`).

use std::sync::Arc;

use prometheus::{
    Counter, CounterVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
};

use super::Registry;
use super::families::{OfGuests, Registrar};
use super::iotlb::{IotlbFamilies, IotlbMetrics};
use super::rules::{RuleFamilies, RuleMetrics};

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

/// Every family that has a `guest` label and is written by the device thread.
pub(super) struct GuestFamilies {
    packets: IntCounterVec,
    payload_bytes: IntCounterVec,
    misbehavior: IntCounterVec,
    duration: HistogramVec,
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
    iotlb: IotlbFamilies,
    rules: Arc<RuleFamilies>,
    of_guests: OfGuests,
}

impl GuestFamilies {
    pub(super) fn register(to: &prometheus::Registry) -> prometheus::Result<GuestFamilies> {
        let mut to = Registrar::new(to);
        let rules = RuleFamilies::register(&mut to)?;
        // Those of rules end with their rules.
        let _ = to.take_families();
        Ok(GuestFamilies {
            packets: to.counters(
                "vsock_packets_total",
                "vsock packets, by direction, operation and socket type.",
                &["guest", "direction", "op", "socket_type"],
            )?,
            payload_bytes: to.counters(
                "vsock_payload_bytes_total",
                "Payload bytes of vsock RW packets.",
                &["guest", "direction", "socket_type"],
            )?,
            misbehavior: to.counters(
                "vsock_misbehavior_total",
                "Packets of the guest that break the virtio-vsock protocol, by what is wrong with them.",
                &["guest", "kind"],
            )?,
            duration: to.histograms(
                "vsock_connection_duration_seconds",
                "How long established connections lasted.",
                &["guest", "direction"],
                &[0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0],
            )?,
            credit_stalls: to.counters(
                "vsock_credit_stalls_total",
                "Times a sender had data and no credit from its peer.",
                &["guest", "direction"],
            )?,
            credit_stall_seconds: to.seconds(
                "vsock_credit_stall_seconds_total",
                "Time senders waited for credit, summed over connections.",
                &["guest", "direction"],
            )?,
            backpressure_pauses: to.counters(
                "vsock_backpressure_pauses_total",
                "Times a receiver took less than it was given, so that the sender had to wait.",
                &["guest", "direction"],
            )?,
            buffered_bytes: to.gauges(
                "vsock_buffered_bytes",
                "Bytes held in buffers of the sidecar because their receiver does not take them.",
                &["guest", "direction"],
            )?,
            buffer_memory: to.gauges(
                "vsock_buffer_memory_bytes",
                "Memory of buffers for bytes that services do not take, all connections of the guest together.",
                &["guest"],
            )?,
            buffer_memory_limit: to.gauges(
                "vsock_buffer_memory_limit_bytes",
                "Memory that such buffers of the guest may have (limits.memory).",
                &["guest"],
            )?,
            connections_limit: to.gauges(
                "vsock_connections_limit",
                "Connections that the guest may have at once (limits.connections).",
                &["guest"],
            )?,
            ring_full: to.counters(
                "vsock_vring_full_total",
                "Times a packet waited because the guest offered no buffer.",
                &["guest", "queue"],
            )?,
            ring_full_seconds: to.seconds(
                "vsock_vring_full_seconds_total",
                "Time packets waited for a buffer of the guest.",
                &["guest", "queue"],
            )?,
            ring_errors: to.counters(
                "vsock_vring_errors_total",
                "Malformed descriptor chains and rings, by what is wrong with them.",
                &["guest", "queue", "reason"],
            )?,
            kicks: to.counters(
                "vsock_kicks_total",
                "Notifications received from the guest.",
                &["guest", "queue"],
            )?,
            kicks_suppressed: to.counters(
                "vsock_kicks_suppressed_total",
                "Rounds that found work in a ring without a notification.",
                &["guest", "queue"],
            )?,
            interrupts: to.counters(
                "vsock_interrupts_total",
                "Interrupts sent to the guest.",
                &["guest", "queue"],
            )?,
            interrupts_suppressed: to.counters(
                "vsock_interrupts_suppressed_total",
                "Bursts after which the guest wanted no interrupt.",
                &["guest", "queue"],
            )?,
            busy_polls: to.counters(
                "vsock_busy_polls_total",
                "Times the device looked for the guest's next packet before it slept (limits.busyPoll).",
                &["guest", "result"],
            )?,
            busy_poll_seconds: to.seconds(
                "vsock_busy_poll_seconds_total",
                "Processor time spent looking for the guest's next packet.",
                &["guest"],
            )?,
            capture_dropped_packets: to.counters(
                "vsock_capture_dropped_packets_total",
                "Packets that are missing in captures because their reader was too slow.",
                &["guest"],
            )?,
            device_panics: to.counters(
                "vsock_device_panics_total",
                "Panics of the guest's device thread, each of which ended the guest's session and nothing else.",
                &["guest"],
            )?,
            iotlb: IotlbFamilies::register(&mut to)?,
            rules,
            of_guests: to.take_families(),
        })
    }

    /// Removes every series of a guest, but for those of rules that somebody still holds.
    pub(super) fn forget(&self, guest: &str) {
        self.of_guests.forget(guest);
        self.rules.forget_guest(guest);
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

/// Everything that one guest's device thread counts. Cheap to share; every method is a relaxed atomic add.
#[derive(Debug)]
pub struct GuestMetrics {
    packets: Vec<IntCounter>,
    payload_bytes: Vec<IntCounter>,
    /// Packets that break the protocol, indexed by the misbehavior enum.
    pub misbehavior: Vec<IntCounter>,
    /// Requests of the guest that no rule matches (`rule=""`); only `refused` is exported, the rest cannot happen.
    pub no_rule: Arc<RuleMetrics>,
    name: Arc<str>,
    rules: Arc<RuleFamilies>,
    labels: LabelSets,
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
    pub fn detached(labels: &LabelSets) -> Arc<GuestMetrics> {
        Registry::new()
            .expect("families have valid names")
            .guest("detached", labels)
    }

    /// The metrics of rules, in the order of `names`, every known label value initialised to 0. A rule that somebody still
    /// holds is the same one. Locks, and may be called by any thread.
    pub fn rules(&self, opened_by: Direction, names: &[String]) -> Vec<Arc<RuleMetrics>> {
        self.rules.resolve(&self.name, opened_by, names, &self.labels)
    }

    pub(super) fn resolve(f: &GuestFamilies, guest: &str, labels: &LabelSets) -> GuestMetrics {
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
            no_rule: Arc::new(f.rules.no_rule(guest, labels)),
            name: guest.into(),
            rules: Arc::clone(&f.rules),
            labels: *labels,
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
