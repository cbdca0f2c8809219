//! The configuration changes while the sidecar runs: what is open goes on, what is new works, what is wrong changes nothing.

mod file;
mod guests;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use rustix::process::Signal;
use vsock_sidecar::embedded_guest::{GuestStream, Sockets};

use crate::support::*;

/// One guest with these rules; `more` stands at its end.
fn web(outbound: &str, inbound: &str, more: &str) -> String {
    format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  outbound: [{outbound}]\n  \
         inbound: [{inbound}]\n{more}"
    )
}

fn rule(name: &str, port: u32, service: u16) -> String {
    format!("{{name: {name}, port: {port}, to: \"tcp://127.0.0.1:{service}\"}}")
}

fn connect(guest: &Sockets, port: u32) -> GuestStream {
    let stream = guest.connect(port).unwrap();
    stream.set_read_timeout(Some(LONG));
    stream
}

#[track_caller]
fn ping(stream: &GuestStream) {
    let mut stream = stream;
    stream.write_all(b"ping").unwrap();
    let mut pong = [0; 4];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"ping");
}

/// What a service that answers with its name says.
fn name_of(stream: GuestStream) -> String {
    String::from_utf8(read_to_end(stream)).unwrap()
}

fn says(name: &'static str) -> u16 {
    serve(move |mut stream| {
        let _ = stream.write_all(name.as_bytes());
    })
}

fn opened(sidecar: &Sidecar, rule: &str) -> Option<f64> {
    samples(
        &sidecar.get("/metrics"),
        "vsock_connections_opened_total",
        &[("guest", "web"), ("rule", rule)],
    )
}

#[test]
fn a_connection_goes_on_whatever_becomes_of_its_rule_and_its_log_names_it() {
    let service = serve(echo);
    let sidecar = Sidecar::start(&web(&rule("old", 7, service), "", ""));
    let guest = linux(&sidecar.path("web.sock"));
    let stream = connect(&guest, 7);
    ping(&stream);

    let said = sidecar.reload(&web(&rule("new", 8, service), "", "  limits: {buffer: 64KiB}\n"));
    assert!(said.contains("outbound rule old removed"), "{said}");
    assert!(said.contains("limits.buffer: 256KiB -> 64KiB"), "{said}");
    // The guest was promised 256 KiB on this one, and may go on by that.
    for _ in 0..100 {
        ping(&stream);
    }
    let mut sender = &stream;
    let bytes: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
    thread::scope(|scope| {
        scope.spawn(|| sender.write_all(&bytes).unwrap());
        let mut back = vec![0; bytes.len()];
        (&stream).read_exact(&mut back).unwrap();
        assert!(back == bytes);
    });
    assert!(guest.connect(7).is_err(), "the rule is gone for new ones");
    ping(&connect(&guest, 8));

    // Its rule counts as long as it lives, and is named at its end.
    assert_eq!(opened(&sidecar, "old"), Some(1.0));
    drop(stream);
    until("the series of the old rule are gone", || {
        opened(&sidecar, "old").is_none()
    });
    let ended = sidecar.logged("connection ended", |event| field(event, "rule") == "old");
    let old: Vec<_> = ended
        .iter()
        .filter(|event| field(event, "rule") == "old")
        .collect();
    assert_eq!(old.len(), 1, "{ended:?}");
    assert_eq!(field(old[0], "reason"), "guest_shutdown");
    assert_eq!(opened(&sidecar, "new"), Some(1.0));
    assert_lawful(&guest);
}

#[test]
fn a_rule_that_keeps_its_name_keeps_its_counters_and_its_limit_counts_who_is_in() {
    let service = serve(echo);
    let sidecar = Sidecar::start(&web(&rule("db", 7, service), "", ""));
    let guest = linux(&sidecar.path("web.sock"));
    let streams = [connect(&guest, 7), connect(&guest, 7)];
    streams.iter().for_each(ping);
    let limited = rule("db", 7, service).replace("}", ", connections: 2}");
    sidecar.reload(&web(&limited, "", ""));
    assert!(guest.connect(7).is_err(), "two are in");
    assert_eq!(
        sidecar.metric(
            "vsock_connections_refused_total",
            &[("rule", "db"), ("reason", "rule_limit")]
        ),
        1.0
    );
    let [first, second] = streams;
    drop(first);
    until("there is room for one", || guest.connect(7).is_ok());
    ping(&second);
    assert!(opened(&sidecar, "db").unwrap() >= 3.0);
}

