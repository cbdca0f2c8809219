//! All lines, with the targets that the design sets.

use std::time::Duration;

use crate::beside::{Beside, PlainBeside};
use crate::bulk::{Bulk, Direction, Extra, Load};
use crate::ceiling::Ceiling;
use crate::churn::{Brief, Churn};
use crate::contender::Who;
use crate::idle::{Idle, Memory, Rest};
use crate::line::Better::{Less, More};
use crate::line::Target::{AtLeast, AtMost};
use crate::line::{Figure, Line};
use crate::plain::{Asker, Clients};
use crate::round_trips::RoundTrips;
use crate::through::Kind;

const KINDS: [Kind; 2] = [Kind::Tcp, Kind::Unix];
const SIZES: [u32; 4] = [1536, 4096, 16384, 65536];

pub fn all() -> Vec<Line> {
    let mut lines = vec![ceiling(Direction::Out, 65536), ceiling(Direction::In, 4096)];
    for kind in KINDS {
        for size in SIZES {
            lines.push(out(kind, size));
            lines.push(into(kind, size));
        }
        lines.push(both(kind));
        lines.extend(rings(kind));
        lines.extend(windows(kind));
        lines.extend(streams(kind));
    }
    lines.extend(guests());
    for kind in KINDS {
        lines.extend([1, 1024, 65536].map(|size| round_trips(kind, size)));
        lines.extend([Direction::Out, Direction::In].map(|direction| beside(kind, direction)));
        lines.extend([1, 16, 64].map(|at_once| churn(kind, at_once)));
        lines.push(idle(kind, 10_000));
    }
    // There are fewer ports than that, and so no such line over TCP.
    lines.push(idle(Kind::Unix, 100_000));
    lines.extend([rest(), memory()]);
    for kind in KINDS {
        lines.extend(calls(kind));
    }
    lines.extend([
        scraped(),
        confined(Direction::Out, 65536),
        confined(Direction::In, 4096),
    ]);
    lines.push(confined_trips());
    lines.extend(KINDS.map(polled_trips));
    lines
}

/// What the guest could do; a device that reaches this is limited by its guest.
fn ceiling(direction: Direction, size: u32) -> Line {
    let load = Load::new(direction, Kind::Unix, size);
    let name = if direction == Direction::Out { "out" } else { "in" };
    let figures = vec![
        Figure::new("rate", "GB/s", More),
        Figure::new("ns/packet", "", Less),
    ];
    Line::new(
        format!("guest-ceiling-{name}-{}", bytes(size)),
        format!(
            "the embedded guest without any device, {} packets or buffers",
            bytes(size)
        ),
        figures,
    )
    .quick(true)
    .contender(Who::Ours, move |_| Ceiling::new(load))
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
    let load = Load::new(Direction::In, kind, size);
    bulk("in", load, vec![rate, cpu])
        .quick(size == 4096 || size == 65536)
        .contender(Who::Spread, move |_| Clients::spread(load))
}

/// A line of bulk work; its name says what is not usual about it.
fn bulk(name: &str, load: Load, figures: Vec<Figure>) -> Line {
    let (name, what) = names(name, &load);
    Line::new(name, what, figures)
        .contender(Who::Ours, move |_| Bulk::ours(load, ""))
        .contender(Who::Plain, move |_| Clients::start(load))
        .contender(Who::Peer, move |setting| Bulk::peer(load, &setting.peer))
}

fn both(kind: Kind) -> Line {
    let figures = vec![
        Figure::new("rate", "GB/s", More),
        Figure::new("cpu", "s/GB", Less),
    ];
    bulk("both", Load::new(Direction::Both, kind, 65536), figures)
}

/// Rings of 1024.
fn rings(kind: Kind) -> Vec<Line> {
    let loads = [(Direction::Out, "out", 65536), (Direction::In, "in", 4096)];
    let line = |(direction, name, size)| {
        let load = Load {
            ring: 1024,
            ..Load::new(direction, kind, size)
        };
        bulk(name, load, vec![Figure::new("rate", "GB/s", More)])
    };
    loads.map(line).into()
}

const WIDE: &str = "limits, buffer: 4MiB";

/// Buffers of 4 MiB on both sides, in place of the 256 KiB that Linux has, which are four packets of 64 KiB.
fn windows(kind: Kind) -> Vec<Line> {
    let loads = [(Direction::Out, "out"), (Direction::In, "in")];
    let line = |(direction, name)| {
        let usual = Load::new(direction, kind, 65536);
        let load = Load {
            buffer: 4 << 20,
            ..usual
        };
        let (short, long) = names(name, &usual);
        let figures = vec![
            Figure::new("rate", "GB/s", More),
            Figure::new("cpu", "s/GB", Less),
        ];
        let (short, long) = (
            format!("{short}-4mbuffer"),
            format!("{long}, buffers of 4 MiB at both ends; and without"),
        );
        Line::new(short, long, figures)
            .contender(Who::Ours, move |_| Bulk::ours(load, WIDE))
            .contender(Who::Plain, move |_| Clients::start(load))
            .contender(Who::Without, move |_| Bulk::ours(usual, ""))
    };
    loads.map(line).into()
}

