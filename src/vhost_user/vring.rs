//! A virtqueue as the crate sees it, handed to the device thread while it runs.
//!
//! The crate knows a ring as a set of settings that come one by one; the device thread knows it as one thing that it
//! owns from [`Command::StartQueue`] to [`Command::StopQueue`]. [`Vring`] lies between: it lets `VringMutex` keep the
//! settings, and after each change compares what should run with what does.
//!
//! A ring that is disabled is paused: Cloud Hypervisor pauses a VM so, and its guest remembers its connections. One that
//! is asked for its base is stopped: QEMU resets a device so, and its guest remembers nothing.
//!
//! A ring should run when it is ready (it has a kick descriptor; QEMU sends it before anything is enabled), enabled,
//! and its addresses are known. A setting that changes under a running ring stops it and starts it anew, but for the
//! call descriptor, which QEMU exchanges at each mask and unmask.
//!
//! Every call here comes from the crate's thread, and blocks it until the device thread has answered: so the position
//! is back in the crate's queue before GET_VRING_BASE reads it, and no answer to the VMM overtakes the device.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use tracing::{debug, warn};
use vhost_user_backend::{VringMutex, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::GuestMemoryAtomic;

use crate::device::Command;
use crate::guest::{Memory, RingParts, RingPosition};

use super::link::{DeviceLink, lock};
use super::negotiation::{MAX_QUEUE_SIZE, QUEUE_NAMES, SessionError};
use super::translation::RingIovas;

type Inner = VringMutex<GuestMemoryAtomic<Memory>>;

/// One virtqueue of one session.
#[derive(Clone)]
pub struct Vring {
    inner: Inner,
    index: usize,
    link: Arc<DeviceLink>,
    /// Locked only by the crate's thread, one call at a time: it is a mutex because the crate shares its vrings.
    hand: Arc<Mutex<Hand>>,
}

/// What the crate does not remember, or not in a form that can be given away.
#[derive(Default)]
struct Hand {
    /// Duplicates of the descriptors that the crate holds, to be duplicated again at each start.
    kick: Option<File>,
    call: Option<File>,
    /// Whether addresses have been set.
    addressed: bool,
    /// The ring's addresses as IOVAs, if that is what they are. What the crate was told instead is a placeholder, of no
    /// meaning but that it lies in guest memory (see `gate/translation.rs`), and never gets as far as its queue.
    iovas: Option<RingIovas>,
    /// A size that was asked for and that no ring can have; the crate checks only the range.
    bad_size: Option<u16>,
    /// What the device runs.
    running: Option<Settings>,
    /// It ran, and was stopped without being asked for its base: the device keeps its connections.
    paused: bool,
}

/// The settings of a ring that cannot change while it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Settings {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    translated: bool,
    event_idx: bool,
}

thread_local! {
    static NURSERY: RefCell<Option<Nursery>> = const { RefCell::new(None) };
}

/// Where vrings find their session while the crate makes them: `VringT::new` is told nothing.
struct Nursery {
    link: Arc<DeviceLink>,
    hatched: Vec<Vring>,
}

impl Vring {
    /// Calls `make`, in which the crate makes its vrings on this thread, and returns them beside its result.
    pub(super) fn hatch<R>(link: Arc<DeviceLink>, make: impl FnOnce() -> R) -> (R, Vec<Vring>) {
        NURSERY.set(Some(Nursery {
            link,
            hatched: Vec::new(),
        }));
        let result = make();
        let hatched = NURSERY.take().map(|nursery| nursery.hatched).unwrap_or_default();
        (result, hatched)
    }

    /// Stops the ring and forgets what RESET_DEVICE makes invalid: a ring must be set up anew before it can run.
    pub(super) fn reset(&self) {
        self.set_enabled(false);
        self.set_queue_ready(false);
        self.set_kick(None);
        self.set_call(None);
        self.inner.get_mut().get_queue_mut().reset();
        let mut hand = lock(&self.hand);
        hand.addressed = false;
        hand.iovas = None;
        hand.bad_size = None;
    }

