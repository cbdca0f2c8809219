//! A simulated bus: a [`Linux`] guest on one side, byte counters in place of host sockets on the other, and the
//! muxer with the smallest possible shell in between. Packets are never reordered; when they are taken is the test's.

use std::collections::{HashMap, VecDeque};

use super::linux::{Linux, Packet, Progress};
use super::*;
use crate::vsock::{CloseReason, Connection, RefuseReason};

/// Payload that fits one RX buffer of a Linux guest.
const RX_PAYLOAD: u32 = 3732;

/// One host end, live or not.
#[derive(Debug)]
pub(super) struct HostEnd {
    pub(super) id: ConnectionId,
    /// The guest's socket, once it is known.
    pub(super) socket: Option<usize>,
    pub(super) established: bool,
    pub(super) ended: bool,
    /// Bytes that the client wrote, and whether it will write more.
    pub(super) written: u64,
    pub(super) eof: bool,
    /// Bytes of them that went to the guest.
    pub(super) read: u64,
    /// Bytes of the guest that it took, and how many more it takes now.
    pub(super) delivered: u64,
    pub(super) room: u64,
    /// Bytes of the guest that it did not take yet.
    pub(super) spill: u64,
    pub(super) write_failed: bool,
    pub(super) got_eof: bool,
    /// How far the guest lets us send, as of its last packet.
    limit: u64,
}

/// Everything.
#[derive(Debug)]
pub(super) struct World {
    pub(super) mux: Muxer,
    pub(super) now: Instant,
    pub(super) guest: Linux,
    pub(super) hosts: Vec<HostEnd>,
    by_id: HashMap<ConnectionId, usize>,
    pub(super) dials: VecDeque<ConnectionId>,
    /// Used RX buffers that the guest has not looked at.
    pub(super) rx: VecDeque<Packet>,
    /// RX buffers that the guest has posted.
    pub(super) buffers: usize,
    pub(super) ring: usize,
}

impl World {
    pub(super) fn new(config: MuxerConfig, guest_buf: u32, ring: usize) -> World {
        let mut guest = Linux::new(guest_buf);
        guest.listening.extend([22, 23]);
        World {
            mux: Muxer::new(config),
            now: Instant::now(),
            guest,
            hosts: Vec::new(),
            by_id: HashMap::new(),
            dials: VecDeque::new(),
            rx: VecDeque::new(),
            buffers: ring,
            ring,
        }
    }

    /// The device thread does all it can.
    pub(super) fn turn(&mut self) {
        self.mux.handle_timeout(self.now);
        self.take_events(None, usize::MAX);
        while self.mux.accepts_input() {
            let Some(packet) = self.guest.tx.pop_front() else {
                break;
            };
            self.take_packet(packet);
        }
        for host in 0..self.hosts.len() {
            self.host_takes(host);
        }
        let mut polls = 0;
        while self.buffers > 0 {
            let Some(outgoing) = self.mux.poll_outgoing(self.now) else {
                break;
            };
            self.give(outgoing);
            self.take_events(None, 8);
            polls += 1;
            assert!(polls < 10_000, "poll_outgoing has no end");
        }
        assert!(!self.mux.has_events());
    }

    /// The guest looks at up to `n` packets and posts their buffers again.
    pub(super) fn guest_polls(&mut self, n: usize) {
        for _ in 0..n {
            let Some(packet) = self.rx.pop_front() else {
                break;
            };
            self.buffers += 1;
            if packet.header.op == Op::Shutdown as u16 {
                self.judge_end_of_stream(&packet);
            }
            self.guest.receive(packet);
        }
        assert_eq!(self.guest.faults, [] as [&str; 0]);
    }

    /// From a port that is free; if `reuse`, rather from one that was used before.
    pub(super) fn guest_connects(&mut self, reuse: bool) {
        let received = self.rx.iter().map(|packet| packet.header.dst_port.0);
        let sent = self.guest.tx.iter().map(|packet| packet.header.src_port.0);
        let port = self.guest.free_port(reuse, &received.chain(sent).collect());
        self.guest.connect(self.now, port, 80);
    }

    pub(super) fn host_connects(&mut self, guest_port: u32) {
        // Every other client waits for a guest that does not listen.
        let asked = match self.hosts.len() % 2 {
            0 => self.mux.connect(self.now, Port(guest_port)),
            _ => self.mux.connect_waiting(self.now, Port(guest_port)),
        };
        if let Ok(id) = asked {
            self.add_host(id, None);
        }
    }

    pub(super) fn host_writes(&mut self, host: usize, n: u64) {
        let h = &mut self.hosts[host];
        if !h.eof && !h.ended {
            h.written += n;
            self.mux.host_readable(h.id);
        }
    }

