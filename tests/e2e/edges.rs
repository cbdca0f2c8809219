//! Moments at which a byte, an end or a reset is easily lost.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Shutdown, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vsock_sidecar::embedded_guest::{
    DriverOptions, EmbeddedGuest, GuestStream, Profile, Refill, Shape, SocketOptions, Sockets,
};
use vsock_sidecar::vsock::{Cid, Header, Op, Port};

use crate::support::*;

const GUEST: &[(&str, &str)] = &[("guest", "web")];

fn tcp_target() -> (TcpListener, Sidecar) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: out, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n  \
         limits: {{idleTimeout: 400ms}}\n"
    ));
    (listener, sidecar)
}

fn inbound() -> Sidecar {
    Sidecar::start(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {socket: \"{dir}/web.sock\"}\n  inbound:\n  \
         - {name: plain, listen: \"unix://{dir}/plain.sock\", port: 52}\n  \
         - {name: mux, listen: \"unix://{dir}/mux.sock\", protocol: connect}\n",
    )
}

/// The guest accepts, and the client takes no answer: the connection was opened and is closed, in this order. Once it was
/// closed without having been opened, and the gauge of active connections was -1 for ever.
#[test]
fn a_client_that_takes_no_ok_leaves_no_trace_in_the_gauge() {
    let sidecar = inbound();
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(52).unwrap();
    let mut client = UnixStream::connect(sidecar.path("mux.sock")).unwrap();
    client.shutdown(Shutdown::Read).unwrap();
    client.write_all(b"CONNECT 52\n").unwrap();
    let server = listener.accept_timeout(LONG).unwrap();
    sidecar.until_metric("vsock_connections_closed_total", GUEST, 1.0);
    assert_eq!(sidecar.metric("vsock_connections_active", GUEST), 0.0);
    assert_eq!(sidecar.metric("vsock_connections_opened_total", GUEST), 1.0);
    drop((client, server));
}

/// A unix client that writes and closes at once has been told that its bytes were taken.
#[test]
fn a_unix_client_that_writes_and_leaves_is_heard() {
    let sidecar = inbound();
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(52).unwrap();
    let mut client = UnixStream::connect(sidecar.path("plain.sock")).unwrap();
    client.write_all(b"the last will").unwrap();
    drop(client);
    let server = listener.accept_timeout(LONG).unwrap();
    server.set_read_timeout(Some(LONG));
    assert_eq!(read_to_end(&server), b"the last will");
}

/// A guest that has said it takes nothing more still holds a connection; when its service resets, that is over.
#[test]
fn a_reset_is_noticed_although_nobody_reads() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: out, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n"
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let mut stream = guest.connect(7).unwrap();
    let mut service = accept_tcp(&listener);
    stream.shutdown(Shutdown::Read).unwrap();
    // What was sent behind the SHUTDOWN has come: so has that.
    stream.write_all(b"x").unwrap();
    service.read_exact(&mut [0]).unwrap();
    socket2::SockRef::from(&service)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(service);
    sidecar.until_metric("vsock_connections_active", GUEST, 0.0);
    sidecar.until_metric("vsock_connections_closed_total", &[("reason", "peer_rst")], 1.0);
}

/// What was cut off must not look complete: with bytes of the guest still here, the service sees a reset.
#[test]
fn an_idle_end_with_bytes_left_is_no_orderly_end() {
    let (listener, sidecar) = tcp_target();
    let guest = linux(&sidecar.path("web.sock"));
    let stream = guest.connect(7).unwrap();
    let mut service = accept_tcp(&listener);
    stream.set_write_timeout(Some(Duration::from_millis(300)));
    // More than every buffer on the way: some of it waits in the sidecar when the time is up.
    while (&stream).write_all(&[7; 64 * 1024]).is_ok() {}
    sidecar.until_metric(
        "vsock_connections_closed_total",
        &[("reason", "idle_timeout")],
        1.0,
    );
    let mut chunk = vec![0; 64 * 1024];
    let end = loop {
        match service.read(&mut chunk) {
            Ok(0) => break None,
            Ok(_) => {}
            Err(error) => break Some(error.kind()),
        }
    };
    assert_eq!(end, Some(std::io::ErrorKind::ConnectionReset));
}

/// A guest connection whose credit is used up by 4096 bytes, so that what follows is in the socket as a whole when it
/// is read.
fn out_of_credit(sidecar: &Sidecar) -> (Sockets, GuestStream) {
    let options = SocketOptions {
        buf_alloc: 4096,
        ..SocketOptions::default()
    };
    let guest = guest(
        &sidecar.path("web.sock"),
        Profile::qemu(),
        DriverOptions::default(),
        options,
    );
    let stream = guest.connect(7).unwrap();
    stream.set_read_timeout(Some(LONG));
    (guest, stream)
}

