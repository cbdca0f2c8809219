//! What runs in the machine: the binary, an embedded guest, and AF_VSOCK services and clients. A file of tests that are
//! ignored everywhere but there.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use vsock_sidecar::embedded_guest::{GuestListener, Sockets};

use super::support::{Bytes, LONG, Service, Sidecar, assert_lawful, echo, field, linux, read_to_end};

/// A file that the machine has and no other place.
pub const MARK: &str = "/nested-vsock-machine";

/// The tests below, in the order in which they are run.
pub const SCENARIOS: &[&str] = &[
    "ten_mebibytes_come_back_from_a_vsock_service",
    "each_half_of_a_connection_to_a_vsock_service_ends_alone",
    "a_service_that_reads_nothing_holds_its_guest_up_and_loses_nothing",
    "vsock_targets_that_cannot_be_reached_are_refused_with_the_reason",
    "vsock_clients_reach_the_guest",
    "a_vsock_client_names_its_guest_port",
    "a_vsock_port_that_is_taken_is_an_error_at_start",
];

const MIB: u64 = 1 << 20;
/// This machine, `VMADDR_CID_LOCAL`.
const LOCAL: u32 = 1;
const ANY: u32 = u32::MAX;

/// Whether this is the machine. Elsewhere nothing may open a socket of the family.
fn is_machine() -> bool {
    let there = Path::new(MARK).exists();
    if !there {
        println!("left out: this runs inside the machine that tests/nested_vsock boots");
    }
    there
}

fn socket() -> Socket {
    assert!(is_machine());
    Socket::new(Domain::VSOCK, Type::STREAM, None).unwrap()
}

fn listen(port: u32) -> Socket {
    let listener = socket();
    listener.bind(&SockAddr::vsock(ANY, port)).unwrap();
    listener.listen(16).unwrap();
    listener.set_read_timeout(Some(LONG)).unwrap();
    listener
}

/// The next client of a listener.
fn accept(listener: &Socket) -> Vsock {
    let (socket, peer) = listener.accept().expect("a connection comes");
    assert_eq!(peer.as_vsock_address().map(|(cid, _)| cid), Some(LOCAL));
    let stream = Vsock(socket);
    stream.patient();
    stream
}

fn connect(port: u32) -> Vsock {
    let socket = socket();
    socket.connect(&SockAddr::vsock(LOCAL, port)).unwrap();
    let stream = Vsock(socket);
    stream.patient();
    stream
}

/// A connected AF_VSOCK socket.
struct Vsock(Socket);

impl Read for Vsock {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Vsock {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Service for Vsock {
    fn shutdown(&self, how: Shutdown) {
        let _ = self.0.shutdown(how);
    }

