//! Soak: one sidecar, three guests, everything at once, for as long as `SOAK_SECONDS` says (20 if nothing does).
//!
//! Actors move checked bytes and messages along every kind of path while guests reboot, VMMs die, services vanish and one
//! guest sends garbage. What was under way when one of its ends was disturbed is excused, everything else must be whole. At the
//! end nothing may be left: no connection, no byte in a buffer, no descriptor, no thread, no memory, and the counters must
//! agree with each other.
//!
//! `make soak MINUTES=60` runs it in release; without more ado it is a smoke test of a few seconds.

mod actors;
mod disturbances;
mod ledger;
#[allow(dead_code, unused_imports)]
#[path = "../e2e/support/mod.rs"]
mod support;

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ledger::{Leaks, Ledger};
use support::*;

/// CID of the guest `db`.
const DB: u64 = 5;

fn seconds() -> u64 {
    std::env::var("SOAK_SECONDS")
        .ok()
        .map_or(20, |text| text.parse().expect("SOAK_SECONDS is a number"))
}

/// Where everything is.
struct Stage {
    sidecar: Sidecar,
    web: disturbances::Machine,
    db: disturbances::Machine,
    /// TCP ports: of the CONNECT listener and of the plain one.
    inbound: [u16; 2],
    until: Instant,
    /// Clients that have not come to their end.
    clients: AtomicUsize,
    ledger: Ledger,
}

impl Stage {
    /// Whether servers in the guests are wanted: longer than clients begin anything.
    fn has_clients(&self) -> bool {
        self.clients.load(Ordering::SeqCst) > 0
    }

    fn goes_on(&self) -> bool {
        Instant::now() < self.until && !self.ledger.has_failed()
    }
}

/// The dead port is none that the kernel gives away: in an hour, somebody else on the machine was given one that was free.
fn configuration(echo: u16, packets: &str, framed: u16, inbound: [u16; 2]) -> String {
    format!(
        r#"
# At debug an hour's log is 20 GB.
log: {{format: json, level: info}}
guests:
- name: web
  cid: 3
  vhostUser: {{socket: "{{dir}}/web.sock"}}
  outbound:
  - {{name: echo, port: 80, to: "tcp://127.0.0.1:{echo}"}}
  - {{name: dead, port: 81, to: "tcp://127.77.0.1:9"}}
  - {{name: packets, port: 90, to: "unix://{packets}"}}
  - {{name: framed, port: 91, to: "tcp://127.0.0.1:{framed}", framing: length-prefixed}}
  - {{name: peer, ports: 1-65535, to: "guest://db"}}
  inbound:
  - {{name: mux, listen: "tcp://127.0.0.1:{}", protocol: connect}}
  - {{name: plain, listen: "tcp://127.0.0.1:{}", port: 22}}
- name: db
  cid: 5
  vhostUser: {{socket: "{{dir}}/db.sock"}}
  outbound:
  - {{name: echo, port: 80, to: "tcp://127.0.0.1:{echo}"}}
  - {{name: peer, ports: 1-65535, to: "guest://web"}}
- name: rogue
  cid: 7
  vhostUser: {{socket: "{{dir}}/rogue.sock"}}
  outbound:
  - {{name: echo, ports: 1-1000, to: "tcp://127.0.0.1:{echo}"}}
"#,
        inbound[0], inbound[1]
    )
}

#[test]
fn soak() {
    let time = Duration::from_secs(seconds());
    raise_descriptor_limit();
    let dir = tempfile::tempdir().unwrap();
    let packets = dir.path().join("packets");
    let echo_port = serve(echo);
    let framed = serve(actors::echo_frames);
    actors::serve_packets(&packets);
    // A path that was a listener: dials of it are refused.
    drop(UnixListener::bind(dir.path().join("gone")).unwrap());

    let inbound = [free_port(), free_port()];
    let sidecar = Sidecar::start(&configuration(
        echo_port,
        packets.to_str().unwrap(),
        framed,
        inbound,
    ));
    let stage = Stage {
        web: disturbances::Machine::boot(sidecar.path("web.sock")),
        db: disturbances::Machine::boot(sidecar.path("db.sock")),
        sidecar,
        inbound,
        until: Instant::now() + time,
        clients: AtomicUsize::new(0),
        ledger: Ledger::default(),
    };

    // One round of everything makes what is made once: pools, caches, arenas. What it takes is no leak.
    let warm = Stage {
        until: Instant::now() + (time / 4).min(Duration::from_secs(60)),
        ..stage
    };
    run(&warm);
    let before = Leaks::at_rest(&warm.sidecar);
    let stage = Stage {
        until: Instant::now() + time,
        ..warm
    };
    run(&stage);
    let after = Leaks::at_rest(&stage.sidecar);
    stage.ledger.print(time);
    before.judge(&after);
    stage.ledger.judge();
    ledger::judge_counters(&stage.sidecar);
}

/// Counts a client out, however it ends.
struct Leaves<'a>(&'a AtomicUsize);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// All actors until the time is up.
fn run(stage: &Stage) {
    thread::scope(|scope| {
        stage.clients.store(actors::CLIENTS.len(), Ordering::SeqCst);
        for act in actors::CLIENTS {
            scope.spawn(move || {
                let _leaves = Leaves(&stage.clients);
                act(stage);
            });
        }
        for act in actors::SERVERS {
            scope.spawn(move || act(stage));
        }
        for act in disturbances::ALL {
            scope.spawn(move || act(stage));
        }
    });
}
