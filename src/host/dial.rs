//! Reaching the target of an outbound rule.
//!
//! A dial is asked for by a device thread. What can be had without waiting (a unix socket, a numeric address on loopback) is
//! done on the spot, on the caller's thread, and is what the call returns; the rest (names, slow peers, several addresses)
//! is a task on the control runtime, which ends with one call of `done`.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::SendFlags;
use socket2::Socket;
use tokio::io::Interest;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::HostStream;
use super::af_vsock;
use super::connect::{self, Started};
use super::resolve::{Lookup, Names, SystemResolver};
use super::stream::Transport;
use crate::config::{SocketType, Target};
use crate::quota::Share;
use crate::sys::readiness::PolledFd;

/// First and longest pause between attempts at a unix socket whose backlog is full.
const UNIX_RETRY: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));

/// Why a target could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// ECONNREFUSED, or a unix socket that nobody serves (ENOENT included).
    #[error("{target} refused the connection: {source}")]
    Refused {
        /// What was dialled.
        target: String,
        /// The system's error.
        source: io::Error,
    },
    /// No answer in time; for a unix socket, its backlog stayed full.
    #[error("{target} did not answer within {after:?}")]
    TimedOut {
        /// What was dialled.
        target: String,
        /// The time that was given.
        after: Duration,
    },
    /// The name could not be resolved, or not in time.
    #[error("cannot resolve {host}: {source}")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's error.
        source: io::Error,
    },
    /// No route, or another error of connect().
    #[error("cannot reach {target}: {source}")]
    Unreachable {
        /// What was dialled.
        target: String,
        /// The system's error.
        source: io::Error,
    },
    /// A unix socket of another type than the guest's connection (EPROTOTYPE).
    #[error(
        "{target} is a {found} socket and the guest's connection is {wanted}: let the service listen with {wanted}, \
         or the guest connect with the type of the service"
    )]
    WrongType {
        /// What was dialled.
        target: String,
        /// The type of the guest's connection, as socket(2) names it.
        wanted: &'static str,
        /// The service's.
        found: &'static str,
    },
    /// The process is out of file descriptors, memory or local ports.
    #[error("no resources to reach {target}: {source}")]
    Resources {
        /// What was dialled.
        target: String,
        /// The system's error.
        source: io::Error,
    },
}

/// Outcome of a dial.
pub type DialResult = Result<HostStream, DialError>;

/// What to dial, and for whom.
#[derive(Clone, Copy, Debug)]
pub struct DialRequest<'a> {
    /// The rule's target.
    pub target: &'a Target,
    /// First port of the rule's range: the one that goes to the target's own TCP port.
    pub first_port: u32,
    /// The port the guest connects to, in the rule's range.
    pub guest_port: u32,
    /// The type of the guest's connection, and of a unix target's socket. Others are streams of bytes whatever this says:
    /// whether they may carry messages, and how, is the caller's to know.
    pub socket_type: SocketType,
    /// The guest.
    pub cid: u32,
    /// Bytes that the target gets ahead of all others; a dial has not succeeded before its socket has taken them. Mostly none.
    pub greeting: &'a [u8],
    /// For all of it, name resolution and greeting included.
    pub timeout: Duration,
}

/// Dials targets. Cheap to clone; clones share what names were looked up.
#[derive(Clone)]
pub struct Dialer {
    runtime: Handle,
    names: Arc<Names>,
}

impl Dialer {
    /// A dialer that waits on `runtime`, whose I/O and time drivers are enabled, with the system's resolver.
    pub fn new(runtime: Handle) -> Dialer {
        Dialer::with_resolver(runtime, Arc::new(SystemResolver))
    }

    /// As [`Dialer::new`], with another resolver.
    pub fn with_resolver(runtime: Handle, resolver: Arc<dyn Lookup>) -> Dialer {
        Dialer {
            runtime,
            names: Names::new(resolver),
        }
    }

