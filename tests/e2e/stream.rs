//! Bytes, both ways, in every form that guests and rules give them.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use vsock_sidecar::embedded_guest::profile::feature;
use vsock_sidecar::embedded_guest::{
    DriverOptions, EmbeddedGuest, GuestStream, Profile, RxLayout, Shape, SocketOptions, Sockets,
};
use vsock_sidecar::vsock::{Cid, Header, Op, Port};

use crate::support::*;

/// Sends `len` bytes through an echo service and checks what comes back, the end of file included.
#[track_caller]
fn echo_through(stream: &GuestStream, seed: u64, len: u64) {
    stream.set_read_timeout(Some(LONG));
    stream.set_write_timeout(Some(LONG));
    thread::scope(|scope| {
        scope.spawn(|| {
            Bytes::new(seed).write_to(stream, len).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        Bytes::new(seed).expect_from(stream, len);
        let mut end = [0; 1];
        assert_eq!((&*stream).read(&mut end).unwrap(), 0, "the end of the stream");
    });
}

#[test]
fn every_shape_and_layout_of_every_guest_carries_every_byte() {
    let port = serve(echo);
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n"
    ));
    let qemu = Profile::qemu;
    let rx = |rx: RxLayout, queue_size: u16| DriverOptions {
        rx,
        queue_size,
        tx_slots: 64,
        ..DriverOptions::default()
    };
    let small = RxLayout::LINUX_6_12;
    let rows: Vec<(&str, Profile, DriverOptions, Shape)> = vec![
        (
            "linux 6.1",
            qemu(),
            rx(RxLayout::TwoDescriptors, 128),
            Shape::header_then_payload(),
        ),
        ("linux 6.12", qemu(), rx(small.clone(), 128), Shape::linux_6_12()),
        (
            "linux 6.2",
            qemu(),
            rx(RxLayout::for_payload(4096), 128),
            Shape::header_then_payload(),
        ),
        (
            "no event index, no indirect tables",
            qemu().without(feature::EVENT_IDX | feature::INDIRECT_DESC),
            rx(small.clone(), 128),
            Shape::linux_6_12(),
        ),
        (
            "17 fragments in a table",
            qemu(),
            rx(small.clone(), 128),
            Shape::page_fragments(100).indirect(),
        ),
        (
            "17 fragments in the ring",
            qemu().without(feature::INDIRECT_DESC),
            rx(small.clone(), 128),
            Shape::page_fragments(1).direct(),
        ),
        (
            "one descriptor",
            qemu(),
            rx(RxLayout::for_payload(65536), 128),
            Shape::single(),
        ),
        (
            "ring of 1024",
            qemu(),
            rx(small.clone(), 1024),
            Shape::linux_6_12(),
        ),
        (
            "ring of 4",
            qemu(),
            rx(RxLayout::TwoDescriptors, 4),
            Shape::header_then_payload(),
        ),
        (
            "header in 5 parts",
            qemu(),
            rx(small.clone(), 128),
            Shape::split_header(5),
        ),
        (
            "header in 44 parts",
            qemu(),
            rx(small.clone(), 128),
            Shape::split_header(44),
        ),
        (
            "receive buffers in odd pieces",
            qemu(),
            rx(RxLayout::Pieces(vec![1, 43, 7, 1000, 3]), 128),
            Shape::cuts(&[40, 0, 1000, 1]),
        ),
        (
            "receive buffers with the header split",
            qemu().without(feature::INDIRECT_DESC),
            rx(RxLayout::Pieces(vec![20, 30, 4000]), 128),
            Shape::cuts(&[30, 30]).scattered(),
        ),
        (
            "cloud-hypervisor",
            Profile::cloud_hypervisor(),
            rx(small.clone(), 256),
            Shape::linux_6_12(),
        ),
        (
            "libkrun",
            Profile::libkrun(),
            rx(small.clone(), 128),
            Shape::every(5000),
        ),
    ];
    for (seed, (what, profile, options, shape)) in rows.into_iter().enumerate() {
        println!("{what}");
        // 64 KiB in 44-byte steps would not fit a slot.
        let max_packet = if matches!(what, "libkrun") {
            32 * 1024
        } else {
            64 * 1024
        };
        let sockets = SocketOptions {
            shape,
            max_packet,
            ..SocketOptions::default()
        };
        let guest = guest(&sidecar.path("web.sock"), profile, options, sockets);
        assert_eq!(guest.with_front_end(|f| f.unwrap().negotiated().guest_cid), 3);
        let stream = guest.connect(7).unwrap();
        echo_through(&stream, seed as u64, 1 << 20);
        drop(stream);
        until("the connection is over", || guest.open_connections() == 0);
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        until("the session is over", || {
            sidecar.metric("vsock_session_active", &[]) == 0.0
        });
    }
    assert_eq!(sidecar.metric("vsock_misbehavior_total", &[]), 0.0);
    assert_eq!(sidecar.metric("vsock_vring_errors_total", &[]), 0.0);
}

