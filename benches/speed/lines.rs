//! All lines, with the targets that the design sets.

use crate::bulk::{Bulk, Direction, Load};
use crate::contender::Who;
use crate::line::Better::{Less, More};
use crate::line::Target::{AtLeast, AtMost};
use crate::line::{Figure, Line};
use crate::plain::{Asker, Clients};
use crate::round_trips::RoundTrips;
use crate::through::Kind;

const KINDS: [Kind; 2] = [Kind::Tcp, Kind::Unix];

pub fn all() -> Vec<Line> {
    let mut lines = Vec::new();
    for kind in KINDS {
        for size in [1536, 4096, 16384, 65536] {
            lines.push(out(kind, size));
            lines.push(into(kind, size));
        }
    }
    for kind in KINDS {
        for bytes in [1, 1024, 65536] {
            lines.push(round_trips(kind, bytes));
        }
    }
    lines
}

fn out(kind: Kind, size: u32) -> Line {
    let mut rate = Figure::new("rate", "GB/s", More);
    if size == 65536 {
        rate = rate.plain(AtLeast(0.9)).peer(AtLeast(4.0));
    }
    let figures = vec![rate, Figure::new("cpu", "s/GB", Less)];
    bulk("out", Load::new(Direction::Out, kind, size), figures).quick(size == 65536)
}

fn into(kind: Kind, size: u32) -> Line {
    let mut rate = Figure::new("rate", "GB/s", More);
    let mut cpu = Figure::new("cpu", "s/GB", Less);
    match size {
        4096 => {
            rate = rate.plain(AtLeast(0.6)).peer(AtLeast(10.0));
            cpu = cpu.plain(AtMost(1.3)).peer(AtMost(0.125));
        }
        65536 => rate = rate.plain(AtLeast(0.85)).peer(AtLeast(2.5)),
        _ => {}
    }
    bulk("in", Load::new(Direction::In, kind, size), vec![rate, cpu]).quick(size == 4096 || size == 65536)
}

/// A line of bulk work; its name says what is not usual about it.
fn bulk(name: &str, load: Load, figures: Vec<Figure>) -> Line {
    let (name, what) = names(name, &load);
    Line::new(name, what, figures)
        .contender(Who::Ours, move |_| Bulk::ours(load, ""))
        .contender(Who::Plain, move |_| Clients::start(load))
        .contender(Who::Peer, move |setting| Bulk::peer(load, &setting.peer))
}

fn names(name: &str, load: &Load) -> (String, String) {
    let kind = load.kind.name();
    let direction = match load.direction {
        Direction::Out => "guest to host",
        Direction::In => "host to guest",
        Direction::Both => "both ways",
    };
    let mut short = format!("{name}-{}-{kind}", bytes(load.size));
    let mut long = format!(
        "bulk, {direction}, {} packets or buffers, {kind}",
        bytes(load.size)
    );
    if load.ring != 128 {
        short += &format!("-ring{}", load.ring);
        long += &format!(", ring {}", load.ring);
    }
    if load.streams != 1 {
        short += &format!("-{}streams", load.streams);
        long += &format!(", {} streams", load.streams);
    }
    if load.guests != 1 {
        short += &format!("-{}guests", load.guests);
        long += &format!(", {} guests", load.guests);
    }
    (short, long)
}

fn bytes(size: u32) -> String {
    match size {
        1536 => "1.5k".into(),
        size if size % 1024 == 0 => format!("{}k", size / 1024),
        size => format!("{size}b"),
    }
}

fn round_trips(kind: Kind, size: u32) -> Line {
    let mut p50 = Figure::new("p50", "us", Less);
    let mut p99 = Figure::new("p99", "us", Less);
    if size == 1 {
        p50 = p50.plain(AtMost(1.25));
        p99 = p99.peer(AtMost(0.5));
    }
    let figures = vec![p50, p99, Figure::new("p99.9", "us", Less)];
    let (name, what) = (
        format!("trip-{}-{}", bytes(size), kind.name()),
        format!("question and answer of {} each, {}", bytes(size), kind.name()),
    );
    Line::new(name, what, figures)
        .quick(size == 1)
        .contender(Who::Ours, move |_| RoundTrips::ours(kind, size))
        .contender(Who::Plain, move |_| Asker::direct(kind, size as usize))
        .contender(Who::Relay, move |_| Asker::relayed(kind, size as usize))
        .contender(Who::Peer, move |setting| {
            RoundTrips::peer(kind, size, &setting.peer)
        })
}
