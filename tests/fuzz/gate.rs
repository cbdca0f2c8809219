//! The gate against a model of what surrounds it: a relay that does what verdicts say, and a crate that answers in order.

use std::collections::VecDeque;

use vsock_sidecar::guest::Permission;
use vsock_sidecar::vhost_user::features::{PROTOCOL_F_REPLY_ACK, VIRTIO_F_ACCESS_PLATFORM};
use vsock_sidecar::vhost_user::gate::{Gate, IotlbOperation, Passage, ReplyVerdict, Then, Verdict};
use vsock_sidecar::vhost_user::message::{
    Body, HEADER_LEN, MemoryRegion, Message, NEED_REPLY, REPLY, VERSION, request,
};
use vsock_sidecar::vhost_user::translation::{AddressNote, RingIovas};
use vsock_sidecar::vhost_user::{AccessPlatform, Mode, TranslationMode};

use super::steps::{Case, Request, Step};

/// Virtqueues of the device.
const QUEUES: usize = 3;
/// The most messages of ours before one of the VMM: a prelude, each ring once more, a barrier.
const MAX_BEFORE: usize = 5 + QUEUES + 1;
/// The longest reason for a refusal, in bytes: it is logged and exported.
const MAX_REASON: usize = 2048;

/// Runs a case; panics where the gate breaks a promise.
pub fn run(case: &Case) {
    let mut model = Model::new(case);
    for step in &case.steps {
        match step {
            Step::Request(request) => model.request(request, case),
            Step::Serve(most) => model.serve(*most),
            Step::Pause => model.serve(usize::MAX),
            Step::Speak(message) if case.babbles => {
                model.gate.reply(message);
            }
            _ => {}
        }
        model.check();
    }
    model.settle();
    if let Some(culprit) = model.gate.culprit() {
        assert!(culprit.to_string().len() < MAX_REASON + 100, "{culprit}");
    }
}

/// A message on its way to the crate.
struct Sent {
    message: Message,
    /// The VMM does not know of it.
    ours: bool,
    /// Whether it is a barrier, which is ours too.
    barrier: bool,
}

struct Model {
    gate: Gate,
    policy: AccessPlatform,
    mode: Mode,
    babbles: bool,
    /// What the crate has not served.
    sent: VecDeque<Sent>,
    /// A request of the VMM waits for a barrier, or could have.
    held: bool,
    /// Virtio and protocol features that the crate was told last.
    features: u64,
    protocol_features: u64,
    /// The memory that the crate was told of.
    regions: Vec<MemoryRegion>,
    /// Rings that run, or will, with addresses that are taken for the VMM's.
    plain: [bool; QUEUES],
    /// ACCESS_PLATFORM was acknowledged in this session.
    platform_seen: bool,
    /// An IOTLB message counted as evidence.
    iotlb_seen: bool,
}

impl Model {
    fn new(case: &Case) -> Model {
        Model {
            gate: Gate::new(case.mode, case.policy),
            policy: case.policy,
            mode: case.mode,
            babbles: case.babbles,
            sent: VecDeque::new(),
            held: false,
            features: 0,
            protocol_features: 0,
            regions: Vec::new(),
            plain: [false; QUEUES],
            platform_seen: false,
            iotlb_seen: false,
        }
    }

    fn request(&mut self, request: &Request, case: &Case) {
        self.settle();
        let message = &request.message;
        let counts = matches!(message.flags(), VERSION | 9) && message.request() == request::IOTLB_MSG;
        if counts && self.acknowledged() && self.policy != AccessPlatform::Identity {
            self.iotlb_seen = true;
        }
        let acknowledged = self.acknowledged();
        let Verdict {
            before,
            then,
            findings,
        } = self.gate.request(message, request.fds.len());
        assert!(before.len() <= MAX_BEFORE && findings.len() <= 2, "{before:?}");
        let ours = before.len();
        for (at, passage) in before.into_iter().enumerate() {
            let last = at + 1 == ours && matches!(then, Then::Carry { .. } | Then::Refuse(_));
            let is_barrier = last && passage.message.request() == request::GET_FEATURES;
            assert!(
                !passage.message.needs_reply(),
                "{passage:?}: who would read the answer?"
            );
            self.deliver(&passage.message, passage.note, true, is_barrier);
        }
        let plain = self.gate.translation().mode == TranslationMode::None;
        if self.mode == Mode::Server && plain && !self.platform_seen {
            let barriers = self.sent.iter().filter(|sent| sent.ours && !sent.barrier);
            assert_eq!(barriers.count(), 0, "a message of ours without a reason");
        }
        match then {
            Then::Forward { note } => self.deliver(message, note, false, false),
            Then::Replace(Passage { message: other, note }) => {
                assert!(
                    self.platform_seen,
                    "{message:?} is replaced and addresses are plain"
                );
                self.check_replaced(message, &other, note);
                self.deliver(&other, note, false, false);
            }
            Then::Carry { operation, refusal } => {
                self.held = true;
                assert!(acknowledged, "{operation:?} without ACCESS_PLATFORM");
                assert!(
                    matches!(self.policy, AccessPlatform::Auto | AccessPlatform::Iotlb),
                    "{operation:?} under {:?}",
                    self.policy
                );
                assert_eq!(self.gate.translation().mode, TranslationMode::Translate);
                self.check_operation(message, &operation, refusal.is_some());
                self.check_barrier();
            }
            Then::Refuse(reason) => {
                self.held = true;
                assert!(!reason.is_empty() && reason.len() < MAX_REASON, "{reason}");
                self.check_barrier();
                assert!(
                    message.request() == request::IOTLB_MSG || message.flags() == VERSION | NEED_REPLY,
                    "{message:?} is refused, and nobody would hear of it"
                );
            }
            Then::End(reason) => {
                assert!(!reason.is_empty() && reason.len() < MAX_REASON, "{reason}");
                // The next session.
                *self = Model::new(case);
            }
        }
    }

