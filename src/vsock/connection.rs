//! One connection: its states, its credit, what is owed to the guest for it.

use std::time::{Duration, Instant};

use super::credit::{RecvCredit, SendCredit};
use super::header::{Boundary, Cid, Header, Op, Port, ShutdownFlags, SocketType};
use super::misbehavior::Misbehavior;
use super::reason::CloseReason;

/// What identifies a connection of one guest: the guest's own CID is implied.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConnectionKey {
    /// The guest's port.
    pub guest_port: Port,
    /// The other end's CID, as the guest addresses it: 2 for the host.
    pub peer_cid: Cid,
    /// The other end's port.
    pub peer_port: Port,
}

/// Who asked for a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// The guest sent REQUEST.
    Guest,
    /// We sent REQUEST for a client of the host side.
    Host,
}

/// Where a connection stands. See the picture in the documentation of [`crate::vsock`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// The guest asked; the host end is being dialled.
    Dialing,
    /// We asked; the guest has not answered.
    Requested,
    /// Bytes may flow.
    Established,
    /// The guest has closed both directions; the host socket has still to take what it sent.
    Draining,
    /// Both directions are finished and the host end is closed; the guest's RST is awaited.
    Closing,
    /// Over; only an RST is owed.
    Dead,
}

impl State {
    /// The word for snapshots.
    pub fn label(self) -> &'static str {
        match self {
            State::Dialing => "dialing",
            State::Requested => "requested",
            State::Established => "established",
            State::Draining => "draining",
            State::Closing => "closing",
            State::Dead => "dead",
        }
    }
}

/// The kinds of packet that can be owed for a connection: a set, so each is owed at most once.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Owed(u8);

impl Owed {
    /// Asks the guest for a connection.
    pub(super) const REQUEST: Owed = Owed(1);
    /// Accepts the guest's request.
    pub(super) const RESPONSE: Owed = Owed(1 << 1);
    /// Tells the guest of room.
    pub(super) const CREDIT_UPDATE: Owed = Owed(1 << 2);
    /// Asks the guest for room.
    pub(super) const CREDIT_REQUEST: Owed = Owed(1 << 3);
    /// Tells the guest what we will do no more.
    pub(super) const SHUTDOWN: Owed = Owed(1 << 4);
    /// Ends the connection.
    pub(super) const RST: Owed = Owed(1 << 5);

    /// In this order they leave.
    const ORDER: [(Owed, Op); 6] = [
        (Owed::REQUEST, Op::Request),
        (Owed::RESPONSE, Op::Response),
        (Owed::CREDIT_UPDATE, Op::CreditUpdate),
        (Owed::CREDIT_REQUEST, Op::CreditRequest),
        (Owed::SHUTDOWN, Op::Shutdown),
        (Owed::RST, Op::Rst),
    ];

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn contains(self, kind: Owed) -> bool {
        self.0 & kind.0 != 0
    }

    fn pop(&mut self) -> Option<Op> {
        let (kind, op) = Owed::ORDER.into_iter().find(|(kind, _)| self.contains(*kind))?;
        self.0 &= !kind.0;
        Some(op)
    }
}

/// How the request of a connection is repeated for a guest that does not listen yet; in [`State::Requested`] only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Retry {
    /// When the client has waited long enough.
    pub(super) give_up: Instant,
    /// How long to wait after the next RST.
    pub(super) pause: Duration,
    /// When REQUEST is owed again. None: it is owed, or on its way.
    pub(super) due: Option<Instant>,
}

impl Retry {
    /// The first pause: a guest's service that is just about to listen costs its first clients this much.
    pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(50);
    /// The longest: what a guest that never listens costs is two packets each way in a second for each client.
    pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(500);

    pub(super) fn new(give_up: Instant) -> Retry {
        Retry {
            give_up,
            pause: Retry::FIRST_PAUSE,
            due: None,
        }
    }

    /// The guest has refused: when to ask again, or to give up.
    pub(super) fn back_off(&mut self, now: Instant) -> Instant {
        let due = (now + self.pause).min(self.give_up);
        self.due = Some(due);
        self.pause = (self.pause * 2).min(Retry::LONGEST_PAUSE);
        due
    }
}

