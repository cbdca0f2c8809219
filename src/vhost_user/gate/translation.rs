//! How addresses are understood once VIRTIO_F_ACCESS_PLATFORM is acknowledged, and what IOTLB messages mean.
//!
//! The feature says one thing to the driver ("use the platform's DMA API") and another to a vhost device ("addresses are
//! IOVAs"), and a VMM that passes it on need not mean the second. The operator's policy decides, or, where that is
//! `auto`, evidence does:
//!
//! - an IOTLB message says "IOVAs", at any time, and for the rest of the session;
//! - a ring with an address in no region of the memory table says the same, as the VMM's own addresses are in there;
//! - rings whose addresses are the VMM's say "guest-physical", until an IOTLB message comes.
//!
//! QEMU sends its first IOTLB message after it has enabled the rings (`vhost_dev_start`, hw/virtio/vhost.c), so it is the
//! ring addresses that decide for it.
//!
//! A decision holds for all rings. One that is taken late says the SET_VRING_ADDR of the rings before once more, on which
//! the `Vring` starts them anew.

use super::fault::ring_addresses_fault;
use super::{Addressed, Gate, IotlbOperation, NOT_TRANSLATED, Observation, Passage, QUEUES, Then};
use crate::guest::{Mapping, Permission};
use crate::vhost_user::features::VIRTIO_F_ACCESS_PLATFORM;
use crate::vhost_user::message::{Body, MemoryRegion, Message, NEED_REPLY, VERSION};
use crate::vhost_user::translation::{AddressNote, Evidence, RingIovas, Translation, TranslationMode};
use crate::vhost_user::{AccessPlatform, FindingCode};

/// VHOST_IOTLB_UPDATE (linux/vhost_types.h).
const UPDATE: u8 = 2;
/// VHOST_IOTLB_INVALIDATE.
const INVALIDATE: u8 = 3;

/// What every ring area's address is a multiple of, if it is to pass for one of them.
const PLACEHOLDER_ALIGN: u64 = 16;

impl Gate {
    fn platform_acknowledged(&self) -> bool {
        self.features & VIRTIO_F_ACCESS_PLATFORM != 0
    }

    /// The acknowledged features have changed.
    pub(super) fn features_changed(&mut self) {
        if !self.platform_acknowledged() {
            self.translation = NOT_TRANSLATED;
            return;
        }
        // A front-end that switches the dirty log of running rings says their addresses again, or not: what was decided
        // for them holds as long as they are set up.
        let decided = !matches!(
            self.translation.mode,
            TranslationMode::None | TranslationMode::Undecided
        );
        if decided && self.set_up().next().is_some() {
            return;
        }
        let (mode, evidence) = match self.policy {
            // The crate has refused it.
            AccessPlatform::Off => (TranslationMode::None, Evidence::NotAcknowledged),
            AccessPlatform::Identity => (TranslationMode::Identity, Evidence::Configured),
            _ if self.iotlb_seen => (TranslationMode::Translate, Evidence::IotlbMessage),
            AccessPlatform::Iotlb => (TranslationMode::Translate, Evidence::Configured),
            // Rings were set up before: those that were not IOVAs then the crate has found in memory.
            AccessPlatform::Auto if self.set_up().any(|ring| ring.translated) => {
                (TranslationMode::Translate, Evidence::RingAddressesOutsideMemory)
            }
            AccessPlatform::Auto if self.set_up().next().is_some() => {
                (TranslationMode::Identity, Evidence::RingAddressesInMemory)
            }
            AccessPlatform::Auto => (TranslationMode::Undecided, Evidence::NoneYet),
        };
        self.translation = Translation { mode, evidence };
    }

    /// The rings that are set up.
    fn set_up(&self) -> impl Iterator<Item = &Addressed> {
        self.addressed
            .iter()
            .flatten()
            .filter(|addressed| !addressed.stopped)
    }

