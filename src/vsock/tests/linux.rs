//! A small model of a Linux guest's sockets: the judge of what we send it.
//!
//! Written from what net/vmw_vsock/virtio_transport_common.c and af_vsock.c do, so that two copies of our own code
//! need not agree with each other. It knows credit, shutdown, close and reset of stream sockets. Payload is not bytes
//! but where in its stream a packet begins, which proves order and completeness and costs nothing.
//!
//! What Linux would drop silently, or must never be sent, is a line in [`Linux::faults`].

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::{CLOSE_TIMEOUT, Flow, GUEST};
use crate::vsock::header::{Header, MAX_PACKET_PAYLOAD, Op, SocketType};

const RCV: u32 = 1;
const SEND: u32 = 2;
const BOTH: u32 = 3;

/// VSOCK_DEFAULT_CONNECT_TIMEOUT, net/vmw_vsock/af_vsock.c.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A packet on the bus, with what only the judges see.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    pub(super) header: Header,
    /// Where its payload begins in the stream of its direction.
    pub(super) at: u64,
    /// The socket it comes from, if any.
    pub(super) socket: Option<usize>,
    /// `fwd_cnt` before it was cut to 32 bits.
    pub(super) fwd: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    Connecting,
    Connected,
    /// Refused, timed out or never more than that.
    Unconnected,
}

#[derive(Debug)]
pub(super) struct Socket {
    pub(super) flow: Flow,
    pub(super) progress: Progress,
    /// Packets of its flow find it.
    pub(super) linked: bool,
    /// The connection is over: SOCK_DONE.
    pub(super) done: bool,
    /// The application has closed it.
    pub(super) released: bool,
    pub(super) own_shutdown: u32,
    pub(super) peer_shutdown: u32,
    timer: Option<Instant>,

    buf_alloc: u32,
    buf_used: u32,
    fwd: u64,
    last_fwd: u64,
    /// Unread packets: length, and how much of it was read.
    unread: VecDeque<(u32, u32)>,
    /// The furthest byte that it ever promised to take.
    promised: u64,
    /// Bytes that arrived.
    pub(super) arrived: u64,

    peer_buf_alloc: u32,
    peer_fwd: u32,
    /// Bytes that left.
    pub(super) sent: u64,
    /// Bytes that the application is blocked on.
    pub(super) pending: u64,
}

#[derive(Debug, Default)]
pub(super) struct Linux {
    pub(super) sockets: Vec<Socket>,
    pub(super) listening: HashSet<u32>,
    pub(super) buf_alloc: u32,
    /// The tx ring: what the device has not taken.
    pub(super) tx: VecDeque<Packet>,
    pub(super) faults: Vec<String>,
    next_port: u32,
}

impl Socket {
    /// It was connected, and its application still has it.
    fn is_open(&self) -> bool {
        self.progress == Progress::Connected && !self.released
    }

    /// Its application set a buffer that nothing fits in.
    pub(super) fn refuses_everything(&self) -> bool {
        self.buf_alloc == 0
    }
}

impl Linux {
    pub(super) fn new(buf_alloc: u32) -> Linux {
        Linux {
            buf_alloc,
            next_port: 1024,
            ..Linux::default()
        }
    }

    /// A port that nobody has; or the last one given up, if nobody has that and none of its packets is `under_way`:
    /// whoever is faster cuts off the new connection with what was meant for the old one.
    pub(super) fn free_port(&mut self, reuse: bool, under_way: &HashSet<u32>) -> u32 {
        let mut given_up = self
            .sockets
            .iter()
            .rev()
            .filter(|s| !s.linked)
            .map(|s| s.flow.guest_port);
        let taken = |port: &u32| {
            self.sockets
                .iter()
                .any(|s| (s.linked || s.is_open()) && s.flow.guest_port == *port)
                || under_way.contains(port)
        };
        if let (true, Some(port)) = (reuse, given_up.find(|port| *port >= 1024 && !taken(port))) {
            return port;
        }
        self.next_port += 1;
        self.next_port
    }

    pub(super) fn connect(&mut self, now: Instant, guest_port: u32, port: u32) {
        let socket = self.create(Flow::new(guest_port, port), Progress::Connecting);
        self.sockets[socket].timer = Some(now + CONNECT_TIMEOUT);
        self.send(socket, Op::Request, 0, 0);
    }

    /// The application writes `n` bytes, and blocks on what there is no credit for.
    pub(super) fn write(&mut self, socket: usize, n: u64) {
        let s = &mut self.sockets[socket];
        if s.progress == Progress::Connected && !s.released && s.own_shutdown & SEND == 0 {
            s.pending += n;
            self.flush(socket);
        }
    }

