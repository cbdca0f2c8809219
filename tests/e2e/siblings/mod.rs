//! Two guests of one sidecar: `to: guest://NAME`. Each sees the other as it would see any peer, by CID and port.

mod endings;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::{
    DriverOptions, GuestListener, GuestSeqpacket, GuestStream, MessageCredit, Profile, SocketOptions, Sockets,
};

use crate::support::*;

/// Guests `web` (CID 3) and `db` (CID 5) with these outbound rules.
fn sidecar(web: &str, db: &str) -> Sidecar {
    let guest = |name: &str, cid: u32, rules: &str| {
        format!(
            "- name: {name}\n  cid: {cid}\n  vhostUser: {{socket: \"{{dir}}/{name}.sock\"}}\n  \
             outbound: [{rules}]\n  limits: {{guestTimeout: 500ms}}\n"
        )
    };
    Sidecar::start(&format!(
        "guests:\n{}{}",
        guest("web", 3, web),
        guest("db", 5, db)
    ))
}

const TO_DB: &str = "{name: peer, ports: 1-65535, to: \"guest://db\"}";
const TO_WEB: &str = "{name: back, ports: 1-65535, to: \"guest://web\"}";

/// Both guests, running.
fn guests(sidecar: &Sidecar) -> (Sockets, Sockets) {
    (linux(&sidecar.path("web.sock")), linux(&sidecar.path("db.sock")))
}

/// A stream from `web` to port 7 of `db`.
#[track_caller]
fn streams(web: &Sockets, listener: &GuestListener) -> (GuestStream, GuestStream) {
    let client = web.connect_to(5, 7).unwrap();
    let server = loop {
        let server = listener.accept_timeout(LONG).unwrap();
        // Those whose clients are gone may wait there as well.
        if server.peer_address() == (3, client.local_port()) {
            break server;
        }
    };
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(LONG));
        stream.set_write_timeout(Some(LONG));
    }
    (client, server)
}

/// The same for messages.
#[track_caller]
fn messages(
    web: &Sockets,
    listener: &GuestListener<GuestSeqpacket>,
    port: u32,
) -> (GuestSeqpacket, GuestSeqpacket) {
    let client = web.connect_seqpacket_to(5, port).unwrap();
    let server = listener.accept_timeout(LONG).unwrap();
    assert_eq!(server.peer_address(), (3, client.local_port()));
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(LONG));
        socket.set_write_timeout(Some(LONG));
    }
    (client, server)
}

#[track_caller]
fn until_closed(guests: [&Sockets; 2]) {
    until("all connections are over", || {
        guests.iter().all(|guest| guest.open_connections() == 0)
    });
    for guest in guests {
        assert_lawful(guest);
    }
}

#[track_caller]
fn ping(from: &GuestStream, to: &GuestStream) {
    let (mut from, mut to) = (from, to);
    from.write_all(b"ping").unwrap();
    let mut ping = [0; 4];
    to.read_exact(&mut ping).unwrap();
    assert_eq!(&ping, b"ping");
}

#[test]
fn a_stream_between_guests_carries_every_byte_both_ways_at_once_and_half_closes() {
    let sidecar = sidecar(TO_DB, "");
    let (web, db) = guests(&sidecar);
    let (client, server) = streams(&web, &db.listen(7).unwrap());
    assert_eq!(client.peer_address(), (5, 7));
    assert_eq!(server.peer_address(), (3, client.local_port()));
    let state = sidecar.state();
    for (guest, peer) in [
        (0, "guest://db:7".to_owned()),
        (1, format!("guest://web:{}", client.local_port())),
    ] {
        let connection = &state["guests"][guest]["device"]["connections"][0];
        assert_eq!(connection["peer"].as_str(), Some(&*peer), "{connection:#}");
    }

    const LEN: u64 = 8 << 20;
    thread::scope(|scope| {
        for (from, seed) in [(&client, 1), (&server, 2)] {
            scope.spawn(move || {
                Bytes::new(seed).write_to(from, LEN).unwrap();
                from.shutdown(Shutdown::Write).unwrap();
            });
        }
        for (to, seed) in [(&server, 1), (&client, 2)] {
            scope.spawn(move || {
                let mut to = to;
                Bytes::new(seed).expect_from(to, LEN);
                assert_eq!(to.read(&mut [0]).unwrap(), 0);
            });
        }
    });
    drop((client, server));
    until_closed([&web, &db]);
    for (guest, direction) in [("web", "guest_to_host"), ("db", "host_to_guest")] {
        let labels = [("guest", guest), ("direction", direction)];
        assert_eq!(sidecar.metric("vsock_upstream_bytes_total", &labels), LEN as f64);
        let labels = [("guest", guest), ("direction", direction)];
        assert_eq!(sidecar.metric("vsock_connections_opened_total", &labels), 1.0);
    }
}

