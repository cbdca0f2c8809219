//! The admin server: `/metrics`, probes, state and the status page over HTTP/1, on TCP and unix sockets at once.
//!
//! It has its own thread and its own current-thread runtime, so that probes answer whatever the device threads
//! do, and it sees the rest of the program only as values ([`Source`]). Strangers may reach it, so everything
//! is bounded:
//!
//! | what | bound | afterwards |
//! |---|---|---|
//! | connections of a listener | [`Limits::connections`] | one makes room, see `places`; 503 if none has to |
//! | a request head | [`Limits::head`] from its first byte, 16 KiB, 64 fields | closed; 431 |
//! | an idle connection | [`Limits::idle`] | closed |
//! | a response, until the client has taken it | [`Limits::response`] | closed |
//! | a capture, until the client has taken it | its time and [`Limits::response`] | closed |
//! | metrics, state and liveness over TCP | half of a processor, see `pace` | wait for their turn |
//! | a question to the device threads | [`Limits::answer`] | 503 that says so |
//!
//! Request bodies are never read. There is no TLS and no authentication: what is served here is for those who
//! can reach the pod's network or the socket file, and captures are for those who are on this machine.

use std::sync::Arc;
use std::time::Duration;

mod actions;
mod body;
mod capture;
mod connection;
mod listen;
mod local;
mod pace;
mod page;
mod places;
pub mod readiness;
mod routes;
mod server;

pub use actions::ACTIONS;
pub use capture::{CaptureRefused, CaptureRequest, Chunks};
pub use listen::{AdminError, AdminServer};
pub use readiness::{Latch, Readiness};
pub use routes::ROUTES;
pub use server::AdminHandle;

use crate::drain;

/// A future that a [`Source`] answers with.
pub type Answer<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Where the answers come from. Implemented by whoever knows the guests.
///
/// Every method is called on the admin thread, so none may block it: ask other threads with a future and a
/// deadline.
pub trait Source: Send + Sync + 'static {
    /// The text of `/metrics` (Prometheus text format 0.0.4), or why there is none.
    fn metrics(&self) -> Result<String, String>;

    /// The document of `/state`.
    fn state(&self) -> Answer<'_, serde_json::Value>;

    /// One check for each thread that has to be alive. Nothing here may depend on a VMM or a target: a failed
    /// liveness probe ends the process, and with it every guest's vsock.
    fn live(&self) -> Answer<'_, Vec<Check>>;

    /// What `/readyz` asks beside [`Admin::startup`] and [`Admin::ready`]: whether every guest is served as its
    /// configuration demands, now. It may come and go.
    fn ready(&self) -> Vec<Check> {
        Vec::new()
    }

    /// Reads the configuration again and says what came of it. May take seconds.
    fn reload(&self) -> Answer<'_, ReloadAnswer> {
        Box::pin(async { ReloadAnswer::Unavailable("there is no configuration to read again".to_owned()) })
    }

    /// Begins the drain at whose end the process ends. Again is no harm.
    fn begin_drain(&self) {}

    /// Begins a capture of a guest's packets: a pcapng file in pieces. Dropping it ends the capture.
    fn capture(&self, _: CaptureRequest) -> Answer<'_, Result<Box<dyn Chunks>, CaptureRefused>> {
        capture::no_guests()
    }
}

/// What came of a reload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReloadAnswer {
    /// The new configuration runs.
    Applied {
        /// What it changed, and what of it waits for a restart or a session, a sentence each.
        changes: Vec<String>,
    },
    /// It says what ran already.
    Unchanged,
    /// It is refused, and the one before stays in use.
    Refused(String),
    /// There is nobody to do it, for this reason.
    Unavailable(String),
}

/// One line of a probe's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Check {
    /// What was checked (`guest web`).
    pub name: String,
    /// What is missing, `None` if all is well.
    pub problem: Option<String>,
}

impl Check {
    /// A check that passed.
    pub fn ok(name: impl Into<String>) -> Check {
        Check {
            name: name.into(),
            problem: None,
        }
    }

    /// A check that failed, with what is missing.
    pub fn failed(name: impl Into<String>, problem: impl Into<String>) -> Check {
        Check {
            name: name.into(),
            problem: Some(problem.into()),
        }
    }
}

/// What the server serves.
#[derive(Clone)]
pub struct Admin {
    /// Metrics, state and liveness.
    pub source: Arc<dyn Source>,
    /// What has to be done before `/startupz` says yes (listeners bound).
    pub startup: Readiness,
    /// What has to hold, besides, for `/readyz` to say yes.
    pub ready: Readiness,
    /// `/readyz` says no once this drain has begun; `/livez` stays, since a pod that drains must not be killed
    /// for it.
    pub drain: drain::Watch,
}

/// Bounds of the server; the default is right, tests want shorter ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Connections at once, for each listener: a flood on TCP leaves the unix socket usable.
    pub connections: usize,
    /// Time for a request head, from its first byte (from the connection's beginning for the first).
    pub head: Duration,
    /// Time between two requests of a connection. Above the usual scrape intervals, so that Prometheus keeps its
    /// connection.
    pub idle: Duration,
    /// Time from a request until the client has taken the response.
    pub response: Duration,
    /// How long a client whose socket is full keeps its place when somebody else wants it.
    pub stall: Duration,
    /// Time for `state` and `live` to be answered. Below one second, which is the kubelet's patience by default.
    pub answer: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 64,
            head: Duration::from_secs(5),
            idle: Duration::from_secs(90),
            response: Duration::from_secs(30),
            stall: Duration::from_secs(1),
            answer: Duration::from_millis(800),
        }
    }
}
