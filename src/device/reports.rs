//! What the session is told of the device, and when. Performs no I/O and reads no clock, so that a test can wait for minutes.
//!
//! Each thing is told once: a miss when it is asked, an overdue one when it becomes the oldest that nobody has answered, a
//! storm at most once a minute. Only what waits for something has a timer: a device that translates nothing has none.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::guest::Miss;

use super::handle::{DeviceEvent, EMPTY_PATIENCE, Listener, MISS_PATIENCE, STORM};

/// The time within which [`STORM`] refusals are a storm, and how long there is no other.
const STORM_WINDOW: Duration = Duration::from_secs(60);

/// A miss and when it was asked. The same one may be asked again later.
type Asked = (Miss, Instant);

/// Whom the device tells of what happens, and what it has told.
#[derive(Default)]
pub(super) struct Reports {
    listener: Option<Listener>,
    /// The miss that was told as overdue, until no miss is.
    overdue: Option<Asked>,
    /// The last refusals, at most [`STORM`] of them, the oldest first.
    refusals: VecDeque<Instant>,
    /// When a storm was told last.
    storm: Option<Instant>,
    /// When to look whether the rx ring is still all zero.
    empty_check: Option<Instant>,
}

impl Reports {
    /// Tells `listener` from now on.
    pub(super) fn set_listener(&mut self, listener: Option<Listener>) {
        self.listener = listener;
    }

    /// Whether anybody listens.
    pub(super) fn has_listener(&self) -> bool {
        self.listener.is_some()
    }

    /// Tells something to the listener, if there is one.
    pub(super) fn tell(&self, event: DeviceEvent) {
        if let Some(listener) = &self.listener {
            listener(event);
        }
    }

    /// The session is over: what was told is of no meaning for the next one.
    pub(super) fn forget(&mut self) {
        *self = Reports::default();
    }

    /// The VMM refused `count` translations.
    pub(super) fn refused(&mut self, now: Instant, count: u32) {
        for _ in 0..count.min(STORM) {
            if self.refusals.len() >= STORM as usize {
                self.refusals.pop_front();
            }
            self.refusals.push_back(now);
        }
        let recent = |at: &Instant| now.saturating_duration_since(*at) < STORM_WINDOW;
        let storm = self.refusals.len() >= STORM as usize && self.refusals.front().is_some_and(recent);
        if storm && !self.storm.as_ref().is_some_and(recent) {
            self.storm = Some(now);
            self.tell(DeviceEvent::FaultStorm);
        }
    }

    /// An rx ring was started whose memory is all zero, or not translated yet.
    pub(super) fn expect_buffers(&mut self, now: Instant) {
        self.empty_check = Some(now + EMPTY_PATIENCE);
    }

    /// The rx ring has stopped.
    pub(super) fn expect_nothing(&mut self) {
        self.empty_check = None;
    }

    /// Whether it is time to look at the rx ring; says so once.
    pub(super) fn empty_check_due(&mut self, now: Instant) -> bool {
        let due = self.empty_check.is_some_and(|at| at <= now);
        if due {
            self.empty_check = None;
        }
        due
    }

    /// Tells of the oldest unanswered miss if it has become overdue, or that none is overdue any more.
    pub(super) fn handle_timeout(&mut self, now: Instant, oldest: Option<Asked>) {
        let overdue = oldest.filter(|(_, since)| now.saturating_duration_since(*since) >= MISS_PATIENCE);
        match overdue {
            Some(asked) if self.overdue != Some(asked) => {
                self.overdue = Some(asked);
                self.tell(DeviceEvent::MissOverdue(asked.0));
            }
            Some(_) => {}
            None if self.overdue.take().is_some() => self.tell(DeviceEvent::MissesAnswered),
            None => {}
        }
    }

