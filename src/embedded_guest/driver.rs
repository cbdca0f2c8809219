//! A virtio-vsock driver: the three queues, receive buffers as guests post them, packets in any shape.
//!
//! Knows packets, not connections: that is [`Sockets`](super::Sockets). Not synchronised; one owner.

mod areas;
mod waiting;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::dma::{Dma, IommuOptions};
use super::error::{Error, Result};
use super::fd::wait_readable;
use super::front_end::RingSetup;
use super::iommu::{READ, WRITE};
use super::memory::{GuestMemory, PAGE, Window};
use super::shape::{RxLayout, Shape};
use super::stats::{Stats, Violation};
use super::virtqueue::{Segment, Table, Virtqueue};
use crate::vsock::header::{HEADER_LEN, Header};

pub use areas::Area;
use areas::{Mapped, map, unmap};

/// Index of the receive queue.
pub const RX: u16 = 0;
/// Index of the transmit queue.
pub const TX: u16 = 1;
/// Index of the event queue.
pub const EVENT: u16 = 2;

/// Bytes of one transmit slot: 64 KiB of payload with room to keep pieces apart, or for packets that are too long.
/// Only pages that are touched cost memory.
const TX_SLOT: usize = 192 * 1024;
/// Where the packet starts in a slot when its pieces lie side by side: the payload is page-aligned.
const TX_START: usize = PAGE - HEADER_LEN;
/// Bytes between two pieces that are kept apart.
const GAP: usize = 64;
/// Token of chains that were added raw: no slot belongs to them.
const RAW: u32 = u32::MAX;

/// When receive buffers are posted again after the guest has read them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refill {
    /// When fewer than half are posted, as Linux.
    AtHalf,
    /// One by one.
    Each,
    /// Never: a guest that stops reading. [`Driver::post_rx`] posts by hand.
    Never,
}

/// What the driver is like.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DriverOptions {
    /// Entries of every ring, a power of two up to 1024 (QEMU: 128).
    pub queue_size: u16,
    /// Layout of the receive buffers.
    pub rx: RxLayout,
    /// Receive buffers posted; as many as fit when larger.
    pub rx_buffers: u16,
    /// When they are posted again.
    pub refill: Refill,
    /// Packets that can be in flight to the device; at most the ring's size counts.
    pub tx_slots: u16,
    /// Bytes of guest memory.
    pub memory: usize,
    /// The IOMMU that the device is behind, if VIRTIO_F_ACCESS_PLATFORM is acknowledged; without the feature there is none.
    pub iommu: Option<IommuOptions>,
}

impl Default for DriverOptions {
    /// A Linux 6.12 guest under QEMU with 256 MiB.
    fn default() -> DriverOptions {
        DriverOptions {
            queue_size: 128,
            rx: RxLayout::LINUX_6_12,
            rx_buffers: u16::MAX,
            refill: Refill::AtHalf,
            tx_slots: 128,
            memory: 256 << 20,
            iommu: None,
        }
    }
}

/// A packet from the device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The header.
    pub header: Header,
    /// The payload: what lies behind the header, at most the header's `len` bytes.
    pub payload: Vec<u8>,
    /// Bytes the device says it wrote.
    pub used_len: u32,
}

/// Where a sent packet lies, for those who change it afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sent {
    /// Head descriptor.
    pub head: u16,
    /// Address of the packet's first byte: guest-physical, or an IOVA.
    pub gpa: u64,
}

/// The driver. Fields that tests of hostile guests need are reachable through [`Driver::queue`].
#[derive(Debug)]
pub struct Driver {
    memory: GuestMemory,
    options: DriverOptions,
    features: u64,
    rx: Virtqueue,
    tx: Virtqueue,
    event: Virtqueue,
    rx_area: Window,
    rx_pieces: Vec<u32>,
    /// Bytes from one receive buffer to the next.
    rx_stride: usize,
    /// Receive buffers that are not posted.
    rx_idle: Vec<u16>,
    /// Receive buffers posted now, and at most.
    rx_posted: u16,
    rx_max: u16,
    tx_area: Window,
    /// Transmit slots that are free; the last used is taken first, since it is warm in the cache.
    tx_idle: Vec<u16>,
    event_area: Window,
    dma: Option<Dma>,
    /// The lowest address that is taken once the rings are mapped.
    rings_end: u64,
    /// What is mapped of each receive buffer and each transmit slot that the device has.
    rx_mapped: Vec<Mapped>,
    tx_mapped: Vec<Mapped>,
    /// Reused for cutting packets.
    pieces: Vec<u32>,
    segments: Vec<Segment>,
    /// Reused for copying received packets out.
    scratch: Vec<u8>,
    stats: Stats,
}

