//! Packets from the device (virtio_transport_recv_pkt and what it calls).

use std::io;

use super::{Ended, Listener, Protocol, State, Tuple};
use crate::embedded_guest::stats::Violation;
use crate::vsock::header::{Header, Op, ShutdownFlags, SocketType};

impl Protocol {
    /// A packet from the device (virtio_transport_recv_pkt).
    pub fn handle(&mut self, header: &Header, payload: &[u8]) {
        if header.dst_cid != self.cid || header.src_cid.0 >> 32 != 0 {
            self.violations.record(Violation::WrongAddress);
        }
        let op = Op::from_wire(header.op);
        match op {
            None => self.violations.record(Violation::InvalidOp),
            Some(Op::Rw) if payload.is_empty() => self.violations.record(Violation::EmptyRw),
            Some(Op::Rw) => {}
            Some(_) if header.len > 0 => self.violations.record(Violation::UnexpectedPayload),
            Some(_) => {}
        }
        if SocketType::from_wire(header.socket_type).is_none() {
            self.violations.record(Violation::UnknownType);
            return self.refuse(header);
        }
        let tuple = Tuple {
            peer_cid: header.src_cid,
            peer_port: header.src_port,
            local_port: header.dst_port,
        };
        match self.table.get(&tuple).copied() {
            Some(id) => {
                self.learn_credit(id, header);
                match self.connections[id].state {
                    State::Connecting => self.handle_connecting(id, op, header),
                    _ => self.handle_established(id, op, header, payload),
                }
                self.connections.get(id).inspect(|c| c.changed.notify_all());
            }
            None if op == Some(Op::Request) => self.handle_request(tuple, header),
            None => self.handle_stray(tuple, op, header),
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
        match op {
            Some(Op::Rw) => self.receive(id, payload),
            Some(Op::CreditRequest) => self.reply_on(id, Op::CreditUpdate, ShutdownFlags::NONE),
            Some(Op::CreditUpdate) | None => {}
            Some(Op::Shutdown) => self.peer_shuts_down(id, ShutdownFlags::from_wire(header.flags)),
            Some(Op::Rst) => {
                let c = &mut self.connections[id];
                c.was_reset = true;
                let ended = match c.close_deadline {
                    Some(_) => Ended::Closed,
                    None => Ended::ByPeer,
                };
                self.finish(id, ended);
            }
            Some(Op::Response) => self.violations.record(Violation::UnexpectedResponse),
            Some(Op::Request) => self.violations.record(Violation::DuplicateRequest),
        }
    }

    fn receive(&mut self, id: usize, payload: &[u8]) {
        let c = &mut self.connections[id];
        if c.peer_shutdown.contains(ShutdownFlags::SEND) {
            self.violations.record(Violation::DataAfterShutdown);
            return;
        }
        if c.unread.len() + payload.len() > c.buf_alloc as usize {
            self.violations.record(Violation::CreditExceeded);
            return;
        }
        if !c.owned || c.our_shutdown.contains(ShutdownFlags::RCV) {
            // Was on its way when the application stopped reading. Nobody reads it, so nothing is said of it: Linux
            // leaves such bytes in the socket's queue, and a CREDIT_UPDATE behind SHUTDOWN would find no connection.
            return;
        }
        c.unread.extend(payload);
    }

    fn peer_shuts_down(&mut self, id: usize, flags: ShutdownFlags) {
        let c = &mut self.connections[id];
        c.peer_shutdown = c.peer_shutdown.with(flags);
        if c.peer_shutdown != ShutdownFlags::BOTH {
            return;
        }
        if c.unread.is_empty() {
            self.reply_on(id, Op::Rst, ShutdownFlags::NONE);
            self.finish(id, Ended::Confirmed);
        }
        // With unread bytes the RST goes out at close(): virtio_transport_close.
    }

    fn handle_request(&mut self, tuple: Tuple, header: &Header) {
        let full = |l: &Listener| l.accepted.len() >= l.backlog;
        if self.listeners.get(&tuple.local_port).is_none_or(full) {
            return self.refuse(header);
        }
        self.ended.remove(&tuple);
        let id = self.insert(tuple, State::Established);
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
            (Some(Op::Rst), Some(Ended::Reset | Ended::GaveUp)) => {
                self.crossed_resets += 1;
                // Once may cross, twice is an answer.
                self.ended.insert(tuple, Ended::ByPeer);
            }
            (Some(Op::Rst), Some(Ended::Closed)) => self.crossed_resets += 1,
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
