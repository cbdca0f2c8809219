//! Connections that live for a byte: connect, one byte, close; so many at once.

use std::io::{Read, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::{Driver, Error, Shape};
use vsock_sidecar::vsock::{Cid, Header, Op, Port};

use crate::bulk::{GUEST_BUFFER, driver};
use crate::calls::Calls;
use crate::contender::{Contender, Measures, Outcome};
use crate::process;
use crate::service::{Service, Stream, Work};
use crate::through::{CID, Kind, PORT, Through, Wish};

/// How long a connection may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(2);

/// A guest that connects, sends a byte, closes and waits for the device's RST.
pub struct Churn {
    through: Through,
    at_once: usize,
    slots: Vec<Slot>,
    next_port: u32,
    count_calls: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Idle,
    Requested,
    Closing,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    port: u32,
    since: Instant,
}

#[derive(Default)]
struct Tally {
    done: u64,
    refused: u64,
    lost: u64,
}

impl Churn {
    pub fn ours(kind: Kind, at_once: usize) -> Outcome<Churn> {
        Churn::begin(kind, at_once, Through::ours)
    }

    pub fn peer(kind: Kind, at_once: usize, program: &Path) -> Outcome<Churn> {
        Churn::begin(kind, at_once, |wish| Through::peer(wish, program))
    }

    fn begin(
        kind: Kind,
        at_once: usize,
        start: impl FnOnce(&Wish<'_>) -> Outcome<Through>,
    ) -> Outcome<Churn> {
        let through = start(&Wish {
            kind,
            works: &[Work::Brief],
            guests: 1,
            driver: driver(128, 4096),
            more: "",
        })?;
        let idle = Slot {
            state: State::Idle,
            port: 0,
            since: Instant::now(),
        };
        Ok(Churn {
            through,
            at_once,
            slots: vec![idle; at_once],
            next_port: 100_000,
            count_calls: false,
        })
    }

    /// The same, with the device's system calls counted.
    pub fn counted(self) -> Churn {
        Churn {
            count_calls: true,
            ..self
        }
    }

    /// Connections one after the other in each slot until then, and those that are open to their end.
    fn run(&mut self, until: Instant) -> Outcome<Tally> {
        let driver = &mut self.through.guests[0].driver;
        let mut tally = Tally::default();
        loop {
            while let Some(header) = driver.try_recv_header()? {
                let Some(slot) = self.slots.iter_mut().find(|slot| slot.port == header.dst_port.0) else {
                    continue;
                };
                match (slot.state, Op::from_wire(header.op)) {
                    (State::Requested, Some(Op::Response)) => {
                        send(driver, &packet(slot.port, Op::Rw, 0, 1))?;
                        send(driver, &packet(slot.port, Op::Shutdown, 3, 0))?;
                        slot.state = State::Closing;
                    }
                    (State::Requested, Some(Op::Rst)) => {
                        tally.refused += 1;
                        slot.state = State::Idle;
                    }
                    (State::Closing, Some(Op::Rst)) => {
                        tally.done += 1;
                        slot.state = State::Idle;
                    }
                    _ => {}
                }
            }
            let now = Instant::now();
            for slot in &mut self.slots {
                if slot.state != State::Idle && now - slot.since > PATIENCE {
                    tally.lost += 1;
                    slot.state = State::Idle;
                }
                if slot.state == State::Idle && now < until {
                    *slot = Slot {
                        state: State::Requested,
                        port: self.next_port,
                        since: now,
                    };
                    self.next_port += 1;
                    send(driver, &packet(slot.port, Op::Request, 0, 0))?;
                }
            }
            driver.notify_tx();
            if now >= until && self.slots.iter().all(|slot| slot.state == State::Idle) {
                return Ok(tally);
            }
            driver.wait_any(false, now + PATIENCE / 4)?;
        }
    }
}

impl Contender for Churn {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        self.run(Instant::now() + window / 5)?;
        let mut calls = None;
        if self.count_calls {
            let mut counting = Calls::attach(self.through.device.pid())?;
            counting.begin()?;
            calls = Some(counting);
        }
        let (began, before) = (Instant::now(), process::cpu(self.through.device.pid()));
        let tally = self.run(began + window)?;
        let seconds = began.elapsed().as_secs_f64();
        let spent = process::cpu(self.through.device.pid()) - before;
        if tally.refused + tally.lost > (tally.done + tally.refused + tally.lost) / 100 {
            return Err(format!(
                "{} refused and {} without an end of {}",
                tally.refused, tally.lost, tally.done
            )
            .into());
        }
        let mut measures = vec![
            ("conn/s", tally.done as f64 / seconds),
            ("cpu/conn", spent.as_nanos() as f64 / 1e3 / tally.done as f64),
            ("lost", tally.lost as f64),
            ("at once", self.at_once as f64),
        ];
        if let Some(calls) = calls {
            measures.push(("calls/conn", calls.end()? / tally.done as f64));
        }
        Ok(measures)
    }
}

fn packet(port: u32, op: Op, flags: u32, len: u32) -> Header {
    Header {
        src_cid: Cid(CID.into()),
        dst_cid: Cid::HOST,
        src_port: Port(port),
        dst_port: Port(PORT),
        len,
        socket_type: 1,
        op: op as u16,
        flags,
        buf_alloc: GUEST_BUFFER,
        fwd_cnt: 0,
    }
}

fn send(driver: &mut Driver, header: &Header) -> Outcome<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match driver.queue_unwritten(header, &Shape::header_then_payload()) {
            Err(Error::RingFull) => {
                driver.notify_tx();
                driver.wait_tx(deadline)?;
            }
            other => return Ok(other.map(drop)?),
        }
    }
}

/// Clients, one a thread: connect, one byte, end of file there, end of file back.
pub struct Brief {
    service: Service,
    at_once: usize,
    _dir: tempfile::TempDir,
}

impl Brief {
    pub fn start(kind: Kind, at_once: usize) -> Outcome<Brief> {
        let dir = tempfile::tempdir()?;
        Ok(Brief {
            service: Service::start(&kind.place(dir.path(), PORT), Work::Brief)?,
            at_once,
            _dir: dir,
        })
    }
}

impl Contender for Brief {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        let began = Instant::now();
        let until = began + window;
        let address = &self.service.address;
        let client = || -> std::io::Result<u64> {
            let mut done = 0;
            while Instant::now() < until {
                let mut stream: Stream = address.connect()?;
                stream.write_all(&[1])?;
                stream.end()?;
                let _ = stream.read(&mut [0])?;
                done += 1;
            }
            Ok(done)
        };
        let done: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.at_once).map(|_| scope.spawn(client)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("a client's thread ends"))
                .collect()
        });
        let done = done.into_iter().sum::<std::io::Result<u64>>()?;
        Ok(vec![("conn/s", done as f64 / began.elapsed().as_secs_f64())])
    }
}