#[test]
fn bulk_goes_both_ways_over_tcp_and_unix() {
    const LEN: u64 = 8 << 20;
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = tcp.local_addr().unwrap().port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: tcp, port: 1, to: \"tcp://127.0.0.1:{port}\"}}\n  \
         - {{name: unix, port: 2, to: \"unix://{{dir}}/service.sock\"}}\n"
    ));
    let unix = UnixListener::bind(sidecar.path("service.sock")).unwrap();
    let guest = linux(&sidecar.path("web.sock"));
    fn both_ways(stream: GuestStream, mut host: impl Service) {
        stream.set_read_timeout(Some(LONG));
        stream.set_write_timeout(Some(LONG));
        thread::scope(|scope| {
            scope.spawn(|| Bytes::new(1).write_to(&stream, LEN).unwrap());
            Bytes::new(1).expect_from(&mut host, LEN);
        });
        thread::scope(|scope| {
            scope.spawn(|| {
                Bytes::new(2).write_to(&mut host, LEN).unwrap();
            });
            Bytes::new(2).expect_from(&stream, LEN);
        });
    }
    both_ways(guest.connect(1).unwrap(), accept_tcp(&tcp));
    both_ways(guest.connect(2).unwrap(), accept_unix(&unix));
    until("the connections are over", || guest.open_connections() == 0);
    assert_lawful(&guest);
    for (direction, bytes) in [("guest_to_host", 2 * LEN), ("host_to_guest", 2 * LEN)] {
        assert_eq!(
            sidecar.metric("vsock_payload_bytes_total", &[("direction", direction)]),
            bytes as f64
        );
        for rule in ["tcp", "unix"] {
            let labels = [("direction", direction), ("rule", rule)];
            assert_eq!(sidecar.metric("vsock_upstream_bytes_total", &labels), LEN as f64);
        }
    }
}

#[test]
fn a_range_keeps_its_offset_and_a_unix_path_is_filled_in() {
    let base = free_port();
    let second = TcpListener::bind((Ipv4Addr::LOCALHOST, base + 1));
    let Ok(second) = second else {
        // Somebody has the neighbour; which port it is does not matter.
        return a_range_keeps_its_offset_and_a_unix_path_is_filled_in();
    };
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 77\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound:\n  \
         - {{name: range, ports: 8000-8009, to: \"tcp://127.0.0.1:{base}\"}}\n  \
         - {{name: fc, ports: 50000-50009, to: \"unix://{{dir}}/vm{{cid}}.sock_{{port}}\"}}\n"
    ));
    let filled = UnixListener::bind(sidecar.path("vm77.sock_50003")).unwrap();
    let guest = linux(&sidecar.path("web.sock"));

    let mut ranged = guest.connect(8001).unwrap();
    ranged.write_all(b"one up").unwrap();
    let mut got = [0; 6];
    accept_tcp(&second).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"one up");

    let mut named = guest.connect(50003).unwrap();
    named.write_all(b"named").unwrap();
    let mut got = [0; 5];
    accept_unix(&filled).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"named");

    let error = guest.connect(50004).unwrap_err();
    assert_eq!(
        error.kind(),
        std::io::ErrorKind::ConnectionReset,
        "nobody has vm77.sock_50004"
    );
    assert_eq!(
        sidecar.metric(
            "vsock_connections_refused_total",
            &[("rule", "fc"), ("reason", "dial_refused")]
        ),
        1.0
    );
}

