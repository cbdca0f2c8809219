//! What the guest counts: traffic, and the device's faults by name.

use crate::vsock::header::Op;

/// A rule that the device broke, seen from the guest. A test's last line is that all of these are zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(usize)]
pub enum Violation {
    /// A used element names no chain that the device owns.
    UsedUnknownId,
    /// IN_ORDER was negotiated and a used element names a chain before its turn.
    UsedOutOfOrder,
    /// The used index moved by more than the chains the device owns.
    UsedIndexJump,
    /// A receive buffer came back with less than a header in it.
    UsedTooShort,
    /// A receive buffer came back with more bytes than it holds.
    UsedTooLong,
    /// The packet header's `len` is not what was written behind the header.
    LengthMismatch,
    /// A packet whose addresses are not host to this guest.
    WrongAddress,
    /// A socket type the standard does not know.
    UnknownType,
    /// Operation 0 (VIRTIO_VSOCK_OP_INVALID) or one the standard does not know.
    InvalidOp,
    /// A packet of a socket type that was not negotiated; RST aside, which answers such a one.
    TypeNotNegotiated,
    /// A packet of another socket type than the connection it is for.
    WrongType,
    /// A flag that the standard does not know for this operation and socket type.
    UnknownFlags,
    /// VIRTIO_VSOCK_SEQ_EOR on a packet that is not its message's last.
    RecordEndInMessage,
    /// SHUTDOWN in the middle of a message, which will never end: the guest's program does not hear of it.
    UnfinishedMessage,
    /// An RW packet without payload that is not the end of a message.
    EmptyRw,
    /// Payload on an operation that has none.
    UnexpectedPayload,
    /// More payload than the guest's credit allows; Linux drops it silently and the stream has a hole.
    CreditExceeded,
    /// RST for a connection that does not exist and that the guest did not just reset or close: most likely an
    /// answer to an RST.
    UnexpectedRst,
    /// Another packet for a connection that does not exist.
    NoConnection,
    /// RESPONSE to something else than a REQUEST.
    UnexpectedResponse,
    /// REQUEST on a connection that exists.
    DuplicateRequest,
    /// Payload after the device said it would send no more.
    DataAfterShutdown,
    /// The device's `fwd_cnt` counts more bytes than the guest has sent.
    ForwardCountAhead,
}

impl Violation {
    /// How many there are.
    pub const COUNT: usize = Violation::ForwardCountAhead as usize + 1;
    /// All of them, in declaration order.
    pub const ALL: [Violation; Violation::COUNT] = [
        Violation::UsedUnknownId,
        Violation::UsedOutOfOrder,
        Violation::UsedIndexJump,
        Violation::UsedTooShort,
        Violation::UsedTooLong,
        Violation::LengthMismatch,
        Violation::WrongAddress,
        Violation::UnknownType,
        Violation::InvalidOp,
        Violation::TypeNotNegotiated,
        Violation::WrongType,
        Violation::UnknownFlags,
        Violation::RecordEndInMessage,
        Violation::UnfinishedMessage,
        Violation::EmptyRw,
        Violation::UnexpectedPayload,
        Violation::CreditExceeded,
        Violation::UnexpectedRst,
        Violation::NoConnection,
        Violation::UnexpectedResponse,
        Violation::DuplicateRequest,
        Violation::DataAfterShutdown,
        Violation::ForwardCountAhead,
    ];
}

/// Counts of violations by name.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Violations([u64; Violation::COUNT]);

impl Violations {
    /// Counts one.
    pub fn record(&mut self, violation: Violation) {
        self.0[violation as usize] += 1;
    }

    /// How often this one was seen.
    pub fn count(&self, violation: Violation) -> u64 {
        self.0[violation as usize]
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Whether the device kept every rule.
    pub fn is_empty(&self) -> bool {
        self.total() == 0
    }

    /// The sum of both.
    #[must_use]
    pub fn plus(mut self, other: &Violations) -> Violations {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
        self
    }
}

impl std::fmt::Debug for Violations {
    /// Only those that were seen, so that a failed assertion reads well.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map()
            .entries(
                Violation::ALL
                    .iter()
                    .filter(|v| self.count(**v) > 0)
                    .map(|v| (v, self.count(*v))),
            )
            .finish()
    }
}

/// Packets by operation.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Packets([u64; 8]);

impl Packets {
    /// Counts one packet with a header's `op` field; unknown operations together with 0.
    pub fn record(&mut self, op: u16) {
        self.0[Op::from_wire(op).map_or(0, |op| op as usize)] += 1;
    }

    /// Packets of this operation.
    pub fn count(&self, op: Op) -> u64 {
        self.0[op as usize]
    }

    /// All packets.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl std::fmt::Debug for Packets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seen = (0..8u16).filter(|op| self.0[usize::from(*op)] > 0);
        f.debug_map()
            .entries(seen.map(|op| {
                (
                    Op::from_wire(op).map_or("unknown".into(), |o| format!("{o:?}")),
                    self.0[usize::from(op)],
                )
            }))
            .finish()
    }
}

/// One queue's notifications and chains.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct QueueStats {
    /// Chains made available.
    pub chains: u64,
    /// Chains the device has used.
    pub used: u64,
    /// Kicks written to the eventfd.
    pub kicks: u64,
    /// Kicks that the device had suppressed.
    pub kicks_suppressed: u64,
    /// Interrupts: what the device added to the call eventfd.
    pub interrupts: u64,
    /// Used elements that came before their turn (allowed without IN_ORDER).
    pub out_of_order: u64,
}

/// What one driver has seen so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// The receive queue.
    pub rx: QueueStats,
    /// The transmit queue.
    pub tx: QueueStats,
    /// Packets from the device by operation.
    pub received: Packets,
    /// Packets to the device by operation.
    pub sent: Packets,
    /// Payload bytes from the device.
    pub received_bytes: u64,
    /// Payload bytes to the device.
    pub sent_bytes: u64,
    /// The device's faults.
    pub violations: Violations,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lists_every_violation_at_its_place() {
        for (index, violation) in Violation::ALL.iter().enumerate() {
            assert_eq!(*violation as usize, index);
        }
    }

    #[test]
    fn debug_output_names_only_what_was_seen() {
        let mut violations = Violations::default();
        assert_eq!(format!("{violations:?}"), "{}");
        violations.record(Violation::EmptyRw);
        assert_eq!(format!("{violations:?}"), "{EmptyRw: 1}");
        let mut packets = Packets::default();
        packets.record(5);
        packets.record(77);
        assert_eq!(format!("{packets:?}"), r#"{"unknown": 1, "Rw": 1}"#);
    }
}
