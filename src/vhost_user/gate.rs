//! The gate: a pure function of (state, message) to a verdict, always in the path between VMM and crate.
//!
//! It forwards every message as it came, with one exception: the prelude (below). It also remembers enough to say, when
//! the crate behind it ends the connection, which request was at fault and why, since the crate itself tells nobody.
//!
//! **Prelude.** A QEMU that listens and whose back-end was restarted goes on in the middle of the old session: its
//! first message on the new connection is SET_VRING_ENABLE or GET_VRING_BASE (or SET_FEATURES, when the driver had
//! stopped the device meanwhile), and nothing is negotiated again. The crate would refuse that, or not answer
//! NEED_REPLY, on which QEMU waits with its global lock held. So the gate first negotiates in QEMU's place, assuming
//! that all that is offered was acknowledged, and swallows the answers.

use super::Mode;
use super::features::{
    Features, OFFERED_FEATURES, PROTOCOL_F_BACKEND_REQ, PROTOCOL_F_CONFIG, PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    PROTOCOL_F_LOG_SHMFD, PROTOCOL_F_MQ, PROTOCOL_F_RESET_DEVICE, VHOST_F_LOG_ALL, offered_protocol_features,
};
use super::message::{
    Body, MAX_FDS, MemoryRegion, Message, REPLY, VERSION, display_name, request, request_index,
};
use super::negotiation::QUEUES;
use super::vring::MAX_QUEUE_SIZE;

/// The most requests that are remembered as not yet answered; older ones are forgotten.
const MAX_OUTSTANDING: usize = 64;
/// The most memory regions that ring addresses are checked against; a session with more is checked no longer.
const MAX_REGIONS: usize = 512;

/// What to do with a request of the VMM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Pass it on as it is.
    Forward,
    /// Pass these messages of ours on first, then the request as it is.
    ForwardAfter(Vec<Message>),
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

/// The state of one session's gate.
pub struct Gate {
    mode: Mode,
    /// Whether a message has come.
    begun: bool,
    /// Answers of the crate that are still to be swallowed.
    swallow: usize,
    assumed: Option<(u64, u64)>,
    owned: bool,
    protocol_features: u64,
    /// Regions of the memory table; `None` when there are too many to remember.
    regions: Option<Vec<MemoryRegion>>,
    /// Requests the crate has not answered, with what is wrong with them.
    outstanding: std::collections::VecDeque<(u32, Option<String>)>,
    /// A request that was answered with an error; the crate ends the connection after such an answer.
    refused: Option<(u32, Option<String>)>,
}

impl Gate {
    /// The gate of a new session.
    pub fn new(mode: Mode) -> Gate {
        Gate {
            mode,
            begun: false,
            swallow: 0,
            assumed: None,
            owned: false,
            protocol_features: 0,
            regions: Some(Vec::new()),
            outstanding: std::collections::VecDeque::new(),
            refused: None,
        }
    }

    /// Judges a message of the VMM that came with `fds` descriptors.
    pub fn request(&mut self, message: &Message, fds: usize) -> Verdict {
        let first = !std::mem::replace(&mut self.begun, true);
        let prelude = if first && self.mode == Mode::Client && !begins_negotiation(message.request()) {
            let prelude = self.prelude();
            self.swallow = prelude
                .iter()
                .filter(|message| is_always_answered(message.request()))
                .count();
            Some(prelude)
        } else {
            None
        };
        let fault = self.fault(message, fds);
        self.note(message);
        if self.outstanding.len() == MAX_OUTSTANDING {
            self.outstanding.pop_front();
        }
        self.outstanding.push_back((message.request(), fault));
        prelude.map_or(Verdict::Forward, Verdict::ForwardAfter)
    }

