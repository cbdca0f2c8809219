//! What can be wrong with a ring and with what a driver puts into it, by name.

use super::memory::MemoryFault;

macro_rules! labelled {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident => $label:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum $name { $($(#[$vmeta])* $variant,)* }

        impl $name {
            /// Every variant, in declaration order.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];

            /// Every variant's label, in declaration order: `LABELS[x as usize] == x.label()`.
            pub const LABELS: &'static [&'static str] = &[$($label,)*];

            /// The metric label and log word of this value.
            pub fn label(self) -> &'static str {
                match self { $($name::$variant => $label,)* }
            }
        }
    };
}

labelled! {
    /// What a driver did wrong with a ring: `reason` of `vsock_vring_errors_total`.
    ///
    /// All but the last three concern one descriptor chain: it goes back to the driver unused and the ring
    /// goes on. The last three stop the ring; see [`RingError`].
    RingFault {
        /// The available ring names a descriptor that the table does not have.
        HeadOutOfRange => "head_out_of_range",
        /// A descriptor's `next` is outside of its table.
        NextOutOfRange => "next_out_of_range",
        /// A chain has more descriptors than its table: it goes round in circles.
        DescriptorLoop => "descriptor_loop",
        /// An indirect table is empty, too long, or its length is no multiple of 16.
        IndirectLength => "indirect_length",
        /// A descriptor of an indirect table is indirect itself.
        IndirectNested => "indirect_nested",
        /// A descriptor has both INDIRECT and NEXT.
        IndirectWithNext => "indirect_with_next",
        /// A buffer or an indirect table is not in the guest's memory.
        AddressUnmapped => "address_unmapped",
        /// A buffer or an indirect table goes beyond the end of the address space.
        AddressWraps => "address_wraps",
        /// The VMM refuses to translate a buffer's address, or not for this access: what a vIOMMU calls a fault.
        TranslationRefused => "translation_refused",
        /// A chain consists of more pieces of memory than are worked on at once: a page each, under a vIOMMU.
        TooManyPieces => "too_many_pieces",
        /// A device-writable descriptor in a TX chain, or a device-readable one in an RX chain. Each chain of
        /// this device has one direction (virtio 1.2, 5.10.6), so this covers readable after writable too
        /// (2.7.4.2).
        WrongDirection => "wrong_direction",
        /// A chain's buffers sum up to 4 GiB or more (virtio 1.2, 2.7.5: a chain is at most 2^32 bytes).
        ChainTooBig => "chain_too_big",
        /// A chain has no room for the 44 bytes of a packet header.
        ChainTooShort => "chain_too_short",
        /// An RX chain that has room for a header only, where payload is to be delivered.
        NoPayloadRoom => "no_payload_room",
        /// The available index is more than the ring's size ahead of the used index.
        AvailIndex => "avail_index",
        /// Part of the ring itself is not in the guest's memory.
        RingMemory => "ring_memory",
        /// The ring's size or one of its addresses breaks the standard's rules.
        RingLayout => "ring_layout",
    }
}

impl From<MemoryFault> for RingFault {
    fn from(fault: MemoryFault) -> RingFault {
        match fault {
            MemoryFault::Unmapped { .. } | MemoryFault::Missing { .. } => RingFault::AddressUnmapped,
            MemoryFault::Refused { .. } => RingFault::TranslationRefused,
            MemoryFault::Wraps { .. } => RingFault::AddressWraps,
        }
    }
}

/// The three areas of a split virtqueue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RingArea {
    /// The descriptor table.
    DescriptorTable,
    /// The available ring, written by the driver.
    Available,
    /// The used ring, written by the device.
    Used,
}

impl std::fmt::Display for RingArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            RingArea::DescriptorTable => "descriptor table",
            RingArea::Available => "available ring",
            RingArea::Used => "used ring",
        })
    }
}

/// Why a ring cannot be served (any more). It stays so until it is stopped and started again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingError {
    /// The size is not one that the device offers.
    #[error("ring of {0} entries: must be a power of two from 1 to {max}", max = super::ring::MAX_RING_SIZE)]
    Size(u16),
    /// An area is not aligned as virtio 1.2, section 2.7 demands.
    #[error("{area} at {addr:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Which area.
        area: RingArea,
        /// Its address.
        addr: u64,
        /// What the address must be a multiple of.
        align: u64,
    },
    /// An area cannot be accessed.
    #[error("{area} cannot be accessed: {fault}")]
    Memory {
        /// Which area.
        area: RingArea,
        /// What is wrong with its memory.
        fault: MemoryFault,
    },
    /// An element of an area crosses from one memory region into the next, or is not aligned in our memory
    /// though it is in the guest's: a memory table with regions that are not page-aligned.
    #[error("an element of the {area} crosses a border of memory regions")]
    Torn {
        /// Which area.
        area: RingArea,
    },
    /// More entries are available than the ring has.
    #[error("available index {avail} is more than {size} ahead of the used index {used}")]
    AvailIndex {
        /// What the driver wrote.
        avail: u16,
        /// The used index we published last.
        used: u16,
        /// Entries of the ring.
        size: u16,
    },
}

impl RingError {
    /// Whether the ring only waits for a translation that the VMM has been asked for.
    pub fn awaits_translation(&self) -> bool {
        matches!(
            self,
            RingError::Memory {
                fault: MemoryFault::Missing { .. },
                ..
            }
        )
    }

    /// The name under which this is counted.
    pub fn reason(&self) -> RingFault {
        match self {
            RingError::Size(_) | RingError::Misaligned { .. } => RingFault::RingLayout,
            RingError::Memory { .. } | RingError::Torn { .. } => RingFault::RingMemory,
            RingError::AvailIndex { .. } => RingFault::AvailIndex,
        }
    }
}

/// How often each [`RingFault`] has happened since the counts were last taken.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct FaultCounts([u32; RingFault::ALL.len()]);

impl FaultCounts {
    pub(super) fn add(&mut self, fault: RingFault) {
        // The index is a variant's number, and the array has an element for each.
        let count = &mut self.0[fault as usize];
        *count = count.saturating_add(1);
    }

    /// Sum of all counts.
    pub fn total(&self) -> u32 {
        self.0.iter().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// The faults that happened, with how often.
    pub fn iter(&self) -> impl Iterator<Item = (RingFault, u32)> + '_ {
        RingFault::ALL
            .iter()
            .copied()
            .zip(self.0.iter().copied())
            .filter(|(_, n)| *n > 0)
    }
}
