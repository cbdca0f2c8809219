//! Split virtqueues (virtio 1.2, section 2.7), from the device's side.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use super::areas::{Addresses, Areas, DESC_LEN};
use super::fault::{FaultCounts, RingArea, RingError};
use super::memory::{Access, Slice, View};
use super::rx::Reserved;

/// Most entries of a ring that we serve, as in QEMU (`VIRTQUEUE_MAX_SIZE`).
pub const MAX_RING_SIZE: u16 = 1024;

/// All that a ring needs to run; handed over by the session by move.
#[derive(Debug)]
pub struct RingParts {
    /// Entries; a power of two up to 1024.
    pub size: u16,
    /// Address of the descriptor table: guest-physical, or an IOVA if `translated`.
    pub desc: u64,
    /// Address of the driver area (available ring).
    pub avail: u64,
    /// Address of the device area (used ring).
    pub used: u64,
    /// Where to go on.
    pub position: RingPosition,
    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Whether the addresses of the ring and of its buffers are IOVAs. Then the ring goes on at the used index that the
    /// driver can see, which is read as soon as the used ring is mapped; `position` is what holds until then.
    pub translated: bool,
    /// Signalled by the guest.
    pub kick: OwnedFd,
    /// Signalled by us.
    pub call: Option<OwnedFd>,
}

/// Where a ring stands: free-running indices that wrap at 2^16.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RingPosition {
    /// Next entry of the available ring to take.
    pub next_avail: u16,
    /// Next entry of the used ring to write.
    pub next_used: u16,
}

/// A split virtqueue that runs. Chains are taken from it in bursts ([`TxBurst`](super::TxBurst),
/// [`RxBurst`](super::RxBurst)); between bursts nothing is in flight.
#[derive(Debug)]
pub struct Ring {
    size: u16,
    event_idx: bool,
    /// Whether addresses are IOVAs.
    translated: bool,
    addresses: Addresses,
    /// Next entry of the available ring to take, free-running.
    pub(super) next_avail: u16,
    /// Next entry of the used ring to write, free-running. Equal to `next_avail` between bursts.
    pub(super) next_used: u16,
    /// The used index that the driver can see. Equal to `next_used` between bursts.
    pub(super) published: u16,
    /// The used index at the last decision whether to interrupt; `None` when the next decision must be yes.
    pub(super) decided: Option<u16>,
    /// Of a ring of IOVAs whose used ring has not been mapped yet: where it stands if it is stopped before. The used index
    /// that the driver can see is read as soon as it can be, and the ring goes on there.
    ///
    /// vhost-user-backend reads it at SET_VRING_ADDR; with an IOMMU it cannot be read then.
    unread: Option<RingPosition>,
    /// What the used ring's flags say (without VIRTIO_F_EVENT_IDX); `None` when unknown, as they survive us.
    kicks_wanted: Option<bool>,
    kick: OwnedFd,
    call: Option<Call>,
    pub(super) scratch: Scratch,
    /// Room for pieces of the areas, and of indirect tables.
    areas_room: RefCell<Scratch>,
    pub(super) table_room: Scratch,
    /// The chains that an RX burst holds; empty between bursts.
    pub(super) reserved: Vec<Reserved>,
    pub(super) faults: FaultCounts,
}

