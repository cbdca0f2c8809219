//! Kicks with nothing behind them.
//!
//! Each costs a cycle: a look at both rings and two system calls. A guest that does nothing but kick keeps its device's thread
//! awake, on a processor that the sidecar's other guests would like to have, or out of a container's quota. So after many in a row the
//! thread sleeps for a moment before it listens again; what is kicked meanwhile is one kick.
//!
//! An honest guest is not slowed down: it kicks because it has made something available. That may have been found before
//! the kick was heard, but then it was found: there are no [`MANY`] in a row without anything between.

use std::time::Duration;

use super::{Device, RX, TX};
use crate::guest::RingPosition;

/// Cycles in a row that are not taken amiss.
const MANY: u32 = 64;

/// How long not to listen. What the guest does besides waits for that long; it has itself to thank.
const PAUSE: Duration = Duration::from_micros(100);

/// Cycles that the guest has kicked for and in which nothing has moved.
#[derive(Default, Debug)]
pub(super) struct Spurious {
    in_a_row: u32,
}

/// How far the data rings have come.
pub(super) type Positions = [Option<RingPosition>; 2];

impl Spurious {
    /// A cycle is over.
    fn cycled(&mut self, kicked: bool, moved: bool) {
        if moved {
            self.in_a_row = 0;
        } else if kicked {
            self.in_a_row = self.in_a_row.saturating_add(1);
        }
    }

    /// How long to sleep before the next event is listened to, if at all.
    pub(super) fn pause(&self) -> Option<Duration> {
        (self.in_a_row >= MANY).then_some(PAUSE)
    }

    /// Sleeps if there is reason to.
    pub(super) fn rest(&self) {
        if let Some(pause) = self.pause() {
            std::thread::sleep(pause);
        }
    }
}

impl Device {
    pub(super) fn positions(&self) -> Positions {
        [RX, TX].map(|index| {
            let running = self.rings.get(index)?.as_ref()?;
            Some(running.ring.position())
        })
    }

    /// Judges a cycle that began at these positions.
    pub(super) fn after_cycle(&mut self, kicked: bool, began: Positions) {
        let moved = self.positions() != began;
        self.spurious.cycled(kicked, moved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_many_in_a_row_are_worth_a_pause() {
        let mut spurious = Spurious::default();
        for _ in 0..10 {
            for _ in 1..MANY {
                spurious.cycled(true, false);
            }
            assert_eq!(spurious.pause(), None);
            spurious.cycled(true, true);
        }
        for _ in 0..MANY {
            spurious.cycled(true, false);
        }
        assert_eq!(spurious.pause(), Some(PAUSE));
        spurious.cycled(false, false);
        assert_eq!(spurious.pause(), Some(PAUSE), "a timer is no sign of good will");
        spurious.cycled(false, true);
        assert_eq!(spurious.pause(), None);
    }
}
