//! Listeners of inbound rules.
//!
//! Bound before the program says it is ready, so that a taken port is an error at start; served by one task each on the
//! control runtime, which hands every client to a sink as soon as its guest port is known. On which terms ([`Terms`]) may change
//! while a listener is served: a reload that changes a rule closes no socket.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::SocketFlags;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::HostStream;
use super::af_vsock;
use super::handshake::{ConnectLine, Wanted};
use super::stream::{Kind, Transport, set_packet_options, set_tcp_options};
use crate::config::{Cidr, Framing, InboundProtocol, ListenAddress, SocketType};
use crate::quota::{Pool, Share};
use crate::sys::readiness::PolledFd;
use crate::sys::unix_socket::{self, BindError, SocketGuard};

pub use super::handshake::{MAX_LINE, Rejection};

/// Connections the kernel completes before we accept them; it takes less if net.core.somaxconn says so.
pub(super) const BACKLOG: i32 = 1024;

/// Clients of one `protocol: connect` listener that have not sent their line yet. One more, and the oldest goes: who means it
/// sends the line at once, so the oldest is the least likely to.
pub const MAX_HANDSHAKES: usize = 1024;

/// Owner and group may connect to a unix listener.
const UNIX_MODE: u32 = 0o660;

/// A client of an inbound listener that wants to reach a guest port.
#[derive(Debug)]
pub struct Incoming {
    /// Port in the guest.
    pub port: u32,
    /// The client's socket.
    pub stream: HostStream,
    /// Bytes the client already sent that belong to the guest (they came with the CONNECT line), at most 1 KiB.
    pub preface: Vec<u8>,
    /// Whether the client waits for `OK <port>\n`.
    pub wants_ok: bool,
    /// Whether it waits for a guest that does not listen yet.
    pub wait_for_guest: bool,
    /// The type of the connection that the guest gets.
    pub socket_type: SocketType,
    /// Set: the client's messages come in frames on a stream of bytes.
    pub framing: Option<Framing>,
    /// The client, for the log: an address, or a unix path.
    pub peer: String,
}

/// A client that was closed before the guest heard of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejected {
    /// The client, as [`Incoming::peer`].
    pub peer: String,
    /// Why.
    pub why: Rejection,
}

/// On which terms a listener takes clients. They may be replaced while it is served: who was accepted before keeps those that
/// were in force then, to its end.
pub struct Terms {
    /// Peers that are let in, by their IP address; empty means all. A peer without an IP address is in no range.
    pub allow: Vec<Cidr>,
    /// What clients get.
    pub spec: InboundSpec,
    /// Where they go; called on the control runtime, and must not block.
    pub sink: Sink,
}

/// Where clients of a listener go.
pub type Sink = Box<dyn Fn(Result<Incoming, Rejected>) + Send + Sync>;

impl Terms {
    fn tell(&self, outcome: Result<Incoming, Rejected>) {
        if let Err(Rejected { peer, why }) = &outcome {
            tracing::debug!(peer, %why, "closed an inbound client");
        }
        (self.sink)(outcome);
    }
}

impl fmt::Debug for Terms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Terms")
            .field("allow", &self.allow)
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

/// What the clients of a listener get.
#[derive(Clone, Copy, Debug)]
pub struct InboundSpec {
    /// How the guest port is found.
    pub protocol: InboundProtocol,
    /// Time for the CONNECT line, from accept to newline.
    pub handshake_timeout: Duration,
    /// Whether clients wait for a guest that does not listen yet.
    pub wait_for_guest: bool,
    /// The type of the connections that the guest gets.
    pub socket_type: SocketType,
    /// Set: the client's messages come in frames on a stream of bytes.
    pub framing: Option<Framing>,
}

