//! Where tricks are played: a sidecar, the services behind it, and the guest that does no wrong.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType};

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
/// Port whose service is a packet socket that sends messages back.
pub const PACKETS: u32 = 20;
/// Port whose service is a packet socket that accepts and reads nothing.
pub const MUTE: u32 = 21;
/// Port whose service sends back frames.
pub const FRAMES: u32 = 22;
/// Port whose service accepts frames and reads nothing.
pub const STALLED_FRAMES: u32 = 23;
/// Port whose service sends a frame of 4 GiB.
pub const LIAR: u32 = 24;
/// Port whose service sends half a frame and closes.
pub const BROKEN: u32 = 25;
/// Port on which the guest that does no wrong sends back what it gets.
pub const PEER: u32 = 9000;
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
    /// Where the packet sockets are.
    _dir: tempfile::TempDir,
    mute: OwnedFd,
}

impl Stage {
    pub fn set() -> Stage {
        let echo_port = serve(echo);
        let source = serve(endless);
        let stalled = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let hole = hole();
        let dir = tempfile::tempdir().unwrap();
        let packets = packet_listener(&dir.path().join("packets"));
        std::thread::spawn(move || serve_packets(&packets));
        let mute = packet_listener(&dir.path().join("mute"));
        let liar = serve(|mut stream| {
            let _ = stream.write_all(&[0xff; 1000]);
            let _ = stream.read(&mut [0]);
        });
        let broken = serve(|mut stream| {
            let _ = stream.write_all(&[0, 0, 1, 0, b'h', b'a', b'l', b'f']);
        });
        let sidecar = Sidecar::start(&format!(
            "guests:\n- name: web\n  cid: {GUEST}\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
             - {{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{echo_port}\"}}\n  \
             - {{name: closed, port: {CLOSED}, to: \"tcp://127.0.0.1:{}\"}}\n  \
             - {{name: stalled, port: {STALLED}, to: \"tcp://{}\"}}\n  \
             - {{name: hole, port: {HOLE}, to: \"tcp://{}\"}}\n  \
             - {{name: source, port: {SOURCE}, to: \"tcp://127.0.0.1:{source}\"}}\n  \
             - {{name: packets, port: {PACKETS}, to: \"unix://{here}/packets\"}}\n  \
             - {{name: mute, port: {MUTE}, to: \"unix://{here}/mute\"}}\n  \
             - {{name: frames, port: {FRAMES}, to: \"tcp://127.0.0.1:{echo_port}\", framing: length-prefixed}}\n  \
             - {{name: stalled-frames, port: {STALLED_FRAMES}, to: \"tcp://{}\", framing: length-prefixed}}\n  \
             - {{name: liar, port: {LIAR}, to: \"tcp://127.0.0.1:{liar}\", framing: length-prefixed}}\n  \
             - {{name: broken, port: {BROKEN}, to: \"tcp://127.0.0.1:{broken}\", framing: length-prefixed}}\n  \
             - {{name: peer, port: {PEER}, to: \"guest://other\"}}\n  inbound:\n  \
             - {{name: plain, listen: \"unix://{{dir}}/plain.sock\", port: {SERVED}}}\n  \
             - {{name: mux, listen: \"unix://{{dir}}/mux.sock\", protocol: connect}}\n  \
             limits: {{connections: {LIMIT}, buffer: 64KiB, connectTimeout: 1500ms, guestTimeout: 2s}}\n\
             - name: other\n  cid: {OTHER}\n  vhostUser: {{socket: \"{{dir}}/other.sock\"}}\n  \
             outbound: [{{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{echo_port}\"}}]\n",
            free_port(),
            stalled.local_addr().unwrap(),
            hole.0.local_addr().unwrap(),
            stalled.local_addr().unwrap(),
            here = dir.path().display(),
        ));
        let witnesses = Witnesses::begin(&sidecar.path("other.sock"), ECHO, PEER);
        Stage {
            witnesses,
            sidecar,
            stalled,
            _hole: hole,
            _dir: dir,
            mute,
        }
    }

    /// The service's end of a connection to [`STALLED`].
    #[track_caller]
    pub fn stalled_service(&self) -> TcpStream {
        accept_tcp(&self.stalled)
    }

    /// The service's end of a connection to [`MUTE`].
    pub fn mute_service(&self) -> OwnedFd {
        rustix::net::accept(&self.mute).unwrap()
    }
}

/// A listener of SOCK_SEQPACKET.
fn packet_listener(path: &Path) -> OwnedFd {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, 64).unwrap();
    socket
}

/// Sends every message back to who sent it, each client on a thread.
fn serve_packets(listener: &OwnedFd) {
    while let Ok(client) = rustix::net::accept(listener) {
        std::thread::spawn(move || {
            let mut room = vec![0; 1 << 20];
            while let Ok((count, _)) = rustix::net::recv(&client, &mut room[..], RecvFlags::empty()) {
                if count == 0 || rustix::net::send(&client, &room[..count], SendFlags::NOSIGNAL).is_err() {
                    break;
                }
            }
        });
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