    /// SET_VRING_ADDR, well-formed, of a ring that exists.
    pub(super) fn ring_addresses(
        &mut self,
        message: &Message,
        index: usize,
        addresses: RingIovas,
        findings: &mut Vec<Observation>,
    ) -> Then {
        let known = &self.regions;
        let has_memory = !known.is_empty();
        let in_memory = ring_addresses_fault(known, addresses).is_none();
        let undecided = self.translation.mode == TranslationMode::Undecided && has_memory;
        if undecided && in_memory {
            self.translation = Translation {
                mode: TranslationMode::Identity,
                evidence: Evidence::RingAddressesInMemory,
            };
        } else if (undecided || self.translation.evidence == Evidence::RingAddressesInMemory) && !in_memory {
            self.translate(Evidence::RingAddressesOutsideMemory);
        }
        if self.policy == AccessPlatform::Iotlb
            && self.platform_acknowledged()
            && !self.iotlb_seen
            && in_memory
        {
            findings.push(Observation::Found(
                FindingCode::AccessPlatformWithoutIotlb,
                "ACCESS_PLATFORM is acknowledged, ring addresses are the VMM's own and no IOTLB message has come; \
                 accessPlatform is iotlb, so nothing is served"
                    .into(),
            ));
        }
        if self.policy == AccessPlatform::Identity && self.platform_acknowledged() && has_memory && !in_memory
        {
            // QEMU sets rings up before it sends the first IOTLB message, and the crate ends the session here.
            findings.push(Observation::Found(
                FindingCode::IotlbMessageRefused,
                "ACCESS_PLATFORM is acknowledged and ring addresses are in no memory region, so they are to be \
                 translated; accessPlatform is identity"
                    .into(),
            ));
        }
        let passage = self.passage_of(message, index, addresses);
        let fault = match (&passage.note, self.fault(message, 0)) {
            (Some(AddressNote { iovas: Some(_), .. }), _) => None,
            (_, fault) => fault,
        };
        if let Some(fault) = fault
            && message.flags() == VERSION | NEED_REPLY
            && self.acknowledges()
        {
            return Then::Refuse(fault);
        }
        if let Some(slot) = self.addressed.get_mut(index) {
            *slot = Some(Addressed {
                message: message.clone(),
                translated: passage.is_translated(),
                stopped: false,
            });
        }
        match passage.message == *message {
            true => Then::Forward { note: passage.note },
            false => Then::Replace(passage),
        }
    }

    /// What the crate is told of a ring's addresses.
    fn passage_of(&self, message: &Message, index: usize, addresses: RingIovas) -> Passage {
        let translated = self.translation.mode == TranslationMode::Translate;
        // Without memory there is nowhere to put a placeholder; the crate then refuses the message, as it should.
        match self.placeholder().filter(|_| translated) {
            Some(address) => Passage {
                message: message.with_vring_addresses(address),
                note: Some(AddressNote {
                    index,
                    iovas: Some(addresses),
                }),
            },
            None => Passage {
                message: message.clone(),
                note: Some(AddressNote { index, iovas: None }),
            },
        }
    }

    /// An address that the crate takes for that of any area of a ring.
    fn placeholder(&self) -> Option<u64> {
        let aligned = |region: &MemoryRegion| {
            let address = region.user_address.checked_next_multiple_of(PLACEHOLDER_ALIGN)?;
            region.contains_user(address).then_some(address)
        };
        self.regions.iter().find_map(aligned)
    }

    /// Addresses are IOVAs from now on.
    fn translate(&mut self, evidence: Evidence) {
        let mode = TranslationMode::Translate;
        self.translation = Translation { mode, evidence };
    }

    /// Where addresses are IOVAs, rings that were set up otherwise are set up anew.
    pub(super) fn address_again(&mut self, before: &mut Vec<Passage>) {
        if self.translation.mode != TranslationMode::Translate {
            return;
        }
        for index in 0..QUEUES {
            let Some(Some(addressed)) = self
                .addressed
                .get(index)
                .filter(|addressed| addressed.as_ref().is_some_and(|addressed| !addressed.translated))
            else {
                continue;
            };
            let Body::VringAddr {
                desc, used, avail, ..
            } = addressed.message.request_body()
            else {
                continue;
            };
            // Nobody waits for the answer to a repetition.
            let message = addressed.message.with_flags(VERSION);
            let passage = self.passage_of(&message, index, RingIovas { desc, avail, used });
            // Without memory there is no placeholder: then the crate ends the session, which is better than a ring that stays as
            // it is.
            let translated = passage.is_translated();
            if let Some(Some(addressed)) = self.addressed.get_mut(index) {
                addressed.translated = translated;
            }
            before.push(passage);
        }
    }

