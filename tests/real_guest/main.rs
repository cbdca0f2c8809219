//! A real Linux guest behind the real binary: Debian's cloud kernels 6.1 and 6.12 under QEMU, since they place packets in
//! descriptors differently.
//!
//! Everything that is needed is fetched, built and cached by the test (`tests/vm`): as root on Debian or Ubuntu it needs
//! nothing but Rust; as another user it says what to install. There is no silent way around it; a developer who has no use
//! for it now sets `VSOCK_TEST_NO_VM=1`, which CI refuses. `VSOCK_TEST_SCENARIO=reboot` runs the scenarios of that name.

mod iommu;
// Made for several tests, each of which uses a part.
#[allow(dead_code)]
#[path = "../vm/mod.rs"]
mod vm;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use socket2::Socket;
use vm::lab::{BULK, CID, DRAIN, GUEST, Lab, SECOND_SOURCE_SEED, SOURCE_SEED, Setup, Suite, port};
use vm::pattern::Digest;
use vm::service::{connect_tcp, connect_unix, exchange, receive, send};
use vm::wait_until;

const MIB: u64 = 1 << 20;
/// A refusal is an answer, not a timeout: the guest's connect would give up after 2 s.
const AT_ONCE: Duration = Duration::from_millis(500);
/// The ends of connections that a lost guest had are closed as soon as the loss is known.
const CLOSED: Duration = Duration::from_secs(3);

#[test]
fn linux_6_1() {
    in_labs(Setup::plain("6.1"), everything);
}

#[test]
fn linux_6_12() {
    in_labs(Setup::plain("6.12"), everything);
}

/// Runs scenarios, unless told not to.
fn in_labs(setup: Setup, scenarios: impl FnOnce(&mut Suite)) {
    if std::env::var_os("VSOCK_TEST_NO_VM").is_some() {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI runs the real guest: unset VSOCK_TEST_NO_VM"
        );
        vm::lab::tell(&format!(
            "Linux {}{}: left out, as VSOCK_TEST_NO_VM says",
            setup.kernel, setup.name
        ));
        return;
    }
    let mut suite = Suite::new(setup);
    scenarios(&mut suite);
    suite.finish();
}

fn everything(suite: &mut Suite) {
    suite.run("the guest reads its CID from the device", cid);
    suite.run("the guest reaches TCP and unix services", outbound);
    suite.run(
        "64 MiB from guest to host, whatever the size of a write",
        bulk_to_host,
    );
    suite.run("64 MiB from host to guest", bulk_to_guest);
    suite.run("a TCP listener leads to a server in the guest", inbound_tcp);
    suite.run(
        "a unix listener leads to the port that CONNECT names",
        inbound_connect,
    );
    suite.run("100 connections at once, from either side", hundred);
    suite.run("the guest closes its half first", guest_half_closes);
    suite.run("the host closes its half first", host_half_closes);
    suite.run("a port without a rule is refused at once", no_rule);
    suite.run("a service that does not run is refused at once", no_service);
    suite.run("connections come and go", churn);
    suite.run("what was sent before a close arrives", close_with_data);
    suite.run("a stalled service stalls its connection only", stalled_service);
    suite.run(
        "a stalled program in the guest stalls its connection only",
        stalled_guest,
    );
    suite.run("nothing is left open", |lab| lab.wait_for_silence());
    suite.run("the driver lets go of the device and takes it again", rebind);
    suite.run("the driver is unloaded and loaded", reload);
    suite.run("the guest reboots under open connections", reboot);
    suite.run("the VMM is killed in the middle of a transfer", vmm_killed);
    suite.run(
        "without an IOMMU not one IOTLB message came",
        iommu::nothing_is_translated,
    );
    suite.run("SIGTERM with open connections", sigterm);
}

fn cid(lab: &mut Lab) {
    let release = lab.vm().ok("release").text("release").to_owned();
    assert_eq!(release, lab.release());
    assert_eq!(lab.vm().ok("cid").number("cid"), u64::from(CID));
}

