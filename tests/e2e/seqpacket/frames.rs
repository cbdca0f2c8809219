//! `framing: length-prefixed`: messages on streams of bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

use super::*;

/// A rule that leads to a TCP service which speaks in frames.
fn framed(listener: &TcpListener, more: &str) -> Sidecar {
    let to = listener.local_addr().unwrap();
    outbound(&format!(
        "{{name: framed, port: 70, to: \"tcp://{to}\", framing: length-prefixed{more}}}"
    ))
}

#[test]
fn frames_carry_messages_to_a_tcp_target_and_back() {
    let listener = local();
    let sidecar = framed(&listener, "");
    let guest = linux(&sidecar.path("web.sock"));
    let socket = patient(guest.connect_seqpacket(70).unwrap());
    thread::scope(|scope| {
        scope.spawn(|| echo_frames(accept_tcp(&listener)));
        echo_through(&socket);
    });

    // Frames byte by byte, several in one segment, empty ones, the last one behind the guest's half-close.
    let socket = patient(guest.connect_seqpacket(70).unwrap());
    let mut service = accept_tcp(&listener);
    for byte in frame(b"slowly") {
        service.write_all(&[byte]).unwrap();
    }
    let several = [frame(b"a"), frame(b""), frame(b""), frame(&of_length(9000))].concat();
    service.write_all(&several).unwrap();
    for expected in [&b"slowly"[..], b"a", b"", b"", &of_length(9000)] {
        assert!(recv(&socket).unwrap() == expected, "{} bytes", expected.len());
    }
    socket.send_end_of_record(b"").unwrap();
    socket.send(b"last").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_frame(&service).unwrap(), b"");
    assert_eq!(read_frame(&service).unwrap(), b"last");
    assert_eq!(read_frame(&service), None);
    service.write_all(&frame(b"behind it")).unwrap();
    service.shutdown(Shutdown::Write).unwrap();
    assert_eq!(recv(&socket).unwrap(), b"behind it");
    assert_eq!(recv(&socket), None);
    drop(socket);
    until("the connections are over", || guest.open_connections() == 0);
    assert_lawful(&guest);
}