    /// IOTLB_MSG.
    pub(super) fn iotlb(&mut self, message: &Message, body: &Body, findings: &mut Vec<Observation>) -> Then {
        if message.flags() != VERSION && message.flags() != VERSION | NEED_REPLY {
            return Then::Refuse(format!(
                "flags {:#x} are not those of a request of protocol version 1",
                message.flags()
            ));
        }
        if !self.platform_acknowledged() {
            return Then::Refuse("ACCESS_PLATFORM is not acknowledged".into());
        }
        if self.policy == AccessPlatform::Identity {
            return Then::Refuse("accessPlatform is identity: addresses are not translated".into());
        }
        // Also a message that makes no sense is one of a front-end that translates.
        self.iotlb_seen = true;
        findings.push(Observation::Passed(FindingCode::AccessPlatformWithoutIotlb));
        if self.translation.evidence != Evidence::IotlbMessage {
            self.translate(Evidence::IotlbMessage);
        }
        let Body::Iotlb {
            iova,
            size,
            uaddr,
            perm,
            kind,
        } = *body
        else {
            return Then::Refuse(format!(
                "a body of {} bytes is not what it has",
                message.body().len()
            ));
        };
        match kind {
            UPDATE => match self.mappings(iova, size, uaddr, perm) {
                Ok(mappings) => Then::Carry {
                    operation: IotlbOperation::Update(mappings),
                    refusal: None,
                },
                Err(fault) => Then::Refuse(fault),
            },
            INVALIDATE => invalidation(iova, size),
            _ => Then::Refuse(format!("type {kind} is neither UPDATE nor INVALIDATE")),
        }
    }

    /// What an UPDATE maps, in guest-physical addresses: one mapping for each memory region that it touches.
    fn mappings(&self, iova: u64, size: u64, uaddr: u64, perm: u8) -> Result<Vec<Mapping>, String> {
        let permission = match perm {
            1 => Permission::Read,
            2 => Permission::Write,
            3 => Permission::ReadWrite,
            _ => return Err(format!("UPDATE with permission {perm}, 1 to 3 are possible")),
        };
        let Some(last) = size.checked_sub(1) else {
            return Err("UPDATE of 0 bytes".into());
        };
        if iova.checked_add(last).is_none() || uaddr.checked_add(last).is_none() {
            return Err(format!(
                "UPDATE of {size:#x} bytes from {iova:#x} on at {uaddr:#x} wraps around"
            ));
        }
        let mut mappings = Vec::new();
        let mut done = 0;
        // Each round begins where a region has ended, so there are no more rounds than regions.
        while done < size {
            let address = uaddr + done;
            let found = self.regions.iter().find(|region| region.contains_user(address));
            let Some((offset, region)) = found.map(|region| (address - region.user_address, region)) else {
                return Err(format!("UPDATE names {address:#x}, which is in no memory region"));
            };
            let len = (region.size - offset).min(size - done);
            let gpa = region.guest_address.checked_add(offset);
            let Some(gpa) = gpa.filter(|gpa| gpa.checked_add(len - 1).is_some()) else {
                return Err(format!(
                    "UPDATE names {address:#x}, in a memory region that wraps around"
                ));
            };
            mappings.push(Mapping {
                iova: iova + done,
                len,
                gpa,
                permission,
            });
            done += len;
        }
        Ok(mappings)
    }
}

/// INVALIDATE. QEMU sends the size of an address mask plus one, which is 0 for "everything" (`vhost_iommu_unmap_notify`,
/// hw/virtio/vhost.c).
fn invalidation(iova: u64, size: u64) -> Then {
    let (first, last, refusal) = match size.checked_sub(1) {
        None => (0, u64::MAX, None),
        Some(rest) => match iova.checked_add(rest) {
            Some(last) => (iova, last, None),
            // What exists of it is forgotten all the same: to keep it would be the less safe mistake.
            None => (
                iova,
                u64::MAX,
                Some(format!(
                    "INVALIDATE of {size:#x} bytes from {iova:#x} on wraps around"
                )),
            ),
        },
    };
    Then::Carry {
        operation: IotlbOperation::Invalidate { first, last },
        refusal,
    }
}