    fn acknowledged(&self) -> bool {
        self.features & VIRTIO_F_ACCESS_PLATFORM != 0
    }

    /// The crate is sent a message.
    fn deliver(&mut self, message: &Message, note: Option<AddressNote>, ours: bool, barrier: bool) {
        match (message.request(), message.request_body()) {
            (
                request::SET_VRING_ADDR,
                Body::VringAddr {
                    index,
                    desc,
                    used,
                    avail,
                },
            ) if (index as usize) < QUEUES => {
                let note = note.expect("each SET_VRING_ADDR that the crate may heed is noted");
                assert_eq!(note.index, index as usize);
                let translates = self.gate.translation().mode == TranslationMode::Translate;
                // The crate refuses what is in no memory.
                self.plain[note.index] = note.iovas.is_none() && !self.placeholder_is_impossible();
                match note.iovas {
                    Some(_) => {
                        assert!(translates, "{note:?} while addresses are plain");
                        for address in [desc, used, avail] {
                            assert!(
                                self.regions.iter().any(|region| region.contains_user(address)),
                                "the placeholder {address:#x} is in no memory"
                            );
                        }
                    }
                    None => assert!(
                        !translates || self.placeholder_is_impossible(),
                        "{message:?} goes untranslated"
                    ),
                }
            }
            _ => assert_eq!(note, None, "{message:?} needs no note"),
        }
        match (message.request(), message.request_body()) {
            (request::SET_FEATURES, Body::U64(bits)) => self.features = bits,
            (request::SET_PROTOCOL_FEATURES, Body::U64(bits)) => self.protocol_features = bits,
            (request::SET_MEM_TABLE, Body::MemoryTable(regions)) => self.regions = regions,
            (request::ADD_MEM_REG, Body::MemoryRegion(region)) => self.regions.push(region),
            (request::REM_MEM_REG, Body::MemoryRegion(region)) => self
                .regions
                .retain(|known| known.guest_address != region.guest_address),
            (request::GET_VRING_BASE, Body::VringState { index, .. }) if (index as usize) < QUEUES => {
                self.plain[index as usize] = false;
            }
            (request::RESET_DEVICE, _) => {
                self.features = 0;
                self.plain = [false; QUEUES];
            }
            _ => {}
        }
        self.platform_seen |= self.acknowledged();
        self.sent.push_back(Sent {
            message: message.clone(),
            ours,
            barrier,
        });
    }

    fn placeholder_is_impossible(&self) -> bool {
        !self.regions.iter().any(|region| {
            let aligned = region.user_address.checked_next_multiple_of(16);
            aligned.is_some_and(|address| region.contains_user(address))
        })
    }

    /// Only the three addresses differ, and the note has what they were.
    fn check_replaced(&self, message: &Message, other: &Message, note: Option<AddressNote>) {
        let Body::VringAddr {
            desc, used, avail, ..
        } = message.request_body()
        else {
            panic!("{message:?} has no addresses to be replaced");
        };
        let iovas = Some(RingIovas { desc, avail, used });
        assert_eq!(note.and_then(|note| note.iovas), iovas);
        let (was, is) = (message.bytes(), other.bytes());
        let areas = HEADER_LEN + 8..HEADER_LEN + 32;
        assert_eq!(was.len(), is.len());
        assert_eq!(was[..areas.start], is[..areas.start]);
        assert_eq!(was[areas.end..], is[areas.end..]);
    }

