//! SEQPACKET between a guest and services: unix sockets of the same type, frames on streams, and refusals elsewhere.

mod frames;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use vsock_sidecar::embedded_guest::profile::feature;
use vsock_sidecar::embedded_guest::{
    DriverOptions, EmbeddedGuest, GuestSeqpacket, MessageCredit, Profile, RxLayout, Shape, SocketOptions,
    Sockets,
};
use vsock_sidecar::vsock::{Cid, Header, Op, Port};

use crate::support::*;

/// Around packets, receive buffers and the credit of 256 KiB; long ones behind short ones, which leave little to be told.
const LENGTHS: [usize; 14] = [
    1, 44, 4051, 4052, 4053, 262_144, 65_535, 65_536, 65_537, 200_000, 262_144, 2, 262_144, 3,
];

fn outbound(rules: &str) -> Sidecar {
    Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound: [{rules}]\n"
    ))
}

fn inbound(rules: &str) -> Sidecar {
    Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  inbound: [{rules}]\n  \
         limits: {{guestTimeout: 500ms}}\n"
    ))
}

fn local() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
}

fn patient(socket: GuestSeqpacket) -> GuestSeqpacket {
    socket.set_read_timeout(Some(LONG));
    socket.set_write_timeout(Some(LONG));
    socket
}

fn of_length(len: usize) -> Vec<u8> {
    Bytes::new(len as u64).take(len)
}

/// The bytes of the next message.
#[track_caller]
fn recv(socket: &GuestSeqpacket) -> Option<Vec<u8>> {
    socket.recv().unwrap().map(|message| message.bytes)
}

/// Sends messages of all lengths through a service that sends them back, and half-closes.
#[track_caller]
fn echo_through(socket: &GuestSeqpacket) {
    thread::scope(|scope| {
        scope.spawn(|| {
            for len in LENGTHS {
                socket.send(&of_length(len)).unwrap();
            }
            socket.shutdown(Shutdown::Write).unwrap();
        });
        for len in LENGTHS {
            let message = recv(socket).unwrap_or_else(|| panic!("the end, and not {len} bytes"));
            assert_eq!(message.len(), len);
            assert!(message == of_length(len), "other {len} bytes");
        }
        assert_eq!(recv(socket), None);
    });
}

/// A server in the guest: sends back every message until the end, then ends.
fn echo_in_guest(server: &GuestSeqpacket) {
    while let Some(message) = recv(server) {
        server.send(&message).unwrap();
    }
    server.shutdown(Shutdown::Write).unwrap();
}

/// Waits until a connection was refused for this reason, and nothing else was.
#[track_caller]
fn until_refused(sidecar: &Sidecar, reason: &str) {
    sidecar.until_metric("vsock_connections_refused_total", &[("reason", reason)], 1.0);
    assert_eq!(sidecar.metric("vsock_connections_refused_total", &[]), 1.0);
}

#[test]
fn a_unix_target_is_dialled_with_the_guests_socket_type_and_keeps_every_boundary() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let service = PacketListener::bind(&path);
    let sidecar = outbound(&format!(
        "{{name: service, port: 5, to: \"unix://{}\"}}",
        path.display()
    ));
    // As Linux sends, as a sender that waits for whole credit, in small packets; and receive buffers of all sizes.
    for (credit, max_packet, rx) in [
        (MessageCredit::AsItComes, 65_536, RxLayout::LINUX_6_12),
        (MessageCredit::Whole, 65_536, RxLayout::for_payload(65_536)),
        (MessageCredit::AsItComes, 5_000, RxLayout::TwoDescriptors),
    ] {
        let guest = guest(
            &sidecar.path("web.sock"),
            Profile::qemu(),
            DriverOptions {
                rx,
                ..Default::default()
            },
            SocketOptions {
                message_credit: credit,
                max_packet,
                ..Default::default()
            },
        );
        let socket = patient(guest.connect_seqpacket(5).unwrap());
        thread::scope(|scope| {
            scope.spawn(|| echo_packets(&service.accept()));
            echo_through(&socket);
        });
        drop(socket);
        until("the connection is over", || guest.open_connections() == 0);
        assert_lawful(&guest);
        guest.shut_down().unwrap();
        sidecar.until_metric("vsock_session_active", &[], 0.0);
    }
    let sent: usize = 3 * LENGTHS.iter().sum::<usize>();
    for direction in ["guest_to_host", "host_to_guest"] {
        let labels = [
            ("direction", direction),
            ("op", "rw"),
            ("socket_type", "seqpacket"),
        ];
        assert!(sidecar.metric("vsock_packets_total", &labels) >= 3.0 * LENGTHS.len() as f64);
        let labels = [("direction", direction), ("socket_type", "stream")];
        assert_eq!(sidecar.metric("vsock_packets_total", &labels), 0.0);
        let labels = [("direction", direction), ("rule", "service")];
        assert_eq!(sidecar.metric("vsock_upstream_bytes_total", &labels), sent as f64);
    }
}

