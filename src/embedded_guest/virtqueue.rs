//! The driver's half of a split virtqueue (virtio 1.2, section 2.7), with the habits of Linux's
//! drivers/virtio/virtio_ring.c: when it kicks, when it wants interrupts, when it takes an indirect table.
//!
//! Written for itself and not on top of the device's code: it judges the device.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{Ordering, fence};

use super::dma::Dma;
use super::error::{Error, Result};
use super::fd::EventFd;
use super::front_end::RingSetup;
use super::iommu::READ;
use super::memory::{GuestMemory, PAGE, Window};
use super::profile::feature;
use super::stats::{QueueStats, Violation, Violations};

/// One descriptor of a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Guest physical address (or IOVA).
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes (RX) rather than reads (TX).
    pub writable: bool,
}

/// Whether a chain goes through an indirect table.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Table {
    /// As Linux: when negotiated and the chain has more than one segment.
    #[default]
    AsLinux,
    /// Never.
    Direct,
    /// Always, negotiated or not.
    Indirect,
}

/// A chain that came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Used {
    /// What the chain was added with.
    pub token: u32,
    /// Bytes the device says it wrote. `None` where an IN_ORDER device skipped the element in a batch.
    pub len: Option<u32>,
}

/// Descriptor flag: the chain goes on.
pub const DESC_F_NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const DESC_F_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;

const DESC_LEN: usize = 16;
/// Longest chain that goes through an indirect table: room for 1 header piece and 64 KiB in pages, and more.
const TABLE_ENTRIES: usize = 64;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

#[derive(Clone, Copy, Debug)]
struct Chain {
    token: u32,
    /// Descriptors taken from the free list.
    descriptors: u16,
    /// The last of them, where the chain joins the free list again.
    tail: u16,
    /// Where its indirect table is mapped in the IOMMU, and how long it is.
    table: Option<(u64, usize)>,
}

/// A split virtqueue, driver side.
#[derive(Debug)]
pub struct Virtqueue {
    index: u16,
    size: u16,
    ring: Window,
    tables: Window,
    /// The IOMMU's mappings, if the device's addresses are not those of memory.
    dma: Option<Dma>,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    kick: EventFd,
    call: EventFd,

    /// Free descriptors are a list through `next`, as in Linux.
    next: Vec<u16>,
    free_head: u16,
    free: u16,
    /// Chains the device owns, by head descriptor.
    chains: Vec<Option<Chain>>,
    /// Their heads, oldest first.
    outstanding: VecDeque<u16>,
    /// Next available index; the ring's copy follows at once.
    avail_idx: u16,
    /// Chains added since the device was last notified or found not to need it.
    added: u16,
    /// Used elements consumed.
    last_used: u16,
    /// An IN_ORDER device named this head for a whole batch: (head, len).
    batch: Option<(u16, u32)>,
    /// Our copy of the available ring's flags.
    avail_flags: u16,
    stats: QueueStats,
    violations: Violations,
}

impl Virtqueue {
    /// A ring of `size` entries (a power of two) in fresh memory. `features` are the acknowledged feature bits.
    pub fn new(memory: &mut GuestMemory, index: u16, size: u16, features: u64) -> Result<Virtqueue> {
        Virtqueue::with_dma(memory, index, size, features, None)
    }

    /// The same behind an IOMMU: the ring is mapped for good, indirect tables for each use.
    pub(super) fn with_dma(
        memory: &mut GuestMemory,
        index: u16,
        size: u16,
        features: u64,
        dma: Option<Dma>,
    ) -> Result<Virtqueue> {
        assert!(size.is_power_of_two(), "a split ring's size is a power of two");
        let entries = usize::from(size);
        let tables_len = entries * TABLE_ENTRIES * DESC_LEN;
        let (ring, tables) = match &dma {
            None => (
                memory.allocate(ring_len(entries), PAGE as u64)?,
                memory.allocate(tables_len, 64)?,
            ),
            Some(dma) => {
                let mut ring = dma.allocate(memory, ring_len(entries))?;
                dma.map_coherent(&mut ring);
                (ring, dma.allocate(memory, tables_len)?)
            }
        };
        let mut queue = Virtqueue {
            index,
            size,
            ring,
            tables,
            dma,
            event_idx: features & feature::EVENT_IDX != 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            in_order: features & feature::IN_ORDER != 0,
            kick: EventFd::new()?,
            call: EventFd::new()?,
            next: Vec::new(),
            free_head: 0,
            free: 0,
            chains: Vec::new(),
            outstanding: VecDeque::new(),
            avail_idx: 0,
            added: 0,
            last_used: 0,
            batch: None,
            avail_flags: 0,
            stats: QueueStats::default(),
            violations: Violations::default(),
        };
        queue.reset();
        Ok(queue)
    }