#[test]
fn a_hundred_connections_at_once_keep_their_bytes_apart() {
    let port = serve(echo);
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n"
    ));
    let guest = Arc::new(linux(&sidecar.path("web.sock")));
    let clients: Vec<_> = (0..100)
        .map(|seed| {
            let guest = Arc::clone(&guest);
            thread::spawn(move || echo_through(&guest.connect(7).unwrap(), seed, 100_000))
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    until("the connections are over", || guest.open_connections() == 0);
    assert_lawful(&guest);
    assert_eq!(sidecar.metric("vsock_connections_opened_total", &[]), 100.0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    assert_eq!(sidecar.metric("vsock_buffered_bytes", &[]), 0.0);
}

/// A sidecar with one rule to `listener`, and a guest connected through it.
fn pair(listener: &TcpListener, limits: &str) -> (Sidecar, Sockets, GuestStream, TcpStream) {
    let port = listener.local_addr().unwrap().port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: service, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n{limits}"
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let stream = guest.connect(7).unwrap();
    stream.set_read_timeout(Some(LONG));
    stream.set_write_timeout(Some(LONG));
    let host = accept_tcp(listener);
    (sidecar, guest, stream, host)
}

fn local() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
}

#[test]
fn a_guest_that_is_done_sending_still_gets_the_whole_answer() {
    let (sidecar, guest, mut stream, mut host) = pair(&local(), "");
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut question = Vec::new();
    host.read_to_end(&mut question).unwrap();
    assert_eq!(question, b"question");

    Bytes::new(9).write_to(&mut host, 1 << 20).unwrap();
    drop(host);
    Bytes::new(9).expect_from(&stream, 1 << 20);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!(!stream.was_reset(), "an orderly end");
    drop(stream);
    until("the connection is over", || guest.open_connections() == 0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    assert_lawful(&guest);
}

#[test]
fn a_service_that_is_done_sending_still_gets_everything() {
    let (sidecar, guest, mut stream, mut host) = pair(&local(), "");
    host.write_all(b"greeting").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut greeting = Vec::new();
    stream.read_to_end(&mut greeting).unwrap();
    assert_eq!(greeting, b"greeting");

    let writer = thread::spawn(move || {
        Bytes::new(4).write_to(&stream, 1 << 20).unwrap();
        drop(stream);
    });
    Bytes::new(4).expect_from(&mut host, 1 << 20);
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0, "the end after the last byte");
    writer.join().unwrap();
    until("the connection is over", || guest.open_connections() == 0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    assert_lawful(&guest);
}

/// Linux's close() sends SHUTDOWN of both directions at once, with data still in the ring: what was sent before counts.
#[test]
fn a_guest_that_sends_and_closes_has_everything_delivered_to_a_slow_reader() {
    let (sidecar, guest, stream, mut host) = pair(&local(), "");
    Bytes::new(5).write_to(&stream, 200_000).unwrap();
    drop(stream);
    until("the guest's RST has come or is on its way", || {
        sidecar.metric(
            "vsock_packets_total",
            &[("op", "shutdown"), ("direction", "guest_to_host")],
        ) == 1.0
    });
    // A reader that takes its time: small pieces, pauses.
    let mut expected = Bytes::new(5);
    for _ in 0..20 {
        expected.expect_from(&mut host, 10_000);
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0, "an orderly end, no reset");
    until("the connection is over", || guest.open_connections() == 0);
    sidecar.until_metric(
        "vsock_connections_closed_total",
        &[("reason", "guest_shutdown")],
        1.0,
    );
    assert_lawful(&guest);
}

#[test]
fn a_service_that_sends_and_closes_has_everything_delivered_to_a_slow_guest() {
    let (sidecar, guest, mut stream, mut host) = pair(&local(), "");
    let writer = thread::spawn(move || {
        Bytes::new(6).write_to(&mut host, 1 << 20).unwrap();
        drop(host);
    });
    let mut expected = Bytes::new(6);
    for _ in 0..32 {
        expected.expect_from(&stream, 32 * 1024);
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    writer.join().unwrap();
    drop(stream);
    until("the connection is over", || guest.open_connections() == 0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    assert_lawful(&guest);
}

/// The service crashes (RST): the guest hears of it, and what it still wanted to send is no error of anybody else.
#[test]
fn a_reset_of_the_service_is_a_reset_for_the_guest() {
    let (sidecar, guest, mut stream, host) = pair(&local(), "");
    rustix::net::sockopt::set_socket_linger(&host, Some(Duration::ZERO)).unwrap();
    drop(host);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(stream.was_reset());
    drop(stream);
    until("the connection is over", || guest.open_connections() == 0);
    sidecar.until_metric("vsock_connections_closed_total", &[("reason", "peer_rst")], 1.0);
}

#[test]
fn a_reset_of_the_guest_is_a_reset_for_the_service() {
    let (sidecar, _guest, mut stream, mut host) = pair(&local(), "");
    stream.write_all(b"x").unwrap();
    host.read_exact(&mut [0; 1]).unwrap();
    stream.abort();
    let error = host.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    sidecar.until_metric("vsock_connections_closed_total", &[("reason", "guest_rst")], 1.0);
}

/// systemd binds the same port again as soon as a connection is over; a reset that is late for the old connection must not
/// kill the new one.
#[test]
fn a_port_can_be_used_again_at_once() {
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{}\"}}]\n",
        serve(echo)
    ));
    let mut guest = EmbeddedGuest::boot(
        &sidecar.path("web.sock"),
        Profile::qemu(),
        DriverOptions::default(),
    )
    .unwrap();
    let packet = |op: Op, flags: u32| Header {
        src_cid: Cid(3),
        dst_cid: Cid::HOST,
        src_port: Port(4711),
        dst_port: Port(7),
        len: 0,
        socket_type: 1,
        op: op as u16,
        flags,
        buf_alloc: 65536,
        fwd_cnt: 0,
    };
    let next_op = |guest: &mut EmbeddedGuest| guest.driver.recv_packet(LONG).unwrap().header.op;
    let send = |guest: &mut EmbeddedGuest, header: Header| {
        let driver = &mut guest.driver;
        driver
            .send_packet_wait(&header, &[], &Shape::single(), LONG)
            .unwrap();
    };
    for round in 0..200 {
        send(&mut guest, packet(Op::Request, 0));
        assert_eq!(next_op(&mut guest), Op::Response as u16, "round {round}");
        if round % 2 == 0 {
            // Reset: no answer, and the port is free at once.
            send(&mut guest, packet(Op::Rst, 0));
        } else {
            // Closed in order: the port is free when the RST has come, and there is one RST only.
            send(&mut guest, packet(Op::Shutdown, 3));
            assert_eq!(next_op(&mut guest), Op::Rst as u16, "round {round}");
        }
    }
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    assert!(guest.driver.try_recv().unwrap().is_none(), "nothing more to say");
    assert_eq!(sidecar.metric("vsock_misbehavior_total", &[]), 0.0);
    assert_eq!(sidecar.metric("vsock_connections_opened_total", &[]), 200.0);
}

#[test]
fn a_connection_that_is_idle_too_long_ends() {
    let listener = local();
    let (sidecar, guest, mut stream, mut host) = pair(&listener, "  limits: {idleTimeout: 400ms}\n");
    // Bytes in either direction keep it alive.
    for _ in 0..10 {
        host.write_all(b"x").unwrap();
        stream.read_exact(&mut [0; 1]).unwrap();
        thread::sleep(Duration::from_millis(60));
    }
    assert_eq!(sidecar.metric("vsock_connections_active", &[]), 1.0);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!(stream.was_reset());
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0, "an end and no error");
    sidecar.until_metric(
        "vsock_connections_closed_total",
        &[("reason", "idle_timeout")],
        1.0,
    );
    drop(stream);
    assert_lawful(&guest);
}

/// SHUTDOWN flags are two sets that only grow: RCV first, SEND later, each passed on when it comes.
#[test]
fn both_halves_can_be_closed_one_after_the_other_in_either_order() {
    let listener = local();
    let (sidecar, guest, mut stream, mut host) = pair(&listener, "");
    stream.shutdown(Shutdown::Read).unwrap();
    stream.write_all(b"still sending").unwrap();
    let mut got = [0; 13];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still sending");
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    until("the connection is over", || guest.open_connections() == 0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);

    // The host closes its writing half, then the guest its own, then nothing is left.
    let mut stream = guest.connect(7).unwrap();
    let mut host = accept_tcp(&listener);
    TcpStream::shutdown(&host, Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    stream.write_all(b"bye").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut host), b"bye");
    until("the connection is over", || guest.open_connections() == 0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    assert_lawful(&guest);
}

/// Cloud Hypervisor pauses a device by disabling its rings, and resumes it by enabling them: the guest remembers its
/// connections, and so do we.
#[test]
fn rings_that_are_disabled_and_enabled_again_lose_no_connection_and_no_byte() {
    let listener = local();
    let (sidecar, guest, stream, mut host) = pair(&listener, "");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = StopOnDrop(&over);
        let pausing = scope.spawn(|| {
            let mut pauses = 0;
            while !over.load(Ordering::Relaxed) || pauses == 0 {
                pauses += 1;
                for enable in [false, true] {
                    guest.with_front_end(|front_end| {
                        let front_end = front_end.unwrap();
                        for ring in [0, 1] {
                            front_end.set_vring_enable(ring, enable).unwrap();
                        }
                    });
                    thread::sleep(Duration::from_millis(2));
                }
            }
            pauses
        });
        scope.spawn(|| {
            // An error is the reader's to report.
            let _ = Bytes::new(2).write_to(&stream, 4 << 20);
        });
        Bytes::new(2).expect_from(&mut host, 4 << 20);
        drop(stop);
        println!("{} pauses", pausing.join().unwrap());
    });
    host.write_all(b"on").unwrap();
    (&stream).read_exact(&mut [0; 2]).unwrap();

    // Paused, and then stopped in earnest: now the host hears of it at once.
    guest.with_front_end(|front_end| {
        let front_end = front_end.unwrap();
        for ring in [0, 1] {
            front_end.set_vring_enable(ring, false).unwrap();
        }
        // Processed in order: with the answer, the rings are disabled.
        front_end.config(0, 8).unwrap();
        assert_eq!(sidecar.metric("vsock_connections_active", &[]), 1.0);
        for ring in [0, 1] {
            front_end.vring_base(ring).unwrap();
        }
    });
    read_to_end(&mut host);
    sidecar.until_metric(
        "vsock_connections_closed_total",
        &[("reason", "session_lost")],
        1.0,
    );
    assert_lawful(&guest);
}

