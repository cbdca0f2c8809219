//! What VIRTIO_F_ACCESS_PLATFORM means in a session: what the operator allows, and what the evidence says.

use serde::Serialize;

/// What the operator allows the feature to mean (`vhostUser.accessPlatform`).
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum AccessPlatform {
    /// Evidence decides when a ring starts.
    #[default]
    Auto,
    /// Addresses are translated through the IOTLB, or not used.
    Iotlb,
    /// Addresses are never translated.
    Identity,
    /// The feature is not offered.
    Off,
}

/// How the addresses of rings and buffers are understood now.
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum TranslationMode {
    /// VIRTIO_F_ACCESS_PLATFORM is not acknowledged: guest-physical addresses, as ever.
    #[default]
    None,
    /// It is acknowledged, and there is no evidence yet.
    Undecided,
    /// It is acknowledged, and addresses are guest-physical all the same.
    Identity,
    /// Addresses are translated through the IOTLB.
    Translate,
}

impl TranslationMode {
    /// Every mode.
    pub const ALL: [TranslationMode; 4] = [
        TranslationMode::None,
        TranslationMode::Undecided,
        TranslationMode::Identity,
        TranslationMode::Translate,
    ];

    /// The mode's name in metrics and JSON.
    pub fn label(self) -> &'static str {
        match self {
            TranslationMode::None => "none",
            TranslationMode::Undecided => "undecided",
            TranslationMode::Identity => "identity",
            TranslationMode::Translate => "translate",
        }
    }
}

/// Why addresses are understood that way.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// The feature is not acknowledged.
    NotAcknowledged,
    /// No ring has addresses yet and no IOTLB message has come.
    NoneYet,
    /// The configuration says so (`iotlb`, `identity`).
    Configured,
    /// The VMM has sent an IOTLB message.
    IotlbMessage,
    /// A ring's addresses are in no region of the memory table.
    RingAddressesOutsideMemory,
    /// The rings' addresses are the VMM's own, of the memory table, and no IOTLB message has come.
    RingAddressesInMemory,
}

/// How addresses are understood, and why.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct Translation {
    /// How.
    pub mode: TranslationMode,
    /// Why.
    pub evidence: Evidence,
}

impl Default for Translation {
    fn default() -> Translation {
        Translation {
            mode: TranslationMode::None,
            evidence: Evidence::NotAcknowledged,
        }
    }
}

/// How a ring's addresses of one SET_VRING_ADDR are meant; one for each that reaches the crate, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressNote {
    /// Number of the virtqueue.
    pub index: usize,
    /// The I/O virtual addresses; `None`: the message's own addresses hold, the VMM's.
    pub iovas: Option<RingIovas>,
}

/// Addresses of a ring as its driver sees them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingIovas {
    /// Of the descriptor table.
    pub desc: u64,
    /// Of the available ring.
    pub avail: u64,
    /// Of the used ring.
    pub used: u64,
}
