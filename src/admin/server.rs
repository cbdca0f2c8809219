//! The admin thread: accepts, bounds and ends connections.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::sys::unix_socket::SocketGuard;

use super::connection::{Clock, Serve};
use super::listen::{AdminError, Bound};
use super::local::Peer;
use super::pace::Pace;
use super::places::{Origin, Places};
use super::{Admin, Limits};

/// What a client over the limit is told, where it fits into its socket at once.
const BUSY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 21\r\n\
      retry-after: 1\r\nconnection: close\r\n\r\ntoo many connections\n";

/// Responses that are under way have so long to end at shutdown.
const LINGER: Duration = Duration::from_secs(1);
/// File descriptors in reserve for each listener: a probe and a scrape.
const RESERVE: usize = 2;
/// Wait after a failed accept, doubled up to [`MAX_BACKOFF`]: a listener with a connection that cannot be
/// accepted stays readable, and a loop without a wait would spin.
const MIN_BACKOFF: Duration = Duration::from_millis(20);
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// A running admin server; ends when dropped.
#[derive(Debug)]
pub struct AdminHandle {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl AdminHandle {
    /// Stops listening, lets responses that are under way end (for one second at most), and waits for the thread.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl Drop for AdminHandle {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // It has panicked, which the panic's own message has told.
            let _ = thread.join();
        }
    }
}

pub(super) fn spawn(bound: Vec<Bound>, admin: Admin, limits: Limits) -> Result<AdminHandle, AdminError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AdminError::Thread)?;
    let listeners = {
        let _context = runtime.enter();
        bound
            .into_iter()
            .map(Listener::new)
            .collect::<io::Result<Vec<_>>>()
            .map_err(AdminError::Thread)?
    };
    let reserve = Arc::new(Reserve::new(listeners.len() * RESERVE));
    let (stop, stopped) = watch::channel(false);
    let thread = std::thread::Builder::new()
        .name("admin".to_owned())
        .spawn(move || run(runtime, listeners, admin, limits, reserve, stopped))
        .map_err(AdminError::Thread)?;
    Ok(AdminHandle {
        stop,
        thread: Some(thread),
    })
}

fn run(
    runtime: Runtime,
    listeners: Vec<Listener>,
    admin: Admin,
    limits: Limits,
    reserve: Arc<Reserve>,
    stopped: watch::Receiver<bool>,
) {
    runtime.block_on(async {
        let mut loops = JoinSet::new();
        for listener in listeners {
            loops.spawn(accept_loop(
                listener,
                admin.clone(),
                limits,
                reserve.clone(),
                stopped.clone(),
            ));
        }
        stop_of(stopped).await;
        let _ = tokio::time::timeout(LINGER, async { while loops.join_next().await.is_some() {} }).await;
    });
}

