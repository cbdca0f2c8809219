//! Who has a place on a listener, and who makes room when all are taken.
//!
//! A client may keep a place for as long as its answer takes, and many may come from one that means no good. So a newcomer gets the
//! place, in this order, of
//!
//! 1. who has owed us a request for longest: opening connections and saying nothing keeps nobody out;
//! 2. who has not taken its answer for longest, and for [`Limits::stall`]: nor does asking and never reading;
//! 3. who has been at it for longest, if it comes from the address that has most places, and that has no fewer then than the
//!    newcomer's has: nor does asking without end, from elsewhere than the newcomer.
//!
//! An address that has most places, by more than one, makes room before all others; and nobody makes room for an address that
//! has more places than its own. So a scraper finds a place in a flood, and keeps it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::Limits;
use super::connection::Clock;
use super::local::Peer;

/// The places of one listener.
pub(super) struct Places {
    /// The longest served first.
    taken: Vec<Place>,
    most: usize,
    stall: Duration,
}

struct Place {
    origin: Origin,
    clock: Clock,
    task: AbortHandle,
}

/// Where a client comes from, as far as it cannot choose that itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    /// The unix socket, or not known.
    One,
    V4(Ipv4Addr),
    /// A machine has 2^64 addresses by itself, so only the network counts.
    V6([u16; 4]),
}

impl Origin {
    pub(super) fn of(peer: Peer) -> Origin {
        let Peer::Tcp(Some(address)) = peer else {
            return Origin::One;
        };
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => Origin::V4(ip),
            IpAddr::V6(ip) => Origin::V6(network(ip)),
        }
    }
}

fn network(ip: Ipv6Addr) -> [u16; 4] {
    let [a, b, c, d, ..] = ip.segments();
    [a, b, c, d]
}

impl Places {
    pub(super) fn new(limits: Limits) -> Places {
        Places {
            taken: Vec::new(),
            most: limits.connections,
            stall: limits.stall,
        }
    }

    /// Has somebody leave if all places are taken. False: nobody has to, and there is no room.
    pub(super) async fn make_room(&mut self, newcomer: Origin) -> bool {
        self.taken.retain(|place| !place.task.is_finished());
        if self.taken.len() < self.most {
            return true;
        }
        let Some(index) = self.who_leaves(newcomer, Instant::now()) else {
            return false;
        };
        self.taken.remove(index).task.abort();
        // The task ends when it is next scheduled; until then its descriptor is open.
        tokio::task::yield_now().await;
        true
    }

    /// Somebody has a place from now on.
    pub(super) fn take(&mut self, origin: Origin, clock: Clock, task: AbortHandle) {
        self.taken.push(Place { origin, clock, task });
    }

    fn who_leaves(&self, newcomer: Origin, now: Instant) -> Option<usize> {
        let greedy = self.greediest(newcomer);
        let has = self.count(newcomer);
        let may_be_asked = |place: &Place| match greedy {
            Some(greedy) => place.origin == greedy,
            None => self.count(place.origin) >= has,
        };
        let longest = |since: &dyn Fn(&Place) -> Option<Instant>| {
            self.longest(|place| since(place).filter(|_| may_be_asked(place)))
        };
        longest(&|place| place.clock.waiting_since())
            .or_else(|| longest(&|place| self.stalled_since(place, now)))
            .or_else(|| greedy.and_then(|_| longest(&|place| Some(place.clock.phase_since()))))
    }

    /// How many places an address has.
    fn count(&self, origin: Origin) -> usize {
        self.taken.iter().filter(|place| place.origin == origin).count()
    }

    fn longest(&self, since: impl Fn(&Place) -> Option<Instant>) -> Option<usize> {
        let places = self.taken.iter().enumerate();
        let since = places.filter_map(|(index, place)| Some((since(place)?, index)));
        since.min().map(|(_, index)| index)
    }

    fn stalled_since(&self, place: &Place, now: Instant) -> Option<Instant> {
        let since = place.clock.stalled_since()?;
        (now.saturating_duration_since(since) >= self.stall).then_some(since)
    }

    /// The address that has most places, if it has to give one to the newcomer's.
    fn greediest(&self, newcomer: Origin) -> Option<Origin> {
        let counts = self
            .taken
            .iter()
            .map(|place| (self.count(place.origin), place.origin));
        let (most, origin) = counts.max_by_key(|(count, _)| *count)?;
        (most > self.count(newcomer).saturating_add(1)).then_some(origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_one_network_are_one() {
        let of = |address: &str| Origin::of(Peer::Tcp(Some(address.parse().unwrap())));
        assert_eq!(of("10.0.0.1:5"), of("10.0.0.1:6"));
        assert_eq!(of("10.0.0.1:5"), of("[::ffff:10.0.0.1]:5"));
        assert_ne!(of("10.0.0.1:5"), of("10.0.0.2:5"));
        assert_eq!(of("[2001:db8::1]:5"), of("[2001:db8::f00:1]:5"));
        assert_ne!(of("[2001:db8::1]:5"), of("[2001:db8:0:1::1]:5"));
        assert_eq!(Origin::of(Peer::Unix), Origin::of(Peer::Tcp(None)));
    }
}
