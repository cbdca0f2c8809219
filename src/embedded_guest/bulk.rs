//! Connections on the bare driver, as fast as the rings go: for benchmarks, in which the guest should cost little. [`Flow`]
//! is one, [`Flows`] are as many as you like.
//!
//! No thread, no lock, no copying: payload that is sent lies in the transmit slots already, payload that is received
//! stays where it is. Credit is kept all the same, as a device would otherwise have to reset us.

mod many;

use std::time::{Duration, Instant};

pub use many::{Flows, Sending};

use super::driver::Driver;
use super::error::{Error, Result};
use super::shape::Shape;
use crate::vsock::header::{Cid, Header, MAX_PACKET_PAYLOAD, Op, Port, SocketType};

/// How a flow waits for the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Sleeps until an interrupt, as a guest does.
    Interrupt,
    /// Looks at the rings again and again, yielding the processor: no interrupts at all.
    Poll,
}

/// One established connection.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Addresses and our `buf_alloc`; the rest is filled in for each packet.
    header: Header,
    wait: Wait,
    fwd_cnt: u32,
    told_fwd_cnt: u32,
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    peer_closed: bool,
    /// Received payload that [`Flow::receive`] has not been asked for yet.
    surplus: u64,
}

/// How long the device may be silent before a flow gives up.
const SILENCE: Duration = Duration::from_secs(10);

impl Flow {
    /// Connects from `local_port` to a host port.
    pub fn connect(
        driver: &mut Driver,
        cid: u64,
        local_port: u32,
        port: u32,
        buf_alloc: u32,
        wait: Wait,
    ) -> Result<Flow> {
        let mut flow = Flow::new(cid, local_port, port, buf_alloc, wait);
        flow.send_control(driver, Op::Request, 0)?;
        flow.pump_until(driver, |flow, op| flow.peer_closed || op == Some(Op::Response))?;
        if flow.peer_closed {
            return Err(Error::Protocol {
                what: format!("the device reset the connection to port {port}"),
            });
        }
        Ok(flow)
    }

    /// Accepts the next connection to `local_port`; other packets are dropped meanwhile.
    pub fn accept(
        driver: &mut Driver,
        cid: u64,
        local_port: u32,
        buf_alloc: u32,
        wait: Wait,
    ) -> Result<Flow> {
        let deadline = Instant::now() + SILENCE;
        loop {
            if let Some(header) = driver.try_recv_header()? {
                if header.op == Op::Request as u16 && header.dst_port.0 == local_port {
                    let mut flow = Flow::new(cid, local_port, header.src_port.0, buf_alloc, wait);
                    flow.learn(&header);
                    flow.send_control(driver, Op::Response, 0)?;
                    return Ok(flow);
                }
                continue;
            }
            driver.wait_rx(deadline)?;
        }
    }

    fn new(cid: u64, local_port: u32, port: u32, buf_alloc: u32, wait: Wait) -> Flow {
        Flow {
            header: Header {
                src_cid: Cid(cid),
                dst_cid: Cid::HOST,
                src_port: Port(local_port),
                dst_port: Port(port),
                len: 0,
                socket_type: SocketType::Stream as u16,
                op: 0,
                flags: 0,
                buf_alloc,
                fwd_cnt: 0,
            },
            wait,
            fwd_cnt: 0,
            told_fwd_cnt: 0,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            peer_closed: false,
            surplus: 0,
        }
    }

    /// Sends `bytes` bytes in packets of at most `packet`; answers how long it took until the device had taken the
    /// last one. Packets go out in bursts with one notification each, as far as ring and credit allow.
    pub fn send(&mut self, driver: &mut Driver, bytes: u64, packet: u32, shape: &Shape) -> Result<Duration> {
        let started = Instant::now();
        let mut deadline = started + SILENCE;
        let packet = packet.clamp(1, MAX_PACKET_PAYLOAD);
        let mut left = bytes;
        while left > 0 {
            while self.receive_one(driver)?.is_some() {}
            if self.peer_closed {
                return Err(Error::Protocol {
                    what: "the device closed the connection".into(),
                });
            }
            let mut queued = false;
            loop {
                let len = self.room().min(packet).min(left.min(u64::from(u32::MAX)) as u32);
                // A piece of a packet is worth sending only at the end, as Linux' credit comes in large steps.
                if len == 0 || (len < packet && u64::from(len) < left && queued) {
                    break;
                }
                let header = self.next(Op::Rw, 0, len);
                match driver.queue_unwritten(&header, shape) {
                    Ok(_) => {}
                    Err(Error::RingFull) => break,
                    Err(error) => return Err(error),
                }
                self.tx_cnt = self.tx_cnt.wrapping_add(len);
                left -= u64::from(len);
                queued = true;
                if left == 0 {
                    break;
                }
            }
            driver.notify_tx();
            if queued {
                deadline = Instant::now() + SILENCE;
            } else {
                self.rest(driver, self.room() > 0, deadline)?;
            }
        }
        match self.wait {
            Wait::Interrupt => driver.flush_tx(SILENCE)?,
            Wait::Poll => {
                while driver.queue(super::TX).outstanding() > 0 {
                    if driver.reclaim_tx() == 0 {
                        self.rest(driver, true, deadline)?;
                    }
                }
            }
        }
        Ok(started.elapsed())
    }

