//! Who counts as a client on this machine, for what only those may do.

use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Socket, Type};

use super::*;

/// The status of a request without a body, from this address of loopback.
fn asked_from(server: &Server, ip: [u8; 4], head: &str) -> (u16, String) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(IpAddr::from(ip), 0).into()).unwrap();
    socket.connect(&server.tcp.into()).unwrap();
    let stream: TcpStream = socket.into();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let reply = Client::new(stream).ask(&format!("{head}\r\ncontent-length: 0\r\n\r\n"));
    (reply.status, reply.body)
}

/// Istio's proxy hands over what anybody in the mesh sends to a port that no Service names, and comes from 127.0.0.6 for it
/// (kubevirt/kubevirt a24ada60). That is loopback, and nobody on this machine.
#[test]
fn a_mesh_that_hands_over_requests_from_a_loopback_address_is_not_this_machine() {
    let server = Server::start(Limits::default());
    for head in [
        "POST /-/drain HTTP/1.1\r\nhost: 10.0.0.7:9464",
        "POST /-/reload HTTP/1.1\r\nhost: localhost",
        "GET /capture?guest=web HTTP/1.1\r\nhost: 10.0.0.7:9464",
    ] {
        let (status, body) = asked_from(&server, [127, 0, 0, 6], head);
        assert_eq!(status, 403, "{head}: {body}");
        assert!(body.contains("127.0.0.6"), "{body}");
    }
    assert!(!server.program.drained.load(Ordering::SeqCst));
    // Scrapes and probes are for everybody.
    for path in ["/metrics", "/readyz"] {
        let head = format!("GET {path} HTTP/1.1\r\nhost: 10.0.0.7:9464");
        assert_eq!(asked_from(&server, [127, 0, 0, 6], &head).0, 200);
    }
}

/// Other proxies come from 127.0.0.1, and say for whom.
#[test]
fn what_a_proxy_hands_over_is_not_from_this_machine() {
    let server = Server::start(Limits::default());
    for field in [
        "forwarded: for=10.1.2.3",
        "x-forwarded-for: 10.1.2.3",
        "X-Forwarded-Proto: http",
        "x-real-ip: 10.1.2.3",
        "via: 1.1 proxy",
    ] {
        let head = format!("POST /-/drain HTTP/1.1\r\nhost: localhost\r\n{field}");
        let (status, body) = asked_from(&server, [127, 0, 0, 1], &head);
        assert_eq!(status, 403, "{head}: {body}");
        assert!(body.contains("proxy"), "{body}");
    }
    assert!(!server.program.drained.load(Ordering::SeqCst));
}

#[test]
fn who_is_here_may_drain_in_every_form_of_a_request() {
    for head in [
        "POST /-/drain HTTP/1.1\r\nhost: localhost:9464",
        "POST /-/drain HTTP/1.1\r\nhost: [::1]:9464",
        "POST /-/drain HTTP/1.0",
        "POST http://127.0.0.1:9464/-/drain HTTP/1.1\r\nhost: 127.0.0.1:9464",
    ] {
        let server = Server::start(Limits::default());
        let (status, body) = asked_from(&server, [127, 0, 0, 1], head);
        assert_eq!((status, body.as_str()), (202, "draining\n"), "{head}");
        assert!(server.program.drained.load(Ordering::SeqCst));
    }
}

/// A name that leads to 127.0.0.1 is in the target of the request as well as it may be in its `Host` (RFC 9112, 3.2.2: it is the
/// target that counts).
#[test]
fn a_request_for_a_host_name_is_not_heard_however_it_is_told() {
    let server = Server::start(Limits::default());
    for head in [
        "POST /-/drain HTTP/1.1\r\nhost: evil.example",
        "POST http://evil.example/-/drain HTTP/1.1\r\nhost: localhost",
        "POST /-/drain HTTP/1.1\r\nhost: localhost\r\nhost: evil.example",
        "POST /-/drain HTTP/1.1\r\nhost: localhost\r\norigin: null",
        "POST /-/drain HTTP/1.1\r\nhost: localhost\r\nsec-fetch-site: cross-site",
    ] {
        let (status, body) = asked_from(&server, [127, 0, 0, 1], head);
        assert!([400, 403].contains(&status), "{status} {head}: {body}");
    }
    assert!(!server.program.drained.load(Ordering::SeqCst));
}

/// Bodies are not read, whatever they announce, and what follows them is never taken for a request.
#[test]
fn a_body_is_no_request() {
    let server = Server::start(Limits::default());
    let inner = "POST /-/drain HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n";
    for head in [
        format!(
            "POST /-/reload HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}",
            inner.len()
        ),
        format!(
            "POST /-/reload HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{inner}\r\n0",
            inner.len()
        ),
        "POST /-/reload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\ncontent-length: 70".to_owned(),
        "POST /-/reload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 70\r\ntransfer-encoding: chunked"
            .to_owned(),
    ] {
        let mut client = server.tcp();
        client
            .stream
            .write_all(format!("{head}\r\n\r\n").as_bytes())
            .unwrap();
        if !head.contains("chunked") {
            client.stream.write_all(inner.as_bytes()).unwrap();
        }
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        client.closed();
        assert!(!server.program.drained.load(Ordering::SeqCst), "{head}");
    }
}
