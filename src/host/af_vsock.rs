//! AF_VSOCK as this host has it: services of another machine, or of this one (CID 1), as targets; clients of `vsock://PORT`.
//!
//! For a sidecar that runs inside a VM, or beside VMs whose sockets the kernel serves (vhost_vsock, a Nitro parent); see
//! `docs/host-vsock.md`. Has nothing to do with the guests that this program serves: they are a vhost-user device's, and no
//! socket of this kernel reaches them.
//!
//! Once connected such a socket is used as any other, which net/vmw_vsock/af_vsock.c and virtio_transport_common.c bear out:
//!
//! - a short read means that nothing was left (`virtio_transport_stream_do_dequeue`), and what comes next wakes the poller
//!   (`vsock_data_ready`), as does the peer's SHUTDOWN (`sk_state_change`, EPOLLRDHUP) and credit (`sk_write_space`);
//! - a write takes what the peer's credit lets it, and EAGAIN is only said of nothing at all (`vsock_connectible_sendmsg`);
//! - halves end alone, and unlike TCP's the end of our reading half is told to the peer, whose writes get EPIPE;
//! - a peer that resets reads as the end of its stream (`virtio_transport_do_close` sets SOCK_DONE), and neither can we send
//!   a reset: closing is the end of both halves.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::time::{Instant, timeout_at};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockStream};

use super::HostStream;
use super::dial::{DialError, DialResult, failure};
use super::listen::ListenError;
use super::stream::{Kind, Transport};

/// Every address of the family, of peers and of targets.
pub(super) const KIND: Kind = Kind::stream(Transport::Vsock);

/// When the kernel gives up on a peer that does not answer (`VSOCK_DEFAULT_CONNECT_TIMEOUT`).
const SYSTEM_TIMEOUT: Duration = Duration::from_secs(2);

/// What socket() says in a container whose profile forbids the family.
const FORBIDDEN: &str = "something forbids AF_VSOCK sockets, most often the container's seccomp profile: RuntimeDefault of \
                         most runtimes does, use a profile of its own (docs/host-vsock.md)";

/// What it says otherwise.
const NO_FAMILY: &str = "this kernel has no AF_VSOCK: load its module vsock, or allow the family in the container's \
                         seccomp profile (docs/host-vsock.md)";

/// An address as the configuration spells it.
pub(super) fn label(cid: u32, port: u32) -> String {
    format!("vsock://{cid}:{port}")
}

/// Connects. On the control runtime: the kernel never has the answer at once, not even from CID 1.
pub(super) async fn connect(cid: u32, port: u32, deadline: Instant, timeout: Duration) -> DialResult {
    let target = label(cid, port);
    match timeout_at(deadline, VsockStream::connect(VsockAddr::new(cid, port))).await {
        // Out of the runtime's poller: the device has one of its own.
        Ok(Ok(stream)) => {
            let socket = Socket::from(OwnedFd::from(stream));
            Ok(HostStream::configured(socket, KIND, target))
        }
        Ok(Err(error)) => Err(dial_failure(target, error, timeout)),
        Err(_) => Err(DialError::TimedOut {
            target,
            after: timeout,
        }),
    }
}

/// What `error` of a connect means. The numbers are others than TCP's.
fn dial_failure(target: String, error: io::Error, timeout: Duration) -> DialError {
    let hint = match Errno::from_io_error(&error) {
        // The answer to a REQUEST for a port on which nobody listens is RST, which connect() calls by its name.
        Some(Errno::CONNRESET) => {
            return DialError::Refused {
                target,
                source: error,
            };
        }
        Some(Errno::TIMEDOUT) => {
            return DialError::TimedOut {
                target,
                after: timeout.min(SYSTEM_TIMEOUT),
            };
        }
        // No port that is free was found for our end.
        Some(Errno::ADDRNOTAVAIL) => {
            return DialError::Resources {
                target,
                source: error,
            };
        }
        Some(Errno::NODEV) => {
            "no transport leads to this CID: 1 needs the module vsock_loopback, 2 a vsock device of this machine, higher \
             ones vhost_vsock and a VM that has it"
        }
        Some(Errno::NETUNREACH) => "the transport takes no connections to this CID",
        Some(Errno::AFNOSUPPORT) => NO_FAMILY,
        Some(Errno::PERM | Errno::ACCESS) => FORBIDDEN,
        _ => return failure(target, error, timeout),
    };
    DialError::Unreachable {
        target,
        source: explained(&error, hint),
    }
}

