//! Whoever looks at this guest's packets: usually nobody, which costs one look at an empty list for each packet.

use std::sync::Arc;

use crate::capture::Tap;
use crate::guest::{Slice, TxPacket};
use crate::metrics::{Direction, GuestMetrics};
use crate::vsock::{HEADER_LEN, Header};

/// The captures of a guest. They belong to no session: a VMM that goes and comes back is seen by them.
pub(super) struct Captures {
    taps: Vec<Tap>,
    /// Payload of the packet that is being recorded, for all taps; as long as the longest wants it.
    payload: Vec<u8>,
    metrics: Arc<GuestMetrics>,
}

impl Captures {
    pub(super) fn new(metrics: Arc<GuestMetrics>) -> Captures {
        Captures {
            taps: Vec::new(),
            payload: Vec::new(),
            metrics,
        }
    }

    /// Records for `tap`, too. How many there are is for whoever makes them to bound.
    pub(super) fn add(&mut self, tap: Tap) {
        self.forget_ended();
        self.taps.push(tap);
    }

    /// Whether anybody looks. Ask before anything is made for the others.
    pub(super) fn is_on(&self) -> bool {
        !self.taps.is_empty()
    }

    /// Records a packet of the guest with the payload that it says it has, as far as there is any. The payload is read a second time for
    /// this: a guest that changes it meanwhile has fooled nobody but its own debugger.
    pub(super) fn record_from_guest(&mut self, header: &Header, packet: &TxPacket<'_, '_>) {
        let len = header.len.min(packet.payload_len);
        self.record(Direction::GuestToHost, &packet.header, len, |into| {
            copy(packet.payload(len), into)
        });
    }

    /// Records a packet with `len` bytes of payload, of which `copy` writes the first ones into what it is given and tells how
    /// many it wrote.
    pub(super) fn record(
        &mut self,
        direction: Direction,
        header: &[u8; HEADER_LEN],
        len: u32,
        copy: impl FnOnce(&mut [u8]) -> usize,
    ) {
        let wanted = self.taps.iter().map(Tap::snaplen).max().unwrap_or(0);
        self.payload.resize(wanted.min(len) as usize, 0);
        let copied = copy(&mut self.payload);
        let payload = self.payload.get(..copied).unwrap_or_default();
        for tap in &mut self.taps {
            if !tap.is_closed() && !tap.record(direction, header, payload, len) {
                self.metrics.capture_dropped_packets.inc();
            }
        }
    }

    /// Passes on what was recorded in this turn.
    pub(super) fn flush(&mut self) {
        if !self.is_on() {
            return;
        }
        self.taps.iter_mut().for_each(Tap::flush);
        self.forget_ended();
    }

    fn forget_ended(&mut self) {
        self.taps.retain(|tap| !tap.is_closed());
        if self.taps.is_empty() {
            self.payload = Vec::new();
        }
    }
}

/// Copies what fits; tells how much that was.
fn copy<'m>(slices: impl Iterator<Item = Slice<'m>>, into: &mut [u8]) -> usize {
    let mut copied = 0;
    for slice in slices {
        let Some(rest) = into.get_mut(copied..).filter(|rest| !rest.is_empty()) else {
            break;
        };
        copied += slice.copy_to(rest);
    }
    copied
}
