//! What guests of one sidecar cannot have of each other, and how what they have ends.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::Duration;

use vsock_sidecar::embedded_guest::profile::feature;
use vsock_sidecar::embedded_guest::{DriverOptions, Profile, SocketOptions, Violation};

use super::*;

#[test]
fn a_sibling_that_no_rule_names_cannot_be_reached() {
    let sidecar = sidecar(
        "{name: peer, ports: 1-100, to: \"guest://db\"}",
        "{name: echo, port: 7, to: \"tcp://127.0.0.1:1\"}",
    );
    let (web, db) = guests(&sidecar);
    let (_in_db, _in_web) = (db.listen(101).unwrap(), web.listen(7).unwrap());
    for (guest, name, cid, port) in [
        (&web, "web", 5, 101),
        (&db, "db", 3, 7),
        (&web, "web", 4, 7),
        (&web, "web", 3, 7),
    ] {
        let error = guest.connect_to(cid, port).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{name} to {cid}:{port}");
        let error = guest.connect_seqpacket_to(cid, port).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{name} to {cid}:{port}");
    }
    for (name, refused) in [("web", 6.0), ("db", 2.0)] {
        let labels = [("guest", name), ("reason", "no_rule")];
        sidecar.until_metric("vsock_connections_refused_total", &labels, refused);
    }
    for (guest, name) in [(&web, "web"), (&db, "db")] {
        let labels = [("guest", name), ("direction", "host_to_guest"), ("op", "request")];
        assert_eq!(
            sidecar.metric("vsock_packets_total", &labels),
            0.0,
            "{name} was not even asked"
        );
        assert_lawful(guest);
    }
}

