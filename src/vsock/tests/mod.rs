//! Transcripts and properties of the law.
//!
//! A transcript says what came in, what must go out and in which state we are then; it ends with
//! [`Scene::assert_over`] where its story ends. Time is a number that the test moves.

mod bounds;
mod closing;
mod credit;
mod dialing;
mod half_close;
mod hostile;
mod linux;
mod misbehavior;
mod properties;
mod properties_seqpacket;
mod requested;
mod seqpacket;
mod session;
mod timers;
mod turns;
mod waiting;
mod world;

use std::time::{Duration, Instant};

use super::connection::{ConnectionKey, State};
use super::header::{Boundary, Cid, Header, Op, Port, ShutdownFlags, SocketType};
use super::{ConnectionId, Disposition, Event, Muxer, MuxerConfig, Outgoing};

const GUEST: Cid = Cid(3);
/// What we promise the guest for a connection.
const OUR_BUF: u32 = 256 * 1024;
/// What the guest promises us.
const GUEST_BUF: u32 = 64 * 1024;

const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
const GUEST_TIMEOUT: Duration = Duration::from_secs(5);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
const A_MOMENT: Duration = Duration::from_millis(1);

/// The flow of most tests: the guest's port 1024, port 80 of the host.
const FLOW: Flow = Flow::new(1024, 80);

fn config() -> MuxerConfig {
    MuxerConfig {
        guest_cid: GUEST,
        buf_alloc: OUR_BUF,
        max_connections: 128,
        connect_timeout: CONNECT_TIMEOUT,
        guest_timeout: GUEST_TIMEOUT,
        idle_timeout: Duration::ZERO,
    }
}

/// The addresses of one connection.
#[derive(Clone, Copy, Debug)]
struct Flow {
    guest_port: u32,
    peer_cid: Cid,
    peer_port: u32,
}

impl Flow {
    const fn new(guest_port: u32, peer_port: u32) -> Flow {
        Flow {
            guest_port,
            peer_cid: Cid::HOST,
            peer_port,
        }
    }

    fn key(self) -> ConnectionKey {
        ConnectionKey {
            guest_port: Port(self.guest_port),
            peer_cid: self.peer_cid,
            peer_port: Port(self.peer_port),
        }
    }

    /// A packet from the guest.
    fn sends(self, op: Op) -> Header {
        Header {
            src_cid: GUEST,
            dst_cid: self.peer_cid,
            src_port: Port(self.guest_port),
            dst_port: Port(self.peer_port),
            len: 0,
            socket_type: SocketType::Stream as u16,
            op: op as u16,
            flags: 0,
            buf_alloc: GUEST_BUF,
            fwd_cnt: 0,
        }
    }

    fn sends_rw(self, len: u32) -> Header {
        Header {
            len,
            ..self.sends(Op::Rw)
        }
    }

    fn sends_shutdown(self, flags: ShutdownFlags) -> Header {
        Header {
            flags: flags.bits(),
            ..self.sends(Op::Shutdown)
        }
    }

    fn sends_credit(self, buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            buf_alloc,
            fwd_cnt,
            ..self.sends(Op::CreditUpdate)
        }
    }

    /// A packet to the guest that the host end has consumed nothing of yet.
    fn gets(self, op: Op) -> Header {
        self.gets_with(op, 0)
    }

    /// A packet to the guest when the host end has taken `fwd_cnt` bytes.
    fn gets_with(self, op: Op, fwd_cnt: u32) -> Header {
        Header {
            src_cid: self.peer_cid,
            dst_cid: GUEST,
            src_port: Port(self.peer_port),
            dst_port: Port(self.guest_port),
            len: 0,
            socket_type: SocketType::Stream as u16,
            op: op as u16,
            flags: 0,
            buf_alloc: OUR_BUF,
            fwd_cnt,
        }
    }

    fn gets_shutdown(self, flags: ShutdownFlags, fwd_cnt: u32) -> Header {
        Header {
            flags: flags.bits(),
            ..self.gets_with(Op::Shutdown, fwd_cnt)
        }
    }

    /// An RST for a flow that we do not know: there is no credit to tell of.
    fn gets_stray_rst(self) -> Header {
        Header {
            buf_alloc: 0,
            ..self.gets(Op::Rst)
        }
    }
}

