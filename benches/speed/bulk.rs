//! Bytes as fast as they go, through a device.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::bulk::{Flows, Sending, Wait};
use vsock_sidecar::embedded_guest::{DriverOptions, RxLayout, Shape, Stats};
use vsock_sidecar::vsock::Op;

use crate::calls::Calls;
use crate::contender::{Contender, Measures, Outcome};
use crate::process;
use crate::service::Work;
use crate::through::{CID, Device, Kind, PORT, Through, Wish};

/// Linux's SO_VM_SOCKETS_BUFFER_SIZE.
pub const GUEST_BUFFER: u32 = 256 * 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Guest to host.
    Out,
    /// Host to guest.
    In,
    Both,
}

/// A kind of bulk work.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub direction: Direction,
    pub kind: Kind,
    /// Payload of a TX packet, or of an RX buffer.
    pub size: u32,
    pub ring: u16,
    pub streams: usize,
    pub guests: u32,
    /// Bytes that the guest's sockets take ahead of their readers.
    pub buffer: u32,
}

impl Load {
    pub const fn new(direction: Direction, kind: Kind, size: u32) -> Load {
        Load {
            direction,
            kind,
            size,
            ring: 128,
            streams: 1,
            guests: 1,
            buffer: GUEST_BUFFER,
        }
    }

    pub fn work(&self) -> Work {
        match self.direction {
            Direction::Out => Work::Sink,
            Direction::In => Work::Source,
            Direction::Both => Work::Both,
        }
    }

    pub fn driver(&self) -> DriverOptions {
        driver(self.ring, self.size)
    }
}

/// A guest with rings and receive buffers of these sizes.
pub fn driver(ring: u16, size: u32) -> DriverOptions {
    DriverOptions {
        queue_size: ring,
        rx: RxLayout::for_payload(size),
        tx_slots: ring.min(128),
        memory: (64 << 20)
            + usize::from(ring) * (size as usize + 8192)
            + 128 * 192 * 1024 * usize::from(ring).div_ceil(128),
        ..DriverOptions::default()
    }
}

/// Guests that work through a device.
pub struct Bulk {
    through: Through,
    flows: Vec<Flows>,
    load: Load,
    extra: Extra,
}

/// What else goes on in a turn.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Extra {
    #[default]
    Nothing,
    /// System calls of the device are counted.
    Calls,
    /// Metrics are read, so often.
    Scrapes(Duration),
}

/// What one guest did in a window.
struct Share {
    received: u64,
    cpu: Duration,
    stats: [Stats; 2],
}

impl Bulk {
    pub fn ours(load: Load, more: &str) -> Outcome<Bulk> {
        Bulk::begin(load, more, Through::ours)
    }

    pub fn peer(load: Load, program: &std::path::Path) -> Outcome<Bulk> {
        Bulk::begin(load, "", |wish| Through::peer(wish, program))
    }

    fn begin(load: Load, more: &str, start: impl FnOnce(&Wish<'_>) -> Outcome<Through>) -> Outcome<Bulk> {
        let mut through = start(&Wish {
            kind: load.kind,
            works: &[load.work()],
            guests: load.guests,
            driver: load.driver(),
            more,
        })?;
        let mut flows = Vec::new();
        for (index, guest) in through.guests.iter_mut().enumerate() {
            let mut these = Flows::new(u64::from(CID) + index as u64, 10_000, Wait::Interrupt);
            these.connect(&mut guest.driver, load.streams, PORT, load.buffer)?;
            flows.push(these);
        }
        Ok(Bulk {
            through,
            flows,
            load,
            extra: Extra::Nothing,
        })
    }

    pub fn with(self, extra: Extra) -> Bulk {
        Bulk { extra, ..self }
    }

    pub fn device(&self) -> &Device {
        &self.through.device
    }
}

impl Contender for Bulk {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        let (load, device) = (self.load, self.through.device.pid());
        // The work of a turn begins before its window: what lay in buffers since the last turn is gone by then.
        let warm = Instant::now() + window / 5;
        run(&mut self.through, &mut self.flows, load, warm)?;
        let device_cpu = process::cpu(device);
        let taken = self.through.services[0].received();
        let by_flow: Vec<u64> = self
            .flows
            .iter()
            .flat_map(|flows| flows.received().to_vec())
            .collect();

        let mut calls = None;
        if self.extra == Extra::Calls {
            let mut counting = Calls::attach(device)?;
            counting.begin()?;
            calls = Some(counting);
        }
        let until = Instant::now() + window;
        let scraper = match (self.extra, &self.through.device) {
            (Extra::Scrapes(pause), Device::Ours(sidecar)) => {
                Some(scrape(sidecar.path("admin.sock"), pause, until))
            }
            _ => None,
        };
        let shares = run(&mut self.through, &mut self.flows, load, until)?;
        let scrapes = scraper.map(|scraper| scraper.join().expect("the scraper ends"));

