//! Inbound clients before they reach the guest: those that may not, and those that wait for it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use crate::support::*;

fn sidecar(rule: &str, guest_timeout: &str) -> Sidecar {
    Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  inbound:\n  - {rule}\n  \
         limits: {{guestTimeout: {guest_timeout}}}\n"
    ))
}

/// A client from any address of loopback.
fn connect_from(ip: &str, port: u16) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket
        .bind(&format!("{ip}:0").parse::<SocketAddr>().unwrap().into())
        .unwrap();
    socket
        .connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())
        .unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket.into()
}

/// The guest never hears of who is not allowed, and who is allowed does not feel it.
#[test]
fn only_allowed_addresses_reach_the_guest() {
    let port = free_port();
    let sidecar = sidecar(
        &format!(
            "{{name: ssh, listen: \"tcp://127.0.0.1:{port}\", port: 22, allow: [127.8.0.0/16, 10.0.0.0/8]}}"
        ),
        "5s",
    );
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(22).unwrap();

    let mut friend = connect_from("127.8.1.1", port);
    friend.write_all(b"hello").unwrap();
    let mut server = listener.accept_timeout(LONG).unwrap();
    server.set_read_timeout(Some(LONG));
    let mut hello = [0; 5];
    server.read_exact(&mut hello).unwrap();

    for ip in ["127.0.0.1", "127.9.0.1", "127.7.255.255"] {
        assert_eq!(read_to_end(connect_from(ip, port)), b"", "{ip}");
    }
    let labels = [("rule", "ssh"), ("reason", "acl")];
    sidecar.until_metric("vsock_connections_refused_total", &labels, 3.0);
    assert_eq!(
        sidecar.metric("vsock_connections_opened_total", &[("rule", "ssh")]),
        1.0
    );
    let told = sidecar.logged("inbound client refused", |event| {
        field(event, "reason") == "acl" && field(event, "peer").starts_with("127.9.0.1:")
    });
    assert!(
        told.iter().all(|event| field(event, "level") == "DEBUG"),
        "{told:?}"
    );

    server.write_all(b"still here").unwrap();
    let mut still = [0; 10];
    friend.read_exact(&mut still).unwrap();
    assert_lawful(&guest);
}

/// From before the VMM is there until after its guest has refused: the client waits, and its bytes with it.
#[test]
fn a_client_waits_for_a_guest_that_boots_and_then_listens() {
    let sidecar = sidecar(
        "{name: ssh, listen: \"unix://{dir}/ssh.sock\", port: 22, waitForGuest: true}",
        "1m",
    );
    let mut client = UnixStream::connect(sidecar.path("ssh.sock")).unwrap();
    client.patient();
    client.write_all(b"early").unwrap();
    let requests = || {
        sidecar.metric(
            "vsock_packets_total",
            &[("direction", "host_to_guest"), ("op", "request")],
        )
    };
    until("the client is known", || {
        sidecar.state()["guests"][0]["device"]["connections"]
            .as_array()
            .is_some_and(|all| all.len() == 1)
    });
    assert_eq!(requests(), 0.0);

    // Nobody listens yet: it is asked, refuses, and is asked again.
    let guest = linux(&sidecar.path("web.sock"));
    until("the guest is asked again", || requests() >= 3.0);
    // Its successor after a reboot is asked as well.
    guest.reboot().unwrap();
    let before = requests();
    until("the next guest is asked", || requests() > before);

    let listener = guest.listen(22).unwrap();
    let mut server = listener.accept_timeout(LONG).unwrap();
    server.set_read_timeout(Some(LONG));
    let mut early = [0; 5];
    server.read_exact(&mut early).unwrap();
    assert_eq!(&early, b"early");
    server.write_all(b"late").unwrap();
    let mut late = [0; 4];
    client.read_exact(&mut late).unwrap();
    assert_eq!(&late, b"late");
    assert_eq!(
        sidecar.metric("vsock_connections_refused_total", &[("rule", "ssh")]),
        0.0
    );
    assert_eq!(
        sidecar.metric("vsock_connections_opened_total", &[("rule", "ssh")]),
        1.0
    );
    assert_lawful(&guest);
}

/// `OK` comes when the guest has accepted, and not before.
#[test]
fn a_connect_client_waits_for_its_ok() {
    let sidecar = sidecar(
        "{name: mux, listen: \"unix://{dir}/mux.sock\", protocol: connect, waitForGuest: true}",
        "1m",
    );
    let guest = linux(&sidecar.path("web.sock"));
    let mut client = UnixStream::connect(sidecar.path("mux.sock")).unwrap();
    client.patient();
    client.write_all(b"CONNECT 22\n").unwrap();
    let labels = [("direction", "host_to_guest"), ("op", "request")];
    until("the guest is asked again", || {
        sidecar.metric("vsock_packets_total", &labels) >= 2.0
    });
    let listener = guest.listen(22).unwrap();
    let _server = listener.accept_timeout(LONG).unwrap();
    let mut ok = [0; 3];
    client.read_exact(&mut ok).unwrap();
    assert_eq!(&ok, b"OK ");
    assert_lawful(&guest);
}

#[test]
fn a_wait_ends_with_the_guests_time_and_says_what_the_guest_did() {
    let port = free_port();
    let sidecar = sidecar(
        &format!("{{name: ssh, listen: \"tcp://127.0.0.1:{port}\", port: 22, waitForGuest: true}}"),
        "300ms",
    );
    let refused = |reason| [("rule", "ssh"), ("reason", reason)];
    // No VMM at all.
    assert_eq!(read_to_end(connect_from("127.0.0.1", port)), b"");
    sidecar.until_metric("vsock_connections_refused_total", &refused("guest_timeout"), 1.0);
    // A guest in which nobody listens.
    let guest = linux(&sidecar.path("web.sock"));
    assert_eq!(read_to_end(connect_from("127.0.0.1", port)), b"");
    sidecar.until_metric("vsock_connections_refused_total", &refused("guest_rst"), 1.0);
    assert_eq!(guest.open_connections(), 0);
    assert_lawful(&guest);
}

/// SIGTERM with a client that would wait for an hour: nothing of it is lost, so nothing is waited for.
#[test]
fn a_drain_does_not_wait_for_those_who_wait() {
    let mut sidecar = sidecar(
        "{name: ssh, listen: \"unix://{dir}/ssh.sock\", port: 22, waitForGuest: true}",
        "1h",
    );
    let client = UnixStream::connect(sidecar.path("ssh.sock")).unwrap();
    client.patient();
    until("the client is known", || {
        sidecar.state()["guests"][0]["device"]["connections"]
            .as_array()
            .is_some_and(|all| all.len() == 1)
    });
    sidecar.terminate();
    let ended = thread::spawn(move || read_to_end(client));
    // Less than the drain period of 25 s.
    let status = sidecar.wait(Duration::from_secs(20));
    assert!(status.success(), "{status}");
    assert_eq!(ended.join().unwrap(), b"");
    assert!(!sidecar.events("drained").is_empty(), "{}", sidecar.log_tail());
}
