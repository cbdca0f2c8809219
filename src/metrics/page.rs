//! Families whose series are written anew at each scrape, from values that somebody else keeps.

use std::collections::HashMap;

use prometheus::core::Desc;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};

/// One exported family.
pub(super) struct Family {
    pub(super) name: &'static str,
    help: &'static str,
    kind: MetricType,
    labels: &'static [&'static str],
}

pub(super) const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Family {
    Family {
        name,
        help,
        kind: MetricType::GAUGE,
        labels,
    }
}

pub(super) const fn counter(
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Family {
    Family {
        name,
        help,
        kind: MetricType::COUNTER,
        labels,
    }
}

impl Family {
    /// What the registry wants to know of a collector before it takes it.
    pub(super) fn desc(&self) -> prometheus::Result<Desc> {
        let labels = self.labels.iter().map(|label| (*label).to_owned()).collect();
        Desc::new(self.name.to_owned(), self.help.to_owned(), labels, HashMap::new())
    }
}

/// The series of one scrape.
#[derive(Default)]
pub(super) struct Page(Vec<(&'static Family, Vec<Metric>)>);

impl Page {
    /// Adds a series; `labels` in the order of the family's label names.
    pub(super) fn push(&mut self, family: &'static Family, labels: &[&str], value: f64) {
        debug_assert_eq!(family.labels.len(), labels.len(), "{}", family.name);
        let pairs = family.labels.iter().zip(labels).map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        });
        let mut metric = Metric::from_label(pairs.collect());
        if family.kind == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        match self.0.iter_mut().find(|(known, _)| known.name == family.name) {
            Some((_, metrics)) => metrics.push(metric),
            None => self.0.push((family, vec![metric])),
        }
    }

    /// The families in the registry's form.
    pub(super) fn finish(self) -> Vec<MetricFamily> {
        let families = self.0.into_iter().map(|(family, metrics)| {
            let mut out = MetricFamily::default();
            out.set_name(family.name.to_owned());
            out.set_help(family.help.to_owned());
            out.set_field_type(family.kind);
            out.set_metric(metrics);
            out
        });
        families.collect()
    }
}
