//! Rings in arbitrary memory: what a driver may do to its rings and a VMM to the translations, and what must come of it.
//!
//! ```text
//! case = head, step*      head: ring, layout, translation; step: see `Rig::between`, `tx::run`, `rx::run`
//! ```
//!
//! [`memory`] holds a copy of guest memory, [`model`] says what a device reads from it and writes to it. After each burst real
//! memory must be what the model has: so nothing is written anywhere else, and nothing is missing.

mod memory;
mod model;
pub mod rx;
pub mod tx;

use std::time::Instant;

use memory::{PAGE, Page, REGION, REGIONS, Ram};
use model::{INDIRECT, Layout, Model, NEXT, WRITE};
use rustix::event::{EventfdFlags, eventfd};
use vsock_sidecar::guest::{
    Access, GuestRam, Iotlb, Mapping, Miss, Permission, Ring, RingParts, RingPosition, Slice, View,
};

use super::input::Input;

/// The most steps of a case.
const MAX_STEPS: usize = 600;
/// The most questions that a VMM has at once.
const MAX_OPEN: usize = 64;
/// Where indirect tables go, and buffers, as a rule.
const TABLES: u64 = 0x9000;
const BUFFERS: u64 = 0xa000;

/// A ring, its memory, and the model of both.
struct Rig {
    ram: Ram,
    /// Another name of the memory, so that bursts can borrow it.
    guest: GuestRam,
    iotlb: Option<Iotlb>,
    ring: Ring,
    model: Model,
    driver: Driver,
    /// Questions to the VMM that it has not answered, and whether an UPDATE has come for them.
    open: Vec<(Miss, bool)>,
    now: Instant,
}

impl Rig {
    /// `None` if there can be no such ring.
    fn new(input: &mut Input<'_>, access: Access) -> Option<Rig> {
        let head = input.u8();
        let translated = head & 1 == 1;
        let mut ram = Ram::new(translated);
        let size = match head >> 4 {
            n @ 0..=10 => 1 << n,
            11 => input.u16(),
            _ => 8,
        };
        let mut layout = Layout {
            size,
            event_idx: head & 2 != 0,
            desc: 0x1000,
            avail: 0x5000,
            used: 0x6000,
        };
        if head & 4 != 0 {
            for area in [&mut layout.desc, &mut layout.avail, &mut layout.used] {
                *area = match input.below(6) {
                    0 => input.u64(),
                    1 => REGIONS[1] - 16 * u64::from(input.u8()),
                    2 => REGIONS[1] + REGION as u64 - u64::from(input.u16() & !3),
                    3 => REGIONS[2] + u64::from(input.u16() & !15),
                    _ => *area,
                };
            }
        }
        let index = if head & 8 != 0 { input.u16() } else { 0 };
        let position = RingPosition {
            next_avail: index,
            next_used: index,
        };
        let driver = Driver {
            access,
            layout,
            avail_idx: index,
            next_desc: 0,
            next_table: 0,
            last: BUFFERS,
        };
        driver.put_idx(&mut ram);
        ram.put(layout.used.wrapping_add(2), &index.to_le_bytes());
        let ring = ring(layout, position, translated)?;
        let mut rig = Rig {
            guest: ram.ram.clone(),
            ram,
            iotlb: translated.then(Iotlb::new),
            ring,
            model: Model::new(layout, position, translated),
            driver,
            open: Vec::new(),
            now: Instant::now(),
        };
        if translated && !input.bool() {
            for start in REGIONS {
                for page in (start..start + REGION as u64).step_by(PAGE as usize) {
                    let gpa = rig.ram.home(page);
                    rig.map(page, 1, gpa, Permission::ReadWrite);
                }
            }
        }
        Some(rig)
    }

    /// What happens when no burst is going on.
    fn between(&mut self, input: &mut Input<'_>) {
        match input.below(12) {
            0..=5 => self.driver.act(&mut self.ram, input),
            6 => self.restarts(),
            7 => self.kicks(input),
            _ => self.vmm(input),
        }
    }