        let taken_now = self.through.services[0].received();
        let seconds = (Instant::now() - (until - window)).as_secs_f64();
        let device_cpu = (process::cpu(device) - device_cpu).as_secs_f64();
        let grown = |now: &[u64], before: &[u64]| -> Vec<u64> {
            now.iter().zip(before).map(|(now, before)| now - before).collect()
        };
        let by_flow_now: Vec<u64> = self
            .flows
            .iter()
            .flat_map(|flows| flows.received().to_vec())
            .collect();
        let out = grown(&taken_now, &taken);
        let into = grown(&by_flow_now, &by_flow);
        let bytes = match load.direction {
            Direction::Out => out.iter().sum::<u64>(),
            Direction::In => shares.iter().map(|share| share.received).sum(),
            Direction::Both => {
                out.iter().sum::<u64>() + shares.iter().map(|share| share.received).sum::<u64>()
            }
        } as f64;
        let streams = if load.direction == Direction::Out {
            &out
        } else {
            &into
        };
        let fewest = streams.iter().copied().min().unwrap_or(0).max(1);
        let most = streams.iter().copied().max().unwrap_or(0);
        let guest_cpu: Duration = shares.iter().map(|share| share.cpu).sum();
        let sum = |of: fn(&Stats) -> u64| -> f64 {
            shares
                .iter()
                .map(|share| of(&share.stats[1]) - of(&share.stats[0]))
                .sum::<u64>() as f64
        };
        let packets = sum(|stats| stats.sent.total() + stats.received.total());
        let calls = calls.map(Calls::end).transpose()?;
        for guest in &self.through.guests {
            let violations = guest.driver.stats().violations;
            if !violations.is_empty() {
                return Err(format!("broke the rules: {violations:?}").into());
            }
        }
        let mut measures = vec![
            ("rate", bytes / seconds / 1e9),
            ("cpu", device_cpu / (bytes / 1e9)),
            ("max/min", most as f64 / fewest as f64),
            ("busy", device_cpu / seconds),
            (
                "guest busy",
                guest_cpu.as_secs_f64() / seconds / f64::from(load.guests),
            ),
            ("packets/s", packets / seconds),
            (
                "kicks/MB",
                sum(|stats| stats.rx.kicks + stats.tx.kicks) / (bytes / 1e6),
            ),
            (
                "interrupts/MB",
                sum(|stats| stats.rx.interrupts + stats.tx.interrupts) / (bytes / 1e6),
            ),
        ];
        if let Some(calls) = calls {
            let data = sum(|stats| stats.sent.count(Op::Rw) + stats.received.count(Op::Rw));
            measures.push(("calls/packet", calls / data));
            measures.push(("calls/MB", calls / (bytes / 1e6)));
        }
        if let Some(scrapes) = scrapes {
            measures.push(("scrapes", scrapes as f64));
        }
        Ok(measures)
    }
}

/// Reads the metrics again and again until then; answers how often.
fn scrape(admin: PathBuf, pause: Duration, until: Instant) -> JoinHandle<u64> {
    thread::spawn(move || {
        let mut done = 0;
        while Instant::now() < until {
            let asked = UnixStream::connect(&admin).and_then(|mut stream| {
                stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
                stream.read_to_end(&mut Vec::new())
            });
            done += u64::from(asked.is_ok());
            thread::sleep(pause);
        }
        done
    })
}

/// All guests work until then, each on a thread of its own if they are several.
fn run(through: &mut Through, flows: &mut [Flows], load: Load, until: Instant) -> Outcome<Vec<Share>> {
    let shape = Shape::header_then_payload();
    let work = |guest: &mut vsock_sidecar::embedded_guest::EmbeddedGuest, flows: &mut Flows| {
        let sending = Sending {
            flows: load.streams,
            packet: load.size,
            shape: &shape,
        };
        let driver = &mut guest.driver;
        let (cpu, before) = (process::cpu_of_this_thread(), driver.stats());
        flows.run(
            driver,
            until,
            (load.direction != Direction::In).then_some(&sending),
        )?;
        let after = driver.stats();
        Ok::<_, vsock_sidecar::embedded_guest::Error>(Share {
            received: after.received_bytes - before.received_bytes,
            cpu: process::cpu_of_this_thread() - cpu,
            stats: [before, after],
        })
    };
    if let ([guest], [flows]) = (&mut through.guests[..], &mut flows[..]) {
        return Ok(vec![work(guest, flows)?]);
    }
    let done: Vec<_> = thread::scope(|scope| {
        let pairs = through.guests.iter_mut().zip(flows);
        let threads: Vec<_> = pairs
            .map(|(guest, flows)| scope.spawn(|| work(guest, flows)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a guest's thread ends"))
            .collect()
    });
    Ok(done.into_iter().collect::<Result<_, _>>()?)
}
