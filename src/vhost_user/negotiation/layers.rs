//! Who offered, acknowledged and uses which feature: the layers device, VMM and driver, computed from a [`Negotiation`].

use serde::Serialize;

use super::Negotiation;
use super::recorder::Entry;
use crate::vhost_user::features::{
    PROTOCOL_F_BACKEND_REQ, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_ACCESS_PLATFORM,
};
use crate::vhost_user::{Features, TranslationMode};

/// What a VMM acknowledges for itself: bits of vhost, which no driver sees.
const OF_THE_VMM: u64 = VHOST_F_LOG_ALL | VHOST_USER_F_PROTOCOL_FEATURES;

/// One feature at every layer.
#[derive(Clone, PartialEq, Eq, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct FeatureRow {
    /// Number of the bit.
    pub bit: u8,
    /// Its name, or `bit_50`.
    pub name: String,
    /// The device offered it.
    pub offered: bool,
    /// The VMM set it in SET_FEATURES.
    pub vmm: bool,
    /// The driver acknowledged it; `None` while no ring runs, since only then it is sure that SET_FEATURES carries the
    /// driver's word.
    pub driver: Option<bool>,
    /// It is in use.
    pub effective: bool,
}

/// The virtio features, layer by layer.
#[derive(Clone, Serialize, Debug)]
pub struct Layers {
    device: Offered,
    vmm: Acknowledged<Features>,
    driver: Acknowledged<Option<Features>>,
    /// In use.
    pub effective: Features,
}

#[derive(Clone, Copy, Serialize, Debug)]
struct Offered {
    offered: Features,
}

#[derive(Clone, Copy, Serialize, Debug)]
struct Acknowledged<T> {
    acknowledged: T,
}

/// The vhost-user protocol features, which are a matter between VMM and device alone.
#[derive(Clone, Copy, Serialize, Debug)]
pub struct ProtocolLayers {
    /// By the device.
    pub offered: Features,
    /// By the VMM.
    pub acknowledged: Features,
    /// In use.
    pub effective: Features,
}

/// All that is known of a guest's session, with what follows from it: the value `session` of `/state`.
#[derive(Clone, Serialize, Debug)]
pub struct Record {
    /// What was agreed.
    #[serde(flatten)]
    pub negotiation: Negotiation,
    /// Every virtio feature that has a name or is set, at every layer.
    pub features: Vec<FeatureRow>,
    /// The virtio features, layer by layer.
    pub layers: Layers,
    /// The protocol features.
    pub protocol: ProtocolLayers,
    /// The last messages, oldest first.
    pub messages: Vec<Entry>,
}

impl Record {
    pub(super) fn new(negotiation: Negotiation, messages: Vec<Entry>) -> Record {
        Record {
            features: negotiation.feature_matrix(),
            layers: negotiation.layers(),
            protocol: negotiation.protocol_layers(),
            messages,
            negotiation,
        }
    }
}

impl Negotiation {
    /// Every virtio feature that the device offers or the VMM acknowledged, at every layer, by rising bit number.
    pub fn feature_matrix(&self) -> Vec<FeatureRow> {
        let (offered, acknowledged) = (self.features_offered, self.features_acked);
        let driver = self.features_of_driver();
        let effective = self.features_effective();
        (0..64u8)
            .filter(|bit| offered.contains(*bit) || acknowledged.contains(*bit))
            .map(|bit| FeatureRow {
                bit,
                name: name(bit),
                offered: offered.contains(bit),
                vmm: acknowledged.contains(bit),
                driver: driver.map(|driver| driver.contains(bit)),
                effective: effective.contains(bit),
            })
            .collect()
    }

    /// The virtio features, layer by layer.
    pub fn layers(&self) -> Layers {
        Layers {
            device: Offered {
                offered: self.features_offered,
            },
            vmm: Acknowledged {
                acknowledged: self.features_acked,
            },
            driver: Acknowledged {
                acknowledged: self.features_of_driver(),
            },
            effective: self.features_effective(),
        }
    }

    /// The protocol features, by who said what.
    pub fn protocol_layers(&self) -> ProtocolLayers {
        let (offered, acknowledged) = (self.protocol_features_offered, self.protocol_features_acked);
        let mut effective = offered.bits() & acknowledged.bits();
        if !self.access_platform.backend_channel {
            // Agreed, and yet no descriptor to send on.
            effective &= !PROTOCOL_F_BACKEND_REQ;
        }
        ProtocolLayers {
            offered,
            acknowledged,
            effective: Features::protocol(effective),
        }
    }

    fn features_of_driver(&self) -> Option<Features> {
        (self.driver_is_up && self.knows_acknowledged())
            .then(|| Features::virtio(self.features_acked.bits() & !OF_THE_VMM))
    }

    fn features_effective(&self) -> Features {
        let mut bits = self.features_offered.bits() & self.features_acked.bits();
        if self.access_platform.mode != TranslationMode::Translate {
            bits &= !VIRTIO_F_ACCESS_PLATFORM;
        }
        if !self.dirty_log_active {
            bits &= !VHOST_F_LOG_ALL;
        }
        Features::virtio(bits)
    }
}

fn name(bit: u8) -> String {
    let known = Features::VIRTIO.iter().find(|(known, _)| *known == bit);
    known.map_or_else(|| format!("bit_{bit}"), |(_, name)| (*name).to_owned())
}
