//! When a guest has no more to do: nothing of it is open, and either its VMM is gone or it has had the time to think of something.
//!
//! A native sidecar is told to end when the VMM has gone already, and ends at once. A plain container is told at the same time
//! as the VMM, whose guest shuts down and may still need its services: so a VMM that is connected is served for a while
//! (`drain.linger`) though no connection is open.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::guests::RunningGuest;
use crate::config;
use crate::device::{Command, DeviceGauges, DeviceHandle};
use crate::drain::{Drain, Guard, Report};
use crate::vhost_user::NegotiationWatch;

/// How often is looked whether connections are left.
const POLL: Duration = Duration::from_millis(20);

/// A guest that is looked at until it has no more to do.
pub(super) struct Watched {
    device: DeviceHandle,
    gauges: Arc<DeviceGauges>,
    session: Arc<NegotiationWatch>,
    linger: Duration,
}

impl Watched {
    pub(super) fn of(guest: &RunningGuest, linger: Duration) -> Watched {
        Watched {
            device: guest.device.handle.clone(),
            gauges: Arc::clone(&guest.device.gauges),
            session: Arc::clone(&guest.watch),
            linger,
        }
    }
}

/// Drains all guests; blocks until they are done or the time is over.
pub(super) fn drain(
    drain: &Drain,
    config: &config::Drain,
    guests: &[RunningGuest],
    control: &Handle,
) -> Report {
    drain.begin();
    for guest in guests {
        let _ = guest.device.handle.send(Command::Drain);
        let guard = drain.watch().guard(format!("guest {}", guest.config.name));
        let watched = Watched::of(guest, config.linger);
        control.spawn(hold_up(watched, guard));
    }
    drain.wait(config.timeout)
}

async fn hold_up(watched: Watched, guard: Guard) {
    is_over(watched, |open| guard.set_remaining(open as u64)).await;
}

/// Completes when the guest has no more to do. `tell` hears of each count of its open connections.
pub(super) async fn is_over(watched: Watched, tell: impl Fn(usize)) {
    let Watched {
        device,
        gauges,
        session,
        linger,
    } = watched;
    let mut busy = Instant::now();
    loop {
        // After an answer, the gauges are those of a turn that knew of the drain. Without one nothing is known, and the
        // grace period decides.
        let answered = device.ask(Command::Ping, Duration::from_secs(1)).await.is_ok();
        tokio::time::sleep(POLL).await;
        if !answered {
            continue;
        }
        let open = gauges.open_connections();
        tell(open);
        if open > 0 {
            busy = Instant::now();
        } else if !session.is_connected() || busy.elapsed() >= linger {
            return;
        }
    }
}
