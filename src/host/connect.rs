//! Non-blocking connects, one at a time or as a race of several addresses.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tokio::io::Interest;

use super::HostStream;
use super::stream::{Kind, Transport, set_packet_options, set_tcp_options};
use crate::config::SocketType;
use crate::quota::Share;
use crate::sys::readiness::PolledFd;
use crate::sys::unix_socket::MAX_PATH;

/// How long an address may stay without an answer before the next one is tried beside it (RFC 8305 section 5).
pub(super) const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// A connect that was begun.
pub(super) enum Started {
    /// It is done.
    Connected(HostStream),
    /// The peer has not answered yet.
    Pending(Socket),
}

/// Begins to connect to `address`. Does not block, and needs no runtime.
///
/// On loopback, which is where most targets of a sidecar are, the handshake runs within the first `connect` call
/// although it says EINPROGRESS (the socket is locked until it returns; `inet_stream_connect` in net/ipv4/af_inet.c).
/// Hence the second call: it costs less than a registration with a poller and a turn of it, and is usually all there is.
pub(super) fn start_tcp(address: SocketAddr) -> io::Result<Started> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    set_tcp_options(&socket)?;
    if advance(&socket, address)? || advance(&socket, address)? {
        finish_tcp(socket, address).map(Started::Connected)
    } else {
        Ok(Started::Pending(socket))
    }
}

/// Connects to the unix socket at `path`, at once or not at all.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when the server's backlog is full; the kernel keeps no place in a queue for us. EPROTOTYPE
/// when the server's socket has another type.
pub(super) fn connect_unix(path: &Path, socket_type: SocketType) -> io::Result<HostStream> {
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        let text =
            format!("the path has {length} bytes and a unix socket's can have {MAX_PATH}; use a shorter one");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let (kind, system_type) = match socket_type {
        SocketType::Stream => (Kind::unix(socket_type), Type::STREAM),
        SocketType::Seqpacket => (Kind::unix(socket_type), Type::SEQPACKET),
    };
    let socket = Socket::new(Domain::UNIX, system_type.nonblocking(), None)?;
    if kind.packets {
        set_packet_options(&socket)?;
    }
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(HostStream::configured(socket, kind, path.display().to_string()))
}

/// Whether a datagram socket has `path`. Asking tells its owner nothing: such a connect only notes the address.
pub(super) fn is_datagram(path: &Path) -> bool {
    Socket::new(Domain::UNIX, Type::DGRAM.nonblocking(), None)
        .and_then(|socket| socket.connect(&SockAddr::unix(path)?))
        .is_ok()
}

/// Connects to the first of several addresses that answers: `pending` if there is one, then `addresses` in their order.
/// The next is tried when one has failed, or beside it after [`ATTEMPT_DELAY`]. Those that lose are closed.
///
/// `descriptor` is made as much as there are sockets, before there is one more. What cannot be had of it is no failure: the
/// next address is not tried beside the others then, only after one of them.
///
/// `None` when all have failed. `failed` is told of each failure as it happens, so that a caller which gives up
/// early has heard them.
pub(super) async fn race(
    pending: Option<(Socket, SocketAddr)>,
    addresses: &[SocketAddr],
    descriptor: &mut Option<Share>,
    mut failed: impl FnMut(SocketAddr, io::Error),
) -> Option<HostStream> {
    let mut attempts: Vec<Attempt> = Vec::new();
    let mut addresses = addresses.iter().copied();
    let mut next = pending.map(|(socket, address)| (Ok(Started::Pending(socket)), address));
    loop {
        let mut account_for = |sockets: usize| match descriptor.as_mut() {
            Some(descriptor) => descriptor.resize(sockets as u64),
            None => true,
        };
        if next.is_none() && addresses.len() > 0 && account_for(attempts.len() + 1) {
            next = addresses.next().map(|address| (start_tcp(address), address));
        }
        match next.take() {
            Some((Ok(Started::Connected(stream)), _)) => return Some(stream),
            Some((Ok(Started::Pending(socket)), address)) => match Attempt::new(socket, address) {
                Ok(attempt) => attempts.push(attempt),
                Err(error) => {
                    failed(address, error);
                    continue;
                }
            },
            Some((Err(error), address)) => {
                failed(address, error);
                continue;
            }
            None if attempts.is_empty() => return None,
            None => {}
        }
        tokio::select! {
            (address, outcome) = first(&mut attempts) => match outcome {
                Ok(stream) => return Some(stream),
                Err(error) => failed(address, error),
            },
            () = tokio::time::sleep(ATTEMPT_DELAY), if addresses.len() > 0 => {}
        }
    }
}

/// One address that has not answered yet.
struct Attempt {
    socket: PolledFd,
    address: SocketAddr,
}

impl Attempt {
    fn new(socket: Socket, address: SocketAddr) -> io::Result<Attempt> {
        Ok(Attempt {
            socket: PolledFd::new(socket.into(), Interest::WRITABLE)?,
            address,
        })
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket
            .poll_when_writable(cx, |fd| match advance(&SockRef::from(&fd), self.address)? {
                true => Ok(()),
                false => Err(io::ErrorKind::WouldBlock.into()),
            })
    }
}

/// Waits for the first of `attempts` to end, and takes it out. Never ends when there are none.
async fn first(attempts: &mut Vec<Attempt>) -> (SocketAddr, io::Result<HostStream>) {
    poll_fn(|cx| {
        for (index, attempt) in attempts.iter().enumerate() {
            if let Poll::Ready(outcome) = attempt.poll(cx) {
                let Attempt { socket, address } = attempts.swap_remove(index);
                let outcome = outcome.and_then(|()| finish_tcp(socket.into_inner().into(), address));
                return Poll::Ready((address, outcome));
            }
        }
        Poll::Pending
    })
    .await
}

/// Asks the kernel how the connect stands, by calling it again: `Ok(true)` is connected, `Ok(false)` not yet. Unlike
/// SO_ERROR it cannot mistake a spurious wake-up for success.
fn advance(socket: &Socket, address: SocketAddr) -> io::Result<bool> {
    match socket.connect(&address.into()) {
        Ok(()) => Ok(true),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::ISCONN) => Ok(true),
            Some(Errno::INPROGRESS | Errno::ALREADY | Errno::INTR) => Ok(false),
            _ => Err(error),
        },
    }
}

/// Makes a stream of a connected socket.
fn finish_tcp(socket: Socket, address: SocketAddr) -> io::Result<HostStream> {
    // A port from the ephemeral range on which nobody listens may be the very port the kernel chooses for our end. Then
    // TCP's simultaneous open connects the socket with itself: an echo server that is nobody's, and holds the port
    // against the real server that starts later.
    if address.port() >= 1024 && socket.local_addr()?.as_socket() == Some(address) {
        return Err(Errno::CONNREFUSED.into());
    }
    Ok(HostStream::configured(
        socket,
        Kind::stream(Transport::Tcp),
        address.to_string(),
    ))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_socket_connected_with_itself_is_refused() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket
            .bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into())
            .unwrap();
        let own = socket.local_addr().unwrap().as_socket().unwrap();
        socket.connect(&own.into()).expect("TCP allows it");
        assert_eq!(
            finish_tcp(socket, own).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
    }

    #[test]
    fn loopback_answers_without_a_poller() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let Started::Connected(stream) = start_tcp(address).unwrap() else {
            panic!("pending")
        };
        assert_eq!(stream.peer(), address.to_string());
        drop(listener);
        let error = start_tcp(address).err().expect("nobody listens");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
