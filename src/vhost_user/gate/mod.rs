//! The gate: a pure function of (state, message) to a verdict, always in the path between VMM and crate.
//!
//! It forwards every message as it came, but for these:
//!
//! **IOTLB messages** are none of the crate's: they are judged here, carried out by the device, and answered by the
//! session. From the evidence it sees the gate also decides how addresses are understood (`gate/translation.rs`); where
//! that is "as IOVAs", a ring's addresses mean nothing to the crate, which insists on finding them in guest memory. It
//! gets a placeholder, and what the VMM said goes past it to our `Vring` as an [`AddressNote`].
//!
//! **Refusals.** The crate ends the session over any request that it does not like, even if it answers. What is known
//! to be wrong with a request whose sender waits for an acknowledgement is answered here instead, and the session lives.
//!
//! **Prelude.** A QEMU that listens and whose back-end was restarted goes on in the middle of the old session: its
//! first message on the new connection is SET_VRING_ENABLE or GET_VRING_BASE (or SET_FEATURES, when the driver had
//! stopped the device meanwhile), and nothing is negotiated again. The crate would refuse that, or not answer
//! NEED_REPLY, on which QEMU waits with its global lock held. So the gate first negotiates in QEMU's place, assuming
//! that all that is offered was acknowledged, and swallows the answers.
//!
//! **Barriers.** What is answered here must not take effect, nor be answered, before what the VMM has said earlier, and
//! requests without an answer do not tell when they are done. So if anything is unanswered, a GET_FEATURES of ours goes
//! first, and the relay holds the VMM's message until the answer is back, which the VMM never sees.
//!
//! The gate also remembers enough to say, when the crate ends the connection, which request was at fault and why, since
//! the crate itself tells nobody.

use std::collections::VecDeque;

use super::features::{
    VHOST_F_LOG_ALL, VIRTIO_F_ACCESS_PLATFORM, offered_features, offered_protocol_features,
};
use super::message::{self, Body, MemoryRegion, Message, NEED_REPLY, VERSION, display_name, request};
use super::negotiation::QUEUES;
use super::translation::{AddressNote, Evidence, RingIovas, Translation, TranslationMode};
use super::{AccessPlatform, FindingCode, Mode};
use crate::guest::Mapping;

mod fault;
mod translation;

/// The most requests that are remembered as not yet answered; older ones are forgotten. What the sockets between VMM and
/// crate hold is a fraction of it.
const MAX_OUTSTANDING: usize = 4096;
/// The most memory regions that a session may have. VMMs are told of a few less (`MAX_MEM_SLOTS` in vhost-user-backend).
const MAX_REGIONS: usize = 512;

/// What to do with a request of the VMM: first pass some messages of ours on, then deal with the request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// Messages of ours that go to the crate first.
    pub before: Vec<Passage>,
    /// What becomes of the request.
    pub then: Then,
    /// What was found out by it.
    pub findings: Vec<Observation>,
}

/// A message of ours to the crate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Passage {
    /// The message.
    pub message: Message,
    /// What our `Vring` has to know when the crate has read it.
    pub note: Option<AddressNote>,
}

/// What becomes of a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Then {
    /// It is passed on as it is.
    Forward {
        /// What our `Vring` has to know when the crate has read it.
        note: Option<AddressNote>,
    },
    /// Another message is passed on instead, with its descriptors.
    Replace(Passage),
    /// It is carried out by the device and then answered, once [`Gate::is_settled`].
    Carry {
        /// What the device has to do.
        operation: IotlbOperation,
        /// Why the VMM is told that it failed all the same.
        refusal: Option<String>,
    },
    /// It is answered with an error, once [`Gate::is_settled`], if the sender waits for an answer; the session goes on.
    Refuse(String),
    /// It is refused, and since nobody waits for an answer, the session ends.
    End(String),
}

/// Something odd, or that it is over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Observation {
    /// It was seen.
    Found(FindingCode, String),
    /// It holds no longer.
    Passed(FindingCode),
}

