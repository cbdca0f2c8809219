mod bench;
mod brief;
mod capture;
mod containment;
mod halves;
mod invalidate;
mod kicks;
mod messages;
mod siblings;
mod translation;

use super::*;
use crate::guest::{Access, RingFault, RingParts};
use crate::metrics::LabelSets;
use crate::vsock::{CloseReason, Misbehavior, RefuseReason};

fn labels() -> LabelSets {
    LabelSets {
        refused: RefuseReason::LABELS,
        closed: CloseReason::LABELS,
        misbehavior: Misbehavior::LABELS,
        ring_errors: RingFault::LABELS,
    }
}

fn device(control: &tokio::runtime::Runtime) -> RunningDevice {
    device_counting(control, GuestMetrics::detached(&labels()))
}

fn device_counting(control: &tokio::runtime::Runtime, metrics: Arc<GuestMetrics>) -> RunningDevice {
    let second = Duration::from_secs(1);
    spawn(DeviceConfig {
        name: "web".into(),
        cid: 3,
        limits: Limits {
            connections: 1,
            buffer: 4096,
            connect_timeout: second,
            guest_timeout: second,
            idle_timeout: Duration::ZERO,
            busy_poll: Duration::ZERO,
            ..Limits::default()
        },
        rules: Arc::new(Rules::new(&[], &[], &[], &metrics, None)),
        siblings: Default::default(),
        quota: Default::default(),
        dialer: Dialer::new(control.handle().clone()),
        metrics,
    })
    .unwrap()
}

/// The device holds a handle on itself, so its commands never end by themselves: the start of a second guest failed,
/// the first one's device was dropped, and its thread stayed.
#[test]
fn a_device_that_is_dropped_ends_its_thread() {
    let control = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let dropped = device(&control);
    let handle = dropped.handle.clone();
    assert_eq!(handle.call(Command::Ping), Ok(()));
    drop(dropped);
    let deadline = Instant::now() + Duration::from_secs(20);
    while handle.call(Command::Ping).is_ok() {
        assert!(Instant::now() < deadline, "the thread goes on");
    }
    let joined = device(&control);
    let handle = joined.handle.clone();
    joined.join().unwrap();
    assert_eq!(handle.call(Command::Ping), Err(DeviceGone));
}