fn outbound(lab: &mut Lab) {
    for port in [port::ECHO, port::UNIX_ECHO] {
        for bytes in [1, 50_000, MIB] {
            let answer = lab
                .vm()
                .ok(&format!("client {port} exchange:bytes={bytes},seed=1"));
            assert_eq!(answer.number("received"), bytes);
        }
    }
}

/// Linux 6.12 puts a packet of more than 32 KiB into several descriptors, so the size of a write decides the shape.
fn bulk_to_host(lab: &mut Lab) {
    bulk_to_host_by(
        lab,
        &[(BULK, 65536), (4 * MIB, 4096), (4 * MIB, 40_001), (100_000, 1)],
    );
}

/// Transfers of so many bytes, so many a write.
fn bulk_to_host_by(lab: &mut Lab, transfers: &[(u64, u64)]) {
    for &(bytes, chunk) in transfers {
        let answer = lab.vm().ok(&format!(
            "client {} send:bytes={bytes},chunk={chunk},seed=2 shutwr recv",
            port::SINK
        ));
        let report = lab.sink.next();
        report.end.unwrap();
        assert_eq!(report.received.length(), bytes);
        assert_eq!(
            report.received.finish(),
            Digest::of_pattern(2, bytes),
            "{chunk} bytes a write"
        );
        assert_eq!(answer.digest("sent_digest"), report.received.finish());
    }
}

fn bulk_to_guest(lab: &mut Lab) {
    let answer = lab.vm().ok(&format!(
        "client {} recv:seed={SOURCE_SEED}",
        port::SOURCE_THEN_SINK
    ));
    assert_eq!(answer.number("received"), BULK);
    let report = lab.source_then_sink.next();
    report.end.unwrap();
    assert_eq!(answer.digest("received_digest"), report.sent.finish());
}

fn inbound_tcp(lab: &mut Lab) {
    // Nobody listens in the guest yet: the TCP connection is accepted, then ended.
    let refused = connect_tcp(lab.tcp[1]).unwrap();
    assert_ended(&refused, AT_ONCE);

    serve_echo(lab);
    for bytes in [1, 50_000, MIB] {
        exchange(&connect_tcp(lab.tcp[0]).unwrap(), bytes, 3).unwrap();
    }

    let (to_guest, to_host) = (31, 32);
    lab.vm().ok(&format!(
        "serve {} recv:seed={to_guest} send:bytes={BULK},seed={to_host}",
        port::GUEST_B
    ));
    let client = connect_tcp(lab.tcp[1]).unwrap();
    send(&client, BULK, to_guest, &mut Digest::default()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut received = Digest::default();
    receive(&client, Some(to_host), &mut received).unwrap();
    let answer = lab.vm().ok(&format!("served {} 20000", port::GUEST_B));
    assert_eq!(
        answer.digest("received_digest"),
        Digest::of_pattern(to_guest, BULK)
    );
    assert_eq!(answer.digest("sent_digest"), received.finish());
    assert_eq!(received.length(), BULK);
}

fn inbound_connect(lab: &mut Lab) {
    serve_echo(lab);
    exchange(&connect_unix(&lab.mux, port::GUEST_A).unwrap(), MIB, 4).unwrap();

    // The line may come in pieces, and data may come with it.
    let client = Socket::from(UnixStream::connect(&lab.mux).unwrap());
    (&client).write_all(b"CONN").unwrap();
    (&client)
        .write_all(format!("ECT {}\nhello", port::GUEST_A).as_bytes())
        .unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    (&client).read_to_string(&mut text).unwrap();
    let (line, data) = text.split_once('\n').unwrap();
    assert!(line.starts_with("OK "), "{text:?}");
    assert_eq!(data, "hello");

    // A port on which nobody listens in the guest: no answer, the end.
    let begin = Instant::now();
    let refused = connect_unix(&lab.mux, 7999).map(drop).unwrap_err();
    assert!(
        matches!(
            refused.kind(),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
        ),
        "{refused}"
    );
    assert!(begin.elapsed() < AT_ONCE);
}

fn hundred(lab: &mut Lab) {
    lab.vm().ok(&format!(
        "parallel 100 {} exchange:bytes=65536,seed=100",
        port::ECHO
    ));

    serve_echo(lab);
    let mux = &lab.mux;
    thread::scope(|scope| {
        // All connect before the first one sends.
        let clients: Vec<Socket> = (0..100)
            .map(|_| connect_unix(mux, port::GUEST_A).unwrap())
            .collect();
        let exchanges: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(i, c)| scope.spawn(move || exchange(&c, 65536, 300 + i as u64)))
            .collect();
        for exchange in exchanges {
            exchange.join().unwrap().unwrap();
        }
    });
}

