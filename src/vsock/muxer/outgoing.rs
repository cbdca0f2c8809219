//! Output to the guest: what is owed, whose turn it is.

use std::time::Instant;

use super::{ConnectionId, Event, Muxer, Outgoing};
use crate::vsock::connection::{Owed, State};
use crate::vsock::header::{Boundary, Header, Op};
use crate::vsock::reason::RefuseReason;

impl Muxer {
    /// The next packet for the guest. The caller has a buffer for it.
    pub fn poll_outgoing(&mut self, now: Instant) -> Option<Outgoing> {
        if let Some(header) = self.backlog.pop_stray() {
            return Some(Outgoing::Control(header));
        }
        while let Some(id) = self.backlog.pop_reply() {
            let guest_cid = self.config.guest_cid;
            let Some(connection) = self.connection_mut(id) else {
                continue;
            };
            connection.in_replies = false;
            let asks = connection.owed.contains(Owed::REQUEST);
            let socket_type = connection.socket_type;
            if asks && !self.knows(socket_type) {
                // It was asked for before there was this driver.
                self.refused(id, RefuseReason::UnsupportedType);
                continue;
            }
            let Some(connection) = self.connection_mut(id) else {
                continue;
            };
            let Some(header) = connection.next_reply(guest_cid) else {
                continue;
            };
            if !connection.owed.is_empty() {
                connection.in_replies = true;
                self.backlog.push_reply(id);
            } else if connection.state == State::Dead {
                self.remove(id);
            }
            return Some(Outgoing::Control(header));
        }
        while let Some(id) = self.backlog.pop_data() {
            let Some(connection) = self.connection_mut(id) else {
                continue;
            };
            connection.in_data = false;
            if !connection.may_send() {
                continue;
            }
            match connection.send.room() {
                0 => self.stall(now, id),
                limit => return Some(Outgoing::Data { id, limit }),
            }
            // The stall owes a CREDIT_REQUEST, which goes before other connections' data.
            if let Some(Outgoing::Control(header)) = self.poll_reply_of(id) {
                return Some(Outgoing::Control(header));
            }
        }
        None
    }

    /// Whether [`Muxer::poll_outgoing`] may have something.
    pub fn has_outgoing(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The header of an RW packet with `len` payload bytes, behind which a message ends or not ([`Boundary::None`] for streams).
    pub fn data_header(&mut self, id: ConnectionId, len: u32, boundary: Boundary) -> Option<Header> {
        let guest_cid = self.config.guest_cid;
        self.connection_mut(id)
            .map(|connection| connection.header(guest_cid, Op::Rw, len, boundary.bits()))
    }

    pub(super) fn resume_after_credit(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        if connection.state != State::Established || connection.send.room() == 0 {
            return;
        }
        if let Some(since) = connection.stalled_since.take() {
            let waited = now.saturating_duration_since(since);
            self.events.push_back(Event::CreditResumed { id, waited });
        }
        self.enqueue_data(id);
    }

    pub(super) fn stall(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        if connection.stalled_since.is_none() {
            connection.stalled_since = Some(now);
            self.events.push_back(Event::CreditStalled { id });
            self.owe(id, Owed::CREDIT_REQUEST);
        }
    }

    /// The packet just owed for `id`, ahead of its turn.
    pub(super) fn poll_reply_of(&mut self, id: ConnectionId) -> Option<Outgoing> {
        let guest_cid = self.config.guest_cid;
        // Its place in the list of replies stays; an entry with nothing owed is skipped there.
        self.connection_mut(id)?
            .next_reply(guest_cid)
            .map(Outgoing::Control)
    }

    pub(super) fn owe(&mut self, id: ConnectionId, kind: Owed) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.owe(kind);
        if !connection.owed.is_empty() && !connection.in_replies {
            connection.in_replies = true;
            self.backlog.push_reply(id);
        }
    }

    pub(super) fn enqueue_data(&mut self, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        if connection.may_send() && !connection.in_data && connection.stalled_since.is_none() {
            connection.in_data = true;
            self.backlog.push_data(id);
        }
    }
}