/// Empty messages that a guest gets before it has to show that it takes any: each is memory of its kernel, whatever the host
/// end sends. Linux tells of its credit whenever an application takes a message, an empty one included
/// (`virtio_transport_seqpacket_do_dequeue` in net/vmw_vsock/virtio_transport_common.c).
const MAX_EMPTY_SENT: u32 = 1024;

/// One connection.
#[derive(Debug)]
pub struct Connection {
    pub(super) key: ConnectionKey,
    pub(super) origin: Origin,
    pub(super) state: State,
    pub(super) socket_type: SocketType,
    pub(super) send: SendCredit,
    pub(super) recv: RecvCredit,
    /// Bytes of the message that the guest has begun and not ended (SEQPACKET).
    pub(super) message: u32,
    /// Empty messages that went to the guest since it last told of its credit; they use none up.
    pub(super) empty_sent: u32,
    /// What the guest will do no more; only grows.
    pub(super) guest_shut: ShutdownFlags,
    /// What the host end will do no more, told to the guest or owed; only grows.
    pub(super) host_shut: ShutdownFlags,
    /// The guest's SEND shutdown was passed on to the host socket.
    pub(super) host_write_closed: bool,
    /// The host socket takes no more; what the guest sends is discarded.
    pub(super) host_write_failed: bool,
    /// The host socket has, or may have, bytes to read.
    pub(super) readable: bool,
    /// Packets owed to the guest.
    pub(super) owed: Owed,
    /// Whether and how REQUEST is repeated when the guest refuses.
    pub(super) retry: Option<Retry>,
    /// REQUEST was put into a ring and not refused: the guest may know of this connection.
    pub(super) introduced: bool,
    /// The guest has reset it: no packet may be sent for it any more.
    pub(super) silent: bool,
    /// Since when there have been bytes and no credit.
    pub(super) stalled_since: Option<Instant>,
    /// In the backlog's list of replies.
    pub(super) in_replies: bool,
    /// In the backlog's list of data.
    pub(super) in_data: bool,
    /// When the state's time is up.
    pub(super) deadline: Option<Instant>,
    /// The wake-up that the timer holds for it; never later than the deadline.
    pub(super) armed: Option<Instant>,
    /// When bytes last moved.
    pub(super) last_activity: Instant,
    /// The reason to report at the end of [`State::Draining`].
    pub(super) close_reason: CloseReason,
}

impl std::fmt::Debug for Owed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set()
            .entries(
                Owed::ORDER
                    .iter()
                    .filter(|(kind, _)| self.contains(*kind))
                    .map(|(_, op)| op),
            )
            .finish()
    }
}

impl Connection {
    pub(super) fn new(
        key: ConnectionKey,
        origin: Origin,
        socket_type: SocketType,
        buf_alloc: u32,
        now: Instant,
        within: Duration,
    ) -> Connection {
        Connection {
            key,
            origin,
            state: if origin == Origin::Guest {
                State::Dialing
            } else {
                State::Requested
            },
            socket_type,
            send: SendCredit::new(),
            recv: RecvCredit::new(buf_alloc),
            message: 0,
            empty_sent: 0,
            guest_shut: ShutdownFlags::NONE,
            host_shut: ShutdownFlags::NONE,
            host_write_closed: false,
            host_write_failed: false,
            readable: false,
            owed: Owed::default(),
            retry: None,
            introduced: origin == Origin::Guest,
            silent: false,
            stalled_since: None,
            in_replies: false,
            in_data: false,
            deadline: Some(now + within),
            armed: None,
            last_activity: now,
            close_reason: CloseReason::GuestShutdown,
        }
    }

    /// The receive buffer that the guest was promised, in bytes; the same for the connection's whole life.
    pub fn buf_alloc(&self) -> u32 {
        self.recv.window()
    }

    /// The guest has forgotten the REQUEST, or never kept it: the next one begins as if there had been none.
    pub(super) fn forget_request(&mut self) {
        self.introduced = false;
        self.owed = Owed::default();
        self.send = SendCredit::new();
    }