fn guest_half_closes(lab: &mut Lab) {
    let steps = format!("send:bytes={MIB},seed=41 shutwr recv:seed={SECOND_SOURCE_SEED}");
    let answer = lab.vm().ok(&format!("client {} {steps}", port::SINK_THEN_SOURCE));
    let report = lab.sink_then_source.next();
    report.end.unwrap();
    assert_eq!(report.received.finish(), Digest::of_pattern(41, MIB));
    assert_eq!(answer.number("received"), BULK);
    assert_eq!(answer.digest("received_digest"), report.sent.finish());

    // The same on a connection that the host made.
    lab.vm().ok(&format!(
        "serve 7010 send:bytes={MIB},seed=42 shutwr recv:seed=43"
    ));
    let client = connect_unix(&lab.mux, 7010).unwrap();
    let mut received = Digest::default();
    receive(&client, Some(42), &mut received).unwrap();
    assert_eq!(received.length(), MIB);
    send(&client, 8 * MIB, 43, &mut Digest::default()).unwrap();
    drop(client);
    let answer = lab.vm().ok("served 7010 20000");
    assert_eq!(answer.digest("received_digest"), Digest::of_pattern(43, 8 * MIB));
}

fn host_half_closes(lab: &mut Lab) {
    let steps = format!("recv:seed={SOURCE_SEED} send:bytes={BULK},seed=44");
    let answer = lab.vm().ok(&format!("client {} {steps}", port::SOURCE_THEN_SINK));
    assert_eq!(answer.number("received"), BULK);
    let report = lab.source_then_sink.next();
    report.end.unwrap();
    assert_eq!(report.received.finish(), Digest::of_pattern(44, BULK));
}

fn no_rule(lab: &mut Lab) {
    let refused = |lab: &Lab| {
        lab.sidecar.metric(
            "vsock_connections_refused_total",
            &[("guest", GUEST), ("reason", "no_rule")],
        )
    };
    let before = refused(lab);
    for _ in 0..10 {
        let answer = lab.vm().err(&format!("client {}", port::NO_RULE), "ECONNRESET");
        let time = Duration::from_micros(answer.number("connect_us"));
        assert!(time < AT_ONCE, "refused after {time:?}");
    }
    assert_eq!(refused(lab) - before, 10.0);
    wait_until(
        "the log names guest, port and reason",
        Duration::from_secs(5),
        || {
            let port = port::NO_RULE.to_string();
            lab.sidecar
                .log()
                .lines()
                .any(|line| line.contains(GUEST) && line.contains(&port) && line.contains("no_rule"))
        },
    );
}

fn no_service(lab: &mut Lab) {
    let labels = [
        ("guest", GUEST),
        ("rule", "no-service"),
        ("reason", "dial_refused"),
    ];
    let before = lab.sidecar.metric("vsock_connections_refused_total", &labels);
    let answer = lab
        .vm()
        .err(&format!("client {}", port::NO_SERVICE), "ECONNRESET");
    assert!(Duration::from_micros(answer.number("connect_us")) < AT_ONCE);
    assert_eq!(
        lab.sidecar.metric("vsock_connections_refused_total", &labels) - before,
        1.0
    );
}

