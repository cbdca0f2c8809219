//! Many connections on one driver, served by one thread in turns: bulk in either direction or both, round trips beside it,
//! and connections that do nothing.

use std::time::{Duration, Instant};

use super::{Flow, SILENCE, Wait};
use crate::embedded_guest::driver::Driver;
use crate::embedded_guest::error::{Error, Result};
use crate::embedded_guest::shape::Shape;
use crate::vsock::header::{MAX_PACKET_PAYLOAD, Op};

/// Connections that are being made at a time: fewer than a listener's backlog, which nobody promised to be deep.
const AT_ONCE: usize = 64;

/// What flows send.
#[derive(Clone, Copy, Debug)]
pub struct Sending<'s> {
    /// The first so many flows send.
    pub flows: usize,
    /// Bytes of payload of each packet.
    pub packet: u32,
    /// How a packet lies in memory.
    pub shape: &'s Shape,
}

/// A flow that asks and is answered, again and again.
#[derive(Debug)]
struct Asker {
    flow: usize,
    /// Bytes of the question, and as many of the answer.
    bytes: u32,
    /// Bytes of the question that are still to be sent.
    unsent: u32,
    asked: Instant,
    /// Whether the flows rested while this question was open, so that its time says nothing.
    interrupted: bool,
    times: Vec<Duration>,
}

/// Established connections from neighbouring local ports.
#[derive(Debug)]
pub struct Flows {
    cid: u64,
    first_port: u32,
    wait: Wait,
    flows: Vec<Flow>,
    /// Bytes that each flow has sent and received.
    sent: Vec<u64>,
    received: Vec<u64>,
    /// Which flow sends first in the next turn.
    turn: usize,
    established: usize,
    asker: Option<Asker>,
}

impl Flows {
    /// No connections yet; they will have local ports from `first_port` on.
    pub fn new(cid: u64, first_port: u32, wait: Wait) -> Flows {
        Flows {
            cid,
            first_port,
            wait,
            flows: Vec::new(),
            sent: Vec::new(),
            received: Vec::new(),
            turn: 0,
            established: 0,
            asker: None,
        }
    }

    /// Adds `count` connections to a host port, several at a time.
    pub fn connect(&mut self, driver: &mut Driver, count: usize, port: u32, buf_alloc: u32) -> Result<()> {
        let goal = self.flows.len() + count;
        let mut deadline = Instant::now() + SILENCE;
        while self.established < goal {
            while self.flows.len() < goal && self.flows.len() - self.established < AT_ONCE {
                let local = self.first_port + self.flows.len() as u32;
                let mut flow = Flow::new(self.cid, local, port, buf_alloc, self.wait);
                flow.send_control(driver, Op::Request, 0)?;
                self.flows.push(flow);
                self.sent.push(0);
                self.received.push(0);
            }
            if self.receive_one(driver)? {
                deadline = Instant::now() + SILENCE;
            } else if !self.rest(driver, false, deadline)? && Instant::now() >= deadline {
                return Err(Error::Timeout {
                    what: "waiting for connections to be accepted",
                });
            }
        }
        Ok(())
    }

    /// Works until `until`: takes what comes on any connection, sends what is to be sent as far as credit and ring allow, each
    /// flow one packet in turn. With `None` it only receives.
    pub fn run(&mut self, driver: &mut Driver, until: Instant, sending: Option<&Sending<'_>>) -> Result<()> {
        if let Some(asker) = &mut self.asker {
            asker.interrupted = true;
        }
        loop {
            let mut busy = false;
            // At most a ring of them, so that sending has its turn.
            for _ in 0..driver.options().queue_size {
                if !self.receive_one(driver)? {
                    break;
                }
                busy = true;
            }
            let mut ring_full = self.ask(driver)?;
            if let Some(sending) = sending {
                let (queued, full) = self.send_in_turn(driver, sending)?;
                busy |= queued;
                ring_full |= full;
            }
            driver.notify_tx();
            if Instant::now() >= until {
                return Ok(());
            }
            if !busy {
                self.rest(driver, ring_full, until)?;
            }
        }
    }

    /// Lets one flow ask with `bytes` bytes and be answered with as many, one question at a time, within [`Flows::run`], and
    /// answers the times of those questions that were answered since this was called last. `None` ends it; a question that is
    /// open then is answered into the void.
    pub fn set_asker(&mut self, flow: usize, bytes: Option<u32>) -> Vec<Duration> {
        let times = self.asker.take().map(|asker| asker.times).unwrap_or_default();
        if let (Some(bytes), Some(state)) = (bytes, self.flows.get_mut(flow)) {
            state.surplus = 0;
            self.asker = Some(Asker {
                flow,
                bytes,
                unsent: bytes,
                asked: Instant::now(),
                interrupted: false,
                times: Vec::new(),
            });
        }
        times
    }