impl Driver {
    /// A driver over fresh memory. `features` are the acknowledged feature bits; the rings follow them.
    pub fn new(options: DriverOptions, features: u64) -> Result<Driver> {
        let memory = GuestMemory::new(options.memory)?;
        Driver::with_memory(memory, options, features)
    }

    /// A driver over this memory. Posts no receive buffers yet: see [`Driver::fill_rx`].
    pub fn with_memory(memory: GuestMemory, options: DriverOptions, features: u64) -> Result<Driver> {
        Driver::with_dma(memory, options, features, None)
    }

    /// The same behind an IOMMU.
    pub(super) fn with_dma(
        mut memory: GuestMemory,
        options: DriverOptions,
        features: u64,
        dma: Option<Dma>,
    ) -> Result<Driver> {
        let size = options.queue_size;
        let mut queue = |index| Virtqueue::with_dma(&mut memory, index, size, features, dma.clone());
        let (rx, tx, event) = (queue(RX)?, queue(TX)?, queue(EVENT)?);
        let rings_end = dma.as_ref().map_or(0, Dma::bottom);
        let rx_pieces = options.rx.pieces();
        // A gap behind every piece and a page for every buffer: no two descriptors are neighbours by accident.
        let rx_stride = rx_pieces
            .iter()
            .map(|p| (*p as usize).next_multiple_of(GAP) + GAP)
            .sum::<usize>();
        let rx_stride = rx_stride.next_multiple_of(PAGE);
        let indirect = features & super::profile::feature::INDIRECT_DESC != 0;
        let per_buffer = if indirect {
            1
        } else {
            rx_pieces.len().max(1) as u16
        };
        let rx_max = options.rx_buffers.min(size / per_buffer);
        let tx_slots = options.tx_slots.clamp(1, size);
        let mut area = |len| match &dma {
            None => memory.allocate(len, PAGE as u64),
            Some(dma) => dma.allocate(&mut memory, len),
        };
        let rx_area = area(rx_stride * usize::from(rx_max))?;
        let tx_area = area(TX_SLOT * usize::from(tx_slots))?;
        let event_area = area(8 * 4)?;
        let capacity = rx_pieces.iter().map(|p| *p as usize).sum();
        Ok(Driver {
            memory,
            options,
            features,
            rx,
            tx,
            event,
            rx_area,
            rx_pieces,
            rx_stride,
            rx_idle: (0..rx_max).rev().collect(),
            rx_posted: 0,
            rx_max,
            tx_area,
            tx_idle: (0..tx_slots).rev().collect(),
            event_area,
            dma,
            rings_end,
            rx_mapped: vec![Vec::new(); usize::from(rx_max)],
            tx_mapped: vec![Vec::new(); usize::from(tx_slots)],
            pieces: Vec::new(),
            segments: Vec::new(),
            scratch: vec![0; capacity],
            stats: Stats::default(),
        })
    }

    /// The guest's reboot or the driver's rebind: rings empty, all buffers ours again. The device must have been
    /// stopped. Behind an IOMMU the rings keep their addresses and move to other memory.
    pub fn reset(&mut self) -> Result<()> {
        if let Some(dma) = self.dma.clone() {
            dma.forget(self.rings_end);
            for queue in [&mut self.rx, &mut self.tx, &mut self.event] {
                queue.move_ring(&mut self.memory)?;
            }
        }
        for mapped in self.rx_mapped.iter_mut().chain(&mut self.tx_mapped) {
            mapped.clear();
        }
        for queue in [&mut self.rx, &mut self.tx, &mut self.event] {
            queue.reset();
        }
        self.rx_idle = (0..self.rx_max).rev().collect();
        self.rx_posted = 0;
        let slots = self.options.tx_slots.clamp(1, self.options.queue_size);
        self.tx_idle = (0..slots).rev().collect();
        Ok(())
    }