/// Completes when the handle is dropped.
async fn stop_of(mut stopped: watch::Receiver<bool>) {
    // An error means that the handle is gone, which is the same.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Accepts until the server stops, then waits for the connections. Dropping it ends them.
async fn accept_loop(
    listener: Listener,
    admin: Admin,
    limits: Limits,
    reserve: Arc<Reserve>,
    stopped: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let mut places = Places::new(limits);
    let pace = listener.pace();
    let mut accepting = Accepting {
        listener,
        reserve,
        backoff: MIN_BACKOFF,
    };
    let mut stop = std::pin::pin!(stop_of(stopped.clone()));
    loop {
        let (stream, keep_alive) = tokio::select! {
            () = stop.as_mut() => break,
            accepted = accepting.next() => accepted,
        };
        while connections.try_join_next().is_some() {}
        let peer = stream.peer();
        if !places.make_room(Origin::of(peer)).await {
            stream.refuse();
            continue;
        }
        let clock = Clock::new(limits);
        let (serve, reserve) = (
            Serve {
                admin: admin.clone(),
                limits,
                peer,
                pace: pace.clone(),
                keep_alive,
                clock: clock.clone(),
            },
            accepting.reserve.clone(),
        );
        let stop = stop_of(stopped.clone());
        let task = connections.spawn(async move {
            match stream {
                Stream::Tcp(tcp) => serve.run(tcp, stop).await,
                Stream::Unix(unix) => serve.run(unix, stop).await,
            }
            // At once, before anybody else takes the descriptor that was just closed.
            reserve.refill();
        });
        places.take(Origin::of(peer), clock, task);
    }
    // The socket file goes before its listener, so that a client finds either a server or nothing.
    drop(accepting);
    while connections.join_next().await.is_some() {}
}

/// File descriptors kept for the day when the process has none left.
///
/// The data path may use up all descriptors, and a liveness probe that is not answered for this ends the
/// process with all its connections. So a few are held in reserve; one is closed to accept one connection,
/// which is answered once and closed, and is then taken again.
struct Reserve {
    files: Mutex<Vec<File>>,
    size: usize,
}

impl Reserve {
    fn new(size: usize) -> Reserve {
        let reserve = Reserve {
            files: Mutex::default(),
            size,
        };
        reserve.refill();
        reserve
    }

    /// Takes what is missing; returns whether nothing is.
    fn refill(&self) -> bool {
        let mut files = self.lock();
        while files.len() < self.size {
            match File::open("/dev/null") {
                Ok(file) => files.push(file),
                Err(_) => return false,
            }
        }
        true
    }

    /// Closes one; returns whether there was one.
    fn release(&self) -> bool {
        self.lock().pop().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<File>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A listener that goes on when the process has no file descriptor left.
struct Accepting {
    listener: Listener,
    reserve: Arc<Reserve>,
    backoff: Duration,
}

impl Accepting {
    /// The next connection, and whether it may be kept for more than one request.
    async fn next(&mut self) -> (Stream, bool) {
        loop {
            let error = match self.listener.accept().await {
                Ok(stream) => {
                    self.backoff = MIN_BACKOFF;
                    return (stream, self.reserve.refill());
                }
                Err(error) => error,
            };
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
            ) {
                continue;
            }
            let exhausted = [Errno::MFILE, Errno::NFILE].map(|errno| Some(errno.raw_os_error()));
            if exhausted.contains(&error.raw_os_error())
                && self.reserve.release()
                && let Ok(stream) = self.listener.accept().await
            {
                return (stream, false);
            }
            // Once for each time it happens, not for each time it goes on.
            if self.backoff == MIN_BACKOFF {
                tracing::warn!(%error, "admin server cannot accept connections");
            }
            tokio::time::sleep(self.backoff).await;
            self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix {
        /// Comes first, so that it is dropped first and the file goes before its listener.
        _guard: SocketGuard,
        listener: UnixListener,
    },
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    fn new(bound: Bound) -> io::Result<Listener> {
        Ok(match bound {
            Bound::Tcp(listener) => Listener::Tcp(TcpListener::from_std(listener)?),
            Bound::Unix(listener, guard) => Listener::Unix {
                _guard: guard,
                listener: UnixListener::from_std(listener)?,
            },
        })
    }

    fn pace(&self) -> Pace {
        match self {
            Listener::Tcp(_) => Pace::bounded(),
            Listener::Unix { .. } => Pace::free(),
        }
    }

    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // A response is one write; waiting for more to send with it would only be late.
                let _ = stream.set_nodelay(true);
                Ok(Stream::Tcp(stream))
            }
            Listener::Unix { listener, .. } => Ok(Stream::Unix(listener.accept().await?.0)),
        }
    }
}

impl Stream {
    fn peer(&self) -> Peer {
        match self {
            Stream::Tcp(stream) => Peer::Tcp(stream.peer_addr().ok()),
            Stream::Unix(_) => Peer::Unix,
        }
    }

    /// Says why and closes, without waiting for the client.
    fn refuse(self) {
        let _ = match &self {
            Stream::Tcp(stream) => stream.try_write(BUSY),
            Stream::Unix(stream) => stream.try_write(BUSY),
        };
    }
}
