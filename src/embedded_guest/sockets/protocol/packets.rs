//! Packets from the device (virtio_transport_recv_pkt and what it calls).

use std::io;

use super::{Ended, Listener, Protocol, SEQ_EOM, SEQ_EOR, State, Tuple};
use crate::embedded_guest::stats::Violation;
use crate::vsock::header::{Header, Op, ShutdownFlags, SocketType};

impl Protocol {
    /// A packet from the device (virtio_transport_recv_pkt).
    pub fn handle(&mut self, header: &Header, payload: &[u8]) {
        if header.dst_cid != self.cid || header.src_cid.0 >> 32 != 0 {
            self.violations.record(Violation::WrongAddress);
        }
        let op = Op::from_wire(header.op);
        if op.is_none() {
            self.violations.record(Violation::InvalidOp);
        }
        let Some(socket_type) = SocketType::from_wire(header.socket_type) else {
            self.violations.record(Violation::UnknownType);
            return self.refuse(header);
        };
        self.judge(socket_type, op, header, payload);
        let tuple = Tuple {
            peer_cid: header.src_cid,
            peer_port: header.src_port,
            local_port: header.dst_port,
        };
        match self.table.get(&tuple).copied() {
            Some(id) if self.connections[id].socket_type != socket_type => {
                self.violations.record(Violation::WrongType);
                self.refuse(header);
            }
            Some(id) => {
                self.learn_credit(id, header);
                match self.connections[id].state {
                    State::Connecting => self.handle_connecting(id, op, header),
                    _ => self.handle_established(id, op, header, payload),
                }
                self.connections.get(id).inspect(|c| c.changed.notify_all());
            }
            None if op == Some(Op::Request) => self.handle_request(tuple, socket_type, header),
            None => self.handle_stray(tuple, op, header),
        }
    }

    /// Counts what the standard forbids, whatever the packet meets.
    fn judge(&mut self, socket_type: SocketType, op: Option<Op>, header: &Header, payload: &[u8]) {
        let messages = socket_type == SocketType::Seqpacket;
        let known_flags = match op {
            Some(Op::Rw) if messages => SEQ_EOM | SEQ_EOR,
            Some(Op::Shutdown) => ShutdownFlags::BOTH.bits(),
            Some(_) => 0,
            None => u32::MAX,
        };
        if header.flags & !known_flags != 0 {
            self.violations.record(Violation::UnknownFlags);
        }
        match op {
            Some(Op::Rw) => {
                let ends = messages && header.flags & SEQ_EOM != 0;
                if payload.is_empty() && !ends {
                    self.violations.record(Violation::EmptyRw);
                }
                if messages && !ends && header.flags & SEQ_EOR != 0 {
                    self.violations.record(Violation::RecordEndInMessage);
                }
            }
            Some(_) if header.len > 0 => self.violations.record(Violation::UnexpectedPayload),
            _ => {}
        }
        // RST answers a guest that spoke of a type without having negotiated it.
        if !self.carries(socket_type) && op != Some(Op::Rst) {
            self.violations.record(Violation::TypeNotNegotiated);
        }
    }

    fn learn_credit(&mut self, id: usize, header: &Header) {
        let c = &mut self.connections[id];
        c.peer_buf_alloc = header.buf_alloc;
        c.peer_fwd_cnt = header.fwd_cnt;
        if (c.tx_cnt.wrapping_sub(header.fwd_cnt) as i32) < 0 {
            self.violations.record(Violation::ForwardCountAhead);
        }
    }

    fn handle_connecting(&mut self, id: usize, op: Option<Op>, header: &Header) {
        match op {
            Some(Op::Response) => self.connections[id].state = State::Established,
            Some(Op::Rst) => {
                self.connections[id].error = Some(io::ErrorKind::ConnectionReset);
                self.finish(id, Ended::ByPeer);
            }
            None => {}
            Some(_) => {
                // EPROTO to the application.
                self.connections[id].error = Some(io::ErrorKind::InvalidData);
                self.violations.record(Violation::UnexpectedResponse);
                self.refuse(header);
                self.finish(id, Ended::Reset);
            }
        }
    }