    /// The ring is stopped, and another one goes on in its place.
    fn restarts(&mut self) {
        assert_eq!(self.ring.position(), self.model.position());
        let (position, layout) = (self.ring.position(), self.model.layout);
        let translated = self.iotlb.is_some();
        self.ring = ring(layout, position, translated).expect("it was one before");
        let before = std::mem::replace(&mut self.model, Model::new(layout, position, translated));
        self.model.keep_refusals(&before);
    }

    fn kicks(&mut self, input: &mut Input<'_>) {
        let view = view(&self.guest, self.iotlb.as_ref());
        let areas = self.model.areas(&self.ram);
        if input.bool() {
            let told = self.ring.enable_notifications(view);
            let expected = areas
                .ok()
                .and_then(|areas| self.model.enable_kicks(&mut self.ram, &areas));
            assert_eq!(told.ok(), expected);
        } else {
            let told = self.ring.disable_notifications(view);
            let writes = self.model.disables_by_writing();
            assert_eq!(told.is_ok(), areas.is_ok() || !writes);
            if let Ok(areas) = areas {
                self.model.disable_kicks(&mut self.ram, &areas);
            }
        }
        // They only look.
        let _ = self.ring.available(view);
        let _ = self.ring.is_blank(view);
        self.ram.assert_same();
    }

    // ------------------------------------------------------------------------------------------ the VMM

    fn vmm(&mut self, input: &mut Input<'_>) {
        self.take_misses();
        let Some(iotlb) = &mut self.iotlb else {
            return;
        };
        match input.below(8) {
            0 | 1 => {
                let (page, n) = (
                    self.driver.address(input) & !(PAGE - 1),
                    1 + input.below(48) as u64,
                );
                let gpa = match input.below(4) {
                    0 => self.driver.address(input) & !(PAGE - 1),
                    _ => self.ram.home(page),
                };
                let permission = input.choose(&[Permission::ReadWrite, Permission::Read, Permission::Write]);
                let wraps = |at: u64| at.checked_add(n * PAGE - 1).is_none();
                if !wraps(page) && !wraps(gpa) {
                    self.map(page, n, gpa, permission);
                }
            }
            2 => {
                let first = self.driver.address(input) & !(PAGE - 1);
                let last = first.saturating_add(PAGE * (1 + input.below(48) as u64) - 1);
                iotlb.invalidate(first, last);
                let gone = |pages: &mut std::collections::BTreeMap<u64, Page>| {
                    pages.retain(|page, _| !(first..=last).contains(page));
                };
                self.ram.pages.iter_mut().for_each(gone);
            }
            3 => {
                iotlb.flush();
                self.open.clear();
                self.ram
                    .pages
                    .iter_mut()
                    .for_each(std::collections::BTreeMap::clear);
            }
            4 => iotlb.retry(),
            // It maps what is asked for, or refuses it, or answers with nothing.
            how => {
                for (miss, _) in std::mem::take(&mut self.open) {
                    match how {
                        5 => {
                            let gpa = self.ram.home(miss.iova);
                            if Ram::flat(gpa).is_some() {
                                self.map(miss.iova, 1, gpa, Permission::ReadWrite);
                            }
                        }
                        6 => {}
                        _ if input.bool() => {}
                        _ => {
                            self.open.push((miss, true));
                            continue;
                        }
                    }
                    self.model.refused |= how == 6;
                    if let Some(iotlb) = &mut self.iotlb {
                        iotlb.answered(miss, how == 6);
                    }
                }
            }
        }
    }

    fn map(&mut self, iova: u64, n: u64, gpa: u64, mut permission: Permission) {
        let (Some(iotlb), Some(pages)) = (&mut self.iotlb, &mut self.ram.pages) else {
            return;
        };
        iotlb.insert(Mapping {
            iova,
            len: n * PAGE,
            gpa,
            permission,
        });
        let wanted = (0..n).map(|i| (iova + i * PAGE, gpa + i * PAGE));
        // One for reading and one for writing are one for both.
        let first = pages.get(&iova).map(|page| page.permission);
        let known = wanted.clone().all(|(iova, gpa)| {
            pages
                .get(&iova)
                .is_some_and(|page| page.gpa == gpa && Some(page.permission) == first)
        });
        if known && first != Some(permission) && first != Some(Permission::ReadWrite) {
            permission = Permission::ReadWrite;
        }
        for (iova, gpa) in wanted {
            pages.insert(iova, Page { gpa, permission });
        }
        for (miss, covered) in &mut self.open {
            *covered |= (iova..=iova + (n * PAGE - 1)).contains(&miss.iova);
        }
    }