const INBOUND: &str = "guests:\n- name: web\n  cid: 3\n  vhostUser: {socket: \"{dir}/web.sock\"}\n  \
    inbound:\n  - {name: ssh, listen: \"tcp://127.0.0.1:{port}\", port: 22}\n  \
    - {name: local, listen: \"unix://{dir}/in.sock\", port: 23}\n  \
    - {name: mux, listen: \"unix://{dir}/mux.sock\", protocol: connect}\n  \
    limits: {guestTimeout: 500ms}\n";

fn inbound() -> (Sidecar, u16) {
    let port = free_port();
    (
        Sidecar::start(&INBOUND.replace("{port}", &port.to_string())),
        port,
    )
}

#[test]
fn clients_of_tcp_and_unix_listeners_reach_servers_in_the_guest() {
    let (sidecar, port) = inbound();
    let guest = linux(&sidecar.path("web.sock"));
    let (ssh, local) = (guest.listen(22).unwrap(), guest.listen(23).unwrap());
    fn serve_guest(server: GuestStream, mut client: impl Service) {
        client.patient();
        server.set_read_timeout(Some(LONG));
        let echo = thread::spawn(move || {
            let mut server = server;
            let mut chunk = vec![0; 65536];
            loop {
                match server.read(&mut chunk).unwrap() {
                    0 => break,
                    n => server.write_all(&chunk[..n]).unwrap(),
                }
            }
        });
        for seed in 0..20 {
            let sent = Bytes::new(seed).take(10_000);
            client.write_all(&sent).unwrap();
            Bytes::new(seed).expect_from(&mut client, 10_000);
        }
        client.shutdown(Shutdown::Write);
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        echo.join().unwrap();
    }
    let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    serve_guest(ssh.accept_timeout(LONG).unwrap(), client);
    let client = UnixStream::connect(sidecar.path("in.sock")).unwrap();
    serve_guest(local.accept_timeout(LONG).unwrap(), client);
    until("the connections are over", || guest.open_connections() == 0);
    assert_lawful(&guest);
    for rule in ["ssh", "local"] {
        let labels = [("direction", "host_to_guest"), ("rule", rule)];
        assert_eq!(sidecar.metric("vsock_connections_opened_total", &labels), 1.0);
    }
}