/// Why a listener could not be bound. Every message names the address and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A unix socket; see there.
    #[error(transparent)]
    Unix(#[from] BindError),
    /// EADDRINUSE.
    #[error(
        "cannot listen on tcp://{address}: another socket listens there; stop its process or choose another port"
    )]
    InUse {
        /// The address.
        address: SocketAddr,
    },
    /// EADDRNOTAVAIL.
    #[error(
        "cannot listen on tcp://{address}: no interface has this address; choose one of this host's or pod's, \
         or 0.0.0.0 or [::] for all of them"
    )]
    NotLocal {
        /// The address.
        address: SocketAddr,
    },
    /// EACCES, EPERM.
    #[error(
        "cannot listen on tcp://{address}: {source}; ports below 1024 need CAP_NET_BIND_SERVICE, choose a higher one"
    )]
    Denied {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: io::Error,
    },
    /// A port of AF_VSOCK.
    #[error("cannot {action} vsock://{port}: {source}")]
    Vsock {
        /// What was tried.
        action: &'static str,
        /// The port.
        port: u32,
        /// The system's words, and what to do.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {action} tcp://{address}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: io::Error,
    },
}

/// A bound listener. Clients queue up in the kernel until [`Listener::serve`] runs. Dropping it closes it, and removes a unix
/// socket's file if that is still ours.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    address: ListenAddress,
    /// What its clients are.
    kind: Kind,
    /// Of which every client takes one; `None`: they are not counted.
    descriptors: Option<Arc<Pool>>,
    /// Removes the file of a unix socket.
    file: Option<SocketGuard>,
}

impl Listener {
    /// Binds and listens. For a unix address a stale socket file is replaced, a live one and what is no socket are not;
    /// it is of the type given, which means nothing to the others: they are streams. An IPv6 address takes IPv6 clients only.
    pub fn bind(address: &ListenAddress, socket_type: SocketType) -> Result<Listener, ListenError> {
        match address {
            ListenAddress::Tcp(address) => {
                let (socket, address) = bind_tcp(*address)?;
                Ok(Listener {
                    socket: socket.into(),
                    address: ListenAddress::Tcp(address),
                    kind: Kind::stream(Transport::Tcp),
                    descriptors: None,
                    file: None,
                })
            }
            ListenAddress::Vsock(port) => Ok(Listener {
                socket: af_vsock::bind(*port)?,
                address: address.clone(),
                kind: af_vsock::KIND,
                descriptors: None,
                file: None,
            }),
            ListenAddress::Unix(path) => {
                let kind = Kind::unix(socket_type);
                let (socket, file) = match socket_type {
                    SocketType::Stream => {
                        let (listener, file) = unix_socket::bind_unix(path, UNIX_MODE)?;
                        (listener.into(), file)
                    }
                    SocketType::Seqpacket => unix_socket::bind_unix_packets(path, UNIX_MODE)?,
                };
                Ok(Listener {
                    socket,
                    address: address.clone(),
                    kind,
                    descriptors: None,
                    file: Some(file),
                })
            }
        }
    }

    /// Takes the descriptor of each client from `descriptors`. When none is left clients are closed at once: who was left in the
    /// kernel's queue would wait for nobody knows what, and the operator would see nothing of it.
    pub fn within(self, descriptors: Arc<Pool>) -> Listener {
        Listener {
            descriptors: Some(descriptors),
            ..self
        }
    }

    /// Where it listens; a TCP port 0 has become the port that the kernel chose.
    pub fn address(&self) -> &ListenAddress {
        &self.address
    }

