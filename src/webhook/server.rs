//! Listeners and connections: accepts, bounds and ends them.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::warn;

use super::Limits;
use super::routes::{Desk, Side, respond};

/// Most bytes of a request head.
const MAX_HEAD: usize = 16 * 1024;
/// Most fields of a request head.
const MAX_FIELDS: usize = 64;
const BACKLOG: i32 = 1024;
/// Wait after a failed accept, doubled up to [`MAX_BACKOFF`]: without one, a process without descriptors would spin.
const MIN_BACKOFF: Duration = Duration::from_millis(20);
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// Binds an address. `[::]` takes IPv4 as well.
pub(super) fn bind(address: SocketAddr) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for connections in TIME_WAIT.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// How a listener's connections begin.
#[derive(Clone)]
pub(super) enum Begin {
    /// With a handshake.
    Tls(TlsAcceptor),
    /// At once.
    Plain,
}

/// Accepts until `stop` says so, then waits for the requests that are under way. Dropping it ends the connections.
pub(super) async fn serve(listener: TcpListener, begin: Begin, desk: Arc<Desk>, stop: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    let mut open: Vec<(Clock, AbortHandle)> = Vec::new();
    let mut stopping = pin!(stopped(stop.clone()));
    let mut backoff = MIN_BACKOFF;
    loop {
        let accepted = tokio::select! {
            () = stopping.as_mut() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                // Once for each time that it happens, not for each time that it goes on.
                if backoff == MIN_BACKOFF {
                    warn!(%error, "cannot accept connections");
                }
                sleep(backoff).await;
                backoff = (backoff * 2).min(MAX_BACKOFF);
                continue;
            }
        };
        backoff = MIN_BACKOFF;
        while connections.try_join_next().is_some() {}
        open.retain(|(_, task)| !task.is_finished());
        if open.len() >= desk.limits.connections {
            desk.metrics.connection_failed("limit");
            make_room(&mut open);
        }
        // A response is one write; waiting for more to send with it would only be late.
        let _ = stream.set_nodelay(true);
        let clock = Clock::new(desk.limits);
        let task = connections.spawn(connection(
            stream,
            begin.clone(),
            desk.clone(),
            clock.clone(),
            stopped(stop.clone()),
        ));
        open.push((clock, task));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Completes when the server is to stop.
async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that nobody is left to say so, which is the same.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Ends the connection that has kept us waiting for the longest time, so that nobody keeps the API server out by opening
/// connections and saying nothing, or by beginning bodies that never end.
///
/// There always is one: judging a review is one step on the one thread, so that a connection that we see from here waits for a head,
/// for a body, or for the client to take the answer. The time runs from the last of these that was whole, and no byte in between
/// begins it anew.
fn make_room(open: &mut Vec<(Clock, AbortHandle)>) {
    let waiting = open
        .iter()
        .enumerate()
        .map(|(index, (clock, _))| (clock.waiting_since(), index));
    if let Some((_, index)) = waiting.min() {
        open.swap_remove(index).1.abort();
    }
}

async fn connection(
    stream: TcpStream,
    begin: Begin,
    desk: Arc<Desk>,
    clock: Clock,
    stop: impl Future<Output = ()>,
) {
    let acceptor = match begin {
        Begin::Plain => return requests(stream, Side::Metrics, &desk, clock, stop).await,
        Begin::Tls(acceptor) => acceptor,
    };
    let _open = Open::new(&desk);
    match timeout(desk.limits.head, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => requests(stream, Side::Admission, &desk, clock, stop).await,
        Ok(Err(error)) => {
            desk.metrics.connection_failed("handshake");
            // A connection that is opened and closed is how load balancers and probes by TCP look.
            if error.kind() != io::ErrorKind::UnexpectedEof && desk.told_of_handshakes.now() {
                warn!(
                    %error,
                    "a TLS handshake failed; if it is the API server's, its caBundle is not that of our certificate"
                );
            }
        }
        Err(_) => desk.metrics.connection_failed("timeout"),
    }
}

/// Serves the requests of a connection until it ends, misses a deadline, or `stop` completes and the answer that is under way
/// is out.
async fn requests(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    side: Side,
    desk: &Desk,
    clock: Clock,
    stop: impl Future<Output = ()>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let busy = clock.requested();
        async move {
            let response = respond(desk, side, request).await;
            drop(busy);
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        // The clock's deadlines, which tell a head from an idle connection.
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_FIELDS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let mut stop = pin!(stop);
    let mut stopping = false;
    loop {
        let deadline = clock.deadline();
        tokio::select! {
            // An error is the client's: it went away, or sent what is no HTTP.
            _ = connection.as_mut() => return,
            () = stop.as_mut(), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            // A deadline only ever moves away, so that it is soon enough to ask again when it is over.
            () = sleep_until(deadline) => if clock.deadline() <= deadline {
                if !clock.has_asked() {
                    desk.metrics.connection_failed("timeout");
                }
                return;
            }
        }
    }
}

/// Counts an open connection.
struct Open<'a>(&'a Desk);

impl<'a> Open<'a> {
    fn new(desk: &'a Desk) -> Open<'a> {
        desk.metrics.connections.inc();
        Open(desk)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.metrics.connections.dec();
    }
}

/// What a connection is doing, and since when.
#[derive(Clone)]
struct Clock {
    /// Shared by the connection's task and the accept loop, both on one thread: never contended.
    now: Arc<Mutex<Doing>>,
    limits: Limits,
}

#[derive(Clone, Copy)]
struct Doing {
    /// A request is being read or answered.
    busy: bool,
    /// Whether there was a request.
    asked: bool,
    since: Instant,
}

impl Clock {
    fn new(limits: Limits) -> Clock {
        let doing = Doing {
            busy: false,
            asked: false,
            since: Instant::now(),
        };
        Clock {
            now: Arc::new(Mutex::new(doing)),
            limits,
        }
    }

    /// A head is complete. Idle again when what is returned is dropped.
    fn requested(&self) -> Busy {
        *self.lock() = Doing {
            busy: true,
            asked: true,
            since: Instant::now(),
        };
        Busy(self.clone())
    }

    fn deadline(&self) -> Instant {
        let doing = *self.lock();
        doing.since
            + match (doing.busy, doing.asked) {
                (false, false) => self.limits.head,
                (false, true) => self.limits.idle,
                // The body has its own bound, and the rest is a computation.
                (true, _) => self.limits.body + self.limits.idle,
            }
    }

    fn has_asked(&self) -> bool {
        self.lock().asked
    }

    /// When the client's last step was whole: the connection, a head, or an answer that we had.
    fn waiting_since(&self) -> Instant {
        self.lock().since
    }

    fn lock(&self) -> MutexGuard<'_, Doing> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Busy(Clock);

impl Drop for Busy {
    fn drop(&mut self) {
        let mut doing = self.0.lock();
        doing.busy = false;
        doing.since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    /// 256 connections that each begin a body and never end it would else keep the API server out, and with it every pod that asks for
    /// the sidecar.
    #[tokio::test]
    async fn who_never_sends_a_body_makes_room_as_does_who_never_asks() {
        let mut tasks = JoinSet::new();
        let mut bodies = Vec::new();
        let mut open: Vec<(Clock, AbortHandle)> = (0..3)
            .map(|_| {
                let clock = Clock::new(Limits::DEFAULT);
                bodies.push(clock.requested());
                (clock, tasks.spawn(pending::<()>()))
            })
            .collect();
        let longest = open[0].0.now.clone();
        make_room(&mut open);
        assert_eq!(open.len(), 2);
        assert!(!open.iter().any(|(clock, _)| Arc::ptr_eq(&clock.now, &longest)));
        let ended = tasks.join_next().await.unwrap();
        assert!(ended.unwrap_err().is_cancelled());
        // An answer that was had begins the time anew, and the next in line is another one.
        bodies.remove(1);
        let next = open.iter().map(|(clock, _)| clock.waiting_since()).min();
        make_room(&mut open);
        assert!(open.iter().all(|(clock, _)| Some(clock.waiting_since()) >= next));
        assert_eq!(open.len(), 1);
    }
}
