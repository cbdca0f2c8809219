//! What the device thread tells about itself: values, for the admin server.

use serde::Serialize;

/// A guest's device at one moment.
#[derive(Clone, Default, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct DeviceSnapshot {
    /// The rings that run, in queue order.
    pub rings: Vec<RingSnapshot>,
    /// The translations; all zero when none are used.
    pub iotlb: IotlbSnapshot,
    /// Open and half-open connections, at most [`DeviceSnapshot::MAX_CONNECTIONS`] of them.
    pub connections: Vec<ConnectionSnapshot>,
    /// How many connections there are, listed or not.
    pub connection_count: usize,
}

impl DeviceSnapshot {
    /// How many connections a snapshot lists.
    pub const MAX_CONNECTIONS: usize = 1000;
}

/// A running ring.
#[derive(Clone, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct RingSnapshot {
    /// `rx`, `tx` or `event`.
    pub queue: &'static str,
    /// Entries.
    pub size: u16,
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
    /// Entries the guest has made available and we have not taken.
    pub available: u16,
    /// Whether its addresses are I/O virtual addresses.
    pub translated: bool,
    /// What keeps it from being served: `translation` (waits for an UPDATE) or `broken`; `null` if nothing does.
    pub held_by: Option<&'static str>,
}

/// The IOTLB.
#[derive(Clone, Copy, Default, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct IotlbSnapshot {
    /// Mappings that are held now.
    pub entries: u64,
    /// Bytes that they cover.
    pub mapped_bytes: u64,
    /// The most mappings that are held.
    pub capacity: u64,
    /// Lookups, since the process began.
    pub lookups: u64,
    /// Lookups that found a mapping.
    pub hits: u64,
    /// Lookups that found none.
    pub misses: u64,
    /// UPDATE messages carried out.
    pub updates: u64,
    /// INVALIDATE messages carried out.
    pub invalidations: u64,
    /// Times that everything was forgotten because rings stopped, features or memory changed.
    pub flushes: u64,
    /// Mappings dropped to make room.
    pub evictions: u64,
    /// Accesses that the VMM refused, for reading.
    pub faults_read: u64,
    /// Accesses that the VMM refused, for writing.
    pub faults_write: u64,
    /// Misses the VMM has not answered.
    pub unanswered: u64,
    /// Age of the oldest of them in seconds.
    pub oldest_unanswered_seconds: Option<f64>,
}

/// A connection.
#[derive(Clone, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionSnapshot {
    /// The rule that allowed it.
    pub rule: String,
    /// `guest_to_host` or `host_to_guest`: who asked for it.
    pub opened_by: &'static str,
    /// The guest's port.
    pub guest_port: u32,
    /// The host side's port.
    pub host_port: u32,
    /// The host end: an address or a path.
    pub peer: String,
    /// State word.
    pub state: &'static str,
    /// Payload bytes from the guest.
    pub bytes_from_guest: u64,
    /// Payload bytes to the guest.
    pub bytes_to_guest: u64,
    /// Bytes waiting for the host socket.
    pub buffered: usize,
    /// Credit the guest gives us, in bytes.
    pub credit: u32,
    /// Age in seconds.
    pub age_seconds: f64,
}
