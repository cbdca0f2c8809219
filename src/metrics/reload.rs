//! What became of reloads.

use std::time::SystemTime;

use prometheus::{Gauge, IntCounter, IntGauge};

/// The families of reloads.
#[derive(Clone, Debug)]
pub struct ReloadMetrics {
    reloads: IntCounter,
    failures: IntCounter,
    last_successful: IntGauge,
    last_success: Gauge,
}

impl ReloadMetrics {
    pub(super) fn register(to: &prometheus::Registry) -> prometheus::Result<ReloadMetrics> {
        let metrics = ReloadMetrics {
            reloads: IntCounter::new(
                "vsock_config_reloads_total",
                "Reloads that were tried, those that were refused included.",
            )?,
            failures: IntCounter::new(
                "vsock_config_reload_failures_total",
                "Reloads that were refused. The configuration before them stayed in use, whole.",
            )?,
            last_successful: IntGauge::new(
                "vsock_config_last_reload_successful",
                "1 if the configuration in use is the one that was read last, 0 if that one was refused.",
            )?,
            last_success: Gauge::new(
                "vsock_config_last_reload_success_timestamp_seconds",
                "Unix time of the last reload that was not refused, or of the start.",
            )?,
        };
        to.register(Box::new(metrics.reloads.clone()))?;
        to.register(Box::new(metrics.failures.clone()))?;
        to.register(Box::new(metrics.last_successful.clone()))?;
        to.register(Box::new(metrics.last_success.clone()))?;
        Ok(metrics)
    }

    /// The start, which is no reload.
    pub fn started(&self, at: SystemTime) {
        self.last_successful.set(1);
        let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.last_success.set(since.as_secs_f64());
    }

    /// A reload that was not refused.
    pub fn succeeded(&self, at: SystemTime) {
        // What it came to first: who sees it counted sees that too.
        self.started(at);
        self.reloads.inc();
    }

    /// A reload that was refused.
    pub fn refused(&self) {
        self.last_successful.set(0);
        self.failures.inc();
        self.reloads.inc();
    }
}