/// A record's mark has no place in unix sockets: the message arrives all the same.
#[test]
fn empty_and_marked_messages_pass_a_unix_target() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let listener = PacketListener::bind(&path);
    let sidecar = outbound(&format!(
        "{{name: service, port: 5, to: \"unix://{}\"}}",
        path.display()
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let socket = patient(guest.connect_seqpacket(5).unwrap());
    let service = listener.accept();

    socket.send(b"").unwrap();
    socket.send_end_of_record(b"marked").unwrap();
    socket.send_end_of_record(b"").unwrap();
    socket.send(b"").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let received: Vec<_> = std::iter::from_fn(|| service.recv()).collect();
    assert_eq!(received, [&b""[..], b"marked", b"", b""]);

    // Half-closed, the other direction goes on.
    for message in [&b""[..], b"", b"back", b""] {
        service.send(message);
    }
    service.finish();
    let received: Vec<_> = std::iter::from_fn(|| recv(&socket)).collect();
    assert_eq!(received, [&b""[..], b"", b"back", b""]);
    drop(socket);
    until("the connection is over", || guest.open_connections() == 0);
    assert_lawful(&guest);
}

#[test]
fn a_unix_target_of_the_other_type_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let (packets, stream) = (dir.path().join("packets.sock"), dir.path().join("stream.sock"));
    let _packets = PacketListener::bind(&packets);
    let _stream = UnixListener::bind(&stream).unwrap();
    let sidecar = outbound(&format!(
        "{{name: packets, port: 5, to: \"unix://{}\"}}, {{name: stream, port: 6, to: \"unix://{}\"}}",
        packets.display(),
        stream.display()
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let error = guest.connect(5).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let error = guest.connect_seqpacket(6).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    for rule in ["packets", "stream"] {
        sidecar.until_metric("vsock_connections_refused_total", &[("rule", rule)], 1.0);
    }
    drop(guest.connect_seqpacket(5).unwrap());
    drop(guest.connect(6).unwrap());
    assert_lawful(&guest);
}

#[test]
fn clients_of_a_packet_listener_reach_seqpacket_servers_in_the_guest() {
    let sidecar = inbound("{name: in, listen: \"unix://{dir}/in.sock\", socketType: seqpacket, port: 5}");
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen_seqpacket(5).unwrap();
    let client = Packets::connect(&sidecar.path("in.sock"));
    // The first message may be there before the guest is asked.
    client.send(b"early");
    let server = patient(listener.accept_timeout(LONG).unwrap());
    assert_eq!(server.peer_address().0, 2);
    assert_eq!(recv(&server).unwrap(), b"early");
    thread::scope(|scope| {
        let sender = client.another();
        scope.spawn(move || {
            for len in LENGTHS {
                sender.send(&of_length(len));
            }
            sender.finish();
        });
        scope.spawn(|| echo_in_guest(&server));
        for len in LENGTHS {
            let message = client.recv().unwrap();
            assert!(message == of_length(len), "{} of {len} bytes", message.len());
        }
        assert_eq!(client.recv(), None);
    });
    drop((server, client));
    until("the connection is over", || guest.open_connections() == 0);

    // A guest that listens for streams there says no, and the client hears it.
    drop(listener);
    let _streams = guest.listen(5).unwrap();
    assert_eq!(Packets::connect(&sidecar.path("in.sock")).recv(), None);
    until_refused(&sidecar, "guest_rst");
    assert_lawful(&guest);
}

/// What the guest had begun to say when it died is no message for the service either.
#[test]
fn a_guest_that_dies_in_a_message_has_not_sent_it() {
    let listener = local();
    let path = tempfile::tempdir().unwrap();
    let path = path.path().join("service.sock");
    let packets = PacketListener::bind(&path);
    let sidecar = outbound(&format!(
        "{{name: framed, port: 70, to: \"tcp://{}\", framing: length-prefixed}}, \
         {{name: packets, port: 5, to: \"unix://{}\"}}",
        listener.local_addr().unwrap(),
        path.display()
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let (framed, packet) = (
        guest.connect_seqpacket(70).unwrap(),
        guest.connect_seqpacket(5).unwrap(),
    );
    let (mut tcp, unix) = (accept_tcp(&listener), packets.accept());
    for socket in [&framed, &packet] {
        socket.send(b"whole").unwrap();
        let begun = Header {
            src_cid: Cid(3),
            dst_cid: Cid(2),
            src_port: Port(socket.local_port()),
            dst_port: Port(socket.peer_address().1),
            len: 1000,
            socket_type: 2,
            op: Op::Rw as u16,
            flags: 0,
            buf_alloc: 256 * 1024,
            fwd_cnt: 0,
        };
        guest.with_driver(|driver| {
            driver.send_packet(&begun, &[7; 1000], &Shape::single()).unwrap();
        });
    }
    let labels = [("direction", "guest_to_host"), ("op", "rw")];
    sidecar.until_metric("vsock_packets_total", &labels, 4.0);
    guest.kill();
    assert_eq!(unix.recv().unwrap(), b"whole");
    assert_eq!(unix.recv(), None);
    assert_eq!(read_frame(&mut tcp).unwrap(), b"whole");
    let mut rest = Vec::new();
    let _ = tcp.read_to_end(&mut rest);
    assert_eq!(rest, b"", "not even its length");
}

#[test]
fn messages_are_refused_where_their_boundaries_would_be_lost() {
    let listener = local();
    let sidecar = outbound(&format!(
        "{{name: plain, port: 70, to: \"tcp://{}\"}}",
        listener.local_addr().unwrap()
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let error = guest.connect_seqpacket(70).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    until_refused(&sidecar, "unsupported_type");
    let mut stream = guest.connect(70).unwrap();
    let mut service = accept_tcp(&listener);
    stream.write_all(b"bytes").unwrap();
    let mut bytes = [0; 5];
    service.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"bytes");
    assert_lawful(&guest);
}

/// A header of the guest with CID 3 to port 5 of the host.
fn request(socket_type: u16) -> Header {
    Header {
        src_cid: Cid(3),
        dst_cid: Cid(2),
        src_port: Port(1234),
        dst_port: Port(5),
        len: 0,
        socket_type,
        op: Op::Request as u16,
        flags: 0,
        buf_alloc: 65_536,
        fwd_cnt: 0,
    }
}

/// A guest with these features and no socket layer asks for a connection of a type that it did not negotiate.
#[track_caller]
fn assert_unknown(sidecar: &Sidecar, profile: Profile, socket_type: u16) {
    let mut guest =
        EmbeddedGuest::boot(&sidecar.path("web.sock"), profile, DriverOptions::default()).unwrap();
    let driver = &mut guest.driver;
    driver
        .send_packet(&request(socket_type), &[], &Shape::single())
        .unwrap();
    let answer = driver.recv_packet(LONG).unwrap().header;
    assert_eq!(
        (answer.op, answer.socket_type, answer.dst_port),
        (Op::Rst as u16, socket_type, Port(1234))
    );
    guest.shut_down().unwrap();
    sidecar.until_metric("vsock_session_active", &[], 0.0);
}

#[test]
fn types_that_were_not_negotiated_do_not_exist() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let service = PacketListener::bind(&path);
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: service, port: 5, to: \"unix://{}\"}}]\n  inbound:\n  \
         - {{name: packets, listen: \"unix://{{dir}}/in.sock\", socketType: seqpacket, port: 5}}\n  \
         - {{name: bytes, listen: \"unix://{{dir}}/bytes.sock\", port: 6}}\n  limits: {{guestTimeout: 500ms}}\n",
        path.display()
    ));
    let no_messages = Profile::qemu().without(feature::SEQPACKET);
    // What a driver that knows the bit says when it wants SEQPACKET alone.
    let no_streams = Profile::qemu().with(feature::NO_IMPLIED_STREAM);
    assert_unknown(&sidecar, no_messages.clone(), 2);
    assert_unknown(&sidecar, no_streams.clone(), 1);
    assert!(service.is_idle(), "nobody was dialled");
    let labels = [("kind", "unsupported_type")];
    assert_eq!(sidecar.metric("vsock_misbehavior_total", &labels), 2.0);

    let boot = |profile| {
        guest(
            &sidecar.path("web.sock"),
            profile,
            DriverOptions::default(),
            SocketOptions::default(),
        )
    };
    let refused = |rule| {
        let labels = [("rule", rule), ("reason", "unsupported_type")];
        sidecar.until_metric("vsock_connections_refused_total", &labels, 1.0);
    };
    // Clients hear of it at once, and the guest never does.
    let web = boot(no_messages);
    let _listener = web.listen_seqpacket(5).unwrap();
    assert_eq!(Packets::connect(&sidecar.path("in.sock")).recv(), None);
    refused("packets");
    assert_lawful(&web);
    web.shut_down().unwrap();
    sidecar.until_metric("vsock_session_active", &[], 0.0);

    let web = boot(no_streams);
    let listener = web.listen_seqpacket(5).unwrap();
    let client = UnixStream::connect(sidecar.path("bytes.sock")).unwrap();
    client.patient();
    assert_eq!(read_to_end(client), b"");
    refused("bytes");
    let client = Packets::connect(&sidecar.path("in.sock"));
    client.send(b"hello");
    assert_eq!(
        recv(&patient(listener.accept_timeout(LONG).unwrap())).unwrap(),
        b"hello"
    );
    assert_lawful(&web);
}

/// From before the VMM is there until its guest listens: the client waits, and its messages with it.
#[test]
fn a_client_with_messages_waits_for_a_guest_that_boots() {
    let sidecar = Sidecar::start(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {socket: \"{dir}/web.sock\"}\n  inbound:\n  \
         - {name: patient, listen: \"unix://{dir}/in.sock\", socketType: seqpacket, port: 5, waitForGuest: true}\n  \
         limits: {guestTimeout: 1m}\n",
    );
    let connect = || {
        let client = Packets::connect(&sidecar.path("in.sock"));
        client.send(b"early");
        until("the client is known", || {
            sidecar.state()["guests"][0]["device"]["connections"]
                .as_array()
                .is_some_and(|all| all.len() == 1)
        });
        client
    };
    let client = connect();
    let web = linux(&sidecar.path("web.sock"));
    let labels = [("direction", "host_to_guest"), ("op", "request")];
    until("the guest is asked", || {
        sidecar.metric("vsock_packets_total", &labels) > 0.0
    });
    let listener = web.listen_seqpacket(5).unwrap();
    let server = patient(listener.accept_timeout(LONG).unwrap());
    assert_eq!(recv(&server).unwrap(), b"early");
    drop((client, server));
    until("the connection is over", || web.open_connections() == 0);
    assert_lawful(&web);
    web.shut_down().unwrap();
    sidecar.until_metric("vsock_session_active", &[], 0.0);

    // One whose driver knows only streams is no guest to wait for.
    let client = connect();
    let web = guest(
        &sidecar.path("web.sock"),
        Profile::cloud_hypervisor(),
        DriverOptions::default(),
        SocketOptions::default(),
    );
    assert_eq!(client.recv(), None);
    until_refused(&sidecar, "unsupported_type");
    assert_lawful(&web);
}

/// Sends until nothing goes any more; answers how many messages of `len` bytes went.
fn send_until_stalled(socket: &GuestSeqpacket, len: usize) -> usize {
    socket.set_write_timeout(Some(Duration::from_millis(200)));
    let message = of_length(len);
    let mut sent = 0;
    loop {
        match socket.send(&message) {
            Ok(()) => sent += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return sent,
            Err(error) => panic!("{error}"),
        }
        assert!(sent * len < 64 << 20, "nothing stops the guest");
    }
}

#[test]
fn a_service_that_stalls_costs_its_credit_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let packets = PacketListener::bind(&path);
    let listener = local();
    let sidecar = outbound(&format!(
        "{{name: packets, port: 5, to: \"unix://{}\"}}, \
         {{name: framed, port: 70, to: \"tcp://{}\", framing: length-prefixed}}",
        path.display(),
        listener.local_addr().unwrap()
    ));
    let options = SocketOptions {
        // So that what stalls has not begun.
        message_credit: MessageCredit::Whole,
        ..Default::default()
    };
    let guest = guest(
        &sidecar.path("web.sock"),
        Profile::qemu(),
        DriverOptions::default(),
        options,
    );
    let sockets: Vec<_> = (0..8)
        .map(|i| guest.connect_seqpacket(if i % 2 == 0 { 5 } else { 70 }).unwrap())
        .collect();
    let before = sidecar.anonymous_memory();
    let sent: Vec<_> = thread::scope(|scope| {
        let senders: Vec<_> = sockets
            .iter()
            .map(|socket| scope.spawn(|| send_until_stalled(socket, 60_000)))
            .collect();
        senders.into_iter().map(|sender| sender.join().unwrap()).collect()
    });
    let grown = sidecar.anonymous_memory().saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes for 8 connections of 256 KiB");
    // The services wake up.
    for (i, sent) in sent.into_iter().enumerate() {
        let socket = &sockets[i];
        socket.shutdown(Shutdown::Write).unwrap();
        let mut received = 0;
        let mut take = |message: Vec<u8>| {
            assert!(message == of_length(60_000), "{} bytes", message.len());
            received += 1;
        };
        if i % 2 == 0 {
            let service = packets.accept();
            while let Some(message) = service.recv() {
                take(message);
            }
        } else {
            let service = accept_tcp(&listener);
            while let Some(message) = read_frame(&service) {
                take(message);
            }
        }
        assert_eq!(received, sent, "connection {i}");
    }
    drop(sockets);
    until("the connections are over", || guest.open_connections() == 0);
    assert_lawful(&guest);
}

/// The guest's program does not read: the service fills its buffer, the kernel's, and then waits.
#[test]
fn a_guest_that_stalls_costs_its_credit_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let listener = PacketListener::bind(&path);
    let sidecar = outbound(&format!(
        "{{name: service, port: 5, to: \"unix://{}\"}}",
        path.display()
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let socket = patient(guest.connect_seqpacket(5).unwrap());
    let service = listener.accept();
    let sequence = Sequence::new(9, 100_000);
    let before = sidecar.anonymous_memory();
    thread::scope(|scope| {
        let service = service.another();
        scope.spawn(|| {
            let service = service;
            for number in 0..400 {
                service.send(sequence.message(number).0);
            }
            service.finish();
        });
        // The next message may not fit.
        until("the guest's buffer is full", || {
            guest.stats().received_bytes > 256 * 1024 - 100_000
        });
        let grown = sidecar.anonymous_memory().saturating_sub(before);
        assert!(grown < 4 << 20, "{grown} bytes");
        for number in 0..400 {
            assert!(
                recv(&socket).unwrap() == sequence.message(number).0,
                "message {number}"
            );
        }
        assert_eq!(recv(&socket), None);
    });
    drop(socket);
    until("the connection is over", || guest.open_connections() == 0);
    assert_lawful(&guest);
}

/// All at once: many connections of both types, both ways, through one device thread.
#[test]
fn connections_of_both_types_share_a_guest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let packets = PacketListener::bind(&path);
    let frames = local();
    let bytes = serve(echo);
    let sidecar = outbound(&format!(
        "{{name: packets, port: 5, to: \"unix://{}\"}}, {{name: bytes, port: 7, to: \"tcp://127.0.0.1:{bytes}\"}}, \
         {{name: framed, port: 70, to: \"tcp://{}\", framing: length-prefixed}}",
        path.display(),
        frames.local_addr().unwrap()
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let chat = |guest: &Sockets, port: u32, seed: u64| {
        let sequence = Sequence::new(seed, 70_000);
        let socket = patient(guest.connect_seqpacket(port).unwrap());
        thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..200 {
                    socket.send(sequence.message(number).0).unwrap();
                }
                socket.shutdown(Shutdown::Write).unwrap();
            });
            for number in 0..200 {
                assert!(recv(&socket).unwrap() == sequence.message(number).0, "{number}");
            }
            assert_eq!(recv(&socket), None);
        });
    };
    thread::scope(|scope| {
        for seed in 0..4 {
            let (guest, packets, frames) = (&guest, &packets, &frames);
            scope.spawn(move || echo_packets(&packets.accept()));
            scope.spawn(move || echo_frames(accept_tcp(frames)));
            scope.spawn(move || chat(guest, 5, seed));
            scope.spawn(move || chat(guest, 70, 10 + seed));
            scope.spawn(move || {
                let stream = guest.connect(7).unwrap();
                stream.set_read_timeout(Some(LONG));
                thread::scope(|scope| {
                    scope.spawn(|| {
                        Bytes::new(seed).write_to(&stream, 2 << 20).unwrap();
                        stream.shutdown(Shutdown::Write).unwrap();
                    });
                    Bytes::new(seed).expect_from(&stream, 2 << 20);
                });
            });
        }
    });
    until("the connections are over", || guest.open_connections() == 0);
    assert_lawful(&guest);
}