    /// Judges a message of the crate.
    pub fn reply(&mut self, message: &Message) -> ReplyVerdict {
        if self.swallow > 0 {
            // The crate answers in order, and the prelude was the first it saw.
            self.swallow -= 1;
            return ReplyVerdict::Swallow;
        }
        // Whatever came before the answered request has been served.
        while let Some((number, fault)) = self.outstanding.pop_front() {
            if number == message.request() {
                if !is_always_answered(number) && message.u64_body().is_some_and(|error| error != 0) {
                    self.refused = Some((number, fault));
                }
                break;
            }
        }
        ReplyVerdict::Forward
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
        let faulty = self.outstanding.iter().find(|(_, fault)| fault.is_some());
        let (request, detail) = faulty.or(self.outstanding.back())?.clone();
        Some(Culprit {
            request,
            detail,
            answered: false,
        })
    }

    fn prelude(&mut self) -> Vec<Message> {
        let u64_message = |number, value: u64| Message::new(number, VERSION, &value.to_ne_bytes());
        let bare = |number| Message::new(number, VERSION, &[]);
        // Not LOG_ALL: a migration that is underway will set it with its log.
        let features = OFFERED_FEATURES & !VHOST_F_LOG_ALL;
        self.protocol_features = offered_protocol_features(self.mode);
        self.assumed = Some((features, self.protocol_features));
        self.owned = true;
        vec![
            bare(request::GET_FEATURES),
            u64_message(request::SET_FEATURES, features),
            bare(request::GET_PROTOCOL_FEATURES),
            u64_message(request::SET_PROTOCOL_FEATURES, self.protocol_features),
            bare(request::SET_OWNER),
        ]
    }

    /// Remembers what later messages are judged by.
    fn note(&mut self, message: &Message) {
        match (message.request(), message.request_body()) {
            (request::SET_OWNER, _) => self.owned = true,
            (request::RESET_OWNER, _) => self.owned = false,
            (request::SET_PROTOCOL_FEATURES, Body::U64(bits)) => self.protocol_features = bits,
            (request::SET_MEM_TABLE, Body::MemoryTable(regions)) => self.regions = Some(regions),
            (request::ADD_MEM_REG, Body::MemoryRegion(region)) => {
                if let Some(regions) = &mut self.regions {
                    regions.push(region);
                    if regions.len() > MAX_REGIONS {
                        self.regions = None;
                    }
                }
            }
            (request::REM_MEM_REG, Body::MemoryRegion(region)) => {
                if let Some(regions) = &mut self.regions {
                    regions.retain(|known| known.guest_address != region.guest_address);
                }
            }
            _ => {}
        }
    }

