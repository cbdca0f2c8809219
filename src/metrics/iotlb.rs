//! The metric families of one guest's IOTLB: translations of a virtual IOMMU, under VIRTIO_F_ACCESS_PLATFORM.
//!
//! The IOTLB counts for itself; its owner brings these up to date at the end of a turn in which something has changed.
//! A guest without translations keeps all of them at 0.

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::families::Registrar;

/// Labels of `access`: what an access was for.
pub const ACCESS_LABELS: [&str; 2] = ["read", "write"];

/// From a translation in the VMM's own cache to a VMM that is busy with something else. A round trip to QEMU takes about
/// 100 microseconds.
const MISS_BUCKETS: &[f64] = &[
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
];

/// The families, one series each for a guest.
pub(super) struct IotlbFamilies {
    entries: IntGaugeVec,
    mapped_bytes: IntGaugeVec,
    lookups: IntCounterVec,
    misses: IntCounterVec,
    unanswered: IntGaugeVec,
    miss_duration: HistogramVec,
    updates: IntCounterVec,
    invalidations: IntCounterVec,
    flushes: IntCounterVec,
    evictions: IntCounterVec,
    faults: IntCounterVec,
}

impl IotlbFamilies {
    pub(super) fn register(to: &mut Registrar<'_>) -> prometheus::Result<IotlbFamilies> {
        Ok(IotlbFamilies {
            entries: to.gauges(
                "vsock_iotlb_entries",
                "Translations that are held now.",
                &["guest"],
            )?,
            mapped_bytes: to.gauges(
                "vsock_iotlb_mapped_bytes",
                "Bytes of I/O virtual addresses that the translations cover.",
                &["guest"],
            )?,
            lookups: to.counters(
                "vsock_iotlb_lookups_total",
                "Lookups of I/O virtual addresses, those that found a translation and those that did not.",
                &["guest"],
            )?,
            misses: to.counters(
                "vsock_iotlb_misses_total",
                "Lookups of I/O virtual addresses that found no translation.",
                &["guest"],
            )?,
            unanswered: to.gauges(
                "vsock_iotlb_unanswered_misses",
                "Translations that the VMM was asked for and has not answered.",
                &["guest"],
            )?,
            miss_duration: to.histograms(
                "vsock_iotlb_miss_duration_seconds",
                "Time from asking the VMM for a translation to its answer, refusals included.",
                &["guest"],
                MISS_BUCKETS,
            )?,
            updates: to.counters(
                "vsock_iotlb_updates_total",
                "IOTLB UPDATE messages of the VMM that were carried out.",
                &["guest"],
            )?,
            invalidations: to.counters(
                "vsock_iotlb_invalidations_total",
                "IOTLB INVALIDATE messages of the VMM that were carried out.",
                &["guest"],
            )?,
            flushes: to.counters(
                "vsock_iotlb_flushes_total",
                "Times all translations were dropped because rings stopped or features or memory changed.",
                &["guest"],
            )?,
            evictions: to.counters(
                "vsock_iotlb_evictions_total",
                "Translations that were dropped to make room for others.",
                &["guest"],
            )?,
            faults: to.counters(
                "vsock_iotlb_faults_total",
                "Translations that the VMM refused, by what the access was for.",
                &["guest", "access"],
            )?,
        })
    }

    pub(super) fn resolve(&self, guest: &str) -> IotlbMetrics {
        IotlbMetrics {
            entries: self.entries.with_label_values(&[guest]),
            mapped_bytes: self.mapped_bytes.with_label_values(&[guest]),
            lookups: self.lookups.with_label_values(&[guest]),
            misses: self.misses.with_label_values(&[guest]),
            unanswered: self.unanswered.with_label_values(&[guest]),
            miss_duration: self.miss_duration.with_label_values(&[guest]),
            updates: self.updates.with_label_values(&[guest]),
            invalidations: self.invalidations.with_label_values(&[guest]),
            flushes: self.flushes.with_label_values(&[guest]),
            evictions: self.evictions.with_label_values(&[guest]),
            faults: ACCESS_LABELS.map(|access| self.faults.with_label_values(&[guest, access])),
        }
    }
}

/// What one guest's IOTLB holds and has seen.
#[derive(Clone, Debug)]
pub struct IotlbMetrics {
    /// Translations that are held.
    pub entries: IntGauge,
    /// Bytes that they cover.
    pub mapped_bytes: IntGauge,
    /// Lookups.
    pub lookups: IntCounter,
    /// Lookups that found nothing.
    pub misses: IntCounter,
    /// Misses that are told and not answered.
    pub unanswered: IntGauge,
    /// Seconds from telling a miss to its answer.
    pub miss_duration: Histogram,
    /// UPDATE messages.
    pub updates: IntCounter,
    /// INVALIDATE messages.
    pub invalidations: IntCounter,
    /// Times everything was forgotten.
    pub flushes: IntCounter,
    /// Translations dropped to make room.
    pub evictions: IntCounter,
    /// Refused translations, in the order of [`ACCESS_LABELS`].
    pub faults: [IntCounter; 2],
}
