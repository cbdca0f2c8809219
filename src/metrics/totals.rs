//! What all guests of the process have together, and what of it they may have.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::page::{Family, Page, gauge};

static CONNECTIONS: Family = gauge(
    "vsock_sidecar_connections",
    &[],
    "Connections of all guests, those included that are not established yet.",
);
static CONNECTIONS_LIMIT: Family = gauge(
    "vsock_sidecar_connections_limit",
    &[],
    "Connections that all guests may have at once (limits.connections of the file).",
);
static MEMORY: Family = gauge(
    "vsock_sidecar_buffer_memory_bytes",
    &[],
    "Memory of buffers for bytes that services do not take, all guests together.",
);
static MEMORY_LIMIT: Family = gauge(
    "vsock_sidecar_buffer_memory_limit_bytes",
    &[],
    "Memory that such buffers of all guests may have (limits.memory of the file).",
);
static DESCRIPTORS: Family = gauge(
    "vsock_sidecar_descriptors",
    &[],
    "File descriptors of connections: clients, targets, and dials under way.",
);
static DESCRIPTORS_LIMIT: Family = gauge(
    "vsock_sidecar_descriptors_limit",
    &[],
    "File descriptors that connections may have: RLIMIT_NOFILE without what the rest of the process needs.",
);

static FAMILIES: [&Family; 6] = [
    &CONNECTIONS,
    &CONNECTIONS_LIMIT,
    &MEMORY,
    &MEMORY_LIMIT,
    &DESCRIPTORS,
    &DESCRIPTORS_LIMIT,
];

/// How much is used, and how much there is; `None`: it is only counted.
pub type Used = (u64, Option<u64>);

/// What all guests have together.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct TotalsSample {
    /// Connections.
    pub connections: Used,
    /// Bytes of memory for buffers.
    pub memory: Used,
    /// File descriptors of connections.
    pub descriptors: Used,
}

type Sampler = Box<dyn Fn() -> TotalsSample + Send + Sync>;

/// Asks a sampler at each scrape; shows nothing as long as there is none.
#[derive(Clone)]
pub(super) struct SidecarTotals {
    descs: Arc<[Desc]>,
    sample: Arc<Mutex<Option<Sampler>>>,
}

impl SidecarTotals {
    pub(super) fn register(to: &prometheus::Registry) -> prometheus::Result<SidecarTotals> {
        let descs: Vec<Desc> = FAMILIES.into_iter().map(Family::desc).collect::<Result<_, _>>()?;
        let totals = SidecarTotals {
            descs: descs.into(),
            sample: Arc::default(),
        };
        to.register(Box::new(totals.clone()))?;
        Ok(totals)
    }

    pub(super) fn set(&self, sample: Sampler) {
        *self.sample.lock().unwrap_or_else(PoisonError::into_inner) = Some(sample);
    }
}

impl Collector for SidecarTotals {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let sampler = self.sample.lock().unwrap_or_else(PoisonError::into_inner);
        let mut page = Page::default();
        if let Some(sample) = sampler.as_ref().map(|sample| sample()) {
            let pairs = [
                (sample.connections, &CONNECTIONS, &CONNECTIONS_LIMIT),
                (sample.memory, &MEMORY, &MEMORY_LIMIT),
                (sample.descriptors, &DESCRIPTORS, &DESCRIPTORS_LIMIT),
            ];
            for ((used, limit), of_used, of_limit) in pairs {
                page.push(of_used, &[], used as f64);
                page.push(of_limit, &[], limit.map_or(f64::INFINITY, |limit| limit as f64));
            }
        }
        page.finish()
    }
}