    /// What the crate will not like about a message, in words; `None` if nothing is known to be wrong. Used only to
    /// explain the end of a session, never to end one.
    fn fault(&self, message: &Message, fds: usize) -> Option<String> {
        let number = message.request();
        if request_index(number) == 0 {
            return Some("no such request is known".into());
        }
        if message.flags() & 3 != VERSION || message.flags() & !0xf != 0 {
            return Some(format!(
                "flags {:#x} are not those of protocol version 1",
                message.flags()
            ));
        }
        if message.flags() & REPLY != 0 {
            return Some("it is marked as an answer".into());
        }
        if let Some(bit) = needed_protocol_feature(number)
            && self.protocol_features & bit == 0
        {
            return Some(format!(
                "it needs the protocol feature {}, not acknowledged",
                Features::protocol(bit)
            ));
        }
        if fds > MAX_FDS {
            return Some(format!("{fds} descriptors came with it"));
        }
        match (number, message.request_body()) {
            (request::SET_OWNER, _) if self.owned => Some("the session has an owner already".into()),
            (request::SET_FEATURES, Body::U64(bits)) if bits & !OFFERED_FEATURES != 0 => Some(format!(
                "features were not offered: {}",
                Features::virtio(bits & !OFFERED_FEATURES)
            )),
            (request::SET_MEM_TABLE, Body::MemoryTable(regions)) if regions.len() != fds => {
                Some(format!("{} regions and {fds} descriptors", regions.len()))
            }
            (_, Body::VringState { index, .. } | Body::VringAddr { index, .. })
                if index as usize >= QUEUES =>
            {
                Some(format!("there is no virtqueue {index}"))
            }
            (_, Body::VringFd { index, .. }) if usize::from(index) >= QUEUES => {
                Some(format!("there is no virtqueue {index}"))
            }
            (_, Body::VringFd { has_fd, .. }) if usize::from(has_fd) != fds => {
                Some(format!("{fds} descriptors came with it"))
            }
            (request::SET_VRING_NUM, Body::VringState { num, .. })
                if num == 0 || num > MAX_QUEUE_SIZE.into() =>
            {
                Some(format!("{num} entries, 1 to {MAX_QUEUE_SIZE} are possible"))
            }
            (request::SET_VRING_ENABLE, Body::VringState { num, .. }) if num > 1 => {
                Some(format!("{num} is neither on nor off"))
            }
            (
                request::SET_VRING_ADDR,
                Body::VringAddr {
                    desc, used, avail, ..
                },
            ) => {
                let regions = self.regions.as_ref()?;
                let outside = [
                    ("descriptor table", desc),
                    ("used ring", used),
                    ("available ring", avail),
                ]
                .into_iter()
                .find(|(_, address)| !regions.iter().any(|region| region.contains_user(*address)));
                outside.map(|(what, address)| format!("the {what} at {address:#x} is in no memory region"))
            }
            (number, Body::Other) if has_fixed_body(number) => Some(format!(
                "a body of {} bytes is not what it has",
                message.body().len()
            )),
            (number, _) if !is_served(number) => Some("it is not served".into()),
            _ => None,
        }
    }
}

/// Requests with which a front-end begins to negotiate; none of them comes later in a session.
fn begins_negotiation(number: u32) -> bool {
    matches!(
        number,
        request::GET_FEATURES | request::GET_PROTOCOL_FEATURES | request::SET_OWNER | request::RESET_OWNER
    )
}

/// Requests whose answer is not a REPLY_ACK.
fn is_always_answered(number: u32) -> bool {
    matches!(
        number,
        request::GET_FEATURES
            | request::GET_PROTOCOL_FEATURES
            | request::GET_QUEUE_NUM
            | request::GET_VRING_BASE
            | request::GET_CONFIG
            | request::SET_LOG_BASE
            | request::GET_MAX_MEM_SLOTS
            | request::GET_INFLIGHT_FD
            | request::SET_DEVICE_STATE_FD
            | request::CHECK_DEVICE_STATE
    )
}

/// Requests that [`Message::request_body`] has a value for whenever they are well-formed.
fn has_fixed_body(number: u32) -> bool {
    matches!(
        number,
        request::SET_FEATURES
            | request::SET_PROTOCOL_FEATURES
            | request::SET_MEM_TABLE
            | request::SET_VRING_NUM
            ..=request::SET_VRING_ERR
                | request::SET_VRING_ENABLE
                | request::GET_CONFIG
                | request::SET_CONFIG
                | request::ADD_MEM_REG
                | request::REM_MEM_REG
    )
}

fn is_served(number: u32) -> bool {
    has_fixed_body(number)
        || begins_negotiation(number)
        || matches!(
            number,
            request::SET_LOG_BASE
                | request::GET_QUEUE_NUM
                | request::SET_BACKEND_REQ_FD
                | request::RESET_DEVICE
                | request::GET_MAX_MEM_SLOTS
                | request::CHECK_DEVICE_STATE
                | request::SET_DEVICE_STATE_FD
        )
}