    /// Receives `bytes` bytes without looking at them; answers how long it took.
    pub fn receive(&mut self, driver: &mut Driver, bytes: u64) -> Result<Duration> {
        let started = Instant::now();
        let mut deadline = started + SILENCE;
        while self.surplus < bytes {
            match self.receive_one(driver)? {
                Some(_) => deadline = Instant::now() + SILENCE,
                None if self.peer_closed => {
                    return Err(Error::Protocol {
                        what: "the device closed the connection".into(),
                    });
                }
                None => self.rest(driver, false, deadline)?,
            }
        }
        self.surplus -= bytes;
        Ok(started.elapsed())
    }

    /// One byte there, one byte back; answers how long it took.
    pub fn ping(&mut self, driver: &mut Driver) -> Result<Duration> {
        let started = Instant::now();
        let header = self.next(Op::Rw, 0, 1);
        driver.send_packet(&header, &[0x55], &Shape::header_then_payload())?;
        self.tx_cnt = self.tx_cnt.wrapping_add(1);
        self.receive(driver, 1)?;
        Ok(started.elapsed())
    }

    /// Closes the connection: SHUTDOWN of both directions, then waits for RST.
    pub fn close(mut self, driver: &mut Driver) -> Result<()> {
        if !self.peer_closed {
            self.send_control(driver, Op::Shutdown, 3)?;
            self.pump_until(driver, |flow, _| flow.peer_closed)?;
        }
        Ok(())
    }

    /// Says that no more will be sent.
    pub fn finish(&mut self, driver: &mut Driver) -> Result<()> {
        self.send_control(driver, Op::Shutdown, 2)
    }

    fn pump_until(&mut self, driver: &mut Driver, done: impl Fn(&Flow, Option<Op>) -> bool) -> Result<()> {
        let deadline = Instant::now() + SILENCE;
        loop {
            match self.receive_one(driver)? {
                Some(op) if done(self, op) => return Ok(()),
                Some(_) => {}
                None => self.rest(driver, false, deadline)?,
            }
        }
    }

    /// Takes one packet; answers its operation. Packets of other connections are dropped.
    fn receive_one(&mut self, driver: &mut Driver) -> Result<Option<Option<Op>>> {
        let Some(header) = driver.try_recv_header()? else {
            return Ok(None);
        };
        if header.dst_port != self.header.src_port || header.src_port != self.header.dst_port {
            return Ok(Some(None));
        }
        self.take(driver, &header).map(Some)
    }

    /// Takes in a packet of this connection; answers its operation.
    fn take(&mut self, driver: &mut Driver, header: &Header) -> Result<Option<Op>> {
        let op = Op::from_wire(header.op);
        self.learn(header);
        match op {
            Some(Op::Rw) => {
                self.surplus += u64::from(header.len);
                self.fwd_cnt = self.fwd_cnt.wrapping_add(header.len);
                let believed = self
                    .header
                    .buf_alloc
                    .saturating_sub(self.fwd_cnt.wrapping_sub(self.told_fwd_cnt));
                if believed < MAX_PACKET_PAYLOAD {
                    self.send_control(driver, Op::CreditUpdate, 0)?;
                }
            }
            Some(Op::CreditRequest) => self.send_control(driver, Op::CreditUpdate, 0)?,
            Some(Op::Rst) => self.peer_closed = true,
            Some(Op::Shutdown) if header.flags & 3 == 3 => {
                self.peer_closed = true;
                self.send_control(driver, Op::Rst, 0)?;
            }
            _ => {}
        }
        Ok(op)
    }

    /// Waits a little: for a packet, or for room in the transmit ring.
    fn rest(&self, driver: &mut Driver, for_tx: bool, deadline: Instant) -> Result<()> {
        match self.wait {
            Wait::Poll if Instant::now() > deadline => Err(Error::Timeout {
                what: "polling the rings",
            }),
            Wait::Poll => {
                std::thread::yield_now();
                Ok(())
            }
            Wait::Interrupt if for_tx => driver.wait_tx(deadline),
            Wait::Interrupt => driver.wait_rx(deadline),
        }
    }

    fn learn(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
    }

    fn room(&self) -> u32 {
        self.peer_buf_alloc
            .saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt))
    }

    fn next(&mut self, op: Op, flags: u32, len: u32) -> Header {
        self.told_fwd_cnt = self.fwd_cnt;
        Header {
            op: op as u16,
            flags,
            len,
            fwd_cnt: self.fwd_cnt,
            ..self.header
        }
    }

    fn send_control(&mut self, driver: &mut Driver, op: Op, flags: u32) -> Result<()> {
        let header = self.next(op, flags, 0);
        driver
            .send_packet_wait(&header, &[], &Shape::single(), SILENCE)
            .map(drop)
    }
}
