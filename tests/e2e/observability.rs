//! What the operator sees: metrics that add up, a page that Prometheus likes, `/state`, the log.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use vsock_sidecar::embedded_guest::Stats;
use vsock_sidecar::vsock::{CloseReason, Misbehavior, Op, RefuseReason};

use crate::support::*;

fn echoing(port: u16) -> String {
    format!(
        "guests:\n- name: web\n  cid: 3\n  vhostUser: {{socket: \"{{dir}}/web.sock\"}}\n  \
         outbound: [{{name: echo, port: 7, to: \"tcp://127.0.0.1:{port}\"}}]\n  \
         inbound: [{{name: mux, listen: \"unix://{{dir}}/mux.sock\", protocol: connect}}]\n"
    )
}

/// Every packet and every byte that the guest saw or sent is counted, each once.
#[test]
fn counters_are_what_the_guest_sent_and_received() {
    let sidecar = Sidecar::start(&echoing(serve(echo)));
    let guest = linux(&sidecar.path("web.sock"));
    for len in [1u64, 5000, 300_000, 2 << 20] {
        let stream = guest.connect(7).unwrap();
        stream.set_read_timeout(Some(LONG));
        thread::scope(|scope| {
            scope.spawn(|| {
                Bytes::new(len).write_to(&stream, len).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            Bytes::new(len).expect_from(&stream, len);
            assert_eq!((&stream).read(&mut [0; 1]).unwrap(), 0);
        });
    }
    let listener = guest.listen(22).unwrap();
    let mut client = std::os::unix::net::UnixStream::connect(sidecar.path("mux.sock")).unwrap();
    client.write_all(b"CONNECT 22\npreface").unwrap();
    let mut server = listener.accept_timeout(LONG).unwrap();
    server.set_read_timeout(Some(LONG));
    server.read_exact(&mut [0; 7]).unwrap();
    server.write_all(b"answer").unwrap();
    let mut said = [0; 6];
    while &said != b"answer" {
        said.rotate_left(1);
        client.read_exact(&mut said[5..]).unwrap();
    }
    drop(server);
    drop(client);
    assert!(guest.connect(9).is_err());
    until("all connections are over", || guest.open_connections() == 0);
    sidecar.until_metric("vsock_connections_active", &[], 0.0);

    let ops = [
        (Op::Request, "request"),
        (Op::Response, "response"),
        (Op::Rst, "rst"),
        (Op::Shutdown, "shutdown"),
        (Op::Rw, "rw"),
        (Op::CreditUpdate, "credit_update"),
        (Op::CreditRequest, "credit_request"),
    ];
    let compare = |stats: &Stats| {
        let page = sidecar.get("/metrics");
        let value = |family: &str, labels: &[(&str, &str)]| samples(&page, family, labels).unwrap() as u64;
        let mut differences = Vec::new();
        for (direction, packets, bytes) in [
            ("guest_to_host", stats.sent, stats.sent_bytes),
            ("host_to_guest", stats.received, stats.received_bytes),
        ] {
            for (op, label) in ops {
                let counted = value("vsock_packets_total", &[("direction", direction), ("op", label)]);
                if counted != packets.count(op) {
                    differences.push(format!(
                        "{direction} {label}: {counted} and not {}",
                        packets.count(op)
                    ));
                }
            }
            let counted = value("vsock_payload_bytes_total", &[("direction", direction)]);
            if counted != bytes {
                differences.push(format!("{direction} bytes: {counted} and not {bytes}"));
            }
        }
        differences
    };
    // The last packets may still be on their way.
    let mut differences = Vec::new();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        differences.clear();
        differences.extend(compare(&guest.stats()));
        if differences.is_empty() || std::time::Instant::now() > deadline {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert!(differences.is_empty(), "{differences:#?}");

    let kicks = sidecar.metric("vsock_kicks_total", &[("queue", "tx")]);
    let stats = guest.stats();
    assert!(
        kicks <= stats.tx.kicks as f64 + 1.0,
        "{kicks} kicks of {}",
        stats.tx.kicks
    );
    let interrupts = sidecar.metric("vsock_interrupts_total", &[("queue", "rx")]);
    assert!(interrupts > 0.0 && interrupts <= stats.rx.used as f64);
    let count = |family: &str, direction: &str| sidecar.metric(family, &[("direction", direction)]);
    assert_eq!(count("vsock_connections_opened_total", "guest_to_host"), 4.0);
    assert_eq!(count("vsock_connections_opened_total", "host_to_guest"), 1.0);
    assert_eq!(
        count("vsock_connection_duration_seconds_count", "guest_to_host"),
        4.0
    );
    assert_eq!(
        sidecar.metric("vsock_tcp_dial_duration_seconds_count", &[("rule", "echo")]),
        4.0
    );
    assert_eq!(sidecar.metric("vsock_connections_closed_total", &[]), 5.0);
    assert_eq!(sidecar.metric("vsock_buffered_bytes", &[]), 0.0);
    assert_lawful(&guest);
}

#[test]
fn every_end_is_one_event_with_its_fields() {
    let port = serve(echo);
    let sidecar = Sidecar::start(&echoing(port));
    let guest = linux(&sidecar.path("web.sock"));
    let mut stream = guest.connect(7).unwrap();
    stream.write_all(b"twelve bytes").unwrap();
    stream.read_exact(&mut [0; 12]).unwrap();
    let local = stream.local_port();
    drop(stream);
    let events = sidecar.logged("connection ended", |_| true);
    assert_eq!(events.len(), 1, "{events:#?}");
    let expected = [
        ("level", "INFO".to_owned()),
        ("guest", "web".to_owned()),
        ("rule", "echo".to_owned()),
        ("opened_by", "guest_to_host".to_owned()),
        ("guest_port", local.to_string()),
        ("host_port", "7".to_owned()),
        ("peer", format!("127.0.0.1:{port}")),
        ("bytes_from_guest", "12".to_owned()),
        ("bytes_to_guest", "12".to_owned()),
        ("reason", "guest_shutdown".to_owned()),
    ];
    for (name, value) in expected {
        assert_eq!(field(&events[0], name), value, "{name} in {:#}", events[0]);
    }
    assert!(field(&events[0], "duration_ms").parse::<u64>().is_ok());

    // An inbound one, ended by the host.
    let listener = guest.listen(22).unwrap();
    let mut byte = [0; 1];
    let mut client = std::os::unix::net::UnixStream::connect(sidecar.path("mux.sock")).unwrap();
    client.write_all(b"CONNECT 22\n").unwrap();
    let mut server = listener.accept_timeout(LONG).unwrap();
    server.set_read_timeout(Some(LONG));
    // A client that closes with the OK unread would reset: unix(7) sockets tell their peer so.
    client.set_read_timeout(Some(LONG)).unwrap();
    while client.read(&mut byte).unwrap() == 1 && byte != *b"\n" {}
    drop(client);
    assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
    drop(server);
    until("the end is logged", || {
        sidecar.events("connection ended").len() == 2
    });
    let event = sidecar.events("connection ended").pop().unwrap();
    assert_eq!(field(&event, "rule"), "mux");
    assert_eq!(field(&event, "opened_by"), "host_to_guest");
    assert_eq!(field(&event, "guest_port"), "22");
    assert_eq!(field(&event, "reason"), "peer_fin", "{event:#}");
}

#[test]
fn every_known_reason_is_there_before_it_happens() {
    let sidecar = Sidecar::start(&echoing(7));
    let page = sidecar.get("/metrics");
    let zero = |family: &str, labels: &[(&str, &str)]| {
        assert_eq!(samples(&page, family, labels), Some(0.0), "{family} {labels:?}");
    };
    for rule in ["echo", "mux", ""] {
        for reason in RefuseReason::LABELS {
            zero(
                "vsock_connections_refused_total",
                &[("rule", rule), ("reason", reason)],
            );
        }
    }
    // Without a rule nothing is opened, so nothing is closed.
    for rule in ["echo", "mux"] {
        for reason in CloseReason::LABELS {
            zero(
                "vsock_connections_closed_total",
                &[("rule", rule), ("reason", reason)],
            );
        }
    }
    for kind in Misbehavior::LABELS {
        zero("vsock_misbehavior_total", &[("guest", "web"), ("kind", kind)]);
    }
    for direction in ["guest_to_host", "host_to_guest"] {
        for op in [
            "request",
            "response",
            "rst",
            "shutdown",
            "rw",
            "credit_update",
            "credit_request",
            "invalid",
        ] {
            zero("vsock_packets_total", &[("direction", direction), ("op", op)]);
        }
        zero("vsock_payload_bytes_total", &[("direction", direction)]);
        zero("vsock_buffered_bytes", &[("direction", direction)]);
        zero("vsock_credit_stalls_total", &[("direction", direction)]);
    }
    for queue in ["rx", "tx", "event"] {
        for family in [
            "vsock_kicks_total",
            "vsock_interrupts_total",
            "vsock_vring_full_total",
            "vsock_vring_size",
        ] {
            zero(family, &[("queue", queue)]);
        }
    }
    zero("vsock_session_active", &[("guest", "web")]);
    assert_eq!(
        samples(&page, "vsock_session_state", &[("state", "listening")]),
        Some(1.0)
    );
    assert_eq!(
        samples(&page, "vsock_session_state", &[]),
        Some(1.0),
        "exactly one state"
    );
}

#[test]
fn state_shows_negotiation_rings_and_connections() {
    let port = serve(echo);
    let sidecar = Sidecar::start(&echoing(port));
    assert_eq!(sidecar.state()["guests"][0]["session"]["state"], "waiting");
    let guest = linux(&sidecar.path("web.sock"));
    let mut stream = guest.connect(7).unwrap();
    stream.write_all(b"hello").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
    let state = sidecar.state();
    let web = &state["guests"][0];
    assert_eq!(
        (&web["name"], &web["cid"]),
        (&Value::from("web"), &Value::from(3))
    );
    let session = &web["session"];
    assert_eq!(session["state"], "running", "{session:#}");
    let acked = session["featuresAcked"].to_string();
    for feature in ["version_1", "ring_event_idx", "ring_indirect_desc"] {
        assert!(acked.contains(feature), "{feature} in {acked}");
        assert_eq!(
            sidecar.metric("vsock_virtio_feature_acked", &[("feature", feature)]),
            1.0
        );
        assert_eq!(
            sidecar.metric("vsock_virtio_feature_offered", &[("feature", feature)]),
            1.0
        );
    }
    assert_eq!(session["peer"]["pid"], std::process::id(), "the peer is us");
    let device = &web["device"];
    let rings: Vec<_> = device["rings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|ring| ring["queue"].clone())
        .collect();
    assert_eq!(rings, ["rx", "tx"], "{device:#}");
    assert_eq!(device["rings"][0]["size"], 128);
    assert_eq!(device["connectionCount"], 1);
    let connection = &device["connections"][0];
    let expected: [(&str, Value); 7] = [
        ("rule", "echo".into()),
        ("openedBy", "guest_to_host".into()),
        ("guestPort", stream.local_port().into()),
        ("hostPort", 7.into()),
        ("peer", format!("127.0.0.1:{port}").into()),
        ("bytesFromGuest", 5.into()),
        ("bytesToGuest", 5.into()),
    ];
    for (name, value) in expected {
        assert_eq!(connection[name], value, "{name} in {connection:#}");
    }
    let traffic = &web["outbound"][0]["traffic"];
    assert_eq!(
        (&traffic["active"], &traffic["opened"], &traffic["refused"]),
        (&1.into(), &1.into(), &0.into()),
        "{traffic:#}"
    );
    assert_eq!(
        (&traffic["bytesGuestToHost"], &traffic["bytesHostToGuest"]),
        (&5.into(), &5.into()),
        "{traffic:#}"
    );
    assert!(state["now"].as_f64() >= state["startedAt"].as_f64());
    assert_eq!(session["accessPlatform"]["mode"], "none");
    assert_eq!(
        sidecar.metric("vsock_access_platform_mode", &[("mode", "none")]),
        1.0
    );
    assert_eq!(
        session["messages"][0]["outcome"], "answered",
        "{:#}",
        session["messages"]
    );
    let text = state.to_string();
    assert!(text.contains("get_features"), "requests by name");
    assert_eq!(sidecar.metric("vsock_vring_size", &[("queue", "tx")]), 128.0);
    assert_eq!(sidecar.metric("vsock_vring_started", &[("queue", "tx")]), 1.0);
    assert_eq!(
        sidecar.metric("vsock_memory_region_bytes", &[]),
        f64::from(256 << 20)
    );
    assert_eq!(
        sidecar.get("/livez").lines().count(),
        sidecar.get("/livez").lines().count()
    );
    drop(stream);
    guest.kill();
    until("the state says so", || {
        sidecar.state()["guests"][0]["session"]["state"] == "waiting"
    });
    assert_eq!(sidecar.state()["guests"][0]["device"]["connectionCount"], 0);
}

/// A program that the test needs is not installed: a failure in CI, which installs it, and a remark elsewhere.
fn missing(program: &str, error: &std::io::Error) {
    let advice = format!("cannot run {program}: {error}; install it with: apt-get install prometheus");
    assert!(std::env::var_os("CI").is_none(), "{advice}");
    eprintln!("NOT TESTED: {advice}");
}

struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A page scraped amid traffic passes Prometheus' own linter, and a real Prometheus takes it.
#[test]
fn promtool_and_prometheus_like_a_page_scraped_amid_traffic() {
    let admin = free_port();
    let sidecar = Sidecar::start(&format!(
        "admin: {{listen: [\"unix://{{dir}}/admin.sock\", \"tcp://127.0.0.1:{admin}\"]}}\n{}",
        echoing(serve(echo))
    ));
    let guest = linux(&sidecar.path("web.sock"));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = StopOnDrop(&over);
        scope.spawn(|| {
            let mut stream = guest.connect(7).unwrap();
            let mut chunk = [0; 3000];
            while !over.load(Ordering::Relaxed) {
                stream.write_all(&chunk).unwrap();
                stream.read_exact(&mut chunk).unwrap();
                let _ = guest.connect(9);
            }
        });
        until("traffic flows", || {
            sidecar.metric("vsock_payload_bytes_total", &[]) > 10_000.0
        });
        lint(&sidecar.get("/metrics"));
        scrape(&sidecar, admin);
        drop(stop);
    });
    assert_lawful(&guest);
}

fn lint(page: &str) {
    let spawned = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return missing("promtool", &error),
    };
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.trim().is_empty(),
        "promtool says:\n{said}"
    );
}

