//! Who is let in, and what is said and done when a bound of [`crate::device::limits`] is in the way.

use std::time::Instant;

use tracing::{debug, warn};

use super::Switchboard;
use crate::device::limits::{self, MemoryFull, Place};
use crate::device::logbook::Bound;
use crate::device::rules::Rule;
use crate::vsock::{Caller, CloseReason, ConnectionId, RefuseReason};

impl Switchboard {
    /// Asks the guest for a connection that is not its own idea, if no bound is in the way. What the muxer would refuse is asked
    /// before the bounds, as it is for the guest's own: it must not use up the rate.
    pub(super) fn let_in(
        &mut self,
        now: Instant,
        rule: &Rule,
        caller: Caller,
    ) -> Result<(ConnectionId, Place), RefuseReason> {
        self.muxer.admits(caller.socket_type)?;
        let place = self.admission.admit(now, rule)?;
        let id = self.muxer.request(now, caller)?;
        Ok((id, place))
    }

    /// There is no memory for more of the guest's bytes: ends the connection whose service did not read, and no other.
    pub(super) fn out_of_memory(&mut self, now: Instant, id: ConnectionId, full: MemoryFull) {
        let name = self.flows.get(id).map_or("", |flow| flow.rule.name());
        let remedy = full.remedy();
        if self.logbook.bound(now, Bound::Memory, None) {
            warn!(
                guest = %self.name, rule = name, reason = CloseReason::Memory.label(), remedy,
                "no memory for what a service does not read: its connection is ended (further ones are counted)"
            );
        } else {
            debug!(guest = %self.name, rule = name, reason = CloseReason::Memory.label(), remedy, "connection ended");
        }
        self.muxer.host_failed(id, CloseReason::Memory);
    }

    /// Says that a bound is in the way of a connection, and which key of the configuration it is.
    pub(super) fn log_bound(&mut self, now: Instant, rule: &Rule, port: u32, reason: RefuseReason) {
        let whose = (reason == RefuseReason::RuleLimit).then_some(rule.id);
        let news = self.logbook.bound(now, Bound::Connections(reason), whose);
        let (rule, reason, remedy) = (rule.name(), reason.label(), limits::remedy(reason));
        if news {
            warn!(
                guest = %self.name, rule, port, reason, remedy,
                "refused: a limit is reached (further ones are counted, and told once a minute)"
            );
        } else {
            debug!(guest = %self.name, rule, port, reason, "refused");
        }
    }
}