/// Within a guest's own patience with connect(), which is two seconds in Linux.
#[test]
fn a_sibling_that_does_not_listen_run_or_know_messages_refuses_in_time() {
    let sidecar = sidecar(TO_DB, "");
    let web = linux(&sidecar.path("web.sock"));
    let refused = |reason: &str, count: f64| {
        let labels = [("guest", "web"), ("reason", reason)];
        sidecar.until_metric("vsock_connections_refused_total", &labels, count);
    };
    // It has not booted.
    let error = web.connect_to(5, 7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    refused("unreachable", 1.0);

    // Nobody listens.
    let db = linux(&sidecar.path("db.sock"));
    let error = web.connect_to(5, 7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    refused("dial_refused", 1.0);
    let error = web.connect_seqpacket_to(5, 7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    refused("dial_refused", 2.0);

    // It is stuck.
    let listener = db.listen(7).unwrap();
    db.hold_rx(true);
    let error = web.connect_to(5, 7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    refused("unreachable", 2.0);
    db.hold_rx(false);
    let (client, server) = streams(&web, &listener);
    ping(&client, &server);
    drop((client, server));
    until("the connection is over", || web.open_connections() == 0);
    // Its answer to the request that was withdrawn may have met a reset: that is no fault of anybody's.
    assert!(db.stats().violations.is_empty(), "{:?}", db.stats().violations);
    db.shut_down().unwrap();
    sidecar.until_metric("vsock_session_active", &[("guest", "db")], 0.0);

    // Its driver knows only streams.
    let db = guest(
        &sidecar.path("db.sock"),
        Profile::qemu().without(feature::SEQPACKET),
        DriverOptions::default(),
        SocketOptions::default(),
    );
    let _listener = db.listen_seqpacket(7).unwrap();
    let error = web.connect_seqpacket_to(5, 7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let labels = [("guest", "db"), ("reason", "unsupported_type")];
    sidecar.until_metric("vsock_connections_refused_total", &labels, 1.0);
    assert_lawful(&db);
    assert_lawful(&web);
}

/// How a guest can go, and what is left of it.
#[derive(Clone, Copy, Debug)]
enum Exit {
    Killed,
    Rebooted,
    ShutDown,
}

#[test]
fn a_sibling_that_goes_is_an_ordinary_end_for_the_other_and_can_come_back() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let to_host = format!(
        "{TO_DB}, {{name: host, cid: 2, port: 7, to: \"tcp://{}\"}}",
        listener.local_addr().unwrap()
    );
    let sidecar = sidecar(&to_host, TO_WEB);
    let web = linux(&sidecar.path("web.sock"));
    let mut to_service = web.connect(7).unwrap();
    let mut service = accept_tcp(&listener);
    to_service.set_read_timeout(Some(LONG));
    let in_web = web.listen(9).unwrap();

    for exit in [Exit::Killed, Exit::Rebooted, Exit::ShutDown, Exit::Killed] {
        println!("{exit:?}");
        let db = linux(&sidecar.path("db.sock"));
        let (for_bytes, for_messages) = (db.listen(7).unwrap(), db.listen_seqpacket(8).unwrap());
        let (client, server) = streams(&web, &for_bytes);
        let (packets, packets_server) = messages(&web, &for_messages, 8);
        let from_db = db.connect_to(3, 9).unwrap();
        let accepted = in_web.accept_timeout(LONG).unwrap();
        accepted.set_read_timeout(Some(LONG));
        assert_eq!(accepted.peer_address(), (5, from_db.local_port()));
        ping(&server, &client);
        ping(&from_db, &accepted);
        let before = web.stats().received_bytes;
        packets_server.send(b"last words").unwrap();
        until("they have arrived", || web.stats().received_bytes == before + 10);

        let gone = match exit {
            Exit::Killed => {
                db.kill();
                None
            }
            Exit::Rebooted => {
                db.reboot().unwrap();
                Some(db)
            }
            Exit::ShutDown => {
                db.shut_down().unwrap();
                None
            }
        };
        // Whoever reads hears of it at once.
        assert_eq!((&client).read(&mut [0]).unwrap(), 0);
        assert_eq!((&accepted).read(&mut [0]).unwrap(), 0);
        assert_eq!(packets.recv().unwrap().unwrap().bytes, b"last words");
        assert_eq!(packets.recv().unwrap(), None);
        drop((client, accepted, packets));
        until("only the service's connection is left", || {
            web.open_connections() == 1
        });

        // Others feel nothing.
        to_service.write_all(b"ping").unwrap();
        let mut ping = [0; 4];
        service.read_exact(&mut ping).unwrap();
        assert_eq!(
            web.connect_to(5, 7).unwrap_err().kind(),
            ErrorKind::ConnectionReset,
            "nobody is there"
        );
        if let Some(db) = gone {
            let again = db.listen(7).unwrap();
            let (client, server) = streams(&web, &again);
            self::ping(&client, &server);
            assert_lawful(&db);
            drop((client, server, again));
            until("it is over", || db.open_connections() == 0);
            db.shut_down().unwrap();
        }
        sidecar.until_metric("vsock_session_active", &[("guest", "db")], 0.0);
    }
    drop((to_service, service));
    until("all is over", || web.open_connections() == 0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    assert_lawful(&web);
}

/// Half of it in the other's buffer, half on its way, and its sender is gone: what was whole is received, what was not is not,
/// and nobody takes that for the end of what there was to say.
#[test]
fn a_message_that_its_sender_could_not_finish_is_none() {
    let sidecar = sidecar(TO_DB, "");
    let (web, db) = guests(&sidecar);
    let (client, server) = messages(&web, &db.listen_seqpacket(7).unwrap(), 7);
    let before = db.stats().received_bytes;
    client.send(&[1; 200_000]).unwrap();
    client.send(&[2; 200_000]).unwrap();
    until("db's buffer is full, in the midst of the second", || {
        db.stats().received_bytes == before + 256 * 1024
    });
    web.kill();
    sidecar.until_metric("vsock_session_active", &[("guest", "web")], 0.0);
    assert!(server.recv().unwrap().unwrap().bytes == [1; 200_000]);
    // All of the second had left its guest: it may arrive, or not.
    if let Some(second) = server.recv().unwrap() {
        assert!(second.bytes == [2; 200_000]);
        assert_eq!(server.recv().unwrap(), None);
    }
    drop(server);
    until("the connection is over", || db.open_connections() == 0);

    // Now its end never leaves the guest.
    let web = linux(&sidecar.path("web.sock"));
    let (client, server) = messages(&web, &db.listen_seqpacket(8).unwrap(), 8);
    client.set_write_timeout(Some(Duration::from_millis(100)));
    let sent = (0..).take_while(|_| client.send(&[3; 250_000]).is_ok()).count();
    web.kill();
    let mut received = 0;
    while let Some(message) = server.recv().unwrap() {
        assert!(message.bytes == [3; 250_000]);
        received += 1;
    }
    assert!(received <= sent, "{received} of {sent} that were whole");
    drop(server);
    until("the connection is over", || db.open_connections() == 0);
    let stats = db.stats();
    assert!(stats.violations.is_empty(), "{:?}", stats.violations);
}

/// The limit of the guest that is asked is a refusal for the one that asks, and the place is given away again.
#[test]
fn a_sibling_takes_no_more_connections_than_its_limit() {
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound: [{TO_DB}]\n\
         - name: db\n  cid: 5\n  vhostUser: {{socket: \"{{dir}}/db.sock\"}}\n  limits: {{connections: 2}}\n"
    ));
    let (web, db) = guests(&sidecar);
    let listener = db.listen(7).unwrap();
    let (first, second) = (streams(&web, &listener), streams(&web, &listener));
    let error = web.connect_to(5, 7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    for guest in ["web", "db"] {
        let labels = [("guest", guest), ("reason", "limit")];
        sidecar.until_metric("vsock_connections_refused_total", &labels, 1.0);
    }
    drop(first);
    sidecar.until_metric("vsock_connections_active", &[("guest", "db")], 1.0);
    let third = streams(&web, &listener);
    for (client, server) in [&second, &third] {
        ping(client, server);
    }
    drop((second, third));
    until_closed([&web, &db]);
}

/// Each of them had a place there until `guestTimeout`, however short the patience of who had asked: a few that gave up, and the
/// guest's own clients found no room.
#[test]
fn dials_that_were_given_up_leave_the_sibling_its_room() {
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound: [{TO_DB}]\n  \
         limits: {{connectTimeout: 100ms}}\n\
         - name: db\n  cid: 5\n  vhostUser: {{socket: \"{{dir}}/db.sock\"}}\n  \
         limits: {{connections: 2, guestTimeout: 30s}}\n"
    ));
    // It has not booted.
    let web = linux(&sidecar.path("web.sock"));
    for _ in 0..5 {
        let error = web.connect_to(5, 7).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    let refused = |guest: &str, reason: &str| {
        let labels = [("guest", guest), ("reason", reason)];
        sidecar.until_metric("vsock_connections_refused_total", &labels, 5.0);
    };
    refused("web", "dial_timeout");
    refused("db", "client_gone");
}

/// `limits.buffer` is what each guest is promised, and so the longest message that it may send.
#[test]
fn a_message_is_no_longer_than_the_buffer_of_either_guest() {
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound: [{TO_DB}]\n  \
         limits: {{buffer: 64KiB}}\n- name: db\n  cid: 5\n  vhostUser: {{socket: \"{{dir}}/db.sock\"}}\n"
    ));
    let web = linux(&sidecar.path("web.sock"));
    let db = guest(
        &sidecar.path("db.sock"),
        Profile::qemu(),
        DriverOptions::default(),
        SocketOptions {
            buf_alloc: 40_000,
            ..Default::default()
        },
    );
    let listener = db.listen_seqpacket(7).unwrap();
    let (client, server) = messages(&web, &listener, 7);
    let error = client.send(&[0; 65_537]).unwrap_err();
    let too_long = rustix::io::Errno::MSGSIZE.raw_os_error();
    assert_eq!(error.raw_os_error(), Some(too_long));
    client.send(&[1; 40_000]).unwrap();
    assert_eq!(server.recv().unwrap().unwrap().bytes.len(), 40_000);
    // Back, the limit is web's buffer, which is the usual one.
    server.send(&[2; 262_144]).unwrap();
    assert_eq!(client.recv().unwrap().unwrap().bytes.len(), 262_144);
    // Longer than db can take, which web cannot know: the connection ends, and does not stop half-way.
    client.send(&[3; 40_001]).unwrap();
    assert_eq!(server.recv().unwrap(), None);
    assert_eq!(client.recv().unwrap(), None);
    assert!(server.was_reset() && client.was_reset());
    let labels = [("guest", "db"), ("reason", "message_too_long")];
    sidecar.until_metric("vsock_connections_closed_total", &labels, 1.0);
    drop((client, server));
    until("the connection is over", || {
        web.open_connections() == 0 && db.open_connections() == 0
    });
    for guest in [&web, &db] {
        let stats = guest.stats();
        assert!(stats.violations.is_empty(), "{:?}", stats.violations);
    }
}

#[test]
fn a_drain_ends_what_guests_have_with_each_other_in_time() {
    let mut sidecar = Sidecar::start(&format!(
        "drain: {{timeout: 500ms}}\nguests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{TO_DB}]\n- name: db\n  cid: 5\n  vhostUser: {{socket: \"{{dir}}/db.sock\"}}\n"
    ));
    let (web, db) = guests(&sidecar);
    let listener = db.listen(7).unwrap();
    let (client, server) = streams(&web, &listener);
    ping(&client, &server);
    sidecar.terminate();
    let status = sidecar.wait(LONG);
    assert_eq!(status.code(), Some(0), "{}", sidecar.log_tail());
    assert_eq!((&client).read(&mut [0]).unwrap(), 0);
    assert_eq!((&server).read(&mut [0]).unwrap(), 0);
    for guest in [&web, &db] {
        // The end of one half can reach the other device before its own drain is over: then a guest has answered it already
        // when the reset comes, and knows of no connection any more.
        let violations = guest.stats().violations;
        let crossed = violations.count(Violation::UnexpectedRst);
        assert_eq!(violations.total(), crossed, "{violations:?}");
    }
}

/// The one who dialled goes as well, and while a dial is under way.
#[test]
fn the_guest_that_dialled_may_go_too_even_while_it_dials() {
    let sidecar = sidecar(TO_DB, "");
    let db = linux(&sidecar.path("db.sock"));
    let listener = db.listen(7).unwrap();
    for round in 0..4 {
        let web = linux(&sidecar.path("web.sock"));
        let (client, server) = streams(&web, &listener);
        ping(&client, &server);
        match round % 2 {
            0 => web.kill(),
            _ => web.reboot().unwrap(),
        }
        assert_eq!((&server).read(&mut [0]).unwrap(), 0);
        drop(server);
        // A request that db has not answered when web goes.
        if round % 2 == 1 {
            db.hold_rx(true);
            thread::scope(|scope| {
                let labels = [("guest", "web"), ("op", "request")];
                let before = sidecar.metric("vsock_packets_total", &labels);
                let dial = scope.spawn(|| web.connect_to(5, 7));
                until("the request has come", || {
                    sidecar.metric("vsock_packets_total", &labels) > before
                });
                web.kill();
                assert!(dial.join().unwrap().is_err());
            });
            db.hold_rx(false);
        }
        drop(web);
        sidecar.until_metric("vsock_session_active", &[("guest", "web")], 0.0);
    }
    until("db's ends are over", || {
        // What was accepted after its guest had gone ends by itself.
        while let Ok(late) = listener.accept_timeout(Duration::from_millis(1)) {
            late.set_read_timeout(Some(LONG));
            assert_eq!((&late).read(&mut [0]).unwrap(), 0);
        }
        db.open_connections() == 0
    });
    sidecar.until_metric("vsock_connections_active", &[], 0.0);
    assert!(db.stats().violations.is_empty(), "{:?}", db.stats().violations);
}
