//! How different VMMs negotiate: which bits they pass on, how many queues they hand over, in which order they speak.

/// Virtio feature bits (linux/virtio_config.h, virtio_ring.h, virtio_vsock.h) and that of vhost-user, as masks.
pub mod feature {
    /// VIRTIO_VSOCK_F_STREAM.
    pub const STREAM: u64 = 1 << 0;
    /// VIRTIO_VSOCK_F_SEQPACKET.
    pub const SEQPACKET: u64 = 1 << 1;
    /// VIRTIO_VSOCK_F_NO_IMPLIED_STREAM.
    pub const NO_IMPLIED_STREAM: u64 = 1 << 2;
    /// VHOST_F_LOG_ALL.
    pub const LOG_ALL: u64 = 1 << 26;
    /// VIRTIO_RING_F_INDIRECT_DESC.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_RING_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VHOST_USER_F_PROTOCOL_FEATURES: between VMM and back-end only, never the driver's.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_ACCESS_PLATFORM.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// VIRTIO_F_IN_ORDER.
    pub const IN_ORDER: u64 = 1 << 35;
}

/// vhost-user protocol feature bits, as masks.
pub mod protocol_feature {
    /// Several queues; GET_QUEUE_NUM may be asked.
    pub const MQ: u64 = 1 << 0;
    /// The dirty log comes by descriptor.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// NEED_REPLY is understood.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The back-end may send requests.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// GET_CONFIG and SET_CONFIG.
    pub const CONFIG: u64 = 1 << 9;
    /// Requests in flight are tracked in shared memory.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE is understood.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// ADD_MEM_REG and REM_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_STATUS and GET_STATUS.
    pub const STATUS: u64 = 1 << 16;
}

/// The order of messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// QEMU 7.2: negotiation at realize, vrings at DRIVER_OK, ring by ring; NEED_REPLY only where QEMU waits.
    Qemu,
    /// The front-ends built on rust-vmm's `vhost` crate: SET_OWNER first, everything with NEED_REPLY once
    /// REPLY_ACK is agreed on, call before kick, rings enabled last.
    RustVmm,
}

/// What a VMM and the guest's driver under it negotiate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Profile {
    /// For messages and tables.
    pub name: &'static str,
    /// Feature bits acknowledged where the device offers them. Whether the rings use EVENT_IDX, indirect tables
    /// and so on follows from what was acknowledged.
    pub features: u64,
    /// Feature bits acknowledged although nobody offered them (QEMU does so with ACCESS_PLATFORM).
    pub forced_features: u64,
    /// Protocol feature bits taken where the back-end offers them.
    pub protocol_features: u64,
    /// Rings handed to the back-end: 2 (rx and tx) or 3 (and the event queue).
    pub queues: u16,
    /// The order of messages.
    pub order: Order,
}

/// What QEMU passes on and Linux acknowledges. Linux's driver knows one feature of vsock itself, SEQPACKET; so STREAM and
/// NO_IMPLIED_STREAM are never acknowledged, whatever the VMM passes on.
const DRIVER_FEATURES: u64 = feature::SEQPACKET
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::PROTOCOL_FEATURES
    | feature::VERSION_1;

impl Profile {
    /// QEMU 7.2 without vIOMMU: rings 0 and 1; SEQPACKET, never STREAM, NO_IMPLIED_STREAM or IN_ORDER.
    pub fn qemu() -> Profile {
        Profile {
            name: "qemu",
            features: DRIVER_FEATURES,
            forced_features: 0,
            protocol_features: 0x1_ffff,
            queues: 2,
            order: Order::Qemu,
        }
    }

    /// QEMU 7.2 with a vIOMMU and `iommu_platform=on`: ACCESS_PLATFORM is acknowledged whether it is offered or not. Give the
    /// driver an IOMMU ([`DriverOptions::iommu`](super::DriverOptions::iommu)), or its addresses are the VMM's own.
    pub fn qemu_viommu() -> Profile {
        Profile {
            name: "qemu-viommu",
            features: DRIVER_FEATURES | feature::ACCESS_PLATFORM,
            forced_features: feature::ACCESS_PLATFORM,
            protocol_features: 0x1_ffff,
            queues: 2,
            order: Order::Qemu,
        }
    }

    /// crosvm with `--protected-vm` on Android: acknowledges ACCESS_PLATFORM where it is offered, means by it only that the
    /// driver uses the DMA API, and never sends an IOTLB message. Passes bits 0 to 23 of the device, and of the rings' only
    /// VERSION_1 and EVENT_IDX.
    pub fn crosvm_protected() -> Profile {
        Profile {
            name: "crosvm-protected",
            features: DRIVER_FEATURES & !feature::INDIRECT_DESC | feature::ACCESS_PLATFORM,
            forced_features: 0,
            protocol_features: protocol_feature::MQ | protocol_feature::CONFIG,
            queues: 3,
            order: Order::RustVmm,
        }
    }

    /// Cloud Hypervisor: three rings, IN_ORDER, everything acknowledged; passes no feature of the device itself, so its
    /// guests have no SEQPACKET.
    pub fn cloud_hypervisor() -> Profile {
        Profile {
            name: "cloud-hypervisor",
            features: DRIVER_FEATURES & !feature::SEQPACKET | feature::IN_ORDER,
            forced_features: 0,
            protocol_features: protocol_feature::MQ
                | protocol_feature::CONFIG
                | protocol_feature::REPLY_ACK
                | protocol_feature::CONFIGURE_MEM_SLOTS
                | protocol_feature::INFLIGHT_SHMFD,
            queues: 3,
            order: Order::RustVmm,
        }
    }

    /// libkrun: three rings, whatever the device offers (STREAM and NO_IMPLIED_STREAM as well), neither REPLY_ACK nor a backend channel; sets
    /// ACCESS_PLATFORM without ever sending an IOTLB message.
    pub fn libkrun() -> Profile {
        Profile {
            name: "libkrun",
            features: !feature::LOG_ALL,
            forced_features: 0,
            protocol_features: protocol_feature::MQ | protocol_feature::CONFIG,
            queues: 3,
            order: Order::RustVmm,
        }
    }

    /// This profile without the feature bits of `mask`.
    #[must_use]
    pub fn without(mut self, mask: u64) -> Profile {
        self.features &= !mask;
        self
    }

    /// This profile with the feature bits of `mask`, taken where offered.
    #[must_use]
    pub fn with(mut self, mask: u64) -> Profile {
        self.features |= mask;
        self
    }

    /// This profile without the protocol feature bits of `mask`.
    #[must_use]
    pub fn without_protocol(mut self, mask: u64) -> Profile {
        self.protocol_features &= !mask;
        self
    }
}
