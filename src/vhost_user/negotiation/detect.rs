//! What is odd, told from messages, events of the device, and the clock.

use std::time::{Duration, Instant};

use super::detail::IotlbText;
use super::watch::{DRIVER_PATIENCE, Inner};
use super::{QUEUE_NAMES, VmmHint};
use crate::device::DeviceEvent;
use crate::device::handle::{MISS_PATIENCE, STORM};
use crate::guest::{Access, MemoryFault, RingError};
use crate::vhost_user::features::{
    Features, PROTOCOL_F_BACKEND_REQ, PROTOCOL_F_REPLY_ACK, VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
};
use crate::vhost_user::message::{Body, Message, request};
use crate::vhost_user::{AccessPlatform, Evidence, FindingCode, TranslationMode};

/// VIRTIO_VSOCK_F_SEQPACKET.
const VIRTIO_VSOCK_F_SEQPACKET: u64 = 1 << 1;
/// How long a storm of faults is told after the last hundred.
const STORM_FADES: Duration = Duration::from_secs(120);

impl Inner {
    pub(super) fn raise(&mut self, code: FindingCode, seen: String) {
        let (session, policy) = (self.now.session, self.access_platform().policy);
        self.board.raise(code, seen, session, policy);
    }

    /// See [`super::NegotiationWatch::unready`].
    pub(super) fn unready(&self) -> Option<&'static str> {
        if self.access_platform().policy != AccessPlatform::Iotlb || !self.now.connected {
            return None;
        }
        let access = self.access_platform();
        // It may also be silent with addresses that are none of its own.
        let silent = access.mode == TranslationMode::Translate
            && access.evidence != Evidence::IotlbMessage
            && self.board.is_active(FindingCode::IotlbMissUnanswered);
        if silent || self.board.is_active(FindingCode::AccessPlatformWithoutIotlb) {
            return Some(
                "accessPlatform is iotlb, and the VMM acknowledged VIRTIO_F_ACCESS_PLATFORM but sends no IOTLB \
                 messages: the guest is not served",
            );
        }
        if self.acknowledged(VIRTIO_F_ACCESS_PLATFORM) && self.lacks_backend_channel().is_some() {
            return Some(
                "accessPlatform is iotlb, and the VMM gave no backend channel to ask for translations: the guest is not \
                 served",
            );
        }
        None
    }

    /// A request was taken; `before` are the features acknowledged until then.
    pub(super) fn look_at_request(&mut self, message: &Message, before: Features) {
        match (message.request(), message.request_body()) {
            (request::SET_FEATURES, Body::U64(bits)) => self.look_at_features(bits, before.bits()),
            (request::SET_PROTOCOL_FEATURES, _) => self.look_at_backend_channel(),
            (_, Body::VringAddr { index, .. }) => self.look_at_order(index),
            _ => {}
        }
    }

    /// A request was refused by the gate.
    pub(super) fn look_at_refused(&mut self, message: &Message, reason: &str) {
        match (message.request(), message.request_body()) {
            (request::SET_FEATURES, Body::U64(bits)) => self.look_at_unoffered(bits),
            (request::IOTLB_MSG, _) => {
                self.now.access_platform.refused_messages += 1;
                let seen = format!(
                    "{} sent an IOTLB message ({}) that was refused: {reason}",
                    self.vmm(),
                    IotlbText::of(message)
                );
                self.raise(FindingCode::IotlbMessageRefused, seen);
            }
            (_, Body::VringAddr { index, .. }) => self.look_at_order(index),
            _ => {}
        }
    }

    /// An IOTLB message was taken, and answered with no.
    pub(super) fn iotlb_refused(&mut self, message: &Message) {
        self.now.access_platform.refused_messages += 1;
        let seen = format!(
            "{} sent an IOTLB message that could not be carried out: {}",
            self.vmm(),
            IotlbText::of(message)
        );
        self.raise(FindingCode::IotlbMessageRefused, seen);
    }

    fn look_at_features(&mut self, bits: u64, before: u64) {
        self.look_at_unoffered(bits);
        let changed = (bits ^ before) & !VHOST_F_LOG_ALL;
        if self.any_ring_started() && changed != 0 && self.now.knows_acknowledged() && before != 0 {
            let (added, removed) = (changed & bits, changed & before);
            let mut seen = format!("{} changed features while a ring was running:", self.vmm());
            for (what, bits) in [("added", added), ("removed", removed)] {
                if bits != 0 {
                    let comma = if what == "removed" && added != 0 { "," } else { "" };
                    seen.push_str(&format!("{comma} {what} {}", Features::virtio(bits)));
                }
            }
            self.raise(FindingCode::FeaturesChangedWhileRunning, seen);
        }
        if bits & VIRTIO_F_VERSION_1 != 0 {
            self.board.pass(FindingCode::Version1NotAcknowledged);
        }
        if bits & VIRTIO_VSOCK_F_SEQPACKET != 0 {
            self.board.pass(FindingCode::SeqpacketDropped);
        }
        if bits & VIRTIO_F_ACCESS_PLATFORM != 0 {
            self.board.pass(FindingCode::AccessPlatformNotAcknowledged);
        } else {
            self.board.pass(FindingCode::AccessPlatformWithoutIotlb);
        }
        self.look_at_backend_channel();
    }

    /// Features that were acknowledged without having been offered.
    fn look_at_unoffered(&mut self, bits: u64) {
        let offered = self.now.features_offered.bits();
        let unoffered = bits & !offered;
        if unoffered == 0 {
            return self.board.pass(FindingCode::FeatureNotOffered);
        }
        if offered == 0 {
            // It did not ask for them, so this is no more than a VMM in a hurry.
            return;
        }
        let mut seen = format!(
            "{} acknowledged {}, which was not offered",
            self.vmm(),
            Features::virtio(unoffered)
        );
        if unoffered & VIRTIO_F_ACCESS_PLATFORM != 0 && self.access_platform().policy == AccessPlatform::Off {
            seen.push_str(" (vhostUser.accessPlatform is off)");
        }
        self.raise(FindingCode::FeatureNotOffered, seen);
    }

    fn look_at_order(&mut self, index: u32) {
        if self.now.memory.is_empty() {
            let seen = format!(
                "{} set the addresses of queue {index} before it shared any memory",
                self.vmm()
            );
            self.raise(FindingCode::RingBeforeMemory, seen);
        }
    }

    /// The mode has changed.
    pub(super) fn look_at_translation(&mut self) {
        let access = self.access_platform();
        match (access.mode, access.evidence) {
            (TranslationMode::Identity, Evidence::RingAddressesInMemory) => {
                let seen = format!(
                    "{} acknowledged access_platform, gave ring addresses of its own address space, and sent no IOTLB \
                     message",
                    self.vmm()
                );
                self.raise(FindingCode::AccessPlatformWithoutIotlb, seen);
            }
            (TranslationMode::Translate, Evidence::Configured) => {}
            (TranslationMode::Undecided, _) => {}
            _ => self.board.pass(FindingCode::AccessPlatformWithoutIotlb),
        }
        self.look_at_backend_channel();
    }

    /// Whether what has to be translated can be asked for.
    pub(super) fn look_at_backend_channel(&mut self) {
        match self.lacks_backend_channel() {
            Some(lack)
                if self.access_platform().mode == TranslationMode::Translate && self.any_ring_started() =>
            {
                let seen = format!(
                    "{} acknowledged access_platform and started a ring {lack}",
                    self.vmm()
                );
                self.raise(FindingCode::IotlbWithoutBackendChannel, seen);
            }
            _ => self.board.pass(FindingCode::IotlbWithoutBackendChannel),
        }
    }

    fn lacks_backend_channel(&self) -> Option<&'static str> {
        let protocol = self.now.protocol_features_acked.bits();
        match () {
            () if protocol & PROTOCOL_F_BACKEND_REQ == 0 => Some("without the protocol feature backend_req"),
            () if protocol & PROTOCOL_F_REPLY_ACK == 0 => Some("without the protocol feature reply_ack"),
            () if !self.access_platform().backend_channel => {
                Some("without a descriptor for the backend channel")
            }
            () => None,
        }
    }

    /// A ring was started or stopped.
    pub(super) fn look_at_ring(&mut self, index: usize, started: bool) {
        // Whichever it is, what was wrong with the ring before is over.
        self.ring_is_fine(index);
        if started {
            self.look_at_start();
        } else if !self.any_ring_started() {
            self.board.pass(FindingCode::FeaturesChangedWhileRunning);
            // Its questions are forgotten with the translations.
            self.board.pass(FindingCode::IotlbMissUnanswered);
        }
    }

    fn ring_is_fine(&mut self, index: usize) {
        for (flags, code) in [
            (&mut self.without_memory, FindingCode::MemoryNotShared),
            (&mut self.refused_rings, FindingCode::TranslationFaultStorm),
        ] {
            if let Some(flag) = flags.get_mut(index)
                && std::mem::take(flag)
                && !flags.contains(&true)
                && (code != FindingCode::TranslationFaultStorm || self.storm_until.is_none())
            {
                self.board.pass(code);
            }
        }
    }

    fn look_at_start(&mut self) {
        self.driver_due = None;
        self.board.overcome(self.now.session);
        self.board.pass(FindingCode::DriverNotReady);
        self.board.pass(FindingCode::RingBeforeMemory);
        self.look_at_backend_channel();
        if !self.now.knows_acknowledged() {
            return;
        }
        let offered = |bit| self.now.features_offered.bits() & bit != 0;
        let seqpacket = offered(VIRTIO_VSOCK_F_SEQPACKET) && !self.acknowledged(VIRTIO_VSOCK_F_SEQPACKET);
        if !self.acknowledged(VIRTIO_F_VERSION_1) {
            let seen = format!(
                "{} started a ring without having acknowledged version_1",
                self.vmm()
            );
            self.raise(FindingCode::Version1NotAcknowledged, seen);
        }
        if seqpacket {
            let seen = format!(
                "{} started a ring without having acknowledged seqpacket, which was offered",
                self.vmm()
            );
            self.raise(FindingCode::SeqpacketDropped, seen);
        }
        if self.access_platform().policy == AccessPlatform::Iotlb
            && !self.acknowledged(VIRTIO_F_ACCESS_PLATFORM)
        {
            let seen = format!(
                "{} started a ring without having acknowledged access_platform, and vhostUser.accessPlatform is iotlb",
                self.vmm()
            );
            self.raise(FindingCode::AccessPlatformNotAcknowledged, seen);
        }
    }

    /// The device tells something.
    pub(super) fn look_at_device(&mut self, event: &DeviceEvent, now: Instant) {
        match event {
            DeviceEvent::Miss(_) => {}
            DeviceEvent::MissOverdue(miss) => {
                let access = match miss.access {
                    Access::Read => "reading",
                    Access::Write => "writing",
                };
                let seen = format!(
                    "{} was asked to translate {:#x} for {access} and has not answered for {} s",
                    self.vmm(),
                    miss.iova,
                    MISS_PATIENCE.as_secs()
                );
                self.raise(FindingCode::IotlbMissUnanswered, seen);
            }
            DeviceEvent::MissesAnswered => self.board.pass(FindingCode::IotlbMissUnanswered),
            DeviceEvent::FaultStorm => {
                self.storm_until = now.checked_add(STORM_FADES);
                let seen = format!("{} refused {STORM} translations within a minute", self.vmm());
                self.raise(FindingCode::TranslationFaultStorm, seen);
            }
            DeviceEvent::MemoryLost(loss) => self.raise(FindingCode::MemoryLost, loss.to_string()),
            DeviceEvent::RingBroken { index, error } => self.look_at_broken_ring(*index, error),
            DeviceEvent::RingMended { index } => self.ring_is_fine(*index),
            DeviceEvent::RingEmpty { index } => {
                let queue = QUEUE_NAMES.get(*index).copied().unwrap_or("unknown");
                set(&mut self.without_memory, *index);
                let seen =
                    format!("the memory of the {queue} ring is all zero although the driver has started it");
                self.raise(FindingCode::MemoryNotShared, seen);
            }
        }
    }

    /// Only what the VMM can mend is a finding; a ring that the driver has filled with nonsense is counted.
    fn look_at_broken_ring(&mut self, index: usize, error: &RingError) {
        let RingError::Memory { fault, .. } = error else {
            return;
        };
        let (flags, code) = match fault {
            MemoryFault::Unmapped { .. } | MemoryFault::Wraps { .. } => {
                (&mut self.without_memory, FindingCode::MemoryNotShared)
            }
            MemoryFault::Refused { .. } => (&mut self.refused_rings, FindingCode::TranslationFaultStorm),
            MemoryFault::Missing { .. } => return,
        };
        set(flags, index);
        let queue = QUEUE_NAMES.get(index).copied().unwrap_or("unknown");
        self.raise(code, format!("the {queue} ring stands still: {error}"));
    }

    /// What only time shows. Answers when to look again.
    pub(super) fn look_at_the_clock(&mut self, now: Instant) -> Option<Instant> {
        if self.driver_due.is_some_and(|due| now >= due) {
            self.driver_due = None;
            let seen = format!(
                "{} is connected for {} s and no driver has started a ring",
                self.vmm(),
                DRIVER_PATIENCE.as_secs()
            );
            self.raise(FindingCode::DriverNotReady, seen);
        }
        if self.storm_until.is_some_and(|until| now >= until) {
            self.storm_until = None;
            if !self.refused_rings.contains(&true) {
                self.board.pass(FindingCode::TranslationFaultStorm);
            }
        }
        [self.driver_due, self.storm_until].into_iter().flatten().min()
    }

    fn acknowledged(&self, bits: u64) -> bool {
        self.now.features_acked.bits() & bits == bits
    }

    /// The VMM, as a sentence begins with it.
    fn vmm(&self) -> &'static str {
        let hint = self.now.peer.as_ref().and_then(super::Peer::vmm_hint);
        hint.map_or("the VMM", VmmHint::name)
    }
}

fn set<const N: usize>(flags: &mut [bool; N], index: usize) {
    if let Some(flag) = flags.get_mut(index) {
        *flag = true;
    }
}

#[cfg(test)]
#[path = "../tests/findings.rs"]
mod tests;
