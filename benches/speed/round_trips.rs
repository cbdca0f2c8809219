//! Questions and answers through a device, the guest asleep on its interrupt meanwhile.

use std::path::Path;
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::bulk::{Flows, Wait};

use crate::bulk::{GUEST_BUFFER, driver};
use crate::contender::{Contender, Measures, Outcome, quantiles};
use crate::cpu;
use crate::service::Work;
use crate::through::{CID, Kind, PORT, Through, Wish};

/// A guest that asks with so many bytes and is answered with as many.
pub struct RoundTrips {
    through: Through,
    flows: Flows,
}

impl RoundTrips {
    pub fn ours(kind: Kind, bytes: u32) -> Outcome<RoundTrips> {
        RoundTrips::begin(kind, bytes, Through::ours)
    }

    pub fn peer(kind: Kind, bytes: u32, program: &Path) -> Outcome<RoundTrips> {
        RoundTrips::begin(kind, bytes, |wish| Through::peer(wish, program))
    }

    fn begin(
        kind: Kind,
        bytes: u32,
        start: impl FnOnce(&Wish<'_>) -> Outcome<Through>,
    ) -> Outcome<RoundTrips> {
        let mut through = start(&Wish {
            kind,
            works: &[Work::Echo(bytes as usize)],
            guests: 1,
            driver: driver(128, 4096),
            more: "",
        })?;
        let mut flows = Flows::new(CID.into(), 10_000, Wait::Interrupt);
        flows.connect(&mut through.guests[0].driver, 1, PORT, GUEST_BUFFER)?;
        flows.set_asker(0, Some(bytes));
        Ok(RoundTrips { through, flows })
    }
}

impl Contender for RoundTrips {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        let driver = &mut self.through.guests[0].driver;
        self.flows.run(driver, Instant::now() + window / 5, None)?;
        self.flows.take_times();
        let before = cpu::of_process(self.through.device.pid());
        self.flows.run(driver, Instant::now() + window, None)?;
        let spent = cpu::of_process(self.through.device.pid()) - before;
        let times = self.flows.take_times();
        let trips = times.len() as f64;
        let mut measures = quantiles(times);
        measures.push(("cpu/trip", spent.as_nanos() as f64 / 1e3 / trips));
        Ok(measures)
    }
}