#[test]
fn clients_of_a_framed_listener_reach_seqpacket_servers() {
    let port = free_port();
    let sidecar = inbound(&format!(
        "{{name: in, listen: \"tcp://127.0.0.1:{port}\", framing: length-prefixed, port: 5}}"
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen_seqpacket(5).unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.patient();
    client.write_all(&frame(b"early")).unwrap();
    let server = patient(listener.accept_timeout(LONG).unwrap());
    assert_eq!(recv(&server).unwrap(), b"early");
    thread::scope(|scope| {
        let sender = client.try_clone().unwrap();
        scope.spawn(move || {
            for len in LENGTHS {
                (&sender).write_all(&frame(&of_length(len))).unwrap();
            }
            sender.shutdown(Shutdown::Write).unwrap();
        });
        scope.spawn(|| echo_in_guest(&server));
        for len in LENGTHS {
            let message = read_frame(&client).unwrap();
            assert!(message == of_length(len), "{} of {len} bytes", message.len());
        }
        assert_eq!(read_frame(&client), None);
    });
    drop((server, client));
    until("the connection is over", || guest.open_connections() == 0);
    assert_lawful(&guest);
}

#[test]
fn a_message_of_the_rules_limit_passes_and_a_longer_one_ends_its_connection_only() {
    let listener = local();
    let sidecar = framed(&listener, ", maxMessage: 1KiB");
    let guest = linux(&sidecar.path("web.sock"));
    let bystander = patient(guest.connect_seqpacket(70).unwrap());
    let mut bystander_service = accept_tcp(&listener);

    let socket = patient(guest.connect_seqpacket(70).unwrap());
    let mut service = accept_tcp(&listener);
    socket.send(&of_length(1024)).unwrap();
    assert!(read_frame(&service).unwrap() == of_length(1024));
    service.write_all(&frame(&of_length(1024))).unwrap();
    assert!(recv(&socket).unwrap() == of_length(1024));
    // From the guest: the service must not take it for the end of what was to be said.
    socket.send(b"before").unwrap();
    socket.send(&of_length(1025)).unwrap();
    assert_eq!(recv(&socket), None);
    assert!(socket.was_reset());
    let mut rest = Vec::new();
    let end = service.read_to_end(&mut rest).map_err(|error| error.kind());
    assert_eq!(end, Err(ErrorKind::ConnectionReset), "{rest:?}");

    // From the service: a length that the rule does not allow, however few bytes follow.
    let socket = patient(guest.connect_seqpacket(70).unwrap());
    let mut service = accept_tcp(&listener);
    service.write_all(&frame(b"before")).unwrap();
    service.write_all(&u32::MAX.to_be_bytes()).unwrap();
    assert_eq!(recv(&socket).unwrap(), b"before");
    assert_eq!(recv(&socket), None);
    assert!(socket.was_reset());
    read_to_end(&service);
    let labels = [("reason", "message_too_long")];
    sidecar.until_metric("vsock_connections_closed_total", &labels, 2.0);

    bystander.send(b"unharmed").unwrap();
    assert_eq!(read_frame(&bystander_service).unwrap(), b"unharmed");
    bystander_service.write_all(&frame(b"so am I")).unwrap();
    assert_eq!(recv(&bystander).unwrap(), b"so am I");
    assert_lawful(&guest);
}

/// The guest could never take it: credit for the rest would come when the application has the whole.
#[test]
fn a_message_that_is_longer_than_the_guests_buffer_is_not_begun() {
    let listener = local();
    let sidecar = framed(&listener, "");
    let options = SocketOptions {
        buf_alloc: 20_000,
        ..Default::default()
    };
    let guest = guest(
        &sidecar.path("web.sock"),
        Profile::qemu(),
        DriverOptions::default(),
        options,
    );
    let socket = patient(guest.connect_seqpacket(70).unwrap());
    let mut service = accept_tcp(&listener);
    for len in [20_000, 19_999, 20_000] {
        service.write_all(&frame(&of_length(len))).unwrap();
    }
    for len in [20_000, 19_999, 20_000] {
        assert!(recv(&socket).unwrap() == of_length(len));
    }
    // An error of the service: it may be reset while it still writes.
    let _ = service.write_all(&frame(&of_length(20_001)));
    assert_eq!(recv(&socket), None);
    assert!(socket.was_reset());
    let labels = [("reason", "message_too_long")];
    sidecar.until_metric("vsock_connections_closed_total", &labels, 1.0);
    assert_lawful(&guest);
}

#[test]
fn a_frame_that_is_cut_by_the_end_is_a_reset_and_no_message() {
    let listener = local();
    let sidecar = framed(&listener, "");
    let guest = linux(&sidecar.path("web.sock"));
    let whole = frame(b"whole");
    let long = frame(&of_length(100_000));
    for (what, cut) in [
        ("in the length", &whole[..3]),
        ("behind the length", &whole[..4]),
        ("in the message", &whole[..8]),
        ("in a message that the guest has begun to get", &long[..99_999]),
    ] {
        let socket = patient(guest.connect_seqpacket(70).unwrap());
        let mut service = accept_tcp(&listener);
        service.write_all(&whole).unwrap();
        service.write_all(cut).unwrap();
        service.shutdown(Shutdown::Write).unwrap();
        assert_eq!(recv(&socket).unwrap(), b"whole", "{what}");
        assert_eq!(recv(&socket), None, "{what}");
        assert!(socket.was_reset(), "{what}: an ordinary end");
        read_to_end(&service);
    }
    sidecar.until_metric("vsock_connections_closed_total", &[("reason", "peer_rst")], 4.0);
    until("the connections are over", || guest.open_connections() == 0);
    assert_lawful(&guest);
}
