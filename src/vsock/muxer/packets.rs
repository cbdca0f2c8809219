//! Input from the guest: its packets.

use std::time::Instant;

use super::{ConnectionId, DRAIN_TIMEOUT, Disposition, Event, Muxer};
use crate::vsock::connection::{ConnectionKey, Origin, Owed, State};
use crate::vsock::header::{Boundary, Header, Op, ShutdownFlags, SocketType};
use crate::vsock::misbehavior::Misbehavior;
use crate::vsock::reason::{CloseReason, RefuseReason};

impl Muxer {
    /// Whether another packet of the guest may be taken. Not while the resets that it has coming wait for buffers it
    /// does not post: then its packets wait in its own ring (invariant 6).
    pub fn accepts_input(&self) -> bool {
        self.backlog.has_room_for_stray()
    }

    /// Takes a packet of the guest. `available` is how many payload bytes follow the header in its chain.
    pub fn handle_packet(&mut self, now: Instant, header: &Header, available: u32) -> Disposition {
        let key = ConnectionKey {
            guest_port: header.src_port,
            peer_cid: header.dst_cid,
            peer_port: header.dst_port,
        };
        if header.src_cid != self.config.guest_cid {
            self.misbehaved(Misbehavior::WrongSourceCid, key);
            return Disposition::Consumed;
        }
        let op = Op::from_wire(header.op);
        if header.len != 0 && op != Some(Op::Rw) && op.is_some() {
            self.misbehaved(Misbehavior::UnexpectedPayload, key);
        }
        let known = self.keys.get(&key).copied();
        // A finished flow whose RST still waits for a buffer: the guest may use its ports again, and the old RST
        // would kill the new connection.
        let known = match known {
            Some(id) if op == Some(Op::Request) && self.state(id) == Some(State::Dead) => {
                self.remove(id);
                None
            }
            known => known,
        };
        match known {
            Some(id) => self.handle_known(now, id, key, op, header, available),
            None => {
                self.handle_unknown(now, key, op, header);
                Disposition::Consumed
            }
        }
    }