/// Listens on `port` of every CID that this host has.
pub(super) fn bind(port: u32) -> Result<OwnedFd, ListenError> {
    let failed = |action| move |source| listen_failure(action, port, source);
    let socket = Socket::new(Domain::VSOCK, Type::STREAM.nonblocking(), None)
        .map_err(failed("create a socket for"))?;
    socket
        .bind(&SockAddr::vsock(VMADDR_CID_ANY, port))
        .map_err(failed("bind"))?;
    socket
        .listen(super::listen::BACKLOG)
        .map_err(failed("listen on"))?;
    Ok(socket.into())
}

/// Why `action` failed for a listener of `port`.
fn listen_failure(action: &'static str, port: u32, source: io::Error) -> ListenError {
    let hint = match Errno::from_io_error(&source) {
        Some(Errno::ADDRINUSE) => "another socket listens there, stop its process or choose another port",
        // Of the initial user namespace: one of a container's own does not count (`__vsock_bind_connectible`).
        Some(Errno::ACCESS) if action == "bind" => {
            "ports below 1024 need CAP_NET_BIND_SERVICE, choose a higher one"
        }
        Some(Errno::AFNOSUPPORT) => NO_FAMILY,
        Some(Errno::PERM | Errno::ACCESS) => FORBIDDEN,
        _ => return ListenError::Vsock { action, port, source },
    };
    ListenError::Vsock {
        action,
        port,
        source: explained(&source, hint),
    }
}

/// Accepts a client: its socket, non-blocking, and its address.
pub(super) fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, String)> {
    let (socket, address) = SockRef::from(&listener).accept()?;
    socket.set_nonblocking(true)?;
    let peer = match address.as_vsock_address() {
        Some((cid, port)) => label(cid, port),
        None => "unknown address".to_owned(),
    };
    Ok((socket.into(), peer))
}

/// The system's words and ours.
fn explained(error: &io::Error, hint: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{error}; {hint}"))
}

/// None of these opens a socket of the family: what it does is tested inside a VM (`tests/nested_vsock`).
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_a_dial_say_what_the_numbers_mean_for_this_family() {
        let told = |errno: Errno| {
            let error = dial_failure(label(16, 5000), errno.into(), Duration::from_secs(5));
            let kind = match &error {
                DialError::Refused { .. } => "refused",
                DialError::TimedOut { .. } => "timed out",
                DialError::Unreachable { .. } => "unreachable",
                DialError::Resources { .. } => "resources",
                _ => "another",
            };
            (kind, error.to_string())
        };
        for (errno, kind, words) in [
            (
                Errno::CONNRESET,
                "refused",
                "vsock://16:5000 refused the connection: ",
            ),
            (
                Errno::CONNREFUSED,
                "refused",
                "vsock://16:5000 refused the connection: ",
            ),
            (
                Errno::TIMEDOUT,
                "timed out",
                "vsock://16:5000 did not answer within 2s",
            ),
            (Errno::NODEV, "unreachable", "1 needs the module vsock_loopback"),
            (Errno::NETUNREACH, "unreachable", "no connections to this CID"),
            (Errno::AFNOSUPPORT, "unreachable", "load its module vsock"),
            (Errno::PERM, "unreachable", "seccomp profile"),
            (Errno::ACCESS, "unreachable", "seccomp profile"),
            (
                Errno::ADDRNOTAVAIL,
                "resources",
                "no resources to reach vsock://16:5000",
            ),
            (Errno::MFILE, "resources", "no resources to reach vsock://16:5000"),
            (Errno::NOMEM, "resources", "no resources to reach vsock://16:5000"),
            (Errno::INVAL, "unreachable", "cannot reach vsock://16:5000: "),
        ] {
            let told = told(errno);
            assert!(told.0 == kind && told.1.contains(words), "{errno}: {told:?}");
        }
        let short = dial_failure(label(2, 1), Errno::TIMEDOUT.into(), Duration::from_millis(500));
        assert_eq!(short.to_string(), "vsock://2:1 did not answer within 500ms");
    }

    #[test]
    fn errors_of_a_listener_name_the_port_and_the_remedy() {
        for (action, errno, words) in [
            ("bind", Errno::ADDRINUSE, "choose another port"),
            ("bind", Errno::ACCESS, "CAP_NET_BIND_SERVICE"),
            ("create a socket for", Errno::ACCESS, "seccomp profile"),
            ("create a socket for", Errno::PERM, "seccomp profile"),
            ("create a socket for", Errno::AFNOSUPPORT, "module vsock"),
            ("listen on", Errno::MFILE, "Too many open files"),
        ] {
            let error = listen_failure(action, 6000, errno.into()).to_string();
            let begin = format!("cannot {action} vsock://6000: ");
            assert!(error.starts_with(&begin) && error.contains(words), "{error}");
        }
    }
}
