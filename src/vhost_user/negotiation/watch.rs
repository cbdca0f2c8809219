//! Where the session's threads write down what happens, and readers take copies.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::access::AccessPlatformState;
use super::board::{self, Board};
use super::detail::{self, IotlbKind, IotlbText};
use super::recorder::{Direction, Outcome, Recorder};
use super::{Negotiation, Peer, Record, SessionEnd, SessionError, SessionState, unix_seconds};
use crate::device::DeviceEvent;
use crate::guest::Miss;
use crate::vhost_user::features::{Features, PROTOCOL_F_REPLY_ACK};
use crate::vhost_user::link::lock;
use crate::vhost_user::message::{self, Message, request};
use crate::vhost_user::{FindingCode, SessionConfig, SessionTerms, Translation, TranslationMode};

/// How long after its first message a VMM may take to start a ring before it is told.
pub(super) const DRIVER_PATIENCE: Duration = Duration::from_secs(60);
/// IOTLB messages that the device works on at once, at most; a session that is sane has one.
const MAX_IN_WORK: usize = 64;

/// All that is written down of a guest's sessions.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) now: Negotiation,
    pub(super) board: Board,
    recorder: Recorder,
    /// IOTLB messages that were taken and are neither carried out nor refused, oldest first.
    in_work: VecDeque<IotlbKind>,
    /// When a driver that has not started counts as late; `None` once that is settled.
    pub(super) driver_due: Option<Instant>,
    /// When the last storm of faults counts as over.
    pub(super) storm_until: Option<Instant>,
    /// Rings whose memory is missing or blank, by index.
    pub(super) without_memory: [bool; super::QUEUES],
    /// Rings whose own addresses are refused, by index.
    pub(super) refused_rings: [bool; super::QUEUES],
}

/// The current state of one guest's session, for readers in other threads.
#[derive(Debug)]
pub struct NegotiationWatch {
    guest: Box<str>,
    inner: Mutex<Inner>,
}

impl NegotiationWatch {
    /// A watch on which nothing has happened yet.
    pub fn new(config: &SessionConfig) -> Arc<NegotiationWatch> {
        Arc::new(NegotiationWatch {
            guest: config.guest.as_str().into(),
            inner: Mutex::new(Inner {
                now: Negotiation::new(config),
                board: Board::default(),
                recorder: Recorder::default(),
                in_work: VecDeque::new(),
                driver_due: None,
                storm_until: None,
                without_memory: Default::default(),
                refused_rings: Default::default(),
            }),
        })
    }

    /// A copy of what is agreed, without the messages.
    pub fn snapshot(&self) -> Negotiation {
        let inner = lock(&self.inner);
        let findings = inner.board.list();
        Negotiation {
            findings,
            ..inner.now.clone()
        }
    }

    /// A copy of everything.
    pub fn record(&self) -> Record {
        let inner = lock(&self.inner);
        let (mut negotiation, findings) = (inner.now.clone(), inner.board.list());
        let messages = inner.recorder.entries();
        drop(inner);
        negotiation.findings = findings;
        Record::new(negotiation, messages)
    }