    // ---- receiving -----------------------------------------------------------------------------------------------

    /// Posts every idle receive buffer (and the event queue's eight) and notifies: what a driver does after DRIVER_OK.
    pub fn fill_rx(&mut self) -> Result<()> {
        self.post_rx(usize::from(self.rx_max))?;
        while self.event.outstanding() < 8.min(usize::from(self.event.size())) {
            let offset = 4 * self.event.outstanding();
            let addr = match &self.dma {
                None => self.event_area.bus() + offset as u64,
                // Mapped until the reset: events come once in a machine's life.
                Some(dma) => dma.map(&self.event_area, offset, 4, WRITE),
            };
            self.event.add(
                &[Segment {
                    addr,
                    len: 4,
                    writable: true,
                }],
                Table::AsLinux,
                RAW,
            )?;
        }
        self.event.notify();
        Ok(())
    }

    /// Posts up to `count` idle receive buffers and notifies; answers how many there were.
    pub fn post_rx(&mut self, count: usize) -> Result<usize> {
        let mut posted = 0;
        while posted < count {
            let Some(buffer) = self.rx_idle.pop() else { break };
            self.segments.clear();
            let mut at = usize::from(buffer) * self.rx_stride;
            for piece in &self.rx_pieces {
                let mapped = &mut self.rx_mapped[usize::from(buffer)];
                self.segments.push(Segment {
                    addr: map(
                        self.dma.as_ref(),
                        &self.rx_area,
                        at,
                        *piece as usize,
                        WRITE,
                        mapped,
                    ),
                    len: *piece,
                    writable: true,
                });
                at += (*piece as usize).next_multiple_of(GAP) + GAP;
            }
            if let Err(error) = self.rx.add(&self.segments, Table::AsLinux, buffer.into()) {
                unmap(self.dma.as_ref(), &mut self.rx_mapped[usize::from(buffer)]);
                self.rx_idle.push(buffer);
                match error {
                    Error::RingFull => break,
                    other => return Err(other),
                }
            }
            self.rx_posted += 1;
            posted += 1;
        }
        self.rx.notify();
        Ok(posted)
    }

    /// The next packet, if there is one. Its buffer is posted again as the options say.
    pub fn try_recv(&mut self) -> Result<Option<Packet>> {
        self.try_recv_with(|header, payload, used_len| Packet {
            header,
            payload: payload.to_vec(),
            used_len,
        })
    }

    /// The next packet, shown to `read` (header, payload, used length) where it was copied to; none, `None`.
    pub fn try_recv_with<R>(&mut self, read: impl FnOnce(Header, &[u8], u32) -> R) -> Result<Option<R>> {
        let Some((buffer, header, used_len)) = self.next_packet() else {
            return Ok(None);
        };
        let in_buffer = used_len as usize - HEADER_LEN;
        let len = in_buffer.min(header.len as usize);
        let mut scratch = std::mem::take(&mut self.scratch);
        self.copy_from_buffer(buffer, HEADER_LEN, &mut scratch[..len]);
        let answer = read(header, &scratch[..len], used_len);
        self.scratch = scratch;
        self.give_back(buffer)?;
        Ok(Some(answer))
    }

    /// The next packet's header; the payload stays unread. For measuring the device rather than the guest.
    pub fn try_recv_header(&mut self) -> Result<Option<Header>> {
        let Some((buffer, header, _)) = self.next_packet() else {
            return Ok(None);
        };
        self.give_back(buffer)?;
        Ok(Some(header))
    }

