//! Feature bits, by number and by name: what this device offers, and how bits are called in metrics and `/state`.

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::{AccessPlatform, Mode};

/// VIRTIO_VSOCK_F_STREAM: stream sockets (virtio 1.2, 5.10.3).
pub const VIRTIO_VSOCK_F_STREAM: u64 = 1 << 0;
/// VIRTIO_VSOCK_F_SEQPACKET: seqpacket sockets.
pub const VIRTIO_VSOCK_F_SEQPACKET: u64 = 1 << 1;
/// VIRTIO_VSOCK_F_NO_IMPLIED_STREAM: stream sockets only if VIRTIO_VSOCK_F_STREAM says so.
pub const VIRTIO_VSOCK_F_NO_IMPLIED_STREAM: u64 = 1 << 2;
/// The features that say which types of socket there are.
pub const SOCKET_TYPES: u64 =
    VIRTIO_VSOCK_F_STREAM | VIRTIO_VSOCK_F_SEQPACKET | VIRTIO_VSOCK_F_NO_IMPLIED_STREAM;
/// VHOST_F_LOG_ALL: the front-end wants written pages logged (vhost-user.rst, "Migration").
pub const VHOST_F_LOG_ALL: u64 = 1 << 26;
/// VIRTIO_RING_F_INDIRECT_DESC.
pub const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_RING_F_EVENT_IDX.
pub const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_ACCESS_PLATFORM: see `docs/access-platform.md`.
pub const VIRTIO_F_ACCESS_PLATFORM: u64 = 1 << 33;
/// VIRTIO_F_IN_ORDER. Without it Cloud Hypervisor resumes a ring behind the RX buffers it has posted.
pub const VIRTIO_F_IN_ORDER: u64 = 1 << 35;

/// VHOST_USER_PROTOCOL_F_MQ.
pub const PROTOCOL_F_MQ: u64 = 1 << 0;
/// VHOST_USER_PROTOCOL_F_LOG_SHMFD.
pub const PROTOCOL_F_LOG_SHMFD: u64 = 1 << 1;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
pub const PROTOCOL_F_REPLY_ACK: u64 = 1 << 3;
/// VHOST_USER_PROTOCOL_F_BACKEND_REQ.
pub const PROTOCOL_F_BACKEND_REQ: u64 = 1 << 5;
/// VHOST_USER_PROTOCOL_F_CONFIG.
pub const PROTOCOL_F_CONFIG: u64 = 1 << 9;
/// VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD.
pub const PROTOCOL_F_INFLIGHT_SHMFD: u64 = 1 << 12;
/// VHOST_USER_PROTOCOL_F_RESET_DEVICE.
pub const PROTOCOL_F_RESET_DEVICE: u64 = 1 << 13;
/// VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS.
pub const PROTOCOL_F_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

/// The virtio features this device offers, ACCESS_PLATFORM apart. New capabilities of the device are switched on here
/// and nowhere else.
const OFFERED_FEATURES: u64 = VIRTIO_F_VERSION_1
    | VIRTIO_RING_F_INDIRECT_DESC
    | VIRTIO_RING_F_EVENT_IDX
    | VIRTIO_F_IN_ORDER
    | VIRTIO_VSOCK_F_STREAM
    | VIRTIO_VSOCK_F_SEQPACKET
    | VIRTIO_VSOCK_F_NO_IMPLIED_STREAM
    | VHOST_F_LOG_ALL
    | VHOST_USER_F_PROTOCOL_FEATURES;

/// The virtio features this device offers.
pub fn offered_features(policy: AccessPlatform) -> u64 {
    match policy {
        AccessPlatform::Off => OFFERED_FEATURES,
        AccessPlatform::Auto | AccessPlatform::Iotlb | AccessPlatform::Identity => {
            OFFERED_FEATURES | VIRTIO_F_ACCESS_PLATFORM
        }
    }
}

/// Whether streams and whether SEQPACKET connections were agreed on (virtio 1.2, section 5.10.3): a driver that has no word for
/// either has streams, and so has one that acknowledges SEQPACKET alone, unless it acknowledges NO_IMPLIED_STREAM too. Linux's
/// does not say STREAM (`features` in net/vmw_vsock/virtio_transport.c).
pub fn socket_types(features: u64) -> (bool, bool) {
    let named = features & VIRTIO_VSOCK_F_STREAM != 0;
    let implied = features & VIRTIO_VSOCK_F_NO_IMPLIED_STREAM == 0;
    (named || implied, features & VIRTIO_VSOCK_F_SEQPACKET != 0)
}

/// The vhost-user protocol features this device offers.
///
/// CONFIGURE_MEM_SLOTS only where the VMM connects to us: a QEMU that listens keeps the list of slots it has already
/// sent across our restart, and would send a restarted sidecar no memory at all (`vhost_user_add_remove_regions` in
/// QEMU's hw/virtio/vhost-user.c sends differences).
pub fn offered_protocol_features(mode: Mode) -> u64 {
    let always = PROTOCOL_F_MQ
        | PROTOCOL_F_LOG_SHMFD
        | PROTOCOL_F_REPLY_ACK
        | PROTOCOL_F_BACKEND_REQ
        | PROTOCOL_F_CONFIG
        | PROTOCOL_F_RESET_DEVICE;
    match mode {
        Mode::Server => always | PROTOCOL_F_CONFIGURE_MEM_SLOTS,
        Mode::Client => always,
    }
}