/// A listener that stays is the same socket: clients that connect all the time find it each time, and are served.
#[test]
fn a_listener_that_stays_refuses_nobody_while_everything_around_it_changes() {
    let (inbound, other) = (free_port(), free_port());
    let listen = |name: &str, listen: u16, more: &str| {
        format!("{{name: {name}, listen: \"tcp://127.0.0.1:{listen}\", port: 22{more}}}")
    };
    let sidecar = Sidecar::start(&web("", &listen("ssh", inbound, ""), ""));
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(22).unwrap();
    let (done, over, served) = (
        AtomicBool::new(false),
        AtomicBool::new(false),
        AtomicUsize::new(0),
    );
    thread::scope(|scope| {
        let _stop = (StopOnDrop(&done), StopOnDrop(&over));
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // A timeout is a look at the flag.
                if let Ok(stream) = listener.accept_timeout(std::time::Duration::from_millis(100)) {
                    let mut stream = &stream;
                    let _ = stream.write_all(b"hello");
                }
            }
        });
        let clients = scope.spawn(|| {
            loop {
                let last = done.load(Ordering::Relaxed);
                let mut client = TcpStream::connect(("127.0.0.1", inbound)).expect("never refused");
                client.set_read_timeout(Some(LONG)).unwrap();
                let mut hello = [0; 5];
                client.read_exact(&mut hello).expect("always served");
                served.fetch_add(1, Ordering::Relaxed);
                if last {
                    return;
                }
            }
        });
        let configurations = [
            (
                listen("sh", inbound, ", allow: [127.0.0.0/8]"),
                "  limits: {guestTimeout: 9s}\n",
            ),
            (
                format!(
                    "{}, {}",
                    listen("a", other, ""),
                    listen("ssh", inbound, ", waitForGuest: true")
                ),
                "",
            ),
            (listen("ssh", inbound, ""), ""),
        ];
        for round in 0..12 {
            let (inbound, more) = &configurations[round % configurations.len()];
            sidecar.reload(&web("", inbound, more));
            let before = served.load(Ordering::Relaxed);
            until("clients go on", || {
                served.load(Ordering::Relaxed) > before || clients.is_finished()
            });
        }
        done.store(true, Ordering::Relaxed);
        clients.join().unwrap();
    });
    // The last configuration has it no more.
    assert!(TcpStream::connect(("127.0.0.1", other)).is_err());
    assert_lawful(&guest);
}

#[test]
fn clients_that_are_not_allowed_any_more_are_refused_and_those_who_are_in_stay() {
    let inbound = free_port();
    let listen = |allow: &str| {
        format!("{{name: ssh, listen: \"tcp://127.0.0.1:{inbound}\", port: 22, allow: [{allow}]}}")
    };
    let sidecar = Sidecar::start(&web("", &listen("127.0.0.1"), ""));
    let guest = linux(&sidecar.path("web.sock"));
    let listener = guest.listen(22).unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
    let mut server = listener.accept_timeout(LONG).unwrap();
    sidecar.reload(&web("", &listen("10.0.0.0/8"), ""));
    let stranger = TcpStream::connect(("127.0.0.1", inbound)).unwrap();
    stranger.set_read_timeout(Some(LONG)).unwrap();
    assert!(read_to_end(&stranger).is_empty());
    client.write_all(b"still").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();
    // It is counted when the client is closed already.
    sidecar.until_metric(
        "vsock_connections_refused_total",
        &[("rule", "ssh"), ("reason", "acl")],
        1.0,
    );
}

/// New listeners are bound before anything else is touched.
#[test]
fn a_listener_that_cannot_be_bound_refuses_the_whole_of_it() {
    let (service, taken, free) = (
        serve(echo),
        std::net::TcpListener::bind("127.0.0.1:0").unwrap(),
        free_port(),
    );
    let port = taken.local_addr().unwrap().port();
    let sidecar = Sidecar::start(&web(&rule("db", 7, service), "", ""));
    let guest = linux(&sidecar.path("web.sock"));
    let inbound = format!(
        "{{name: free, listen: \"tcp://127.0.0.1:{free}\", port: 1}}, {{name: taken, listen: \"tcp://127.0.0.1:{port}\", port: 2}}"
    );
    let more = "- {name: late, cid: 9, vhostUser: {socket: \"{dir}/late.sock\"}}\n";
    sidecar.rewrite(&web(&rule("db", 8, service), &inbound, more));
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(
        said.contains("guest web: inbound rule taken") && said.contains("another socket listens there"),
        "{said}"
    );
    ping(&connect(&guest, 7));
    assert!(guest.connect(8).is_err());
    assert!(
        TcpStream::connect(("127.0.0.1", free)).is_err(),
        "what was bound for it is closed again"
    );
    assert!(!exists(&sidecar.path("late.sock")));
    assert_eq!(sidecar.metric("vsock_config_last_reload_successful", &[]), 0.0);
    let page = sidecar.get("/metrics");
    assert!(!page.contains("guest=\"late\""));

    // The port becomes free, and who asks again is served.
    drop(taken);
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 200, "{said}");
    ping(&connect(&guest, 8));
    assert_eq!(sidecar.metric("vsock_config_last_reload_successful", &[]), 1.0);
}

