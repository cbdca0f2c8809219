//! All lines.

use vsock_sidecar::demo::vm::qemu;

use crate::contender::Who;
use crate::line::Better::{Less, More};
use crate::line::{Figure, Line};
use crate::machine::Place;
use crate::work::{Work, Worker};

/// Two kernels, since they put packets into descriptors differently: 6.1 has a descriptor for the header and one for all of the
/// payload, 6.12 cuts what is longer than 32 KiB.
const KERNELS: [(&str, &[Work]); 2] = [
    (
        "6.12",
        &[
            Work::Out(4096),
            Work::Out(32768),
            Work::Out(65536),
            Work::In(65536),
            Work::Ask(1),
            Work::Churn,
        ],
    ),
    ("6.1", &[Work::Out(65536), Work::In(65536), Work::Ask(1)]),
];

pub fn all() -> Vec<Line> {
    let qemu = qemu::version().unwrap_or_else(|| "that is not installed".into());
    let mut lines = Vec::new();
    for (kernel, works) in KERNELS {
        let places = [Who::Ours, Who::Peer].map(|who| (who, Place::new(kernel, who)));
        for work in works {
            let line = Line::new(
                format!("{kernel}-{}", name(*work)),
                format!("{}, Linux {kernel} under QEMU {qemu}", what(*work)),
                figures(*work),
            );
            // Connections are new for each turn; machines would take most of the time.
            let line = line.quick(kernel == "6.12").lasting();
            lines.push(places.iter().fold(line, |line, (who, place)| {
                let (place, work) = (place.clone(), *work);
                line.contender(*who, move |setting| Worker::start(&place, work, setting))
            }));
        }
    }
    lines
}

fn name(work: Work) -> String {
    match work {
        Work::Out(size) => format!("out-{}k", size / 1024),
        Work::In(size) => format!("in-{}k", size / 1024),
        Work::Ask(size) => format!("trip-{size}b"),
        Work::Churn => "churn-1".into(),
    }
}

fn what(work: Work) -> String {
    match work {
        Work::Out(size) => format!("guest to host, {size} bytes a write"),
        Work::In(size) => format!("host to guest, {size} bytes a read"),
        Work::Ask(size) => format!("question and answer of {size} bytes"),
        Work::Churn => "connect, a byte there and back, close".into(),
    }
}

fn figures(work: Work) -> Vec<Figure> {
    match work {
        Work::Out(_) | Work::In(_) => {
            vec![
                Figure::new("rate", "MB/s", More),
                Figure::new("cpu", "s/GB", Less),
            ]
        }
        Work::Ask(_) => vec![
            Figure::new("p50", "us", Less),
            Figure::new("p99", "us", Less),
            Figure::new("mean", "us", Less),
            Figure::new("cpu/trip", "us", Less),
        ],
        Work::Churn => vec![
            Figure::new("conn/s", "", More),
            Figure::new("cpu/conn", "us", Less),
        ],
    }
}
