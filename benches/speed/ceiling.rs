//! How far the embedded guest comes without any device: a "device" in the same thread takes what is offered and gives it back
//! at once, outside of the time that counts.
//!
//! What is left out of this are the guest's kicks and its sleeping, which are system calls of the guest and the kernel's price for any
//! device.

use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::{Driver, Profile, RX, Shape, TX};
use vsock_sidecar::vsock::{Cid, HEADER_LEN, Header, Op, Port};

use crate::bulk::{Direction, GUEST_BUFFER, Load};
use crate::contender::{Contender, Measures, Outcome};
use crate::through::CID;

/// A driver, and the half of its rings that a device would serve.
pub struct Ceiling {
    driver: Driver,
    ring: RingOnPaper,
    load: Load,
}

/// One ring as the device sees it.
struct RingOnPaper {
    size: u64,
    /// Guest-physical addresses.
    desc: u64,
    avail: u64,
    used: u64,
    index: u16,
}

impl Ceiling {
    pub fn new(load: Load) -> Outcome<Ceiling> {
        // Without INDIRECT_DESC: descriptors lie where the device on paper finds them.
        let features = Profile::qemu().without(1 << 28).features;
        let mut driver = Driver::new(load.driver(), features)?;
        let start = driver
            .memory()
            .regions()
            .first()
            .map_or(0, |region| region.user_addr() - region.gpa());
        let region = |address: u64| address - start;
        let queue = if load.direction == Direction::In { RX } else { TX };
        let ring = {
            let setups = driver.rings(2, &[]);
            let setup = &setups[usize::from(queue)];
            RingOnPaper {
                size: setup.size.into(),
                desc: region(setup.desc),
                avail: region(setup.avail),
                used: region(setup.used),
                index: 0,
            }
        };
        driver.fill_rx()?;
        Ok(Ceiling { driver, ring, load })
    }

    /// Gives every chain back, with a packet in it if it is a receive buffer.
    fn serve(&mut self) -> Outcome<()> {
        let memory = self.driver.memory().clone();
        let read16 = |at| -> Outcome<u16> {
            let mut bytes = [0; 2];
            memory.read(at, &mut bytes)?;
            Ok(u16::from_le_bytes(bytes))
        };
        let ring = &mut self.ring;
        let receives = self.load.direction == Direction::In;
        let packet = packet(self.load.size).encode();
        while ring.index != read16(ring.avail + 2)? {
            let slot = u64::from(ring.index) % ring.size;
            let head = read16(ring.avail + 4 + 2 * slot)?;
            let mut len = 0u32;
            if receives {
                let mut buffer = [0; 8];
                memory.read(ring.desc + 16 * u64::from(head), &mut buffer)?;
                memory.write(u64::from_le_bytes(buffer), &packet)?;
                len = HEADER_LEN as u32 + self.load.size;
            }
            let element = [u32::from(head).to_le_bytes(), len.to_le_bytes()].concat();
            memory.write(ring.used + 4 + 8 * slot, &element)?;
            ring.index = ring.index.wrapping_add(1);
        }
        memory.write(ring.used + 2, &ring.index.to_le_bytes())?;
        Ok(())
    }
}

impl Contender for Ceiling {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        let (until, shape) = (Instant::now() + window, Shape::header_then_payload());
        let packet = packet(self.load.size);
        let (mut packets, mut spent) = (0u64, Duration::ZERO);
        while Instant::now() < until {
            self.serve()?;
            let began = Instant::now();
            if self.load.direction == Direction::In {
                while self.driver.try_recv_header()?.is_some() {
                    packets += 1;
                }
            } else {
                while self.driver.queue_unwritten(&packet, &shape).is_ok() {
                    packets += 1;
                }
            }
            spent += began.elapsed();
        }
        let nanos = spent.as_nanos() as f64;
        Ok(vec![
            ("ns/packet", nanos / packets as f64),
            ("rate", packets as f64 * f64::from(self.load.size) / nanos),
        ])
    }
}

fn packet(len: u32) -> Header {
    Header {
        src_cid: Cid(CID.into()),
        dst_cid: Cid::HOST,
        src_port: Port(1),
        dst_port: Port(2),
        len,
        socket_type: 1,
        op: Op::Rw as u16,
        flags: 0,
        buf_alloc: GUEST_BUFFER,
        fwd_cnt: 0,
    }
}