/// What the device has to do with its translations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IotlbOperation {
    /// Take these in.
    Update(Vec<Mapping>),
    /// Forget what lies between these addresses, both included.
    Invalidate {
        /// First I/O virtual address.
        first: u64,
        /// Last I/O virtual address.
        last: u64,
    },
}

/// What to do with a message of the crate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyVerdict {
    /// Pass it on as it is.
    Forward,
    /// It answers a message of ours: the VMM does not know of it.
    Swallow,
}

/// The request that made the crate end the connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Culprit {
    /// The request's number.
    pub request: u32,
    /// What is wrong with it, as far as known.
    pub detail: Option<String>,
    /// Whether the VMM got an answer that says so.
    pub answered: bool,
}

/// A request that the crate has and has not answered.
#[derive(Debug)]
struct Outstanding {
    request: u32,
    fault: Option<String>,
    /// Whether its sender waits for an acknowledgement.
    needs_reply: bool,
    /// It is a barrier: the answer is for nobody.
    barrier: bool,
}

/// A SET_VRING_ADDR that the crate has been given.
#[derive(Debug)]
struct Addressed {
    message: Message,
    /// Whether its addresses were passed on as IOVAs.
    translated: bool,
    /// The ring has been stopped since. It may start again without another message.
    stopped: bool,
}

/// The state of one session's gate.
pub struct Gate {
    mode: Mode,
    policy: AccessPlatform,
    /// Whether a message has come.
    begun: bool,
    /// Answers to the prelude that are still to be swallowed.
    swallow: usize,
    /// Barriers that the crate has not answered.
    barriers: usize,
    assumed: Option<(u64, u64)>,
    owned: bool,
    /// Virtio features that were acknowledged last.
    features: u64,
    protocol_features: u64,
    /// Regions of the memory table, at most [`MAX_REGIONS`].
    regions: Vec<MemoryRegion>,
    /// The last SET_VRING_ADDR of each ring, to be said again when it turns out to have meant something else.
    addressed: [Option<Addressed>; QUEUES],
    translation: Translation,
    /// An IOTLB message has come in this session: there is no way back to identity.
    iotlb_seen: bool,
    /// Requests the crate has not answered, with what is wrong with them.
    outstanding: VecDeque<Outstanding>,
    /// A request that was answered with an error; the crate ends the connection after such an answer.
    refused: Option<(u32, Option<String>)>,
}

impl Gate {
    /// The gate of a new session.
    pub fn new(mode: Mode, policy: AccessPlatform) -> Gate {
        Gate {
            mode,
            policy,
            begun: false,
            swallow: 0,
            barriers: 0,
            assumed: None,
            owned: false,
            features: 0,
            protocol_features: 0,
            regions: Vec::new(),
            addressed: [const { None }; QUEUES],
            translation: Translation::default(),
            iotlb_seen: false,
            outstanding: VecDeque::new(),
            refused: None,
        }
    }