/// 10,000 messages of 1 B to 256 KiB each way at once over one connection: every boundary, every mark, every byte. One guest
/// sends as Linux does, as credit comes; the other waits for credit for all of a message, as a careful driver may.
#[test]
fn ten_thousand_messages_cross_each_way_with_boundaries_and_marks_intact() {
    const COUNT: usize = 10_000;
    let sidecar = sidecar(TO_DB, "");
    let web = linux(&sidecar.path("web.sock"));
    let db = guest(
        &sidecar.path("db.sock"),
        Profile::qemu(),
        DriverOptions::default(),
        SocketOptions {
            message_credit: MessageCredit::Whole,
            ..Default::default()
        },
    );
    let (client, server) = messages(&web, &db.listen_seqpacket(7).unwrap(), 7);
    assert_eq!(client.peer_address(), (5, 7));
    let there = Sequence::new(1, 256 * 1024);
    let back = Sequence::new(2, 256 * 1024);
    thread::scope(|scope| {
        for (from, sequence) in [(&client, &there), (&server, &back)] {
            scope.spawn(move || {
                for number in 0..COUNT {
                    let (message, ends_record) = sequence.message(number);
                    match ends_record {
                        true => from.send_end_of_record(message),
                        false => from.send(message),
                    }
                    .unwrap_or_else(|error| panic!("message {number} of {} bytes: {error}", message.len()));
                }
                from.shutdown(Shutdown::Write).unwrap();
            });
        }
        for (to, sequence) in [(&server, &there), (&client, &back)] {
            scope.spawn(move || {
                for number in 0..COUNT {
                    let (message, ends_record) = sequence.message(number);
                    let got = to
                        .recv()
                        .unwrap()
                        .unwrap_or_else(|| panic!("the end, and not message {number}"));
                    assert_eq!(got.bytes.len(), message.len(), "message {number}");
                    assert!(got.bytes == message, "message {number} has other bytes");
                    assert_eq!(got.end_of_record, ends_record, "message {number}");
                }
                assert_eq!(to.recv().unwrap(), None);
            });
        }
    });
    drop((client, server));
    until_closed([&web, &db]);
}

#[test]
fn empty_messages_cross_and_types_do_not_mix() {
    let sidecar = sidecar(TO_DB, "");
    let (web, db) = guests(&sidecar);
    let listener = db.listen_seqpacket(7).unwrap();
    let (client, server) = messages(&web, &listener, 7);
    for (from, to) in [(&client, &server), (&server, &client)] {
        from.send(b"").unwrap();
        from.send_end_of_record(b"").unwrap();
        from.send(b"x").unwrap();
        from.send(b"").unwrap();
        from.shutdown(Shutdown::Write).unwrap();
        let received: Vec<_> = std::iter::from_fn(|| to.recv().unwrap())
            .map(|message| (message.bytes, message.end_of_record))
            .collect();
        let expected = [("", false), ("", true), ("x", false), ("", false)];
        assert_eq!(
            received,
            expected.map(|(text, mark)| (text.as_bytes().to_vec(), mark))
        );
    }
    assert_eq!(
        web.connect_to(5, 7).unwrap_err().kind(),
        ErrorKind::ConnectionReset,
        "a stream to a program that waits for messages"
    );
    drop((client, server));
    until_closed([&web, &db]);
}