    /// Dials. What had nothing to wait for has [ended](Dial::Ended) when this returns, and `done` is dropped uncalled: an
    /// outcome that went round by a command to the very thread that asks would cost it a wake-up, which is most of what
    /// a short connection costs. Otherwise `done` is called once with the outcome and the time it took, on the runtime's
    /// thread, unless the task is dropped before. It must not block. A runtime that has ended calls nobody.
    ///
    /// From any thread; does not block.
    ///
    /// `descriptor` is one of the process's descriptors, for the dial's first socket; `None`: they are not counted. It stays with
    /// whatever socket is open, also when nobody wants that any more and it is about to be closed on the runtime's thread,
    /// and a stream that comes of the dial holds it. Sockets beside the first take their own from the same pool.
    pub fn dial(
        &self,
        request: DialRequest<'_>,
        mut descriptor: Option<Share>,
        done: impl FnOnce(DialResult, Duration) + Send + 'static,
    ) -> Dial {
        let begun = Instant::now();
        let mut greeting = Greeting::new(request.greeting);
        let begun_with = match Waiting::begin(request) {
            Err(Ok(stream)) => greeting.begin(stream, request.timeout),
            other => other,
        };
        let waiting = match begun_with {
            Ok(waiting) => waiting,
            Err(outcome) => return Dial::Ended(holding(outcome, descriptor), begun.elapsed()),
        };
        let names = Arc::clone(&self.names);
        let timeout = request.timeout;
        let task = self.runtime.spawn(async move {
            let deadline = Instant::now() + timeout;
            let outcome = match waiting.end(&names, &mut descriptor, deadline, timeout).await {
                Ok(stream) => greeting.end(stream, deadline, timeout).await,
                failed => failed,
            };
            done(holding(outcome, descriptor), begun.elapsed());
        });
        Dial::Waits(DialTask {
            task: task.abort_handle(),
        })
    }
}

/// Gives the socket that a dial ended with its descriptor, and those of others back.
fn holding(outcome: DialResult, descriptor: Option<Share>) -> DialResult {
    outcome.map(|mut stream| {
        if let Some(mut descriptor) = descriptor {
            // Less always works.
            let _ = descriptor.resize(1);
            stream.hold(descriptor);
        }
        stream
    })
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer").finish_non_exhaustive()
    }
}

/// What became of a dial by the time it was asked for.
#[must_use = "it has the outcome, or the task, whose drop cancels the dial"]
#[derive(Debug)]
pub enum Dial {
    /// The outcome, good or bad, and the time it took.
    Ended(DialResult, Duration),
    /// `done` will be called.
    Waits(DialTask),
}

/// A dial under way. Dropping it gives the dial up and closes its sockets. `done` may have been called by then, or
/// just be running on the runtime's thread: whoever drops a task must be able to ignore a late outcome.
#[must_use = "dropping the task cancels the dial"]
#[derive(Debug)]
pub struct DialTask {
    task: AbortHandle,
}

impl Drop for DialTask {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A dial that could not end on the spot, by what it waits for.
#[derive(Debug)]
enum Waiting {
    /// A name's addresses, then the first of them that answers.
    Name { host: String, port: u16 },
    /// The answer of a numeric address.
    Answer { socket: Socket, address: SocketAddr },
    /// Room in a unix socket's backlog.
    Backlog { path: PathBuf, socket_type: SocketType },
    /// Room in the connected socket for the rest of the greeting.
    Room { stream: HostStream },
    /// The answer of another machine, or of this one's kernel.
    Vsock { cid: u32, port: u32 },
}

impl Waiting {
    /// Does what can be done without waiting. `Err` is the outcome, good or bad, if that was all.
    fn begin(request: DialRequest<'_>) -> Result<Waiting, DialResult> {
        match Destination::new(request).map_err(Err)? {
            Destination::Unix { path } => {
                let socket_type = request.socket_type;
                match connect::connect_unix(&path, socket_type) {
                    Ok(stream) => Err(Ok(stream)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        Ok(Waiting::Backlog { path, socket_type })
                    }
                    Err(error) => Err(Err(unix_failure(&path, socket_type, error, request.timeout))),
                }
            }
            Destination::Address(address) => match connect::start_tcp(address) {
                Ok(Started::Connected(stream)) => Err(Ok(stream)),
                Ok(Started::Pending(socket)) => Ok(Waiting::Answer { socket, address }),
                Err(error) => Err(Err(address_failure(
                    tcp_label(&address),
                    address,
                    error,
                    request.timeout,
                ))),
            },
            Destination::Name { host, port } => Ok(Waiting::Name { host, port }),
            Destination::Vsock { cid, port } => Ok(Waiting::Vsock { cid, port }),
        }
    }

