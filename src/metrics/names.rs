//! Names of the bits and messages that are exported, in one place with their numbers.
//!
//! A name that Prometheus has seen is a promise: dashboards select by it. So names are only ever added.

/// A feature bit and the label value that stands for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FeatureBit {
    /// Number of the bit.
    pub bit: u32,
    /// Value of the label `feature`.
    pub name: &'static str,
}

const fn bit(bit: u32, name: &'static str) -> FeatureBit {
    FeatureBit { bit, name }
}

/// Means of confinement.
pub const CONFINEMENT_KINDS: [&str; 3] = ["no_new_privs", "seccomp", "landlock"];

/// Virtio feature bits: those of the vsock device (virtio 1.3, 5.10.3), of the transport (6), the legacy ones a
/// front-end may still pass on, and the two of vhost: 26 is `VHOST_F_LOG_ALL` (linux/vhost.h), 30 is
/// `VHOST_USER_F_PROTOCOL_FEATURES` (vhost-user specification), which never reaches a driver.
pub const VIRTIO_FEATURES: &[FeatureBit] = &[
    bit(0, "stream"),
    bit(1, "seqpacket"),
    bit(2, "no_implied_stream"),
    bit(24, "notify_on_empty"),
    bit(26, "log_all"),
    bit(27, "any_layout"),
    bit(28, "ring_indirect_desc"),
    bit(29, "ring_event_idx"),
    bit(30, "protocol_features"),
    bit(32, "version_1"),
    bit(33, "access_platform"),
    bit(34, "ring_packed"),
    bit(35, "in_order"),
    bit(36, "order_platform"),
    bit(38, "notification_data"),
    bit(39, "notif_config_data"),
    bit(40, "ring_reset"),
];

/// Protocol feature bits of the vhost-user specification, `VHOST_USER_PROTOCOL_F_*`. Bit 7 is
/// `CRYPTO_SESSION`, which no vsock back-end can mean.
pub const PROTOCOL_FEATURES: &[FeatureBit] = &[
    bit(0, "mq"),
    bit(1, "log_shmfd"),
    bit(2, "rarp"),
    bit(3, "reply_ack"),
    bit(4, "mtu"),
    bit(5, "backend_req"),
    bit(6, "cross_endian"),
    bit(8, "pagefault"),
    bit(9, "config"),
    bit(10, "backend_send_fd"),
    bit(11, "host_notifier"),
    bit(12, "inflight_shmfd"),
    bit(13, "reset_device"),
    bit(14, "inband_notifications"),
    bit(15, "configure_mem_slots"),
    bit(16, "status"),
    bit(17, "xen_mmap"),
    bit(18, "shared_object"),
    bit(19, "device_state"),
];

/// Front-end messages that a vsock back-end can be sent, by the vhost-user specification's names in lower case.
/// Anything else (requests of other devices, of other standards, of nobody) is counted as [`OTHER_REQUEST`].
pub const REQUESTS: &[&str] = &[
    "get_features",
    "set_features",
    "set_owner",
    "reset_owner",
    "set_mem_table",
    "set_log_base",
    "set_log_fd",
    "set_vring_num",
    "set_vring_addr",
    "set_vring_base",
    "get_vring_base",
    "set_vring_kick",
    "set_vring_call",
    "set_vring_err",
    "get_protocol_features",
    "set_protocol_features",
    "get_queue_num",
    "set_vring_enable",
    "set_vring_endian",
    "set_backend_req_fd",
    "iotlb_msg",
    "get_config",
    "set_config",
    "get_inflight_fd",
    "set_inflight_fd",
    "reset_device",
    "get_max_mem_slots",
    "add_mem_reg",
    "rem_mem_reg",
    "set_status",
    "get_status",
];

/// The request label of every message that [`REQUESTS`] does not list.
pub const OTHER_REQUEST: &str = "other";

/// Values of the label `mode` of `vsock_access_platform_mode`; the first is that of a guest without a VMM.
pub const ACCESS_PLATFORM_MODES: [&str; 4] = ["none", "undecided", "identity", "translate"];

/// Values of the label `code` of `vsock_finding`: `docs/findings.md` has a section for each.
pub const FINDINGS: [&str; 14] = [
    "access-platform-without-iotlb",
    "feature-not-offered",
    "iotlb-without-backend-channel",
    "access-platform-not-acknowledged",
    "iotlb-message-refused",
    "iotlb-miss-unanswered",
    "translation-fault-storm",
    "memory-not-shared",
    "memory-lost",
    "version-1-not-acknowledged",
    "seqpacket-dropped",
    "ring-before-memory",
    "features-changed-while-running",
    "driver-not-ready",
];

/// How many set bits of `acked` have no name in `table`.
pub fn unknown_bits(table: &[FeatureBit], acked: u64) -> u32 {
    let known = table.iter().fold(0u64, |mask, known| mask | 1 << known.bit);
    (acked & !known).count_ones()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_and_no_bit_stands_twice() {
        for table in [VIRTIO_FEATURES, PROTOCOL_FEATURES] {
            for pair in table.windows(2) {
                assert!(
                    pair[0].bit < pair[1].bit,
                    "{} and {} are out of order",
                    pair[0].name,
                    pair[1].name
                );
            }
            let mut names: Vec<_> = table.iter().map(|known| known.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), table.len());
        }
    }

    #[test]
    fn bits_without_a_name_are_counted() {
        assert_eq!(unknown_bits(VIRTIO_FEATURES, 0), 0);
        assert_eq!(unknown_bits(VIRTIO_FEATURES, 1 << 33 | 1 << 32 | 1), 0);
        assert_eq!(unknown_bits(VIRTIO_FEATURES, 1 << 63 | 1 << 37 | 1), 2);
    }
}
