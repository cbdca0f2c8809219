//! SIGTERM: what is open may finish, what is new is refused, nothing is left behind.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vsock_sidecar::embedded_guest::{GuestStream, Sockets};

use crate::support::*;

/// A sidecar with an open connection to an echo service, and an inbound port.
fn busy(drain: &str) -> (Sidecar, Sockets, GuestStream, u16) {
    let (service, inbound) = (serve(echo), free_port());
    let sidecar = Sidecar::start(&format!(
        "drain: {{timeout: {drain}}}\nguests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{service}\"}}]\n  inbound:\n  \
         - {{name: ssh, listen: \"tcp://127.0.0.1:{inbound}\", port: 22}}\n  \
         - {{name: mux, listen: \"unix://{{dir}}/mux.sock\", protocol: connect}}\n"
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let stream = guest.connect(7).unwrap();
    stream.set_read_timeout(Some(LONG));
    (sidecar, guest, stream, inbound)
}

#[track_caller]
fn ping(stream: &GuestStream) {
    let mut stream = stream;
    stream.write_all(b"ping").unwrap();
    let mut pong = [0; 4];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"ping");
}

#[track_caller]
fn nothing_is_left(sidecar: &Sidecar) {
    let mut left: Vec<_> = std::fs::read_dir(sidecar.dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["sidecar.log", "sidecar.yaml"]);
}

/// As a native sidecar: the VMM is gone when SIGTERM comes.
#[test]
fn an_idle_sidecar_ends_at_once() {
    let (mut sidecar, guest, stream, _) = busy("25s, linger: 20s");
    drop(stream);
    until("the connection is over", || guest.open_connections() == 0);
    drop(guest);
    sidecar.until_metric("vsock_session_active", &[], 0.0);
    let asked = Instant::now();
    sidecar.terminate();
    assert_eq!(sidecar.wait(Duration::from_secs(10)).code(), Some(0));
    // The TCP end of the closed connection may linger; nobody waits for that.
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    nothing_is_left(&sidecar);
    assert_eq!(sidecar.events("drained").len(), 1);
    assert_eq!(sidecar.events("ended").len(), 1);
}

#[test]
fn a_drain_waits_for_open_connections_and_refuses_new_inbound_ones() {
    let (mut sidecar, guest, stream, inbound) = busy("25s");
    let _listener = guest.listen(22).unwrap();
    ping(&stream);
    let established = {
        let client = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
        let server = _listener.accept_timeout(LONG).unwrap();
        (client, server)
    };
    sidecar.terminate();
    until("readiness is gone", || {
        matches!(sidecar.try_get("/readyz"), Some((503, _)))
    });
    assert_eq!(
        sidecar.metric("vsock_session_state", &[("state", "draining")]),
        1.0
    );

    // What is new is refused: the listener closes, or who was in its queue is closed.
    until("inbound connections are refused", || {
        match TcpStream::connect(("127.0.0.1", inbound)) {
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
            Ok(client) => {
                // It was in the queue: closed without a byte, and the next one tells.
                client.set_read_timeout(Some(LONG)).unwrap();
                assert!(read_to_end(&client).is_empty());
                false
            }
        }
    });
    until("the unix listener is closed as well", || {
        UnixStream::connect(sidecar.path("mux.sock")).is_err()
    });
    // What is open goes on, both ways; the guest's own new connections too, it has no other way out.
    ping(&stream);
    ping(&guest.connect(7).unwrap());
    let (mut client, mut server) = established;
    client.write_all(b"still").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();

    assert!(!sidecar.has_ended());
    drop((stream, client, server));
    assert_eq!(sidecar.wait(LONG).code(), Some(0));
    nothing_is_left(&sidecar);
    assert_eq!(sidecar.events("drained").len(), 1, "{}", sidecar.log_tail());
}

#[test]
fn a_drain_ends_in_time_and_says_what_it_cut_off() {
    let (mut sidecar, guest, mut stream, _) = busy("700ms");
    let listener = guest.listen(22).unwrap();
    ping(&stream);
    let asked = Instant::now();
    sidecar.terminate();
    assert_eq!(sidecar.wait(LONG).code(), Some(0));
    let took = asked.elapsed();
    assert!(took >= Duration::from_millis(700), "{took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    // The guest hears RST before the session ends.
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!(stream.was_reset());
    drop(listener);
    let ended = sidecar.events("connection ended");
    assert_eq!(ended.len(), 1);
    assert_eq!(field(&ended[0], "reason"), "drain");
    let over = sidecar.events("drain period is over");
    assert_eq!(over.len(), 1, "{}", sidecar.log_tail());
    nothing_is_left(&sidecar);
}

/// As a plain container: SIGTERM comes to the VMM at the same time, and its guest, which shuts down, still has something to say.
#[test]
fn a_guest_that_shuts_down_with_the_sidecar_reaches_its_services_until_its_vmm_is_gone() {
    let (mut sidecar, guest, stream, inbound) = busy("120s, linger: 100s");
    drop(stream);
    until("the connection is over", || guest.open_connections() == 0);
    sidecar.terminate();
    until("the drain has begun", || {
        matches!(sidecar.try_get("/readyz"), Some((503, _)))
    });
    for _ in 0..3 {
        let stream = guest.connect(7).unwrap();
        stream.set_read_timeout(Some(LONG));
        ping(&stream);
    }
    until("clients are refused", || {
        TcpStream::connect(("127.0.0.1", inbound)).is_err()
    });
    assert!(!sidecar.has_ended());
    drop(guest);
    assert_eq!(sidecar.wait(Duration::from_secs(20)).code(), Some(0));
    nothing_is_left(&sidecar);
}

#[test]
fn a_vmm_that_stays_and_says_nothing_is_left_after_a_while() {
    let (mut sidecar, guest, stream, _) = busy("120s, linger: 400ms");
    ping(&stream);
    let asked = Instant::now();
    let (status, said) = sidecar.post("/-/drain");
    assert_eq!((status, said.as_str()), (202, "draining\n"));
    until("the drain has begun", || {
        matches!(sidecar.try_get("/readyz"), Some((503, _)))
    });
    ping(&stream);
    // It is not read again now.
    sidecar.rewrite("guests: 7\n");
    assert_eq!(sidecar.post("/-/reload").0, 503);
    drop(stream);
    assert_eq!(sidecar.wait(Duration::from_secs(20)).code(), Some(0));
    assert!(
        asked.elapsed() >= Duration::from_millis(400),
        "{:?}",
        asked.elapsed()
    );
    assert_eq!(sidecar.events("drained").len(), 1, "{}", sidecar.log_tail());
    drop(guest);
}

#[test]
fn a_second_signal_ends_the_drain_at_once() {
    let (mut sidecar, _guest, stream, _) = busy("120s");
    ping(&stream);
    sidecar.terminate();
    until("the drain has begun", || {
        matches!(sidecar.try_get("/readyz"), Some((503, _)))
    });
    assert!(!sidecar.has_ended());
    sidecar.terminate();
    assert_eq!(sidecar.wait(Duration::from_secs(20)).code(), Some(0));
    nothing_is_left(&sidecar);
}

#[test]
fn a_killed_sidecars_socket_files_are_replaced_by_the_next_one() {
    let configuration = "guests:\n- name: web\n  cid: 3\n  vhostUser: {socket: \"{dir}/web.sock\"}\n  \
        inbound: [{name: mux, listen: \"unix://{dir}/mux.sock\", protocol: connect}]\n";
    let dir = Sidecar::start(configuration).kill();
    for name in ["admin.sock", "mux.sock", "web.sock"] {
        assert!(dir.path().join(name).exists(), "SIGKILL leaves {name}");
    }
    let mut sidecar = Sidecar::start_in(dir, configuration);
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(5).unwrap();
    let mut client = UnixStream::connect(sidecar.path("mux.sock")).unwrap();
    client.write_all(b"CONNECT 5\n").unwrap();
    drop(listener.accept_timeout(LONG).unwrap());
    drop(client);
    sidecar.terminate();
    assert_eq!(sidecar.wait(LONG).code(), Some(0));
    nothing_is_left(&sidecar);
}
