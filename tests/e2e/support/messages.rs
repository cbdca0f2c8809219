//! Messages with boundaries: sequences that both ends know, packet sockets, and frames on streams.

use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};
use socket2::{Domain, SockAddr, Socket, Type};
use vsock_sidecar::embedded_guest::wait_readable;

use super::{Bytes, LONG};

/// Messages of 1 byte to `longest`, as many short ones as long ones on a logarithmic scale. Length, content and mark of each
/// follow from seed and number: a message that is lost, doubled, cut or glued to the next is none of the sequence.
pub struct Sequence {
    seed: u64,
    longest: usize,
    pool: Vec<u8>,
}

impl Sequence {
    pub fn new(seed: u64, longest: usize) -> Sequence {
        let pool = Bytes::new(seed).take(longest + 65_536);
        Sequence { seed, longest, pool }
    }

    /// Bytes, and whether it ends a record.
    pub fn message(&self, number: usize) -> (&[u8], bool) {
        // splitmix64
        let mut hash = (self.seed << 32 ^ number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash ^= hash >> 27;
        let len = match number % 100 {
            0 => self.longest,
            1 => 1,
            _ => {
                let most = self.longest >> (hash % u64::from(self.longest.ilog2() + 1));
                1 + (hash >> 8) as usize % most
            }
        };
        let at = (hash >> 40) as usize % (self.pool.len() - len);
        (&self.pool[at..at + len], hash >> 7 & 1 == 1)
    }
}

/// A unix SOCK_SEQPACKET socket that listens.
pub struct PacketListener {
    socket: Socket,
}

impl PacketListener {
    pub fn bind(path: &Path) -> PacketListener {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        socket.bind(&SockAddr::unix(path).unwrap()).unwrap();
        socket.listen(128).unwrap();
        PacketListener { socket }
    }

    #[track_caller]
    pub fn accept(&self) -> Packets {
        let deadline = Instant::now() + LONG;
        assert!(
            wait_readable(&[self.socket.as_fd()], Some(deadline)).unwrap(),
            "no connection came"
        );
        Packets::new(self.socket.accept().unwrap().0)
    }

    /// Whether nobody has connected.
    pub fn is_idle(&self) -> bool {
        !wait_readable(&[self.socket.as_fd()], Some(Instant::now())).unwrap()
    }
}

/// A connected unix SOCK_SEQPACKET socket. Gives up after [`LONG`].
pub struct Packets {
    socket: Socket,
}

impl Packets {
    pub fn connect(path: &Path) -> Packets {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        socket.connect(&SockAddr::unix(path).unwrap()).unwrap();
        Packets::new(socket)
    }

    fn new(socket: Socket) -> Packets {
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket.set_write_timeout(Some(LONG)).unwrap();
        // A message must fit, with what the kernel puts around it.
        socket.set_send_buffer_size(1 << 20).unwrap();
        // Every message says who sent it, and only the end says nothing: so empty messages are told from it.
        socket.set_passcred(true).unwrap();
        Packets { socket }
    }

    #[track_caller]
    pub fn send(&self, message: &[u8]) {
        assert_eq!(self.socket.send(message).unwrap(), message.len());
    }

    /// The next message; `None` at the end, of whatever kind.
    #[track_caller]
    pub fn recv(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 512 * 1024];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::empty(),
        );
        let len = match got {
            Ok(message) => message.bytes,
            Err(error) if error == rustix::io::Errno::CONNRESET => return None,
            Err(error) => panic!("{error}"),
        };
        if len == 0 && control.drain().next().is_none() {
            return None;
        }
        bytes.truncate(len);
        Some(bytes)
    }

    pub fn finish(&self) {
        self.socket.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// A handle for another thread.
    pub fn another(&self) -> Packets {
        Packets {
            socket: self.socket.try_clone().unwrap(),
        }
    }
}

/// Sends back every message until the end, then ends.
pub fn echo_packets(packets: &Packets) {
    while let Some(message) = packets.recv() {
        packets.send(&message);
    }
    packets.finish();
}

/// A message behind its length, a u32 in network byte order.
pub fn frame(message: &[u8]) -> Vec<u8> {
    let mut frame = (message.len() as u32).to_be_bytes().to_vec();
    frame.extend_from_slice(message);
    frame
}

/// The message of the next frame; `None` at the end between two frames. Panics at an end within one.
#[track_caller]
pub fn read_frame(mut from: impl Read) -> Option<Vec<u8>> {
    let mut header = [0; 4];
    match from.read(&mut header) {
        Ok(0) => return None,
        Ok(n) => from.read_exact(&mut header[n..]).expect("the rest of a length"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
        Err(error) => panic!("{error}"),
    }
    let mut message = vec![0; u32::from_be_bytes(header) as usize];
    from.read_exact(&mut message).expect("the rest of a frame");
    Some(message)
}

/// Sends back every frame until the end, then ends.
pub fn echo_frames(mut stream: impl super::Service) {
    stream.patient();
    while let Some(message) = read_frame(&mut stream) {
        if stream.write_all(&frame(&message)).is_err() {
            return;
        }
    }
    Write::flush(&mut stream).unwrap();
    stream.shutdown(std::net::Shutdown::Write);
}