    async fn end(
        self,
        names: &Arc<Names>,
        descriptor: &mut Option<Share>,
        deadline: Instant,
        timeout: Duration,
    ) -> DialResult {
        match self {
            Waiting::Room { stream } => Ok(stream),
            Waiting::Vsock { cid, port } => af_vsock::connect(cid, port, deadline, timeout).await,
            Waiting::Backlog { path, socket_type } => retry_unix(&path, socket_type, deadline, timeout).await,
            Waiting::Answer { socket, address } => {
                let label = |_| tcp_label(&address);
                race(Some((socket, address)), &[], descriptor, label, deadline, timeout).await
            }
            Waiting::Name { host, port } => {
                let found = match timeout_at(deadline, names.lookup(&host)).await {
                    Ok(found) => found,
                    // That the resolver is slow, and not the service, is what the operator needs to know.
                    Err(_) => Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("no answer within {timeout:?}"),
                    )),
                };
                let mut addresses = match found {
                    Ok(found) => found.to_vec(),
                    Err(source) => return Err(DialError::Resolve { host, source }),
                };
                addresses.iter_mut().for_each(|address| address.set_port(port));
                let label = |address: Option<SocketAddr>| match address {
                    Some(address) => format!("tcp://{host}:{port} ({address})"),
                    None => format!("tcp://{host}:{port}"),
                };
                race(None, &addresses, descriptor, label, deadline, timeout).await
            }
        }
    }
}

/// What a target gets first, and how much of it its socket has taken.
///
/// A fresh socket takes a hundred bytes at once, so that nothing but the one call is ever needed, except when the system is
/// short of memory for sockets (tcp_mem). Then the rest must neither be lost nor come behind the guest's bytes: the dial
/// goes on until it is written.
#[derive(Debug)]
struct Greeting {
    bytes: Vec<u8>,
    sent: usize,
}

impl Greeting {
    fn new(bytes: &[u8]) -> Greeting {
        Greeting {
            bytes: bytes.to_vec(),
            sent: 0,
        }
    }

    /// Writes what the socket takes now. As [`Waiting::begin`]: `Err` is the outcome of the dial.
    fn begin(&mut self, stream: HostStream, timeout: Duration) -> Result<Waiting, DialResult> {
        match self.write_to(stream.as_fd()) {
            Ok(()) => Err(Ok(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Waiting::Room { stream }),
            Err(error) => Err(Err(failure(stream_label(&stream), error, timeout))),
        }
    }

    /// Writes the rest, until `deadline`.
    async fn end(mut self, stream: HostStream, deadline: Instant, timeout: Duration) -> DialResult {
        if self.is_sent() {
            return Ok(stream);
        }
        let target = stream_label(&stream);
        let (socket, kind, peer) = stream.into_parts();
        let written = async {
            let socket = PolledFd::new(socket.into(), Interest::WRITABLE)?;
            poll_fn(|cx| socket.poll_when_writable(cx, |fd| self.write_to(fd))).await?;
            Ok(socket.into_inner())
        };
        match timeout_at(deadline, written).await {
            Ok(Ok(socket)) => Ok(HostStream::configured(socket.into(), kind, peer)),
            Ok(Err(error)) => Err(failure(target, error, timeout)),
            Err(_) => Err(DialError::TimedOut {
                target,
                after: timeout,
            }),
        }
    }

    fn is_sent(&self) -> bool {
        self.sent >= self.bytes.len()
    }

    /// Writes until all is taken.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is no room for the rest: call again. Any other is the socket's failure.
    fn write_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while let Some(rest) = self.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            self.sent += retry_on_intr(|| rustix::net::send(socket, rest, SendFlags::NOSIGNAL))?;
        }
        Ok(())
    }
}

