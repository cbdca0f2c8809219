//! Clients that come from the host's side, and a guest that answers them wrongly.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use vsock_sidecar::vsock::{Header, Op, Port};

use crate::raw::{Raw, header};
use crate::stage::SERVED;
use crate::support::LONG;
use crate::table::{Answer, ONCE, Row, Survives};

pub const TITLE: &str = "Clients of the guest";

const OTHERS: Row = Row {
    survives: Survives::Others,
    ..Row::USUAL
};

/// A client, and the REQUEST that its guest got for it.
fn client(raw: &mut Raw<'_>) -> (UnixStream, Header) {
    let client = UnixStream::connect(raw.stage.sidecar.path("plain.sock")).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    let request = raw.await_request(SERVED);
    (client, request)
}

/// What a guest says to that.
fn reply(op: Op, request: &Header) -> Header {
    header(op as u16, SERVED, request.src_port.0)
}

/// Whether the client sees its end, in order or not.
fn has_ended(mut client: &UnixStream) -> bool {
    match client.read(&mut [0]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

pub const ROWS: &[Row] = &[
    Row {
        trick: "a guest that never answers",
        source: "Kata #8291 (clients waited for ever)",
        play: |raw| {
            let (client, _) = client(raw);
            assert_eq!(raw.await_word(SERVED).header.op, Op::Rst as u16);
            assert!(has_ended(&client));
        },
        answer: Answer::Seen("RST after guestTimeout"),
        counted: &[("refused guest_timeout plain", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "RST, again and again",
        play: |raw| {
            for _ in 0..50 {
                let (client, request) = client(raw);
                raw.send(reply(Op::Rst, &request), &[]);
                assert!(has_ended(&client));
            }
        },
        counted: &[("refused guest_rst plain", 50..=50)],
        ..OTHERS
    },
    Row {
        trick: "RESPONSE a thousand times",
        source: "vhost-device-vsock (a second RESPONSE panicked)",
        play: |raw| {
            let (client, request) = client(raw);
            let response = reply(Op::Response, &request);
            raw.storm(1000, |_| (response, b""));
            assert!(has_ended(&client));
        },
        // One for the connection, one for each RESPONSE behind it, which is on no flow.
        answer: Answer::Rsts(1..=999),
        counted: &[
            ("misbehavior unexpected_response", ONCE),
            ("closed misbehavior plain", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "RESPONSE to a client that has left",
        source: "Cloud Hypervisor #3485 (broken pipe)",
        play: |raw| {
            for _ in 0..30 {
                let (gone, request) = client(raw);
                drop(gone);
                raw.send(reply(Op::Response, &request), &[]);
                let end = raw.await_word(SERVED).header;
                // It is told of the end of one that it accepted, or that nobody waits any more.
                if end.op == Op::Shutdown as u16 {
                    raw.send(reply(Op::Rst, &request), &[]);
                } else {
                    assert_eq!(end.op, Op::Rst as u16);
                }
            }
            raw.good_goes_on();
            raw.take_heard();
        },
        answer: Answer::Seen("SHUTDOWN or RST, each time"),
        counted: &[
            ("refused client_gone plain", 0..=30),
            ("closed guest_rst plain", 0..=30),
            ("closed peer_fin plain", 0..=30),
        ],
        ..OTHERS
    },
    Row {
        trick: "RESPONSE to a CONNECT client that takes no OK",
        source: "vhost-device-vsock (writing OK panicked)",
        play: |raw| {
            let mut gone = UnixStream::connect(raw.stage.sidecar.path("mux.sock")).unwrap();
            gone.write_all(format!("CONNECT {SERVED}\n").as_bytes()).unwrap();
            let request = raw.await_request(SERVED);
            gone.shutdown(std::net::Shutdown::Read).unwrap();
            raw.send(reply(Op::Response, &request), &[]);
            let end = raw.await_word(SERVED).header;
            assert!([Op::Rst as u16, Op::Shutdown as u16].contains(&end.op));
            raw.send(reply(Op::Rst, &request), &[]);
            raw.good_goes_on();
            raw.take_heard();
        },
        answer: Answer::Seen("RST or SHUTDOWN"),
        counted: &[("closed peer_rst mux", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "data instead of RESPONSE",
        play: |raw| {
            let (client, request) = client(raw);
            raw.send(reply(Op::Rw, &request), b"impatient");
            raw.await_word(SERVED);
            assert!(has_ended(&client));
        },
        answer: Answer::Seen("RST"),
        counted: &[
            ("misbehavior not_established", ONCE),
            ("refused misbehavior plain", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "SHUTDOWN instead of RESPONSE",
        play: |raw| {
            let (client, request) = client(raw);
            let mut head = reply(Op::Shutdown, &request);
            head.flags = 3;
            raw.send(head, &[]);
            assert!(has_ended(&client));
        },
        answer: Answer::Rst,
        counted: &[
            ("misbehavior not_established", ONCE),
            ("refused misbehavior plain", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "REQUEST instead of RESPONSE, from and to the same ports",
        play: |raw| {
            let (client, request) = client(raw);
            raw.send(reply(Op::Request, &request), &[]);
            assert!(has_ended(&client));
        },
        answer: Answer::Rst,
        counted: &[
            ("misbehavior duplicate_request", ONCE),
            ("refused misbehavior plain", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "RESPONSE of another socket type",
        play: |raw| {
            let (client, request) = client(raw);
            let mut head = reply(Op::Response, &request);
            head.socket_type = 2;
            raw.send(head, &[]);
            assert!(has_ended(&client));
        },
        answer: Answer::Rst,
        counted: &[
            ("misbehavior unsupported_type", ONCE),
            ("refused misbehavior plain", ONCE),
        ],
        ..OTHERS
    },
    Row {
        trick: "RESPONSE to a port that we never asked from",
        source: "Cloud Hypervisor (a local port was freed by who did not own it)",
        play: |raw| {
            let (client, request) = client(raw);
            let mut head = reply(Op::Response, &request);
            head.dst_port = Port(request.src_port.0 + 1);
            raw.send(head, &[]);
            assert_eq!(raw.await_word(SERVED).header.src_port, head.dst_port);
            // The one that was asked can still answer.
            raw.send(reply(Op::Response, &request), &[]);
            (&client).write_all(b"hello").unwrap();
            assert_eq!(raw.await_word(SERVED).payload, b"hello");
            raw.send(reply(Op::Rst, &request), &[]);
        },
        answer: Answer::Seen("RST for that port, and only for that"),
        counted: &[("closed guest_rst plain", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "RESPONSE with no room, for a client that says much",
        source: "vhost-device-vsock (credit underflow)",
        play: |raw| {
            let (client, request) = client(raw);
            let mut head = reply(Op::Response, &request);
            head.buf_alloc = 0;
            raw.send(head, &[]);
            client.set_nonblocking(true).unwrap();
            while (&client).write(&[1; 4096]).is_ok() {}
            raw.good_goes_on();
            let heard = raw.take_heard();
            assert!(heard.is_empty(), "bytes without credit: {heard:?}");
            raw.send(reply(Op::Rst, &request), &[]);
        },
        answer: Answer::Seen("not a byte"),
        counted: &[("closed guest_rst plain", ONCE)],
        ..OTHERS
    },
    Row {
        trick: "clients that send half a CONNECT line, or none, and leave",
        source: "Cloud Hypervisor #6798, #6621 (half a CONNECT crashed the VMM)",
        play: |raw| {
            for line in ["", "C", "CONNECT", "CONNECT ", "CONNECT 5"] {
                let mut client = UnixStream::connect(raw.stage.sidecar.path("mux.sock")).unwrap();
                client.write_all(line.as_bytes()).unwrap();
                drop(client);
            }
        },
        counted: &[("refused bad_handshake mux", 5..=5)],
        ..OTHERS
    },
    Row {
        trick: "clients that CONNECT to no port",
        source: "vhost-device-vsock (any short read was an error)",
        play: |raw| {
            let long = "CONNECT ".to_owned() + &"5".repeat(5000) + "\n";
            for line in [
                "CONNECT x\n",
                "CONNECT -1\n",
                "CONNECT 4294967296\n",
                "GET / HTTP/1.1\r\n",
                "\0\n",
                &long,
            ] {
                let mut client = UnixStream::connect(raw.stage.sidecar.path("mux.sock")).unwrap();
                client.set_read_timeout(Some(LONG)).unwrap();
                // It may have been refused before its last word.
                let _ = client.write_all(line.as_bytes());
                assert!(has_ended(&client), "{line:?}");
            }
        },
        counted: &[("refused bad_handshake mux", 6..=6)],
        ..OTHERS
    },
    Row {
        trick: "CONNECT byte by byte, with data close behind",
        source: "vhost-device-vsock (bytes behind CONNECT were lost)",
        play: |raw| {
            let mut client = UnixStream::connect(raw.stage.sidecar.path("mux.sock")).unwrap();
            client.set_read_timeout(Some(LONG)).unwrap();
            for byte in format!("CONNECT {SERVED}\n").bytes() {
                client.write_all(&[byte]).unwrap();
                raw.good_goes_on();
            }
            client.write_all(b"close behind").unwrap();
            let request = raw.await_request(SERVED);
            raw.send(reply(Op::Response, &request), &[]);
            let mut got = Vec::new();
            while got.len() < 12 {
                got.extend(raw.await_word(SERVED).payload);
            }
            assert_eq!(got, b"close behind");
            raw.send(reply(Op::Rst, &request), &[]);
        },
        answer: Answer::Seen("REQUEST, then every byte"),
        counted: &[("closed guest_rst mux", ONCE)],
        ..OTHERS
    },
];
