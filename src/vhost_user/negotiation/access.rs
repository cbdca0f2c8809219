//! What VIRTIO_F_ACCESS_PLATFORM has come to mean in a session, and why, for readers.

use serde::Serialize;

use crate::vhost_user::{AccessPlatform, Evidence, Translation, TranslationMode};

/// How addresses are understood, why, and what was said over the IOTLB. Counters are totals since the process began.
#[derive(Clone, Copy, Serialize, Debug)]
#[serde(rename_all = "camelCase")]
pub struct AccessPlatformState {
    /// What the configuration allows.
    pub policy: AccessPlatform,
    /// How addresses are understood.
    pub mode: TranslationMode,
    /// What that rests on.
    pub evidence: Evidence,
    /// The same in a sentence.
    pub why: &'static str,
    /// Whether there is a channel to ask for translations on.
    pub backend_channel: bool,
    /// IOTLB_MSG UPDATE that were carried out.
    pub updates: u64,
    /// IOTLB_MSG INVALIDATE that were carried out.
    pub invalidations: u64,
    /// IOTLB_MSG that were refused or could not be carried out.
    pub refused_messages: u64,
    /// Misses that were sent to the VMM.
    pub misses_sent: u64,
    /// Misses that it refused.
    pub misses_refused: u64,
}

impl AccessPlatformState {
    pub(super) fn new(policy: AccessPlatform) -> AccessPlatformState {
        let translation = Translation::default();
        AccessPlatformState {
            policy,
            mode: translation.mode,
            evidence: translation.evidence,
            why: why(policy, translation),
            backend_channel: false,
            updates: 0,
            invalidations: 0,
            refused_messages: 0,
            misses_sent: 0,
            misses_refused: 0,
        }
    }

    pub(super) fn set(&mut self, translation: Translation) {
        self.mode = translation.mode;
        self.evidence = translation.evidence;
        self.why = why(self.policy, translation);
    }

    /// What the configuration allows from now on, while no session is under way.
    pub(super) fn set_policy(&mut self, policy: AccessPlatform) {
        self.policy = policy;
        let translation = Translation {
            mode: self.mode,
            evidence: self.evidence,
        };
        self.why = why(policy, translation);
    }
}

fn why(policy: AccessPlatform, translation: Translation) -> &'static str {
    match (translation.mode, translation.evidence) {
        (TranslationMode::None, _) if policy == AccessPlatform::Off => {
            "VIRTIO_F_ACCESS_PLATFORM is not offered, because accessPlatform is off: addresses are guest-physical."
        }
        (TranslationMode::None, _) => {
            "VIRTIO_F_ACCESS_PLATFORM is not acknowledged: addresses are guest-physical."
        }
        (TranslationMode::Undecided, _) => {
            "VIRTIO_F_ACCESS_PLATFORM is acknowledged; the first IOTLB message or the addresses of a ring will decide."
        }
        (TranslationMode::Identity, Evidence::Configured) => {
            "accessPlatform is identity: addresses are guest-physical, whatever the VMM says."
        }
        (TranslationMode::Identity, _) => {
            "The rings' addresses are the VMM's own and no IOTLB message has come: addresses are guest-physical, although \
             VIRTIO_F_ACCESS_PLATFORM is acknowledged."
        }
        (TranslationMode::Translate, Evidence::IotlbMessage) => {
            "The VMM sends IOTLB messages: addresses are I/O virtual and translated through the IOTLB."
        }
        (TranslationMode::Translate, Evidence::RingAddressesOutsideMemory) => {
            "A ring's addresses are in no region of the memory table, so they are I/O virtual and translated through the \
             IOTLB."
        }
        (TranslationMode::Translate, _) => {
            "accessPlatform is iotlb and VIRTIO_F_ACCESS_PLATFORM is acknowledged: addresses are I/O virtual and translated \
             through the IOTLB, or not used."
        }
    }
}