    pub(super) fn owe(&mut self, kind: Owed) {
        if self.silent {
            return;
        }
        if kind == Owed::RST {
            // Whatever else was to be said has become pointless.
            self.owed = Owed::RST;
        } else if !self.owed.contains(Owed::RST) {
            self.owed.0 |= kind.0;
        }
    }

    /// The next packet owed, with credit fields filled in.
    pub(super) fn next_reply(&mut self, guest_cid: Cid) -> Option<Header> {
        let op = self.owed.pop()?;
        if op == Op::Request {
            self.introduced = true;
        }
        let flags = if op == Op::Shutdown {
            self.host_shut.bits()
        } else {
            0
        };
        Some(self.header(guest_cid, op, 0, flags))
    }

    /// A header of this connection towards the guest. Every packet of a flow carries valid credit fields, so every
    /// header announces them and settles an owed CREDIT_UPDATE.
    pub(super) fn header(&mut self, guest_cid: Cid, op: Op, len: u32, flags: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.recv.announce();
        self.owed.0 &= !Owed::CREDIT_UPDATE.0;
        Header {
            src_cid: self.key.peer_cid,
            dst_cid: guest_cid,
            src_port: self.key.peer_port,
            dst_port: self.key.guest_port,
            len,
            socket_type: self.socket_type as u16,
            op: op as u16,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// Takes note of `len` more bytes of the guest's message (of a stream: of no message), which may end with them.
    pub(super) fn message_grows(&mut self, len: u32, boundary: Boundary) -> Result<(), Misbehavior> {
        if self.socket_type == SocketType::Stream {
            return Ok(());
        }
        self.message = match boundary.is_end() {
            true => 0,
            // No overflow: it is no more than what is held.
            false => self.message.saturating_add(len),
        };
        // What is before it in the buffer makes room when the host end takes it; itself it never will.
        match self.message < self.recv.window() {
            true => Ok(()),
            false => Err(Misbehavior::MessageTooLong),
        }
    }

    /// Whether the guest should be told of new room although nothing else is to be said.
    ///
    /// Where there are messages, as soon as all but the unfinished one were taken: nothing else would ever trigger an update,
    /// and the guest may need all of the window, be it for the rest of that message or, if it waits for room for a whole one,
    /// for the next.
    pub(super) fn update_owed(&self) -> bool {
        let drained = self.socket_type == SocketType::Seqpacket && self.recv.held() == self.message;
        self.recv.update_owed() || (drained && self.recv.news() > 0)
    }

    /// Whether bytes of the host socket may go to the guest, credit aside.
    pub(super) fn may_send(&self) -> bool {
        self.state == State::Established
            && self.readable
            && self.empty_sent < MAX_EMPTY_SENT
            && !self.host_shut.contains(ShutdownFlags::SEND)
            && !self.guest_shut.contains(ShutdownFlags::RCV)
    }

    /// Whether the guest has no answer yet to its REQUEST. Another one is the same then: Linux's connect() gives up
    /// after 2 s without a word, and the application may try again with the same socket while we still dial.
    pub(super) fn awaits_answer(&self) -> bool {
        self.state == State::Dialing || self.owed.contains(Owed::RESPONSE)
    }

    /// What identifies it.
    pub fn key(&self) -> ConnectionKey {
        self.key
    }

    /// Stream or SEQPACKET.
    pub fn socket_type(&self) -> SocketType {
        self.socket_type
    }

    /// The longest message that the guest can take, in bytes: one that is longer would never have the credit it needs.
    pub fn longest_message(&self) -> u32 {
        self.send.window()
    }

    /// Who asked for it.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Payload bytes that may be sent to the guest now.
    pub fn room(&self) -> u32 {
        self.send.room()
    }

    /// What the guest has said it will do no more.
    pub fn guest_shut(&self) -> ShutdownFlags {
        self.guest_shut
    }

    /// Payload bytes of the guest that the host socket has not taken yet.
    pub fn held(&self) -> u32 {
        self.recv.held()
    }
}
