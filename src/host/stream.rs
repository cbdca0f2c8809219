//! One connected host socket, non-blocking.
//!
//! The device thread registers the descriptor once, edge-triggered, and moves payload with vectored calls straight
//! from and to guest memory (`sys`); what is here is everything else that happens to a socket in its life.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use socket2::{Domain, SockAddr, Socket, TcpKeepalive};

/// A TCP connection on which nothing moves is probed after this time ...
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// ... and then this often ...
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// ... and is dead after so many probes without an answer: a peer that vanished is noticed after two minutes.
const KEEPALIVE_PROBES: u32 = 4;

/// A connected, non-blocking host socket (TCP or unix).
///
/// Owns its descriptor: dropping it closes the connection in order (FIN), [`HostStream::abort`] resets it.
#[derive(Debug)]
pub struct HostStream {
    socket: Socket,
    /// Decided by the socket's domain: reset and keep-alive exist for TCP only.
    tcp: bool,
    /// The other end, for the log. Asked for while the peer is surely there: `getpeername` fails after a reset.
    peer: Box<str>,
}

impl HostStream {
    /// Takes a connected stream socket: makes it non-blocking and, if it is TCP, sets TCP_NODELAY and keep-alive.
    ///
    /// TCP_NODELAY because the guest has decided what a segment is: what we hold back it cannot hurry.
    ///
    /// # Errors
    /// Those of the socket options, and ENOTCONN when the peer has reset the connection already.
    pub fn new(socket: Socket) -> io::Result<HostStream> {
        socket.set_nonblocking(true)?;
        let tcp = socket.domain()? != Domain::UNIX;
        if tcp {
            set_tcp_options(&socket)?;
        }
        let peer = describe(&socket.peer_addr()?);
        Ok(HostStream::configured(socket, tcp, peer))
    }

    /// Takes a connected socket that already is as [`HostStream::new`] would make it; costs no system call.
    pub(super) fn configured(socket: Socket, tcp: bool, peer: String) -> HostStream {
        HostStream {
            socket,
            tcp,
            peer: peer.into_boxed_str(),
        }
    }

    /// Takes a connected socket of a pair, whose peer has no name that a log could show.
    ///
    /// # Errors
    /// As [`HostStream::new`].
    pub fn named(socket: Socket, peer: &str) -> io::Result<HostStream> {
        socket.set_nonblocking(true)?;
        Ok(HostStream::configured(socket, false, peer.to_owned()))
    }

    /// Reads what is there; 0 is the end of the peer's stream.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is nothing to read; else the socket has failed.
    pub fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        retry_on_intr(|| rustix::net::recv(&self.socket, &mut *into, RecvFlags::empty()))
            .map(|(taken, _)| taken)
            .map_err(io::Error::from)
    }

    /// Whether [`HostStream::read`] would give bytes now; they stay where they are.
    pub fn has_bytes(&self) -> bool {
        let mut byte = [0];
        let peeked = retry_on_intr(|| rustix::net::recv(&self.socket, &mut byte[..], RecvFlags::PEEK));
        matches!(peeked, Ok((taken, _)) if taken > 0)
    }

    /// Writes as much as the socket takes. A peer that is gone is EPIPE here, never SIGPIPE.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when nothing could be taken; else the socket has failed.
    pub fn write(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        retry_on_intr(|| {
            let mut no_descriptors = SendAncillaryBuffer::default();
            rustix::net::sendmsg(&self.socket, from, &mut no_descriptors, SendFlags::NOSIGNAL)
        })
        .map_err(io::Error::from)
    }

    /// Sends a message to a packet socket: whole, or not at all.
    pub fn send_packet(&self, from: &[IoSlice<'_>]) -> io::Result<()> {
        self.write(from).map(|_| ())
    }

    /// Takes the next message of a packet socket, of at most `most` bytes.
    pub fn receive_packet(&self, into: &mut Vec<u8>, most: usize) -> io::Result<Packet> {
        into.resize(most, 0);
        let n = self.read(into)?;
        into.truncate(n);
        Ok(if n == 0 { Packet::End } else { Packet::Message })
    }

    /// Ends our half of the stream: the peer reads the end after all that was written.
    ///
    /// # Errors
    /// None that a connected socket can cause: a connection that is gone counts as shut.
    pub fn shutdown_write(&self) -> io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }

    /// Takes nothing more from the peer. A unix peer that writes gets EPIPE. For TCP this is local only: the peer is not
    /// told, and once the receive buffer is full (nobody reads it any more) its writes block, as with any program that
    /// calls `shutdown(SHUT_RD)`.
    ///
    /// # Errors
    /// As [`HostStream::shutdown_write`].
    pub fn shutdown_read(&self) -> io::Result<()> {
        self.shutdown(std::net::Shutdown::Read)
    }

    /// Ends the connection at once: a TCP peer sees a reset (RST), what was not sent yet is dropped. A unix peer sees
    /// the end of the stream, or ECONNRESET if it had sent bytes that we did not read.
    pub fn abort(self) {
        if self.tcp {
            // Linger time zero turns close() into a reset (tcp_close in net/ipv4/tcp.c). If it cannot be set the
            // close below still ends the connection, only more politely than was asked for.
            let _ = self.socket.set_linger(Some(Duration::ZERO));
        }
    }

    /// The error that is pending on the socket, which is cleared by asking (SO_ERROR).
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.socket.take_error()
    }

    /// The other end when the connection was made, for logs: an address and port, or a path.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether this is TCP; otherwise it is a unix stream socket.
    pub fn is_tcp(&self) -> bool {
        self.tcp
    }

    /// The descriptor and what is needed to put it together again.
    pub(super) fn into_parts(self) -> (Socket, bool, String) {
        (self.socket, self.tcp, self.peer.into_string())
    }

    fn shutdown(&self, how: std::net::Shutdown) -> io::Result<()> {
        match self.socket.shutdown(how) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done,
        }
    }
}