/// Several streams at once, which have to share.
fn streams(kind: Kind) -> Vec<Line> {
    let mut lines = Vec::new();
    for (streams, fairness) in [(8, None), (100, Some(AtMost(1.5)))] {
        for (direction, name, size) in [(Direction::Out, "out", 65536), (Direction::In, "in", 4096)] {
            let load = Load {
                streams,
                ..Load::new(direction, kind, size)
            };
            let shares = Figure::new("max/min", "", Less);
            let shares = fairness.map_or(shares.clone(), |target| shares.own(target));
            let line = bulk(name, load, vec![Figure::new("rate", "GB/s", More), shares]);
            lines.push(line.quick(streams == 100 && kind == Kind::Unix));
        }
    }
    lines
}

/// Several guests at once, on one sidecar.
fn guests() -> Vec<Line> {
    let mut lines = Vec::new();
    for guests in [2, 4, 16] {
        for (direction, name, size) in [(Direction::Out, "out", 65536), (Direction::In, "in", 4096)] {
            let load = Load {
                guests,
                ..Load::new(direction, Kind::Unix, size)
            };
            let figures = vec![
                Figure::new("rate", "GB/s", More),
                Figure::new("cpu", "s/GB", Less),
            ];
            lines.push(bulk(name, load, figures));
        }
    }
    lines
}

fn beside(kind: Kind, direction: Direction) -> Line {
    let load = Load::new(
        direction,
        kind,
        if direction == Direction::Out { 65536 } else { 4096 },
    );
    let name = if direction == Direction::Out { "out" } else { "in" };
    let figures = vec![
        Figure::new("p50", "us", Less),
        Figure::new("p99", "us", Less).without(AtMost(3.0)),
    ];
    Line::new(
        format!("trip-beside-{name}-{}", kind.name()),
        format!(
            "question and answer of a byte beside bulk of the same guest, {}",
            kind.name()
        ),
        figures,
    )
    .quick(kind == Kind::Unix)
    .contender(Who::Ours, move |_| Beside::ours(load))
    .contender(Who::Plain, move |_| PlainBeside::start(load))
    .contender(Who::Without, move |_| RoundTrips::ours(kind, 1))
    .contender(Who::Peer, move |setting| Beside::peer(load, &setting.peer))
}

fn churn(kind: Kind, at_once: usize) -> Line {
    let rate = Figure::new("conn/s", "", More)
        .plain(AtLeast(0.5))
        .peer(AtLeast(3.0));
    Line::new(
        format!("churn-{at_once}-{}", kind.name()),
        format!("connect, one byte, close; {at_once} at once, {}", kind.name()),
        vec![rate, Figure::new("cpu/conn", "us", Less)],
    )
    .quick(kind == Kind::Unix)
    .contender(Who::Ours, move |_| Churn::ours(kind, at_once))
    .contender(Who::Plain, move |_| Brief::start(kind, at_once))
    .contender(Who::Peer, move |setting| {
        Churn::peer(kind, at_once, &setting.peer)
    })
}

fn idle(kind: Kind, connections: usize) -> Line {
    let figures = vec![
        Figure::new("memory", "B", Less)
            .own(AtMost(1024.0))
            .peer(AtMost(0.125)),
        Figure::new("descriptors", "", Less).own(AtMost(1.01)),
        Figure::new("p50", "us", Less),
        Figure::new("p99", "us", Less),
    ];
    let line = Line::new(
        format!("idle-{connections}-{}", kind.name()),
        format!(
            "{connections} idle connections, each; a byte asked and answered beside them, {}",
            kind.name()
        ),
        figures,
    )
    .quick(kind == Kind::Unix && connections == 10_000)
    .lasting()
    .contender(Who::Ours, move |_| Idle::ours(kind, connections))
    .contender(Who::Without, move |_| RoundTrips::ours(kind, 1));
    if connections > 10_000 {
        return line;
    }
    line.contender(Who::Peer, move |setting| {
        Idle::peer(kind, connections, &setting.peer)
    })
}

fn rest() -> Line {
    let figures = vec![
        Figure::new("wake-ups", "/s", Less).own(AtMost(1.1)),
        Figure::new("cpu", "us/s", Less),
    ];
    Line::new(
        "rest",
        "a guest with an open connection on which nothing happens",
        figures,
    )
    .quick(true)
    .contender(Who::Ours, |_| Rest::ours())
    .contender(Who::Peer, |setting| Rest::peer(&setting.peer))
}

fn memory() -> Line {
    let figure = |key| Figure::new(key, "KiB", Less);
    Line::new(
        "memory",
        "anonymous memory: with one guest, each further guest, each of 100 busy connections",
        vec![figure("start"), figure("guest"), figure("busy")],
    )
    .quick(true)
    .lasting()
    .contender(Who::Ours, |_| Memory::ours())
    .contender(Who::Peer, |setting| Memory::peer(&setting.peer))
}

