//! Questions and answers beside bulk: what one connection's work costs another's patience.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::Shape;
use vsock_sidecar::embedded_guest::bulk::{Flows, Sending, Wait};

use crate::bulk::{Direction, GUEST_BUFFER, Load};
use crate::contender::{Contender, Measures, Outcome, quantiles};
use crate::service::{Service, Stream, Work};
use crate::through::{CID, PORT, Through, Wish};

/// A guest with a bulk connection and one that asks.
pub struct Beside {
    through: Through,
    flows: Flows,
    load: Load,
}

impl Beside {
    pub fn ours(load: Load) -> Outcome<Beside> {
        Beside::begin(load, Through::ours)
    }

    pub fn peer(load: Load, program: &Path) -> Outcome<Beside> {
        Beside::begin(load, |wish| Through::peer(wish, program))
    }

    fn begin(load: Load, start: impl FnOnce(&Wish<'_>) -> Outcome<Through>) -> Outcome<Beside> {
        let mut through = start(&Wish {
            kind: load.kind,
            works: &[load.work(), Work::Echo(1)],
            guests: 1,
            driver: load.driver(),
            more: "",
        })?;
        let mut flows = Flows::new(CID.into(), 10_000, Wait::Interrupt);
        let driver = &mut through.guests[0].driver;
        flows.connect(driver, load.streams, PORT, GUEST_BUFFER)?;
        flows.connect(driver, 1, PORT + 1, GUEST_BUFFER)?;
        flows.set_asker(load.streams, Some(1));
        Ok(Beside { through, flows, load })
    }

    fn run(&mut self, until: Instant) -> Outcome<()> {
        let sending = Sending {
            flows: self.load.streams,
            packet: self.load.size,
            shape: &Shape::header_then_payload(),
        };
        let sends = self.load.direction != Direction::In;
        let driver = &mut self.through.guests[0].driver;
        Ok(self.flows.run(driver, until, sends.then_some(&sending))?)
    }
}

impl Contender for Beside {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        self.run(Instant::now() + window / 5)?;
        self.flows.take_times();
        self.run(Instant::now() + window)?;
        Ok(quantiles(self.flows.take_times()))
    }
}

/// The same without a device: a client in bulk on one thread, one that asks on another.
pub struct PlainBeside {
    bulk: Stream,
    asker: Stream,
    load: Load,
    _services: [Service; 2],
    _dir: tempfile::TempDir,
}

impl PlainBeside {
    pub fn start(load: Load) -> Outcome<PlainBeside> {
        let dir = tempfile::tempdir()?;
        let bulk = Service::start(&load.kind.place(dir.path(), PORT), load.work())?;
        let echo = Service::start(&load.kind.place(dir.path(), PORT + 1), Work::Echo(1))?;
        Ok(PlainBeside {
            bulk: bulk.address.connect()?,
            asker: echo.address.connect()?,
            load,
            _services: [bulk, echo],
            _dir: dir,
        })
    }
}

impl Contender for PlainBeside {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        let stop = AtomicBool::new(false);
        let (bulk, asker, load) = (&mut self.bulk, &mut self.asker, self.load);
        let times = thread::scope(|scope| {
            let work = scope.spawn(|| -> std::io::Result<()> {
                let mut chunk = vec![0x55; load.size as usize];
                while !stop.load(Ordering::Relaxed) {
                    match load.direction {
                        Direction::In => drop(bulk.read(&mut chunk)?),
                        _ => bulk.write_all(&chunk)?,
                    }
                }
                Ok(())
            });
            let began = Instant::now();
            let warm = began + window / 5;
            let mut times = Vec::new();
            let mut ask = || -> std::io::Result<()> {
                while began.elapsed() < window + window / 5 {
                    let asked = Instant::now();
                    asker.write_all(&[1])?;
                    asker.read_exact(&mut [0])?;
                    if asked > warm {
                        times.push(asked.elapsed());
                    }
                }
                Ok(())
            };
            let asked = ask();
            stop.store(true, Ordering::Relaxed);
            work.join().expect("the bulk client ends")?;
            asked.map(|()| times)
        })?;
        Ok(quantiles(times))
    }
}
