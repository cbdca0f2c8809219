//! What floods cost everybody else: `make hostile-figures`, or `cargo bench --bench hostile`.
//!
//! One sidecar, two guests. One asks and is answered, one byte at a time, and every round trip is timed: alone, and beside
//! another guest that does honest work as fast as it can, or floods. What is printed are the ratio of its 99th percentile to that
//! when it was alone just before, the processor time that the sidecar took, and what it grew by at most. The honest
//! neighbours are the yardstick: a guest may be busy, and a flood should cost others no more than that.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::{DriverOptions, EmbeddedGuest, Profile, Refill, Shape};
use vsock_sidecar::vsock::{Cid, Header, Op, Port};

#[path = "../tests/e2e/support/mod.rs"]
#[allow(dead_code, unused_imports)]
mod support;

use support::{Sidecar, echo, free_port, linux, serve};

const ECHO: u32 = 7;
const CLOSED: u32 = 8;
const NO_RULE: u32 = 9;
/// How long each neighbour is watched.
const SPAN: Duration = Duration::from_secs(5);
/// Packets of the floods that have a number.
const MILLION: u64 = 1_000_000;

fn main() {
    let port = serve(echo);
    let closed = free_port();
    let guest = |name: &str, cid: u32| {
        format!(
            "- name: {name}\n  cid: {cid}\n  vhostUser: {{socket: \"{{dir}}/{name}.sock\"}}\n  outbound:\n  \
             - {{name: echo, port: {ECHO}, to: \"tcp://127.0.0.1:{port}\"}}\n  \
             - {{name: closed, port: {CLOSED}, to: \"tcp://127.0.0.1:{closed}\"}}\n"
        )
    };
    let sidecar = &Sidecar::start(&format!(
        "log: {{format: json, level: info}}\nguests:\n{}{}",
        guest("web", 3),
        guest("other", 4)
    ));
    let other = linux(&sidecar.path("other.sock"));
    let stream = other.connect(ECHO).expect("the other guest connects");
    stream.set_read_timeout(Some(Duration::from_secs(30)));
    let rounds = Rounds { stream: &stream };
    rounds.timed(Duration::from_secs(1));

    let socket = sidecar.path("web.sock");
    println!(
        "{:36} {:>9} {:>9} {:>9} {:>8} {:>9} {:>7} {:>8}",
        "neighbour", "p99 alone", "p99", "p99.9", "p99 x", "packets", "CPU s", "RSS +KiB"
    );
    for (name, play) in FLOODS {
        // Anew before each: whatever else the machine does concerns both.
        let alone = rounds.timed(SPAN);
        let mut raw = Raw::boot(&socket);
        let (memory, cpu) = (sidecar.anonymous_memory(), sidecar.cpu_time());
        let (stop, packets) = (AtomicBool::new(false), AtomicU64::new(0));
        let (times, most) = thread::scope(|scope| {
            let flood = scope.spawn(|| play(&mut raw, &stop, &packets));
            let watch = scope.spawn(move || {
                let mut most = 0;
                while !flood.is_finished() {
                    most = most.max(sidecar.anonymous_memory());
                    thread::sleep(Duration::from_millis(20));
                }
                flood.join().expect("the neighbour goes on");
                most
            });
            let times = rounds.timed(SPAN);
            // A flood with a number is played to its end; the others end here.
            stop.store(true, Ordering::Relaxed);
            (times, watch.join().expect("the neighbour goes on"))
        });
        let cpu = sidecar.cpu_time() - cpu;
        println!(
            "{name:36} {:>9} {:>9} {:>9} {:>8.2} {:>9} {:>7.2} {:>8}",
            micros(at(&alone, 990)),
            micros(at(&times, 990)),
            micros(at(&times, 999)),
            at(&times, 990) as f64 / at(&alone, 990) as f64,
            packets.load(Ordering::Relaxed),
            cpu.as_secs_f64(),
            most.saturating_sub(memory) / 1024,
        );
        drop(raw);
        sidecar.until_metric("vsock_session_active", &[("guest", "web")], 0.0);
    }
}

/// A quantile of sorted times.
fn at(times: &[u64], per_mille: usize) -> u64 {
    times[times.len() * per_mille / 1000]
}

fn micros(nanos: u64) -> String {
    format!("{:.0} us", nanos as f64 / 1e3)
}

/// The guest that asks and is answered.
struct Rounds<'s> {
    stream: &'s vsock_sidecar::embedded_guest::GuestStream,
}

impl Rounds<'_> {
    /// Round trips of one byte for some time, in nanoseconds, the shortest first.
    fn timed(&self, span: Duration) -> Vec<u64> {
        let mut stream = self.stream;
        let mut times = Vec::new();
        let began = Instant::now();
        while began.elapsed() < span {
            let asked = Instant::now();
            stream.write_all(&[1]).expect("the other guest is unharmed");
            stream.read_exact(&mut [0]).expect("the other guest is unharmed");
            times.push(asked.elapsed().as_nanos() as u64);
        }
        times.sort_unstable();
        times
    }
}

/// What a neighbour does until it is told to stop, counting its packets.
type Flood = fn(&mut Raw, &AtomicBool, &AtomicU64);

