//! A virtual machine without a machine: the VMM's and the guest driver's halves of virtio-vsock in our own process.
//!
//! Tests, benchmarks and the demo need a guest that negotiates like QEMU, drives its rings like Linux (and as fast as
//! they go), and can do wrong on purpose; none of them should need a VM or privileges for it. So this module lives in
//! the library, and it shares nothing with the device but the packet codec: it is the other side, and an independent
//! judge that counts the device's faults as [`Violation`]s.
//!
//! # Layers
//!
//! 1. [`FrontEnd`] speaks vhost-user over a unix socket, in a [`Profile`]'s order of messages, or sends anything raw.
//! 2. [`Driver`] owns guest memory ([`GuestMemory`], one memfd a region) and three split [`Virtqueue`]s: posts
//!    receive buffers in a [`RxLayout`], sends packets in a [`Shape`], notifies and is interrupted as in Linux.
//! 3. [`Sockets`] is a small guest vsock stack with a thread of its own: connect, listen, credit, half-close, in streams
//!    and in messages (SEQPACKET), with the host and with sibling guests.
//! 4. [`Iommu`] stands between device and memory where VIRTIO_F_ACCESS_PLATFORM is acknowledged: rings and buffers have
//!    I/O virtual addresses, the driver maps and unmaps as Linux does, the front-end answers misses as QEMU does or as
//!    a [`misses::Policy`] says.
//! 5. [`bulk`] moves bytes over one connection on the bare driver, for benchmarks.
//!
//! [`EmbeddedGuest`] puts 1 and 2 together: `EmbeddedGuest::boot(socket, Profile::qemu(), DriverOptions::default())`.
//!
//! # What holds
//!
//! 1. Whatever the device does, the guest goes on: a fault is counted and skipped as a Linux guest would.
//! 2. Every wait has a deadline.
//! 3. Nothing is asked of the device's code: a mistake made there is not made here again.

pub mod bulk;
mod channels;
mod dma;
mod driver;
mod error;
mod fd;
mod front_end;
pub mod iommu;
pub mod memory;
pub mod message;
pub mod misses;
pub mod profile;
mod shape;
pub mod sockets;
mod stats;
mod virtqueue;
mod wire;

use std::path::Path;

pub use dma::{DmaStats, IommuOptions, Unmap};
pub use driver::{Area, Driver, DriverOptions, EVENT, Packet, RX, Refill, Sent, TX};
pub use error::{Error, Result};
pub use fd::{EventFd, wait_readable};
pub use front_end::{FrontEnd, Negotiated, RingSetup};
pub use iommu::{Granule, Iommu};
pub use memory::{GuestMemory, Region};
pub use misses::{Answer, Miss, Outcome, SeenMiss, Unrelated};
pub use profile::{Order, Profile};
pub use shape::{RxLayout, Shape};
pub use sockets::{
    Accepted, GuestListener, GuestMessage, GuestSeqpacket, GuestSocket, GuestStream, MessageCredit,
    SocketOptions, Sockets,
};
pub use stats::{Packets, QueueStats, Stats, Violation, Violations};
pub use virtqueue::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Segment, Table, Used, Virtqueue, descriptor,
};
pub use wire::recv_message;

/// A running guest: a front-end and the driver under it. Dropping it is `kill -9` of the VMM.
#[derive(Debug)]
pub struct EmbeddedGuest {
    /// The VMM's connection.
    pub front_end: FrontEnd,
    /// The guest's driver.
    pub driver: Driver,
}

impl EmbeddedGuest {
    /// Connects to the back-end at `socket`, negotiates, starts the rings and posts receive buffers.
    pub fn boot(socket: &Path, profile: Profile, options: DriverOptions) -> Result<EmbeddedGuest> {
        EmbeddedGuest::boot_with(FrontEnd::connect(socket, profile)?, options)
    }

    /// The same over a front-end that is connected but has not spoken yet.
    pub fn boot_with(mut front_end: FrontEnd, options: DriverOptions) -> Result<EmbeddedGuest> {
        let negotiated = front_end.negotiate()?;
        let memory = GuestMemory::new(options.memory)?;
        let translated = negotiated.features & profile::feature::ACCESS_PLATFORM != 0;
        let dma = match &options.iommu {
            Some(iommu) if translated => Some(front_end.attach_iommu(iommu, &memory)?),
            _ => None,
        };
        let driver = Driver::with_dma(memory, options, negotiated.features, dma)?;
        let mut guest = EmbeddedGuest { front_end, driver };
        guest.start(&[])?;
        guest.driver.fill_rx()?;
        Ok(guest)
    }

    /// The guest's CID, as the device told it.
    pub fn cid(&self) -> u64 {
        self.front_end.negotiated().guest_cid
    }

    /// Starts the rings at `bases` (0 where missing): after [`EmbeddedGuest::pause`] those that it answered.
    pub fn start(&mut self, bases: &[u16]) -> Result<()> {
        let queues = self.front_end.profile().queues;
        self.front_end
            .start(self.driver.memory(), &self.driver.rings(queues, bases))
    }

    /// Stops the rings as a VMM does to pause or reset; the driver's state stays. Answers how far each ring got.
    pub fn pause(&mut self) -> Result<Vec<u16>> {
        self.front_end.stop(self.front_end.profile().queues)
    }

    /// Reboots the guest: vIOMMU reset while the rings still run, rings stopped, everything forgotten, rings started from
    /// zero, buffers posted.
    pub fn reboot(&mut self) -> Result<()> {
        self.driver.reset_iommu();
        self.pause()?;
        self.driver.reset()?;
        self.start(&[])?;
        self.driver.fill_rx()
    }

    /// Ends the VMM in an orderly way: rings stopped, then the connection closed.
    pub fn shut_down(mut self) -> Result<()> {
        self.pause().map(drop)
    }
}

#[cfg(test)]
mod tests;
