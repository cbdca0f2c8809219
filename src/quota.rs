//! What the process has to give, and who holds how much of it: connections, memory of buffers, file descriptors.
//!
//! A [`Pool`] is a bounded number; a [`Share`] is a part of it that is given back when it is dropped, so that nothing which
//! ends in an unforeseen way can keep it. Shares are taken and given back when connections begin and end and when buffers
//! grow and shrink, never for a packet.
//!
//! # Descriptors
//!
//! A process that has used up its descriptors cannot answer a probe, take a VMM's memory, look up a name or log to a file. So
//! connections get a budget below RLIMIT_NOFILE, which is found once at start ([`Descriptors::plan`]): the rest is for the admin
//! server, the sessions, and names that are looked up. A share lives as long as the socket that it is for, whoever closes that; each
//! socket of a dial that tries several addresses at once has one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number of things of one kind, of which shares are handed out. Any thread may take and give back.
#[derive(Debug)]
pub struct Pool {
    /// May be changed at any time; `u64::MAX` counts only.
    limit: AtomicU64,
    /// Above `limit` only after that was lowered, until enough is given back.
    used: AtomicU64,
}

impl Pool {
    /// A pool of `limit` things; `None` counts only.
    pub fn new(limit: Option<u64>) -> Arc<Pool> {
        Arc::new(Pool {
            limit: AtomicU64::new(limit.unwrap_or(u64::MAX)),
            used: AtomicU64::new(0),
        })
    }

    /// Hands out `limit` things from now on; `None` counts only. What is taken stays taken, also if it is more.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.limit.store(limit.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How many are taken.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// How many there are; `None`: no matter how many.
    pub fn limit(&self) -> Option<u64> {
        let limit = self.limit.load(Ordering::Relaxed);
        (limit < u64::MAX).then_some(limit)
    }

    /// Takes `amount`, or nothing if that many are not left.
    fn take(&self, amount: u64) -> bool {
        // Relaxed: the numbers are the only things that the threads tell each other.
        let limit = self.limit.load(Ordering::Relaxed);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(amount).filter(|sum| *sum <= limit)
            })
            .is_ok()
    }

    fn give(&self, amount: u64) {
        self.used.fetch_sub(amount, Ordering::Relaxed);
    }
}

/// A part of a [`Pool`], given back when it is dropped.
#[must_use = "dropping it gives it back"]
#[derive(Debug)]
pub struct Share {
    pool: Arc<Pool>,
    amount: u64,
}

impl Share {
    /// Takes `amount`; `None` if that many are not left.
    pub fn take(pool: &Arc<Pool>, amount: u64) -> Option<Share> {
        pool.take(amount).then(|| Share {
            pool: Arc::clone(pool),
            amount,
        })
    }

    /// A share of nothing, which can become more.
    pub fn empty(pool: &Arc<Pool>) -> Share {
        Share {
            pool: Arc::clone(pool),
            amount: 0,
        }
    }

    /// Makes it `amount`; whether that many are left. If not, it stays what it is. Less always works.
    #[must_use = "it may have stayed what it was"]
    pub fn resize(&mut self, amount: u64) -> bool {
        if amount > self.amount {
            if !self.pool.take(amount - self.amount) {
                return false;
            }
        } else {
            self.pool.give(self.amount - amount);
        }
        self.amount = amount;
        true
    }

    /// How much it is.
    pub fn amount(&self) -> u64 {
        self.amount
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.pool.give(self.amount);
    }
}

/// What all guests of the process share. Clones share the pools; the default bounds nothing.
#[derive(Clone, Debug)]
pub struct Quota {
    /// Connections at once, both directions and all guests together.
    pub connections: Arc<Pool>,
    /// Bytes of memory in buffers for what services do not take.
    pub memory: Arc<Pool>,
    /// File descriptors of connections: those of clients and targets, dials under way included.
    pub descriptors: Arc<Pool>,
}

impl Default for Quota {
    fn default() -> Quota {
        Quota {
            connections: Pool::new(None),
            memory: Pool::new(None),
            descriptors: Pool::new(None),
        }
    }
}

/// Who gets how many of the process's descriptors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descriptors {
    /// RLIMIT_NOFILE.
    pub limit: u64,
    /// Open when this was found: listeners, runtimes, log.
    pub open: u64,
    /// Kept for what is no connection.
    pub reserve: u64,
    /// For connections.
    pub budget: u64,
    /// The reserve had to be made smaller than it should be: the limit is too low for this configuration.
    pub is_short: bool,
}

