//! The metric families and the registry that `/metrics` prints. Knows nothing of who counts.
//!
//! Three kinds of families, by where their truth is:
//! - the data path counts into handles that were resolved once ([`GuestMetrics`]): a relaxed add, no lock, no look-up;
//! - a session keeps its own state, which is *sampled* at each scrape ([`SessionSample`]);
//! - the rest (build, rules, log messages, process) is set once or read from `/proc`.
//!
//! What bounds the number of series: labels take values from closed lists and from the configuration, never
//! from a guest or a peer, and at most [`MAX_RULES`] rule names of a guest and direction are told apart, and as many of earlier
//! configurations whose connections have not ended. (The one exception is the hint which VMM is connected: one short value for
//! a guest at a time.) Series of rules and guests that a reload has removed disappear.
//!
//! `docs/metrics.md` lists every family; a test holds it against this module.

use std::sync::Arc;

use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts};

mod families;
mod guest;
mod iotlb;
pub mod names;
mod page;
mod process;
mod reload;
mod rules;
mod session;
#[cfg(test)]
mod tests;
mod totals;
mod webhook;

pub use guest::{
    BusyPollMetrics, Direction, GuestMetrics, LabelSets, OP_LABELS, QUEUE_LABELS, QueueMetrics,
    SOCKET_TYPE_LABELS,
};
pub use iotlb::{ACCESS_LABELS, IotlbMetrics};
pub use process::open_descriptors;
pub use reload::ReloadMetrics;
pub use rules::{MAX_RULES, OVERFLOW_RULE, RuleMetrics};
pub use session::{MemoryMapChanges, RingSample, SESSION_ERROR_REASONS, SessionSample, SessionState};
pub use totals::{TotalsSample, Used};
pub use webhook::{CONNECTION_FAILURES, REVIEW_RESULTS, WebhookRegistry};

/// All families of the process.
pub struct Registry {
    registry: prometheus::Registry,
    guests: guest::GuestFamilies,
    sessions: session::Sessions,
    totals: totals::SidecarTotals,
    log_messages: LogMessages,
    config_info: IntGaugeVec,
    confinement: IntGaugeVec,
    refused_system_calls: IntCounter,
    reloads: ReloadMetrics,
}

impl Registry {
    /// A registry with every family registered.
    pub fn new() -> prometheus::Result<Registry> {
        let registry = prometheus::Registry::new();
        let guests = guest::GuestFamilies::register(&registry)?;
        let sessions = session::Sessions::register(&registry)?;
        let totals = totals::SidecarTotals::register(&registry)?;
        process::Process::register(&registry)?;
        let log_messages = LogMessages::register(&registry)?;
        BuildInfo::CURRENT.register(&registry)?;
        let config_info = IntGaugeVec::new(
            Opts::new(
                "vsock_config_info",
                "Fingerprint of the configuration in use, constant 1.",
            ),
            &["sha256"],
        )?;
        registry.register(Box::new(config_info.clone()))?;
        let confinement = IntGaugeVec::new(
            Opts::new(
                "vsock_confinement",
                "1 for each means of confinement that is active in this process.",
            ),
            &["kind"],
        )?;
        registry.register(Box::new(confinement.clone()))?;
        for kind in names::CONFINEMENT_KINDS {
            confinement.with_label_values(&[kind]).set(0);
        }
        let refused_system_calls = IntCounter::new(
            "vsock_refused_system_calls_total",
            "System calls of this process that its seccomp filter refused.",
        )?;
        registry.register(Box::new(refused_system_calls.clone()))?;
        let reloads = ReloadMetrics::register(&registry)?;
        Ok(Registry {
            registry,
            guests,
            sessions,
            totals,
            log_messages,
            config_info,
            confinement,
            refused_system_calls,
            reloads,
        })
    }

    /// The metrics of one guest, every known label value initialised to 0; those of its rules come with
    /// [`GuestMetrics::rules`].
    pub fn guest(&self, name: &str, labels: &LabelSets) -> Arc<GuestMetrics> {
        Arc::new(GuestMetrics::resolve(&self.guests, name, labels))
    }