    fn name(&self) -> &'static str {
        QUEUE_NAMES.get(self.index).copied().unwrap_or("?")
    }

    /// Makes the device run what should run.
    fn settle(&self) {
        let mut hand = lock(&self.hand);
        let wanted = self.wanted(&hand);
        // GET_VRING_BASE and resets take the readiness away, SET_VRING_ENABLE does not.
        let pause = self.inner.get_ref().get_queue().ready();
        if hand.running == wanted && (pause || !hand.paused) {
            return;
        }
        self.stop(&mut hand, pause);
        if let Some(settings) = wanted {
            self.start(&mut hand, settings);
        }
    }

    /// The settings with which the ring should run now.
    fn wanted(&self, hand: &Hand) -> Option<Settings> {
        let state = self.inner.get_ref();
        let queue = state.get_queue();
        let runs = queue.ready() && state.is_enabled() && hand.addressed && hand.kick.is_some();
        let of_the_crate = RingIovas {
            desc: queue.desc_table(),
            avail: queue.avail_ring(),
            used: queue.used_ring(),
        };
        let RingIovas { desc, avail, used } = hand.iovas.unwrap_or(of_the_crate);
        runs.then(|| Settings {
            size: hand.bad_size.unwrap_or(queue.size()),
            desc,
            avail,
            used,
            translated: hand.iovas.is_some(),
            event_idx: queue.event_idx_enabled(),
        })
    }

    fn start(&self, hand: &mut Hand, settings: Settings) {
        let ring = self.name();
        if hand.bad_size.is_some() {
            warn!(guest = %self.link.guest, ring, size = settings.size, "ring not started: its size is no power of two");
            return;
        }
        let (kick, call) = match self.descriptors(hand) {
            Ok(Some(descriptors)) => descriptors,
            Ok(None) => return,
            Err(error) => {
                let detail = format!("cannot duplicate the descriptors of the {ring} ring: {error}");
                return self.link.alarm(SessionError::Io, detail);
            }
        };
        let position = self.position(settings.translated);
        let parts = RingParts {
            size: settings.size,
            desc: settings.desc,
            avail: settings.avail,
            used: settings.used,
            position,
            event_idx: settings.event_idx,
            translated: settings.translated,
            kick,
            call,
        };
        let index = self.index;
        match self
            .link
            .call("start a ring", |done| Command::StartQueue { index, parts, done })
        {
            Ok(Ok(())) => {
                debug!(
                    guest = %self.link.guest, ring, size = settings.size,
                    next_avail = position.next_avail, next_used = position.next_used, "ring started"
                );
                hand.running = Some(settings);
                hand.paused = false;
                self.link.watch.ring_started(self.index, true);
            }
            Ok(Err(reason)) => {
                warn!(guest = %self.link.guest, ring, reason, "ring not started: the device refused it");
            }
            // The alarm has been raised.
            Err(_) => {}
        }
    }

    fn descriptors(&self, hand: &Hand) -> io::Result<Option<(OwnedFd, Option<OwnedFd>)>> {
        let Some(kick) = &hand.kick else { return Ok(None) };
        let call = hand.call.as_ref().map(File::try_clone).transpose()?;
        Ok(Some((kick.try_clone()?.into(), call.map(OwnedFd::from))))
    }

    /// Where the ring stands: the VMM's base and the guest's used index. That the two may differ, after a crash, is the
    /// device's to judge (`guest::Ring::new`), and also to find out, where the used ring is not mapped yet.
    fn position(&self, translated: bool) -> RingPosition {
        let state = self.inner.get_ref();
        let queue = state.get_queue();
        let next_avail = queue.next_avail();
        RingPosition {
            next_avail,
            next_used: if translated { next_avail } else { queue.next_used() },
        }
    }

    /// Stops the ring if it runs; and if it was paused and now is not to go on, lets the device know.
    fn stop(&self, hand: &mut Hand, pause: bool) {
        let ran = hand.running.take().is_some();
        if !ran && (pause || !hand.paused) {
            return;
        }
        hand.paused = pause;
        let index = self.index;
        let position = self
            .link
            .call("stop a ring", |done| Command::StopQueue { index, pause, done });
        if !ran {
            return;
        }
        self.link.watch.ring_started(self.index, false);
        let position = match position {
            Ok(Some(position)) => position,
            // The device had given the ring up, and what it returned to the guest stands in the used ring.
            Ok(None) if hand.iovas.is_some() => return,
            Ok(None) => match self.inner.queue_used_idx() {
                Ok(used) => RingPosition {
                    next_avail: used,
                    next_used: used,
                },
                Err(_) => return,
            },
            Err(_) => return,
        };
        self.inner.set_queue_next_avail(position.next_avail);
        self.inner.set_queue_next_used(position.next_used);
        debug!(
            guest = %self.link.guest, ring = self.name(),
            next_avail = position.next_avail, next_used = position.next_used, "ring stopped"
        );
    }

    /// Duplicates a descriptor for our own use. `None` raises the alarm, since the ring would be without it.
    fn duplicate(&self, what: &str, file: &File) -> Option<File> {
        match file.try_clone() {
            Ok(file) => Some(file),
            Err(error) => {
                let detail = format!(
                    "cannot duplicate the {what} descriptor of the {} ring: {error}",
                    self.name()
                );
                self.link.alarm(SessionError::Io, detail);
                None
            }
        }
    }
}