impl Descriptors {
    /// What a guest's session and device may have open: nine eventfds of rings, the socket to the VMM and its relay, the
    /// backend channel, polls and wakers, and a memory table of the usual size.
    const OF_GUEST: u64 = 32;
    /// Names that are being looked up, captures, configuration files: least and most.
    const SLACK: (u64, u64) = (64, 4096);

    /// Divides `limit`, of which `open` are taken, with `admin` connections of the admin server at most and `guests` guests.
    ///
    /// However low the limit, a quarter of what is left is for connections: a sidecar that serves a few is of more use than
    /// one that serves none, and says that it is short.
    pub fn plan(limit: u64, open: u64, admin: u64, guests: u64) -> Descriptors {
        let free = limit.saturating_sub(open);
        let (least, most) = Descriptors::SLACK;
        let wanted = guests
            .saturating_mul(Descriptors::OF_GUEST)
            .saturating_add(admin)
            .saturating_add((limit / 20).clamp(least, most));
        let reserve = wanted.min(free - free / 4);
        Descriptors {
            limit,
            open,
            reserve,
            budget: free - reserve,
            is_short: reserve < wanted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_lowered_takes_nothing_away_and_lets_nobody_in() {
        let pool = Pool::new(None);
        let mut all: Vec<Share> = (0..3).map(|_| Share::take(&pool, 1).unwrap()).collect();
        pool.set_limit(Some(2));
        assert_eq!((pool.used(), pool.limit()), (3, Some(2)));
        for _ in 0..2 {
            assert!(Share::take(&pool, 1).is_none());
            all.pop();
        }
        assert!(Share::take(&pool, 1).is_some());
        pool.set_limit(None);
        assert!(Share::take(&pool, 1000).is_some());
    }

    #[test]
    fn a_share_is_given_back_however_it_ends() {
        let pool = Pool::new(Some(3));
        let two = Share::take(&pool, 2).unwrap();
        assert!(
            Share::take(&pool, 2).is_none(),
            "not a part of what was asked for"
        );
        let one = Share::take(&pool, 1).unwrap();
        assert!(Share::take(&pool, 1).is_none());
        assert_eq!(pool.used(), 3);
        drop(two);
        assert_eq!(pool.used(), 1);
        let panicked = std::thread::spawn(move || {
            let _held = one;
            panic!("a worker that dies");
        });
        assert!(panicked.join().is_err());
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn a_share_grows_while_there_is_something_left_and_always_shrinks() {
        let pool = Pool::new(Some(10));
        let mut a = Share::empty(&pool);
        let mut b = Share::empty(&pool);
        assert!(a.resize(7));
        assert!(!b.resize(4), "three are left");
        assert_eq!((a.amount(), b.amount(), pool.used()), (7, 0, 7));
        assert!(b.resize(3) && a.resize(0) && b.resize(10));
        drop((a, b));
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn a_pool_without_a_limit_only_counts() {
        let pool = Pool::new(None);
        let held = Share::take(&pool, 1 << 60).unwrap();
        assert_eq!((pool.limit(), pool.used()), (None, 1 << 60));
        assert!(Share::take(&pool, u64::MAX).is_none(), "it does not wrap");
        drop(held);
    }

    #[test]
    fn many_threads_never_take_more_than_there_is() {
        let pool = Pool::new(Some(5));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let share = Share::take(&pool, 2);
                        assert!(pool.used() <= 5);
                        drop(share);
                    }
                });
            }
        });
        assert_eq!(pool.used(), 0);
    }

    /// Limits as Docker (1048576), systemd (524288), a login shell (1024) and a test (64) give them.
    #[test]
    fn connections_get_what_the_rest_does_not_need() {
        for (limit, open, admin, guests, budget, is_short) in [
            (1_048_576, 20, 128, 1, 1_048_576 - 20 - 32 - 128 - 4096, false),
            (524_288, 20, 64, 4, 524_288 - 20 - 128 - 64 - 4096, false),
            (1024, 24, 64, 1, 1024 - 24 - 32 - 64 - 64, false),
            (1024, 24, 128, 30, 250, true),
            (64, 24, 64, 1, 10, true),
            (16, 24, 64, 1, 0, true),
            (u64::MAX, 3, 0, 0, u64::MAX - 3 - 4096, false),
        ] {
            let plan = Descriptors::plan(limit, open, admin, guests);
            assert_eq!((plan.budget, plan.is_short), (budget, is_short), "{plan:?}");
            assert_eq!(
                plan.open.min(limit) + plan.reserve + plan.budget,
                limit,
                "{plan:?}"
            );
        }
    }
}
