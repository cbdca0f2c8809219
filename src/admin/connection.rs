//! One HTTP connection and its deadlines.
//!
//! hyper's own header timeout would also end an idle connection, and nothing in it ends a response that the
//! client does not take. So a connection is in a phase, which shows in its reads, writes and flushes, and each
//! phase has its deadline:
//!
//! A stream (a capture) is in a phase of its own until it has been made: `Answering -> Streaming -> Writing`.
//!
//! ```text
//!          first byte            head complete                              response taken
//!   Idle --------------> Head ---------------------> Answering -> Writing ------------------> Idle
//! ```

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::body::ReplyBody;
use super::local::Peer;
use super::pace::Pace;
use super::routes::Reply;
use super::{Admin, Limits, routes};

/// Most bytes of a request head.
const MAX_HEAD: usize = 16 * 1024;
/// Most fields of a request head.
const MAX_FIELDS: usize = 64;

/// How one connection is served.
pub(super) struct Serve {
    pub(super) admin: Admin,
    pub(super) limits: Limits,
    /// Who asks.
    pub(super) peer: Peer,
    /// Whose turn it is.
    pub(super) pace: Pace,
    /// Whether there may be more than one request.
    pub(super) keep_alive: bool,
    /// A new one; whoever has to choose a connection to end looks at it.
    pub(super) clock: Clock,
}

impl Serve {
    /// Serves `socket` until it ends, misses a deadline, or `stop` completes and the response that is under way
    /// is out.
    pub(super) async fn run(self, socket: impl Socket, stop: impl Future<Output = ()>) {
        let Serve {
            admin,
            limits,
            peer,
            pace,
            keep_alive,
            clock,
        } = self;
        let service = service_fn(|request: Request<Incoming>| {
            clock.requested();
            let (admin, clock, pace) = (&admin, &clock, &pace);
            async move {
                // One request a turn: who pipelines hundreds of them must not have a probe wait for all.
                tokio::task::yield_now().await;
                Ok::<_, Infallible>(
                    match routes::respond(admin, &request, peer, limits.answer, pace).await {
                        Reply::Whole(response) => response.map(ReplyBody::whole),
                        Reply::Streamed(response, lasts) => {
                            clock.streams(lasts);
                            let clock = clock.clone();
                            response.map(|chunks| ReplyBody::stream(chunks, move || clock.streamed()))
                        }
                    },
                )
            }
        });
        let io = TokioIo::new(Watched {
            socket,
            clock: clock.clone(),
        });
        let connection = http1::Builder::new()
            // `printf 'GET ...' | nc -N` ends its side at once and still wants the answer.
            .half_close(true)
            .keep_alive(keep_alive)
            .header_read_timeout(None)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_FIELDS)
            .serve_connection(io, service);
        let mut connection = pin!(connection);
        let mut stop = pin!(stop);
        let mut stopping = false;
        let mut deadline = pin!(tokio::time::sleep_until(clock.deadline()));
        poll_fn(|cx| {
            if !stopping && stop.as_mut().poll(cx).is_ready() {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            // An error is the client's: it went away, or sent what is no HTTP; it got its 400 or 431 where
            // possible.
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            // What the connection just did may have moved its deadline.
            if deadline.deadline() != clock.deadline() {
                deadline.as_mut().reset(clock.deadline());
            }
            deadline.as_mut().poll(cx)
        })
        .await;
    }
}

/// A TCP or unix stream.
pub(super) trait Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl Socket for tokio::net::TcpStream {}
impl Socket for tokio::net::UnixStream {}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Between two requests.
    Idle,
    /// A request head is being read.
    Head,
    /// A request is being answered; nothing of the answer has been written.
    Answering,
    /// The response is being written.
    Writing,
    /// A response is being made and written for so long. Flushes mean nothing: there is one after each piece.
    Streaming(Duration),
}

/// The phase of a connection and when it began; a response is one phase for its deadline.
#[derive(Clone)]
pub(super) struct Clock {
    /// Shared by the connection's service, its socket and its deadline, all of one task: never contended.
    phase: Arc<Mutex<(Phase, Instant)>>,
    /// Since when the socket is full; `None`: it is not.
    full: Arc<Mutex<Option<Instant>>>,
    limits: Limits,
}

impl Clock {
    /// A connection begins by owing a request head.
    pub(super) fn new(limits: Limits) -> Clock {
        Clock {
            phase: Arc::new(Mutex::new((Phase::Head, Instant::now()))),
            full: Arc::default(),
            limits,
        }
    }

    /// A request head is complete.
    fn requested(&self) {
        *self.lock() = (Phase::Answering, Instant::now());
    }

    /// Bytes came in.
    fn read(&self) {
        let mut phase = self.lock();
        if phase.0 == Phase::Idle {
            *phase = (Phase::Head, Instant::now());
        }
    }

    /// Passes on what came of a write.
    fn tried_to_write(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Ready(Ok(_)) => self.wrote(),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => {
                self.full().get_or_insert_with(Instant::now);
            }
        }
        written
    }

    /// Bytes of a response went out.
    fn wrote(&self) {
        *self.full() = None;
        let mut phase = self.lock();
        if phase.0 == Phase::Answering {
            phase.0 = Phase::Writing;
        }
    }

    /// hyper flushes the socket when it has nothing left to write, also while an answer is still being made. A
    /// response is one buffer (or the end of a stream is), so that the first flush after a write means that all of it is out.
    fn flushed(&self) {
        let mut phase = self.lock();
        if phase.0 == Phase::Writing {
            *phase = (Phase::Idle, Instant::now());
        }
    }

    /// The response will be made for so long. Its time for being taken begins then.
    fn streams(&self, lasts: Duration) {
        *self.lock() = (Phase::Streaming(lasts), Instant::now());
    }

    /// The stream has ended; what was written of it last may not be out.
    fn streamed(&self) {
        let mut phase = self.lock();
        if matches!(phase.0, Phase::Streaming(_)) {
            *phase = (Phase::Writing, Instant::now());
        }
    }

    /// Since when the client has owed us a request, if it does.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        let (phase, since) = *self.lock();
        matches!(phase, Phase::Idle | Phase::Head).then_some(since)
    }

    /// Since when the client has not taken what it asked for, if that is why nothing goes on.
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        *self.full()
    }

    /// Since when the connection does what it does now.
    pub(super) fn phase_since(&self) -> Instant {
        self.lock().1
    }

    fn deadline(&self) -> Instant {
        let (phase, since) = *self.lock();
        since
            + match phase {
                Phase::Idle => self.limits.idle,
                Phase::Head => self.limits.head,
                Phase::Answering | Phase::Writing => self.limits.response,
                Phase::Streaming(lasts) => lasts + self.limits.response,
            }
    }

    fn lock(&self) -> MutexGuard<'_, (Phase, Instant)> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn full(&self) -> MutexGuard<'_, Option<Instant>> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A socket that tells the clock what happens on it.
struct Watched<S> {
    socket: S,
    clock: Clock,
}

impl<S: Socket> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.clock.read();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: Socket> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.clock.tried_to_write(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.clock.tried_to_write(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
        self.clock.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
