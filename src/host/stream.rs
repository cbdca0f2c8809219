//! One connected host socket, non-blocking.
//!
//! The device thread registers the descriptor once, edge-triggered, and moves payload with vectored calls straight
//! from and to guest memory (`sys`); what is here is everything else that happens to a socket in its life.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};

use super::af_vsock;
use crate::config::SocketType;
use crate::quota::Share;
use crate::sys::packet;

/// A TCP connection on which nothing moves is probed after this time ...
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// ... and then this often ...
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// ... and is dead after so many probes without an answer: a peer that vanished is noticed after two minutes.
const KEEPALIVE_PROBES: u32 = 4;

/// The longest message, in bytes, that every packet socket is to take: the default of `limits.buffer`.
const USUAL_PACKET: usize = 256 * 1024;

/// What carries the bytes of a [`HostStream`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// A unix socket.
    Unix,
    /// AF_VSOCK, as this host has it.
    Vsock,
}

/// What kind of socket a [`HostStream`] is. Never changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Kind {
    pub(super) transport: Transport,
    /// SOCK_SEQPACKET: whole messages, by [`HostStream::send_packet`] and [`HostStream::receive_packet`].
    pub(super) packets: bool,
}

impl Kind {
    /// A stream of bytes.
    pub(super) const fn stream(transport: Transport) -> Kind {
        Kind {
            transport,
            packets: false,
        }
    }

    /// A unix socket of this type.
    pub(super) fn unix(socket_type: SocketType) -> Kind {
        Kind {
            transport: Transport::Unix,
            packets: socket_type == SocketType::Seqpacket,
        }
    }
}

/// What [`HostStream::receive_packet`] found.
#[must_use = "the end of the stream is among them"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Packet {
    /// A message, whole; possibly an empty one.
    Message,
    /// A message longer than asked for. It is gone: nothing of it was kept, and the next message is the next.
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// The peer sends nothing more.
    End,
}

/// A connected, non-blocking host socket.
///
/// Owns its descriptor: dropping it closes the connection in order (FIN), [`HostStream::abort`] resets it.
#[derive(Debug)]
pub struct HostStream {
    socket: Socket,
    /// Reset and keep-alive exist for TCP only, messages for packet sockets.
    kind: Kind,
    /// The other end, for the log. Asked for while the peer is surely there: `getpeername` fails after a reset.
    peer: Box<str>,
    /// A packet socket's peer has reset the connection, and messages that it sent before are still to be read.
    reset: Cell<bool>,
    /// Its part of the process's descriptors, given back after `socket` is closed: fields are dropped in order.
    descriptor: Option<Share>,
}

impl HostStream {
    /// Takes a connected socket: makes it non-blocking, sets TCP_NODELAY and keep-alive if it is TCP, and what
    /// [`HostStream::receive_packet`] needs if it is SOCK_SEQPACKET.
    ///
    /// TCP_NODELAY because the guest has decided what a segment is: what we hold back it cannot hurry.
    ///
    /// # Errors
    /// Those of the socket options, and ENOTCONN when the peer has reset the connection already.
    pub fn new(socket: Socket) -> io::Result<HostStream> {
        socket.set_nonblocking(true)?;
        let transport = match socket.domain()? {
            Domain::UNIX => Transport::Unix,
            Domain::VSOCK => Transport::Vsock,
            _ => Transport::Tcp,
        };
        let kind = Kind {
            transport,
            packets: socket.r#type()? == Type::SEQPACKET,
        };
        if transport == Transport::Tcp {
            set_tcp_options(&socket)?;
        }
        if kind.packets {
            set_packet_options(&socket)?;
        }
        let peer = describe(&socket.peer_addr()?);
        Ok(HostStream::configured(socket, kind, peer))
    }

    /// Takes a connected socket that already is as [`HostStream::new`] would make it; costs no system call.
    pub(super) fn configured(socket: Socket, kind: Kind, peer: String) -> HostStream {
        HostStream {
            socket,
            kind,
            peer: peer.into_boxed_str(),
            reset: Cell::new(false),
            descriptor: None,
        }
    }

    /// Accounts for its descriptor, for as long as that is open.
    pub fn hold(&mut self, descriptor: Share) {
        self.descriptor = Some(descriptor);
    }

