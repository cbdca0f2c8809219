//! The end of a switchboard of which nothing is certain but that its memory is sound: its thread has panicked.

use std::time::Instant;

use mio::Registry;

use super::Switchboard;
use crate::device::flow::Flows;
use crate::device::handle::DeviceHandle;
use crate::device::linger::Lingering;
use crate::device::rules::Rules;
use crate::metrics::GuestMetrics;
use crate::vsock::{CloseReason, ConnectionId, Muxer, RefuseReason};

/// What is left of a switchboard.
pub(in crate::device) struct Salvage {
    pub(in crate::device) registry: Registry,
    pub(in crate::device) handle: DeviceHandle,
    pub(in crate::device) wreck: Wreck,
}

/// What is looked at once more and thrown away.
pub(in crate::device) struct Wreck {
    muxer: Muxer,
    draining: bool,
    _sockets: (Flows, Lingering),
}

impl Switchboard {
    /// Ends every connection without asking the muxer, which may be what has failed. What was cut off is reset, so that it
    /// does not look complete. May panic again, and may be called again then: who had its turn is gone.
    pub(in crate::device) fn abandon(&mut self, now: Instant) {
        let flows: Vec<(ConnectionId, bool)> = self
            .flows
            .iter()
            .map(|flow| (flow.id, flow.established))
            .collect();
        for (id, established) in flows {
            match established {
                true => self.close(now, id, CloseReason::SessionLost, true),
                false => self.forget_refused(id, RefuseReason::SessionLost),
            }
        }
    }

    /// Takes out what the next one needs.
    pub(in crate::device) fn salvage(self) -> Salvage {
        Salvage {
            registry: self.registry,
            handle: self.handle,
            wreck: Wreck {
                muxer: self.muxer,
                draining: self.draining,
                _sockets: (self.flows, self.lingering),
            },
        }
    }

    /// Goes on after a switchboard that was abandoned: a dial of that one may still be answered, and must find nobody here.
    pub(in crate::device) fn succeed(&mut self, now: Instant, before: &Wreck) {
        self.muxer.succeed(&before.muxer);
        if before.draining {
            self.drain(now);
        }
    }

    /// A guest without connections has
    /// none that are active and no bytes in buffers, whatever was counted.
    pub(in crate::device) fn settle_gauges(metrics: &GuestMetrics, rules: &Rules) {
        for rule in rules.iter() {
            rule.metrics().active.set(0);
        }
        metrics.buffered_bytes.iter().for_each(|bytes| bytes.set(0));
    }
}