/// A set of bits and the table that names them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Features {
    bits: u64,
    table: &'static [(u8, &'static str)],
}

impl Features {
    /// Bit numbers and names of the virtio features, as metrics call them.
    pub const VIRTIO: &'static [(u8, &'static str)] = &[
        (0, "stream"),
        (1, "seqpacket"),
        (2, "no_implied_stream"),
        (24, "notify_on_empty"),
        (26, "log_all"),
        (27, "any_layout"),
        (28, "ring_indirect_desc"),
        (29, "ring_event_idx"),
        (30, "protocol_features"),
        (32, "version_1"),
        (33, "access_platform"),
        (34, "ring_packed"),
        (35, "in_order"),
        (36, "order_platform"),
        (38, "notification_data"),
        (39, "notif_config_data"),
        (40, "ring_reset"),
    ];

    /// Bit numbers and names of the vhost-user protocol features, as metrics call them.
    pub const PROTOCOL: &'static [(u8, &'static str)] = &[
        (0, "mq"),
        (1, "log_shmfd"),
        (2, "rarp"),
        (3, "reply_ack"),
        (4, "mtu"),
        (5, "backend_req"),
        (6, "cross_endian"),
        (8, "pagefault"),
        (9, "config"),
        (10, "backend_send_fd"),
        (11, "host_notifier"),
        (12, "inflight_shmfd"),
        (13, "reset_device"),
        (14, "inband_notifications"),
        (15, "configure_mem_slots"),
        (16, "status"),
        (17, "xen_mmap"),
        (18, "shared_object"),
        (19, "device_state"),
    ];

    /// A set of virtio features.
    pub const fn virtio(bits: u64) -> Features {
        Features {
            bits,
            table: Features::VIRTIO,
        }
    }

    /// A set of vhost-user protocol features.
    pub const fn protocol(bits: u64) -> Features {
        Features {
            bits,
            table: Features::PROTOCOL,
        }
    }

    /// The bits as they went over the wire.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// Whether bit number `bit` is in the set.
    pub fn contains(&self, bit: u8) -> bool {
        self.bits
            .checked_shr(u32::from(bit))
            .is_some_and(|bits| bits & 1 == 1)
    }

    /// The names of the bits that have one, by rising bit number.
    pub fn names(&self) -> Vec<&'static str> {
        self.table
            .iter()
            .filter(|(bit, _)| self.contains(*bit))
            .map(|(_, name)| *name)
            .collect()
    }

    /// The bits that have no name in the table.
    pub fn unknown_bits(&self) -> u64 {
        self.table
            .iter()
            .fold(self.bits, |bits, (bit, _)| bits & !(1u64 << bit))
    }
}

impl std::fmt::Display for Features {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut words: Vec<String> = self.names().iter().map(ToString::to_string).collect();
        if self.unknown_bits() != 0 {
            words.push(format!("+{:#x}", self.unknown_bits()));
        }
        f.write_str(&words.join(" "))
    }
}

impl std::fmt::Debug for Features {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}{{{self}}}", self.bits)
    }
}

impl Serialize for Features {
    /// `{"bits": "0x…", "names": […], "unknown": "0x…"}`: the bits as text because JSON readers lose those above 2^53.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Features", 3)?;
        object.serialize_field("bits", &format!("{:#x}", self.bits))?;
        object.serialize_field("names", &self.names())?;
        object.serialize_field("unknown", &format!("{:#x}", self.unknown_bits()))?;
        object.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_offered_has_a_name() {
        assert_eq!(
            Features::virtio(offered_features(AccessPlatform::Auto)).unknown_bits(),
            0
        );
        for mode in [Mode::Server, Mode::Client] {
            assert_eq!(
                Features::protocol(offered_protocol_features(mode)).unknown_bits(),
                0
            );
        }
    }

    #[test]
    fn streams_are_implied_unless_the_driver_says_otherwise() {
        for (acknowledged, types) in [
            (0, (true, false)),
            (VIRTIO_VSOCK_F_STREAM, (true, false)),
            (VIRTIO_VSOCK_F_SEQPACKET, (true, true)),
            (
                VIRTIO_VSOCK_F_NO_IMPLIED_STREAM | VIRTIO_VSOCK_F_SEQPACKET,
                (false, true),
            ),
            (SOCKET_TYPES, (true, true)),
        ] {
            assert_eq!(socket_types(acknowledged), types, "{acknowledged:#x}");
        }
    }

    #[test]
    fn memory_slots_are_offered_only_to_a_vmm_that_connects_to_us() {
        assert!(Features::protocol(offered_protocol_features(Mode::Server)).contains(15));
        assert!(!Features::protocol(offered_protocol_features(Mode::Client)).contains(15));
    }

    #[test]
    fn bits_without_a_name_are_shown_as_bits() {
        let features = Features::virtio(VIRTIO_F_VERSION_1 | 1 << 50 | 1);
        assert_eq!(features.names(), ["stream", "version_1"]);
        assert_eq!(features.unknown_bits(), 1 << 50);
        assert_eq!(features.to_string(), "stream version_1 +0x4000000000000");
        assert!(!features.contains(64));
    }
}