    /// Empties the ring and starts from index 0, as after a reset of the device. Counters go on.
    pub fn reset(&mut self) {
        self.ring.clear();
        self.next = (1..=self.size).collect();
        self.free_head = 0;
        self.free = self.size;
        self.chains = vec![None; usize::from(self.size)];
        self.outstanding.clear();
        self.avail_idx = 0;
        self.added = 0;
        self.last_used = 0;
        self.batch = None;
        self.avail_flags = 0;
        self.call.take();
    }

    /// Moves the ring to other memory, at the device address that it has; the ring is reset afterwards. What a guest does
    /// that loads its driver again: the vIOMMU gives out the same address, the kernel other pages. The old ones hold
    /// rubbish from now on.
    pub(super) fn move_ring(&mut self, memory: &mut GuestMemory) -> Result<()> {
        let Some(dma) = self.dma.as_ref().filter(|dma| dma.maps_pages()) else {
            return Ok(());
        };
        let mut ring = dma.allocate(memory, self.ring.len())?;
        dma.map_coherent_at(&mut ring, self.ring.bus());
        let old = std::mem::replace(&mut self.ring, ring);
        old.write(0, &vec![0xa5; old.len()]);
        Ok(())
    }

    /// Makes a chain of `segments` available, without notifying. `token` comes back with it.
    ///
    /// Fails with [`Error::RingFull`] when there are too few free descriptors.
    pub fn add(&mut self, segments: &[Segment], table: Table, token: u32) -> Result<u16> {
        let through_table = match table {
            Table::AsLinux => self.indirect && segments.len() > 1 && segments.len() <= TABLE_ENTRIES,
            Table::Direct => false,
            Table::Indirect => segments.len() <= TABLE_ENTRIES,
        };
        let needed = if through_table { 1 } else { segments.len() };
        if needed == 0 || needed > usize::from(self.free) {
            return Err(Error::RingFull);
        }
        let head = self.free_head;
        let mut tail = head;
        let mut mapped = None;
        if through_table {
            let base = usize::from(head) * TABLE_ENTRIES * DESC_LEN;
            for (i, segment) in segments.iter().enumerate() {
                let last = i + 1 == segments.len();
                let flags = write_flag(segment) | if last { 0 } else { DESC_F_NEXT };
                let bytes = descriptor(
                    segment.addr,
                    segment.len,
                    flags,
                    if last { 0 } else { i as u16 + 1 },
                );
                self.tables.write(base + i * DESC_LEN, &bytes);
            }
            let len = segments.len() * DESC_LEN;
            let addr = match &self.dma {
                None => self.tables.bus() + base as u64,
                Some(dma) => {
                    let addr = dma.map(&self.tables, base, len, READ);
                    mapped = Some((addr, len));
                    addr
                }
            };
            self.write_descriptor(head, addr, len as u32, DESC_F_INDIRECT, 0);
        } else {
            for (i, segment) in segments.iter().enumerate() {
                let last = i + 1 == segments.len();
                let next = self.next[usize::from(tail)];
                let flags = write_flag(segment) | if last { 0 } else { DESC_F_NEXT };
                self.write_descriptor(
                    tail,
                    segment.addr,
                    segment.len,
                    flags,
                    if last { 0 } else { next },
                );
                if !last {
                    tail = next;
                }
            }
        }
        self.free_head = self.next[usize::from(tail)];
        self.free -= needed as u16;
        self.chains[usize::from(head)] = Some(Chain {
            token,
            descriptors: needed as u16,
            tail,
            table: mapped,
        });
        self.outstanding.push_back(head);
        self.publish(head);
        Ok(head)
    }