/// A muxer, its clock, and verbs. Conclusions stand in the tests.
struct Scene {
    mux: Muxer,
    now: Instant,
}

impl Scene {
    fn new() -> Scene {
        Scene::with(config())
    }

    fn with(config: MuxerConfig) -> Scene {
        Scene {
            mux: Muxer::new(config),
            now: Instant::now(),
        }
    }

    /// Time passes, in which whatever is due happens when it is due.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.mux.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.mux.handle_timeout(self.now);
        }
        self.now = end;
        self.mux.handle_timeout(end);
    }

    /// The guest sends a packet whose chain is as long as its header says.
    fn guest(&mut self, header: Header) -> Disposition {
        self.mux.handle_packet(self.now, &header, header.len)
    }

    /// All events.
    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.mux.poll_event()).collect()
    }

    /// The next packet for the guest.
    fn poll(&mut self) -> Option<Outgoing> {
        self.mux.poll_outgoing(self.now)
    }

    /// All packets for the guest, none of them with payload.
    fn sent(&mut self) -> Vec<Header> {
        let mut headers = Vec::new();
        while let Some(outgoing) = self.poll() {
            match outgoing {
                Outgoing::Control(header) => headers.push(header),
                Outgoing::Data { .. } => panic!("payload is asked for: {outgoing:?}"),
            }
        }
        headers
    }

    /// `n` bytes of the host end go into one packet to the guest, and there are `more` or not.
    fn host_sends(&mut self, id: ConnectionId, n: u32, more: bool) -> Header {
        match self.poll() {
            Some(Outgoing::Data { id: turn, limit }) if turn == id => assert!(n <= limit, "limit {limit}"),
            other => panic!("not the turn of {id:?}: {other:?}"),
        }
        let header = self
            .mux
            .data_header(id, n, Boundary::None)
            .expect("the connection exists");
        self.mux.host_read(self.now, id, n, more);
        header
    }

    fn state(&self, id: ConnectionId) -> Option<State> {
        self.mux.connection(id).map(|c| c.state())
    }

    fn held(&self, id: ConnectionId) -> u32 {
        self.mux.connection(id).expect("the connection exists").held()
    }

    fn room(&self, id: ConnectionId) -> u32 {
        self.mux.connection(id).expect("the connection exists").room()
    }

    /// The guest asks, nobody has answered.
    fn dialing(&mut self, flow: Flow) -> ConnectionId {
        assert_eq!(self.guest(flow.sends(Op::Request)), Disposition::Consumed);
        match self.events()[..] {
            [Event::Dial { id, key, .. }] if key == flow.key() => id,
            ref other => panic!("no dial: {other:?}"),
        }
    }

    /// The guest asks, the host answers.
    fn established(&mut self, flow: Flow) -> ConnectionId {
        let id = self.dialing(flow);
        assert!(self.mux.connected(self.now, id));
        assert_eq!(self.sent(), [flow.gets(Op::Response)]);
        id
    }

    /// The host asks, and the guest has seen it.
    fn requested(&mut self, guest_port: u32) -> (ConnectionId, Flow) {
        let id = self
            .mux
            .connect(self.now, Port(guest_port))
            .expect("there is room");
        let key = self.mux.connection(id).expect("just made").key();
        let flow = Flow::new(guest_port, key.peer_port.0);
        assert_eq!(self.sent(), [flow.gets(Op::Request)]);
        (id, flow)
    }

    /// The guest sends `n` bytes, which wait for the host end.
    fn guest_sends(&mut self, id: ConnectionId, flow: Flow, n: u32) {
        assert_eq!(
            self.guest(flow.sends_rw(n)),
            Disposition::Payload {
                id,
                len: n,
                boundary: Boundary::None
            }
        );
    }

    /// Nothing is left: no connection, packet, event, timer, or entry in a list.
    #[track_caller]
    fn assert_over(&mut self) {
        assert_eq!(self.events(), []);
        assert_eq!(self.poll(), None);
        assert!(self.mux.is_empty());
        assert_eq!(self.mux.poll_timeout(), None);
        assert_eq!(self.mux.len(), 0);
    }
}