    /// Judges a message of the VMM that came with `fds` descriptors.
    ///
    /// A verdict that is carried out or refused counts as done: the next request may be judged once it is.
    pub fn request(&mut self, message: &Message, fds: usize) -> Verdict {
        let first = !std::mem::replace(&mut self.begun, true);
        let mut before = Vec::new();
        if first && self.mode == Mode::Client && !fault::begins_negotiation(message.request()) {
            before = self.prelude();
            self.swallow = before
                .iter()
                .filter(|passage| message::is_always_answered(passage.message.request()))
                .count();
        }
        let mut findings = Vec::new();
        let then = match (message.request(), message.request_body()) {
            (request::IOTLB_MSG, body) => self.iotlb(message, &body, &mut findings),
            (
                request::SET_VRING_ADDR,
                Body::VringAddr {
                    index,
                    desc,
                    used,
                    avail,
                },
            ) if (index as usize) < QUEUES => {
                let iovas = RingIovas { desc, avail, used };
                self.ring_addresses(message, index as usize, iovas, &mut findings)
            }
            _ => self.other(message, fds),
        };
        let fault = match &then {
            Then::Forward { .. } => self.fault(message, fds),
            _ => None,
        };
        let passes = matches!(then, Then::Forward { .. } | Then::Replace(_));
        // What is said again goes first, so it must not rest on memory that the crate gets with this message; but it is this
        // message that may make it necessary.
        let decides = message.request() == request::SET_FEATURES;
        if passes && decides {
            self.note(message);
        }
        // Rings that are about to be forgotten are not set up anew before.
        let forgets = message.request() == request::RESET_DEVICE;
        if !(passes && forgets) {
            self.address_again(&mut before);
        }
        if passes && !decides {
            self.note(message);
        }
        match &then {
            Then::Forward { .. } | Then::Replace(_) => self.await_answer(message, fault, false),
            Then::Carry { .. } | Then::Refuse(_) => {
                if !self.outstanding.is_empty() || !before.is_empty() || self.swallow > 0 {
                    let barrier = Message::new(request::GET_FEATURES, VERSION, &[]);
                    self.await_answer(&barrier, None, true);
                    before.push(Passage::bare(barrier));
                    self.barriers += 1;
                }
            }
            Then::End(_) => {}
        }
        Verdict {
            before,
            then,
            findings,
        }
    }

    /// Judges a message of the crate.
    pub fn reply(&mut self, message: &Message) -> ReplyVerdict {
        if self.swallow > 0 {
            // The crate answers in order, and the prelude was the first it saw.
            self.swallow -= 1;
            return ReplyVerdict::Swallow;
        }
        let answered = |entry: &Outstanding| entry.request == message.request();
        let Some(position) = self.outstanding.iter().position(answered) else {
            return ReplyVerdict::Forward;
        };
        // Whatever came before the answered request has been served.
        let Some(entry) = self.outstanding.drain(..=position).next_back() else {
            return ReplyVerdict::Forward;
        };
        if entry.barrier {
            self.barriers = self.barriers.saturating_sub(1);
            return ReplyVerdict::Swallow;
        }
        let refused = message.u64_body().is_some_and(|error| error != 0);
        if refused && !message::is_always_answered(entry.request) {
            self.refused = Some((entry.request, entry.fault));
        }
        ReplyVerdict::Forward
    }

    /// Whether the crate has done all that was to be done before a request that is carried out or refused.
    pub fn is_settled(&self) -> bool {
        self.barriers == 0
    }

    /// How addresses are understood now.
    pub fn translation(&self) -> Translation {
        self.translation
    }

    /// Whether NEED_REPLY has a meaning in this session.
    pub fn acknowledges(&self) -> bool {
        self.protocol_features & super::features::PROTOCOL_F_REPLY_ACK != 0
    }

    /// The virtio and protocol features that the prelude took for acknowledged, if there was one.
    pub fn assumed(&self) -> Option<(u64, u64)> {
        self.assumed
    }

    /// The request at which the crate ended the connection: one that it has answered with an error, else the first
    /// unanswered one that has a fault, else the last unanswered one.
    pub fn culprit(&self) -> Option<Culprit> {
        if let Some((request, detail)) = self.refused.clone() {
            return Some(Culprit {
                request,
                detail,
                answered: true,
            });
        }
        let mut suspects = self.outstanding.iter().filter(|entry| !entry.barrier);
        let faulty = suspects.clone().find(|entry| entry.fault.is_some());
        let entry = faulty.or_else(|| suspects.next_back())?;
        Some(Culprit {
            request: entry.request,
            detail: entry.fault.clone(),
            answered: false,
        })
    }

    fn prelude(&mut self) -> Vec<Passage> {
        let u64_message = |number, value: u64| Message::new(number, VERSION, &value.to_ne_bytes());
        let bare = |number| Message::new(number, VERSION, &[]);
        // Not LOG_ALL: a migration that is underway will set it with its log. Not ACCESS_PLATFORM: no ring starts before
        // the driver has come back, and with it a SET_FEATURES that tells.
        let features = offered_features(self.policy) & !VHOST_F_LOG_ALL & !VIRTIO_F_ACCESS_PLATFORM;
        self.features = features;
        self.protocol_features = offered_protocol_features(self.mode);
        self.assumed = Some((features, self.protocol_features));
        self.owned = true;
        [
            bare(request::GET_FEATURES),
            u64_message(request::SET_FEATURES, features),
            bare(request::GET_PROTOCOL_FEATURES),
            u64_message(request::SET_PROTOCOL_FEATURES, self.protocol_features),
            bare(request::SET_OWNER),
        ]
        .map(Passage::bare)
        .into()
    }

