//! `vsock-sidecar webhook`: puts the sidecar into pods that ask for it, when the Kubernetes API server asks us.
//!
//! A program of its own that knows nothing of guests. It is needed where the cluster has no MutatingAdmissionPolicy (before
//! Kubernetes 1.36), and does the same.
//!
//! ```text
//!  API server ──TLS──▶ server ──▶ routes ──▶ review ──▶ inject ──▶ container
//!                        ▲         bytes,     JSON       the pod's    what is
//!               certificate       bounded     in, out    mutation     put in
//!               looked at again                             ▲
//!                                                 manifest ─┘  `vsock-sidecar inject FILE`, without a cluster
//! ```
//!
//! 1. [`inject()`] is a function of pod and settings. Its invariants are at its head; [`container`] is the one place where the
//!    container's fields are decided.
//! 2. Who asks for the sidecar gets it or is refused with a reason. So the MutatingWebhookConfiguration should have
//!    `failurePolicy: Fail`, and select by the label, so that the webhook's absence hurts nobody else.
//! 3. Nothing is asked of the API server: the webhook has no token and needs no rights.
//! 4. What strangers can make it hold is bounded: connections, bytes of bodies ([`Limits`]). JSON becomes values on the one thread
//!    that there is, so there is one tree of values at a time. All of it together is below the 128 MiB that the chart gives the
//!    container.
//! 5. What strangers hold makes room for who comes: the connection that has kept us waiting for the longest time is ended, and an
//!    ordinary review needs nothing of what all bodies share.

mod body;
mod certificate;
pub mod container;
mod der;
mod inject;
mod manifest;
mod patch;
mod refusal;
mod review;
mod routes;
mod run;
mod server;
mod settings;

use std::time::Duration;

pub use certificate::{CertificateError, Files};
pub use inject::{Outcome, inject};
pub use manifest::{ManifestError, Manifests, inject_manifests};
pub use patch::{DoesNotFit, Patched};
pub use refusal::Refusal;
pub use review::{BadReview, Reviewed, Subject, Verdict, review};
pub use run::{Error, Options, run};
pub use settings::{PullPolicy, Settings, SettingsError};

/// Bounds of the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Connections at once, for each listener. The API server opens one for each review that is under way (HTTP/1.1).
    pub connections: usize,
    /// Time for the TLS handshake, and for the first request's head after it.
    pub head: Duration,
    /// Time for a body from its head on.
    pub body: Duration,
    /// Time between two requests. Above the 90 s after which the API server closes by itself: a connection that we close may
    /// have a review on its way.
    pub idle: Duration,
    /// Bytes of one body. The API server takes objects of 3 MiB at most.
    pub body_bytes: usize,
    /// Bytes of each body that do not count to those of all. A pod of KubeVirt has some 20 KiB.
    pub ordinary_body: usize,
    /// Bytes of all bodies that are being read, beyond what each has of its own.
    pub all_bodies: usize,
}

impl Limits {
    /// What the program uses.
    pub const DEFAULT: Limits = Limits {
        connections: 256,
        head: Duration::from_secs(5),
        body: Duration::from_secs(5),
        idle: Duration::from_secs(120),
        body_bytes: 6 << 20,
        ordinary_body: 64 << 10,
        all_bodies: 24 << 20,
    };
}