impl Ring {
    /// A ring that goes on where it stood. Touches no guest memory: with an IOMMU the addresses of a new ring
    /// are not translated yet.
    ///
    /// Where `position` has two different indices it goes on at the used one. We use chains in order and stop
    /// with none in flight, so our own positions never differ; they do when a process died with chains in
    /// flight (a VMM then sends the available index as base, Cloud Hypervisor unless IN_ORDER was
    /// negotiated), and those chains would be lost. libvhost-user does the same for devices that work in
    /// order (`vu_set_vring_addr_exec`, libvhost-user.c).
    pub fn new(parts: RingParts) -> Result<Ring, RingError> {
        let RingParts {
            size,
            desc,
            avail,
            used,
            position,
            event_idx,
            translated,
            kick,
            call,
        } = parts;
        if !size.is_power_of_two() || size > MAX_RING_SIZE {
            return Err(RingError::Size(size));
        }
        for (area, addr, align) in [
            (RingArea::DescriptorTable, desc, 16),
            (RingArea::Available, avail, 2),
            (RingArea::Used, used, 4),
        ] {
            if !addr.is_multiple_of(align) {
                return Err(RingError::Misaligned { area, addr, align });
            }
        }
        Ok(Ring {
            size,
            event_idx,
            translated,
            addresses: Addresses { desc, avail, used },
            next_avail: position.next_used,
            next_used: position.next_used,
            published: position.next_used,
            // A ring that has been served may owe the driver an interrupt from back then; a fresh one does
            // not.
            decided: (position == RingPosition::default()).then_some(0),
            unread: translated.then_some(position),
            kicks_wanted: None,
            kick,
            call: call.map(Call::new),
            scratch: Scratch::default(),
            areas_room: RefCell::default(),
            table_room: Scratch::default(),
            reserved: Vec::new(),
            faults: FaultCounts::default(),
        })
    }

