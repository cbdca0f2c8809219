//! The server of KubeVirt's hooks: gRPC on a unix socket, without TLS.
//!
//! It has a thread and a runtime of its own, so that neither a probe waits for a domain nor a domain for a probe. Who can reach
//! the socket is in the pod already, so nobody is told apart from virt-launcher; but everything is bounded:
//!
//! | what | bound | afterwards |
//! |---|---|---|
//! | connections | [`MAX_CONNECTIONS`] | the oldest is closed |
//! | a connection | [`MAX_LIFE`], a little more than virt-launcher gives a call | closed |
//! | calls of a connection at once | [`MAX_STREAMS`] | HTTP/2 makes them wait |
//! | a message | [`MAX_MESSAGE`] | `OUT_OF_RANGE` |
//! | headers of a call | [`MAX_HEADERS`] | refused by HTTP/2 |
//!
//! So at most `MAX_CONNECTIONS * MAX_STREAMS * MAX_MESSAGE` bytes are held for messages.

pub mod messages;
mod service;

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{debug, info, warn};

use super::domain;
use super::place::Hook;
use crate::sys::unix_socket::{BindError, SocketGuard, bind_unix};
use service::Service;

/// Connections at once; virt-launcher makes one for each call.
pub const MAX_CONNECTIONS: usize = 4;
/// How long a connection may last; virt-launcher gives a call a minute.
pub const MAX_LIFE: Duration = Duration::from_secs(70);
/// Calls at once on a connection.
pub const MAX_STREAMS: u32 = 2;
/// Bytes of a message, with domain and VMI in it; Go's gRPC has the same limit for what it receives.
pub const MAX_MESSAGE: usize = domain::MAX_LENGTH;
/// Bytes of a call's headers.
pub const MAX_HEADERS: u32 = 16 * 1024;

/// User and group may connect: `compute` runs as the same user, or as another of the same group.
const SOCKET_MODE: u32 = 0o660;
/// Answers that are under way have so long to end at shutdown.
const LINGER: Duration = Duration::from_secs(1);
/// Wait after a failed accept: a connection that cannot be accepted keeps the listener readable.
const BACKOFF: Duration = Duration::from_millis(200);

/// Why the hook cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// Its socket cannot be had.
    #[error("KubeVirt hook: {0}")]
    Bind(#[from] BindError),
    /// Its thread or its runtime could not be made.
    #[error("cannot start the thread of the KubeVirt hook: {0}")]
    Thread(io::Error),
}

/// A hook that is served; ends when dropped, and its socket's file is gone.
#[derive(Debug)]
pub struct HookHandle {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for HookHandle {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // It has panicked, which the panic's own message has told.
            let _ = thread.join();
        }
    }
}

impl Hook {
    /// Serves the hook on a thread of its own. `shutdown` is called, on that thread, when KubeVirt says that the virtual machine is
    /// gone; perhaps more than once.
    ///
    /// **To be called when the vhost-user socket listens**: as soon as the hook's file is there, virt-launcher may start QEMU.
    pub fn serve(self, shutdown: impl Fn() + Send + Sync + 'static) -> Result<HookHandle, HookError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(HookError::Thread)?;
        let (listener, guard) = bind_unix(&self.socket, SOCKET_MODE)?;
        info!(
            hook = %self.socket.display(), socket = self.device.socket(),
            "KubeVirt's hooks are served, and domains get a vsock on this socket"
        );
        let service = Arc::new(Service::new(self.device, shutdown));
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::Builder::new()
            .name("kubevirt-hook".to_owned())
            .spawn(move || run(&runtime, listener, guard, &service, stopped))
            .map_err(HookError::Thread)?;
        Ok(HookHandle {
            stop,
            thread: Some(thread),
        })
    }
}

fn run(
    runtime: &Runtime,
    listener: StdListener,
    guard: SocketGuard,
    service: &Arc<Service>,
    stopped: watch::Receiver<bool>,
) {
    runtime.block_on(async {
        match UnixListener::from_std(listener) {
            Ok(listener) => accept(listener, guard, service, stopped).await,
            Err(error) => warn!(%error, "the KubeVirt hook cannot be served"),
        }
    });
}

/// Completes when the handle is dropped.
async fn stop_of(mut stopped: watch::Receiver<bool>) {
    // An error means that the handle is gone, which is the same.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

async fn accept(
    listener: UnixListener,
    guard: SocketGuard,
    service: &Arc<Service>,
    stopped: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::new();
    let mut stop = std::pin::pin!(stop_of(stopped.clone()));
    loop {
        let accepted = tokio::select! {
            () = stop.as_mut() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!(%error, "cannot accept a connection to the KubeVirt hook");
                tokio::time::sleep(BACKOFF).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        oldest_first.retain(|connection| !connection.is_finished());
        // Nobody can keep virt-launcher out by opening connections and saying nothing.
        if oldest_first.len() >= MAX_CONNECTIONS
            && let Some(oldest) = oldest_first.pop_front()
        {
            oldest.abort();
        }
        oldest_first.push_back(connections.spawn(serve(
            stream,
            Arc::clone(service),
            stop_of(stopped.clone()),
        )));
    }
    // The file goes before its listener, so that a client finds either a server or nothing.
    drop(guard);
    drop(listener);
    let _ = tokio::time::timeout(LINGER, async { while connections.join_next().await.is_some() {} }).await;
}

async fn serve(stream: UnixStream, service: Arc<Service>, stop: impl Future<Output = ()>) {
    let answer = service_fn(move |request| Arc::clone(&service).answer(request));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = tokio::time::sleep(MAX_LIFE) => return,
    };
    if let Err(error) = ended {
        debug!(%error, "a connection to the KubeVirt hook has failed");
    }
}