/// System calls, in windows of their own.
fn calls(kind: Kind) -> Vec<Line> {
    let mut lines = Vec::new();
    for (direction, name, size, target) in [
        (Direction::Out, "out", 65536, 1.2),
        (Direction::In, "in", 4096, 0.2),
    ] {
        let load = Load::new(direction, kind, size);
        let figures = vec![
            Figure::new("calls/packet", "", Less).own(AtMost(target)),
            Figure::new("calls/MB", "", Less),
            Figure::new("kicks/MB", "", Less),
            Figure::new("interrupts/MB", "", Less),
        ];
        let (short, long) = names(&format!("calls-{name}"), &load);
        lines.push(
            Line::new(short, format!("system calls: {long}"), figures)
                .quick(kind == Kind::Unix)
                .contender(Who::Ours, move |_| Ok(Bulk::ours(load, "")?.with(Extra::Calls)))
                .contender(Who::Peer, move |setting| {
                    Ok(Bulk::peer(load, &setting.peer)?.with(Extra::Calls))
                }),
        );
    }
    lines.push(
        Line::new(
            format!("calls-trip-1b-{}", kind.name()),
            format!(
                "system calls: question and answer of a byte each, {}",
                kind.name()
            ),
            vec![Figure::new("calls/trip", "", Less).own(AtMost(4.0))],
        )
        .quick(kind == Kind::Unix)
        .contender(Who::Ours, move |_| Ok(RoundTrips::ours(kind, 1)?.counted()))
        .contender(Who::Peer, move |setting| {
            Ok(RoundTrips::peer(kind, 1, &setting.peer)?.counted())
        }),
    );
    lines.extend([1, 16, 64].map(|at_once| {
        Line::new(
            format!("calls-churn-{at_once}-{}", kind.name()),
            format!(
                "system calls: connect, one byte, close; {at_once} at once, {}",
                kind.name()
            ),
            vec![Figure::new("calls/conn", "", Less)],
        )
        .quick(kind == Kind::Unix && at_once == 16)
        .contender(Who::Ours, move |_| Ok(Churn::ours(kind, at_once)?.counted()))
        .contender(Who::Peer, move |setting| {
            Ok(Churn::peer(kind, at_once, &setting.peer)?.counted())
        })
    }));
    lines.push(
        Line::new(
            format!("calls-polled-trip-1b-{}", kind.name()),
            format!(
                "system calls: question and answer of a byte each, {}, with limits.busyPoll 50us",
                kind.name()
            ),
            vec![Figure::new("calls/trip", "", Less).own(AtMost(4.0))],
        )
        .contender(Who::Ours, move |_| {
            Ok(RoundTrips::ours_with(kind, 1, POLLED)?.counted())
        }),
    );
    lines
}

/// What reading the metrics ten times a second costs: more often than anybody does.
fn scraped() -> Line {
    let load = Load::new(Direction::In, Kind::Unix, 4096);
    let every = Duration::from_millis(100);
    Line::new(
        "scraped-in-4k-unix",
        "bulk, host to guest, while metrics are read ten times a second; and without",
        vec![
            Figure::new("rate", "GB/s", More),
            Figure::new("cpu", "s/GB", Less),
        ],
    )
    .contender(Who::Ours, move |_| {
        Ok(Bulk::ours(load, "")?.with(Extra::Scrapes(every)))
    })
    .contender(Who::Without, move |_| Bulk::ours(load, ""))
}

const POLLED: &str = "limits, busyPoll: 50us";

const UNCONFINED: &str = "confinement: {noNewPrivileges: false, seccomp: off, landlock: off}\n";

/// What the process's own confinement costs.
fn confined(direction: Direction, size: u32) -> Line {
    let load = Load::new(direction, Kind::Unix, size);
    let (short, long) = names(
        if direction == Direction::Out {
            "confined-out"
        } else {
            "confined-in"
        },
        &load,
    );
    Line::new(
        short,
        format!("{long}, confined as usual; and without"),
        vec![
            Figure::new("rate", "GB/s", More),
            Figure::new("cpu", "s/GB", Less),
        ],
    )
    .contender(Who::Ours, move |_| Bulk::ours(load, ""))
    .contender(Who::Without, move |_| Bulk::ours(load, UNCONFINED))
}

fn confined_trips() -> Line {
    Line::new(
        "confined-trip-1b-unix",
        "question and answer of a byte each, unix, confined as usual; and without",
        vec![Figure::new("p50", "us", Less), Figure::new("p99", "us", Less)],
    )
    .contender(Who::Ours, |_| RoundTrips::ours(Kind::Unix, 1))
    .contender(Who::Without, |_| RoundTrips::ours_with(Kind::Unix, 1, UNCONFINED))
}

/// What busy polling is worth; it is off as a rule.
fn polled_trips(kind: Kind) -> Line {
    Line::new(
        format!("polled-trip-1b-{}", kind.name()),
        format!(
            "question and answer of a byte each, {}, with limits.busyPoll 50us; and without",
            kind.name()
        ),
        vec![Figure::new("p50", "us", Less), Figure::new("p99", "us", Less)],
    )
    .contender(Who::Ours, move |_| RoundTrips::ours_with(kind, 1, POLLED))
    .contender(Who::Without, move |_| RoundTrips::ours(kind, 1))
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