/// The first address that answers, or the most telling of the failures. `label` names the target, or one address of it.
async fn race(
    pending: Option<(Socket, SocketAddr)>,
    addresses: &[SocketAddr],
    descriptor: &mut Option<Share>,
    label: impl Fn(Option<SocketAddr>) -> String,
    deadline: Instant,
    timeout: Duration,
) -> DialResult {
    let mut told: Option<DialError> = None;
    let tell = |address, error| {
        let failure = address_failure(label(Some(address)), address, error, timeout);
        if told
            .as_ref()
            .is_none_or(|told| told_before(told) < told_before(&failure))
        {
            told = Some(failure);
        }
    };
    let outcome = timeout_at(deadline, connect::race(pending, addresses, descriptor, tell)).await;
    let late = || DialError::TimedOut {
        target: label(None),
        after: timeout,
    };
    match outcome {
        Ok(Some(stream)) => Ok(stream),
        Ok(None) => Err(told.unwrap_or_else(late)),
        // An address that is still silent tells more than one without a route, and less than one that refused.
        Err(_) => Err(told
            .filter(|told| told_before(told) > told_before(&late()))
            .unwrap_or_else(late)),
    }
}

/// Tries a unix socket with a full backlog until there is room. No event tells of room, hence the polling.
async fn retry_unix(
    path: &Path,
    socket_type: SocketType,
    deadline: Instant,
    timeout: Duration,
) -> DialResult {
    let (mut pause, longest) = UNIX_RETRY;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(DialError::TimedOut {
                target: unix_label(path),
                after: timeout,
            });
        }
        sleep(pause.min(left)).await;
        pause = (pause * 2).min(longest);
        match connect::connect_unix(path, socket_type) {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(unix_failure(path, socket_type, error, timeout)),
        }
    }
}

/// What `error` of a connect to one TCP address means.
fn address_failure(target: String, address: SocketAddr, error: io::Error, timeout: Duration) -> DialError {
    match Errno::from_io_error(&error) {
        // The ephemeral ports towards this address are used up. For IPv6 the same number says that there is no IPv6.
        Some(Errno::ADDRNOTAVAIL) if address.is_ipv4() => DialError::Resources {
            target,
            source: error,
        },
        Some(Errno::AGAIN) => DialError::Resources {
            target,
            source: error,
        },
        _ => failure(target, error, timeout),
    }
}

/// What `error` of a connect to a unix socket means.
fn unix_failure(path: &Path, socket_type: SocketType, error: io::Error, timeout: Duration) -> DialError {
    let target = unix_label(path);
    if Errno::from_io_error(&error) != Some(Errno::PROTOTYPE) {
        return failure(target, error, timeout);
    }
    // The kernel says that the types differ, not which the other one is; there are three.
    let (wanted, other) = match socket_type {
        SocketType::Stream => ("SOCK_STREAM", "SOCK_SEQPACKET"),
        SocketType::Seqpacket => ("SOCK_SEQPACKET", "SOCK_STREAM"),
    };
    let found = match connect::is_datagram(path) {
        true => "SOCK_DGRAM",
        false => other,
    };
    DialError::WrongType {
        target,
        wanted,
        found,
    }
}