    /// Accepts clients until `stop` ends, then closes the listener and the clients whose guest port is not known yet. Runs on the
    /// current tokio runtime. Each client is judged by the `terms` of the moment at which it is accepted.
    ///
    /// Running out of descriptors or memory pauses it (invariant 8); nothing ends it but `stop`.
    ///
    /// # Errors
    /// The socket could not be registered with the runtime's poller.
    pub async fn serve(
        self,
        terms: watch::Receiver<Arc<Terms>>,
        stop: impl Future<Output = ()> + Send,
    ) -> io::Result<()> {
        let Listener {
            socket,
            address,
            kind,
            descriptors,
            file,
        } = self;
        let mut shortage = Shortage::default();
        let socket = PolledFd::new(socket, Interest::READABLE)?;
        let mut handshakes = Handshakes::new(MAX_HANDSHAKES);
        let mut pause = Pause::default();
        let mut stop = pin!(stop);
        loop {
            tokio::select! {
                biased;
                () = &mut stop => break,
                Some(outcome) = handshakes.next() => if let Some((terms, outcome)) = outcome {
                    terms.tell(outcome);
                },
                () = sleep_until(pause.until.unwrap_or_else(Instant::now)), if pause.until.is_some() => {
                    pause.until = None;
                }
                accepted = socket.when_readable(|fd| accept(fd, &address, kind)), if pause.until.is_none() => {
                    let terms = Arc::clone(&terms.borrow());
                    match accepted {
                        Ok(client) if !client.is_allowed(&terms.allow) => {
                            pause.end(&address);
                            terms.tell(Err(client.refuse(Rejection::NotAllowed)));
                        }
                        Ok(mut client) => {
                            pause.end(&address);
                            if let Some(pool) = &descriptors {
                                client.descriptor = Share::take(pool, 1);
                                if client.descriptor.is_none() {
                                    shortage.tell(&address);
                                    terms.tell(Err(client.refuse(Rejection::NoDescriptors)));
                                    continue;
                                }
                            }
                            match terms.spec.protocol {
                                InboundProtocol::Plain { port } => {
                                    let wanted = Wanted { port, preface: Vec::new() };
                                    terms.tell(Ok(client.incoming(terms.spec, wanted)));
                                }
                                InboundProtocol::Connect => {
                                    if let Some((terms, outcome)) = handshakes.begin(&terms, client) {
                                        terms.tell(outcome);
                                    }
                                }
                            }
                        }
                        Err(error) if is_clients_fault(&error) => {}
                        Err(error) => pause.begin(&address, &error),
                    }
                }
            }
        }
        // First nobody can come any more, then the file goes: a successor that finds it finds it stale.
        drop(socket);
        drop(file);
        Ok(())
    }
}

fn bind_tcp(address: SocketAddr) -> Result<(Socket, SocketAddr), ListenError> {
    let failed = |action: &'static str| {
        move |source: io::Error| match Errno::from_io_error(&source) {
            Some(Errno::ADDRINUSE) => ListenError::InUse { address },
            Some(Errno::ADDRNOTAVAIL) => ListenError::NotLocal { address },
            Some(Errno::ACCESS | Errno::PERM) => ListenError::Denied { address, source },
            _ => ListenError::Io {
                action,
                address,
                source,
            },
        }
    };
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )
    .map_err(failed("create a socket for"))?;
    // Connections of a previous run that linger in TIME_WAIT must not keep us from our port.
    socket.set_reuse_address(true).map_err(failed("set options of"))?;
    if address.is_ipv6() {
        // What [::] means would otherwise depend on net.ipv6.bindv6only, and 0.0.0.0 beside it would fail.
        socket.set_only_v6(true).map_err(failed("set options of"))?;
    }
    // Inherited by every accepted socket.
    set_tcp_options(&socket).map_err(failed("set options of"))?;
    socket.bind(&address.into()).map_err(failed("bind"))?;
    socket.listen(BACKLOG).map_err(failed("listen on"))?;
    let bound = socket.local_addr().map_err(failed("ask for the address of"))?;
    Ok((socket, bound.as_socket().unwrap_or(address)))
}

/// An accepted socket.
struct Client {
    socket: OwnedFd,
    kind: Kind,
    /// Where it comes from, if that has an IP address.
    ip: Option<IpAddr>,
    peer: String,
    /// Its part of the process's descriptors.
    descriptor: Option<Share>,
}

impl Client {
    fn is_allowed(&self, allow: &[Cidr]) -> bool {
        allow.is_empty()
            || self
                .ip
                .is_some_and(|ip| allow.iter().any(|range| range.contains(ip)))
    }

    /// Closes it at once. By reset: an orderly end would leave a socket in FIN_WAIT or TIME_WAIT for each stranger who knocks.
    fn refuse(self, why: Rejection) -> Rejected {
        let Client {
            socket, kind, peer, ..
        } = self;
        HostStream::configured(socket.into(), kind, String::new()).abort();
        Rejected { peer, why }
    }