/// `to: guest://db:5432`, by another CID than the sibling's own; and a range keeps its offset.
#[test]
fn a_rule_may_give_a_sibling_another_address() {
    let sidecar = sidecar(
        "{name: sql, cid: 2, port: 5, to: \"guest://db:5432\"}, \
         {name: range, cid: 77, ports: 100-199, to: \"guest://db:1000\"}",
        "",
    );
    let (web, db) = guests(&sidecar);
    for (cid, port, in_db) in [(2, 5, 5432), (77, 100, 1000), (77, 199, 1099)] {
        let listener = db.listen(in_db).unwrap();
        let client = web.connect_to(cid, port).unwrap();
        let server = listener.accept_timeout(LONG).unwrap();
        assert_eq!(client.peer_address(), (cid, port));
        assert_eq!(server.peer_address(), (3, client.local_port()));
        server.set_read_timeout(Some(LONG));
        ping(&client, &server);
    }
    // The sibling's own address is nobody's.
    let error = web.connect_to(5, 5432).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    until_closed([&web, &db]);
}

/// Credit of both guests and a socket's buffers between them: that is what a reader who sleeps costs.
#[test]
fn a_sibling_that_does_not_read_stops_the_other_and_costs_no_more_than_credit() {
    const FLOWS: usize = 8;
    let sidecar = sidecar(TO_DB, "");
    let web = guest(
        &sidecar.path("web.sock"),
        Profile::qemu(),
        DriverOptions::default(),
        SocketOptions {
            // So that a message which stalls has not begun.
            message_credit: MessageCredit::Whole,
            ..Default::default()
        },
    );
    let db = linux(&sidecar.path("db.sock"));
    let (for_bytes, for_messages) = (db.listen(7).unwrap(), db.listen_seqpacket(8).unwrap());
    let lively = streams(&web, &for_bytes);
    let bytes: Vec<_> = (0..FLOWS).map(|_| streams(&web, &for_bytes)).collect();
    let packets: Vec<_> = (0..FLOWS).map(|_| messages(&web, &for_messages, 8)).collect();
    let before = sidecar.anonymous_memory();

    // Everything that goes goes.
    let stalled = Duration::from_millis(200);
    let (bytes_sent, messages_sent): (Vec<u64>, Vec<usize>) = thread::scope(|scope| {
        let bytes: Vec<_> = bytes
            .iter()
            .enumerate()
            .map(|(i, (client, _))| {
                scope.spawn(move || {
                    client.set_write_timeout(Some(stalled));
                    let mut source = Bytes::new(i as u64);
                    let mut sent = 0;
                    let mut client = client;
                    loop {
                        let chunk = source.clone().take(50_000);
                        match client.write(&chunk) {
                            Ok(n) => {
                                source.take(n);
                                sent += n as u64;
                            }
                            Err(error) if error.kind() == ErrorKind::WouldBlock => return sent,
                            Err(error) => panic!("{error}"),
                        }
                        assert!(sent < 64 << 20, "nothing stops the guest");
                    }
                })
            })
            .collect();
        let packets: Vec<_> = packets
            .iter()
            .enumerate()
            .map(|(i, (client, _))| {
                scope.spawn(move || {
                    client.set_write_timeout(Some(stalled));
                    let sequence = Sequence::new(i as u64, 100_000);
                    for number in 0.. {
                        match client.send(sequence.message(number).0) {
                            Ok(()) => {}
                            Err(error) if error.kind() == ErrorKind::WouldBlock => return number,
                            Err(error) => panic!("{error}"),
                        }
                        assert!(number < 10_000, "nothing stops the guest");
                    }
                    0
                })
            })
            .collect();
        (
            bytes.into_iter().map(|t| t.join().unwrap()).collect(),
            packets.into_iter().map(|t| t.join().unwrap()).collect(),
        )
    });
    let grown = sidecar.anonymous_memory().saturating_sub(before);
    assert!(
        grown < 2 * FLOWS as u64 * 512 * 1024 + (4 << 20),
        "{grown} bytes for {FLOWS} flows of each type with 256 KiB of credit"
    );
    ping(&lively.0, &lively.1);
    ping(&lively.1, &lively.0);

    // The readers wake up, and nothing is missing.
    for (i, ((client, server), sent)) in bytes.iter().zip(bytes_sent).enumerate() {
        client.shutdown(Shutdown::Write).unwrap();
        Bytes::new(i as u64).expect_from(server, sent);
        let mut server = server;
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
    }
    for (i, ((client, server), sent)) in packets.iter().zip(messages_sent).enumerate() {
        client.shutdown(Shutdown::Write).unwrap();
        let sequence = Sequence::new(i as u64, 100_000);
        for number in 0..sent {
            let message = server.recv().unwrap().unwrap();
            assert!(
                message.bytes == sequence.message(number).0,
                "message {number} of flow {i}"
            );
        }
        assert_eq!(server.recv().unwrap(), None);
    }
    drop((lively, bytes, packets));
    until_closed([&web, &db]);
    until("all memory is given back", || {
        sidecar.metric("vsock_buffered_bytes", &[]) == 0.0
    });
}

