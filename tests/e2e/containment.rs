//! A VMM that takes its guest's memory away under the running device: its session ends with the reason, nobody else notices,
//! and the next VMM is served.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use vsock_sidecar::embedded_guest::{
    DriverOptions, EmbeddedGuest, FrontEnd, GuestMemory, GuestStream, Profile, SocketOptions, Sockets,
};

use crate::support::*;

/// Two guests: `web`, whose VMM misbehaves, and `db`. Port 7 of both is an echo, port 8 of `web` this listener.
fn two_guests() -> (Sidecar, TcpListener) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (echo, service) = (serve(echo), listener.local_addr().unwrap());
    let rule =
        |name: &str, port: u32, to: String| format!("{{name: {name}, port: {port}, to: \"tcp://{to}\"}}");
    let echo = rule("echo", 7, format!("127.0.0.1:{echo}"));
    let service = rule("service", 8, service.to_string());
    let sidecar = Sidecar::start(&format!(
        "guests:\n\
         - {{name: web, cid: 3, vhostUser: {{socket: \"{{dir}}/web.sock\"}}, outbound: [{echo}, {service}]}}\n\
         - {{name: db, cid: 4, vhostUser: {{socket: \"{{dir}}/db.sock\"}}, outbound: [{echo}]}}\n"
    ));
    (sidecar, listener)
}

/// A guest of little memory, so that what is in flight is most of it.
fn small(sidecar: &Sidecar, name: &str) -> Sockets {
    let options = DriverOptions {
        memory: 32 << 20,
        ..DriverOptions::default()
    };
    guest(
        &sidecar.path(&format!("{name}.sock")),
        Profile::qemu(),
        options,
        SocketOptions::default(),
    )
}

fn truncate(guest: &Sockets, size: u64) {
    guest.with_driver(|driver| driver.memory().regions()[0].truncate(size).unwrap());
}

#[track_caller]
fn ping(stream: &GuestStream) {
    let mut stream = stream;
    stream.set_read_timeout(Some(LONG));
    stream.write_all(b"ping").unwrap();
    let mut pong = [0; 4];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"ping");
}

/// The session of `web` has ended for want of memory, so often by now, and its VMM sees that.
#[track_caller]
fn assert_lost(sidecar: &Sidecar, guest: &Sockets, times: f64) {
    guest.with_front_end(|front_end| front_end.unwrap().wait_closed(LONG).unwrap());
    let labels = [("guest", "web"), ("reason", "memory_lost")];
    sidecar.until_metric("vsock_session_errors_total", &labels, times);
    let state = sidecar.state();
    let end = &state["guests"][0]["session"]["lastEnd"];
    assert_eq!(end["reason"], "memory_lost");
    let detail = end["detail"].as_str().unwrap();
    assert!(
        detail.contains("truncated guest memory: the file of the region at 0x0"),
        "{detail}"
    );
    let finding = [("guest", "web"), ("code", "memory-lost")];
    sidecar.until_metric("vsock_finding", &finding, 1.0);
    sidecar.until_metric("vsock_connections_active", &[("guest", "web")], 0.0);
    assert_eq!(sidecar.metric("vsock_buffered_bytes", &[("guest", "web")]), 0.0);
}

/// What comes is the beginning of the stream, and nothing else.
fn is_a_beginning(mut from: impl Read, seed: u64, arrived: &AtomicU64) {
    let mut bytes = Bytes::new(seed);
    let mut chunk = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = from.read(&mut chunk) {
        let at = arrived.fetch_add(n as u64, Ordering::Relaxed);
        assert!(bytes.take(n) == chunk[..n], "wrong bytes from {at} on");
    }
}