    fn handle_established(&mut self, id: usize, op: Option<Op>, header: &Header, payload: &[u8]) {
        self.connections[id].confirmed |= op != Some(Op::Rst);
        match op {
            Some(Op::Rw) => self.receive(id, payload, header.flags),
            Some(Op::CreditRequest) => self.reply_on(id, Op::CreditUpdate, ShutdownFlags::NONE),
            Some(Op::CreditUpdate) | None => {}
            Some(Op::Shutdown) => self.peer_shuts_down(id, ShutdownFlags::from_wire(header.flags)),
            Some(Op::Rst) => {
                let c = &mut self.connections[id];
                c.was_reset = true;
                let ended = match c.close_deadline {
                    Some(_) => Ended::Closed,
                    None if c.confirmed => Ended::ByPeer,
                    None => Ended::Withdrawn,
                };
                self.finish(id, ended);
            }
            Some(Op::Response) => self.violations.record(Violation::UnexpectedResponse),
            Some(Op::Request) => self.violations.record(Violation::DuplicateRequest),
        }
    }

    fn receive(&mut self, id: usize, payload: &[u8], flags: u32) {
        let c = &mut self.connections[id];
        if c.peer_shutdown.contains(ShutdownFlags::SEND) {
            self.violations.record(Violation::DataAfterShutdown);
            return;
        }
        if c.unread.used() + payload.len() > c.buf_alloc as usize {
            self.violations.record(Violation::CreditExceeded);
            return;
        }
        if !c.owned || c.our_shutdown.contains(ShutdownFlags::RCV) {
            // Was on its way when the application stopped reading. Nobody reads it, so nothing is said of it: Linux
            // leaves such bytes in the socket's queue, and a CREDIT_UPDATE behind SHUTDOWN would find no connection.
            return;
        }
        c.unread.push(payload, flags);
    }

    fn peer_shuts_down(&mut self, id: usize, flags: ShutdownFlags) {
        let c = &mut self.connections[id];
        if flags.contains(ShutdownFlags::SEND) && c.unread.is_in_message() {
            self.violations.record(Violation::UnfinishedMessage);
        }
        c.peer_shutdown = c.peer_shutdown.with(flags);
        if c.peer_shutdown != ShutdownFlags::BOTH {
            return;
        }
        if c.unread.used() == 0 {
            let ended = match c.our_shutdown {
                ShutdownFlags::BOTH => Ended::ConfirmedByBoth,
                _ => Ended::Confirmed,
            };
            self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
            self.finish(id, ended);
        }
        // With unread bytes the RST goes out at close(): virtio_transport_close.
    }

    fn handle_request(&mut self, tuple: Tuple, socket_type: SocketType, header: &Header) {
        let no = |l: &Listener| l.socket_type != socket_type || l.accepted.len() >= l.backlog;
        if !self.carries(socket_type) || self.listeners.get(&tuple.local_port).is_none_or(no) {
            return self.refuse(header);
        }
        self.ended.remove(&tuple);
        let id = self.insert(tuple, socket_type, State::Established);
        self.learn_credit(id, header);
        self.reply_on(id, Op::Response, ShutdownFlags::NONE);
        if let Some(listener) = self.listeners.get_mut(&tuple.local_port) {
            listener.accepted.push_back(id);
            listener.changed.notify_all();
        }
    }

    /// A packet for no connection: answered with RST, unless it is one.
    fn handle_stray(&mut self, tuple: Tuple, op: Option<Op>, header: &Header) {
        let ended = self.ended.get(&tuple).copied();
        match (op, ended) {
            (Some(Op::Rst), Some(Ended::Reset | Ended::Withdrawn | Ended::GaveUp)) => {
                self.crossed_resets += 1;
                // Once may cross, twice is an answer.
                self.ended.insert(tuple, Ended::ByPeer);
            }
            (Some(Op::Rst), Some(Ended::Closed)) => self.crossed_resets += 1,
            (Some(Op::Rst), Some(Ended::ConfirmedByBoth)) => drop(self.ended.insert(tuple, Ended::ByPeer)),
            (Some(Op::Rst), _) => self.violations.record(Violation::UnexpectedRst),
            (Some(Op::Response), None) => self.violations.record(Violation::UnexpectedResponse),
            (_, Some(Ended::Reset | Ended::GaveUp)) => {}
            (_, _) => self.violations.record(Violation::NoConnection),
        }
        self.refuse(header);
        if ended == Some(Ended::GaveUp) && op != Some(Op::Rst) {
            self.ended.insert(tuple, Ended::Reset);
        }
    }

    /// virtio_transport_reset_no_sock: RST with the addresses turned around, never in answer to RST.
    fn refuse(&mut self, header: &Header) {
        if header.op == Op::Rst as u16 {
            return;
        }
        let known = SocketType::from_wire(header.socket_type).is_some();
        self.replies.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            len: 0,
            socket_type: if known {
                header.socket_type
            } else {
                SocketType::Stream as u16
            },
            op: Op::Rst as u16,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }
}