#[test]
fn a_connect_line_may_come_in_pieces_and_with_the_first_bytes() {
    let (sidecar, _) = inbound();
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(52).unwrap();

    // One byte a segment.
    let mut client = UnixStream::connect(sidecar.path("mux.sock")).unwrap();
    client.patient();
    for byte in b"CONNECT 52\n" {
        client.write_all(&[*byte]).unwrap();
    }
    let mut server = listener.accept_timeout(LONG).unwrap();
    let mut ok = [0; 3];
    client.read_exact(&mut ok).unwrap();
    assert_eq!(&ok, b"OK ");
    let mut number = Vec::new();
    while number.last() != Some(&b'\n') {
        let mut byte = [0; 1];
        client.read_exact(&mut byte).unwrap();
        number.push(byte[0]);
    }
    let number: u32 = String::from_utf8(number).unwrap().trim().parse().unwrap();
    assert_eq!(
        (2, number),
        server.peer_address(),
        "the number is the host's port as the guest sees it"
    );
    server.write_all(b"hello").unwrap();
    let mut hello = [0; 5];
    client.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");

    // Line and payload in one write, more payload behind it: nothing is lost, nothing overtakes.
    let mut client = UnixStream::connect(sidecar.path("mux.sock")).unwrap();
    client.patient();
    let mut all = b"CONNECT 52\n".to_vec();
    all.extend(Bytes::new(3).take(700));
    client.write_all(&all).unwrap();
    let mut rest = Bytes::new(3);
    rest.take(700);
    rest.write_to(&client, 50_000).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let server = listener.accept_timeout(LONG).unwrap();
    server.set_read_timeout(Some(LONG));
    Bytes::new(3).expect_from(&server, 50_700);
    assert_eq!((&server).read(&mut [0; 1]).unwrap(), 0);
    assert_lawful(&guest);
}

