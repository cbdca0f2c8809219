//! Bounds: of a guest, of one rule, of a message; and what durations and sizes may be, which JSON Schema cannot express
//! over text.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::{Resolver, optional};
use crate::config::given::Given;
use crate::config::values::{ByteSize, Connections, Period};
use crate::config::{Framing, Limits, SidecarLimits, schema};

const MIN_TIMEOUT: Duration = Duration::from_millis(1);
/// VSOCK_DEFAULT_CONNECT_TIMEOUT of Linux (net/vmw_vsock/af_vsock.c), 2 * HZ.
const GUEST_GIVES_UP: Duration = Duration::from_secs(2);
const MAX_GUEST_TIMEOUT: Duration = Duration::from_secs(3600);
const MAX_IDLE_TIMEOUT: Duration = Duration::from_secs(720 * 3600);
/// Longer than a guest takes that answers at once, and short enough to be no delay for others.
const MAX_BUSY_POLL: Duration = Duration::from_millis(1);
const BUFFER: RangeInclusive<u64> = 4 * 1024..=16 * 1024 * 1024;
const MEMORY: RangeInclusive<u64> = 1 << 20..=1 << 40;

impl Resolver<'_, '_> {
    pub(super) fn sidecar_limits(&mut self, limits: &schema::SidecarLimits) -> Option<SidecarLimits> {
        let connections = optional(&limits.connections)?.map(|Connections(count)| count);
        let memory = optional(&limits.memory)?.map(|ByteSize(bytes)| bytes);
        if let Some((size, at)) = limits.memory.located()
            && !MEMORY.contains(&size.0)
        {
            let message = format!("{size} is no usable size of the memory of all guests");
            self.error(at, message, "give a size from 1MiB to 1024GiB");
        }
        Some(SidecarLimits {
            connections: match connections {
                Some(count) => Some(usize::try_from(count).ok()?),
                None => None,
            },
            memory,
        })
    }

    pub(super) fn limits(&mut self, limits: &schema::Limits) -> Option<Limits> {
        let connections = limits.connections.value().map(|count| count.0);
        let per_second = limits.connections_per_second.value().map(|rate| rate.0);
        let buffer = self.buffer(&limits.buffer);
        let memory = self.memory(&limits.memory, buffer);
        let connect_timeout = self.connect_timeout(&limits.connect_timeout);
        let guest_timeout = self.bounded(
            &limits.guest_timeout,
            MIN_TIMEOUT..=MAX_GUEST_TIMEOUT,
            "the time for the guest to accept",
        );
        let idle_timeout = self.bounded(
            &limits.idle_timeout,
            Duration::ZERO..=MAX_IDLE_TIMEOUT,
            "the idle time",
        );
        let busy_poll = self.bounded(
            &limits.busy_poll,
            Duration::ZERO..=MAX_BUSY_POLL,
            "the time to look for packets",
        );
        Some(Limits {
            connections: usize::try_from(connections?).ok()?,
            connections_per_second: per_second?,
            buffer: buffer?,
            memory: memory?,
            connect_timeout: connect_timeout?,
            guest_timeout: guest_timeout?,
            idle_timeout: idle_timeout?,
            busy_poll: busy_poll?,
        })
    }

    fn buffer(&mut self, buffer: &Given<ByteSize>) -> Option<u32> {
        let size = buffer.value()?.0;
        if let Some((size, at)) = buffer.located()
            && !BUFFER.contains(&size.0)
        {
            let message = format!("{size} is no usable size of a buffer");
            self.error(at, message, "give a size from 4KiB to 16MiB");
        }
        u32::try_from(size).ok()
    }