    /// Signals `call` from now on, or nothing.
    pub fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call.map(Call::new);
    }

    /// Tells the driver that it need not kick us until [`Ring::enable_notifications`]. A hint: kicks may come
    /// all the same (and with VIRTIO_F_EVENT_IDX, after 2^16 entries, will).
    pub fn disable_notifications<'m>(&mut self, ram: impl Into<View<'m>>) -> Result<(), RingError> {
        // With EVENT_IDX an avail_event that lies behind the driver's index is what silences it.
        if !self.event_idx && self.kicks_wanted != Some(false) {
            let mut areas = self.areas(ram.into())?;
            areas.set_kicks_wanted(false)?;
            self.kicks_wanted = Some(false);
            self.put_back(&mut areas);
        }
        Ok(())
    }

    /// Asks the driver not to kick us, until it is asked to again: for a moment in which entries are looked for.
    pub fn hush<'m>(&mut self, ram: impl Into<View<'m>>) -> Result<(), RingError> {
        let ram = ram.into();
        if self.event_idx {
            let mut areas = self.areas(ram)?;
            // Just behind the driver's index: it is 65535 entries from passing it (vring_need_event, virtio 1.2, 2.7.10).
            areas.set_avail_event(self.next_avail.wrapping_sub(1))?;
            self.put_back(&mut areas);
        }
        self.disable_notifications(ram)
    }

    /// Asks the driver to kick us for the next entry that it makes available. `true` means that there are
    /// entries now, for which no kick will come: serve them.
    pub fn enable_notifications<'m>(&mut self, ram: impl Into<View<'m>>) -> Result<bool, RingError> {
        let mut areas = self.areas(ram.into())?;
        self.read_used_idx(&areas)?;
        let available = self.enable_kicks(&areas, self.next_avail)?;
        self.put_back(&mut areas);
        Ok(available)
    }

    /// As [`Ring::enable_notifications`] of a ring that is parked, for the next entry behind all that there are.
    pub fn enable_notifications_parked<'m>(&mut self, ram: impl Into<View<'m>>) -> Result<bool, RingError> {
        let mut areas = self.areas(ram.into())?;
        self.read_used_idx(&areas)?;
        let seen = self.seen_avail_idx(&areas)?;
        let more = self.enable_kicks(&areas, seen)?;
        self.put_back(&mut areas);
        Ok(more)
    }

    /// Asks for a kick when the available index passes `position`; whether it has already.
    fn enable_kicks(&mut self, areas: &Areas<'_>, position: u16) -> Result<bool, RingError> {
        if self.event_idx {
            areas.set_avail_event(position)?;
        } else if self.kicks_wanted != Some(true) {
            areas.set_kicks_wanted(true)?;
            self.kicks_wanted = Some(true);
        }
        // The driver makes an entry available and then reads avail_event or the flags; we write those and
        // then read the available index again. Each must see the other's store, or an entry waits for ever
        // (virtio 1.2, 2.7.10).
        fence(Ordering::SeqCst);
        Ok(self.seen_avail_idx(areas)? != position)
    }

    /// The faults that were found since this was last called.
    pub fn take_faults(&mut self) -> FaultCounts {
        std::mem::take(&mut self.faults)
    }

    /// Where the ring stands; what it was given as long as the used index could not be read.
    pub fn position(&self) -> RingPosition {
        self.unread.unwrap_or(RingPosition {
            next_avail: self.next_avail,
            next_used: self.next_used,
        })
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub fn event_idx(&self) -> bool {
        self.event_idx
    }

    /// Whether its addresses are IOVAs: it is served through [`GuestRam::view_through`](super::GuestRam::view_through).
    pub fn is_translated(&self) -> bool {
        self.translated
    }

    /// Readable when the guest has made entries available.
    pub fn kick(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Consumes what was signalled at [`Ring::kick`]; `false` when there was nothing. Never blocks. Not
    /// needed with an edge-triggered poller, which reports every new signal of an eventfd.
    pub fn drain_kick(&self) -> io::Result<bool> {
        if !ready(self.kick.as_fd(), PollFlags::IN)? {
            return Ok(false);
        }
        let mut count = [0; 8];
        match rustix::io::read(&self.kick, &mut count) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Interrupts the driver, if it gave us a descriptor for that. Never blocks.
    pub fn signal(&self) -> io::Result<()> {
        self.call.as_ref().map_or(Ok(()), Call::signal)
    }

    /// Whether the driver gave us a descriptor to interrupt it with; otherwise it polls.
    pub fn has_call(&self) -> bool {
        self.call.is_some()
    }

    /// Whether the ring's areas can be accessed and its available index makes sense.
    pub fn check<'m>(&self, ram: impl Into<View<'m>>) -> Result<(), RingError> {
        self.available(ram).map(|_| ())
    }

    /// How many entries the driver has made available that we have not taken.
    pub fn available<'m>(&self, ram: impl Into<View<'m>>) -> Result<u16, RingError> {
        let mut areas = self.areas(ram.into())?;
        let (published, next_avail) = match self.unread {
            Some(_) => {
                let used = areas.used_idx()?;
                (used, used)
            }
            None => (self.published, self.next_avail),
        };
        let avail = self.checked(areas.avail_idx()?, published, next_avail)?;
        self.put_back(&mut areas);
        Ok(avail.wrapping_sub(next_avail))
    }

    /// Whether the descriptor table and the available ring are all zero, the available index with them: no driver has
    /// ever posted a buffer in this memory. The guest may change that while we look.
    pub fn is_blank<'m>(&self, ram: impl Into<View<'m>>) -> Result<bool, RingError> {
        let ram = ram.into();
        let size = usize::from(self.size);
        for (area, addr, len) in [
            (RingArea::DescriptorTable, self.addresses.desc, size * DESC_LEN),
            (RingArea::Available, self.addresses.avail, 4 + 2 * size),
        ] {
            for slice in ram.slices(addr, len, Access::Read) {
                let slice = slice.map_err(|fault| RingError::Memory { area, fault })?;
                if !is_zero(&slice) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Finds the ring in memory. To be given back by [`Ring::put_back`], for its room; after an error that is not worth
    /// the trouble.
    pub(super) fn areas<'m>(&self, ram: View<'m>) -> Result<Areas<'m>, RingError> {
        let room = self.areas_room.borrow_mut().take();
        Areas::resolve(ram, self.addresses, self.size, self.event_idx, room)
    }

    pub(super) fn put_back(&self, areas: &mut Areas<'_>) {
        self.areas_room.borrow_mut().put(areas.take_pieces());
    }

    /// Goes on where the driver can see that the ring stands, if that could not be read before.
    pub(super) fn read_used_idx(&mut self, areas: &Areas<'_>) -> Result<(), RingError> {
        let Some(given) = self.unread else {
            return Ok(());
        };
        let used = areas.used_idx()?;
        self.unread = None;
        self.next_avail = used;
        self.next_used = used;
        self.published = used;
        // As in `new`: only a ring that nobody has served owes nothing.
        self.decided = (used == 0 && given == RingPosition::default()).then_some(0);
        Ok(())
    }

    /// The available index, if it is one that a driver can have reached.
    pub(super) fn seen_avail_idx(&self, areas: &Areas<'_>) -> Result<u16, RingError> {
        self.checked(areas.avail_idx()?, self.published, self.next_avail)
    }

    /// `avail`, if it is an index that a driver can have reached: every entry that it made available and we have not
    /// published as used occupies a slot. This bounds a burst as well (invariant 4). Reserved entries are below it,
    /// too: an index that went backwards would make us take what we hold already.
    fn checked(&self, avail: u16, published: u16, next_avail: u16) -> Result<u16, RingError> {
        let ahead = avail.wrapping_sub(published);
        if ahead > self.size || ahead < next_avail.wrapping_sub(published) {
            return Err(RingError::AvailIndex {
                avail,
                used: published,
                size: self.size,
            });
        }
        Ok(avail)
    }
}

