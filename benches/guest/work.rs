//! What the guest does: bulk, round trips, connections.

use std::time::Duration;

use crate::contender::{Contender, Measures, Outcome};
use crate::machine::{Machine, Place};
use crate::options::Setting;
use crate::process;
use crate::task::{Bulk, Task};

/// How long a turn may take before it counts as failed: many times its window on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same for the first look, which is short.
const FIRST_LOOK: Duration = Duration::from_secs(15);
/// Bytes of the first look.
const LOOKED_AT: u64 = 4 << 20;
/// Any number but zero.
const SEED: u64 = 7;

/// One of the works, on a machine.
pub struct Worker {
    place: Place,
    work: Work,
}

#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// From guest to host, so many bytes a write.
    Out(u32),
    /// From host to guest, so many bytes a read.
    In(u32),
    /// Questions and answers of so many bytes.
    Ask(u32),
    /// Connect, a byte there and back, close.
    Churn,
}

impl Worker {
    /// Sees that bytes arrive as they were sent before any are timed.
    pub fn start(place: &Place, work: Work, setting: &Setting) -> Outcome<Worker> {
        place.boot(setting)?;
        place.with(|machine| work.first_look(machine))?;
        Ok(Worker {
            place: place.clone(),
            work,
        })
    }
}

impl Contender for Worker {
    fn turn(&mut self, window: Duration) -> Outcome<Measures> {
        let work = self.work;
        self.place.with(|machine| {
            // A fifth of the window warms up, and says how much fills it.
            let begin = Lap::least(work);
            let warm = work.lap(machine, begin.units)?;
            let fill = |window: Duration, lap: &Lap| {
                let units = lap.units as f64 * window.as_secs_f64() / lap.time.as_secs_f64();
                (units as u64).clamp(begin.units, begin.units * 1000)
            };
            let warm = work.lap(machine, fill(window / 5, &warm))?;
            let lap = work.lap(machine, fill(window, &warm))?;
            let mut measures = lap.measures(work);
            measures.push(("kvm", f64::from(machine.has_kvm())));
            Ok(measures)
        })
    }
}

/// A stretch of work and what it took.
struct Lap {
    /// Bytes, round trips or connections.
    units: u64,
    /// By the host's clock.
    time: Duration,
    /// Processor time of the device.
    spent: Duration,
    /// Quantiles of round trips by the guest's clock.
    quantiles: Measures,
}

impl Lap {
    /// As much as is worth a clock.
    fn least(work: Work) -> Lap {
        Lap {
            units: match work {
                Work::Out(_) | Work::In(_) => 1 << 20,
                Work::Ask(_) => 50,
                Work::Churn => 10,
            },
            time: Duration::ZERO,
            spent: Duration::ZERO,
            quantiles: Vec::new(),
        }
    }

    fn measures(self, work: Work) -> Measures {
        let (units, time, spent) = (
            self.units as f64,
            self.time.as_secs_f64(),
            self.spent.as_secs_f64(),
        );
        let mut measures = match work {
            Work::Out(_) | Work::In(_) => vec![("rate", units / time / 1e6), ("cpu", spent / (units / 1e9))],
            Work::Ask(_) => vec![("mean", time / units * 1e6), ("cpu/trip", spent / units * 1e6)],
            Work::Churn => vec![("conn/s", units / time), ("cpu/conn", spent / units * 1e6)],
        };
        measures.push(("busy", spent / time));
        measures.extend(self.quantiles);
        measures
    }
}

impl Work {
    /// Fails if a byte is not what was sent, or never comes.
    fn first_look(self, machine: &mut Machine) -> Outcome<()> {
        let (task, steps) = match self {
            Work::Out(_) | Work::In(_) => self.transfer(LOOKED_AT, Some(SEED)),
            Work::Ask(bytes) => (
                Task::Answer(bytes as usize),
                format!("exchange:bytes={},chunk={bytes},seed={SEED}", bytes * 1000),
            ),
            Work::Churn => return Ok(()),
        };
        machine.work(task, &steps, 1, FIRST_LOOK).map(drop)
    }

    /// What the two ends do for a transfer, and with data that say where they belong if there is a seed.
    fn transfer(self, bytes: u64, seed: Option<u64>) -> (Task, String) {
        let bulk = Bulk { bytes, seed };
        let ([write, read], seed) = match seed {
            Some(seed) => (["send", "recv"], format!(",seed={seed}")),
            None => (["write", "read"], String::new()),
        };
        match self {
            Work::In(size) => (
                Task::Give(bulk),
                format!("{read}:bytes={bytes},chunk={size}{seed} write:bytes=1"),
            ),
            Work::Out(size) | Work::Ask(size) => (
                Task::Take(bulk),
                format!("{write}:bytes={bytes},chunk={size}{seed} read:bytes=1"),
            ),
            Work::Churn => (Task::Take(bulk), "write:bytes=1 read:bytes=1".into()),
        }
    }

    fn lap(self, machine: &mut Machine, units: u64) -> Outcome<Lap> {
        let before = process::cpu(machine.device());
        let (done, answer) = match self {
            Work::Out(_) | Work::In(_) => {
                let (task, steps) = self.transfer(units, None);
                machine.work(task, &steps, 1, PATIENCE)?
            }
            Work::Ask(bytes) => {
                let steps = format!("ask:count={units},bytes={bytes}");
                machine.work(Task::Answer(bytes as usize), &steps, 1, PATIENCE)?
            }
            Work::Churn => {
                let (task, steps) = self.transfer(1, None);
                machine.work(task, &steps, units as u32, PATIENCE)?
            }
        };
        let began = done.iter().map(|done| done.began).min();
        let ended = done.iter().map(|done| done.ended).max();
        let (began, ended) = began.zip(ended).ok_or("there was no connection")?;
        let mut quantiles = Vec::new();
        if let Work::Ask(_) = self {
            for (key, field) in [("p50", "p50_ns"), ("p99", "p99_ns"), ("p99.9", "p999_ns")] {
                quantiles.push((key, answer.number(field)? as f64 / 1e3));
            }
        }
        Ok(Lap {
            units,
            time: ended - began,
            spent: process::cpu(machine.device()) - before,
            quantiles,
        })
    }
}