    /// What keeps a guest whose VMM is connected from ever being served as the configuration demands, in a sentence.
    pub fn unready(&self) -> Option<&'static str> {
        lock(&self.inner).unready()
    }

    /// The guest's CID in the session under way, or in the next one.
    pub fn cid(&self) -> u32 {
        lock(&self.inner).now.cid
    }

    /// Whether a VMM is connected.
    pub fn is_connected(&self) -> bool {
        lock(&self.inner).now.connected
    }

    /// Whether the rings run: features are agreed and a driver has started.
    pub fn is_running(&self) -> bool {
        lock(&self.inner).now.state == SessionState::Running
    }

    /// What the session that begins is told, or would be told if one began.
    pub(in crate::vhost_user) fn set_terms(&self, terms: SessionTerms) {
        self.change(|inner| {
            inner.now.cid = terms.cid;
            inner.now.access_platform.set_policy(terms.access_platform);
        });
    }

    /// Client mode: connected, nothing said yet.
    pub(in crate::vhost_user) fn connected(&self, peer: Option<Peer>) {
        self.change(|inner| {
            inner.now.connected = true;
            inner.now.peer = peer;
            inner.now.state = SessionState::Connected;
        });
    }

    /// The first message has come. Returns the session's number.
    pub(in crate::vhost_user) fn session_started(&self, peer: Option<Peer>) -> u64 {
        self.change(|inner| {
            let value = &mut inner.now;
            value.forget_session();
            value.connected = true;
            value.peer = peer;
            value.state = SessionState::Connected;
            value.sessions_total += 1;
            value.session = value.sessions_total;
            value.since = unix_seconds();
            inner.recorder.begin_session(inner.now.session);
            inner.forget_session();
            inner.board.session_started();
            inner.driver_due = Instant::now().checked_add(DRIVER_PATIENCE);
            inner.now.session
        })
    }

    pub(in crate::vhost_user) fn session_ended(
        &self,
        error: Option<(SessionError, Option<u32>)>,
        end: SessionEnd,
    ) {
        self.change(|inner| {
            if let Some((error, request)) = error {
                let reason = error.label();
                if let Some(counter) = inner.now.session_errors.iter_mut().find(|c| c.reason == reason) {
                    counter.count += 1;
                }
                match request {
                    // One that the gate has refused is counted as failed already.
                    Some(request) if inner.recorder.ended_by(request, &end.detail) => {}
                    Some(request) => inner.now.request_failed(request),
                    None => inner.recorder.ended(&end.detail),
                }
            }
            inner.now.last_end = Some(end);
            inner.board.session_ended(inner.now.session, error.is_some());
            inner.now.forget_session();
            inner.forget_session();
        });
    }

    /// A connection ended without a message.
    pub(in crate::vhost_user) fn silent(&self) {
        self.change(|inner| {
            inner.now.silent_connections += 1;
            inner.now.forget_session();
        });
    }

    pub(in crate::vhost_user) fn rejected(&self) {
        self.change(|inner| inner.now.rejected_connections += 1);
    }

    pub(in crate::vhost_user) fn assume(&self, features: u64, protocol_features: u64) {
        self.change(|inner| {
            let value = &mut inner.now;
            value.assumed = true;
            value.features_offered = Features::virtio(features);
            value.protocol_features_offered = Features::protocol(protocol_features);
            value.protocol_features_acked = Features::protocol(protocol_features);
        });
    }

    /// Whether the gate has negotiated in the VMM's place.
    pub(in crate::vhost_user) fn is_assumed(&self) -> bool {
        lock(&self.inner).now.assumed
    }

    /// A request of the VMM, with `fds` descriptors, that is taken: it is forwarded, or carried out by the session itself.
    pub(in crate::vhost_user) fn request(&self, message: &Message, fds: usize) {
        self.change(|inner| {
            let number = message.request();
            inner.now.count_request(number);
            // The crate answers what it is asked to only once REPLY_ACK is agreed; IOTLB messages are answered by us,
            // and QEMU wants that always.
            let acks = inner.now.protocol_features_acked.bits() & PROTOCOL_F_REPLY_ACK != 0
                || number == request::IOTLB_MSG;
            let answered = message::is_always_answered(number) || (message.needs_reply() && acks);
            let detail = detail::of_request(message, fds);
            inner
                .recorder
                .record(Direction::VmmToDevice, number, detail, answered);
            let before = inner.now.features_acked;
            inner.now.request(message);
            if number == request::IOTLB_MSG {
                inner.iotlb_message(message);
            } else {
                inner.look_at_request(message, before);
            }
        });
    }

    /// A request of the VMM that the gate refuses, for `reason`. `told` if the VMM is answered; otherwise it learns of it by
    /// the end of the session, if at all.
    pub(in crate::vhost_user) fn refused(&self, message: &Message, reason: &str, _told: bool) {
        self.change(|inner| {
            let number = message.request();
            inner.now.count_request(number);
            inner.now.request_failed(number);
            inner
                .recorder
                .record_refused(number, detail::of_request(message, 0), reason);
            inner.look_at_refused(message, reason);
        });
    }

    /// The answer of the session itself to a request that was taken: 0 is yes.
    pub(in crate::vhost_user) fn answered(&self, message: &Message, value: u64) {
        self.change(|inner| {
            let number = message.request();
            let said = (number == request::IOTLB_MSG).then(|| IotlbText::of(message));
            let (outcome, answer) = outcome(value);
            inner
                .recorder
                .settle(Direction::VmmToDevice, number, said, outcome, answer);
            if value != 0 {
                inner.now.request_failed(number);
                if said.is_some() {
                    inner.in_work.pop_front();
                    inner.iotlb_refused(message);
                }
            }
        });
    }

    /// An IOTLB message was carried out by the device.
    pub(in crate::vhost_user) fn iotlb_carried_out(&self) {
        self.change(|inner| {
            let totals = &mut inner.now.access_platform;
            match inner.in_work.pop_front() {
                Some(IotlbKind::Update) => totals.updates += 1,
                Some(IotlbKind::Invalidate) => totals.invalidations += 1,
                _ => {}
            }
            inner.board.pass(FindingCode::IotlbMessageRefused);
        });
    }

    /// A miss was sent to the VMM.
    pub(in crate::vhost_user) fn miss_sent(&self, miss: Miss) {
        self.change(|inner| {
            inner.now.access_platform.misses_sent += 1;
            let detail = IotlbText::miss(miss).into_detail();
            inner
                .recorder
                .record(Direction::BackendChannelOut, request::IOTLB_MSG, detail, true);
        });
    }

    /// The VMM answered a miss.
    pub(in crate::vhost_user) fn miss_answered(&self, miss: Miss, refused: bool) {
        self.change(|inner| {
            inner.now.access_platform.misses_refused += u64::from(refused);
            let (outcome, answer) = outcome(u64::from(refused));
            let said = Some(IotlbText::miss(miss));
            inner.recorder.settle(
                Direction::BackendChannelOut,
                request::IOTLB_MSG,
                said,
                outcome,
                answer,
            );
        });
    }

    /// Whether there is a channel to send misses on.
    pub(in crate::vhost_user) fn backend_channel(&self, open: bool) {
        self.change(|inner| {
            inner.now.access_platform.backend_channel = open;
            inner.look_at_backend_channel();
        });
    }

    /// How addresses are understood from now on.
    pub(in crate::vhost_user) fn translation(&self, translation: Translation) {
        self.change(|inner| {
            inner.now.access_platform.set(translation);
            let translated = translation.mode == TranslationMode::Translate;
            for ring in &mut inner.now.rings {
                ring.translated = ring.started && translated;
            }
            inner.look_at_translation();
        });
    }

    /// Something odd was seen. Told in the log once.
    pub(in crate::vhost_user) fn find(&self, code: FindingCode, seen: String) {
        self.change(|inner| inner.raise(code, seen));
    }

    /// It has passed.
    pub(in crate::vhost_user) fn passed(&self, code: FindingCode) {
        self.change(|inner| inner.board.pass(code));
    }

    /// Something that the device tells.
    pub(in crate::vhost_user) fn device_event(&self, event: &DeviceEvent) {
        self.change(|inner| inner.look_at_device(event, Instant::now()));
    }

    /// Looks for what only time shows; answers when to look again, `None` if not before something has happened.
    pub(in crate::vhost_user) fn look(&self, now: Instant) -> Option<Instant> {
        self.change(|inner| inner.look_at_the_clock(now))
    }

    /// An answer to the VMM that is passed on.
    pub(in crate::vhost_user) fn reply(&self, message: &Message) {
        self.change(|inner| {
            let number = message.request();
            let (outcome, answer) = match message.u64_body() {
                Some(value) if !message::is_always_answered(number) => outcome(value),
                _ => (Outcome::Answered, Some(detail::of_answer(message))),
            };
            inner
                .recorder
                .settle(Direction::VmmToDevice, number, None, outcome, answer);
            inner.now.reply(message);
        });
    }

    pub(in crate::vhost_user) fn ring_started(&self, index: usize, started: bool) {
        self.change(|inner| {
            let value = &mut inner.now;
            let translated = value.access_platform.mode == TranslationMode::Translate;
            if let Some(ring) = value.rings.get_mut(index) {
                ring.started = started;
                ring.translated = started && translated;
            }
            if value.connected {
                value.state = if value.rings.iter().any(|ring| ring.started) {
                    SessionState::Running
                } else {
                    SessionState::Negotiated
                };
            }
            value.driver_is_up |= started;
            inner.look_at_ring(index, started);
        });
    }

    /// Whether the device runs a ring.
    pub(in crate::vhost_user) fn any_ring_started(&self) -> bool {
        lock(&self.inner).any_ring_started()
    }

    /// Changes the record, and tells the log what was found by it once the lock is free.
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = lock(&self.inner);
        let result = change(&mut inner);
        let untold = inner.board.take_untold();
        drop(inner);
        board::tell(&self.guest, untold);
        result
    }
}

impl Inner {
    /// What belongs to one session, apart from what was agreed in it.
    fn forget_session(&mut self) {
        self.in_work.clear();
        self.driver_due = None;
        self.storm_until = None;
        self.without_memory = Default::default();
        self.refused_rings = Default::default();
    }

    pub(super) fn any_ring_started(&self) -> bool {
        self.now.rings.iter().any(|ring| ring.started)
    }

    pub(super) fn access_platform(&self) -> &AccessPlatformState {
        &self.now.access_platform
    }

    fn iotlb_message(&mut self, message: &Message) {
        if self.in_work.len() < MAX_IN_WORK {
            self.in_work.push_back(IotlbText::of(message).kind);
        }
        // It is not silent after all.
        self.board.pass(FindingCode::AccessPlatformWithoutIotlb);
    }
}

fn outcome(value: u64) -> (Outcome, Option<String>) {
    match value {
        0 => (Outcome::Ok, None),
        _ => (Outcome::Nack, Some(value.to_string())),
    }
}
