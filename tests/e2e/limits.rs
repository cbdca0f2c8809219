//! Refusals by name, and bounds: what is slow, full or plentiful costs itself only.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::{DriverOptions, Profile, SocketOptions, Sockets, Violation};

use crate::support::*;

fn local() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
}

/// Connects to a port that is refused; answers how long that took.
#[track_caller]
fn refused(guest: &Sockets, port: u32) -> Duration {
    let asked = Instant::now();
    let error = guest.connect(port).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "RST and not silence");
    asked.elapsed()
}

#[test]
fn every_refusal_is_a_reset_at_once_with_its_reason() {
    // A listener whose queue is full answers no SYN: the kernel's own black hole.
    let full = rustix_listener_with_backlog_zero();
    let hole = full.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&hole, Duration::from_millis(200)) {
        queued.push(stream);
        assert!(queued.len() < 100, "the queue of a listener does not fill up");
    }
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: closed, port: 1, to: \"tcp://127.0.0.1:{closed}\"}}\n  \
         - {{name: hole, port: 2, to: \"tcp://{hole}\"}}\n  \
         - {{name: nowhere, port: 3, to: \"tcp://no-such-name.invalid:80\"}}\n  \
         - {{name: nofile, port: 4, to: \"unix://{{dir}}/nobody.sock\"}}\n  \
         limits: {{connectTimeout: 300ms}}\n",
        closed = free_port(),
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let counted = |rule: &str, reason: &str| {
        let labels = [("direction", "guest_to_host"), ("rule", rule), ("reason", reason)];
        sidecar.metric("vsock_connections_refused_total", &labels)
    };

    // The machine may be busy, but nothing here waits for a timeout of ours.
    let quick = Duration::from_secs(2);
    assert!(refused(&guest, 9999) < quick);
    assert_eq!(counted("", "no_rule"), 1.0);
    let events = sidecar.logged("the guest asked for a port that no outbound rule matches", |_| {
        true
    });
    assert_eq!(events.len(), 1, "{}", sidecar.log_tail());
    assert_eq!(field(&events[0], "guest"), "web");
    assert_eq!(field(&events[0], "port"), "9999");
    assert_eq!(field(&events[0], "level"), "WARN");
    for _ in 0..10 {
        refused(&guest, 9999);
    }
    assert_eq!(counted("", "no_rule"), 11.0);
    let loud = |event: &&serde_json::Value| field(event, "level") == "WARN";
    let events = sidecar.events("the guest asked for a port that no outbound rule matches");
    assert_eq!(
        events.iter().filter(loud).count(),
        1,
        "one line a cause, not one a packet"
    );

    assert!(refused(&guest, 1) < quick);
    assert_eq!(counted("closed", "dial_refused"), 1.0);
    assert!(refused(&guest, 4) < quick);
    assert_eq!(counted("nofile", "dial_refused"), 1.0);

    let took = refused(&guest, 2);
    assert!(took >= Duration::from_millis(300), "{took:?}");
    assert!(
        took < Duration::from_secs(3),
        "{took:?}: long after connectTimeout"
    );
    assert_eq!(counted("hole", "dial_timeout"), 1.0);

    refused(&guest, 3);
    // A machine without any resolver may need longer than connectTimeout to say so.
    assert_eq!(
        counted("nowhere", "dns") + counted("nowhere", "dial_timeout"),
        1.0
    );

    // Another CID is not ours to reach, and no rule names it.
    let error = guest.connect_to(4, 1).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(counted("", "no_rule"), 12.0);

    assert_eq!(
        sidecar.metric("vsock_tcp_dials_total", &[("rule", "closed")]),
        1.0
    );
    assert_eq!(
        sidecar.metric("vsock_tcp_dial_failures_total", &[("rule", "closed")]),
        1.0
    );
    assert_eq!(sidecar.metric("vsock_connections_opened_total", &[]), 0.0);
    assert_eq!(guest.open_connections(), 0);
    assert_lawful(&guest);
}