impl AsFd for HostStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for HostStream {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// What [`HostStream::receive_packet`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Packet {
    /// A message, whole.
    Message,
    /// A message longer than asked for.
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// The peer sends nothing more.
    End,
}

/// TCP_NODELAY and keep-alive. Accepted sockets inherit both from their listener (tcp(7); a test holds it), so that
/// they cost nothing for each connection there.
pub(super) fn set_tcp_options(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )
}

/// An address for the log.
fn describe(address: &SockAddr) -> String {
    if let Some(address) = address.as_socket() {
        address.to_string()
    } else if let Some(path) = address.as_pathname() {
        path.display().to_string()
    } else {
        "unix socket without a name".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn tcp_pair() -> (HostStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        (HostStream::new(ours.into()).unwrap(), theirs)
    }

    fn unix_pair() -> (HostStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (HostStream::new(ours.into()).unwrap(), theirs)
    }

    #[test]
    fn a_tcp_stream_is_non_blocking_without_delay_and_kept_alive() {
        let (stream, theirs) = tcp_pair();
        assert!(stream.is_tcp());
        assert_eq!(stream.peer(), theirs.local_addr().unwrap().to_string());
        assert!(stream.socket.nonblocking().unwrap());
        assert!(stream.socket.tcp_nodelay().unwrap());
        assert!(stream.socket.keepalive().unwrap());
        assert_eq!(stream.socket.tcp_keepalive_time().unwrap(), KEEPALIVE_IDLE);
        assert_eq!(
            stream.socket.tcp_keepalive_interval().unwrap(),
            KEEPALIVE_INTERVAL
        );
        assert_eq!(stream.socket.tcp_keepalive_retries().unwrap(), KEEPALIVE_PROBES);
        assert_eq!(
            stream.read(&mut [0; 8]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }

    #[test]
    fn a_unix_stream_is_non_blocking_and_has_no_tcp_options() {
        let (stream, _theirs) = unix_pair();
        assert!(!stream.is_tcp());
        assert_eq!(stream.peer(), "unix socket without a name");
        assert_eq!(
            stream.read(&mut [0; 8]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }

    #[test]
    fn bytes_go_both_ways_and_each_half_ends_alone() {
        for (stream, mut theirs) in [boxed(tcp_pair()), boxed(unix_pair())] {
            assert_eq!(
                stream
                    .write(&[IoSlice::new(b"to "), IoSlice::new(b"peer")])
                    .unwrap(),
                7
            );
            stream.shutdown_write().unwrap();
            let mut got = String::new();
            theirs.read_to_string(&mut got).unwrap();
            assert_eq!(got, "to peer");
            // Our half is over, theirs is not.
            theirs.write_all(b"back").unwrap();
            drop(theirs);
            let mut got = Vec::new();
            let mut buffer = [0; 3];
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => got.extend_from_slice(&buffer[..n]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
            }
            assert_eq!(got, b"back");
        }
    }

    #[test]
    fn abort_resets_a_tcp_peer() {
        let (stream, mut theirs) = tcp_pair();
        stream.abort();
        let error = theirs.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn dropping_ends_a_tcp_stream_in_order() {
        let (stream, mut theirs) = tcp_pair();
        stream.write(&[IoSlice::new(b"bye")]).unwrap();
        drop(stream);
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"bye");
    }

    #[test]
    fn abort_ends_a_unix_stream() {
        let (stream, mut theirs) = unix_pair();
        stream.abort();
        assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn a_peer_that_is_gone_is_an_error_and_shutting_it_down_is_not() {
        let (stream, theirs) = tcp_pair();
        HostStream::new(theirs.into()).unwrap().abort();
        let mut pollfd = [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut pollfd, None).unwrap();
        let pending = stream.take_error().unwrap().map(|error| error.kind());
        assert_eq!(pending, Some(io::ErrorKind::ConnectionReset));
        assert_eq!(
            stream.write(&[IoSlice::new(b"x")]).unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        stream.shutdown_write().unwrap();
        stream.shutdown_read().unwrap();
    }

    trait Peer: Read + Write {}
    impl<T: Read + Write> Peer for T {}

    fn boxed<T: Peer + 'static>((stream, peer): (HostStream, T)) -> (HostStream, Box<dyn Peer>) {
        (stream, Box::new(peer))
    }
}