/// The kernel tells a peer that closes without having read all ahead of the messages that it had sent before: a service that
/// takes ECONNRESET for the end would not have got the guest's last words.
#[test]
fn a_guest_that_closes_and_has_not_read_all_is_heard_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service.sock");
    let service = PacketListener::bind(&path);
    let sidecar = outbound(&format!(
        "{{name: service, port: 5, to: \"unix://{}\"}}",
        path.display()
    ));
    let guest = guest(
        &sidecar.path("web.sock"),
        Profile::qemu(),
        DriverOptions::default(),
        SocketOptions {
            buf_alloc: 1000,
            ..Default::default()
        },
    );
    let socket = patient(guest.connect_seqpacket(5).unwrap());
    let packets = service.accept();
    // The guest has no room for the second one, nor for those behind it.
    packets.send(&[1; 800]);
    packets.send(&[2; 800]);
    packets.send(b"");
    packets.send(&[3; 1]);
    until("the guest has what it has room for", || {
        sidecar.metric("vsock_credit_stalls_total", &[]) >= 1.0
    });
    socket.send(b"last words").unwrap();
    drop(socket);
    sidecar.until_metric(
        "vsock_connections_closed_total",
        &[("reason", "guest_shutdown")],
        1.0,
    );
    assert_eq!(packets.recv().as_deref(), Some(&b"last words"[..]));
    assert_eq!(packets.recv(), None);
}
