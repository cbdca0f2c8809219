//! What connections cost that do nothing, and what guests cost.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use vsock_sidecar::embedded_guest::bulk::{Flows, Wait};

use crate::bulk::{Bulk, Direction, GUEST_BUFFER, Load, driver};
use crate::contender::{Contender, Measures, Outcome, quantiles};
use crate::process;
use crate::service::Work;
use crate::through::{CID, Kind, PORT, Through, Wish};

/// Descriptors that are for something else than idle connections.
const SPARE: usize = 1000;

fn descriptor_limit() -> usize {
    getrlimit(Resource::Nofile)
        .current
        .map_or(usize::MAX, |limit| limit as usize)
}

/// A guest with many open connections, one of which asks and is answered.
pub struct Idle {
    through: Through,
    flows: Flows,
    /// Bytes of memory and descriptors of the device for each idle connection.
    each: (f64, f64),
}

impl Idle {
    pub fn ours(kind: Kind, connections: usize) -> Outcome<Idle> {
        let limit = descriptor_limit();
        if connections + SPARE > limit {
            return Err(format!("a process may have {limit} descriptors").into());
        }
        Idle::begin(kind, connections, Through::ours)
    }

    /// It has two descriptors for a connection, and our own services have one: as many connections as the limit allows.
    pub fn peer(kind: Kind, connections: usize, program: &Path) -> Outcome<Idle> {
        let room = descriptor_limit().saturating_sub(SPARE);
        let connections = connections.min(room / 2).min(room.saturating_sub(connections));
        Idle::begin(kind, connections, |wish| Through::peer(wish, program))
    }

    fn begin(
        kind: Kind,
        connections: usize,
        start: impl FnOnce(&Wish<'_>) -> Outcome<Through>,
    ) -> Outcome<Idle> {
        let mut through = start(&Wish {
            kind,
            works: &[Work::Echo(1), Work::Hold],
            guests: 1,
            driver: driver(128, 4096),
            more: "",
        })?;
        let device = through.device.pid();
        let mut flows = Flows::new(CID.into(), 10_000, Wait::Interrupt);
        let driver = &mut through.guests[0].driver;
        flows.connect(driver, 1, PORT, GUEST_BUFFER)?;
        flows.set_asker(0, Some(1));
        // Whatever is allocated once is allocated by now.
        flows.run(driver, Instant::now() + Duration::from_millis(50), None)?;
        let before = (process::memory(device), process::descriptors(device));
        flows.connect(driver, connections, PORT + 1, GUEST_BUFFER)?;
        if before.1 == 0 || process::descriptors(device) == 0 {
            return Err("its /proc entry cannot be read".into());
        }
        let grown = |now: u64, before: u64| now.saturating_sub(before) as f64 / connections as f64;
        let each = (
            grown(process::memory(device), before.0),
            grown(process::descriptors(device), before.1),
        );
        Ok(Idle { through, flows, each })
    }
}

impl Contender for Idle {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        let driver = &mut self.through.guests[0].driver;
        self.flows.run(driver, Instant::now() + window / 5, None)?;
        self.flows.take_times();
        self.flows.run(driver, Instant::now() + window, None)?;
        let mut measures = quantiles(self.flows.take_times());
        measures.push(("memory", self.each.0));
        measures.push(("descriptors", self.each.1));
        Ok(measures)
    }
}

/// Nothing at all happens: a guest with an open connection, at rest.
pub struct Rest {
    through: Through,
    _flows: Flows,
}

impl Rest {
    pub fn ours() -> Outcome<Rest> {
        Rest::begin(Through::ours)
    }

    pub fn peer(program: &Path) -> Outcome<Rest> {
        Rest::begin(|wish| Through::peer(wish, program))
    }

    fn begin(start: impl FnOnce(&Wish<'_>) -> Outcome<Through>) -> Outcome<Rest> {
        let mut through = start(&Wish {
            kind: Kind::Unix,
            works: &[Work::Hold],
            guests: 1,
            driver: driver(128, 4096),
            more: "",
        })?;
        let mut flows = Flows::new(CID.into(), 10_000, Wait::Interrupt);
        flows.connect(&mut through.guests[0].driver, 1, PORT, GUEST_BUFFER)?;
        Ok(Rest {
            through,
            _flows: flows,
        })
    }
}

impl Contender for Rest {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        // A wake-up a second is not seen in less.
        let window = window.max(Duration::from_secs(3));
        let pid = self.through.device.pid();
        let before = process::cpu(pid);
        let rate = wake_ups_per_second(pid, window);
        let cpu = (process::cpu(pid) - before).as_nanos() as f64 / 1e3 / window.as_secs_f64();
        Ok(vec![("wake-ups", rate), ("cpu", cpu)])
    }
}

/// From one wake-up to another: three seconds hold three or four heartbeats.
fn wake_ups_per_second(pid: u32, window: Duration) -> f64 {
    const LOOK: Duration = Duration::from_millis(10);
    let until = Instant::now() + window;
    let mut sleeps = process::sleeps(pid);
    let mut first: Option<(Instant, u64)> = None;
    let mut rate = 0.0;
    while Instant::now() < until {
        thread::sleep(LOOK);
        let now = process::sleeps(pid);
        if now == std::mem::replace(&mut sleeps, now) {
            continue;
        }
        match first {
            None => first = Some((Instant::now(), now)),
            Some((at, then)) => rate = (now - then) as f64 / at.elapsed().as_secs_f64(),
        }
    }
    rate
}

/// Memory of the whole process: with one guest, with sixteen, and with a hundred connections at work.
pub struct Memory {
    bare: f64,
    guest: f64,
    busy: f64,
}

const GUESTS: u32 = 16;
const BUSY: usize = 100;

impl Memory {
    pub fn ours() -> Outcome<Memory> {
        Memory::begin(Through::ours, |load| Bulk::ours(load, ""))
    }

    pub fn peer(program: &Path) -> Outcome<Memory> {
        Memory::begin(
            |wish| Through::peer(wish, program),
            |load| Bulk::peer(load, program),
        )
    }

    fn begin(
        start: impl Fn(&Wish<'_>) -> Outcome<Through>,
        bulk: impl FnOnce(Load) -> Outcome<Bulk>,
    ) -> Outcome<Memory> {
        let with = |guests| -> Outcome<f64> {
            let through = start(&Wish {
                kind: Kind::Unix,
                works: &[Work::Hold],
                guests,
                driver: driver(128, 4096),
                more: "",
            })?;
            Ok(process::memory(through.device.pid()) as f64)
        };
        let (one, many) = (with(1)?, with(GUESTS)?);
        let mut work = bulk(Load {
            streams: BUSY,
            ..Load::new(Direction::Both, Kind::Unix, 4096)
        })?;
        work.turn(Duration::from_millis(500))?;
        let busy = process::memory(work.device().pid()) as f64;
        Ok(Memory {
            bare: one,
            guest: (many - one) / f64::from(GUESTS - 1),
            busy: (busy - one) / BUSY as f64,
        })
    }
}

impl Contender for Memory {
    fn turn(&mut self, _: Duration) -> Outcome<Measures> {
        Ok(vec![
            ("start", self.bare / 1024.0),
            ("guest", self.guest / 1024.0),
            ("busy", self.busy / 1024.0),
        ])
    }
}