/// Ten rounds of traffic both ways, in the middle of which the memory goes; a good guest beside it all the while.
#[test]
fn memory_that_goes_under_traffic_ends_that_guests_session_and_nothing_else() {
    let (sidecar, listener) = two_guests();
    let db = linux(&sidecar.path("db.sock"));
    let well = db.connect(7).unwrap();
    let done = AtomicBool::new(false);
    let mut at_rest = None;
    thread::scope(|scope| {
        let _done = StopOnDrop(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                ping(&well);
            }
        });
        for round in 1..=10u64 {
            let web = small(&sidecar, "web");
            let (up, down) = (web.connect(8).unwrap(), web.connect(8).unwrap());
            let (reader, feeder) = (accept_tcp(&listener), accept_tcp(&listener));
            let (arrived, came) = (AtomicU64::new(0), AtomicU64::new(0));
            thread::scope(|scope| {
                let arrived = &arrived;
                scope.spawn(move || is_a_beginning(reader, round, arrived));
                scope.spawn(move || feed(feeder, round));
                scope.spawn(|| Bytes::new(round).write_to(&up, u64::MAX / 2).unwrap_err());
                scope.spawn(|| {
                    down.set_read_timeout(Some(LONG));
                    let mut chunk = vec![0; 64 * 1024];
                    // What a guest without memory reads is its own affair.
                    while let Ok(n @ 1..) = (&down).read(&mut chunk) {
                        came.fetch_add(n as u64, Ordering::Relaxed);
                    }
                });
                until("both directions are at work", || {
                    arrived.load(Ordering::Relaxed) > 300_000 && came.load(Ordering::Relaxed) > 300_000
                });
                // All of it, or only the upper part of what is in use.
                truncate(&web, if round % 2 == 0 { 0 } else { 0x14_0000 });
                assert_lost(&sidecar, &web, round as f64);
                web.kill();
            });
            drop((up, down));
            drop(web);
            if round == 3 {
                at_rest = Some(resources(&sidecar));
            }
        }
        let last = resources(&sidecar);
        let first = at_rest.unwrap();
        assert!(last.0 <= first.0 + 4, "{first:?} then {last:?} descriptors");
        assert_eq!(last.1, first.1, "threads");
        assert_eq!(last.2, first.2, "mappings of guest memory");
    });
    let next = small(&sidecar, "web");
    ping(&next.connect(7).unwrap());
    sidecar.until_metric("vsock_finding", &[("guest", "web"), ("code", "memory-lost")], 0.0);
    let others = [("guest", "db")];
    assert_eq!(sidecar.metric("vsock_session_errors_total", &others), 0.0);
    assert_eq!(sidecar.metric("vsock_connections_closed_total", &others), 0.0);
    let reasons = [("guest", "web"), ("rule", "service"), ("reason", "session_lost")];
    assert_eq!(sidecar.metric("vsock_connections_closed_total", &reasons), 20.0);
    assert_eq!(sidecar.metric("vsock_device_panics_total", &[]), 0.0);
    assert_lawful(&db);
}

fn feed(mut to: TcpStream, seed: u64) {
    // Until it is reset.
    let _ = Bytes::new(seed).write_to(&mut to, u64::MAX / 2);
}

/// Descriptors, threads, and mappings of guest memory, when they have come to rest.
fn resources(sidecar: &Sidecar) -> (usize, usize, usize) {
    let look = || {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", sidecar.pid())).unwrap();
        let guests = maps.lines().filter(|line| line.contains("guest-memory")).count();
        (sidecar.descriptors(), sidecar.threads(), guests)
    };
    let mut last = look();
    until("descriptors, threads and mappings come to rest", || {
        let now = look();
        std::mem::replace(&mut last, now) == now && now.2 == 1
    });
    last
}

/// Nothing is looked at before something happens; then the first look is contained.
#[test]
fn an_idle_guests_memory_is_missed_at_its_next_kick() {
    let (sidecar, listener) = two_guests();
    let web = small(&sidecar, "web");
    let stream = web.connect(8).unwrap();
    let service = accept_tcp(&listener);
    truncate(&web, 0);
    let mut service_side = service.try_clone().unwrap();
    // The guest's driver finds zeros itself and may give up; the host side speaks, which makes the device look.
    service_side.write_all(b"anybody there?").unwrap();
    assert_lost(&sidecar, &web, 1.0);
    assert!(read_to_end(service).is_empty());
    drop(stream);
    assert_eq!(sidecar.logged("session ends by an error", |_| true).len(), 1);
    let next = small(&sidecar, "web");
    ping(&next.connect(7).unwrap());
}

/// The memory goes between SET_MEM_TABLE and the start of the rings, when nobody has touched it.
#[test]
fn memory_that_goes_before_the_rings_start_is_no_less_contained() {
    let (sidecar, _listener) = two_guests();
    let mut front_end = FrontEnd::connect(&sidecar.path("web.sock"), Profile::qemu()).unwrap();
    let negotiated = front_end.negotiate().unwrap();
    let memory = GuestMemory::new(32 << 20).unwrap();
    front_end.set_mem_table(memory.regions()).unwrap();
    memory.regions()[0].truncate(0).unwrap();
    front_end.set_features(negotiated.features).unwrap();
    let options = DriverOptions {
        memory: 32 << 20,
        ..DriverOptions::default()
    };
    let driver =
        vsock_sidecar::embedded_guest::Driver::with_memory(memory.clone(), options, negotiated.features)
            .unwrap();
    let mut guest = EmbeddedGuest { front_end, driver };
    let queues = guest.front_end.profile().queues;
    // Wherever in this it is found, the connection ends.
    for ring in guest.driver.rings(queues, &[]) {
        let index = ring.index;
        let _ = guest.front_end.set_vring_num(index, u32::from(ring.size));
        let _ = guest.front_end.set_vring_base(index, 0);
        let _ = guest.front_end.set_vring_addr(&ring);
        let _ = guest.front_end.set_vring_kick(index, ring.kick);
        let _ = guest.front_end.set_vring_enable(index, true);
    }
    guest.front_end.wait_closed(LONG).unwrap();
    sidecar.until_metric(
        "vsock_session_errors_total",
        &[("guest", "web"), ("reason", "memory_lost")],
        1.0,
    );
    drop(guest);
    let next = small(&sidecar, "web");
    ping(&next.connect(7).unwrap());
}