    /// The application reads up to `n` bytes.
    pub(super) fn read(&mut self, socket: usize, mut n: u32) {
        let s = &mut self.sockets[socket];
        if s.released {
            return;
        }
        while n > 0 {
            let Some((len, read)) = s.unread.front_mut() else {
                break;
            };
            let step = n.min(*len - *read);
            *read += step;
            n -= step;
            // Only whole packets make room.
            if read == len {
                s.fwd += u64::from(*len);
                s.buf_used -= *len;
                s.unread.pop_front();
            }
        }
        let news = (s.fwd - s.last_fwd) as u32;
        let scarce = i64::from(s.buf_alloc) - i64::from(news) < i64::from(MAX_PACKET_PAYLOAD);
        if news > 0 && (scarce || s.unread.is_empty()) && s.progress == Progress::Connected {
            self.send(socket, Op::CreditUpdate, 0, 0);
        }
    }

    pub(super) fn shutdown(&mut self, socket: usize, how: u32) {
        let s = &mut self.sockets[socket];
        if s.progress == Progress::Connected && !s.released && how != 0 {
            s.own_shutdown |= how;
            s.done = false; // vsock_shutdown() does so
            if how & SEND != 0 {
                s.pending = 0;
            }
            self.send(socket, Op::Shutdown, how, 0);
        }
    }

    pub(super) fn close(&mut self, now: Instant, socket: usize) {
        let s = &mut self.sockets[socket];
        if s.released {
            return;
        }
        s.released = true;
        s.pending = 0;
        let own_shutdown = s.own_shutdown;
        s.own_shutdown = BOTH;
        if s.progress != Progress::Connected {
            s.progress = Progress::Unconnected;
            s.linked = false;
        } else if s.peer_shutdown == BOTH {
            // Also when it was reset before: Linux answers an RST with an RST here.
            self.send(socket, Op::Rst, 0, 0);
            self.finish(socket);
        } else {
            if own_shutdown != BOTH {
                self.send(socket, Op::Shutdown, BOTH, 0);
            }
            if self.sockets[socket].done {
                self.finish(socket);
            } else {
                self.sockets[socket].timer = Some(now + CLOSE_TIMEOUT);
            }
        }
    }

    /// The kernel gives up a connection at once, as no application can.
    pub(super) fn abort(&mut self, socket: usize) {
        if self.sockets[socket].linked && self.sockets[socket].progress == Progress::Connected {
            self.send(socket, Op::Rst, 0, 0);
            self.finish(socket);
            self.sockets[socket].released = true;
        }
    }

    /// SO_VM_SOCKETS_BUFFER_SIZE.
    pub(super) fn set_buffer(&mut self, socket: usize, buf_alloc: u32) {
        if self.sockets[socket].progress == Progress::Connected && !self.sockets[socket].done {
            self.sockets[socket].buf_alloc = buf_alloc;
            self.send(socket, Op::CreditUpdate, 0, 0);
        }
    }

    pub(super) fn tick(&mut self, now: Instant) {
        for socket in 0..self.sockets.len() {
            let s = &mut self.sockets[socket];
            if s.timer.is_none_or(|timer| timer > now) {
                continue;
            }
            s.timer = None;
            match s.progress {
                Progress::Connecting => {
                    s.progress = Progress::Unconnected;
                    s.linked = false;
                }
                Progress::Connected if !s.done => {
                    self.send(socket, Op::Rst, 0, 0);
                    self.finish(socket);
                }
                _ => s.linked = false,
            }
        }
    }

    /// The machine restarts.
    pub(super) fn reboot(&mut self) {
        self.tx.clear();
        for s in &mut self.sockets {
            s.linked = false;
            s.done = true;
            s.released = true;
            s.progress = Progress::Unconnected;
            s.pending = 0;
            s.timer = None;
        }
    }

    /// A packet of the device, out of the rx ring.
    pub(super) fn receive(&mut self, packet: Packet) {
        let header = packet.header;
        let flow = Flow {
            guest_port: header.dst_port.0,
            peer_cid: header.src_cid,
            peer_port: header.src_port.0,
        };
        let op = Op::from_wire(header.op);
        if header.dst_cid != GUEST
            || header.socket_type != SocketType::Stream as u16
            || op.is_none()
            || (header.len > 0) != (op == Some(Op::Rw))
            || (header.flags != 0) != (op == Some(Op::Shutdown))
        {
            self.faults.push(format!("not a legal packet: {header:?}"));
            return;
        }
        let found = self.sockets.iter().rposition(|s| {
            s.linked && s.flow.guest_port == flow.guest_port && s.flow.peer_port == flow.peer_port
        });
        let Some(socket) = found.filter(|found| !self.sockets[*found].done) else {
            if found.is_none() && op == Some(Op::Request) && self.listening.contains(&flow.guest_port) {
                let socket = self.create(flow, Progress::Connected);
                self.take_credit(socket, &header);
                self.send(socket, Op::Response, 0, 0);
            } else if op != Some(Op::Rst) {
                self.send_rst(flow);
            }
            return;
        };
        self.take_credit(socket, &header);
        match self.sockets[socket].progress {
            Progress::Connecting => match op {
                Some(Op::Response) => {
                    self.sockets[socket].progress = Progress::Connected;
                    self.sockets[socket].timer = None;
                }
                Some(Op::Rst) => {
                    self.sockets[socket].progress = Progress::Unconnected;
                    self.sockets[socket].linked = false;
                }
                _ => self.faults.push(format!("EPROTO while connecting: {header:?}")),
            },
            _ => self.receive_connected(socket, op, packet),
        }
        self.flush(socket);
    }