    /// Each question is asked once, and there are not too many of them.
    fn take_misses(&mut self) {
        let Some(iotlb) = &mut self.iotlb else {
            return;
        };
        for miss in iotlb.take_misses(self.now) {
            assert_eq!(miss.iova % PAGE, 0);
            let asked = self.open.iter().any(|(open, covered)| *open == miss && !covered);
            assert!(!asked, "invariant 12: {miss:?} is asked twice");
            self.open.push((miss, false));
        }
        let open = self.open.iter().filter(|(_, covered)| !covered).count();
        assert!(open <= MAX_OPEN, "invariant 12: {open} questions");
    }
}

/// The model could not say what a burst would do, and takes what it did.
fn believe(ram: &mut Ram, model: &mut Model, ring: &Ring) {
    ram.believe();
    let layout = model.layout;
    let position = ring.position();
    assert_eq!(position.next_avail, position.next_used, "invariant 5");
    let before = model.clone();
    *model = Model::new(layout, position, false);
    model.keep_kicks(&before);
    model.keep_refusals(&before);
}

/// A slice lies in memory, and what it lies in may be accessed so.
fn allowed(ram: &Ram, slice: &Slice<'_>, access: Access) -> memory::Run {
    let (at, len) = ram.of_slice(slice);
    if let Some(pages) = &ram.pages {
        let mut page = at & !(PAGE as usize - 1);
        while page < at + len {
            let gpa = REGIONS[page / REGION] + (page % REGION) as u64;
            let translated = pages.values().any(|page| page.gpa == gpa && page.allows(access));
            assert!(
                translated,
                "invariant 3: guest page {gpa:#x} is not translated for {access:?}"
            );
            page += PAGE as usize;
        }
    }
    (at, len)
}

fn view<'m>(guest: &'m GuestRam, iotlb: Option<&'m Iotlb>) -> View<'m> {
    match iotlb {
        Some(iotlb) => guest.view_through(iotlb),
        None => guest.view(),
    }
}

fn ring(layout: Layout, position: RingPosition, translated: bool) -> Option<Ring> {
    let Layout {
        size,
        event_idx,
        desc,
        avail,
        used,
    } = layout;
    let kick = KICK.with(|kick| kick.try_clone().expect("a descriptor"));
    let ring = Ring::new(RingParts {
        size,
        desc,
        avail,
        used,
        position,
        event_idx,
        translated,
        kick,
        call: None,
    });
    let legal = size.is_power_of_two() && size <= 1024 && desc % 16 == 0 && avail % 2 == 0 && used % 4 == 0;
    assert_eq!(ring.is_ok(), legal, "{layout:?}: {ring:?}");
    ring.ok()
}

thread_local! {
    static KICK: std::os::fd::OwnedFd = eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd");
}

/// A driver, which need not be a good one.
struct Driver {
    /// What its chains are for.
    access: Access,
    layout: Layout,
    avail_idx: u16,
    next_desc: u16,
    next_table: u64,
    /// The address before.
    last: u64,
}

impl Driver {
    fn act(&mut self, ram: &mut Ram, input: &mut Input<'_>) {
        let Layout {
            size,
            desc,
            avail,
            used,
            ..
        } = self.layout;
        match input.below(10) {
            0..=4 => self.offers(ram, input),
            // The same chain again, or one that was not made.
            5 => {
                let head = input.u8().into();
                self.makes_available(ram, head);
            }
            6 => {
                let at = self.address(input);
                ram.put(at, input.bytes(64));
            }
            7 => {
                self.avail_idx = match input.below(4) {
                    0 => input.u16(),
                    1 => self.avail_idx.wrapping_sub(1),
                    _ => self.avail_idx.wrapping_add(input.u8().into()),
                };
                self.put_idx(ram);
            }
            8 => {
                let at = desc.wrapping_add(16 * u64::from(input.u16() % size));
                let bytes = self.descriptor(input, 0);
                ram.put(at, &bytes);
            }
            _ => {
                let event = avail.wrapping_add(4 + 2 * u64::from(size));
                let at = input.choose(&[avail, event, used, used.wrapping_add(2)]);
                ram.put(at, &input.u16().to_le_bytes());
            }
        }
    }

