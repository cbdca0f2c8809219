//! Who is let in: the bounds of a guest, of its rules and of the process, and what is held against them.
//!
//! | bound | beyond it | what it is for |
//! |---|---|---|
//! | `limits.connections` | `limit` | held by the muxer, which knows them all |
//! | `connections` of a rule | `rule_limit` | one service or client takes no more than its part |
//! | `limits.connectionsPerSecond` | `rate_limit` | a guest that connects in a loop |
//! | `limits.connections` of the file | `sidecar_limit` | all guests together |
//! | descriptors | `descriptors` | what is open, the admin server and the sessions go on (`crate::quota`) |
//! | `limits.memory`, of the guest and of the file | the connection ends, `memory` | services that do not read |
//!
//! Who is refused costs nothing and changes nothing for who is in. All that is held is a [`Share`], which goes with its flow.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::rules::{Rule, RuleId};
use crate::metrics::Direction;
use crate::quota::{Pool, Quota, Share};
use crate::vsock::RefuseReason;

/// Rates of other guests that are remembered: more than run on a host.
const MAX_SIBLING_RATES: usize = 1024;

/// What a guest may have, beside what its rules say.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Bounds {
    /// Connections of the guest, which the muxer holds it to.
    pub(super) connections: usize,
    /// New connections a second in each direction; 0: any number.
    pub(super) per_second: u32,
    /// Bytes of memory for buffers.
    pub(super) memory: u64,
}

/// Decides who is let in.
#[derive(Debug)]
pub(super) struct Admission {
    bounds: Bounds,
    quota: Quota,
    /// Indexed by [`Direction`]: a guest in a loop does not keep clients out, nor they the guest.
    rates: [Rate; 2],
    /// Of each guest that dials this one, which is neither. They come when they first ask.
    sibling_rates: HashMap<RuleId, Rate>,
    /// Requests that wait with the devices of other guests.
    asked: Arc<Pool>,
    memory: Arc<Pool>,
}

impl Admission {
    pub(super) fn new(bounds: Bounds, quota: Quota) -> Admission {
        Admission {
            bounds,
            quota,
            rates: [Rate::new(bounds.per_second), Rate::new(bounds.per_second)],
            sibling_rates: HashMap::new(),
            asked: Pool::new(Some(bounds.connections as u64)),
            memory: Pool::new(Some(bounds.memory)),
        }
    }

    /// Other bounds from now on. Who is in stays in.
    pub(super) fn set_bounds(&mut self, bounds: Bounds) {
        // A rate that stays keeps its memory: else every reload would bring a second's worth of connections.
        if bounds.per_second != self.bounds.per_second {
            self.rates = [Rate::new(bounds.per_second), Rate::new(bounds.per_second)];
            self.sibling_rates.clear();
        }
        self.asked.set_limit(Some(bounds.connections as u64));
        self.memory.set_limit(Some(bounds.memory));
        self.bounds = bounds;
    }

    /// Lets in a connection of `rule`, or says which bound is in its way. The rate is asked last, so that only who would
    /// have been let in uses it up.
    pub(super) fn admit(&mut self, now: Instant, rule: &Rule) -> Result<Place, RefuseReason> {
        let of_rule = Share::take(&rule.places, 1).ok_or(RefuseReason::RuleLimit)?;
        let of_sidecar = Share::take(&self.quota.connections, 1).ok_or(RefuseReason::SidecarLimit)?;
        // Clients have their descriptor since they were accepted.
        let descriptor = match rule.opened_by {
            Direction::GuestToHost => Some(self.descriptor()?),
            Direction::HostToGuest => None,
        };
        if !self.rate(rule).take(now) {
            return Err(RefuseReason::RateLimit);
        }
        Ok(Place {
            descriptor,
            _of_rule: of_rule,
            _of_sidecar: of_sidecar,
        })
    }

    fn rate(&mut self, rule: &Rule) -> &mut Rate {
        if !rule.is_sibling {
            return &mut self.rates[rule.opened_by as usize];
        }
        // Reloads may name ever other guests.
        if self.sibling_rates.len() >= MAX_SIBLING_RATES && !self.sibling_rates.contains_key(&rule.id) {
            self.sibling_rates.clear();
        }
        let per_second = self.bounds.per_second;
        (self.sibling_rates.entry(rule.id)).or_insert_with(|| Rate::new(per_second))
    }

