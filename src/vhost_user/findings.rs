//! What is odd about a session, in plain sentences with stable codes.

use serde::Serialize;

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
    /// The front-end sends IOTLB messages although it did not acknowledge bit 33, or the configuration refuses them.
    IotlbMessageRefused,
    /// A miss is not answered.
    IotlbMissUnanswered,
    /// Many translations are refused.
    TranslationFaultStorm,
    /// The memory of a ring cannot be read, or is all zero where the driver has been.
    MemoryNotShared,
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
    pub const ALL: [FindingCode; 13] = [
        FindingCode::AccessPlatformWithoutIotlb,
        FindingCode::FeatureNotOffered,
        FindingCode::IotlbWithoutBackendChannel,
        FindingCode::AccessPlatformNotAcknowledged,
        FindingCode::IotlbMessageRefused,
        FindingCode::IotlbMissUnanswered,
        FindingCode::TranslationFaultStorm,
        FindingCode::MemoryNotShared,
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
            FindingCode::Version1NotAcknowledged => "version-1-not-acknowledged",
            FindingCode::SeqpacketDropped => "seqpacket-dropped",
            FindingCode::RingBeforeMemory => "ring-before-memory",
            FindingCode::FeaturesChangedWhileRunning => "features-changed-while-running",
            FindingCode::DriverNotReady => "driver-not-ready",
        }
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
    /// Whether it still holds. What was found in a session that is over, or has passed, stays to be read, inactive, until
    /// the next session begins.
    pub active: bool,
}