impl<'a> VringStateGuard<'a, GuestMemoryAtomic<Memory>> for Vring {
    type G = <Inner as VringStateGuard<'a, GuestMemoryAtomic<Memory>>>::G;
}

impl<'a> VringStateMutGuard<'a, GuestMemoryAtomic<Memory>> for Vring {
    type G = <Inner as VringStateMutGuard<'a, GuestMemoryAtomic<Memory>>>::G;
}

impl VringT<GuestMemoryAtomic<Memory>> for Vring {
    fn new(mem: GuestMemoryAtomic<Memory>, max_queue_size: u16) -> Result<Vring, QueueError> {
        let inner = Inner::new(mem, max_queue_size)?;
        NURSERY.with_borrow_mut(|nursery| {
            // Only `Vring::hatch` lets the crate make vrings.
            let nursery = nursery.as_mut().ok_or(QueueError::QueueNotReady)?;
            let vring = Vring {
                inner,
                index: nursery.hatched.len(),
                link: nursery.link.clone(),
                hand: Arc::new(Mutex::new(Hand::default())),
            };
            nursery.hatched.push(vring.clone());
            Ok(vring)
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, GuestMemoryAtomic<Memory>>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, GuestMemoryAtomic<Memory>>>::G {
        self.inner.get_mut()
    }

    fn set_enabled(&self, enabled: bool) {
        self.link.enter();
        self.inner.set_enabled(enabled);
        self.settle();
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), QueueError> {
        self.link.enter();
        let mut hand = lock(&self.hand);
        hand.iovas = self.link.noted(self.index);
        if hand.iovas.is_none() {
            self.inner.set_queue_info(desc_table, avail_ring, used_ring)?;
        }
        hand.addressed = true;
        // Not settled yet: the crate reads the used index next, and sets it.
        Ok(())
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.link.enter();
        // A front-end that disabled the ring, did not ask for its base and now sets another one has reset the device.
        if base != self.inner.queue_next_avail() {
            let mut hand = lock(&self.hand);
            if hand.paused {
                self.stop(&mut hand, false);
            }
        }
        // A running ring's position is the device's; it is overwritten here when the ring stops.
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        // The end of SET_VRING_ADDR, which QEMU also sends with the same addresses to switch the dirty log of a running
        // ring: nothing happens then.
        self.inner.set_queue_next_used(idx);
        self.settle();
    }

    /// Of a ring of IOVAs, which are not mapped before it is enabled, the base will do: the device reads it later.
    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        match lock(&self.hand).iovas {
            Some(_) => Ok(self.inner.queue_next_avail()),
            None => self.inner.queue_used_idx(),
        }
    }

    fn set_queue_size(&self, num: u16) {
        self.link.enter();
        let valid = num.is_power_of_two() && num <= MAX_QUEUE_SIZE;
        lock(&self.hand).bad_size = (!valid).then_some(num);
        if valid {
            self.inner.set_queue_size(num);
        }
        self.settle();
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.link.enter();
        self.inner.set_queue_event_idx(enabled);
        self.settle();
    }

    fn set_queue_ready(&self, ready: bool) {
        self.link.enter();
        self.inner.set_queue_ready(ready);
        self.settle();
    }

    fn set_kick(&self, file: Option<File>) {
        self.link.enter();
        {
            // The ring waits on the old descriptor, so it stops first in any case.
            let mut hand = lock(&self.hand);
            // Not an argument below: the guard would live through the call, which needs the lock as well.
            let pause = self.inner.get_ref().get_queue().ready();
            self.stop(&mut hand, pause);
            hand.kick = file.as_ref().and_then(|file| self.duplicate("kick", file));
        }
        self.inner.set_kick(file);
        self.settle();
    }

    fn set_call(&self, file: Option<File>) {
        self.link.enter();
        let mut hand = lock(&self.hand);
        hand.call = file.as_ref().and_then(|file| self.duplicate("call", file));
        self.inner.set_call(file);
        if hand.running.is_some() {
            let call = hand
                .call
                .as_ref()
                .and_then(|call| self.duplicate("call", call))
                .map(OwnedFd::from);
            let index = self.index;
            // An error has raised the alarm.
            let _ = self
                .link
                .call("exchange a call descriptor", |done| Command::SetCall {
                    index,
                    call,
                    done,
                });
        }
    }

    fn set_err(&self, file: Option<File>) {
        self.link.enter();
        self.inner.set_err(file);
    }

    // The rest is for devices that run their rings through the crate; ours does not, and these are never called.

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.inner.read_kick()
    }
}