    /// One more request to another guest's device, until that has got to it. A guest that gives up and asks again has no more
    /// connections than it may, and more requests: the other device may be busy, and each of them is a descriptor.
    pub(super) fn ask(&self) -> Result<Share, RefuseReason> {
        Share::take(&self.asked, 1).ok_or(RefuseReason::Limit)
    }

    /// One more descriptor.
    pub(super) fn descriptor(&self) -> Result<Share, RefuseReason> {
        Share::take(&self.quota.descriptors, 1).ok_or(RefuseReason::Descriptors)
    }

    /// The account of a new flow's buffer.
    pub(super) fn account(&self) -> BufferAccount {
        BufferAccount {
            of_guest: Share::empty(&self.memory),
            of_sidecar: Share::empty(&self.quota.memory),
        }
    }

    /// Bytes of memory that the guest's buffers have.
    pub(super) fn memory(&self) -> u64 {
        self.memory.used()
    }
}

/// Whether a reason is that a bound is in the way.
pub(super) fn is_bound(reason: RefuseReason) -> bool {
    matches!(
        reason,
        RefuseReason::Limit
            | RefuseReason::RuleLimit
            | RefuseReason::RateLimit
            | RefuseReason::SidecarLimit
            | RefuseReason::Descriptors
    )
}

/// The key of the configuration, or what else, to change when a bound is in the way; for the log.
pub(super) fn remedy(reason: RefuseReason) -> &'static str {
    match reason {
        RefuseReason::RuleLimit => "raise `connections` of the rule",
        RefuseReason::RateLimit => "raise `limits.connectionsPerSecond` of the guest",
        RefuseReason::SidecarLimit => {
            "raise `limits.connections` of the file, which is for all guests together"
        }
        RefuseReason::Descriptors => {
            "raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE, or the container runtime's default)"
        }
        _ => "raise `limits.connections` of the guest",
    }
}

/// What a connection holds while it lives.
#[derive(Debug)]
pub(super) struct Place {
    /// For the socket to a target; it goes with the dial, and with what comes of that.
    pub(super) descriptor: Option<Share>,
    _of_rule: Share,
    _of_sidecar: Share,
}

/// Which memory is used up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum MemoryFull {
    /// That of the guest.
    Guest,
    /// That of all guests together.
    Sidecar,
}

impl MemoryFull {
    /// What to change, for the log.
    pub(super) fn remedy(self) -> &'static str {
        match self {
            MemoryFull::Guest => "raise `limits.memory` of the guest, or lower its `limits.buffer`",
            MemoryFull::Sidecar => "raise `limits.memory` of the file, which is for all guests together",
        }
    }
}

/// What one flow's buffer is accounted for.
#[derive(Debug)]
pub(super) struct BufferAccount {
    of_guest: Share,
    of_sidecar: Share,
}

impl BufferAccount {
    /// Accounts for a buffer of `bytes` from now on. On an error it stays what it was.
    pub(super) fn cover(&mut self, bytes: usize) -> Result<(), MemoryFull> {
        let bytes = bytes as u64;
        let before = self.of_guest.amount();
        if bytes == before {
            return Ok(());
        }
        if !self.of_guest.resize(bytes) {
            return Err(MemoryFull::Guest);
        }
        if !self.of_sidecar.resize(bytes) {
            // Less than it has always works.
            let _ = self.of_guest.resize(before);
            return Err(MemoryFull::Sidecar);
        }
        Ok(())
    }
}

/// So many a second, and at once what a second brings: the generic cell rate algorithm (ITU-T I.371), a leaky bucket that needs
/// one time stamp and no timer.
#[derive(Debug)]
struct Rate {
    /// Between two of them; `None`: no bound.
    interval: Option<Duration>,
    /// How far ahead of their distance they may be: what a second brings.
    burst: Duration,
    /// When all that were let in would have come, had each kept its distance.
    due: Option<Instant>,
}

