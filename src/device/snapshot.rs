//! What the device thread tells about itself: values, for the admin server.

use serde::Serialize;

/// A guest's device at one moment.
#[derive(Clone, Default, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct DeviceSnapshot {
    /// The rings that run, in queue order.
    pub rings: Vec<RingSnapshot>,
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