    fn memory(&mut self, memory: &Given<ByteSize>, buffer: Option<u32>) -> Option<u64> {
        let size = memory.value()?.0;
        if let (Some((size, at)), Some(buffer)) = (memory.located(), buffer) {
            let buffer = ByteSize(buffer.into());
            if size.0 < buffer.0 {
                let message = format!("{size} cannot hold the buffer of one connection ({buffer})");
                self.error(at, message, "give a size from that of `buffer` to 1024GiB");
            } else if size.0 > *MEMORY.end() {
                let message = format!("{size} is no usable size of a guest's memory");
                self.error(at, message, "give a size from that of `buffer` to 1024GiB");
            }
        }
        Some(size)
    }

    fn connect_timeout(&mut self, timeout: &Given<Period>) -> Option<Duration> {
        if let Some((period, at)) = timeout.located()
            && period.0 >= GUEST_GIVES_UP
        {
            let message = format!("{period} is too long: a guest's connect() gives up after 2s");
            self.error(
                at,
                message,
                "give less than 2s, such as 1500ms, so that the guest learns the reason",
            );
            return None;
        }
        self.bounded(
            timeout,
            MIN_TIMEOUT..=GUEST_GIVES_UP,
            "the time to reach a target",
        )
    }

    pub(super) fn bounded(
        &mut self,
        given: &Given<Period>,
        bounds: RangeInclusive<Duration>,
        what: &str,
    ) -> Option<Duration> {
        if let Some((period, at)) = given.located()
            && !bounds.contains(&period.0)
        {
            let message = format!("{period} is out of range for {what}");
            let help = format!(
                "give a duration from {} to {}",
                Period(*bounds.start()),
                Period(*bounds.end())
            );
            self.error(at, message, help);
        }
        given.value().map(|period| period.0)
    }

    /// The frames of a rule whose messages travel on a stream of bytes. `refused` says why the rule cannot have any.
    pub(super) fn framing(
        &mut self,
        framing: &Given<schema::FramingKind>,
        max_message: &Given<ByteSize>,
        buffer: Option<u32>,
        refused: Option<(&str, &str)>,
    ) -> Option<Option<Framing>> {
        let Some((schema::FramingKind::LengthPrefixed, at)) = framing.located() else {
            if framing.is_absent()
                && let Some((_, at)) = max_message.located()
            {
                let help = "add `framing: length-prefixed`, or remove `maxMessage`";
                self.error(at, "`maxMessage` bounds frames, and this rule has none", help);
            }
            return framing.is_absent().then_some(None);
        };
        if let Some((message, help)) = refused {
            self.error(at, message, help);
            return None;
        }
        let max_message = match max_message {
            // A longer one could not reach us: the guest never has more credit.
            Given::Absent => buffer?,
            Given::Wrong => return None,
            Given::Right(size, at) => self.max_message(*size, (*at)?, buffer?)?,
        };
        Some(Some(Framing { max_message }))
    }

    fn max_message(
        &mut self,
        size: ByteSize,
        at: crate::config::document::NodeId,
        buffer: u32,
    ) -> Option<u32> {
        let help = format!(
            "give a size from 1 to {}, which is `limits.buffer`",
            ByteSize(buffer.into())
        );
        if size.0 == 0 {
            self.error(at, "a message of 0 bytes is no bound", help);
        } else if size.0 > u64::from(buffer) {
            let message = format!("a message of {size} does not fit into the buffer of a connection");
            self.error(at, message, format!("{help}, or raise that"));
        }
        u32::try_from(size.0).ok()
    }

    /// The connections that one rule may have at once.
    pub(super) fn rule_connections(
        &mut self,
        connections: &Given<Connections>,
        of_guest: Option<usize>,
    ) -> Option<Option<usize>> {
        let count = match connections {
            Given::Absent => return Some(None),
            Given::Wrong => return None,
            Given::Right(count, _) => usize::try_from(count.0).ok()?,
        };
        if let (Some((_, at)), Some(of_guest)) = (connections.located(), of_guest)
            && count > of_guest
        {
            let message =
                format!("{count} connections of this rule are more than the guest may have ({of_guest})");
            let help = "raise `limits.connections` of the guest, or lower this";
            self.report.warning(self.document, at, message, help);
        }
        Some(Some(count))
    }
}
