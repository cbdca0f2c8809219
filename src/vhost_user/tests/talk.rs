//! What VMMs say, as transcripts: the values are those of QEMU 7.2's own messages.

use std::sync::Arc;

use super::*;
use crate::vhost_user::message::{NEED_REPLY, REPLY, VERSION};
use crate::vhost_user::{AccessPlatform, Evidence, FindingCode, Mode, TranslationMode, testing};

/// VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC, STREAM.
pub const PLAIN: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1;
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// MQ, REPLY_ACK, BACKEND_REQ, CONFIG.
pub const PROTOCOL: u64 = 0x229;
/// Where QEMU's memory begins in its own address space.
pub const USER: u64 = 0x7fe3_dbff_f000;

pub struct Talk(pub Arc<NegotiationWatch>);

impl Talk {
    /// A session has begun, with a VMM of this name.
    pub fn with(program: &str, policy: AccessPlatform) -> Talk {
        let mut config = testing::config(Mode::Server, "/run/web.sock");
        config.access_platform = policy;
        let talk = Talk(NegotiationWatch::new(&config));
        talk.again(program);
        talk
    }

    /// The next session begins.
    pub fn again(&self, program: &str) {
        self.0.session_started(Some(Peer {
            pid: Some(4711),
            uid: 107,
            gid: 107,
            program: Some(program.to_owned()),
        }));
    }

    pub fn say(&self, number: u32, body: &[u8]) -> Message {
        let message = Message::new(number, VERSION, body);
        self.0.request(&message, 0);
        message
    }

    /// A request that is to be answered with yes or no.
    pub fn ask(&self, number: u32, body: &[u8]) -> Message {
        let message = Message::new(number, VERSION | NEED_REPLY, body);
        self.0.request(&message, 1);
        message
    }

    pub fn answer(&self, number: u32, value: u64) {
        self.0
            .reply(&Message::new(number, VERSION | REPLY, &value.to_ne_bytes()));
    }

    pub fn refuse(&self, number: u32, body: &[u8], reason: &str) {
        self.0
            .refused(&Message::new(number, VERSION, body), reason, false);
    }

    /// GET_FEATURES to SET_PROTOCOL_FEATURES.
    pub fn negotiate(&self, offered: u64, protocol: u64) {
        self.say(request::GET_FEATURES, &[]);
        self.answer(request::GET_FEATURES, offered);
        self.say(request::GET_PROTOCOL_FEATURES, &[]);
        self.answer(request::GET_PROTOCOL_FEATURES, PROTOCOL);
        self.say(request::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes());
    }

    pub fn set_features(&self, bits: u64) {
        self.say(request::SET_FEATURES, &bits.to_ne_bytes());
    }

    pub fn share_memory(&self) {
        let mut body = 1u64.to_ne_bytes().to_vec();
        for value in [0u64, 0x1000_0000, USER, 0] {
            body.extend_from_slice(&value.to_ne_bytes());
        }
        self.ask(request::SET_MEM_TABLE, &body);
        self.answer(request::SET_MEM_TABLE, 0);
    }

    /// SET_VRING_NUM to SET_VRING_KICK, and the device runs the ring.
    pub fn start_ring(&self, index: u32, at: u64) {
        self.set_up_ring(index, at);
        self.say(request::SET_VRING_ENABLE, &state(index, 1));
        self.0.ring_started(index as usize, true);
    }

    pub fn set_up_ring(&self, index: u32, at: u64) {
        self.say(request::SET_VRING_NUM, &state(index, 128));
        self.say(request::SET_VRING_BASE, &state(index, 0));
        let mut addresses = state(index, 0);
        for value in [at, at + 0x940, at + 0x800, at + 0x940] {
            addresses.extend_from_slice(&value.to_ne_bytes());
        }
        self.say(request::SET_VRING_ADDR, &addresses);
        self.say(request::SET_VRING_KICK, &u64::from(index).to_ne_bytes());
    }

    pub fn stop_ring(&self, index: u32) {
        self.0.ring_started(index as usize, false);
        self.say(request::GET_VRING_BASE, &state(index, 0));
        self.0.reply(&Message::new(
            request::GET_VRING_BASE,
            VERSION | REPLY,
            &state(index, 2),
        ));
    }

    /// An IOTLB message that the device carries out.
    pub fn iotlb(&self, kind: u8, iova: u64, size: u64) {
        let message = self.ask(request::IOTLB_MSG, &iotlb(kind, iova, size));
        self.0.iotlb_carried_out();
        self.0.answered(&message, 0);
    }

    pub fn translate(&self, mode: TranslationMode, evidence: Evidence) {
        self.0.translation(Translation { mode, evidence });
    }

    pub fn end(&self, error: Option<(SessionError, Option<u32>)>) {
        let end = SessionEnd {
            session: self.0.snapshot().session,
            reason: error.map_or("vmm_closed", |(error, _)| error.label()),
            detail: "as told by the session".to_owned(),
        };
        self.0.session_ended(error, end);
    }

    pub fn finding(&self, code: FindingCode) -> Option<Finding> {
        let findings = self.0.snapshot().findings;
        findings.into_iter().find(|finding| finding.code == code.code())
    }

    /// Codes of the findings that hold.
    pub fn active(&self) -> Vec<&'static str> {
        let findings = self.0.snapshot().findings;
        findings
            .iter()
            .filter(|finding| finding.active)
            .map(|finding| finding.code)
            .collect()
    }

    /// What QEMU says until both rings run, without a vIOMMU.
    pub fn plain_boot(&self) {
        self.negotiate(PLAIN | ACCESS_PLATFORM, PROTOCOL);
        self.set_features(PLAIN);
        self.share_memory();
        self.start_ring(0, USER + 0x57e_d000);
        self.start_ring(1, USER + 0x571_e000);
    }

    /// The same with intel-iommu and iommu_platform=on.
    pub fn translated_boot(&self) {
        self.negotiate(PLAIN | ACCESS_PLATFORM, PROTOCOL);
        self.ask(request::SET_BACKEND_REQ_FD, &[]);
        self.0.backend_channel(true);
        self.answer(request::SET_BACKEND_REQ_FD, 0);
        self.set_features(PLAIN | ACCESS_PLATFORM);
        self.translate(TranslationMode::Undecided, Evidence::NoneYet);
        self.share_memory();
        self.translate(TranslationMode::Translate, Evidence::RingAddressesOutsideMemory);
        self.start_ring(0, 0xffff_f000);
        self.start_ring(1, 0xffff_e000);
        self.iotlb(2, 0xffff_f000, 0x1000);
        self.translate(TranslationMode::Translate, Evidence::IotlbMessage);
        self.iotlb(2, 0xffff_e000, 0x1000);
    }
}

pub fn state(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

/// The body of an IOTLB_MSG: 26 bytes and the padding that QEMU sends. 1 MISS, 2 UPDATE, 3 INVALIDATE.
pub fn iotlb(kind: u8, iova: u64, size: u64) -> Vec<u8> {
    let mut body = Vec::new();
    for value in [iova, size, USER] {
        body.extend_from_slice(&value.to_ne_bytes());
    }
    body.extend_from_slice(&[3, kind, 0, 0, 0, 0, 0, 0]);
    body
}
