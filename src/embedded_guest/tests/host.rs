//! A small host with a few services, to talk to the guest's sockets: its own credit arithmetic, its own idea of
//! shutdown and of messages. What the guest does wrong goes to `faults`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use super::device::{Host, from_host};
use crate::vsock::header::{Header, Op};

/// Sends back what it gets; of SEQPACKET connections every message, when it has all of it.
pub const ECHO: u32 = 7;
/// Takes everything.
pub const SINK: u32 = 9;
/// Takes nothing: its buffer fills.
pub const STALLED: u32 = 10;
/// Refuses.
pub const REFUSED: u32 = 11;
/// Says nothing.
pub const MUTE: u32 = 12;
/// Sends [`SOURCE_BYTES`] and shuts down sending.
pub const SOURCE: u32 = 19;
/// Accepts and resets at the first byte.
pub const RESETTER: u32 = 20;

/// What [`SOURCE`] sends.
pub const SOURCE_BYTES: usize = 3_000_000;

/// What the host has seen.
#[derive(Default, Debug)]
pub struct Seen {
    /// Rules that the guest broke.
    pub faults: Vec<String>,
    /// Bytes received, by service port.
    pub received: HashMap<u32, usize>,
    /// Connections that are not ended.
    pub open: usize,
    /// RSTs from the guest.
    pub resets: usize,
    /// Messages of SEQPACKET connections: length, packets, flags of the last.
    pub messages: Vec<(usize, usize, u32)>,
}

struct Connection {
    socket_type: u16,
    /// Of a SEQPACKET connection: the message that has begun, and in how many packets it came so far.
    message: Vec<u8>,
    packets: usize,
    /// Messages to send with the flags of their last packets, each as far as it is not sent yet.
    messages: VecDeque<(VecDeque<u8>, u32)>,
    /// Bytes received; those beyond `fwd_cnt` fill the buffer.
    received: u32,
    fwd_cnt: u32,
    told: u32,
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    to_send: VecDeque<u8>,
    /// Sends no more once `to_send` is empty.
    finishing: bool,
    shut_down: bool,
    guest_shutdown: u32,
}

/// The host. Small buffers, so that credit matters.
pub struct Services {
    buf_alloc: u32,
    connections: HashMap<(u32, u32), Connection>,
    seen: Arc<Mutex<Seen>>,
}

impl Services {
    pub fn new(buf_alloc: u32) -> (Services, Arc<Mutex<Seen>>) {
        let seen = Arc::new(Mutex::new(Seen::default()));
        (
            Services {
                buf_alloc,
                connections: HashMap::new(),
                seen: seen.clone(),
            },
            seen,
        )
    }

    fn fault(&self, what: String) {
        self.seen.lock().unwrap().faults.push(what);
    }

    fn answer(&self, op: Op, of: &Header, flags: u32) -> Header {
        let key = (of.dst_port.0, of.src_port.0);
        let fwd_cnt = self.connections.get(&key).map_or(0, |c| c.fwd_cnt);
        Header {
            flags,
            fwd_cnt,
            buf_alloc: self.buf_alloc,
            socket_type: of.socket_type,
            ..from_host(op, key.0, key.1)
        }
    }

    /// Sends what the guest's credit allows, then the end if it is due.
    fn pump(&mut self, of: &Header, out: &mut Vec<(Header, Vec<u8>)>) {
        let key = (of.dst_port.0, of.src_port.0);
        let rw = self.answer(Op::Rw, of, 0);
        let Some(c) = self.connections.get_mut(&key) else {
            return;
        };
        loop {
            let room = c
                .guest_buf_alloc
                .saturating_sub(c.sent.wrapping_sub(c.guest_fwd_cnt));
            let len = (room as usize).min(c.to_send.len()).min(65536);
            if len == 0 {
                break;
            }
            c.sent = c.sent.wrapping_add(len as u32);
            out.push((rw, c.to_send.drain(..len).collect()));
        }
        while let Some((bytes, flags)) = c.messages.front_mut() {
            let room = c
                .guest_buf_alloc
                .saturating_sub(c.sent.wrapping_sub(c.guest_fwd_cnt));
            let len = (room as usize).min(bytes.len());
            if len == 0 && !bytes.is_empty() {
                break;
            }
            c.sent = c.sent.wrapping_add(len as u32);
            let payload = bytes.drain(..len).collect();
            let flags = if bytes.is_empty() { *flags } else { 0 };
            out.push((Header { flags, ..rw }, payload));
            if bytes.is_empty() {
                c.messages.pop_front();
            }
        }
        let told = c.told;
        c.told = c.fwd_cnt;
        if c.finishing && c.to_send.is_empty() && c.messages.is_empty() && !c.shut_down {
            c.shut_down = true;
            let flags = if c.guest_shutdown & 2 != 0 { 3 } else { 2 };
            out.push((self.answer(Op::Shutdown, of, flags), vec![]));
        } else if told != rw.fwd_cnt {
            out.push((self.answer(Op::CreditUpdate, of, 0), vec![]));
        }
    }