fn churn(lab: &mut Lab) {
    lab.vm()
        .ok(&format!("repeat 300 {} exchange:bytes=64,seed=7", port::ECHO));
}

fn close_with_data(lab: &mut Lab) {
    let (times, bytes) = (100, 200_000);
    lab.vm().ok(&format!(
        "repeat {times} {} send:bytes={bytes},seed=500",
        port::SINK
    ));
    let mut seen: Vec<u64> = (0..times)
        .map(|_| {
            let report = lab.sink.next();
            report.end.unwrap();
            report.received.finish()
        })
        .collect();
    let mut sent: Vec<u64> = (0..times).map(|i| Digest::of_pattern(500 + i, bytes)).collect();
    seen.sort_unstable();
    sent.sort_unstable();
    assert!(seen == sent, "what the services read is not what the guest sent");

    // The same from the host's side: each connection is closed while its data are on their way.
    lab.vm().ok("serve 7011 recv:seed=51");
    for _ in 0..50 {
        send(
            &connect_unix(&lab.mux, 7011).unwrap(),
            bytes,
            51,
            &mut Digest::default(),
        )
        .unwrap();
    }
    for _ in 0..50 {
        assert_eq!(lab.vm().ok("served 7011 20000").number("received"), bytes);
    }
}

fn stalled_service(lab: &mut Lab) {
    let bytes = 32 * MIB;
    lab.vm().ok(&format!(
        "bg stalled client {} send:bytes={bytes},seed=61 shutwr recv",
        port::STALLED
    ));
    lab.vm().ok(&format!(
        "client {} exchange:bytes={},seed=62",
        port::ECHO,
        4 * MIB
    ));
    let held = lab.sidecar.metric("vsock_buffered_bytes", &[("guest", GUEST)]);
    assert!(
        held <= 2.0 * 262_144.0,
        "{held} bytes are buffered for one connection"
    );
    lab.go.send(()).unwrap();
    lab.vm().ok("join stalled");
    let report = lab.stalled.next();
    report.end.unwrap();
    assert_eq!(report.received.finish(), Digest::of_pattern(61, bytes));
}

fn stalled_guest(lab: &mut Lab) {
    let steps = format!("gate:read-on recv:seed={SOURCE_SEED},chunk=1000");
    lab.vm()
        .ok(&format!("bg slow client {} {steps}", port::SOURCE_THEN_SINK));
    lab.vm().ok(&format!(
        "client {} exchange:bytes={},seed=63",
        port::ECHO,
        4 * MIB
    ));
    lab.vm().ok("open read-on");
    assert_eq!(lab.vm().ok("join slow").number("received"), BULK);
    lab.source_then_sink.next().end.unwrap();
}

fn rebind(lab: &mut Lab) {
    lab.vm().ok(&format!("hold open {}", port::HELD));
    lab.vm().ok("rebind");
    assert_eq!(lab.vm().ok("watch open 5000").text("end"), "ECONNRESET");
    lab.vm().ok("drop open");
    lab.held.next();
    everything_works(lab);
}

fn reload(lab: &mut Lab) {
    // The module stays in use until the kernel has forgotten the last socket.
    lab.wait_for_silence();
    wait_until("the transport can be reloaded", Duration::from_secs(20), || {
        lab.vm().answer("reload").is_ok()
    });
    assert_eq!(lab.vm().ok("cid").number("cid"), u64::from(CID));
    everything_works(lab);
}

fn reboot(lab: &mut Lab) {
    for _ in 0..2 {
        serve_echo(lab);
        lab.vm().ok(&format!("hold open {}", port::HELD));
        let inbound = connect_unix(&lab.mux, port::GUEST_A).unwrap();
        let moved = bytes_moved(lab);
        lab.vm().ok(&format!(
            "bg bulk client {} send:bytes={},seed=71",
            port::SINK,
            1_u64 << 40
        ));
        wait_until("the transfer runs", Duration::from_secs(10), || {
            bytes_moved(lab) > moved + MIB as f64
        });

        let begin = Instant::now();
        lab.vm().press_reset();
        assert_ended(&inbound, CLOSED);
        for report in [lab.held.next(), lab.sink.next()] {
            assert!(
                report.at.duration_since(begin) < CLOSED,
                "closed after {:?}",
                report.at.duration_since(begin)
            );
        }
        lab.vm().wait_for_boot();
        lab.wait_for_silence();
        everything_works(lab);
    }
}