/// Whether every byte of a piece of guest memory is 0.
fn is_zero(slice: &Slice<'_>) -> bool {
    let mut bytes = [0; 512];
    let mut at = 0;
    while let Ok(rest) = slice.offset(at) {
        let copied = rest.copy_to(&mut bytes);
        if copied == 0 {
            break;
        }
        if bytes.iter().take(copied).any(|byte| *byte != 0) {
            return false;
        }
        at += copied;
    }
    true
}

/// The descriptor that interrupts the driver: an eventfd as a rule, of which KVM or the VMM holds the other
/// reference.
#[derive(Debug)]
struct Call {
    fd: OwnedFd,
    /// Whether a write may block: then it is asked first. The flag belongs to the open file, which we share
    /// with the VMM, so that we cannot set it: a VMM that relies on blocking reads of its eventfds would
    /// break.
    may_block: bool,
}

impl Call {
    fn new(fd: OwnedFd) -> Call {
        let may_block = !fcntl_getfl(&fd).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        Call { fd, may_block }
    }

    fn signal(&self) -> io::Result<()> {
        // An eventfd that cannot take one more is one whose reader has plenty to wake up for.
        if self.may_block && !ready(self.fd.as_fd(), PollFlags::OUT)? {
            return Ok(());
        }
        loop {
            match rustix::io::write(&self.fd, &1u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn ready(fd: BorrowedFd<'_>, for_what: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(fd, for_what)];
    match poll(
        &mut fds,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    ) {
        Ok(n) => Ok(n > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The allocation of a burst's slices, kept between bursts so that none is made in steady state.
///
/// Slices borrow guest memory for the length of a burst, so they cannot be kept; their room can. The vector
/// is emptied and then becomes one of another element type with the same layout by an in-place `collect`,
/// which keeps the allocation. Were the library to stop doing that, a burst would allocate once, and the test
/// which counts would fail.
#[derive(Default, Debug)]
pub(super) struct Scratch(Vec<[usize; SLICE_WORDS]>);

const SLICE_WORDS: usize = size_of::<Slice<'static>>() / size_of::<usize>();

/// Slices kept room for between bursts. A guest with stranger shapes pays for them with an allocation each
/// burst.
const SCRATCH_MAX: usize = 8192;

impl Scratch {
    pub(super) fn take<'m>(&mut self) -> Vec<Slice<'m>> {
        // The vector is empty: the closure is never called.
        std::mem::take(&mut self.0)
            .into_iter()
            .filter_map(|_| None)
            .collect()
    }

    pub(super) fn put(&mut self, mut slices: Vec<Slice<'_>>) {
        slices.clear();
        if slices.capacity() <= SCRATCH_MAX {
            self.0 = slices.into_iter().map(|_| [0; SLICE_WORDS]).collect();
        }
    }
}

#[cfg(test)]
impl Ring {
    /// Address and capacity of the slices' room.
    pub(super) fn scratch_allocation(&self) -> (*const u8, usize) {
        (self.scratch.0.as_ptr().cast(), self.scratch.0.capacity())
    }

    /// Address and capacity of the room for pieces of the areas.
    pub(super) fn areas_allocation(&self) -> (*const u8, usize) {
        let room = self.areas_room.borrow();
        (room.0.as_ptr().cast(), room.0.capacity())
    }

    /// Address and capacity of the room for chains that are held.
    pub(super) fn reserved_allocation(&self) -> (*const u8, usize) {
        (self.reserved.as_ptr().cast(), self.reserved.capacity())
    }
}