    fn incoming(self, spec: InboundSpec, wanted: Wanted) -> Incoming {
        let Client {
            socket,
            kind,
            peer,
            descriptor,
            ..
        } = self;
        let mut stream = HostStream::configured(socket.into(), kind, peer.clone());
        if let Some(descriptor) = descriptor {
            stream.hold(descriptor);
        }
        Incoming {
            port: wanted.port,
            stream,
            preface: wanted.preface,
            wants_ok: spec.protocol == InboundProtocol::Connect,
            wait_for_guest: spec.wait_for_guest,
            socket_type: spec.socket_type,
            framing: spec.framing,
            peer,
        }
    }
}

fn accept(listener: BorrowedFd<'_>, address: &ListenAddress, kind: Kind) -> io::Result<Client> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    match address {
        ListenAddress::Tcp(_) => {
            let (socket, peer) = rustix::net::acceptfrom_with(listener, flags)?;
            let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
            Ok(Client {
                socket,
                kind,
                ip: peer.map(|peer| peer.ip()),
                peer: peer.map_or_else(|| "unknown address".to_owned(), |peer| peer.to_string()),
                descriptor: None,
            })
        }
        ListenAddress::Vsock(_) => {
            let (socket, peer) = af_vsock::accept(listener)?;
            Ok(Client {
                socket,
                kind,
                ip: None,
                peer,
                descriptor: None,
            })
        }
        // Clients of unix sockets have no names; which listener they came by is all there is to say.
        ListenAddress::Unix(path) => {
            let socket = rustix::net::accept_with(listener, flags)?;
            if kind.packets {
                set_packet_options(&socket)?;
            }
            Ok(Client {
                socket,
                kind,
                ip: None,
                peer: path.display().to_string(),
                descriptor: None,
            })
        }
    }
}

/// Whether accept() tells of one connection that failed in the queue (accept(2), "Error handling"): that one is gone and the
/// next may be fine. EPERM is not among them although accept(2) lists it for firewalls: it is also what a system call filter
/// says, each time anew, and trying again at once would spin.
fn is_clients_fault(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::CONNABORTED
                | Errno::INTR
                | Errno::NETDOWN
                | Errno::PROTO
                | Errno::NOPROTOOPT
                | Errno::HOSTDOWN
                | Errno::NONET
                | Errno::HOSTUNREACH
                | Errno::OPNOTSUPP
                | Errno::NETUNREACH
        )
    )
}

/// What became of a client, and on which terms it came.
type Outcome = (Arc<Terms>, Result<Incoming, Rejected>);

/// Clients that have not sent their whole line yet, each with a task that reads it.
struct Handshakes {
    tasks: JoinSet<(u64, Outcome)>,
    /// The tasks whose outcome is still wanted, in the order of their clients' arrival; at most `limit`.
    open: BTreeMap<u64, (AbortHandle, String, Arc<Terms>)>,
    /// Number of the next client.
    next: u64,
    /// How many may be open; [`MAX_HANDSHAKES`] but in tests.
    limit: usize,
}

impl Handshakes {
    fn new(limit: usize) -> Handshakes {
        Handshakes {
            tasks: JoinSet::new(),
            open: BTreeMap::new(),
            next: 0,
            limit,
        }
    }

    /// Reads what `client` has sent; if the line is not whole yet, waits for the rest in a task. Returns what is decided by it:
    /// this client, or the oldest of too many.
    fn begin(&mut self, terms: &Arc<Terms>, client: Client) -> Option<Outcome> {
        let mut line = ConnectLine::default();
        let peer = client.peer.clone();
        let decided = match line.read_from(&client.socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => Some(Err(Rejection::Failed(error.kind()))),
            Ok(line) => Some(line),
        };
        if let Some(line) = decided {
            let outcome = match line {
                Ok(wanted) => Ok(client.incoming(terms.spec, wanted)),
                Err(why) => Err(Rejected { peer, why }),
            };
            return Some((Arc::clone(terms), outcome));
        }
        let crowded = match self.open.len() < self.limit {
            true => None,
            false => self.open.pop_first().map(|(_, (task, peer, terms))| {
                task.abort();
                let why = Rejection::Crowded;
                (terms, Err(Rejected { peer, why }))
            }),
        };
        let number = self.next;
        self.next += 1;
        let of_client = Arc::clone(terms);
        let task = self.tasks.spawn(async move {
            let outcome = read_line(of_client.spec, client, line).await;
            (number, (of_client, outcome))
        });
        self.open.insert(number, (task, peer, Arc::clone(terms)));
        crowded
    }