fn needed_protocol_feature(number: u32) -> Option<u64> {
    Some(match number {
        request::GET_QUEUE_NUM => PROTOCOL_F_MQ,
        request::SET_LOG_BASE => PROTOCOL_F_LOG_SHMFD,
        request::SET_BACKEND_REQ_FD => PROTOCOL_F_BACKEND_REQ,
        request::GET_CONFIG | request::SET_CONFIG => PROTOCOL_F_CONFIG,
        request::RESET_DEVICE => PROTOCOL_F_RESET_DEVICE,
        request::GET_MAX_MEM_SLOTS | request::ADD_MEM_REG | request::REM_MEM_REG => {
            PROTOCOL_F_CONFIGURE_MEM_SLOTS
        }
        _ => return None,
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::message::NEED_REPLY;

    fn u64_request(number: u32, value: u64) -> Message {
        Message::new(number, VERSION, &value.to_ne_bytes())
    }

    fn state(number: u32, index: u32, num: u32) -> Message {
        Message::new(
            number,
            VERSION,
            &[index.to_ne_bytes(), num.to_ne_bytes()].concat(),
        )
    }

    fn ack(number: u32, value: u64) -> Message {
        Message::new(number, VERSION | REPLY, &value.to_ne_bytes())
    }

    #[test]
    fn in_server_mode_everything_is_forwarded_whatever_it_is() {
        let mut gate = Gate::new(Mode::Server);
        for number in (0..60).chain([u32::MAX]) {
            for flags in [0, VERSION, VERSION | NEED_REPLY, VERSION | REPLY, u32::MAX] {
                for len in [0, 1, 8, 40, 4096] {
                    let message = Message::new(number, flags, &vec![0xa5; len]);
                    assert_eq!(gate.request(&message, 1), Verdict::Forward);
                    assert_eq!(gate.reply(&message), ReplyVerdict::Forward);
                }
            }
        }
    }

    #[test]
    fn a_vmm_that_goes_on_in_the_middle_of_a_session_is_negotiated_for() {
        let mut gate = Gate::new(Mode::Client);
        let Verdict::ForwardAfter(prelude) = gate.request(&state(request::SET_VRING_ENABLE, 0, 0), 0) else {
            panic!("no prelude");
        };
        let numbers: Vec<u32> = prelude.iter().map(Message::request).collect();
        use request::*;
        assert_eq!(
            numbers,
            [
                GET_FEATURES,
                SET_FEATURES,
                GET_PROTOCOL_FEATURES,
                SET_PROTOCOL_FEATURES,
                SET_OWNER
            ]
        );
        assert!(prelude.iter().all(|message| !message.needs_reply()));
        assert!(gate.assumed().is_some());
        // The crate's two answers to it are not for the VMM; the third is.
        assert_eq!(gate.request(&state(GET_VRING_BASE, 0, 0), 0), Verdict::Forward);
        assert_eq!(gate.reply(&ack(GET_FEATURES, 1)), ReplyVerdict::Swallow);
        assert_eq!(gate.reply(&ack(GET_PROTOCOL_FEATURES, 1)), ReplyVerdict::Swallow);
        assert_eq!(gate.reply(&ack(GET_VRING_BASE, 0)), ReplyVerdict::Forward);
    }

    #[test]
    fn a_vmm_that_negotiates_itself_gets_no_prelude() {
        for first in [
            request::GET_FEATURES,
            request::SET_OWNER,
            request::GET_PROTOCOL_FEATURES,
        ] {
            let mut gate = Gate::new(Mode::Client);
            assert_eq!(
                gate.request(&Message::new(first, VERSION, &[]), 0),
                Verdict::Forward
            );
            assert_eq!(
                gate.request(&state(request::SET_VRING_ENABLE, 0, 0), 0),
                Verdict::Forward
            );
            assert_eq!(gate.assumed(), None);
        }
    }

    #[test]
    fn of_several_unanswered_requests_the_faulty_one_is_named() {
        let mut gate = Gate::new(Mode::Server);
        gate.request(&u64_request(request::SET_FEATURES, OFFERED_FEATURES | 1 << 33), 0);
        gate.request(&state(request::SET_VRING_NUM, 0, 128), 0);
        let culprit = gate.culprit().unwrap();
        assert_eq!(
            culprit.to_string(),
            "SET_FEATURES: features were not offered: access_platform"
        );
        assert!(!culprit.answered);
    }

    #[test]
    fn a_request_that_was_refused_with_an_answer_is_the_culprit() {
        let mut gate = Gate::new(Mode::Server);
        gate.request(&state(request::SET_VRING_NUM, 7, 128), 0);
        gate.request(&state(request::SET_VRING_BASE, 0, 0), 0);
        gate.reply(&ack(request::SET_VRING_NUM, 1));
        let culprit = gate.culprit().unwrap();
        assert_eq!(culprit.to_string(), "SET_VRING_NUM: there is no virtqueue 7");
        assert!(culprit.answered);
    }

    #[test]
    fn what_came_before_an_answered_request_is_no_suspect() {
        let mut gate = Gate::new(Mode::Server);
        gate.request(&state(request::SET_VRING_ENABLE, 9, 1), 0);
        gate.request(&Message::new(request::GET_FEATURES, VERSION, &[]), 0);
        gate.reply(&ack(request::GET_FEATURES, 5));
        assert_eq!(gate.culprit(), None);
    }

    #[test]
    fn faults_are_told_in_words() {
        let address = |desc: u64| {
            let mut body = vec![0; 8];
            for value in [desc, 0x2000, 0x1000, 0] {
                body.extend_from_slice(&value.to_ne_bytes());
            }
            Message::new(request::SET_VRING_ADDR, VERSION, &body)
        };
        let mut table = vec![1, 0, 0, 0, 0, 0, 0, 0];
        for value in [0u64, 0x10000, 0, 0] {
            table.extend_from_slice(&value.to_ne_bytes());
        }
        let table = Message::new(request::SET_MEM_TABLE, VERSION, &table);
        let rows: [(Message, usize, Option<&str>); 12] = [
            (
                Message::new(4711, VERSION, &[]),
                0,
                Some("request 4711: no such request is known"),
            ),
            (
                Message::new(request::GET_FEATURES, 0, &[]),
                0,
                Some("GET_FEATURES: flags 0x0 are not those of protocol version 1"),
            ),
            (
                Message::new(request::GET_FEATURES, VERSION | REPLY, &[]),
                0,
                Some("GET_FEATURES: it is marked as an answer"),
            ),
            (
                Message::new(request::GET_CONFIG, VERSION, &[0; 20]),
                0,
                Some("GET_CONFIG: it needs the protocol feature config, not acknowledged"),
            ),
            (
                u64_request(request::SET_VRING_KICK, 0),
                0,
                Some("SET_VRING_KICK: 0 descriptors came with it"),
            ),
            (
                u64_request(request::SET_VRING_CALL, 200),
                1,
                Some("SET_VRING_CALL: there is no virtqueue 200"),
            ),
            (
                state(request::SET_VRING_NUM, 0, 2048),
                0,
                Some("SET_VRING_NUM: 2048 entries, 1 to 1024 are possible"),
            ),
            (
                Message::new(request::SET_VRING_NUM, VERSION, &[0; 4]),
                0,
                Some("SET_VRING_NUM: a body of 4 bytes is not what it has"),
            ),
            (
                Message::new(request::IOTLB_MSG, VERSION, &[0; 32]),
                0,
                Some("IOTLB_MSG: it is not served"),
            ),
            (
                table.clone(),
                0,
                Some("SET_MEM_TABLE: 1 regions and 0 descriptors"),
            ),
            (
                address(0x10000),
                0,
                Some("SET_VRING_ADDR: the descriptor table at 0x10000 is in no memory region"),
            ),
            (address(0xf000), 0, None),
        ];
        for (message, fds, expected) in rows {
            let mut gate = Gate::new(Mode::Server);
            gate.request(&table, 1);
            gate.outstanding.clear();
            gate.request(&message, fds);
            let culprit = gate.culprit().unwrap();
            match expected {
                Some(text) => assert_eq!(culprit.to_string(), text),
                None => assert_eq!(culprit.detail, None),
            }
        }
    }
}
