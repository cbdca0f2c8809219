//! Looking for the guest's next packet for some microseconds before going to sleep.
//!
//! A guest that asks and is answered, over and over, sends its next packet a few microseconds after it was given one. To find it
//! in the ring costs neither of us anything; to sleep and be woken for it costs the guest a notification, which under a
//! hypervisor is an exit of the virtual CPU, and us a system call and the scheduler's time.
//!
//! It is bounded and pays for itself, as halt polling does in KVM (`kvm_vcpu_halt`, virt/kvm/kvm_main.c):
//!
//! - Only after the guest was given packets; so never twice in a row, never in an idle process, and never while
//!   the guest waits for a service.
//! - For no longer than a window that grows while the guest is known to answer within `limits.busyPoll`, and closes when it was slower.
//! - The guest is told not to notify us meanwhile, and sockets and commands wait for at most the window.

use std::time::{Duration, Instant};

use super::{Device, TX};

/// What a window is opened with.
const FIRST: Duration = Duration::from_micros(10);

/// How long to look, learned from how long the guest takes.
#[derive(Debug)]
pub(super) struct BusyPoll {
    /// Never longer than this. Zero: never.
    most: Duration,
    /// How long the next time. Zero: not at all.
    window: Duration,
    /// The guest was given packets in the last turn, at this time.
    given: Option<Instant>,
}

impl BusyPoll {
    pub(super) fn new(most: Duration) -> BusyPoll {
        BusyPoll {
            most,
            window: Duration::ZERO,
            given: None,
        }
    }

    /// The guest has been given packets.
    pub(super) fn given(&mut self, now: Instant) {
        if !self.most.is_zero() {
            self.given = Some(now);
        }
    }

    /// The guest has sent a packet: how long it took says whether looking for the next is worth it.
    pub(super) fn kicked(&mut self, now: Instant) {
        let Some(given) = self.given.take() else { return };
        self.window = match now.saturating_duration_since(given) <= self.most {
            true => (self.window * 2).max(FIRST).min(self.most),
            false => Duration::ZERO,
        };
    }

    /// Until when to look now, if at all.
    fn until(&self) -> Option<Instant> {
        self.given
            .filter(|_| !self.window.is_zero())?
            .checked_add(self.window)
    }
}

impl Device {
    /// Looks for packets of the guest for a moment, if that has been worth it: whether there are any.
    pub(super) fn look_for_packets(&mut self) -> bool {
        let Some(until) = self.busy_poll.until() else {
            return false;
        };
        let began = Instant::now();
        let (Some(running), Some(ram)) = (&mut self.rings[TX], self.ram.as_ref()) else {
            return false;
        };
        // Questions to the VMM cost more than a sleep.
        if running.held.is_some() || running.ring.is_translated() || began >= until {
            return false;
        }
        let view = ram.view();
        if running.ring.hush(view).is_err() {
            return false;
        }
        let mut now = began;
        let found = loop {
            // An error shows again in the burst.
            if running.ring.available(view) != Ok(0) {
                break true;
            }
            if now >= until {
                break false;
            }
            std::hint::spin_loop();
            now = Instant::now();
        };
        let metrics = &self.switchboard.metrics.busy_poll;
        metrics
            .seconds
            .inc_by(now.saturating_duration_since(began).as_secs_f64());
        if found {
            metrics.hits.inc();
            running.due = true;
            self.busy_poll.kicked(now);
            return true;
        }
        metrics.misses.inc();
        // One that came just now will not be followed by a kick.
        running.due |= running.ring.enable_notifications(view).unwrap_or(true);
        running.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(50);

    fn answered(poll: &mut BusyPoll, at: Instant, after: Duration) -> Duration {
        poll.given(at);
        poll.kicked(at + after);
        poll.window
    }

    #[test]
    fn the_window_opens_for_a_quick_guest_and_closes_for_a_slow_one() {
        let start = Instant::now();
        let mut poll = BusyPoll::new(MOST);
        poll.given(start);
        assert_eq!(poll.until(), None, "nothing is known of this guest");
        let quick = Duration::from_micros(15);
        assert_eq!(answered(&mut poll, start, quick), FIRST);
        assert_eq!(answered(&mut poll, start, quick), FIRST * 2);
        poll.given(start);
        assert_eq!(poll.until(), Some(start + FIRST * 2));
        for _ in 0..5 {
            answered(&mut poll, start, quick);
        }
        assert_eq!(poll.window, MOST);
        assert_eq!(
            answered(&mut poll, start, MOST + Duration::from_micros(1)),
            Duration::ZERO
        );
        poll.given(start);
        assert_eq!(poll.until(), None);
    }

    #[test]
    fn a_guest_that_was_given_nothing_is_not_looked_for() {
        let start = Instant::now();
        let mut poll = BusyPoll::new(MOST);
        answered(&mut poll, start, FIRST);
        poll.kicked(start + FIRST);
        assert_eq!((poll.until(), poll.window), (None, FIRST));
    }

    #[test]
    fn zero_is_off() {
        let start = Instant::now();
        let mut poll = BusyPoll::new(Duration::ZERO);
        assert_eq!(answered(&mut poll, start, Duration::ZERO), Duration::ZERO);
        assert_eq!(poll.until(), None);
    }
}
