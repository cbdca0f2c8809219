//! Input from the host ends: dials, bytes, ends of file, failures.

use std::time::Instant;

use super::{CLOSE_TIMEOUT, ConnectionId, DRAIN_TIMEOUT, Event, Muxer};
use crate::vsock::connection::{Owed, State};
use crate::vsock::header::ShutdownFlags;
use crate::vsock::reason::{CloseReason, RefuseReason};

impl Muxer {
    /// The target of [`Event::Dial`] was reached. False if the connection is no longer wanted.
    pub fn connected(&mut self, now: Instant, id: ConnectionId) -> bool {
        let Some(connection) = self.connection_mut(id) else {
            return false;
        };
        if connection.state != State::Dialing {
            return false;
        }
        connection.state = State::Established;
        connection.last_activity = now;
        self.owe(id, Owed::RESPONSE);
        self.arm_idle(now, id);
        true
    }

    /// A connection that is not established yet will not be: its target was not reached, or its client left.
    pub fn refused(&mut self, id: ConnectionId, reason: RefuseReason) {
        let Some(connection) = self.connection(id) else {
            return;
        };
        if matches!(connection.state, State::Dialing | State::Requested) {
            self.events.push_back(Event::Refused { id, reason });
            self.bury(id);
        }
    }

    /// The host end has, or may have, bytes to read.
    pub fn host_readable(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connection_mut(id) {
            connection.readable = true;
            self.enqueue_data(id);
        }
    }

    /// The host end has no bytes now; [`Muxer::host_readable`] will tell when it has.
    pub fn host_drained(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connection_mut(id) {
            connection.readable = false;
        }
    }

    /// `n` bytes of the host end went to the guest. `more` tells whether there may be others.
    pub fn host_read(&mut self, now: Instant, id: ConnectionId, n: u32, more: bool) {
        if let Some(connection) = self.connection_mut(id) {
            connection.send.sent(n);
            connection.readable = more;
            connection.last_activity = now;
            self.enqueue_data(id);
        }
    }

    /// The host end took `n` of the bytes that [`Disposition::Payload`](super::Disposition::Payload) gave it.
    pub fn host_wrote(&mut self, now: Instant, id: ConnectionId, n: u32) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.recv.forwarded(n);
        connection.last_activity = now;
        let empty = connection.recv.held() == 0;
        match connection.state {
            State::Draining if empty => self.drained(id),
            State::Draining => self.set_deadline(id, now + DRAIN_TIMEOUT),
            State::Established => {
                if connection.update_owed() {
                    self.owe(id, Owed::CREDIT_UPDATE);
                }
                if empty {
                    self.pass_on_shutdown(now, id);
                }
            }
            _ => {}
        }
    }

    /// The host end has no more bytes for the guest (end of file). It may still take some.
    pub fn host_eof(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.readable = false;
        let told = connection.host_shut.contains(ShutdownFlags::SEND);
        match connection.state {
            // A client that said nothing and is done before the guest answered: told when it has.
            State::Requested => connection.host_shut = connection.host_shut.with(ShutdownFlags::SEND),
            State::Established if !told => {
                connection.host_shut = connection.host_shut.with(ShutdownFlags::SEND);
                self.owe(id, Owed::SHUTDOWN);
                self.finish_if_over(now, id, CloseReason::PeerFin);
            }
            _ => {}
        }
    }

    /// The host end takes no more bytes (EPIPE, ECONNRESET). What it has not taken is lost; it may still have some
    /// for the guest.
    pub fn host_write_failed(&mut self, now: Instant, id: ConnectionId) {
        self.host_takes_no_more(now, id, CloseReason::PeerRst);
    }

    /// The host end reads no more and has said so, before a write to it failed. As [`Muxer::host_write_failed`], but for
    /// the reason: a host end that has taken all there was and has said all it had is finished, not reset.
    pub fn host_reads_no_more(&mut self, now: Instant, id: ConnectionId) {
        let held = self.connection(id).map_or(0, |connection| connection.recv.held());
        let reason = if held == 0 {
            CloseReason::PeerFin
        } else {
            CloseReason::PeerRst
        };
        self.host_takes_no_more(now, id, reason);
    }

    fn host_takes_no_more(&mut self, now: Instant, id: ConnectionId, reason: CloseReason) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        let held = connection.recv.held();
        connection.recv.forwarded(held);
        connection.host_write_failed = true;
        match connection.state {
            State::Draining => {
                connection.close_reason = reason;
                self.drained(id);
            }
            State::Requested => connection.host_shut = connection.host_shut.with(ShutdownFlags::RCV),
            State::Established if !connection.host_shut.contains(ShutdownFlags::RCV) => {
                connection.host_shut = connection.host_shut.with(ShutdownFlags::RCV);
                self.owe(id, Owed::SHUTDOWN);
                self.finish_if_over(now, id, reason);
            }
            _ => {}
        }
    }

    /// The host end failed (ECONNRESET, ETIMEDOUT on reading).
    pub fn host_failed(&mut self, id: ConnectionId, reason: CloseReason) {
        let Some(connection) = self.connection(id) else {
            return;
        };
        match connection.state {
            State::Dialing | State::Requested => self.refused(id, RefuseReason::ClientGone),
            State::Established | State::Draining => {
                self.events.push_back(Event::Closed {
                    id,
                    reason,
                    abort: true,
                });
                self.bury(id);
            }
            State::Closing | State::Dead => {}
        }
    }

    /// The host end took all that a guest sent before it closed both directions.
    pub(super) fn drained(&mut self, id: ConnectionId) {
        let Some(connection) = self.connection(id) else {
            return;
        };
        let reason = connection.close_reason;
        self.events.push_back(Event::Closed {
            id,
            reason,
            abort: reason == CloseReason::PeerRst,
        });
        self.bury(id);
    }

    /// Tells the host end that the guest sends no more, once it has taken everything.
    pub(super) fn pass_on_shutdown(&mut self, now: Instant, id: ConnectionId) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        if connection.state == State::Established
            && connection.guest_shut.contains(ShutdownFlags::SEND)
            && !connection.host_write_closed
            && connection.recv.held() == 0
        {
            connection.host_write_closed = true;
            self.events.push_back(Event::ShutdownHost {
                id,
                flags: ShutdownFlags::SEND,
            });
            self.finish_if_over(now, id, CloseReason::PeerFin);
        }
    }

    /// Nothing can flow any more in either direction: the host end closes, the guest is told so and answers RST.
    pub(super) fn finish_if_over(&mut self, now: Instant, id: ConnectionId, reason: CloseReason) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        let to_guest_over = connection.host_shut.contains(ShutdownFlags::SEND)
            || connection.guest_shut.contains(ShutdownFlags::RCV);
        let to_host_over = connection.host_write_closed || connection.host_write_failed;
        if connection.state == State::Established && to_guest_over && to_host_over {
            connection.host_shut = ShutdownFlags::BOTH;
            connection.state = State::Closing;
            self.events.push_back(Event::Closed {
                id,
                reason,
                abort: false,
            });
            self.owe(id, Owed::SHUTDOWN);
            self.set_deadline(id, now + CLOSE_TIMEOUT);
        }
    }
}
