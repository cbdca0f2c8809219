//! The metric families and the registry that `/metrics` prints. Knows nothing of who counts.

use std::sync::Arc;

mod guest;

pub use guest::{
    Direction, GuestMetrics, LabelSets, OP_LABELS, QUEUE_LABELS, QueueMetrics, RuleMetrics, RuleNames,
    SOCKET_TYPE_LABELS,
};

/// All families of the process.
pub struct Registry {
    registry: prometheus::Registry,
    guests: guest::GuestFamilies,
}

impl Registry {
    /// A registry with every family registered.
    pub fn new() -> prometheus::Result<Registry> {
        let registry = prometheus::Registry::new();
        let guests = guest::GuestFamilies::register(&registry)?;
        Ok(Registry { registry, guests })
    }

    /// The metrics of one guest, every known label value initialised to 0.
    pub fn guest(&self, name: &str, rules: &RuleNames, labels: &LabelSets) -> Arc<GuestMetrics> {
        Arc::new(GuestMetrics::resolve(&self.guests, name, rules, labels))
    }

    /// The text form of all families (Prometheus text format 0.0.4).
    pub fn encode(&self) -> prometheus::Result<String> {
        prometheus::TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
