//! The families of `vsock-sidecar webhook`, which has a registry of its own: none of a sidecar's would mean anything there.
//!
//! `docs/webhook.md` lists them.

use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts};

use super::{BuildInfo, LogMessages, names, process};

/// What becomes of a request to `/mutate`, as label values of `vsock_webhook_reviews_total`.
pub const REVIEW_RESULTS: [&str; 6] = [
    "injected",
    "unchanged",
    "not_selected",
    "refused",
    "malformed",
    "overload",
];
/// Why a connection ends without a request, as label values of `vsock_webhook_connection_failures_total`.
pub const CONNECTION_FAILURES: [&str; 3] = ["handshake", "timeout", "limit"];

/// All families of the webhook.
pub struct WebhookRegistry {
    registry: prometheus::Registry,
    log_messages: LogMessages,
    confinement: IntGaugeVec,
    refused_system_calls: IntCounter,
    reviews: IntCounterVec,
    connection_failures: IntCounterVec,
    /// Open TLS connections.
    pub connections: IntGauge,
    /// When the certificate in use ends, in Unix time.
    pub certificate_expiry: Gauge,
    /// Certificates that were taken after the first.
    pub certificate_reloads: IntCounter,
    /// Certificates that could not be used.
    pub certificate_reload_failures: IntCounter,
    /// Whether the certificate in the files is the one in use.
    pub certificate_current: IntGauge,
}

impl WebhookRegistry {
    /// A registry with every family registered, and every known label value at 0.
    ///
    /// # Errors
    /// None that a test would not have seen: names that are no names of metrics.
    pub fn new() -> prometheus::Result<WebhookRegistry> {
        let registry = prometheus::Registry::new();
        process::Process::register(&registry)?;
        BuildInfo::CURRENT.register(&registry)?;
        let log_messages = LogMessages::register(&registry)?;
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
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let by = |name: &str, help: &str, label: &str, values: &[&str]| {
            let family = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(family.clone()))?;
            for value in values {
                let _ = family.with_label_values(&[*value]);
            }
            Ok::<_, prometheus::Error>(family)
        };
        let refused_system_calls = counter(
            "vsock_refused_system_calls_total",
            "System calls of this process that its seccomp filter refused.",
        )?;
        let certificate_expiry = Gauge::new(
            "vsock_webhook_certificate_expiry_timestamp_seconds",
            "Unix time at which the certificate in use ends.",
        )?;
        registry.register(Box::new(certificate_expiry.clone()))?;
        Ok(WebhookRegistry {
            reviews: by(
                "vsock_webhook_reviews_total",
                "Requests of the API server, by what became of them.",
                "result",
                &REVIEW_RESULTS,
            )?,
            connection_failures: by(
                "vsock_webhook_connection_failures_total",
                "Connections that ended without an answered request, by reason.",
                "reason",
                &CONNECTION_FAILURES,
            )?,
            connections: gauge("vsock_webhook_connections", "Open TLS connections.")?,
            certificate_reloads: counter(
                "vsock_webhook_certificate_reloads_total",
                "Certificates that were taken into use after the first.",
            )?,
            certificate_reload_failures: counter(
                "vsock_webhook_certificate_reload_failures_total",
                "Changes of the certificate's files that could not be used.",
            )?,
            certificate_current: gauge(
                "vsock_webhook_certificate_last_reload_successful",
                "1 if the certificate in the files is the one in use.",
            )?,
            certificate_expiry,
            refused_system_calls,
            confinement,
            log_messages,
            registry,
        })
    }

    /// Counts a request; `result` is one of [`REVIEW_RESULTS`].
    pub fn reviewed(&self, result: &str) {
        self.reviews.with_label_values(&[result]).inc();
    }

    /// Counts a connection that came to nothing; `reason` is one of [`CONNECTION_FAILURES`].
    pub fn connection_failed(&self, reason: &str) {
        self.connection_failures.with_label_values(&[reason]).inc();
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
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn encode(&self) -> prometheus::Result<String> {
        prometheus::TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