fn vmm_killed(lab: &mut Lab) {
    serve_echo(lab);
    lab.vm().ok(&format!("hold open {}", port::HELD));
    let inbound = connect_unix(&lab.mux, port::GUEST_A).unwrap();
    let moved = bytes_moved(lab);
    lab.vm().ok(&format!(
        "bg bulk client {} send:bytes={},seed=81",
        port::SINK,
        1_u64 << 40
    ));
    wait_until("the transfer runs", Duration::from_secs(10), || {
        bytes_moved(lab) > moved + MIB as f64
    });

    let begin = Instant::now();
    lab.vm.take().expect("a machine is running").kill();
    assert_ended(&inbound, CLOSED);
    for report in [lab.held.next(), lab.sink.next()] {
        assert!(
            report.at.duration_since(begin) < CLOSED,
            "closed after {:?}",
            report.at.duration_since(begin)
        );
    }
    lab.wait_for_silence();
    lab.boot();
    everything_works(lab);
}

/// The last scenario: nothing is left to work with.
fn sigterm(lab: &mut Lab) {
    serve_echo(lab);
    lab.vm().ok(&format!("hold open {}", port::HELD));
    let inbound = connect_unix(&lab.mux, port::GUEST_A).unwrap();
    let begin = Instant::now();
    lab.sidecar.terminate();
    let status = lab.sidecar.wait(DRAIN + Duration::from_secs(3));
    let status = status.unwrap_or_else(|| panic!("still running {:?} after SIGTERM", begin.elapsed()));
    assert_eq!(status.code(), Some(0), "{status}");
    lab.held.next();
    assert_ended(&inbound, CLOSED);
}

/// What a guest needs after something happened to it.
fn everything_works(lab: &mut Lab) {
    lab.vm().ok(&format!(
        "parallel 10 {} exchange:bytes=100000,seed=90",
        port::ECHO
    ));
    lab.vm().ok(&format!(
        "client {} recv:seed={SOURCE_SEED},bytes={MIB}",
        port::SOURCE_THEN_SINK
    ));
    lab.source_then_sink.next();
    lab.vm().ok(&format!(
        "client {} send:bytes={MIB},seed=91 shutwr recv",
        port::SINK
    ));
    assert_eq!(lab.sink.next().received.finish(), Digest::of_pattern(91, MIB));
    serve_echo(lab);
    exchange(&connect_tcp(lab.tcp[0]).unwrap(), MIB, 92).unwrap();
}

/// Has the guest's program run an echo server behind the first TCP listener, if it does not yet.
fn serve_echo(lab: &mut Lab) {
    let answer = lab.vm().answer(&format!("serve {} echo", port::GUEST_A));
    assert!(
        answer.is_ok() || answer.line.starts_with("err EADDRINUSE"),
        "{}",
        answer.line
    );
}

/// Payload that went from guest to host so far.
fn bytes_moved(lab: &Lab) -> f64 {
    lab.sidecar.metric(
        "vsock_payload_bytes_total",
        &[("guest", GUEST), ("direction", "guest_to_host")],
    )
}

/// The peer ends this connection in time, in order or by a reset, without having sent anything.
fn assert_ended(socket: &Socket, patience: Duration) {
    let begin = Instant::now();
    let mut byte = [0];
    match (&mut &*socket).read(&mut byte) {
        Ok(0) => {}
        Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
        other => panic!("not an end: {other:?} {byte:?}"),
    }
    assert!(begin.elapsed() < patience, "ended after {:?}", begin.elapsed());
}