impl Rate {
    fn new(per_second: u32) -> Rate {
        // Rounded up: rather a little less than what was asked for than more.
        let interval =
            (per_second > 0).then(|| Duration::from_nanos(1_000_000_000u64.div_ceil(per_second.into())));
        Rate {
            interval,
            burst: interval.unwrap_or_default().saturating_mul(per_second),
            due: None,
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        let Some(interval) = self.interval else {
            return true;
        };
        let due = self.due.map_or(now, |due| due.max(now)) + interval;
        if due.saturating_duration_since(now) > self.burst {
            return false;
        }
        self.due = Some(due);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{GuestMetrics, LabelSets};

    fn admission(bounds: Bounds, quota: &Quota) -> Admission {
        Admission::new(bounds, quota.clone())
    }

    fn quota(connections: u64, memory: u64, descriptors: u64) -> Quota {
        Quota {
            connections: Pool::new(Some(connections)),
            memory: Pool::new(Some(memory)),
            descriptors: Pool::new(Some(descriptors)),
        }
    }

    fn named(direction: Direction, name: &str) -> Arc<Rule> {
        let labels = LabelSets {
            refused: &[],
            closed: &[],
            misbehavior: &[],
            ring_errors: &[],
        };
        let metrics = GuestMetrics::detached(&labels).rules(direction, &[name.to_owned()]);
        Rule::new(direction, Arc::clone(&metrics[0]))
    }

    fn rule(direction: Direction, connections: Option<u64>) -> Arc<Rule> {
        let rule = named(direction, "rule");
        rule.places.set_limit(connections);
        rule
    }

    fn outbound() -> Arc<Rule> {
        rule(Direction::GuestToHost, None)
    }

    fn inbound() -> Arc<Rule> {
        rule(Direction::HostToGuest, None)
    }

    #[test]
    fn a_rule_that_is_full_leaves_room_for_the_others() {
        let now = Instant::now();
        let mut admission = admission(Bounds::default(), &Quota::default());
        let narrow = rule(Direction::GuestToHost, Some(1));
        let first = admission.admit(now, &narrow).unwrap();
        assert_eq!(admission.admit(now, &narrow).err(), Some(RefuseReason::RuleLimit));
        let wide = outbound();
        let _others = [
            admission.admit(now, &wide).unwrap(),
            admission.admit(now, &wide).unwrap(),
        ];
        let ssh = rule(Direction::HostToGuest, Some(1));
        let _inbound = admission.admit(now, &ssh).unwrap();
        assert_eq!(admission.admit(now, &ssh).err(), Some(RefuseReason::RuleLimit));
        drop(first);
        assert!(admission.admit(now, &narrow).is_ok());
    }

    #[test]
    fn all_guests_together_have_so_many_connections_and_descriptors() {
        let now = Instant::now();
        let quota = quota(3, 0, 2);
        let mut web = admission(Bounds::default(), &quota);
        let mut db = admission(Bounds::default(), &quota);
        let first = web.admit(now, &outbound()).unwrap();
        let second = db.admit(now, &outbound()).unwrap();
        assert_eq!(web.admit(now, &outbound()).err(), Some(RefuseReason::Descriptors));
        assert_eq!(quota.connections.used(), 2, "who is refused holds nothing");
        let third = web.admit(now, &inbound()).unwrap();
        assert_eq!(db.admit(now, &inbound()).err(), Some(RefuseReason::SidecarLimit));
        drop((first, second, third));
        assert_eq!((quota.connections.used(), quota.descriptors.used()), (0, 0));
    }

    /// The descriptor goes with the socket, which may outlive the connection (it lingers for the peer's end of file).
    #[test]
    fn a_descriptor_outlives_its_place() {
        let quota = quota(9, 0, 1);
        let mut admission = admission(Bounds::default(), &quota);
        let now = Instant::now();
        let mut place = admission.admit(now, &outbound()).unwrap();
        let with_socket = place.descriptor.take();
        drop(place);
        assert_eq!((quota.connections.used(), quota.descriptors.used()), (0, 1));
        assert_eq!(
            admission.admit(now, &outbound()).err(),
            Some(RefuseReason::Descriptors)
        );
        drop(with_socket);
        assert!(admission.admit(now, &outbound()).is_ok());
    }

    #[test]
    fn a_rate_lets_a_seconds_worth_in_at_once_and_then_one_at_a_time() {
        let bounds = Bounds {
            per_second: 10,
            ..Bounds::default()
        };
        let mut admission = admission(bounds, &Quota::default());
        let begin = Instant::now();
        let mut let_in = |at: Duration, rule: &Rule| admission.admit(begin + at, rule).map(drop);
        for _ in 0..10 {
            assert_eq!(let_in(Duration::ZERO, &outbound()), Ok(()));
        }
        for _ in 0..1000 {
            assert_eq!(let_in(Duration::ZERO, &outbound()), Err(RefuseReason::RateLimit));
        }
        // A guest in a loop does not keep the operator's ssh out.
        assert_eq!(let_in(Duration::ZERO, &inbound()), Ok(()));
        assert_eq!(
            let_in(Duration::from_millis(99), &outbound()),
            Err(RefuseReason::RateLimit)
        );
        // Who was refused has not put it off.
        assert_eq!(let_in(Duration::from_millis(100), &outbound()), Ok(()));
        assert_eq!(
            let_in(Duration::from_millis(100), &outbound()),
            Err(RefuseReason::RateLimit)
        );
        // Patience is not saved up beyond a second.
        let later = Duration::from_secs(3600);
        let got = (0..100).filter(|_| let_in(later, &outbound()).is_ok()).count();
        assert_eq!(got, 10);
    }

    /// A guest of the same sidecar that connects in a loop used up the rate of the clients, and kept the operator's ssh out.
    #[test]
    fn a_guest_that_is_dialled_in_a_loop_by_another_keeps_its_clients_and_the_others() {
        let bounds = Bounds {
            per_second: 10,
            ..Bounds::default()
        };
        let mut admission = admission(bounds, &Quota::default());
        let now = Instant::now();
        let of_guest = |name: &str| named(Direction::HostToGuest, &format!("guest://{name}"));
        let (client, first, second) = (inbound(), of_guest("web"), of_guest("db"));
        let mut let_in = |rule: &Rule| admission.admit(now, rule).is_ok();
        assert_eq!((0..100).filter(|_| let_in(&first)).count(), 10);
        assert_eq!((0..100).filter(|_| let_in(&second)).count(), 10);
        assert_eq!((0..100).filter(|_| let_in(&client)).count(), 10);
    }

    #[test]
    fn a_rate_is_never_exceeded_whatever_it_is() {
        for per_second in [1, 3, 7, 999, 32_768, 999_999, 1_000_000] {
            let mut rate = Rate::new(per_second);
            let now = Instant::now();
            let got = (0..2_000_000).take_while(|_| rate.take(now)).count();
            assert_eq!(got, per_second as usize);
        }
        let mut unbounded = Rate::new(0);
        let now = Instant::now();
        assert!((0..100_000).all(|_| unbounded.take(now)));
    }

    #[test]
    fn memory_is_bounded_for_the_guest_and_for_all() {
        let quota = quota(9, 150, 9);
        let bounds = Bounds {
            memory: 100,
            ..Bounds::default()
        };
        let (web, db) = (admission(bounds, &quota), admission(bounds, &quota));
        let mut first = web.account();
        let mut second = web.account();
        assert_eq!(first.cover(80), Ok(()));
        assert_eq!(second.cover(40), Err(MemoryFull::Guest));
        assert_eq!((web.memory(), quota.memory.used()), (80, 80));
        let mut other = db.account();
        assert_eq!(other.cover(100), Err(MemoryFull::Sidecar));
        assert_eq!(
            (db.memory(), quota.memory.used()),
            (0, 80),
            "nothing of it is kept"
        );
        assert_eq!(other.cover(70), Ok(()));
        assert_eq!(second.cover(1), Err(MemoryFull::Sidecar));
        assert_eq!(first.cover(10), Ok(()));
        assert_eq!(second.cover(70), Ok(()));
        drop((first, second, other));
        assert_eq!((web.memory(), db.memory(), quota.memory.used()), (0, 0, 0));
    }

    /// A reload. A rate that stays brings no second's worth anew; one that changes does; memory that is in use stays so.
    #[test]
    fn other_bounds_are_for_those_who_come_after() {
        let bounds = Bounds {
            per_second: 1,
            memory: 100,
            ..Bounds::default()
        };
        let mut admission = admission(bounds, &Quota::default());
        let now = Instant::now();
        let rule = outbound();
        assert!(admission.admit(now, &rule).is_ok());
        let mut held = admission.account();
        assert_eq!(held.cover(80), Ok(()));
        admission.set_bounds(Bounds { memory: 50, ..bounds });
        assert_eq!(admission.admit(now, &rule).err(), Some(RefuseReason::RateLimit));
        assert_eq!(admission.account().cover(1), Err(MemoryFull::Guest));
        assert_eq!((held.cover(60), admission.memory()), (Ok(()), 60));
        admission.set_bounds(Bounds {
            per_second: 2,
            memory: 200,
            ..Bounds::default()
        });
        assert!(admission.admit(now, &rule).is_ok());
        assert_eq!(held.cover(200), Ok(()));
    }
}