    fn receive_connected(&mut self, socket: usize, op: Option<Op>, packet: Packet) {
        let s = &mut self.sockets[socket];
        let len = packet.header.len;
        match op {
            Some(Op::Rw) => {
                if s.arrived + u64::from(len) > s.promised {
                    self.faults.push(format!("{len} bytes beyond the credit: {s:?}"));
                } else if packet.at != s.arrived {
                    self.faults
                        .push(format!("byte {} instead of {}", packet.at, s.arrived));
                } else if s.peer_shutdown & SEND != 0 {
                    self.faults.push(format!("bytes after SHUTDOWN: {s:?}"));
                }
                s.arrived += u64::from(len);
                s.buf_used += len;
                s.unread.push_back((len, 0));
            }
            Some(Op::CreditRequest) => self.send(socket, Op::CreditUpdate, 0, 0),
            Some(Op::CreditUpdate) => {}
            Some(Op::Shutdown) => {
                s.peer_shutdown |= packet.header.flags & BOTH;
                if s.peer_shutdown == BOTH {
                    let all_read = s.unread.is_empty();
                    if all_read {
                        self.send(socket, Op::Rst, 0, 0);
                        self.sockets[socket].done = true;
                    }
                    self.sockets[socket].linked = false;
                }
            }
            Some(Op::Rst) => {
                s.done = true;
                s.peer_shutdown = BOTH;
                s.pending = 0;
                if s.released {
                    s.linked = false;
                }
            }
            _ => self
                .faults
                .push(format!("out of place: {:?} for {s:?}", packet.header)),
        }
    }

    fn take_credit(&mut self, socket: usize, header: &Header) {
        let s = &mut self.sockets[socket];
        if header.op == Op::Rst as u16 {
            return; // resets of unknown flows carry none
        }
        let in_flight = (s.sent as u32).wrapping_sub(s.peer_fwd);
        if header.fwd_cnt.wrapping_sub(s.peer_fwd) > in_flight {
            self.faults.push(format!("fwd_cnt {} of {s:?}", header.fwd_cnt));
        }
        s.peer_buf_alloc = header.buf_alloc;
        s.peer_fwd = header.fwd_cnt;
    }

    fn flush(&mut self, socket: usize) {
        loop {
            let s = &self.sockets[socket];
            let in_flight = (s.sent as u32).wrapping_sub(s.peer_fwd);
            let space = u64::from(s.peer_buf_alloc.saturating_sub(in_flight));
            let n = s.pending.min(space).min(u64::from(MAX_PACKET_PAYLOAD)) as u32;
            if n == 0 || s.done || s.progress != Progress::Connected {
                return;
            }
            if s.peer_shutdown & RCV != 0 {
                self.sockets[socket].pending = 0; // EPIPE
                return;
            }
            self.send(socket, Op::Rw, 0, n);
            self.sockets[socket].sent += u64::from(n);
            self.sockets[socket].pending -= u64::from(n);
        }
    }

    fn create(&mut self, flow: Flow, progress: Progress) -> usize {
        self.sockets.push(Socket {
            flow,
            progress,
            linked: true,
            done: false,
            released: false,
            own_shutdown: 0,
            peer_shutdown: 0,
            timer: None,
            buf_alloc: self.buf_alloc,
            buf_used: 0,
            fwd: 0,
            last_fwd: 0,
            unread: VecDeque::new(),
            promised: 0,
            arrived: 0,
            peer_buf_alloc: 0,
            peer_fwd: 0,
            sent: 0,
            pending: 0,
        });
        self.sockets.len() - 1
    }

    fn finish(&mut self, socket: usize) {
        let s = &mut self.sockets[socket];
        s.done = true;
        s.linked = false;
        s.timer = None;
        s.pending = 0;
    }

    fn send(&mut self, socket: usize, op: Op, flags: u32, len: u32) {
        let s = &mut self.sockets[socket];
        s.last_fwd = s.fwd;
        s.promised = s.promised.max(s.fwd + u64::from(s.buf_alloc));
        self.tx.push_back(Packet {
            header: Header {
                len,
                flags,
                buf_alloc: s.buf_alloc,
                fwd_cnt: s.fwd as u32,
                ..s.flow.sends(op)
            },
            at: s.sent,
            socket: Some(socket),
            fwd: s.fwd,
        });
    }

    fn send_rst(&mut self, flow: Flow) {
        self.tx.push_back(Packet {
            header: Header {
                buf_alloc: 0,
                ..flow.sends(Op::Rst)
            },
            at: 0,
            socket: None,
            fwd: 0,
        });
    }
}