#[test]
fn a_listener_that_one_of_ours_is_in_the_way_of_is_refused_with_the_way_out() {
    let port = free_port();
    let listen = |address: &str| format!("{{name: ssh, listen: \"tcp://{address}:{port}\", port: 22}}");
    let sidecar = Sidecar::start(&web("", &listen("127.0.0.1"), ""));
    sidecar.rewrite(&web("", &listen("0.0.0.0"), ""));
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(
        said.contains("it is this sidecar that listens there, for guest web, inbound rule ssh"),
        "{said}"
    );
    sidecar.reload(&web("", "", ""));
    sidecar.reload(&web("", &listen("0.0.0.0"), ""));
    TcpStream::connect(("127.0.0.1", port)).unwrap();
}

#[test]
fn an_address_that_the_admin_server_keeps_until_a_restart_is_told() {
    let (admin, other) = (free_port(), free_port());
    let with = |port: u16, inbound: &str| {
        format!(
            "admin: {{listen: [\"unix://{{dir}}/admin.sock\", \"tcp://127.0.0.1:{port}\"]}}\n{}",
            web("", inbound, "")
        )
    };
    let sidecar = Sidecar::start(&with(admin, ""));
    let inbound = format!("{{name: ssh, listen: \"tcp://127.0.0.1:{admin}\", port: 22}}");
    sidecar.rewrite(&with(other, &inbound));
    let (status, said) = sidecar.post("/-/reload");
    assert_eq!(status, 422);
    assert!(
        said.contains("it is this sidecar's admin server that listens there, and moves with a restart only"),
        "{said}"
    );
}

/// Two rules change places, again and again, while the guest connects. Whoever it reaches, it is one of the two that the same
/// table led to.
#[test]
fn a_request_finds_the_old_rules_or_the_new_ones_and_never_a_mix() {
    let (one, two) = (says("one"), says("two"));
    let tables = [
        format!("{}, {}", rule("a", 1, one), rule("b", 2, two)),
        format!("{}, {}", rule("a", 1, two), rule("b", 2, one)),
    ];
    let sidecar = Sidecar::start(&web(&tables[0], "", ""));
    let guest = linux(&sidecar.path("web.sock"));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&done);
        let guest = &guest;
        let connects = scope.spawn(|| {
            let mut reached = [0; 2];
            while !done.load(Ordering::Relaxed) {
                match name_of(connect(guest, 1)).as_str() {
                    "one" => reached[0] += 1,
                    "two" => reached[1] += 1,
                    other => panic!("{other:?}"),
                }
            }
            reached
        });
        for round in 1..=20 {
            sidecar.reload(&web(&tables[round % 2], "", ""));
            // What is answered has happened.
            let expected = if round % 2 == 0 { "two" } else { "one" };
            assert_eq!(name_of(connect(guest, 2)), expected);
        }
        done.store(true, Ordering::Relaxed);
        let reached = connects.join().unwrap();
        assert!(reached.iter().all(|count| *count > 0), "{reached:?}");
    });
}

#[test]
fn a_signal_reloads_and_limits_timeouts_and_the_log_level_change() {
    let service = serve(echo);
    let sidecar = Sidecar::start(&web(&rule("db", 7, service), "", ""));
    let guest = linux(&sidecar.path("web.sock"));
    let stream = connect(&guest, 7);
    let quiet = "limits: {connections: 1}\nlog: {format: json, level: warn}\n";
    sidecar.rewrite(&(quiet.to_owned() + &web(&rule("db", 7, service), "", "  limits: {connections: 5}\n")));
    sidecar.signal(Signal::HUP);
    sidecar.until_metric("vsock_config_reloads_total", &[], 1.0);
    assert_eq!(
        sidecar.metric("vsock_connections_limit", &[("guest", "web")]),
        5.0
    );
    assert!(guest.connect(7).is_err(), "all guests together have one");
    ping(&stream);
    drop(stream);
    until("it is over", || guest.open_connections() == 0);
    assert!(sidecar.events("connection ended").is_empty(), "at level info");
    // The watch may have been faster, and the signal asks for what it did.
    until("the signal is heard", || {
        sidecar.state()["config"]["lastReload"]["cause"] == "SIGHUP"
    });
    let state = sidecar.state();
    assert_eq!(state["config"]["lastReload"]["result"], "applied");
    assert_eq!(state["config"]["pending"], serde_json::json!([]));
}