#[test]
fn a_connect_that_comes_to_nothing_is_closed_without_a_word() {
    let (sidecar, _) = inbound();
    // The client may see the end a moment before it is counted.
    let refused = |reason: &str, count: f64| {
        let labels = [("rule", "mux"), ("reason", reason)];
        sidecar.until_metric("vsock_connections_refused_total", &labels, count);
    };
    let ask = |line: &[u8]| {
        let mut client = UnixStream::connect(sidecar.path("mux.sock")).unwrap();
        client.patient();
        client.write_all(line).unwrap();
        read_to_end(&client)
    };

    let guest = linux(&sidecar.path("web.sock"));
    assert_eq!(ask(b"CONNECT 99\n"), b"", "nobody listens in the guest");
    refused("guest_rst", 1.0);
    assert_eq!(ask(b"GET / HTTP/1.1\r\n\r\n"), b"", "not our protocol");
    refused("bad_handshake", 1.0);
    assert_eq!(ask(b"CONNECT 4294967296\n"), b"", "no port");
    assert_eq!(
        ask(b"CONN"),
        b"",
        "half a line, then silence: the handshake times out"
    );
    refused("bad_handshake", 3.0);
    assert_lawful(&guest);
    guest.hold_rx(true);
    assert_eq!(ask(b"CONNECT 52\n"), b"", "the guest does not answer");
    refused("guest_timeout", 1.0);
    guest.hold_rx(false);
    // The late REQUEST gets its RST from the guest, or was never sent; either way the next one works.
    let listener = guest.listen(52).unwrap();
    let mut client = UnixStream::connect(sidecar.path("mux.sock")).unwrap();
    client.write_all(b"CONNECT 52\n").unwrap();
    let _server = listener.accept_timeout(LONG).unwrap();
}