/// What `error` of a connect means.
pub(super) fn failure(target: String, source: io::Error, timeout: Duration) -> DialError {
    match Errno::from_io_error(&source) {
        Some(Errno::CONNREFUSED | Errno::NOENT) => DialError::Refused { target, source },
        Some(Errno::TIMEDOUT) => DialError::TimedOut {
            target,
            after: timeout,
        },
        // NOSPC is epoll's limit of watches (max_user_watches).
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS | Errno::NOSPC) => {
            DialError::Resources { target, source }
        }
        _ => DialError::Unreachable { target, source },
    }
}

/// Order of the failures of several addresses, the higher is told: what is our own lack first, then what shows that
/// somebody is there.
fn told_before(error: &DialError) -> u8 {
    match error {
        DialError::Resources { .. } => 4,
        DialError::Refused { .. } => 3,
        DialError::TimedOut { .. } => 2,
        DialError::Unreachable { .. } | DialError::WrongType { .. } => 1,
        DialError::Resolve { .. } => 0,
    }
}

fn tcp_label(target: &impl fmt::Display) -> String {
    format!("tcp://{target}")
}

fn stream_label(stream: &HostStream) -> String {
    match stream.transport() {
        Transport::Tcp => tcp_label(&stream.peer()),
        Transport::Unix => unix_label(Path::new(stream.peer())),
        Transport::Vsock => stream.peer().to_owned(),
    }
}

fn unix_label(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// A target for one guest port: its range resolved, its placeholders filled in.
#[derive(PartialEq, Eq, Debug)]
enum Destination {
    /// Needs no resolver.
    Address(SocketAddr),
    /// Needs one.
    Name { host: String, port: u16 },
    /// AF_VSOCK of this host.
    Vsock { cid: u32, port: u32 },
    /// A unix socket.
    Unix { path: PathBuf },
}

impl Destination {
    fn new(request: DialRequest<'_>) -> Result<Destination, DialError> {
        let DialRequest {
            target,
            first_port,
            guest_port,
            cid,
            ..
        } = request;
        // The configuration refuses ranges that do not fit; should one come here, no other service is dialled.
        let shifted = |port: u32| port.checked_add(guest_port.checked_sub(first_port)?);
        let unreachable = |target: String, text: String| DialError::Unreachable {
            target,
            source: io::Error::new(io::ErrorKind::InvalidInput, text),
        };
        match target {
            Target::Tcp { host, port } => {
                let Some(port) = shifted(u32::from(*port)).and_then(|port| u16::try_from(port).ok()) else {
                    let text = format!(
                        "guest port {guest_port} has no TCP port, counted from {first_port} as {port}"
                    );
                    return Err(unreachable(format!("tcp://{host}"), text));
                };
                Ok(match host.parse::<IpAddr>() {
                    Ok(ip) => Destination::Address(SocketAddr::new(ip, port)),
                    Err(_) => Destination::Name {
                        host: host.clone(),
                        port,
                    },
                })
            }
            Target::Vsock { cid, port } => {
                // The highest number stands for any port (VMADDR_PORT_ANY).
                let Some(port) = shifted(*port).filter(|port| *port != u32::MAX) else {
                    let text = format!(
                        "guest port {guest_port} has no vsock port, counted from {first_port} as {port}"
                    );
                    return Err(unreachable(target.to_string(), text));
                };
                Ok(Destination::Vsock { cid: *cid, port })
            }
            // Guests of this sidecar are joined by their devices.
            Target::Guest { .. } => Err(unreachable(
                target.to_string(),
                "a guest is no socket of this host".to_owned(),
            )),
            Target::Unix { path } => {
                let path = path
                    .replace("{port}", &guest_port.to_string())
                    .replace("{cid}", &cid.to_string());
                Ok(Destination::Unix {
                    path: PathBuf::from(path),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests;