    pub(super) fn host_ends(&mut self, host: usize) {
        let h = &mut self.hosts[host];
        if !h.eof && !h.ended {
            h.eof = true;
            self.mux.host_readable(h.id);
        }
    }

    pub(super) fn host_fails(&mut self, host: usize) {
        let h = &self.hosts[host];
        if !h.ended && (h.established || !self.dials.contains(&h.id)) {
            self.mux.host_failed(h.id, CloseReason::PeerRst);
            self.take_events(None, 1);
        }
    }

    pub(super) fn host_takes_no_more(&mut self, host: usize) {
        let h = &mut self.hosts[host];
        if h.established && !h.ended {
            h.write_failed = true;
            h.spill = 0;
            self.mux.host_write_failed(self.now, h.id);
            self.take_events(None, 2);
        }
    }

    /// The oldest dial ends.
    pub(super) fn dialled(&mut self, reached: bool) {
        let Some(id) = self.dials.pop_front() else {
            return;
        };
        let host = self.by_id[&id];
        if !reached {
            self.mux.refused(id, RefuseReason::DialRefused);
        } else if self.mux.connected(self.now, id) {
            self.hosts[host].established = true;
            self.mux.host_readable(id);
        } else {
            assert!(self.hosts[host].ended, "not wanted, and nobody was told");
        }
        self.take_events(None, 1);
    }

    /// The rings stop, and another guest boots.
    pub(super) fn reboots(&mut self) {
        self.guest.reboot();
        self.rx.clear();
        self.buffers = self.ring;
        self.mux.reset();
        self.take_events(None, usize::MAX);
    }

    pub(super) fn passes(&mut self, time: Duration) {
        self.now += time;
        self.guest.tick(self.now);
    }

    fn take_packet(&mut self, packet: Packet) {
        let disposition = self
            .mux
            .handle_packet(self.now, &packet.header, packet.header.len);
        // Misbehaved, CreditResumed, ShutdownHost and Closed at most.
        self.take_events(packet.socket, 4);
        if packet.header.op == Op::Request as u16 {
            // A new socket may repeat what an older one asked for.
            let of_flow = |c: &Connection| {
                c.state() != State::Draining
                    && (c.key().guest_port, c.key().peer_port)
                        == (packet.header.src_port, packet.header.dst_port)
            };
            for h in self.hosts.iter_mut().filter(|h| !h.ended) {
                if self.mux.connection(h.id).is_some_and(of_flow) {
                    h.socket = packet.socket;
                }
            }
        }
        let host = self
            .hosts
            .iter_mut()
            .find(|h| packet.socket.is_some() && h.socket == packet.socket);
        if let Some(h) = host {
            h.limit = packet.fwd + u64::from(packet.header.buf_alloc);
        }
        if let Disposition::Payload { id, len, .. } = disposition {
            let host = self.by_id[&id];
            let h = &mut self.hosts[host];
            assert_eq!(h.socket, packet.socket);
            assert_eq!(packet.at, h.delivered + h.spill, "a byte is missing or twice");
            assert!(!h.ended && !h.got_eof);
            h.spill += u64::from(len);
            let held = self.mux.connection(id).expect("it has payload").held();
            assert_eq!(u64::from(held), h.spill);
            self.host_takes(host);
        }
    }

    fn host_takes(&mut self, host: usize) {
        let h = &mut self.hosts[host];
        let n = h.spill.min(h.room);
        if n > 0 {
            h.spill -= n;
            h.room -= n;
            h.delivered += n;
            self.mux.host_wrote(self.now, h.id, n as u32);
            self.take_events(None, 2);
        }
    }

    /// One packet, or a burst of one connection, goes into RX buffers.
    fn give(&mut self, outgoing: Outgoing) {
        match outgoing {
            Outgoing::Control(header) => self.put(header, 0),
            Outgoing::Data { id, limit } => {
                let host = self.by_id[&id];
                let h = &mut self.hosts[host];
                assert!(h.established && !h.ended && limit > 0);
                assert!(
                    h.read + u64::from(limit) <= h.limit,
                    "room {limit} is beyond what the guest said: {h:?}"
                );
                let mut n = (h.written - h.read).min(u64::from(limit)) as u32;
                let (id, at) = (h.id, h.read);
                let mut done = 0;
                while n > 0 && self.buffers > 0 {
                    let len = n.min(RX_PAYLOAD);
                    let header = self
                        .mux
                        .data_header(id, len, Boundary::None)
                        .expect("it has data");
                    self.put(header, at + u64::from(done));
                    done += len;
                    n -= len;
                }
                let h = &mut self.hosts[host];
                h.read += u64::from(done);
                if done > 0 {
                    self.mux
                        .host_read(self.now, id, done, h.read < h.written || h.eof);
                } else if h.eof {
                    self.mux.host_eof(self.now, id);
                } else {
                    self.mux.host_drained(id);
                }
            }
        }
    }