/// A guest that stops taking packets harms its siblings' own traffic in nothing.
#[test]
fn a_guest_that_is_stuck_holds_up_only_those_who_talk_to_it() {
    let port = serve(echo);
    let to_host = format!("{TO_DB}, {{name: echo, cid: 2, port: 7, to: \"tcp://127.0.0.1:{port}\"}}");
    let sidecar = sidecar(&to_host, "");
    let (web, db) = guests(&sidecar);
    let listener = db.listen(7).unwrap();
    let (client, server) = streams(&web, &listener);
    db.hold_rx(true);
    client.set_write_timeout(Some(Duration::from_millis(100)));
    let mut sent = 0;
    let mut source = Bytes::new(4);
    loop {
        let chunk = source.clone().take(40_000);
        match (&client).write(&chunk) {
            Ok(n) => sent += source.take(n).len() as u64,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
        assert!(sent < 64 << 20, "nothing stops the guest");
    }
    let began = Instant::now();
    let stream = web.connect(7).unwrap();
    stream.set_read_timeout(Some(LONG));
    thread::scope(|scope| {
        scope.spawn(|| Bytes::new(1).write_to(&stream, 4 << 20).unwrap());
        Bytes::new(1).expect_from(&stream, 4 << 20);
    });
    println!("4 MiB through an echo beside it in {:?}", began.elapsed());
    drop(stream);
    db.hold_rx(false);
    client.shutdown(Shutdown::Write).unwrap();
    Bytes::new(4).expect_from(&server, sent);
    drop((client, server));
    until_closed([&web, &db]);
}

/// Many at once, opened and closed in both directions.
#[test]
fn guests_open_and_close_connections_to_each_other_all_the_time() {
    let sidecar = sidecar(TO_DB, TO_WEB);
    let (web, db) = guests(&sidecar);
    let (in_web, in_db) = (web.listen(7).unwrap(), db.listen(7).unwrap());
    const EACH: usize = 200;
    thread::scope(|scope| {
        for listener in [&in_web, &in_db] {
            scope.spawn(move || {
                for _ in 0..4 * EACH {
                    let mut stream = listener.accept_timeout(LONG).unwrap();
                    stream.set_read_timeout(Some(LONG));
                    scope.spawn(move || {
                        let mut byte = [0];
                        while stream.read(&mut byte).unwrap() == 1 {
                            stream.write_all(&byte).unwrap();
                        }
                    });
                }
            });
        }
        for (guest, cid) in [(&web, 5), (&db, 3)] {
            for number in 0..4u8 {
                scope.spawn(move || {
                    for _ in 0..EACH {
                        let mut stream = guest.connect_to(cid, 7).unwrap();
                        stream.set_read_timeout(Some(LONG));
                        stream.write_all(&[number]).unwrap();
                        let mut byte = [0];
                        stream.read_exact(&mut byte).unwrap();
                        assert_eq!(byte, [number]);
                    }
                });
            }
        }
    });
    until("all connections are over", || {
        web.open_connections() == 0 && db.open_connections() == 0
    });
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    for guest in [&web, &db] {
        let stats = guest.stats();
        assert!(stats.violations.is_empty(), "{:?}", stats.violations);
    }
    let total = 2.0 * 4.0 * EACH as f64;
    for direction in ["guest_to_host", "host_to_guest"] {
        let labels = [("direction", direction)];
        assert_eq!(sidecar.metric("vsock_connections_opened_total", &labels), total);
    }
}
