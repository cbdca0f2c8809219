//! The device's translations: the IOTLB, the questions to the VMM, and what the metrics say of both.

use std::time::Instant;

use crate::guest::iotlb::CAPACITY;
use crate::guest::{GuestRam, Iotlb, IotlbStats, Mapping, Miss, Ring, View};
use crate::metrics::IotlbMetrics;

use super::RunningRing;
use super::handle::DeviceEvent;
use super::reports::Reports;
use super::snapshot::IotlbSnapshot;

/// Misses of which it is remembered when they were asked, for the histogram alone: those of a VMM that answers nothing
/// must not pile up. More than the IOTLB leaves open at once.
const MAX_ASKED: usize = 256;

/// The IOTLB of a device and what belongs to it.
pub(super) struct Translation {
    iotlb: Iotlb,
    /// Misses that were told and not answered, in that order, at most [`MAX_ASKED`].
    asked: Vec<(Miss, Instant)>,
    /// Something has been asked, ever.
    asks: bool,
    /// The IOTLB was used or changed since [`Translation::show`].
    touched: bool,
    /// What the metrics say.
    shown: IotlbStats,
}

impl Translation {
    pub(super) fn new() -> Translation {
        Translation {
            iotlb: Iotlb::new(),
            asked: Vec::new(),
            asks: false,
            touched: false,
            shown: IotlbStats::default(),
        }
    }

    /// Guest memory as `ring` addresses it.
    pub(super) fn view<'m>(&'m self, ring: &Ring, ram: &'m GuestRam) -> View<'m> {
        if ring.is_translated() {
            ram.view_through(&self.iotlb)
        } else {
            ram.view()
        }
    }

    /// The oldest miss without an answer, and since when.
    pub(super) fn oldest_unanswered(&self) -> Option<(Miss, Instant)> {
        // Asked for each turn: nothing to look for without an IOMMU.
        if !self.asks {
            return None;
        }
        self.iotlb.oldest_unanswered()
    }

    /// A ring is parked, and what it waits for was asked. If all answers have come, and brought nothing, the guest's next kick
    /// is what makes it ask again: so the guest has to be asked for that. `true` if it has added something meanwhile, for which
    /// no kick will come.
    pub(super) fn want_kick(&mut self, running: &mut RunningRing, ram: &GuestRam) -> bool {
        if !running.ring.is_translated() || self.iotlb.expects_answers() {
            return false;
        }
        let view = ram.view_through(&self.iotlb);
        // Where the ring's own pages are what is missing it cannot be told to the guest; that a miss is overdue is told.
        let came = running.ring.enable_notifications_parked(view) == Ok(true);
        if came {
            running.held = None;
            running.due = true;
            self.kicked();
        }
        came
    }

    /// Tells what has to be asked. To be called whenever a translated ring was looked at; if nobody listens, it waits.
    pub(super) fn ask(&mut self, reports: &Reports) {
        self.touched = true;
        if !reports.has_listener() {
            return;
        }
        // Not the turn's time: what is measured begins here.
        let now = Instant::now();
        for miss in self.iotlb.take_misses(now) {
            if self.asked.len() >= MAX_ASKED {
                self.asked.remove(0);
            }
            self.asked.push((miss, now));
            self.asks = true;
            reports.tell(DeviceEvent::Miss(miss));
        }
    }

    /// UPDATE.
    pub(super) fn update(&mut self, mappings: &[Mapping], metrics: &IotlbMetrics) {
        self.touched = true;
        metrics.updates.inc();
        for mapping in mappings {
            self.iotlb.insert(*mapping);
            self.observe(metrics, |miss| answers(mapping, miss));
        }
    }

    /// INVALIDATE.
    pub(super) fn invalidate(&mut self, first: u64, last: u64, metrics: &IotlbMetrics) {
        self.touched = true;
        metrics.invalidations.inc();
        self.iotlb.invalidate(first, last);
    }

    /// The VMM has answered.
    pub(super) fn answered(&mut self, miss: Miss, refused: bool, metrics: &IotlbMetrics) {
        self.touched = true;
        self.iotlb.answered(miss, refused);
        self.observe(metrics, |asked| *asked == miss);
    }

    /// The guest has kicked a ring that is translated.
    pub(super) fn kicked(&mut self) {
        self.iotlb.retry();
    }

    /// Forgets everything.
    pub(super) fn flush(&mut self, metrics: &IotlbMetrics) {
        let stats = self.iotlb.stats();
        // A device that translates nothing forgets nothing.
        if stats.entries > 0 || stats.unanswered > 0 {
            metrics.flushes.inc();
        }
        self.touched = true;
        self.iotlb.flush();
        self.asked.clear();
    }

    /// The VMM is gone.
    pub(super) fn end_session(&mut self, metrics: &IotlbMetrics) {
        self.flush(metrics);
        self.iotlb.end_session();
    }

    /// Brings the metrics up to date.
    pub(super) fn show(&mut self, metrics: &IotlbMetrics) {
        if !std::mem::take(&mut self.touched) {
            return;
        }
        let stats = self.iotlb.stats();
        let before = std::mem::replace(&mut self.shown, stats);
        if stats == before {
            return;
        }
        metrics.entries.set(gauge(stats.entries));
        metrics.mapped_bytes.set(gauge(stats.mapped_bytes));
        metrics.unanswered.set(gauge(stats.unanswered));
        let [faults_read, faults_write] = &metrics.faults;
        for (counter, now, before) in [
            (&metrics.lookups, stats.lookups, before.lookups),
            (&metrics.misses, stats.misses, before.misses),
            (&metrics.evictions, stats.evictions, before.evictions),
            (faults_read, stats.faults_read, before.faults_read),
            (faults_write, stats.faults_write, before.faults_write),
        ] {
            counter.inc_by(now.saturating_sub(before));
        }
    }

    /// What `/state` shows.
    pub(super) fn snapshot(&self, now: Instant, metrics: &IotlbMetrics) -> IotlbSnapshot {
        let stats = self.iotlb.stats();
        IotlbSnapshot {
            entries: stats.entries,
            mapped_bytes: stats.mapped_bytes,
            capacity: CAPACITY as u64,
            lookups: stats.lookups,
            hits: stats.lookups.saturating_sub(stats.misses),
            misses: stats.misses,
            updates: metrics.updates.get(),
            invalidations: metrics.invalidations.get(),
            flushes: metrics.flushes.get(),
            evictions: stats.evictions,
            faults_read: stats.faults_read,
            faults_write: stats.faults_write,
            unanswered: stats.unanswered,
            oldest_unanswered_seconds: self
                .oldest_unanswered()
                .map(|(_, since)| now.saturating_duration_since(since).as_secs_f64()),
        }
    }

    /// Measures how long the answered ones among the misses have waited.
    fn observe(&mut self, metrics: &IotlbMetrics, answered: impl Fn(&Miss) -> bool) {
        if self.asked.is_empty() {
            return;
        }
        let now = Instant::now();
        self.asked.retain(|(miss, since)| {
            let answered = answered(miss);
            if answered {
                metrics
                    .miss_duration
                    .observe(now.saturating_duration_since(*since).as_secs_f64());
            }
            !answered
        });
    }
}

/// Whether a mapping is what a miss asked for. A mapping that begins in the middle of the page may be; then the answer that
/// follows is what is measured.
fn answers(mapping: &Mapping, miss: &Miss) -> bool {
    let offset = miss.iova.checked_sub(mapping.iova);
    mapping.permission.allows(miss.access) && offset.is_some_and(|offset| offset < mapping.len)
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
