//! What is odd about a session, in plain sentences with stable codes.
//!
//! `docs/findings.md` explains each of them at length; a test holds the two together.

use serde::Serialize;

use super::AccessPlatform;

/// What can be odd; label `code` of `vsock_finding`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum FindingCode {
    /// Bit 33 is acknowledged, ring addresses are the VMM's own, and no IOTLB message has come.
    AccessPlatformWithoutIotlb,
    /// The front-end acknowledged features that were not offered.
    FeatureNotOffered,
    /// Bit 33 is acknowledged without the protocol features REPLY_ACK or BACKEND_REQ: no translation can be asked for.
    IotlbWithoutBackendChannel,
    /// `accessPlatform: iotlb`, and the front-end did not acknowledge the feature.
    AccessPlatformNotAcknowledged,
    /// The front-end sends IOTLB messages although it did not acknowledge bit 33, or the configuration refuses them, or
    /// ones that cannot be carried out.
    IotlbMessageRefused,
    /// A miss is not answered.
    IotlbMissUnanswered,
    /// Many translations are refused, or one that a ring needs.
    TranslationFaultStorm,
    /// The memory of a ring cannot be read, or is all zero where the driver has been.
    MemoryNotShared,
    /// Guest memory was there and was taken away.
    MemoryLost,
    /// The driver is a legacy one, or the VMM does not pass VERSION_1 on.
    Version1NotAcknowledged,
    /// SEQPACKET was offered and is not acknowledged.
    SeqpacketDropped,
    /// Rings were set up before memory was shared.
    RingBeforeMemory,
    /// SET_FEATURES changed features while a ring was running.
    FeaturesChangedWhileRunning,
    /// No ring was started within a minute of the VMM connecting.
    DriverNotReady,
}

impl FindingCode {
    /// Every code.
    pub const ALL: [FindingCode; 14] = [
        FindingCode::AccessPlatformWithoutIotlb,
        FindingCode::FeatureNotOffered,
        FindingCode::IotlbWithoutBackendChannel,
        FindingCode::AccessPlatformNotAcknowledged,
        FindingCode::IotlbMessageRefused,
        FindingCode::IotlbMissUnanswered,
        FindingCode::TranslationFaultStorm,
        FindingCode::MemoryNotShared,
        FindingCode::MemoryLost,
        FindingCode::Version1NotAcknowledged,
        FindingCode::SeqpacketDropped,
        FindingCode::RingBeforeMemory,
        FindingCode::FeaturesChangedWhileRunning,
        FindingCode::DriverNotReady,
    ];