/// A listener with the shortest queue there is, which nobody serves.
fn rustix_listener_with_backlog_zero() -> TcpListener {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    listen(&socket, 0).unwrap();
    TcpListener::from(socket)
}

#[test]
fn the_limit_refuses_the_next_one_and_a_free_place_is_given_away_again() {
    let port = serve(echo);
    let inbound = free_port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n  \
         inbound: [{{name: in, listen: \"tcp://127.0.0.1:{inbound}\", port: 22}}]\n  \
         limits: {{connections: 3}}\n"
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let _listener = guest.listen(22).unwrap();
    let mut held: Vec<_> = (0..3).map(|_| guest.connect(7).unwrap()).collect();
    refused(&guest, 7);
    let labels = [
        ("direction", "guest_to_host"),
        ("rule", "echo"),
        ("reason", "limit"),
    ];
    assert_eq!(sidecar.metric("vsock_connections_refused_total", &labels), 1.0);
    // The limit counts both ways: an inbound client is closed.
    let client = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(read_to_end(&client), b"");
    let labels = [
        ("direction", "host_to_guest"),
        ("rule", "in"),
        ("reason", "limit"),
    ];
    sidecar.until_metric("vsock_connections_refused_total", &labels, 1.0);

    drop(held.pop());
    until("a place is free", || {
        guest.connect(7).map(|stream| held.push(stream)).is_ok()
    });
    for stream in &mut held {
        stream.write_all(b"alive").unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
    }
    assert_lawful(&guest);
}

#[test]
fn a_service_that_stalls_holds_its_buffer_and_nobody_else() {
    const BUFFER: f64 = 65536.0;
    let (stalled, sink) = (local(), local());
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: stalled, port: 1, to: \"tcp://{}\"}}\n  - {{name: sink, port: 2, to: \"tcp://{}\"}}\n  \
         limits: {{buffer: 64KiB}}\n",
        stalled.local_addr().unwrap(),
        sink.local_addr().unwrap(),
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let stuck = guest.connect(1).unwrap();
    let mut peer = accept_tcp(&stalled);

    // Until neither socket nor buffer take any more.
    stuck.set_write_timeout(Some(Duration::from_millis(500)));
    let mut bytes = Bytes::new(1);
    let mut sent = 0u64;
    let mut pending: Vec<u8> = Vec::new();
    loop {
        if pending.is_empty() {
            pending = bytes.take(32 * 1024);
        }
        match (&stuck).write(&pending) {
            Ok(n) => {
                sent += n as u64;
                pending.drain(..n);
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
        assert!(sent < 64 << 20, "nothing stops the guest");
    }
    let held = sidecar.metric("vsock_buffered_bytes", &[("direction", "guest_to_host")]);
    assert!(held > 0.0 && held <= BUFFER, "{held} bytes are held");
    let state = sidecar.state();
    let connection = &state["guests"][0]["device"]["connections"][0];
    assert_eq!(connection["buffered"].as_f64(), Some(held), "{state:#}");

    let memory = sidecar.anonymous_memory();
    let started = Instant::now();
    let busy = guest.connect(2).unwrap();
    let mut reader = accept_tcp(&sink);
    thread::scope(|scope| {
        scope.spawn(|| Bytes::new(2).write_to(&busy, 16 << 20).unwrap());
        Bytes::new(2).expect_from(&mut reader, 16 << 20);
    });
    let took = started.elapsed();
    println!("16 MiB beside a stalled peer took {took:?}");
    assert!(
        took < Duration::from_secs(15),
        "{took:?}: the stalled peer slows others down"
    );
    assert_eq!(
        sidecar.metric("vsock_buffered_bytes", &[("direction", "guest_to_host")]),
        held
    );
    let grown = sidecar.anonymous_memory().saturating_sub(memory);
    assert!(grown < 4 << 20, "grew by {grown} bytes");

    // When the peer reads, all of it is there.
    stuck.set_write_timeout(Some(LONG));
    let total = sent + pending.len() as u64;
    let writer = thread::spawn(move || {
        (&stuck).write_all(&pending).unwrap();
        drop(stuck);
    });
    let mut expected = Bytes::new(1);
    expected.expect_from(&mut peer, total);
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
    writer.join().unwrap();
    sidecar.until_metric("vsock_buffered_bytes", &[("direction", "guest_to_host")], 0.0);
    assert_lawful(&guest);
}

#[test]
fn a_guest_without_receive_buffers_costs_no_cpu_and_no_memory() {
    let (source, sink) = (local(), local());
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: source, port: 1, to: \"tcp://{}\"}}\n  - {{name: sink, port: 2, to: \"tcp://{}\"}}\n",
        source.local_addr().unwrap(),
        sink.local_addr().unwrap(),
    ));
    let options = DriverOptions {
        rx_buffers: 8,
        ..DriverOptions::default()
    };
    let guest = guest(
        &sidecar.path("web.sock"),
        Profile::qemu(),
        options,
        SocketOptions::default(),
    );
    let (down, up) = (guest.connect(1).unwrap(), guest.connect(2).unwrap());
    let (mut feeder, mut reader) = (accept_tcp(&source), accept_tcp(&sink));
    guest.hold_rx(true);

    const LEN: u64 = 2 << 20;
    let feeding = thread::spawn(move || {
        Bytes::new(1).write_to(&mut feeder, LEN).unwrap();
        feeder
    });
    until("the guest's buffers are used up", || {
        sidecar.metric("vsock_vring_full_total", &[("queue", "rx")]) >= 1.0
    });
    // The service goes on writing into its socket for a moment; then nothing happens, and nothing is to happen.
    let settled = |from: Duration| sidecar.cpu_time() - from < Duration::from_millis(20);
    until("the sidecar sleeps", || {
        let before = sidecar.cpu_time();
        thread::sleep(Duration::from_millis(200));
        settled(before)
    });
    let (cpu, memory) = (sidecar.cpu_time(), sidecar.anonymous_memory());
    thread::sleep(Duration::from_secs(1));
    let spent = sidecar.cpu_time() - cpu;
    assert!(
        spent < Duration::from_millis(100),
        "{spent:?} of CPU in a second of waiting"
    );

    // The other direction goes on, as far as credit goes without updates.
    (&up).write_all(&Bytes::new(2).take(100_000)).unwrap();
    Bytes::new(2).expect_from(&mut reader, 100_000);
    let grown = sidecar.anonymous_memory().saturating_sub(memory);
    assert!(grown < 1 << 20, "grew by {grown} bytes");

    guest.hold_rx(false);
    down.set_read_timeout(Some(LONG));
    Bytes::new(1).expect_from(&down, LEN);
    drop(feeding.join().unwrap());
    assert_eq!((&down).read(&mut [0; 1]).unwrap(), 0);
    until("waiting time was counted", || {
        sidecar.metric("vsock_vring_full_seconds_total", &[("queue", "rx")]) >= 1.0
    });
    assert_lawful(&guest);
}

/// A guest application that reads nothing: its credit is used up, which is a stall of that connection alone.
#[test]
fn a_guest_application_that_does_not_read_stalls_its_service_only() {
    let (source, other) = (local(), serve(echo));
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: source, port: 1, to: \"tcp://{}\"}}\n  - {{name: echo, port: 2, to: \"tcp://127.0.0.1:{other}\"}}\n",
        source.local_addr().unwrap(),
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let lazy = guest.connect(1).unwrap();
    let mut feeder = accept_tcp(&source);
    const LEN: u64 = 4 << 20;
    let feeding = thread::spawn(move || Bytes::new(1).write_to(&mut feeder, LEN).unwrap());
    let stalls = [("direction", "host_to_guest")];
    until("the credit is used up", || {
        sidecar.metric("vsock_credit_stalls_total", &stalls) >= 1.0
    });
    let cpu = sidecar.cpu_time();
    thread::sleep(Duration::from_millis(500));
    assert!(sidecar.cpu_time() - cpu < Duration::from_millis(100), "it spins");
    let mut brisk = guest.connect(2).unwrap();
    brisk.write_all(b"ping").unwrap();
    brisk.read_exact(&mut [0; 4]).unwrap();

    lazy.set_read_timeout(Some(LONG));
    Bytes::new(1).expect_from(&lazy, LEN);
    feeding.join().unwrap();
    assert!(sidecar.metric("vsock_credit_stall_seconds_total", &stalls) > 0.4);
    assert_lawful(&guest);
}

#[test]
fn ten_thousand_idle_connections_stay_open_at_a_few_kib_each() {
    const COUNT: usize = 10_000;
    raise_descriptor_limit();
    let sidecar = Sidecar::start(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {socket: \"{dir}/web.sock\"}\n  \
         outbound: [{name: many, port: 1, to: \"unix://{dir}/many.sock\"}]\n  limits: {connections: 16384}\n",
    );
    let listener = UnixListener::bind(sidecar.path("many.sock")).unwrap();
    let guest = Arc::new(linux(&sidecar.path("web.sock")));
    let mut first = guest.connect(1).unwrap();
    let mut ends = vec![accept_unix(&listener)];
    let before = sidecar.anonymous_memory();

    let connecting = thread::spawn({
        let guest = Arc::clone(&guest);
        move || (1..COUNT).map(|_| guest.connect(1).unwrap()).collect::<Vec<_>>()
    });
    for _ in 1..COUNT {
        ends.push(accept_unix(&listener));
    }
    let mut streams = connecting.join().unwrap();
    assert_eq!(sidecar.metric("vsock_connections_active", &[]), COUNT as f64);
    let each = sidecar.anonymous_memory().saturating_sub(before) / (COUNT as u64 - 1);
    println!("{each} bytes of the sidecar's memory a connection");
    assert!(each < 8 << 10, "{each} bytes a connection");
    assert!(sidecar.descriptors() < COUNT + 100, "one descriptor a connection");

    // All of them are alive, the first and the last too, and idle ones cost no time.
    let cpu = sidecar.cpu_time();
    thread::sleep(Duration::from_millis(500));
    assert!(
        sidecar.cpu_time() - cpu < Duration::from_millis(100),
        "idle connections cost time"
    );
    streams.push(first.try_clone().unwrap());
    first.write_all(b"1").unwrap();
    ends[0].read_exact(&mut [0; 1]).unwrap();
    for (index, stream) in streams.iter().enumerate().step_by(500) {
        (&*stream).write_all(&(index as u32).to_le_bytes()).unwrap();
    }
    // Accepted in the order of connect, so the same index leads to the other end.
    for index in (0..COUNT - 1).step_by(500) {
        let mut got = [0; 4];
        ends[index + 1].read_exact(&mut got).unwrap();
        assert_eq!(u32::from_le_bytes(got), index as u32);
    }

    // They all end with the VMM, and nothing of them is left.
    guest.kill();
    for mut end in ends {
        let _ = end.read(&mut [0; 1]);
    }
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    until("the descriptors are given back", || sidecar.descriptors() < 100);
}

/// Descriptors run out: what needs one is refused by name, what is open goes on, nothing spins, and it works again.
#[test]
fn descriptors_that_run_out_are_refusals_by_name() {
    let port = serve(echo);
    let inbound = free_port();
    let sidecar = Sidecar::start_with_descriptors(
        64,
        &format!(
            "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
             outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n  \
             inbound: [{{name: in, listen: \"tcp://127.0.0.1:{inbound}\", port: 22}}]\n"
        ),
    );
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(22).unwrap();
    let mut held = Vec::new();
    let mut failures = 0;
    while failures < 20 {
        match guest.connect(7) {
            Ok(stream) => held.push(stream),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                failures += 1;
            }
        }
        assert!(held.len() < 64);
    }
    println!("{} connections of 64 descriptors", held.len());
    let labels = [("rule", "echo"), ("reason", "descriptors")];
    assert!(sidecar.metric("vsock_connections_refused_total", &labels) >= 20.0);
    // The first of them used up the budget, and nothing of the reserve: who asks many questions at once is answered.
    let scrapes: Vec<_> = std::iter::repeat_with(|| sidecar.try_get("/metrics"))
        .take(8)
        .collect();
    assert!(scrapes.iter().all(|scrape| matches!(scrape, Some((200, _)))));
    let limit = sidecar.metric("vsock_sidecar_descriptors_limit", &[]);
    assert_eq!(sidecar.metric("vsock_sidecar_descriptors", &[]), limit);
    assert_eq!(held.len() as f64, limit);
    let warnings = |message: &str| {
        let loud = |event: &&serde_json::Value| field(event, "level") == "WARN";
        let events = sidecar.logged(message, |event| loud(&event));
        let remedies = events.iter().filter(loud).map(|event| field(event, "remedy"));
        remedies.collect::<Vec<_>>()
    };
    let said = warnings("refused: a limit is reached (further ones are counted, and told once a minute)");
    assert_eq!(said.len(), 1, "{}", sidecar.log_tail());
    assert!(said[0].contains("RLIMIT_NOFILE"), "{said:?}");
    let cpu = sidecar.cpu_time();
    // A client is closed at once, and counted.
    let mut client = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(
        client.read(&mut [0; 1]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    let labels = [("rule", "in"), ("reason", "descriptors")];
    sidecar.until_metric("vsock_connections_refused_total", &labels, 1.0);
    assert_eq!(
        warnings("clients are closed: the file descriptors that connections may have are used up").len(),
        1
    );
    thread::sleep(Duration::from_secs(1));
    assert!(sidecar.cpu_time() - cpu < Duration::from_millis(150), "it spins");
    for stream in &mut held {
        stream.write_all(b"alive").unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
    }
    held.truncate(held.len() / 2);
    // Now there is room again, for the guest and for who waited.
    until("a connection is possible again", || guest.connect(7).is_ok());
    let _client = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
    let mut server = listener.accept_timeout(LONG).unwrap();
    let _ = server.write_all(b"x");
    assert_lawful(&guest);
}

/// Targets that do not answer cost other connections nothing: dials do not happen on the data path.
#[test]
fn dials_that_hang_delay_nobody() {
    let full = rustix_listener_with_backlog_zero();
    let hole = full.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&hole, Duration::from_millis(200)) {
        queued.push(stream);
    }
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: echo, port: 1, to: \"tcp://127.0.0.1:{}\"}}\n  - {{name: hole, port: 2, to: \"tcp://{hole}\"}}\n  \
         limits: {{connectTimeout: 1500ms}}\n",
        serve(echo),
    ));
    let guest = Arc::new(linux(&sidecar.path("web.sock")));
    let mut stream = guest.connect(1).unwrap();
    stream.set_read_timeout(Some(LONG));
    let hanging: Vec<_> = (0..50)
        .map(|_| {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.connect(2).map(drop).unwrap_err().kind())
        })
        .collect();
    until("the dials hang", || {
        sidecar.metric("vsock_tcp_dials_total", &[("rule", "hole")]) == 50.0
    });
    let mut slowest = Duration::ZERO;
    for _ in 0..100 {
        let started = Instant::now();
        stream.write_all(b"ping").unwrap();
        stream.read_exact(&mut [0; 4]).unwrap();
        slowest = slowest.max(started.elapsed());
    }
    println!("slowest round trip beside 50 dials: {slowest:?}");
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    for dial in hanging {
        assert_eq!(dial.join().unwrap(), ErrorKind::ConnectionReset);
    }
    let labels = [("rule", "hole"), ("reason", "dial_timeout")];
    assert_eq!(sidecar.metric("vsock_connections_refused_total", &labels), 50.0);
    assert_lawful(&guest);
}

/// Each bound has its own reason, and is in the way of nobody but those whom it bounds.
#[test]
fn each_limit_refuses_by_its_own_name() {
    let port = serve(echo);
    let inbound = free_port();
    let sidecar = Sidecar::start(&format!(
        "limits: {{connections: 5}}\nguests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: few, port: 1, to: \"tcp://127.0.0.1:{port}\", connections: 2}}\n  \
         - {{name: many, port: 2, to: \"tcp://127.0.0.1:{port}\"}}\n  \
         inbound: [{{name: one, listen: \"tcp://127.0.0.1:{inbound}\", port: 22, connections: 1}}]\n\
         - name: fast\n  cid: 4\n  vhostUser: {{socket: \"{{dir}}/fast.sock\"}}\n  outbound:\n  \
         - {{name: echo, port: 1, to: \"tcp://127.0.0.1:{port}\"}}\n  limits: {{connectionsPerSecond: 1}}\n"
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(22).unwrap();
    let counted = |rule: &str, reason: &str| {
        sidecar.metric(
            "vsock_connections_refused_total",
            &[("rule", rule), ("reason", reason)],
        )
    };
    let mut held = vec![guest.connect(1).unwrap(), guest.connect(1).unwrap()];
    refused(&guest, 1);
    assert_eq!(counted("few", "rule_limit"), 1.0);

    let _client = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
    let _server = listener.accept_timeout(LONG).unwrap();
    let mut second = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
    second.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(
        second.read(&mut [0; 1]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    sidecar.until_metric(
        "vsock_connections_refused_total",
        &[("rule", "one"), ("reason", "rule_limit")],
        1.0,
    );

    held.extend([guest.connect(2).unwrap(), guest.connect(2).unwrap()]);
    assert_eq!(sidecar.metric("vsock_sidecar_connections", &[]), 5.0);
    refused(&guest, 2);
    assert_eq!(counted("many", "sidecar_limit"), 1.0);
    // Another guest is refused for it too: that is what it is for.
    let other = linux(&sidecar.path("fast.sock"));
    refused(&other, 1);
    assert_eq!(counted("echo", "sidecar_limit"), 1.0);

    for stream in &mut held {
        stream.write_all(b"alive").unwrap();
        stream.read_exact(&mut [0; 5]).unwrap();
    }
    held.truncate(2);
    sidecar.until_metric("vsock_sidecar_connections", &[], 3.0);
    // The first one is let in; of those that follow at once, one a second.
    let first = other.connect(1).unwrap();
    drop(first);
    let mut too_fast = 0;
    while counted("echo", "rate_limit") == 0.0 {
        too_fast += usize::from(other.connect(1).is_err());
        assert!(too_fast < 10, "the rate has no reason of its own");
    }
    until("the rate lets another one in", || other.connect(1).is_ok());

    for (rule, key) in [
        ("few", "`connections` of the rule"),
        ("one", "`connections` of the rule"),
        ("many", "of the file"),
        ("echo", "connectionsPerSecond"),
    ] {
        let refused = "refused: a limit is reached (further ones are counted, and told once a minute)";
        sidecar.logged(refused, |event| {
            field(event, "rule") == rule && field(event, "remedy").contains(key)
        });
    }
    assert_lawful(&guest);
    assert_lawful(&other);
}

/// Clients who find the guest full are refused for that, and do not use up the rate of those who come when it is not.
#[test]
fn clients_whom_the_guest_has_no_room_for_do_not_use_up_its_rate() {
    let port = serve(echo);
    let inbound = free_port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n  \
         inbound: [{{name: in, listen: \"tcp://127.0.0.1:{inbound}\", port: 22}}]\n  \
         limits: {{connections: 1, connectionsPerSecond: 1}}\n"
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(22).unwrap();
    let only = guest.connect(7).unwrap();
    for _ in 0..5 {
        let client = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        read_to_end(&client);
    }
    let refused = |reason| {
        let labels = [("rule", "in"), ("reason", reason)];
        sidecar.metric("vsock_connections_refused_total", &labels)
    };
    assert_eq!((refused("limit"), refused("rate_limit")), (5.0, 0.0));
    drop(only);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    until("there is room", || {
        sidecar.metric("vsock_sidecar_connections", &[]) == 0.0
    });
    let _client = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
    let _server = listener.accept_timeout(LONG).unwrap();
    assert_lawful(&guest);
}

/// Services that do not read: their guest's bytes get as much memory as the guest may have. The connection that needs more ends;
/// all others go on, and new ones are made.
#[test]
fn memory_that_is_used_up_ends_the_connection_that_needs_it() {
    let stalled = local();
    let port = serve(echo);
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: stalled, port: 1, to: \"tcp://{}\"}}\n  - {{name: echo, port: 2, to: \"tcp://127.0.0.1:{port}\"}}\n  \
         limits: {{buffer: 1MiB, memory: 1MiB}}\n",
        stalled.local_addr().unwrap(),
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let mut lively = guest.connect(2).unwrap();
    lively.set_read_timeout(Some(LONG));
    let mut stuck = Vec::new();
    let mut peers = Vec::new();
    let closed = || {
        sidecar.metric(
            "vsock_connections_closed_total",
            &[("rule", "stalled"), ("reason", "memory")],
        )
    };
    while closed() == 0.0 {
        assert!(stuck.len() < 4, "nothing bounds the memory");
        let stream = guest.connect(1).unwrap();
        peers.push(accept_tcp(&stalled));
        // Until neither the socket nor the buffer take any more, or the connection ends.
        stream.set_write_timeout(Some(Duration::from_millis(500)));
        let chunk = vec![7; 32 * 1024];
        let mut sent = 0u64;
        let error = loop {
            match (&stream).write(&chunk) {
                Ok(n) => sent += n as u64,
                Err(error) => break error.kind(),
            }
            assert!(sent < 64 << 20, "nothing stops the guest");
        };
        println!("connection {}: {sent} bytes, then {error}", stuck.len());
        let held = sidecar.metric("vsock_buffer_memory_bytes", &[]);
        assert!(held <= f64::from(1 << 20), "{held} bytes");
        stuck.push(stream);
    }
    assert!(stuck.len() > 1, "one alone may have it all");
    assert_eq!(closed(), 1.0, "the one that needed more");
    let limit = sidecar.metric("vsock_buffer_memory_limit_bytes", &[]);
    assert_eq!(limit, f64::from(1 << 20));
    let events = sidecar.logged(
        "no memory for what a service does not read: its connection is ended (further ones are counted)",
        |_| true,
    );
    assert_eq!(events.len(), 1, "{}", sidecar.log_tail());
    assert!(field(&events[0], "remedy").contains("limits.memory"));

    lively.write_all(b"alive").unwrap();
    lively.read_exact(&mut [0; 5]).unwrap();
    let mut fresh = guest.connect(2).unwrap();
    fresh.write_all(b"alive").unwrap();
    fresh.read_exact(&mut [0; 5]).unwrap();
    drop((stuck, peers));
    sidecar.until_metric("vsock_buffer_memory_bytes", &[], 0.0);
    sidecar.until_metric("vsock_sidecar_buffer_memory_bytes", &[], 0.0);
    // What the guest had in its ring behind the packet that was one too many is for no connection any more, and is answered
    // as such: more resets, which are the only thing that its judge may find odd.
    let violations = guest.stats().violations;
    assert_eq!(
        violations.total(),
        violations.count(Violation::UnexpectedRst),
        "{violations:?}"
    );
}