    /// The same under another name, where the socket's own says nothing: one end of a pair.
    pub fn with_peer(self, peer: String) -> HostStream {
        HostStream {
            peer: peer.into_boxed_str(),
            ..self
        }
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

    /// Whether [`HostStream::read`] would give bytes now, or [`HostStream::receive_packet`] a message that is not empty;
    /// they stay where they are.
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

    /// Sends one message over a packet socket, whole or not at all: when the socket takes no more (writable again when
    /// it has room), nothing was sent. No bytes are a message as well. A peer that is gone is EPIPE here, never SIGPIPE.
    ///
    /// The kernel wants room for the message and 32 bytes in the send buffer (`unix_dgram_sendmsg` in
    /// net/unix/af_unix.c) and doubles what SO_SNDBUF asks for, up to net.core.wmem_max: with the usual 212992 of that,
    /// messages of 425952 bytes fit. `sys::vectored::writev` from guest memory sends a message in the same way, but for
    /// those longer than 256 KiB, for which only this makes room.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is no room now; EMSGSIZE when there never will be, or when there are
    /// more than 1024 slices; ENOBUFS when the kernel finds no memory for the message, most of which it wants in one
    /// piece; else the socket has failed.
    pub fn send_packet(&self, from: &[IoSlice<'_>]) -> io::Result<()> {
        let sent = match self.write(from) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::MSGSIZE) => {
                // Not at set-up for all: it would let every peer that stalls hold as much.
                let wanted: usize = from.iter().map(|slice| slice.len()).sum();
                if rustix::net::sockopt::set_socket_send_buffer_size(&self.socket, wanted).is_err() {
                    return Err(error);
                }
                self.write(from)
            }
            other => other,
        };
        sent.map(|_| ())
    }

    /// Receives one message over a packet socket into `into`, which is cleared first and has the whole message if the
    /// outcome says so, nothing else. Descriptors that came with it are closed.
    ///
    /// `into` gets room for `most` bytes, of which only those of messages are ever touched: one buffer serves all
    /// sockets of a thread.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is no message, [`io::ErrorKind::OutOfMemory`] when there is none for
    /// `most` bytes; else the socket has failed, and all messages that came before were given out.
    pub fn receive_packet(&self, into: &mut Vec<u8>, most: usize) -> io::Result<Packet> {
        let mut received = packet::receive(self.socket.as_fd(), into, most);
        // A peer that closes without having read all is an error that the kernel tells ahead of the messages it had sent
        // (`__skb_try_recv_datagram` in net/core/datagram.c), and once: they come after it. A stream tells it last.
        if is_reset(&received) {
            self.reset.set(true);
            received = packet::receive(self.socket.as_fd(), into, most);
        }
        match received? {
            None if self.reset.get() => Err(Errno::CONNRESET.into()),
            None => Ok(Packet::End),
            Some(len) if len > most => Ok(Packet::TooLong { len }),
            Some(_) => Ok(Packet::Message),
        }
    }

    /// Takes nothing more from the peer of a packet socket, and throws away what it has sent: before an orderly close. A close
    /// with messages unread is a reset to the peer, which its kernel tells it ahead of the messages that we have sent and not
    /// behind them, as with a stream (see [`HostStream::receive_packet`]). Other sockets are left alone.
    pub fn forget_packets(&self) {
        if !self.kind.packets || self.shutdown_read().is_err() {
            return;
        }
        let mut none = Vec::new();
        // No more can come, so this ends.
        while matches!(
            self.receive_packet(&mut none, 0),
            Ok(Packet::Message | Packet::TooLong { .. })
        ) {}
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
    /// the end of the stream, or ECONNRESET if it had sent bytes that we did not read; an AF_VSOCK peer the end of the
    /// stream, since that family cannot be told to reset (`__vsock_release` in net/vmw_vsock/af_vsock.c).
    pub fn abort(self) {
        if self.is_tcp() {
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

    /// Whether this is TCP: closing it needs care for what the peer still sends.
    pub fn is_tcp(&self) -> bool {
        self.kind.transport == Transport::Tcp
    }

    /// What carries the bytes.
    pub fn transport(&self) -> Transport {
        self.kind.transport
    }

    /// Whether this is SOCK_SEQPACKET: for [`HostStream::send_packet`] and [`HostStream::receive_packet`], while reads
    /// and writes of bytes would cut messages and join none.
    pub fn is_packet(&self) -> bool {
        self.kind.packets
    }

    /// The descriptor and what is needed to put it together again.
    pub(super) fn into_parts(self) -> (Socket, Kind, String) {
        (self.socket, self.kind, self.peer.into_string())
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

/// Room for the usual messages, and empty ones told from the end. Accepted sockets inherit neither (`unix_create1`).
pub(super) fn set_packet_options(socket: &impl AsFd) -> io::Result<()> {
    packet::mark_messages(socket.as_fd())?;
    // The kernel takes what net.core.wmem_max allows and fails for no value. What is too long then is EMSGSIZE when it is
    // sent: most connections never send such a message.
    rustix::net::sockopt::set_socket_send_buffer_size(socket, USUAL_PACKET).map_err(io::Error::from)
}

fn is_reset<T>(outcome: &io::Result<T>) -> bool {
    matches!(outcome, Err(error) if error.kind() == io::ErrorKind::ConnectionReset)
}

/// An address for the log.
fn describe(address: &SockAddr) -> String {
    if let Some(address) = address.as_socket() {
        address.to_string()
    } else if let Some(path) = address.as_pathname() {
        path.display().to_string()
    } else if let Some((cid, port)) = address.as_vsock_address() {
        af_vsock::label(cid, port)
    } else {
        "unix socket without a name".to_owned()
    }
}

#[cfg(test)]
mod tests;
