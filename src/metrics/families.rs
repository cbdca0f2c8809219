//! Families whose series stay until they are forgotten by name.

use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::{CounterVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts};

use std::collections::HashMap;

/// Makes families, and remembers how to forget a guest in each of them.
pub(super) struct Registrar<'a> {
    to: &'a prometheus::Registry,
    forgets: Vec<Forget>,
}

/// Forgets a guest in one family.
type Forget = Box<dyn Fn(&str) + Send + Sync>;

/// All families in which a guest has series of its own.
pub(super) struct OfGuests(Vec<Forget>);

impl<'a> Registrar<'a> {
    pub(super) fn new(to: &'a prometheus::Registry) -> Registrar<'a> {
        Registrar {
            to,
            forgets: Vec::new(),
        }
    }

    /// From now on guests are forgotten in what has been made since the last call.
    pub(super) fn take_families(&mut self) -> OfGuests {
        OfGuests(std::mem::take(&mut self.forgets))
    }

    pub(super) fn counters(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Counters of seconds.
    pub(super) fn seconds(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> prometheus::Result<CounterVec> {
        self.add(CounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn gauges(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> prometheus::Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn histograms(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> prometheus::Result<HistogramVec> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.add(HistogramVec::new(options, labels)?)
    }

    fn add<T>(&mut self, family: MetricVec<T>) -> prometheus::Result<MetricVec<T>>
    where
        T: MetricVecBuilder + 'static,
        MetricVec<T>: Clone,
    {
        self.to.register(Box::new(family.clone()))?;
        let forgotten = family.clone();
        self.forgets
            .push(Box::new(move |guest| forget(&forgotten, &[("guest", guest)])));
        Ok(family)
    }
}

impl OfGuests {
    /// Removes every series of a guest.
    pub(super) fn forget(&self, guest: &str) {
        self.0.iter().for_each(|forget| forget(guest));
    }
}

/// Removes the series of a family that have these labels.
pub(super) fn forget<T: MetricVecBuilder>(family: &MetricVec<T>, wanted: &[(&str, &str)]) {
    for collected in family.collect() {
        for metric in collected.get_metric() {
            let pairs = metric.get_label().iter().map(|pair| (pair.name(), pair.value()));
            let labels: HashMap<&str, &str> = pairs.collect();
            if wanted.iter().all(|(name, value)| labels.get(name) == Some(value)) {
                // Somebody else has removed it.
                let _ = family.remove(&labels);
            }
        }
    }
}