    /// The stable code: `access-platform-without-iotlb`.
    pub fn code(self) -> &'static str {
        match self {
            FindingCode::AccessPlatformWithoutIotlb => "access-platform-without-iotlb",
            FindingCode::FeatureNotOffered => "feature-not-offered",
            FindingCode::IotlbWithoutBackendChannel => "iotlb-without-backend-channel",
            FindingCode::AccessPlatformNotAcknowledged => "access-platform-not-acknowledged",
            FindingCode::IotlbMessageRefused => "iotlb-message-refused",
            FindingCode::IotlbMissUnanswered => "iotlb-miss-unanswered",
            FindingCode::TranslationFaultStorm => "translation-fault-storm",
            FindingCode::MemoryNotShared => "memory-not-shared",
            FindingCode::MemoryLost => "memory-lost",
            FindingCode::Version1NotAcknowledged => "version-1-not-acknowledged",
            FindingCode::SeqpacketDropped => "seqpacket-dropped",
            FindingCode::RingBeforeMemory => "ring-before-memory",
            FindingCode::FeaturesChangedWhileRunning => "features-changed-while-running",
            FindingCode::DriverNotReady => "driver-not-ready",
        }
    }

    /// How much it matters to a guest with this policy.
    pub fn severity(self, policy: AccessPlatform) -> Severity {
        match self {
            // Under `auto` and `identity` the guest is served all the same.
            FindingCode::AccessPlatformWithoutIotlb if policy == AccessPlatform::Iotlb => Severity::Error,
            FindingCode::AccessPlatformWithoutIotlb => Severity::Warning,
            // Under `identity` a VMM that translates is not served; otherwise the message alone is without effect.
            FindingCode::IotlbMessageRefused if policy == AccessPlatform::Identity => Severity::Error,
            FindingCode::FeatureNotOffered
            | FindingCode::IotlbWithoutBackendChannel
            | FindingCode::IotlbMissUnanswered
            | FindingCode::MemoryNotShared
            | FindingCode::MemoryLost
            | FindingCode::RingBeforeMemory => Severity::Error,
            FindingCode::IotlbMessageRefused
            | FindingCode::TranslationFaultStorm
            | FindingCode::Version1NotAcknowledged
            | FindingCode::FeaturesChangedWhileRunning
            | FindingCode::DriverNotReady => Severity::Warning,
            FindingCode::AccessPlatformNotAcknowledged | FindingCode::SeqpacketDropped => Severity::Info,
        }
    }

    /// What it means.
    pub fn meaning(self) -> &'static str {
        match self {
            FindingCode::AccessPlatformWithoutIotlb => {
                "The VMM took VIRTIO_F_ACCESS_PLATFORM as a matter between itself and the guest, and does not translate \
                 addresses for its devices. With accessPlatform auto the guest is served with guest-physical addresses; \
                 with iotlb it is not served at all."
            }
            FindingCode::FeatureNotOffered => {
                "The VMM passes feature bits on without masking them by what this device offers, and relies on something \
                 that the device does not do. The session is refused and the guest has no vsock."
            }
            FindingCode::IotlbWithoutBackendChannel => {
                "Addresses have to be translated, and there is no channel to ask the VMM for translations: it needs the \
                 protocol features BACKEND_REQ and REPLY_ACK, and a descriptor sent by SET_BACKEND_REQ_FD. The guest has \
                 no vsock."
            }
            FindingCode::AccessPlatformNotAcknowledged => {
                "The configuration asks for translated addresses, and the VMM has no IOMMU in front of this device: the \
                 guest is served with guest-physical addresses, and its IOMMU does not confine the device."
            }
            FindingCode::IotlbMessageRefused => {
                "The VMM believes that this device translates addresses, or maps addresses that are no memory of the \
                 guest. What it wanted to map or unmap has no effect here."
            }
            FindingCode::IotlbMissUnanswered => {
                "A ring waits for a translation that the VMM was asked for and does not send. It stands still until the \
                 translation comes."
            }
            FindingCode::TranslationFaultStorm => {
                "The VMM refuses to translate addresses that the driver put into its rings: the guest's IOMMU does not \
                 map them, or not for this access. Each refusal costs the guest a packet, or a ring if it lies there."
            }
            FindingCode::MemoryNotShared => {
                "The memory of a ring is missing or blank although the driver is running. As a rule the VMM has not \
                 shared the guest's memory with this process but handed out a private copy."
            }
            FindingCode::MemoryLost => {
                "Memory that the VMM had shared could not be accessed any more, so its session was ended. The guest's \
                 connections were cut off; nothing was delivered that was not there when it was sent."
            }
            FindingCode::Version1NotAcknowledged => {
                "A legacy driver, or a VMM that does not pass VERSION_1 on. The device follows virtio 1.x: rings and \
                 packets are little-endian, whatever the guest expects."
            }
            FindingCode::SeqpacketDropped => {
                "SOCK_SEQPACKET was offered and the VMM or the driver left it out. Applications in the guest that open \
                 such sockets are refused; stream sockets work."
            }
            FindingCode::RingBeforeMemory => {
                "Addresses of a ring mean nothing before the guest's memory is shared. The VMM broke the order of \
                 messages, or shared no memory at all."
            }
            FindingCode::FeaturesChangedWhileRunning => {
                "Driver and device settle their features before rings run. A change under running rings, other than \
                 logging writes for a migration, lets the two disagree on what is in the rings."
            }
            FindingCode::DriverNotReady => {
                "The VMM is connected and no driver in the guest has started the device. The guest is still booting, \
                 or it has no virtio-vsock driver, or its driver refused the features."
            }
        }
    }

    /// What to change, with the VMM's own flags.
    pub fn remedy(self) -> &'static str {
        match self {
            FindingCode::AccessPlatformWithoutIotlb => {
                "Set vhostUser.accessPlatform: identity if the VMM confines memory itself (crosvm --protected-vm, or SEV and \
                 TDX guests); this is the right setting for crosvm and libkrun. For translation use QEMU with \
                 iommu_platform=on,ats=on on the device and -device intel-iommu,device-iotlb=on,caching-mode=on or -device \
                 virtio-iommu-pci. Neither crosvm, libkrun nor Cloud Hypervisor can translate for vhost-user devices."
            }
            FindingCode::FeatureNotOffered => {
                "If the bit is access_platform, set vhostUser.accessPlatform: auto (it is off now), or take iommu_platform=on \
                 off QEMU's vhost-user-vsock device, enable_iommu_platform and enable_iommu out of Kata's configuration, or \
                 --protected-vm off crosvm. For another bit, take the option that adds it (packed=on, for example) off the \
                 VMM's device."
            }
            FindingCode::IotlbWithoutBackendChannel => {
                "Use QEMU, which serves the backend channel whenever it translates. For crosvm and libkrun, which do not \
                 translate, set vhostUser.accessPlatform: identity."
            }
            FindingCode::AccessPlatformNotAcknowledged => {
                "QEMU: add iommu_platform=on,ats=on to -device vhost-user-vsock-pci, and a vIOMMU: -device \
                 intel-iommu,intremap=on,device-iotlb=on,caching-mode=on or -device virtio-iommu-pci. Kata with QEMU: \
                 enable_iommu (and enable_iommu_platform on s390x). Boot the guest with intel_iommu=on. If no translation is wanted, set \
                 vhostUser.accessPlatform: auto."
            }
            FindingCode::IotlbMessageRefused => {
                "If the guest has a vIOMMU (QEMU: iommu_platform=on with -device intel-iommu or virtio-iommu-pci), set \
                 vhostUser.accessPlatform: auto or iotlb. Otherwise report it to the VMM's authors: a front-end must not \
                 send IOTLB_MSG without VIRTIO_F_ACCESS_PLATFORM."
            }
            FindingCode::IotlbMissUnanswered => {
                "Look whether the VMM is paused or hangs (QEMU: info status on its monitor). If it runs, it does not \
                 serve the backend channel: use QEMU for translation, or set vhostUser.accessPlatform: identity."
            }
            FindingCode::TranslationFaultStorm => {
                "Read the guest's kernel log for IOMMU faults (DMAR, virtio_iommu) that name this device. A driver that \
                 unmaps buffers in use is a bug in the guest; if a reboot helps, the guest's IOMMU state was stale. \
                 intel_iommu=off on the guest's command line tells the two apart."
            }
            FindingCode::MemoryNotShared => {
                "Share the guest's memory. QEMU: -object memory-backend-memfd,id=mem,size=...,share=on with -machine \
                 memory-backend=mem (memory-backend-file is private without share=on). Cloud Hypervisor: --memory shared=on. Kata with QEMU: \
                 file_mem_backend = \"/dev/shm\". libvirt and KubeVirt: memoryBacking with source memfd and access mode \
                 shared. crosvm and libkrun share memory by themselves."
            }
            FindingCode::MemoryLost => {
                "If the file was truncated, look for who does that: nobody may make the file of a running guest's memory \
                 shorter, a VMM that starts anew with the same file included. Otherwise give the memory more room: the \
                 sizeLimit of the emptyDir behind /dev/shm, the mount option size=, or vm.nr_hugepages; in QEMU \
                 prealloc=on shows at the start that it is too small. Then restart the VM, unless its VMM connects again \
                 by itself."
            }
            FindingCode::Version1NotAcknowledged => {
                "QEMU: add disable-legacy=on to -device vhost-user-vsock-pci. Other VMMs: update the guest's driver."
            }
            FindingCode::SeqpacketDropped => {
                "Update guest kernel and VMM if applications need it: Linux 5.14 and QEMU 6.2 (seqpacket=on on the device) \
                 know it. Otherwise nothing has to be done."
            }
            FindingCode::RingBeforeMemory => {
                "Restart the VM, so that the VMM negotiates from the beginning. If it comes back, report the messages in \
                 /state to the VMM's authors."
            }
            FindingCode::FeaturesChangedWhileRunning => {
                "Report it to the VMM's authors with the messages in /state. Rebooting the guest sets both sides up anew."
            }
            FindingCode::DriverNotReady => {
                "Look at the guest's console. Linux needs CONFIG_VIRTIO_VSOCKETS and the module \
                 vmw_vsock_virtio_transport; a guest with protected or encrypted memory needs VIRTIO_F_ACCESS_PLATFORM, so \
                 vhostUser.accessPlatform must not be off, and QEMU needs iommu_platform=on. Firmware that boots slowly is no \
                 fault: this passes when the driver starts."
            }
        }
    }
}

impl std::fmt::Display for FindingCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.code())
    }
}

/// How much a finding matters.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something does not work.
    Error,
    /// It works, and may not be what was wanted.
    Warning,
    /// Worth knowing.
    Info,
}

impl Severity {
    /// Its name in JSON and documentation.
    pub fn label(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Info => "info",
        }
    }
}

/// Something odd that was found.
#[derive(Clone, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// The stable code.
    pub code: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// What was seen, with particulars.
    pub seen: String,
    /// What it means.
    pub meaning: &'static str,
    /// What to change, with the VMM's own flags.
    pub remedy: &'static str,
    /// Unix time in seconds at which it was first seen in its session.
    pub since: u64,
    /// The session in which it was seen.
    pub session: u64,
    /// Whether it still holds. What has passed, or was found in a session that is over, stays to be read until the next
    /// session begins. Errors that were there when their session ended by an error hold on until a later session has got
    /// further: a VMM that fails and connects again, over and over, would make them flicker otherwise.
    pub active: bool,
}