    pub(super) fn handle_unknown(
        &mut self,
        now: Instant,
        key: ConnectionKey,
        op: Option<Op>,
        header: &Header,
    ) {
        // Never an RST for an RST, whatever else is wrong with it.
        if op == Some(Op::Rst) {
            return;
        }
        let fault = match (SocketType::from_wire(header.socket_type), op) {
            (None, _) => Some(Misbehavior::UnknownType),
            (_, None) => Some(Misbehavior::UnknownOp),
            (Some(socket_type), Some(Op::Request)) if !self.knows(socket_type) => {
                Some(Misbehavior::UnsupportedType)
            }
            _ => None,
        };
        if let Some(kind) = fault {
            self.misbehaved(kind, key);
        } else if op == Some(Op::Request) {
            if self.entries.len() < self.config.max_connections {
                self.backlog.forget_strays_of(&key);
                // Judged above.
                let socket_type = SocketType::from_wire(header.socket_type).unwrap_or(SocketType::Stream);
                let id = self.insert(now, key, Origin::Guest, socket_type, self.config.connect_timeout);
                if let Some(connection) = self.connection_mut(id) {
                    // A fresh flow has sent nothing; a claim to the contrary is judged with the next packet.
                    let _ = connection.send.update(header.buf_alloc, header.fwd_cnt);
                }
                self.events.push_back(Event::Dial { id, key, socket_type });
                return;
            }
            self.events.push_back(Event::LimitReached { key });
        }
        self.backlog.push_stray(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            len: 0,
            socket_type: header.socket_type,
            op: Op::Rst as u16,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    pub(super) fn handle_known(
        &mut self,
        now: Instant,
        id: ConnectionId,
        key: ConnectionKey,
        op: Option<Op>,
        header: &Header,
        available: u32,
    ) -> Disposition {
        let Some(connection) = self.connection_mut(id) else {
            return Disposition::Consumed;
        };
        if op == Some(Op::Rst) {
            self.handle_rst(now, id);
            return Disposition::Consumed;
        }
        if connection.state == State::Dead {
            // It crossed the RST that we owe.
            return Disposition::Consumed;
        }
        let fault = match (SocketType::from_wire(header.socket_type), op) {
            (None, _) => Some(Misbehavior::UnknownType),
            (_, None) => Some(Misbehavior::UnknownOp),
            (Some(socket_type), _) if socket_type != connection.socket_type => {
                Some(Misbehavior::UnsupportedType)
            }
            (_, Some(Op::Request)) if !connection.awaits_answer() => Some(Misbehavior::DuplicateRequest),
            (_, Some(Op::Response)) if connection.state != State::Requested || !connection.introduced => {
                Some(Misbehavior::UnexpectedResponse)
            }
            _ => connection
                .send
                .update(header.buf_alloc, header.fwd_cnt)
                .err()
                .map(|_| Misbehavior::FwdCntBeyondSent),
        };
        if let Some(kind) = fault {
            self.offend(id, key, kind);
            return Disposition::Consumed;
        }
        // Before the operation, which may end the connection: nothing is told of it after its end.
        if op == Some(Op::CreditUpdate)
            && let Some(connection) = self.connection_mut(id)
        {
            connection.empty_sent = 0;
        }
        self.resume_after_credit(now, id);
        let verdict = match op {
            Some(Op::Rw) => return self.handle_rw(now, id, key, header, available),
            Some(Op::Shutdown) => self.handle_shutdown(now, id, ShutdownFlags::from_wire(header.flags)),
            Some(Op::Response) => {
                self.accepted(now, id, key);
                Ok(())
            }
            Some(Op::CreditRequest) if self.state(id) == Some(State::Established) => {
                self.owe(id, Owed::CREDIT_UPDATE);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(kind) = verdict {
            self.offend(id, key, kind);
        }
        Disposition::Consumed
    }

    /// The guest accepted what [`Muxer::connect`] asked for.
    pub(super) fn accepted(&mut self, now: Instant, id: ConnectionId, key: ConnectionKey) {
        let Some(connection) = self.connection_mut(id) else {
            return;
        };
        connection.state = State::Established;
        connection.last_activity = now;
        let host_shut = connection.host_shut;
        self.events.push_back(Event::Accepted { id, key });
        self.arm_idle(now, id);
        if host_shut != ShutdownFlags::NONE {
            self.owe(id, Owed::SHUTDOWN);
            self.finish_if_over(now, id, CloseReason::PeerRst);
        }
    }

    pub(super) fn handle_rw(
        &mut self,
        now: Instant,
        id: ConnectionId,
        key: ConnectionKey,
        header: &Header,
        available: u32,
    ) -> Disposition {
        let Some(connection) = self.connection_mut(id) else {
            return Disposition::Consumed;
        };
        let len = header.len;
        let boundary = match connection.socket_type {
            SocketType::Stream => Boundary::None,
            SocketType::Seqpacket => Boundary::from_wire(header.flags),
        };
        let fault = match connection.state {
            State::Dialing | State::Requested => Some(Misbehavior::NotEstablished),
            _ if connection.guest_shut.contains(ShutdownFlags::SEND) => Some(Misbehavior::DataAfterShutdown),
            _ if len > available => Some(Misbehavior::PayloadShort),
            _ => match connection.recv.receive(len) {
                Err(_) => Some(Misbehavior::CreditExceeded),
                Ok(()) => connection.message_grows(len, boundary).err(),
            },
        };
        if let Some(kind) = fault {
            self.offend(id, key, kind);
            return Disposition::Consumed;
        }
        connection.last_activity = now;
        let discard = connection.host_write_failed;
        if discard {
            connection.recv.forwarded(len);
        }
        let update_owed = discard && connection.update_owed();
        if update_owed {
            self.owe(id, Owed::CREDIT_UPDATE);
        }
        if discard || (len == 0 && !boundary.is_end()) {
            Disposition::Consumed
        } else {
            Disposition::Payload { id, len, boundary }
        }
    }

    pub(super) fn handle_shutdown(
        &mut self,
        now: Instant,
        id: ConnectionId,
        flags: ShutdownFlags,
    ) -> Result<(), Misbehavior> {
        let Some(connection) = self.connection_mut(id) else {
            return Ok(());
        };
        match connection.state {
            // The guest no longer wants what it asked for.
            State::Dialing if flags == ShutdownFlags::BOTH => {
                self.refused(id, RefuseReason::ClientGone);
                return Ok(());
            }
            State::Dialing | State::Requested => return Err(Misbehavior::NotEstablished),
            _ => {}
        }
        // What a host end that is gone would not have taken, nobody misses: the guest may have been told so in the midst of it.
        if flags.contains(ShutdownFlags::SEND) && connection.message > 0 && !connection.host_write_failed {
            return Err(Misbehavior::MessageCut);
        }
        let before = connection.guest_shut;
        connection.guest_shut = before.with(flags);
        let both = connection.guest_shut == ShutdownFlags::BOTH;
        match connection.state {
            State::Closing if both => self.bury(id),
            State::Established if both => {
                connection.state = State::Draining;
                if connection.host_shut.contains(ShutdownFlags::SEND) {
                    connection.close_reason = CloseReason::PeerFin;
                }
                if connection.recv.held() == 0 {
                    self.drained(id);
                } else {
                    self.set_deadline(id, now + DRAIN_TIMEOUT);
                    // A host end that waits for room before it takes any more would wait for ever.
                    if !before.contains(ShutdownFlags::RCV) {
                        self.events.push_back(Event::ShutdownHost {
                            id,
                            flags: ShutdownFlags::RCV,
                        });
                    }
                }
            }
            State::Established => {
                if connection.guest_shut.contains(ShutdownFlags::RCV) && !before.contains(ShutdownFlags::RCV)
                {
                    self.events.push_back(Event::ShutdownHost {
                        id,
                        flags: ShutdownFlags::RCV,
                    });
                }
                self.pass_on_shutdown(now, id);
                // A host end that takes nothing, and now a guest that takes nothing.
                self.finish_if_over(now, id, CloseReason::PeerRst);
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn handle_rst(&mut self, now: Instant, id: ConnectionId) {
        match self.state(id) {
            Some(State::Requested) if self.backed_off(now, id) => {}
            Some(State::Dialing) => {
                self.events.push_back(Event::Refused {
                    id,
                    reason: RefuseReason::ClientGone,
                });
                self.remove(id);
            }
            Some(State::Requested) => {
                self.events.push_back(Event::Refused {
                    id,
                    reason: RefuseReason::GuestRst,
                });
                self.remove(id);
            }
            Some(State::Established) => {
                self.events.push_back(Event::Closed {
                    id,
                    reason: CloseReason::GuestRst,
                    abort: true,
                });
                self.remove(id);
            }
            // It closed in order and did not wait for our RST (Linux does so after 8 s): its bytes still count.
            Some(State::Draining) => self.silence(id),
            Some(State::Closing | State::Dead) => self.remove(id),
            None => {}
        }
    }

    /// Whether the guest refused a client that waits for it, and so will be asked again.
    fn backed_off(&mut self, now: Instant, id: ConnectionId) -> bool {
        let Some(connection) = self.connection_mut(id) else {
            return false;
        };
        let introduced = connection.introduced;
        let Some(retry) = &mut connection.retry else {
            return false;
        };
        // An RST that answers nothing changes nothing: a guest that sends many is asked as seldom as any other.
        if introduced {
            let due = retry.back_off(now);
            connection.forget_request();
            self.set_deadline(id, due);
        }
        true
    }

    /// The guest broke the protocol on a connection, in a way that only the caller sees: the connection ends.
    pub fn misbehaves(&mut self, id: ConnectionId, kind: Misbehavior) {
        if let Some(key) = self.connection(id).map(|connection| connection.key) {
            self.offend(id, key, kind);
        }
    }

    /// The guest broke the protocol on a connection, which ends.
    pub(super) fn offend(&mut self, id: ConnectionId, key: ConnectionKey, kind: Misbehavior) {
        self.misbehaved(kind, key);
        if let Some(connection) = self.connection_mut(id) {
            // It spoke on this flow: it hears of the end even if our REQUEST has not left.
            connection.introduced = true;
        }
        match self.state(id) {
            Some(State::Dialing | State::Requested) => {
                self.events.push_back(Event::Refused {
                    id,
                    reason: RefuseReason::Misbehavior,
                });
            }
            Some(State::Established | State::Draining) => {
                self.events.push_back(Event::Closed {
                    id,
                    reason: CloseReason::Misbehavior,
                    abort: true,
                });
            }
            Some(State::Closing | State::Dead) | None => {}
        }
        self.bury(id);
    }

    pub(super) fn misbehaved(&mut self, kind: Misbehavior, key: ConnectionKey) {
        self.events.push_back(Event::Misbehaved { kind, key });
    }
}