const FLOODS: &[(&str, Flood)] = &[
    ("honest round trips", |raw, stop, packets| {
        let port = raw.open();
        while !stop.load(Ordering::Relaxed) {
            let mut head = header(Op::Rw, port, ECHO);
            head.fwd_cnt = raw.fwd_cnt;
            raw.send(&head, b"1", packets);
            raw.guest.driver.notify_tx();
            raw.hear_until(|header| header.op == Op::Rw as u16);
        }
    }),
    ("honest bulk, as fast as it goes", |raw, stop, packets| {
        let port = raw.open();
        let chunk = [7; 16 * 1024];
        let (mut sent, mut room) = (0u32, 0);
        while !stop.load(Ordering::Relaxed) {
            if room < chunk.len() as u32 {
                raw.guest.driver.notify_tx();
                raw.hear();
                room = raw.buf_alloc.saturating_sub(sent.wrapping_sub(raw.peer_fwd_cnt));
                continue;
            }
            let mut head = header(Op::Rw, port, ECHO);
            head.fwd_cnt = raw.fwd_cnt;
            raw.send(&head, &chunk, packets);
            sent = sent.wrapping_add(chunk.len() as u32);
            room -= chunk.len() as u32;
        }
    }),
    ("1,000,000 REQUESTs, no rule", |raw, _, packets| {
        for at in 0..MILLION as u32 {
            raw.send(&header(Op::Request, at, NO_RULE), &[], packets);
        }
    }),
    ("1,000,000 REQUESTs, dead port", |raw, _, packets| {
        for at in 0..MILLION as u32 {
            raw.send(&header(Op::Request, at, CLOSED), &[], packets);
        }
    }),
    ("no RX buffers, REQUEST flood", |raw, stop, packets| {
        raw.guest.driver.set_refill(Refill::Never);
        let mut at = 0;
        while !stop.load(Ordering::Relaxed) {
            at += 1;
            raw.try_send(&header(Op::Request, at, NO_RULE), packets);
        }
    }),
    ("no RX buffers, CREDIT_REQUEST flood", |raw, stop, packets| {
        let port = raw.open();
        raw.guest.driver.set_refill(Refill::Never);
        while !stop.load(Ordering::Relaxed) {
            raw.try_send(&header(Op::CreditRequest, port, ECHO), packets);
        }
    }),
    ("RST flood", |raw, stop, packets| {
        while !stop.load(Ordering::Relaxed) {
            raw.try_send(&header(Op::Rst, 1, ECHO), packets);
        }
    }),
    ("kicks without packets", |raw, stop, packets| {
        while !stop.load(Ordering::Relaxed) {
            raw.guest.driver.queue(vsock_sidecar::embedded_guest::TX).kick();
            packets.fetch_add(1, Ordering::Relaxed);
        }
    }),
];

fn header(op: Op, from: u32, to: u32) -> Header {
    Header {
        src_cid: Cid(3),
        dst_cid: Cid::HOST,
        src_port: Port(from),
        dst_port: Port(to),
        len: 0,
        socket_type: 1,
        op: op as u16,
        flags: 0,
        buf_alloc: 256 * 1024,
        fwd_cnt: 0,
    }
}

/// The neighbour.
struct Raw {
    guest: EmbeddedGuest,
    /// Of its one connection: bytes consumed, and the credit that it was told of.
    fwd_cnt: u32,
    buf_alloc: u32,
    peer_fwd_cnt: u32,
}

impl Raw {
    fn boot(socket: &Path) -> Raw {
        let guest = EmbeddedGuest::boot(socket, Profile::qemu(), DriverOptions::default());
        Raw {
            guest: guest.expect("the neighbour boots"),
            fwd_cnt: 0,
            buf_alloc: 0,
            peer_fwd_cnt: 0,
        }
    }

    fn open(&mut self) -> u32 {
        const PORT: u32 = 5000;
        self.send(&header(Op::Request, PORT, ECHO), &[], &AtomicU64::new(0));
        self.guest.driver.notify_tx();
        self.hear_until(|header| header.op == Op::Response as u16);
        PORT
    }

    /// Sends in bursts, taking what comes when the ring is full.
    fn send(&mut self, header: &Header, payload: &[u8], packets: &AtomicU64) {
        let header = Header {
            len: payload.len() as u32,
            ..*header
        };
        while self
            .guest
            .driver
            .queue_packet(&header, payload, &Shape::single())
            .is_err()
        {
            self.guest.driver.notify_tx();
            self.hear();
            if self.guest.driver.reclaim_tx() == 0 {
                thread::yield_now();
            }
        }
        if packets.fetch_add(1, Ordering::Relaxed) % 32 == 31 {
            self.guest.driver.notify_tx();
        }
    }

    /// Sends if the ring has room; takes nothing.
    fn try_send(&mut self, header: &Header, packets: &AtomicU64) {
        match self.guest.driver.queue_packet(header, &[], &Shape::single()) {
            Ok(_) if packets.fetch_add(1, Ordering::Relaxed) % 32 != 31 => {}
            _ => {
                self.guest.driver.notify_tx();
                if self.guest.driver.reclaim_tx() == 0 {
                    thread::yield_now();
                }
            }
        }
    }

    fn hear(&mut self) {
        while let Some(header) = self.guest.driver.try_recv_header().expect("packets are sound") {
            self.note(&header);
        }
    }

    fn hear_until(&mut self, is: impl Fn(&Header) -> bool) {
        loop {
            match self.guest.driver.try_recv_header().expect("packets are sound") {
                Some(header) => {
                    self.note(&header);
                    if is(&header) {
                        return;
                    }
                }
                None => {
                    let deadline = Instant::now() + Duration::from_secs(30);
                    self.guest.driver.wait_rx(deadline).expect("an answer comes");
                }
            }
        }
    }

    fn note(&mut self, header: &Header) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(header.len);
        if header.dst_port == Port(5000) {
            (self.buf_alloc, self.peer_fwd_cnt) = (header.buf_alloc, header.fwd_cnt);
        }
    }
}