    /// Removes the series of a guest that is no more. Nothing may count for it any longer; series of its rules end when nobody
    /// holds them.
    pub fn remove_guest(&self, name: &str) {
        self.sessions.remove(name);
        self.guests.forget(name);
    }

    /// The families of reloads.
    pub fn reloads(&self) -> ReloadMetrics {
        self.reloads.clone()
    }

    /// Exports a guest's session: `sample` is called at each scrape, on the scraping thread, one call at a
    /// time. It must not block for long and must not scrape. A second call for the same guest replaces the
    /// first sampler; the counters go on.
    pub fn add_session(&self, guest: &str, sample: impl Fn() -> SessionSample + Send + Sync + 'static) {
        self.sessions.add(guest, Box::new(sample));
    }

    /// Exports what all guests have together: `sample` is called at each scrape, as that of a session.
    pub fn set_totals(&self, sample: impl Fn() -> TotalsSample + Send + Sync + 'static) {
        self.totals.set(Box::new(sample));
    }

    /// Exports which configuration runs. `sha256` is the digest of the file in hexadecimal; its first 12 digits
    /// are shown.
    pub fn set_config(&self, sha256: &str) {
        self.config_info.reset();
        self.config_info
            .with_label_values(&[sha256.get(..12).unwrap_or(sha256)])
            .set(1);
    }

    /// Exports whether a means of confinement is active, one of [`names::CONFINEMENT_KINDS`].
    pub fn set_confinement(&self, kind: &str, active: bool) {
        self.confinement.with_label_values(&[kind]).set(active.into());
    }

    /// The counter of system calls that the seccomp filter refused.
    pub fn refused_system_calls(&self) -> IntCounter {
        self.refused_system_calls.clone()
    }

    /// The counters of warnings and errors in the log.
    pub fn log_messages(&self) -> LogMessages {
        self.log_messages.clone()
    }

    /// The text form of all families (Prometheus text format 0.0.4).
    pub fn encode(&self) -> prometheus::Result<String> {
        prometheus::TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// Counters of log events by level.
#[derive(Clone, Debug)]
pub struct LogMessages {
    /// Warnings.
    pub warn: IntCounter,
    /// Errors.
    pub error: IntCounter,
    /// Events of any level that were not written because the log was not read fast enough.
    pub dropped: IntCounter,
}

impl LogMessages {
    fn register(to: &prometheus::Registry) -> prometheus::Result<LogMessages> {
        let family = IntCounterVec::new(
            Opts::new(
                "vsock_log_messages_total",
                "Warnings and errors written to the log.",
            ),
            &["level"],
        )?;
        to.register(Box::new(family.clone()))?;
        let dropped = IntCounter::new(
            "vsock_log_messages_dropped_total",
            "Log events that were dropped because whoever reads the log was too slow.",
        )?;
        to.register(Box::new(dropped.clone()))?;
        let [warn, error] = ["warn", "error"].map(|level| family.with_label_values(&[level]));
        Ok(LogMessages { warn, error, dropped })
    }
}

/// What was built, from what, by what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BuildInfo {
    /// Version of the package.
    pub version: &'static str,
    /// Commit of the source, `unknown` if it was built from no repository.
    pub revision: &'static str,
    /// Version of the compiler.
    pub rustc: &'static str,
    /// Target triple.
    pub target: &'static str,
}

impl BuildInfo {
    /// This build.
    pub const CURRENT: BuildInfo = BuildInfo {
        version: env!("CARGO_PKG_VERSION"),
        revision: env!("VSOCK_SIDECAR_REVISION"),
        rustc: env!("VSOCK_SIDECAR_RUSTC"),
        target: env!("VSOCK_SIDECAR_TARGET"),
    };

    fn register(&self, to: &prometheus::Registry) -> prometheus::Result<()> {
        let family = IntGaugeVec::new(
            Opts::new(
                "vsock_build_info",
                "Version, commit, compiler and target of this build, constant 1.",
            ),
            &["version", "revision", "rustc", "target"],
        )?;
        to.register(Box::new(family.clone()))?;
        family
            .with_label_values(&[self.version, self.revision, self.rustc, self.target])
            .set(1);
        Ok(())
    }
}
