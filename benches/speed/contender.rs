//! Those who do the work, and what a turn of one of them gives.

use std::error::Error;
use std::time::Duration;

pub type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Who {
    /// The sidecar, the release build.
    Ours,
    /// A client of the service, without anything between.
    Plain,
    /// A client of the service through a thread that passes on: as many wake-ups as through a device.
    Relay,
    /// A client of the service that reads into as many buffers, one after the other, as the guest has posted.
    Spread,
    /// The sidecar without what the line is about.
    Without,
    /// vhost-device-vsock.
    Peer,
}

impl Who {
    pub const ALL: [Who; 6] = [
        Who::Ours,
        Who::Plain,
        Who::Relay,
        Who::Spread,
        Who::Without,
        Who::Peer,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Who::Ours => "ours",
            Who::Plain => "plain",
            Who::Relay => "relay",
            Who::Spread => "spread",
            Who::Without => "without",
            Who::Peer => "vhost-device-vsock",
        }
    }
}

/// Figures of one turn by name.
pub type Measures = Vec<(&'static str, f64)>;

pub trait Contender {
    /// Works for so long and says what came of it. Rests before and afterwards, at no cost to the others.
    fn turn(&mut self, window: Duration) -> Outcome<Measures>;
}

/// A quantile of times in microseconds, under names for the table.
pub fn quantiles(mut times: Vec<Duration>) -> Measures {
    times.sort_unstable();
    let at = |per_mille: usize| {
        let index = (times.len() * per_mille / 1000).min(times.len().saturating_sub(1));
        times
            .get(index)
            .map_or(f64::NAN, |time| time.as_nanos() as f64 / 1e3)
    };
    vec![
        ("p50", at(500)),
        ("p99", at(990)),
        ("p99.9", at(999)),
        ("trips", times.len() as f64),
    ]
}