    /// When something may have to be told.
    pub(super) fn next_timeout(&self, oldest: Option<Asked>) -> Option<Instant> {
        // One that was told waits for its answer, which comes by itself.
        let overdue = oldest
            .filter(|asked| self.overdue != Some(*asked))
            .map(|(_, since)| since + MISS_PATIENCE);
        match (overdue, self.empty_check) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::guest::Access;

    fn heard() -> (Reports, impl Fn() -> Vec<DeviceEvent>) {
        let (tell, told) = mpsc::channel();
        let mut reports = Reports::default();
        reports.set_listener(Some(Box::new(move |event| tell.send(event).unwrap())));
        (reports, move || told.try_iter().collect())
    }

    fn miss(iova: u64) -> Miss {
        Miss {
            iova,
            access: Access::Read,
        }
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_device_that_translates_nothing_has_no_timers() {
        let (mut reports, told) = heard();
        let now = Instant::now();
        reports.handle_timeout(now, None);
        assert_eq!(reports.next_timeout(None), None);
        assert_eq!(told(), []);
    }

    #[test]
    fn a_miss_that_nobody_answers_is_told_once_and_so_is_its_answer() {
        let (mut reports, told) = heard();
        let asked = Instant::now();
        let oldest = Some((miss(0x1000), asked));
        assert_eq!(reports.next_timeout(oldest), Some(asked + MISS_PATIENCE));
        reports.handle_timeout(asked + MISS_PATIENCE - MS, oldest);
        assert_eq!(told(), []);
        reports.handle_timeout(asked + MISS_PATIENCE, oldest);
        assert_eq!(told(), [DeviceEvent::MissOverdue(miss(0x1000))]);
        assert_eq!(reports.next_timeout(oldest), None, "it waits for the answer only");
        reports.handle_timeout(asked + 10 * MISS_PATIENCE, oldest);
        assert_eq!(told(), []);
        reports.handle_timeout(asked + 10 * MISS_PATIENCE, None);
        reports.handle_timeout(asked + 10 * MISS_PATIENCE, None);
        assert_eq!(told(), [DeviceEvent::MissesAnswered]);
    }

    /// The answer to one miss does not end the wait for the next, which is told by its own name.
    #[test]
    fn the_next_oldest_miss_is_told_when_it_is_overdue_too() {
        let (mut reports, told) = heard();
        let first = Instant::now();
        let second = first + 100 * MS;
        reports.handle_timeout(first + MISS_PATIENCE, Some((miss(0x1000), first)));
        reports.handle_timeout(second + MISS_PATIENCE, Some((miss(0x2000), second)));
        assert_eq!(
            told(),
            [
                DeviceEvent::MissOverdue(miss(0x1000)),
                DeviceEvent::MissOverdue(miss(0x2000))
            ]
        );
        let third = second + MISS_PATIENCE;
        reports.handle_timeout(third, Some((miss(0x3000), third)));
        assert_eq!(
            told(),
            [DeviceEvent::MissesAnswered],
            "the third is not overdue yet"
        );
        assert_eq!(
            reports.next_timeout(Some((miss(0x3000), third))),
            Some(third + MISS_PATIENCE)
        );
    }

    /// The guest may fault at will: what the session hears of it is bounded by the clock.
    #[test]
    fn many_refusals_within_a_minute_are_a_storm_and_told_once_a_minute() {
        let (mut reports, told) = heard();
        let begin = Instant::now();
        for n in 0..STORM - 1 {
            reports.refused(begin + n * MS, 1);
        }
        assert_eq!(told(), []);
        reports.refused(begin + Duration::from_secs(59), 1);
        assert_eq!(told(), [DeviceEvent::FaultStorm]);
        let told_at = begin + Duration::from_secs(59);
        for n in 0..59_000 {
            reports.refused(told_at + n * MS, 1);
        }
        assert_eq!(told(), []);
        reports.refused(told_at + STORM_WINDOW, u32::MAX);
        assert_eq!(told(), [DeviceEvent::FaultStorm]);
    }

    #[test]
    fn refusals_now_and_then_are_no_storm() {
        let (mut reports, told) = heard();
        let begin = Instant::now();
        for n in 0..10 * STORM {
            reports.refused(begin + n * Duration::from_secs(1), 1);
        }
        assert_eq!(told(), []);
    }

    #[test]
    fn an_empty_ring_is_looked_at_once_unless_it_stops() {
        let (mut reports, _told) = heard();
        let now = Instant::now();
        reports.expect_buffers(now);
        assert_eq!(reports.next_timeout(None), Some(now + EMPTY_PATIENCE));
        assert!(!reports.empty_check_due(now));
        assert!(reports.empty_check_due(now + EMPTY_PATIENCE));
        assert!(!reports.empty_check_due(now + EMPTY_PATIENCE));
        reports.expect_buffers(now);
        reports.expect_nothing();
        assert_eq!(reports.next_timeout(None), None);
    }
}