fn scrape(sidecar: &Sidecar, admin: u16) {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("prometheus.yml");
    std::fs::write(
        &config,
        format!(
            "global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}\nscrape_configs:\n- job_name: sidecar\n  \
             static_configs: [{{targets: ['127.0.0.1:{admin}']}}]\n"
        ),
    )
    .unwrap();
    let web = free_port();
    let spawned = Command::new("prometheus")
        .arg(format!("--config.file={}", config.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            dir.path().join("data").display()
        ))
        .arg(format!("--web.listen-address=127.0.0.1:{web}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let _prometheus = match spawned {
        Ok(child) => Ends(child),
        Err(error) => return missing("prometheus", &error),
    };
    let query = |expression: &str| -> Option<f64> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let mut stream = TcpStream::connect(("127.0.0.1", web)).ok()?;
        stream.set_read_timeout(Some(LONG)).ok()?;
        write!(
            stream,
            "GET /api/v1/query?query={encoded} HTTP/1.0\r\nHost: x\r\n\r\n"
        )
        .ok()?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).ok()?;
        let answer: Value = serde_json::from_str(reply.split_once("\r\n\r\n")?.1).ok()?;
        match answer["data"]["result"].as_array()?.as_slice() {
            [series] => series["value"][1].as_str()?.parse().ok(),
            _ => None,
        }
    };
    until("prometheus says that we are up", || {
        query("up{job=\"sidecar\"}") == Some(1.0)
    });
    for expression in [
        "sum(vsock_packets_total{guest=\"web\",op=\"rw\"}) > 0",
        "sum(vsock_connections_refused_total{reason=\"no_rule\"}) > 0",
        "vsock_session_active{guest=\"web\"} == 1",
        "process_open_fds > 0",
    ] {
        until(expression, || query(expression).is_some());
    }
    // What it has is what we say, once no more is added.
    let ours = sidecar.metric("vsock_sessions_total", &[]);
    assert_eq!(query("vsock_sessions_total"), Some(ours));
}

/// Scrapes must not disturb the data path: thousands of them amid a transfer.
#[test]
fn scrapes_amid_a_transfer_cost_no_byte() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let sidecar = Sidecar::start(&echoing(listener.local_addr().unwrap().port()));
    let guest = linux(&sidecar.path("web.sock"));
    let stream = guest.connect(7).unwrap();
    let mut host = accept_tcp(&listener);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let stop = StopOnDrop(&over);
        for path in ["/metrics", "/state", "/livez"] {
            let (sidecar, over) = (&sidecar, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    sidecar.get(path);
                }
            });
        }
        scope.spawn(|| Bytes::new(1).write_to(&stream, 8 << 20).unwrap());
        Bytes::new(1).expect_from(&mut host, 8 << 20);
        drop(stop);
    });
    assert_lawful(&guest);
}