    /// The next one that ended; `None` when there are none. Cancelling it loses nothing.
    async fn next(&mut self) -> Option<Option<Outcome>> {
        let ended = self.tasks.join_next().await?;
        // An error is a task that was aborted, and so is one that ended just before: both were told of as crowded.
        let outcome = ended
            .ok()
            .and_then(|(number, outcome)| self.open.remove(&number).map(|_| outcome));
        Some(outcome)
    }
}

/// Waits for the rest of a line.
async fn read_line(spec: InboundSpec, client: Client, mut line: ConnectLine) -> Result<Incoming, Rejected> {
    let deadline = Instant::now() + spec.handshake_timeout;
    let Client {
        socket,
        kind,
        ip,
        peer,
        descriptor,
    } = client;
    let rejected = |why| Rejected {
        peer: peer.clone(),
        why,
    };
    let failed = |error: io::Error| rejected(Rejection::Failed(error.kind()));
    let socket = PolledFd::new(socket, Interest::READABLE).map_err(failed)?;
    let wanted = match timeout_at(deadline, socket.when_readable(|fd| line.read_from(fd))).await {
        Err(_) => Err(rejected(Rejection::TimedOut)),
        Ok(Err(error)) => Err(failed(error)),
        Ok(Ok(Err(why))) => Err(rejected(why)),
        Ok(Ok(Ok(wanted))) => Ok(wanted),
    }?;
    let socket = socket.into_inner();
    Ok(Client {
        socket,
        kind,
        ip,
        peer,
        descriptor,
    }
    .incoming(spec, wanted))
}

/// How a listener waits while the process can open no more descriptors. The clients wait in the kernel's queue.
#[derive(Default, Debug)]
struct Pause {
    /// No accept before this.
    until: Option<Instant>,
    /// Length of the last pause of this episode; zero when there is none.
    length: Duration,
    /// When the episode began.
    since: Option<Instant>,
}

impl Pause {
    const FIRST: Duration = Duration::from_millis(50);
    const LONGEST: Duration = Duration::from_secs(1);

    fn begin(&mut self, address: &ListenAddress, error: &io::Error) {
        self.length = (self.length * 2).clamp(Pause::FIRST, Pause::LONGEST);
        self.until = Some(Instant::now() + self.length);
        // Once an episode: it may last for hours.
        if self.since.is_none() {
            self.since = Some(Instant::now());
            tracing::warn!(listen = %Shown(address), %error, "cannot accept clients, trying again until it works");
        }
    }

    fn end(&mut self, address: &ListenAddress) {
        self.length = Duration::ZERO;
        if let Some(since) = self.since.take() {
            tracing::info!(listen = %Shown(address), after = ?since.elapsed(), "accepting clients again");
        }
    }
}

/// What was said of a shortage of descriptors: once a minute, however many clients come.
#[derive(Default, Debug)]
struct Shortage {
    told: Option<Instant>,
}

impl Shortage {
    const SILENCE: Duration = Duration::from_secs(60);

    fn tell(&mut self, address: &ListenAddress) {
        let now = Instant::now();
        if self
            .told
            .is_none_or(|told| now.duration_since(told) >= Shortage::SILENCE)
        {
            self.told = Some(now);
            tracing::warn!(
                listen = %Shown(address), reason = "descriptors",
                remedy = "raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE, or the container runtime's default)",
                "clients are closed: the file descriptors that connections may have are used up"
            );
        }
    }
}

/// An address as the configuration spells it.
struct Shown<'a>(&'a ListenAddress);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ListenAddress::Tcp(address) => write!(f, "tcp://{address}"),
            ListenAddress::Unix(path) => write!(f, "unix://{}", path.display()),
            ListenAddress::Vsock(port) => write!(f, "vsock://{port}"),
        }
    }
}

#[cfg(test)]
mod tests;