    /// The times of round trips since this was asked last.
    pub fn take_times(&mut self) -> Vec<Duration> {
        match &mut self.asker {
            Some(asker) => std::mem::take(&mut asker.times),
            None => Vec::new(),
        }
    }

    /// Bytes that each flow has sent so far, credit's view: what the ring took.
    pub fn sent(&self) -> &[u64] {
        &self.sent
    }

    /// Bytes that each flow has received so far.
    pub fn received(&self) -> &[u64] {
        &self.received
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Takes one packet, if there is one.
    fn receive_one(&mut self, driver: &mut Driver) -> Result<bool> {
        let Some(header) = driver.try_recv_header()? else {
            return Ok(false);
        };
        let index = header.dst_port.0.wrapping_sub(self.first_port) as usize;
        let Some(flow) = self.flows.get_mut(index) else {
            return Ok(true);
        };
        if header.src_port != flow.header.dst_port {
            return Ok(true);
        }
        match flow.take(driver, &header)? {
            Some(Op::Response) => self.established += 1,
            Some(Op::Rw) => {
                self.received[index] += u64::from(header.len);
                self.answered(index);
            }
            _ if flow.peer_closed => {
                return Err(Error::Protocol {
                    what: format!("the device closed the connection from port {}", header.dst_port.0),
                });
            }
            _ => {}
        }
        Ok(true)
    }

    /// Notes an answer that is complete, and puts the next question.
    fn answered(&mut self, index: usize) {
        let Some(asker) = self.asker.as_mut().filter(|asker| asker.flow == index) else {
            return;
        };
        let surplus = &mut self.flows[index].surplus;
        if *surplus >= u64::from(asker.bytes) {
            *surplus -= u64::from(asker.bytes);
            let now = Instant::now();
            if !std::mem::take(&mut asker.interrupted) {
                asker.times.push(now - asker.asked);
            }
            // From now on, not from when ring and credit have room: waiting for those is part of the answer.
            asker.asked = now;
            asker.unsent = asker.bytes;
        }
    }

    /// Sends what is left of a question; answers whether the ring was in the way.
    fn ask(&mut self, driver: &mut Driver) -> Result<bool> {
        let Some(asker) = &mut self.asker else {
            return Ok(false);
        };
        let flow = &mut self.flows[asker.flow];
        while asker.unsent > 0 {
            let len = asker.unsent.min(MAX_PACKET_PAYLOAD).min(flow.room());
            if len == 0 {
                break;
            }
            if !flow.queue(driver, len, &Shape::header_then_payload())? {
                return Ok(true);
            }
            self.sent[asker.flow] += u64::from(len);
            asker.unsent -= len;
        }
        Ok(false)
    }

    /// One packet a flow and turn for as long as there is room; answers whether any was queued, and whether the ring is full.
    fn send_in_turn(&mut self, driver: &mut Driver, sending: &Sending<'_>) -> Result<(bool, bool)> {
        let senders = sending.flows.min(self.flows.len());
        let packet = sending.packet.clamp(1, MAX_PACKET_PAYLOAD);
        let (mut queued, mut refused) = (false, 0);
        // So many in a row had no credit: all of them.
        while refused < senders {
            let index = self.turn % senders;
            let flow = &mut self.flows[index];
            if flow.room() < packet {
                self.turn = index + 1;
                refused += 1;
                continue;
            }
            if !flow.queue(driver, packet, sending.shape)? {
                return Ok((queued, true));
            }
            self.sent[index] += u64::from(packet);
            self.turn = index + 1;
            queued = true;
            refused = 0;
        }
        Ok((queued, false))
    }

    /// Sleeps or yields; answers whether there is anything to do.
    fn rest(&self, driver: &mut Driver, for_tx: bool, deadline: Instant) -> Result<bool> {
        match self.wait {
            Wait::Interrupt => driver.wait_any(for_tx, deadline),
            Wait::Poll => {
                std::thread::yield_now();
                Ok(false)
            }
        }
    }
}

impl Flow {
    /// Makes one packet of `len` bytes available; `false` if the ring is full.
    fn queue(&mut self, driver: &mut Driver, len: u32, shape: &Shape) -> Result<bool> {
        let (told, header) = (self.told_fwd_cnt, self.next(Op::Rw, 0, len));
        match driver.queue_unwritten(&header, shape) {
            Ok(_) => {
                self.tx_cnt = self.tx_cnt.wrapping_add(len);
                Ok(true)
            }
            Err(Error::RingFull) => {
                self.told_fwd_cnt = told;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}