    /// Writes `head` to the next place of the available ring and moves the index: nothing is checked.
    pub fn publish(&mut self, head: u16) {
        let slot = self.avail_idx & (self.size - 1);
        self.write_avail_entry(slot, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        // Release: the device that sees the index sees the descriptors.
        self.ring
            .store(self.avail_idx, self.avail_at() + 2, Ordering::Release);
        self.added = self.added.wrapping_add(1);
        self.stats.chains += 1;
        if self.added == u16::MAX {
            // After 2^16 chains the event index could not be compared any more (virtqueue_add_split does the same).
            self.notify();
        }
    }

    /// Notifies the device if it wants to be notified; answers whether it was.
    pub fn notify(&mut self) -> bool {
        // The index must be visible before the device's wish is read, or both sides sleep.
        fence(Ordering::SeqCst);
        let old = self.avail_idx.wrapping_sub(self.added);
        let added = std::mem::take(&mut self.added);
        if added == 0 {
            return false;
        }
        let wanted = if self.event_idx {
            need_event(self.avail_event(), self.avail_idx, old)
        } else {
            self.ring.load::<u16>(self.used_at(), Ordering::Relaxed) & USED_F_NO_NOTIFY == 0
        };
        if wanted {
            self.kick();
        } else {
            self.stats.kicks_suppressed += 1;
        }
        wanted
    }

    /// Kicks whether the device wants it or not.
    pub fn kick(&mut self) {
        self.stats.kicks += 1;
        self.kick.signal();
    }

    /// The next chain that the device has used.
    pub fn pop(&mut self) -> Option<Used> {
        let (head, len) = self.next_used()?;
        let chain = self.chains[usize::from(head)].take()?;
        self.next[usize::from(chain.tail)] = self.free_head;
        self.free_head = head;
        self.free += chain.descriptors;
        self.stats.used += 1;
        if let (Some(dma), Some((addr, len))) = (&self.dma, chain.table) {
            dma.unmap(addr, len);
        }
        if self.event_idx && self.avail_flags & AVAIL_F_NO_INTERRUPT == 0 {
            // virtqueue_get_buf: an interrupt is expected for the next one, so say so.
            self.write_used_event(self.last_used);
        }
        Some(Used {
            token: chain.token,
            len,
        })
    }

    /// Finds the head of the next used chain and takes it off `outstanding`; skips elements that make no sense.
    fn next_used(&mut self) -> Option<(u16, Option<u32>)> {
        loop {
            if let Some((last, len)) = self.batch {
                let head = self.outstanding.pop_front()?;
                self.last_used = self.last_used.wrapping_add(1);
                if head == last {
                    self.batch = None;
                    return Some((head, Some(len)));
                }
                return Some((head, None));
            }
            let ready = self.used_idx().wrapping_sub(self.last_used);
            if ready == 0 {
                return None;
            }
            if usize::from(ready) > self.outstanding.len() {
                self.violations.record(Violation::UsedIndexJump);
                if self.outstanding.is_empty() {
                    self.last_used = self.used_idx();
                    return None;
                }
            }
            let at = self.used_at() + 4 + 8 * usize::from(self.last_used & (self.size - 1));
            let id: u32 = self.ring.load(at, Ordering::Relaxed);
            let len: u32 = self.ring.load(at + 4, Ordering::Relaxed);
            let Some(position) = self.outstanding.iter().position(|head| u32::from(*head) == id) else {
                self.violations.record(Violation::UsedUnknownId);
                self.last_used = self.last_used.wrapping_add(1);
                continue;
            };
            if position > 0 {
                self.stats.out_of_order += 1;
                if self.in_order && position < usize::from(ready) {
                    // VIRTIO_F_IN_ORDER allows one element for a batch: it stands where the batch begins.
                    self.batch = Some((id as u16, len));
                    continue;
                }
                if self.in_order {
                    self.violations.record(Violation::UsedOutOfOrder);
                }
            }
            self.last_used = self.last_used.wrapping_add(1);
            let head = self.outstanding.remove(position)?;
            return Some((head, Some(len)));
        }
    }

    /// Whether [`Virtqueue::pop`] would find something.
    pub fn has_used(&self) -> bool {
        self.batch.is_some() || self.used_idx() != self.last_used
    }

    /// Asks for an interrupt at the next used chain. Answers whether there is one already: then handle it instead
    /// of waiting.
    pub fn enable_interrupts(&mut self) -> bool {
        self.avail_flags &= !AVAIL_F_NO_INTERRUPT;
        if !self.event_idx {
            self.ring
                .store(self.avail_flags, self.avail_at(), Ordering::Relaxed);
        }
        self.write_used_event(self.last_used);
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks for no interrupts, as far as the device listens.
    pub fn disable_interrupts(&mut self) {
        if self.avail_flags & AVAIL_F_NO_INTERRUPT != 0 {
            return;
        }
        self.avail_flags |= AVAIL_F_NO_INTERRUPT;
        if self.event_idx {
            // An index just behind: it is 2^16 chains away.
            self.write_used_event(self.last_used.wrapping_sub(1));
        } else {
            self.ring
                .store(self.avail_flags, self.avail_at(), Ordering::Relaxed);
        }
    }

    /// Takes what the device added to the call eventfd.
    pub fn take_interrupts(&mut self) -> u64 {
        let count = self.call.take();
        self.stats.interrupts += count;
        count
    }

    /// The eventfd by which the device interrupts, for waiting.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// The ring as vhost-user wants to know it, to be continued at `base`.
    pub fn setup(&self, base: u16) -> RingSetup<'_> {
        let start = match &self.dma {
            None => self.ring.user_addr(),
            Some(_) => self.ring.bus(),
        };
        RingSetup {
            index: self.index,
            size: self.size,
            base,
            desc: start,
            avail: start + self.avail_at() as u64,
            used: start + self.used_at() as u64,
            kick: self.kick.as_fd(),
            call: self.call.as_fd(),
        }
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Free descriptors.
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Chains the device owns.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// The driver's available index.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Used elements consumed so far, modulo 2^16.
    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// The device's used index.
    pub fn used_idx(&self) -> u16 {
        self.ring.load(self.used_at() + 2, Ordering::Acquire)
    }

    /// The available index at which the device wants a kick (EVENT_IDX).
    pub fn avail_event(&self) -> u16 {
        self.ring
            .load(self.used_at() + 4 + 8 * usize::from(self.size), Ordering::Relaxed)
    }

    /// Notifications and chains so far.
    pub fn stats(&self) -> QueueStats {
        self.stats
    }

    /// The device's faults on this ring.
    pub fn violations(&self) -> &Violations {
        &self.violations
    }

    // ---- raw access, for drivers that do wrong on purpose --------------------------------------------------------

    /// Writes a descriptor of the ring's table.
    pub fn write_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.ring
            .write(usize::from(index) * DESC_LEN, &descriptor(addr, len, flags, next));
    }

    /// Writes an entry of the available ring.
    pub fn write_avail_entry(&self, slot: u16, head: u16) {
        self.ring.store(
            head,
            self.avail_at() + 4 + 2 * usize::from(slot),
            Ordering::Relaxed,
        );
    }

    /// Writes the available index, whatever was published.
    pub fn write_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        self.ring.store(idx, self.avail_at() + 2, Ordering::Release);
    }