    /// Makes a chain of some buffers, in an indirect table or not, and makes it available.
    fn offers(&mut self, ram: &mut Ram, input: &mut Input<'_>) {
        let shape = input.u8();
        let n = 1
            + u16::from(shape & 3)
            + if shape & 0xf0 == 0xf0 {
                input.u8().into()
            } else {
                0
            };
        let Layout { size, desc, .. } = self.layout;
        let head = self.next_desc % size;
        let mut bytes = Vec::new();
        for i in 1..=n {
            let more = if i < n { NEXT } else { 0 };
            let mut descriptor = self.descriptor(input, more);
            let next = if shape & 4 != 0 { i } else { (head + i) % size };
            descriptor[14..].copy_from_slice(&next.to_le_bytes());
            bytes.push(descriptor);
        }
        if shape & 4 != 0 {
            let table = TABLES + 16 * self.next_table;
            self.next_table = (self.next_table + u64::from(n)) % 64;
            ram.put(table, &bytes.concat());
            let mut outer = descriptor(table, 16 * u32::from(n), INDIRECT);
            if shape & 8 != 0 {
                outer = descriptor(table, input.size(), INDIRECT | u16::from(input.u8() & 7));
            }
            ram.put(desc.wrapping_add(16 * u64::from(head)), &outer);
            self.next_desc = head + 1;
        } else {
            for (i, bytes) in (head..).zip(&bytes) {
                ram.put(desc.wrapping_add(16 * u64::from(i % size)), bytes);
            }
            self.next_desc = (head + n) % size;
        }
        self.makes_available(ram, head);
    }

    fn makes_available(&mut self, ram: &mut Ram, head: u16) {
        let Layout { size, avail, .. } = self.layout;
        let slot = 4 + 2 * u64::from(self.avail_idx % size);
        ram.put(avail.wrapping_add(slot), &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.put_idx(ram);
    }

    fn put_idx(&self, ram: &mut Ram) {
        ram.put(self.layout.avail.wrapping_add(2), &self.avail_idx.to_le_bytes());
    }

    fn descriptor(&mut self, input: &mut Input<'_>, more: u16) -> [u8; 16] {
        let what = input.u8();
        let (addr, len) = (self.address(input), input.size());
        let len = match what & 7 {
            0 => 44,
            1 => 4096,
            2 => len.saturating_add(44),
            _ => len,
        };
        let mut flags = more | if self.access == Access::Write { WRITE } else { 0 };
        if what >= 0xf0 {
            flags ^= u16::from(what & 7);
        }
        self.last = addr.wrapping_add(len.into());
        descriptor(addr, len, flags)
    }

    fn address(&mut self, input: &mut Input<'_>) -> u64 {
        let Layout {
            desc, avail, used, ..
        } = self.layout;
        self.last = match input.below(12) {
            0..=2 => self.last,
            3 | 4 => BUFFERS + u64::from(input.u16() % 0x6000),
            5 => REGIONS[1] - u64::from(input.u8()),
            6 => REGIONS[1] + u64::from(input.u16()),
            7 => REGIONS[1] + REGION as u64 - u64::from(input.u8()),
            8 => REGIONS[2] + u64::from(input.u16()),
            9 => input
                .choose(&[desc, avail, used, TABLES])
                .wrapping_add(input.u8().into()),
            10 => u64::MAX - u64::from(input.u8()),
            _ => input.u64(),
        };
        self.last
    }
}

fn descriptor(addr: u64, len: u32, flags: u16) -> [u8; 16] {
    let wire = u128::from(addr) | u128::from(len) << 64 | u128::from(flags) << 96;
    wire.to_le_bytes()
}