    fn put(&mut self, header: Header, at: u64) {
        self.buffers -= 1;
        self.rx.push_back(Packet {
            header,
            at,
            socket: None,
            fwd: 0,
        });
    }

    fn add_host(&mut self, id: ConnectionId, socket: Option<usize>) {
        let known = self.by_id.insert(id, self.hosts.len());
        assert_eq!(known, None, "a name is used again");
        self.hosts.push(HostEnd {
            id,
            socket,
            established: false,
            ended: false,
            written: 0,
            eof: false,
            read: 0,
            delivered: 0,
            room: 0,
            spill: 0,
            write_failed: false,
            got_eof: false,
            limit: 0,
        });
    }

    /// Does what the events ask for; `socket` is the guest's socket that caused them.
    fn take_events(&mut self, socket: Option<usize>, at_most: usize) {
        let mut events = 0;
        while let Some(event) = self.mux.poll_event() {
            events += 1;
            assert!(events <= at_most, "{event:?} is one too many");
            match event {
                Event::Dial { id, .. } => {
                    self.add_host(id, socket);
                    self.dials.push_back(id);
                }
                Event::Accepted { id, .. } => {
                    let h = self.live(id);
                    assert!(!h.established);
                    h.established = true;
                    h.socket = socket;
                }
                Event::Refused { id, .. } => {
                    let h = self.live(id);
                    assert!(!h.established);
                    h.ended = true;
                }
                Event::ShutdownHost { id, flags } => {
                    let h = self.live(id);
                    assert!(h.established);
                    if flags.contains(ShutdownFlags::SEND) {
                        assert_eq!(h.spill, 0, "end of file before the last byte");
                        assert!(!h.got_eof);
                        h.got_eof = true;
                    }
                }
                Event::Closed { id, reason, abort } => self.judge_close(id, reason, abort),
                Event::CreditStalled { id } | Event::CreditResumed { id, .. } => {
                    assert!(self.live(id).established);
                }
                Event::LimitReached { .. } => {}
                Event::Misbehaved { kind, .. } => panic!("an honest guest is accused of {kind:?}"),
            }
        }
    }

    fn live(&mut self, id: ConnectionId) -> &mut HostEnd {
        let h = &mut self.hosts[self.by_id[&id]];
        assert!(!h.ended, "told of {id:?} after its end");
        h
    }

    /// An orderly end means that nothing of the guest is missing.
    fn judge_close(&mut self, id: ConnectionId, reason: CloseReason, abort: bool) {
        let h = self.live(id);
        h.ended = true;
        let h = &self.hosts[self.by_id[&id]];
        assert!(h.established);
        if !abort {
            assert_eq!(h.spill, 0, "{reason:?}");
            if !h.write_failed {
                let sent = self.guest.sockets[h.socket.expect("established")].sent;
                assert_eq!(h.delivered, sent, "{reason:?}: bytes of the guest are missing");
            }
        }
        assert!(
            matches!(
                (reason, abort),
                (CloseReason::GuestShutdown | CloseReason::PeerFin, false)
                    | (CloseReason::PeerRst, _)
                    | (
                        CloseReason::GuestRst
                            | CloseReason::SessionLost
                            | CloseReason::IdleTimeout
                            | CloseReason::Misbehavior,
                        true
                    )
            ),
            "{reason:?}, abort {abort}"
        );
    }

    /// SHUTDOWN(SEND) means that nothing of the host end is missing.
    fn judge_end_of_stream(&self, packet: &Packet) {
        if !ShutdownFlags::from_wire(packet.header.flags).contains(ShutdownFlags::SEND) {
            return;
        }
        let of_flow = |s: &super::linux::Socket| {
            s.linked
                && s.flow.guest_port == packet.header.dst_port.0
                && s.flow.peer_port == packet.header.src_port.0
        };
        let Some(socket) = self.guest.sockets.iter().rposition(of_flow) else {
            return;
        };
        let s = &self.guest.sockets[socket];
        let host = self.hosts.iter().find(|h| h.socket == Some(socket));
        if let Some(h) =
            host.filter(|_| s.progress == Progress::Connected && !s.done && s.own_shutdown & 1 == 0)
        {
            assert_eq!(s.arrived, h.written, "end of file before the last byte");
        }
    }
}
