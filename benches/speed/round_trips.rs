//! Questions and answers through a device, the guest asleep on its interrupt meanwhile.

use std::path::Path;
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::bulk::{Flows, Wait};

use crate::bulk::{GUEST_BUFFER, driver};
use crate::calls::Calls;
use crate::contender::{Contender, Measures, Outcome, quantiles};
use crate::process;
use crate::service::Work;
use crate::through::{CID, Kind, PORT, Through, Wish};

/// A guest that asks with so many bytes and is answered with as many.
pub struct RoundTrips {
    through: Through,
    flows: Flows,
    count_calls: bool,
}

impl RoundTrips {
    pub fn ours(kind: Kind, bytes: u32) -> Outcome<RoundTrips> {
        RoundTrips::ours_with(kind, bytes, "")
    }

    /// With more of the configuration.
    pub fn ours_with(kind: Kind, bytes: u32, more: &str) -> Outcome<RoundTrips> {
        RoundTrips::begin(kind, bytes, more, Through::ours)
    }

    pub fn peer(kind: Kind, bytes: u32, program: &Path) -> Outcome<RoundTrips> {
        RoundTrips::begin(kind, bytes, "", |wish| Through::peer(wish, program))
    }

    fn begin(
        kind: Kind,
        bytes: u32,
        more: &str,
        start: impl FnOnce(&Wish<'_>) -> Outcome<Through>,
    ) -> Outcome<RoundTrips> {
        let mut through = start(&Wish {
            kind,
            works: &[Work::Echo(bytes as usize)],
            guests: 1,
            driver: driver(128, 4096),
            more,
        })?;
        let mut flows = Flows::new(CID.into(), 10_000, Wait::Interrupt);
        flows.connect(&mut through.guests[0].driver, 1, PORT, GUEST_BUFFER)?;
        flows.set_asker(0, Some(bytes));
        Ok(RoundTrips {
            through,
            flows,
            count_calls: false,
        })
    }

    /// The same, with the device's system calls counted.
    pub fn counted(self) -> RoundTrips {
        RoundTrips {
            count_calls: true,
            ..self
        }
    }
}

impl Contender for RoundTrips {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        let driver = &mut self.through.guests[0].driver;
        self.flows.run(driver, Instant::now() + window / 5, None)?;
        self.flows.take_times();
        let mut calls = None;
        if self.count_calls {
            let mut counting = Calls::attach(self.through.device.pid())?;
            counting.begin()?;
            calls = Some(counting);
        }
        let before = process::cpu(self.through.device.pid());
        self.flows.run(driver, Instant::now() + window, None)?;
        let spent = process::cpu(self.through.device.pid()) - before;
        let times = self.flows.take_times();
        let trips = times.len() as f64;
        let mut measures = quantiles(times);
        if let Some(calls) = calls {
            measures.push(("calls/trip", calls.end()? / trips));
        }
        measures.push(("cpu/trip", spent.as_nanos() as f64 / 1e3 / trips));
        Ok(measures)
    }
}
