//! Where tricks are played: a sidecar, the services behind it, and the guest that does no wrong.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType};

use crate::support::{Sidecar, accept_tcp, echo, free_port, serve};
use crate::witnesses::Witnesses;

/// CID of the hostile guest.
pub const GUEST: u64 = 3;
/// CID of the one that does no wrong.
pub const OTHER: u64 = 4;
/// Port whose service sends back what it gets.
pub const ECHO: u32 = 7;
/// Port whose service is not there.
pub const CLOSED: u32 = 8;
/// Port without a rule.
pub const NO_RULE: u32 = 9;
/// Port whose service accepts and reads nothing.
pub const STALLED: u32 = 10;
/// Port whose service never accepts: a dial takes its whole time.
pub const HOLE: u32 = 11;
/// Port whose service sends without end.
pub const SOURCE: u32 = 12;
/// The guest's port to which clients of `plain.sock` are led.
pub const SERVED: u32 = 52;
/// Connections that the hostile guest may have.
pub const LIMIT: u32 = 256;
/// Bytes that the sidecar takes for a connection whose service stalls.
pub const BUFFER: u32 = 64 * 1024;

/// All of it.
pub struct Stage {
    /// Declared first: the witnesses end before their sidecar.
    pub witnesses: Witnesses,
    pub sidecar: Sidecar,
    stalled: TcpListener,
    /// A listener with a full queue.
    _hole: (TcpListener, Vec<TcpStream>),
}

impl Stage {
    pub fn set() -> Stage {
        let echo_port = serve(echo);
        let source = serve(endless);
        let stalled = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let hole = hole();
        let sidecar = Sidecar::start(&format!(
            "guests:\n- name: web\n  cid: {GUEST}\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
             - {{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{echo_port}\"}}\n  \
             - {{name: closed, port: {CLOSED}, to: \"tcp://127.0.0.1:{}\"}}\n  \
             - {{name: stalled, port: {STALLED}, to: \"tcp://{}\"}}\n  \
             - {{name: hole, port: {HOLE}, to: \"tcp://{}\"}}\n  \
             - {{name: source, port: {SOURCE}, to: \"tcp://127.0.0.1:{source}\"}}\n  inbound:\n  \
             - {{name: plain, listen: \"unix://{{dir}}/plain.sock\", port: {SERVED}}}\n  \
             - {{name: mux, listen: \"unix://{{dir}}/mux.sock\", protocol: connect}}\n  \
             limits: {{connections: {LIMIT}, buffer: 64KiB, connectTimeout: 1500ms, guestTimeout: 2s}}\n\
             - name: other\n  cid: {OTHER}\n  vhostUser: {{socket: \"{{dir}}/other.sock\"}}\n  \
             outbound: [{{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{echo_port}\"}}]\n",
            free_port(),
            stalled.local_addr().unwrap(),
            hole.0.local_addr().unwrap(),
        ));
        let witnesses = Witnesses::begin(&sidecar.path("other.sock"), ECHO);
        Stage {
            witnesses,
            sidecar,
            stalled,
            _hole: hole,
        }
    }

    /// The service's end of a connection to [`STALLED`].
    #[track_caller]
    pub fn stalled_service(&self) -> TcpStream {
        accept_tcp(&self.stalled)
    }
}

/// A listener that takes nobody: its queue is full.
fn hole() -> (TcpListener, Vec<TcpStream>) {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let listener = TcpListener::from(socket);
    let addr = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&addr, Duration::from_millis(200)) {
        queued.push(stream);
    }
    (listener, queued)
}

/// Sends for as long as somebody takes it, or until the other end says something.
fn endless(mut stream: TcpStream) {
    let mut peek = stream.try_clone().unwrap();
    let closer = std::thread::spawn(move || {
        let _ = peek.read(&mut [0; 1]);
        let _ = peek.shutdown(std::net::Shutdown::Both);
    });
    while stream.write_all(&[0x55; 16 * 1024]).is_ok() {}
    let _ = closer.join();
}