    /// Waits for the next packet.
    pub fn recv_packet(&mut self, timeout: Duration) -> Result<Packet> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(packet) = self.try_recv()? {
                return Ok(packet);
            }
            self.wait_rx(deadline)?;
        }
    }

    /// Sleeps until the device interrupts for a used receive buffer.
    pub fn wait_rx(&mut self, deadline: Instant) -> Result<()> {
        wait_used(&mut self.rx, deadline, "waiting for a packet from the device")
    }

    /// Takes the next valid packet off the used ring. Faulty ones are counted and their buffers recycled.
    fn next_packet(&mut self) -> Option<(u16, Header, u32)> {
        loop {
            let used = self.rx.pop()?;
            if used.token == RAW {
                continue;
            }
            let buffer = used.token as u16;
            // Before anything is read, as virtqueue_get_buf does.
            unmap(self.dma.as_ref(), &mut self.rx_mapped[usize::from(buffer)]);
            self.rx_posted -= 1;
            let used_len = used.len.unwrap_or(0);
            let capacity: usize = self.rx_pieces.iter().map(|p| *p as usize).sum();
            if (used_len as usize) < HEADER_LEN || used_len as usize > capacity {
                let short = (used_len as usize) < HEADER_LEN;
                let violation = if short {
                    Violation::UsedTooShort
                } else {
                    Violation::UsedTooLong
                };
                self.stats.violations.record(violation);
                // Linux drops it; give_back can only fail for want of descriptors, of which this one's were freed.
                let _ = self.give_back(buffer);
                continue;
            }
            let mut bytes = [0; HEADER_LEN];
            self.copy_from_buffer(buffer, 0, &mut bytes);
            let header = Header::decode(&bytes);
            let in_buffer = used_len - HEADER_LEN as u32;
            if header.len != in_buffer {
                self.stats.violations.record(Violation::LengthMismatch);
            }
            self.stats.received.record(header.op);
            self.stats.received_bytes += u64::from(header.len.min(in_buffer));
            return Some((buffer, header, used_len));
        }
    }

    fn copy_from_buffer(&self, buffer: u16, mut skip: usize, mut into: &mut [u8]) {
        let mut at = usize::from(buffer) * self.rx_stride;
        for piece in &self.rx_pieces {
            let piece = *piece as usize;
            if skip < piece {
                let len = (piece - skip).min(into.len());
                let (now, later) = into.split_at_mut(len);
                self.rx_area.read(at + skip, now);
                into = later;
            }
            skip = skip.saturating_sub(piece);
            at += piece.next_multiple_of(GAP) + GAP;
        }
    }

    fn give_back(&mut self, buffer: u16) -> Result<()> {
        self.rx_idle.push(buffer);
        match self.options.refill {
            Refill::AtHalf if self.rx_posted < self.rx_max / 2 => self.post_rx(usize::MAX).map(drop),
            Refill::Each => self.post_rx(1).map(drop),
            Refill::AtHalf | Refill::Never => Ok(()),
        }
    }

    // ---- sending -------------------------------------------------------------------------------------------------

    /// Sends one packet and notifies. [`Error::RingFull`] when the device owns all slots or descriptors.
    pub fn send_packet(&mut self, header: &Header, payload: &[u8], shape: &Shape) -> Result<Sent> {
        let sent = self.queue_packet(header, payload, shape)?;
        self.tx.notify();
        Ok(sent)
    }

    /// Sends one packet, waiting for room.
    pub fn send_packet_wait(
        &mut self,
        header: &Header,
        payload: &[u8],
        shape: &Shape,
        timeout: Duration,
    ) -> Result<Sent> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.send_packet(header, payload, shape) {
                Err(Error::RingFull) => self.wait_tx(deadline)?,
                other => return other,
            }
        }
    }

    /// Makes one packet available without notifying; [`Driver::notify_tx`] ends the burst.
    pub fn queue_packet(&mut self, header: &Header, payload: &[u8], shape: &Shape) -> Result<Sent> {
        let sent = self.queue_bytes(&header.encode(), payload, HEADER_LEN + payload.len(), shape)?;
        self.stats.sent.record(header.op);
        self.stats.sent_bytes += payload.len() as u64;
        Ok(sent)
    }

    /// Makes a packet available whose payload is whatever lies in the slot: for measuring the device rather than
    /// the guest's copying. `header.len` bytes.
    pub fn queue_unwritten(&mut self, header: &Header, shape: &Shape) -> Result<Sent> {
        let sent = self.queue_bytes(&header.encode(), &[], HEADER_LEN + header.len as usize, shape)?;
        self.stats.sent.record(header.op);
        self.stats.sent_bytes += u64::from(header.len);
        Ok(sent)
    }

    /// Sends bytes as they are, header or not.
    pub fn send_raw(&mut self, bytes: &[u8], shape: &Shape) -> Result<Sent> {
        let sent = self.queue_bytes(bytes, &[], bytes.len(), shape)?;
        self.tx.notify();
        Ok(sent)
    }

    /// Sends a chain of any segments on any queue and notifies: overlapping, unmapped, writable on TX.
    pub fn send_chain(&mut self, queue: u16, segments: &[Segment], table: Table) -> Result<u16> {
        let queue = self.queue(queue);
        let head = queue.add(segments, table, RAW)?;
        queue.notify();
        Ok(head)
    }

    /// Ends a burst of [`Driver::queue_packet`].
    pub fn notify_tx(&mut self) -> bool {
        self.tx.notify()
    }

    /// Takes back what the device has used; answers how many packets that were.
    pub fn reclaim_tx(&mut self) -> usize {
        let mut reclaimed = 0;
        while let Some(used) = self.tx.pop() {
            if used.token != RAW {
                unmap(self.dma.as_ref(), &mut self.tx_mapped[used.token as usize]);
                self.tx_idle.push(used.token as u16);
            }
            if used.len.is_some_and(|len| len > 0) {
                // The device may not write to a TX buffer, and all of these are read-only.
                self.stats.violations.record(Violation::UsedTooLong);
            }
            reclaimed += 1;
        }
        reclaimed
    }

    /// Sleeps until the device interrupts for a used transmit buffer, and reclaims.
    pub fn wait_tx(&mut self, deadline: Instant) -> Result<()> {
        wait_used(&mut self.tx, deadline, "waiting for the device to take packets")?;
        self.reclaim_tx();
        Ok(())
    }

    /// Waits until the device has used every packet.
    pub fn flush_tx(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        self.reclaim_tx();
        while self.tx.outstanding() > 0 {
            self.wait_tx(deadline)?;
        }
        Ok(())
    }

    /// Packets that can be sent now, as far as slots and single descriptors go.
    pub fn tx_room(&self) -> usize {
        self.tx_idle.len().min(self.tx.free().into())
    }

    fn queue_bytes(&mut self, first: &[u8], second: &[u8], total: usize, shape: &Shape) -> Result<Sent> {
        shape.pieces(total, &mut self.pieces);
        let span = if shape.scattered {
            self.pieces
                .iter()
                .map(|p| (*p as usize).next_multiple_of(GAP) + GAP)
                .sum()
        } else {
            TX_START + total
        };
        if span > TX_SLOT {
            return Err(Error::TooLong {
                len: span,
                max: TX_SLOT,
            });
        }
        if self.tx_idle.is_empty() || self.tx.free() < 2 {
            self.reclaim_tx();
        }
        let Some(slot) = self.tx_idle.last().copied() else {
            return Err(Error::RingFull);
        };
        let start = usize::from(slot) * TX_SLOT;
        let mut bytes = Concat { first, second };
        self.segments.clear();
        // Side by side the pieces go up from TX_START, kept apart they go down from the slot's end.
        let mut up = start + TX_START;
        let mut down = start + TX_SLOT;
        for piece in &self.pieces {
            let len = *piece as usize;
            let at = if shape.scattered {
                down -= len.next_multiple_of(GAP) + GAP;
                down
            } else {
                up
            };
            up += len;
            bytes.write(&self.tx_area, at, len);
            let mapped = &mut self.tx_mapped[usize::from(slot)];
            self.segments.push(Segment {
                addr: map(self.dma.as_ref(), &self.tx_area, at, len, READ, mapped),
                len: *piece,
                writable: false,
            });
        }
        let gpa = self.segments.first().map_or(0, |s| s.addr);
        let mut added = self.tx.add(&self.segments, shape.table, slot.into());
        if matches!(added, Err(Error::RingFull)) && self.reclaim_tx() > 0 {
            // The slot stays ours: it is still among the idle ones, if no longer the last.
            added = self.tx.add(&self.segments, shape.table, slot.into());
        }
        if added.is_err() {
            unmap(self.dma.as_ref(), &mut self.tx_mapped[usize::from(slot)]);
        }
        let head = added?;
        if self.tx_idle.last() == Some(&slot) {
            self.tx_idle.pop();
        } else {
            self.tx_idle.retain(|idle| *idle != slot);
        }
        Ok(Sent { head, gpa })
    }

    // ---- everything else -----------------------------------------------------------------------------------------

    /// The next event of the event queue (`struct virtio_vsock_event`), if there is one.
    pub fn try_recv_event(&mut self) -> Option<u32> {
        let index = self.event.stats().used % 8;
        self.event.pop()?;
        Some(
            self.event_area
                .load::<u32>(4 * index as usize, std::sync::atomic::Ordering::Relaxed),
        )
    }

    /// The rings as vhost-user wants to know them: `queues` of them, to be continued at `bases` (0 where missing).
    pub fn rings(&self, queues: u16, bases: &[u16]) -> Vec<RingSetup<'_>> {
        [&self.rx, &self.tx, &self.event]
            .into_iter()
            .take(queues.into())
            .enumerate()
            .map(|(i, queue)| queue.setup(bases.get(i).copied().unwrap_or(0)))
            .collect()
    }

    /// One queue, by index; the event queue for whatever is neither RX nor TX.
    pub fn queue(&mut self, index: u16) -> &mut Virtqueue {
        match index {
            RX => &mut self.rx,
            TX => &mut self.tx,
            _ => &mut self.event,
        }
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The guest's memory, to add and remove regions.
    pub fn memory_mut(&mut self) -> &mut GuestMemory {
        &mut self.memory
    }

    /// The options.
    pub fn options(&self) -> &DriverOptions {
        &self.options
    }

    /// The acknowledged feature bits.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Receive buffers the device owns.
    pub fn rx_posted(&self) -> u16 {
        self.rx_posted
    }

    /// Changes when receive buffers are posted again.
    pub fn set_refill(&mut self, refill: Refill) {
        self.options.refill = refill;
    }

    /// What was seen so far, the queues' part included.
    pub fn stats(&self) -> Stats {
        let queues = self
            .rx
            .violations()
            .plus(self.tx.violations())
            .plus(self.event.violations());
        Stats {
            rx: self.rx.stats(),
            tx: self.tx.stats(),
            violations: self.stats.violations.plus(&queues),
            ..self.stats
        }
    }

    /// Counts a fault that the layer above found.
    pub fn record(&mut self, violation: Violation) {
        self.stats.violations.record(violation);
    }
}

/// Sleeps until the queue has used something, with interrupts on only meanwhile.
fn wait_used(queue: &mut Virtqueue, deadline: Instant, what: &'static str) -> Result<()> {
    loop {
        if queue.enable_interrupts() {
            break;
        }
        if !wait_readable(&[queue.call().as_fd()], Some(deadline))? {
            return Err(Error::Timeout { what });
        }
        queue.take_interrupts();
        if queue.has_used() {
            break;
        }
    }
    queue.disable_interrupts();
    Ok(())
}

/// Two slices, written one behind the other in pieces.
struct Concat<'a> {
    first: &'a [u8],
    second: &'a [u8],
}

impl Concat<'_> {
    /// Writes the next `len` bytes, as far as there are any.
    fn write(&mut self, area: &Window, at: usize, len: usize) {
        let head = len.min(self.first.len());
        area.write(at, &self.first[..head]);
        self.first = &self.first[head..];
        let tail = (len - head).min(self.second.len());
        area.write(at + head, &self.second[..tail]);
        self.second = &self.second[tail..];
    }
}