    fn end(&mut self, of: &Header) {
        self.connections.remove(&(of.dst_port.0, of.src_port.0));
        self.seen.lock().unwrap().open = self.connections.len();
    }
}

impl Host for Services {
    fn packet(&mut self, header: Header, payload: &[u8], out: &mut Vec<(Header, Vec<u8>)>) {
        let key = (header.dst_port.0, header.src_port.0);
        let service = key.0;
        if header.len as usize != payload.len() {
            self.fault(format!("{header:?} with {} bytes", payload.len()));
        }
        let op = Op::from_wire(header.op);
        if matches!(op, Some(Op::Request | Op::Response)) && service != MUTE {
            if op == Some(Op::Request) && service == REFUSED {
                return out.push((self.answer(Op::Rst, &header, 0), vec![]));
            }
            let source = service == SOURCE;
            let to_send = if source {
                (0..SOURCE_BYTES).map(|i| (i % 251) as u8).collect()
            } else {
                VecDeque::new()
            };
            let connection = Connection {
                socket_type: header.socket_type,
                message: Vec::new(),
                packets: 0,
                messages: VecDeque::new(),
                received: 0,
                fwd_cnt: 0,
                told: 0,
                sent: 0,
                guest_buf_alloc: header.buf_alloc,
                guest_fwd_cnt: header.fwd_cnt,
                to_send,
                finishing: source,
                shut_down: false,
                guest_shutdown: 0,
            };
            if self.connections.insert(key, connection).is_some() {
                self.fault(format!("{op:?} on a connection that exists"));
            }
            self.seen.lock().unwrap().open = self.connections.len();
            if op == Some(Op::Request) {
                out.push((self.answer(Op::Response, &header, 0), vec![]));
            }
            return self.pump(&header, out);
        }
        if op == Some(Op::Rst) {
            self.seen.lock().unwrap().resets += 1;
            return self.end(&header);
        }
        let buf_alloc = self.buf_alloc;
        let Some(c) = self.connections.get_mut(&key) else {
            if service != MUTE {
                self.fault(format!("{op:?} for no connection"));
            }
            return;
        };
        c.guest_buf_alloc = header.buf_alloc;
        c.guest_fwd_cnt = header.fwd_cnt;
        let same_type = header.socket_type == c.socket_type;
        let messages = c.socket_type == 2;
        match op {
            Some(Op::Rw) => {
                c.received = c.received.wrapping_add(header.len);
                let overrun = c.received.wrapping_sub(c.fwd_cnt) > buf_alloc;
                let after_shutdown = c.guest_shutdown & 2 != 0;
                let ends = messages && header.flags & 1 != 0;
                let flags_known = header.flags & !(if ends { 3 } else { 0 }) == 0;
                if messages {
                    c.message.extend(payload);
                    c.packets += 1;
                }
                if ends {
                    let message = std::mem::take(&mut c.message);
                    let seen = (message.len(), std::mem::take(&mut c.packets), header.flags);
                    self.seen.lock().unwrap().messages.push(seen);
                    if service == ECHO {
                        c.messages.push_back((message.into(), header.flags));
                    }
                } else if service == ECHO && !messages {
                    c.to_send.extend(payload);
                }
                // Like Linux: a message is taken when it is whole.
                if service != STALLED && (ends || !messages) {
                    c.fwd_cnt = c.received;
                }
                *self.seen.lock().unwrap().received.entry(service).or_default() += payload.len();
                let says_nothing = payload.is_empty() && !ends;
                if overrun || after_shutdown || says_nothing || !flags_known || !same_type {
                    self.fault(format!(
                        "{header:?}: overrun {overrun}, after shutdown {after_shutdown}"
                    ));
                }
                if service == RESETTER {
                    out.push((self.answer(Op::Rst, &header, 0), vec![]));
                    return self.end(&header);
                }
                self.pump(&header, out);
            }
            Some(Op::Shutdown) => {
                c.guest_shutdown |= header.flags;
                c.finishing |= c.guest_shutdown & 2 != 0;
                if c.guest_shutdown == 3 {
                    out.push((self.answer(Op::Rst, &header, 0), vec![]));
                    return self.end(&header);
                }
                self.pump(&header, out);
            }
            Some(Op::CreditRequest) => out.push((self.answer(Op::CreditUpdate, &header, 0), vec![])),
            Some(Op::CreditUpdate) => self.pump(&header, out),
            _ => self.fault(format!("{header:?}")),
        }
    }
}