#[track_caller]
fn expect_the_rest(sidecar: &Sidecar, mut stream: &GuestStream) {
    sidecar.until_metric(
        "vsock_credit_stalls_total",
        &[("direction", "host_to_guest")],
        1.0,
    );
    let mut got = vec![0; 4096 + 6];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got[4096..], b"abcdef");
}

/// recv() ends at the mark of urgent data although there is more: a short read is not the end there.
#[test]
fn bytes_behind_urgent_data_are_not_forgotten() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: out, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n"
    ));
    let (_guest, stream) = out_of_credit(&sidecar);
    let mut service = accept_tcp(&listener);
    service.set_nodelay(true).unwrap();
    service.write_all(&[7; 4096]).unwrap();
    service.write_all(b"abc").unwrap();
    socket2::SockRef::from(&service).send_out_of_band(b"!").unwrap();
    service.write_all(b"def").unwrap();
    expect_the_rest(&sidecar, &stream);
}

/// recv() ends behind bytes that descriptors came with, although there is more.
#[test]
fn bytes_behind_descriptors_are_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("service");
    let listener = UnixListener::bind(&path).unwrap();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: out, port: 7, to: \"unix://{}\"}}]\n",
        path.display()
    ));
    let (_guest, stream) = out_of_credit(&sidecar);
    let mut service = accept_unix(&listener);
    service.write_all(&[7; 4096]).unwrap();
    let fds = [service.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = rustix::net::sendmsg(
        &service,
        &[IoSlice::new(b"abc")],
        &mut control,
        SendFlags::empty(),
    );
    assert_eq!(sent, Ok(3));
    service.write_all(b"def").unwrap();
    expect_the_rest(&sidecar, &stream);
}

/// The reset of a refused connection waits for a receive buffer, and the guest has given up and asks again from the same
/// port: the answer is to the new question. The reset used to be taken for under way already, and killed the new one.
#[test]
fn a_reset_that_waits_for_a_buffer_does_not_kill_the_next_connection_of_its_ports() {
    let port = free_port();
    let sidecar = Sidecar::start(&format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: out, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n"
    ));
    let options = DriverOptions {
        rx_buffers: 1,
        refill: Refill::Never,
        ..DriverOptions::default()
    };
    let mut guest = EmbeddedGuest::boot(&sidecar.path("web.sock"), Profile::qemu(), options).unwrap();
    let request = Header {
        src_cid: Cid(3),
        dst_cid: Cid::HOST,
        src_port: Port(1000),
        dst_port: Port(7),
        len: 0,
        socket_type: 1,
        op: Op::Request as u16,
        flags: 0,
        buf_alloc: 4096,
        fwd_cnt: 0,
    };
    let ask_for = |guest: &mut EmbeddedGuest, port| {
        let request = Header {
            dst_port: Port(port),
            ..request
        };
        let sent = guest
            .driver
            .send_packet_wait(&request, &[], &Shape::single(), LONG);
        sent.unwrap();
    };
    let ask = |guest: &mut EmbeddedGuest| ask_for(guest, 7);
    // Uses up the only buffer.
    ask_for(&mut guest, 99);
    let answer = guest.driver.recv_packet(LONG).unwrap();
    assert_eq!(answer.header.op, Op::Rst as u16);

    ask(&mut guest);
    sidecar.until_metric(
        "vsock_connections_refused_total",
        &[("reason", "dial_refused")],
        1.0,
    );
    let _service = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    ask(&mut guest);
    sidecar.until_metric("vsock_connections_opened_total", GUEST, 1.0);
    // And once more, since it has not heard: that is no misbehavior.
    ask(&mut guest);
    guest.driver.post_rx(1).unwrap();
    let answer = guest.driver.recv_packet(LONG).unwrap();
    assert_eq!(answer.header.op, Op::Response as u16, "{answer:?}");
    assert_eq!(sidecar.metric("vsock_misbehavior_total", GUEST), 0.0);
    assert_eq!(sidecar.metric("vsock_connections_active", GUEST), 1.0);
}

/// A signal in the first moment, when the socket file has just been made, ends it like any other: 0, and no file left. It
/// used to kill the process there; and the first process of a container, which no default action kills, ignored it.
#[test]
fn a_signal_during_the_start_is_not_lost() {
    for _ in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("web.sock");
        let file = dir.path().join("sidecar.yaml");
        let text = format!(
            "guests: [{{name: web, cid: 3, vhostUser: {{socket: \"{}\"}}}}]\n",
            socket.display()
        );
        std::fs::write(&file, text).unwrap();
        let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
            .args(["run", "--config"])
            .arg(&file)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + LONG;
        while !socket.exists() {
            assert!(std::time::Instant::now() < deadline, "no socket");
            std::thread::yield_now();
        }
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(!socket.exists());
    }
}