    /// Writes the used event index: the device interrupts when it has used that element.
    pub fn write_used_event(&self, idx: u16) {
        let at = self.avail_at() + 4 + 2 * usize::from(self.size);
        self.ring.store(idx, at, Ordering::Relaxed);
    }

    /// Writes the device's own used index: what only a driver gone mad does.
    pub fn write_used_idx(&self, idx: u16) {
        self.ring.store(idx, self.used_at() + 2, Ordering::Release);
    }

    /// The ring's memory.
    pub(super) fn window(&self) -> &Window {
        &self.ring
    }

    fn avail_at(&self) -> usize {
        usize::from(self.size) * DESC_LEN
    }

    fn used_at(&self) -> usize {
        used_offset(usize::from(self.size))
    }
}

/// Bytes of a ring: descriptors, available ring, used ring.
fn ring_len(entries: usize) -> usize {
    used_offset(entries) + 6 + 8 * entries
}

/// The used ring follows the available ring at the next multiple of 64: where QEMU's trace of a Linux guest has it.
fn used_offset(entries: usize) -> usize {
    (entries * DESC_LEN + 6 + 2 * entries).next_multiple_of(64)
}

fn write_flag(segment: &Segment) -> u16 {
    if segment.writable { DESC_F_WRITE } else { 0 }
}

/// The 16 bytes of `struct vring_desc`.
pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; DESC_LEN] {
    let mut bytes = [0; DESC_LEN];
    bytes[0..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..16].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// `vring_need_event`: whether moving from `old` to `new` passed `event`.
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests;