    fn check_operation(&self, message: &Message, operation: &IotlbOperation, refused: bool) {
        let Body::Iotlb {
            iova,
            size,
            uaddr,
            perm,
            ..
        } = message.request_body()
        else {
            panic!("{message:?} has no operation");
        };
        match operation {
            IotlbOperation::Update(mappings) => {
                assert!(!refused && !mappings.is_empty() && mappings.len() <= self.regions.len());
                let mut done = 0;
                for mapping in mappings {
                    assert!(mapping.len > 0);
                    let last = mapping.len - 1;
                    assert_eq!(Some(mapping.iova), iova.checked_add(done), "a gap or an overlap");
                    assert!(
                        mapping.iova.checked_add(last).is_some() && mapping.gpa.checked_add(last).is_some()
                    );
                    let address = uaddr + done;
                    let within = self.regions.iter().any(|region| {
                        region.contains_user(address)
                            && region.contains_user(address + last)
                            && region.guest_address.checked_add(address - region.user_address)
                                == Some(mapping.gpa)
                    });
                    assert!(within, "{mapping:?} is outside the memory table");
                    let expected = [Permission::Read, Permission::Write, Permission::ReadWrite];
                    assert_eq!(mapping.permission, expected[usize::from(perm) - 1]);
                    done += mapping.len;
                }
                assert_eq!(done, size);
            }
            IotlbOperation::Invalidate { first, last } => {
                assert!(first <= last);
                match size {
                    0 => assert_eq!((*first, *last), (0, u64::MAX)),
                    _ => {
                        assert_eq!(*first, iova);
                        assert_eq!(*last, iova.saturating_add(size - 1));
                        assert_eq!(refused, iova.checked_add(size - 1).is_none());
                    }
                }
            }
        }
    }

    /// What is answered by us waits for what the crate has not served.
    fn check_barrier(&self) {
        assert!(
            self.babbles || self.sent.back().is_none_or(|sent| sent.barrier),
            "it does not wait for {} messages",
            self.sent.len()
        );
    }

    /// The crate serves what it has, at most so many messages.
    fn serve(&mut self, most: usize) {
        for _ in 0..most {
            let Some(Sent { message, ours, .. }) = self.sent.pop_front() else {
                return;
            };
            if let Some(answer) = self.answer(&message) {
                let verdict = self.gate.reply(&answer);
                if !self.babbles {
                    let expected = if ours {
                        ReplyVerdict::Swallow
                    } else {
                        ReplyVerdict::Forward
                    };
                    assert_eq!(verdict, expected, "the answer to {message:?}");
                }
            }
            self.check();
        }
    }

    /// The crate's answer, if the request has one.
    fn answer(&self, message: &Message) -> Option<Message> {
        use request::*;
        let body = match message.request() {
            GET_FEATURES
            | GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | GET_MAX_MEM_SLOTS
            | SET_LOG_BASE
            | GET_INFLIGHT_FD
            | SET_DEVICE_STATE_FD
            | CHECK_DEVICE_STATE => vec![1; 8],
            GET_VRING_BASE | GET_CONFIG => message.body().to_vec(),
            _ if message.needs_reply() && self.protocol_features & PROTOCOL_F_REPLY_ACK != 0 => vec![0; 8],
            _ => return None,
        };
        Some(Message::new(message.request(), VERSION | REPLY, &body))
    }

    /// A request of the VMM that is answered by us has been, if there was one.
    fn settle(&mut self) {
        if !std::mem::take(&mut self.held) {
            return;
        }
        self.serve(usize::MAX);
        if !self.babbles {
            assert!(
                self.gate.is_settled(),
                "the crate has served everything, and we wait"
            );
        } else if !self.gate.is_settled() {
            // An answer that was not due took the barrier's place; the VMM's next request waits for ever. The crate does
            // not do that; the gate has survived it.
            self.gate = Gate::new(self.mode, self.policy);
            self.features = 0;
            self.regions.clear();
            self.plain = [false; QUEUES];
            self.platform_seen = false;
            self.iotlb_seen = false;
        }
    }

    /// What holds at any time.
    fn check(&self) {
        if !self.babbles {
            let barriers = self.sent.iter().filter(|sent| sent.barrier).count();
            assert!(barriers <= 1);
            assert_eq!(
                self.gate.is_settled(),
                barriers == 0,
                "barriers and their answers"
            );
        }
        let mode = self.gate.translation().mode;
        let possible: &[TranslationMode] = match self.policy {
            AccessPlatform::Off => &[TranslationMode::None],
            AccessPlatform::Identity => &[TranslationMode::None, TranslationMode::Identity],
            AccessPlatform::Iotlb => &[TranslationMode::None, TranslationMode::Translate],
            AccessPlatform::Auto if self.iotlb_seen => &[TranslationMode::None, TranslationMode::Translate],
            AccessPlatform::Auto => &[
                TranslationMode::None,
                TranslationMode::Undecided,
                TranslationMode::Identity,
                TranslationMode::Translate,
            ],
        };
        assert!(
            mode != TranslationMode::Translate || self.plain == [false; QUEUES],
            "rings whose addresses are not translated: {:?}",
            self.plain
        );
        assert!(
            possible.contains(&mode),
            "{mode:?} under {:?}, IOTLB message seen: {}",
            self.policy,
            self.iotlb_seen
        );
        assert_eq!(
            mode != TranslationMode::None,
            self.acknowledged() && self.policy != AccessPlatform::Off
        );
    }
}