    fn patient(&self) {
        self.0.set_read_timeout(Some(LONG)).unwrap();
        self.0.set_write_timeout(Some(LONG)).unwrap();
    }
}

/// The sidecar with these rules and a guest.
fn start(rules: &str) -> (Sidecar, Sockets) {
    let sidecar = Sidecar::start(&format!(
        "guests:\n  - name: nested\n    cid: 42\n    vhostUser: {{socket: \"{{dir}}/vhost.sock\"}}\n{rules}"
    ));
    let guest = linux(&sidecar.path("vhost.sock"));
    (sidecar, guest)
}

fn next(listener: &GuestListener) -> vsock_sidecar::embedded_guest::GuestStream {
    listener.accept_timeout(LONG).expect("the guest gets a client")
}

/// The one connection of a scenario, as the log tells of its end.
fn ended(sidecar: &Sidecar) -> serde_json::Value {
    super::support::until("the connection's end is logged", || {
        !sidecar.events("connection ended").is_empty()
    });
    sidecar.events("connection ended").remove(0)
}

#[test]
#[ignore = "runs inside the machine"]
fn ten_mebibytes_come_back_from_a_vsock_service() {
    if !is_machine() {
        return;
    }
    let service = listen(5003);
    thread::spawn(move || echo(accept(&service)));
    // The range keeps its offset.
    let (sidecar, guest) = start("    outbound: [{name: echo, ports: 100-110, to: \"vsock://1:5000\"}]\n");
    let mut stream = guest.connect(103).unwrap();
    stream.set_read_timeout(Some(LONG));
    let mut writer = stream.try_clone().unwrap();
    let sends = thread::spawn(move || {
        Bytes::new(1).write_to(&mut writer, 10 * MIB).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    Bytes::new(1).expect_from(&mut stream, 10 * MIB);
    sends.join().unwrap();
    assert_eq!(
        read_to_end(&mut stream),
        b"",
        "the end comes behind the last byte"
    );
    drop(stream);
    let end = ended(&sidecar);
    assert_eq!(field(&end, "peer"), "vsock://1:5003");
    assert_eq!(field(&end, "bytes_from_guest"), (10 * MIB).to_string());
    assert_eq!(field(&end, "bytes_to_guest"), (10 * MIB).to_string());
    assert_lawful(&guest);
}

#[test]
#[ignore = "runs inside the machine"]
fn each_half_of_a_connection_to_a_vsock_service_ends_alone() {
    if !is_machine() {
        return;
    }
    let service = listen(5000);
    let (sidecar, guest) = start("    outbound: [{name: halves, port: 5000, to: \"vsock://1:5000\"}]\n");

    // The service ends first, with bytes on the way, and reads on.
    let mut stream = guest.connect(5000).unwrap();
    stream.set_read_timeout(Some(LONG));
    let mut served = accept(&service);
    let ends_first = thread::spawn(move || {
        Bytes::new(2).write_to(&mut served, MIB).unwrap();
        served.shutdown(Shutdown::Write);
        Bytes::new(3).expect_from(&mut served, MIB);
        assert_eq!(served.read(&mut [0; 1]).unwrap(), 0, "the guest's end is seen");
    });
    Bytes::new(2).expect_from(&mut stream, MIB);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    Bytes::new(3).write_to(&mut stream, MIB).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    ends_first.join().unwrap();
    drop(stream);

    // The guest ends first; then what it sent is read to the end, and answered.
    let mut stream = guest.connect(5000).unwrap();
    stream.set_read_timeout(Some(LONG));
    let mut served = accept(&service);
    stream.write_all(b"a question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut served), b"a question");
    served.write_all(b"an answer").unwrap();
    drop(served);
    assert_eq!(read_to_end(&mut stream), b"an answer");
    drop(stream);

    // A service that closes with bytes of the guest unread: the guest is not left hanging.
    let mut stream = guest.connect(5000).unwrap();
    stream.set_read_timeout(Some(LONG));
    let served = accept(&service);
    stream.write_all(b"never read").unwrap();
    drop(served);
    assert_eq!(read_to_end(&mut stream), b"");
    drop(stream);
    sidecar.until_metric("vsock_connections_active", &[("guest", "nested")], 0.0);
    assert_lawful(&guest);
}

/// The kernel's credit runs out, the sidecar's buffer fills, the guest's credit runs out; and each wakes the next again.
#[test]
#[ignore = "runs inside the machine"]
fn a_service_that_reads_nothing_holds_its_guest_up_and_loses_nothing() {
    if !is_machine() {
        return;
    }
    const SENT: u64 = 4 * MIB;
    let service = listen(5000);
    let (sidecar, guest) = start("    outbound: [{name: slow, port: 5000, to: \"vsock://1:5000\"}]\n");
    let mut stream = guest.connect(5000).unwrap();
    let mut served = accept(&service);
    stream.set_write_timeout(Some(Duration::from_secs(2)));
    let (tell_held_up, held_up) = mpsc::channel();
    let sends = thread::spawn(move || {
        let bytes = Bytes::new(4).take(SENT as usize);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match stream.write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // Nobody listens any more once the service reads.
                    let _ = tell_held_up.send(SENT - rest.len() as u64);
                }
                Err(error) => panic!("{error}"),
            }
        }
        stream.shutdown(Shutdown::Write).unwrap();
        stream
    });
    let taken = held_up.recv_timeout(LONG).expect("the guest is held up");
    assert!(taken < 2 * MIB, "{taken} bytes went to nobody");
    drop(held_up);
    Bytes::new(4).expect_from(&mut served, SENT);
    assert_eq!(served.read(&mut [0; 1]).unwrap(), 0);
    drop(sends.join().unwrap());
    drop(served);
    sidecar.until_metric("vsock_connections_active", &[("guest", "nested")], 0.0);
    assert_lawful(&guest);
}

#[test]
#[ignore = "runs inside the machine"]
fn vsock_targets_that_cannot_be_reached_are_refused_with_the_reason() {
    if !is_machine() {
        return;
    }
    let (sidecar, guest) = start(
        "    outbound:\n      - {name: nobody, port: 1, to: \"vsock://1:5999\"}\n      - {name: nowhere, port: 2, to: \"vsock://77:5000\"}\n",
    );
    for (port, rule, reason, words) in [
        (
            1,
            "nobody",
            "dial_refused",
            "vsock://1:5999 refused the connection: ",
        ),
        (2, "nowhere", "unreachable", "cannot reach vsock://77:5000: "),
    ] {
        let error = guest.connect(port).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{rule}: {error}");
        let labels = [("rule", rule), ("reason", reason)];
        assert_eq!(sidecar.metric("vsock_connections_refused_total", &labels), 1.0);
        let events = sidecar.events("target of a rule cannot be reached");
        let told = events.iter().any(|event| field(event, "error").contains(words));
        assert!(told, "{rule}: {events:?}");
    }
    assert_lawful(&guest);
}

#[test]
#[ignore = "runs inside the machine"]
fn vsock_clients_reach_the_guest() {
    if !is_machine() {
        return;
    }
    let (sidecar, guest) = start("    inbound: [{name: in, listen: \"vsock://6000\", port: 22}]\n");
    let listener = guest.listen(22).unwrap();
    let mut client = connect(6000);
    let (_, port) = client.0.local_addr().unwrap().as_vsock_address().unwrap();
    let mut stream = next(&listener);
    stream.set_read_timeout(Some(LONG));
    let echoes = thread::spawn(move || {
        let mut chunk = vec![0; 64 * 1024];
        loop {
            let n = stream.read(&mut chunk).unwrap();
            if n == 0 {
                break;
            }
            stream.write_all(&chunk[..n]).unwrap();
        }
        stream.shutdown(Shutdown::Write).unwrap();
        stream
    });
    let writer = Vsock(client.0.try_clone().unwrap());
    let sends = thread::spawn(move || {
        let mut writer = writer;
        Bytes::new(5).write_to(&mut writer, 10 * MIB).unwrap();
        writer.shutdown(Shutdown::Write);
    });
    Bytes::new(5).expect_from(&mut client, 10 * MIB);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    sends.join().unwrap();
    drop(echoes.join().unwrap());
    drop(client);
    let end = ended(&sidecar);
    assert_eq!(field(&end, "rule"), "in");
    assert_eq!(field(&end, "peer"), format!("vsock://1:{port}"));
    assert_eq!(field(&end, "bytes_to_guest"), (10 * MIB).to_string());

    // Nobody listens in the guest: the client is closed, and not left to wait.
    drop(listener);
    assert_eq!(read_to_end(&mut connect(6000)), b"");
    assert_lawful(&guest);
}

#[test]
#[ignore = "runs inside the machine"]
fn a_vsock_client_names_its_guest_port() {
    if !is_machine() {
        return;
    }
    let (_sidecar, guest) =
        start("    inbound: [{name: mux, listen: \"vsock://6000\", protocol: connect}]\n");
    let listener = guest.listen(1234).unwrap();
    let mut client = connect(6000);
    // In two pieces, the second of which has bytes for the guest.
    client.write_all(b"CONNECT ").unwrap();
    client.write_all(b"1234\nhello").unwrap();
    let mut stream = next(&listener);
    stream.set_read_timeout(Some(LONG));
    let mut hello = [0; 5];
    stream.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    stream.write_all(b"goodbye").unwrap();
    drop(stream);
    let answer = String::from_utf8(read_to_end(&mut client)).unwrap();
    let (line, rest) = answer.split_once('\n').unwrap();
    assert!(line.starts_with("OK "), "{answer}");
    assert_eq!(rest, "goodbye");
    assert_lawful(&guest);
}

#[test]
#[ignore = "runs inside the machine"]
fn a_vsock_port_that_is_taken_is_an_error_at_start() {
    if !is_machine() {
        return;
    }
    let _taken = listen(6000);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sidecar.yaml");
    let text = format!(
        "guests:\n  - name: nested\n    cid: 42\n    vhostUser: {{socket: \"{}/vhost.sock\"}}\n    inbound: [{{name: in, listen: \"vsock://6000\", port: 22}}]\n",
        dir.path().display()
    );
    std::fs::write(&file, text).unwrap();
    let (code, said) = super::support::run_to_end(&file);
    assert_eq!(code, Some(64), "{said}");
    assert!(
        said.contains("cannot bind vsock://6000: ") && said.contains("choose another port"),
        "{said}"
    );
}