    /// A request that is the crate's to serve, if nothing is wrong with it.
    fn other(&self, message: &Message, fds: usize) -> Then {
        let forward = Then::Forward { note: None };
        let Some(fault) = self.fault(message, fds) else {
            return forward;
        };
        let number = message.request();
        if message.flags() == VERSION | NEED_REPLY
            && self.acknowledges()
            && !message::is_always_answered(number)
        {
            return Then::Refuse(fault);
        }
        match number {
            // The crate would end the session as well, and cannot say which option to change.
            request::SET_FEATURES if self.features_fault(message).is_some() => Then::End(fault),
            // The crate would take it.
            request::ADD_MEM_REG if self.regions.len() >= MAX_REGIONS => Then::End(fault),
            // Perhaps the crate knows better. If it does not, this is what is said about the end of the session.
            _ => forward,
        }
    }

    fn await_answer(&mut self, message: &Message, fault: Option<String>, barrier: bool) {
        let request = message.request();
        // Of requests that nobody answers, the last one of a kind says enough.
        if let Some(last) = self.outstanding.back_mut()
            && !last.barrier
            && !last.needs_reply
            && last.fault.is_none()
            && last.request == request
            && !message.needs_reply()
            && !message::is_always_answered(request)
        {
            last.fault = fault;
            return;
        }
        if self.outstanding.len() == MAX_OUTSTANDING {
            self.outstanding.pop_front();
        }
        self.outstanding.push_back(Outstanding {
            request,
            fault,
            needs_reply: message.needs_reply(),
            barrier,
        });
    }

    /// Remembers what later messages are judged by.
    fn note(&mut self, message: &Message) {
        match (message.request(), message.request_body()) {
            (request::SET_OWNER, _) => self.owned = true,
            (request::RESET_OWNER, _) => self.owned = false,
            (request::SET_FEATURES, Body::U64(bits)) => {
                self.features = bits;
                self.features_changed();
            }
            (request::SET_PROTOCOL_FEATURES, Body::U64(bits)) => self.protocol_features = bits,
            (request::SET_MEM_TABLE, Body::MemoryTable(regions)) => self.regions = regions,
            (request::ADD_MEM_REG, Body::MemoryRegion(region)) => self.regions.push(region),
            (request::REM_MEM_REG, Body::MemoryRegion(region)) => {
                self.regions
                    .retain(|known| known.guest_address != region.guest_address);
            }
            (request::GET_VRING_BASE, Body::VringState { index, .. }) => {
                if let Some(Some(addressed)) = self.addressed.get_mut(index as usize) {
                    addressed.stopped = true;
                }
            }
            (request::RESET_DEVICE, _) => {
                self.features = 0;
                self.addressed = [const { None }; QUEUES];
                self.features_changed();
            }
            _ => {}
        }
    }
}

impl Passage {
    fn bare(message: Message) -> Passage {
        Passage { message, note: None }
    }

    /// Whether it names a ring's addresses as IOVAs.
    fn is_translated(&self) -> bool {
        self.note.is_some_and(|note| note.iovas.is_some())
    }
}

impl std::fmt::Display for Culprit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&display_name(self.request))?;
        match &self.detail {
            Some(detail) => write!(f, ": {detail}"),
            None => Ok(()),
        }
    }
}

/// The translation when ACCESS_PLATFORM is not acknowledged.
const NOT_TRANSLATED: Translation = Translation {
    mode: TranslationMode::None,
    evidence: Evidence::NotAcknowledged,
};

#[cfg(test)]
mod tests;
