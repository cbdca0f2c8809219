//! The program over TLS.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Authority, Client, LONG, Volume, Webhook, apply, decoded, expect, request, until};

/// What the patch of an answer makes of the pod of a review.
fn patched(review: &Value, response: &Value) -> Value {
    assert_eq!(response["patchType"], "JSONPatch");
    let patch: Value = serde_json::from_slice(&decoded(response["patch"].as_str().unwrap())).unwrap();
    apply(&review["request"]["object"], &patch)
}

fn works(client: &mut Client) {
    let response = client.review(&request("qemu-pod"));
    assert_eq!(response["allowed"], true);
}

#[test]
fn recorded_reviews_are_answered_on_one_connection() {
    let webhook = Webhook::start(&[]);
    let mut client = webhook.connect().unwrap();
    for name in ["qemu-pod", "kubevirt-pod"] {
        let mut review = request(name);
        let response = client.review(&review);
        assert_eq!(response["allowed"], true, "{response}");
        let pod = patched(&review, &response);
        expect(name, &pod);
        // The API server asks again when another webhook has changed the pod.
        review["request"]["object"] = pod;
        let response = client.review(&review);
        assert_eq!(
            (&response["allowed"], response.get("patch")),
            (&json!(true), None)
        );
    }
    let response = client.review(&request("plain-pod"));
    assert_eq!(response, json!({"uid": response["uid"], "allowed": true}));

    for (result, count) in [
        ("injected", 2.0),
        ("unchanged", 2.0),
        ("not_selected", 1.0),
        ("refused", 0.0),
    ] {
        let series = format!("vsock_webhook_reviews_total{{result=\"{result}\"}}");
        assert_eq!(webhook.metric(&series), count, "{series}");
    }
    until("both pods are in the log", || {
        webhook.events("the sidecar was put into a pod").len() == 2
    });
    let events = webhook.events("the sidecar was put into a pod");
    assert_eq!(
        (&events[0]["namespace"], &events[0]["pod"]),
        (&json!("shop"), &json!("vm-web"))
    );
    assert_eq!(events[1]["pod"], "virt-launcher-web-");
}

#[test]
fn an_opted_in_pod_without_a_configuration_is_refused() {
    let webhook = Webhook::start(&[]);
    let mut review = request("qemu-pod");
    review["request"]["object"]["metadata"]["annotations"] = json!({});
    let response = webhook.connect().unwrap().review(&review);
    assert_eq!(
        (&response["allowed"], response.get("patch")),
        (&json!(false), None)
    );
    assert_eq!(response["status"]["code"], 422);
    let message = response["status"]["message"].as_str().unwrap();
    assert!(message.contains("vsock-sidecar.io/config"), "{message}");
    assert_eq!(
        webhook.metric("vsock_webhook_reviews_total{result=\"refused\"}"),
        1.0
    );
    until("it is in the log", || {
        webhook
            .events("a pod was refused")
            .iter()
            .any(|event| event["reason"] == message)
    });
}

/// One row a stranger's request; the server answers as it should and goes on.
#[test]
fn garbage_is_answered_with_its_reason() {
    let webhook = Webhook::start(&[]);
    let beta = request("qemu-pod")
        .to_string()
        .replace("admission.k8s.io/v1", "admission.k8s.io/v1beta1");
    let long = vec![b' '; 7 << 20];
    let rows: [(&str, &[u8], u16, &str); 11] = [
        ("POST /mutate", b"", 400, "no JSON"),
        ("POST /mutate", b"\x00\xff\x1b[2J", 400, "no JSON"),
        ("POST /mutate", &[b'['; 40_000], 400, "no JSON"),
        ("POST /mutate", b"{}", 400, "kind none"),
        ("POST /mutate", beta.as_bytes(), 400, "v1beta1"),
        ("POST /mutate", &long, 413, "bytes"),
        ("GET /mutate", b"", 405, "POST"),
        ("POST /healthz", b"", 405, "GET"),
        ("GET /metrics", b"", 404, "/mutate"),
        ("GET /../../etc/passwd", b"", 404, "nothing here"),
        ("GET /healthz", b"", 200, "ok"),
    ];
    for (head, body, status, word) in rows {
        let mut client = webhook.connect().unwrap();
        // Whoever sends too much may find the connection closed before it has sent all.
        match client.ask(head, body) {
            Ok((answered, text)) => {
                assert_eq!(answered, status, "{head}: {text}");
                assert!(text.contains(word) && text.lines().count() == 1, "{head}: {text}");
            }
            Err(error) => assert_eq!(status, 413, "{head}: {error}"),
        }
    }
    let mut client = webhook.connect().unwrap();
    client
        .send(b"POST /mutate HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}")
        .unwrap();
    assert_eq!(client.response().unwrap().0, 415);
    works(&mut webhook.connect().unwrap());
    assert_eq!(
        webhook.metric("vsock_webhook_reviews_total{result=\"malformed\"}"),
        7.0
    );
    // Seven of them, and one line, which is written a little later.
    let lines = || {
        webhook
            .events("a request was no review that could be answered")
            .len()
    };
    until("it is in the log", || lines() > 0);
    assert_eq!(lines(), 1);
}

/// Objects of one field, which take the most memory for their bytes. A webhook that is killed for it would keep out every pod that asks
/// for the sidecar, and anybody who may make pods could do it.
#[test]
fn no_body_takes_more_memory_than_the_container_has() {
    let webhook = Webhook::start(&[]);
    let with_objects = |count: usize| {
        let mut review = request("qemu-pod");
        review["request"]["object"]["spec"]["containers"][0]["x"] = json!(vec![json!({"a": 0}); count]);
        review.to_string()
    };
    for (count, status) in [(250_000, 400), (24_000, 200)] {
        let body = with_objects(count);
        assert!(body.len() < 3 << 20, "what the API server takes");
        let (answered, text) = webhook
            .connect()
            .unwrap()
            .ask("POST /mutate", body.as_bytes())
            .unwrap();
        assert_eq!(answered, status, "{text}");
    }
    let peak = webhook.peak_memory();
    assert!(peak < 128 << 20, "{peak} bytes");
}

#[test]
fn whoever_speaks_no_tls_or_trusts_another_is_counted_and_told_of_once() {
    let webhook = Webhook::start(&[]);
    let series = "vsock_webhook_connection_failures_total{reason=\"handshake\"}";
    let mut plain = TcpStream::connect(webhook.address).unwrap();
    plain.set_read_timeout(Some(LONG)).unwrap();
    plain
        .write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let _ = plain.read_to_end(&mut Vec::new());
    webhook.wait_for(series, 1.0);
    assert!(webhook.connect_as_stranger().is_err());
    webhook.wait_for(series, 2.0);
    works(&mut webhook.connect().unwrap());
    let told = webhook.scrape();
    assert!(
        told.contains("vsock_log_messages_total{level=\"warn\"} 1"),
        "{told}"
    );
}

#[test]
fn slow_clients_are_given_up_and_hold_nobody_up() {
    let webhook = Webhook::start(&[]);
    let mut slow_body = webhook.connect().unwrap();
    slow_body
        .send(b"POST /mutate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"")
        .unwrap();
    let mut slow_head = webhook.connect().unwrap();
    slow_head.send(b"POST /mutate HTTP/1.1\r\nhos").unwrap();
    let mut no_handshake = TcpStream::connect(webhook.address).unwrap();
    no_handshake.set_read_timeout(Some(LONG)).unwrap();
    works(&mut webhook.connect().unwrap());
    let (status, text) = slow_body.response().unwrap();
    assert_eq!(status, 408, "{text}");
    // Closed, with or without TLS's goodbye.
    assert!(!matches!(slow_head.0.read(&mut [0]), Ok(1..)));
    assert_eq!(no_handshake.read(&mut [0]).unwrap_or(0), 0);
    webhook.wait_for("vsock_webhook_connection_failures_total{reason=\"timeout\"}", 2.0);
}

#[test]
fn a_flood_of_silent_connections_does_not_keep_the_api_server_out() {
    let webhook = Webhook::start(&[]);
    let mut regular = webhook.connect().unwrap();
    works(&mut regular);
    let flood: Vec<TcpStream> = (0..400)
        .map(|_| TcpStream::connect(webhook.address).unwrap())
        .collect();
    works(&mut webhook.connect().unwrap());
    until("the limit was reached", || {
        webhook.metric("vsock_webhook_connection_failures_total{reason=\"limit\"}") > 0.0
    });
    drop(flood);
}

#[test]
fn a_new_certificate_is_for_new_connections_and_a_bad_one_for_none() {
    let mut webhook = Webhook::start(&["--certificate-interval", "50ms"]);
    let mut old = webhook.connect().unwrap();
    works(&mut old);
    assert_eq!(
        webhook.metric("vsock_webhook_certificate_expiry_timestamp_seconds"),
        2_524_608_000.0
    );

    let new = webhook.authority.issue(2060);
    webhook.volume.swap(&new.certificate, &new.key);
    webhook.wait_for("vsock_webhook_certificate_reloads_total", 1.0);
    assert_eq!(
        webhook.metric("vsock_webhook_certificate_expiry_timestamp_seconds"),
        2_840_140_800.0
    );
    let mut client = webhook.connect().unwrap();
    assert!(client.was_shown(&new) && !old.was_shown(&new));
    works(&mut client);
    works(&mut old);

    // The certificate of one pair and the key of another, as a swap by hand might leave them.
    let other = webhook.authority.issue(2070);
    webhook.volume.swap(&other.certificate, &new.key);
    webhook.wait_for("vsock_webhook_certificate_reload_failures_total", 1.0);
    assert_eq!(
        webhook.metric("vsock_webhook_certificate_last_reload_successful"),
        0.0
    );
    let mut client = webhook.connect().unwrap();
    assert!(client.was_shown(&new));
    works(&mut client);
    let message = "the certificate has changed and cannot be used; the one before goes on";
    until("it is in the log", || webhook.events(message).len() == 1);
    let problem = webhook.events(message)[0]["problem"].to_string();
    assert!(problem.contains("is not that of the certificate"), "{problem}");

    webhook.volume.swap(&other.certificate, &other.key);
    webhook.wait_for("vsock_webhook_certificate_last_reload_successful", 1.0);
    assert!(webhook.connect().unwrap().was_shown(&other));
    assert_eq!(
        webhook.metric("vsock_webhook_certificate_reload_failures_total"),
        1.0
    );
}

#[test]
fn sighup_looks_at_the_certificate_at_once() {
    let mut webhook = Webhook::start(&["--certificate-interval", "60m"]);
    let new = webhook.authority.issue(2060);
    webhook.volume.swap(&new.certificate, &new.key);
    webhook.signal(Signal::HUP);
    webhook.wait_for("vsock_webhook_certificate_reloads_total", 1.0);
    assert!(webhook.connect().unwrap().was_shown(&new));
}

#[test]
fn sigterm_is_a_word_first_and_reviews_go_on() {
    let mut webhook = Webhook::start(&["--drain", "60m"]);
    webhook.signal(Signal::TERM);
    until("it is unhealthy", || {
        let (status, _) = webhook.connect().unwrap().ask("GET /healthz", b"").unwrap();
        status == 503
    });
    works(&mut webhook.connect().unwrap());
    // Who is in a hurry says it twice.
    webhook.signal(Signal::TERM);
    assert_eq!(webhook.ended().code(), Some(0));
}

#[test]
fn a_review_that_is_under_way_is_answered_before_the_end() {
    let mut webhook = Webhook::start(&["--drain", "0s"]);
    let mut idle = webhook.connect().unwrap();
    works(&mut idle);
    let body = request("qemu-pod").to_string();
    let (first, rest) = body.split_at(1000);
    let mut client = webhook.connect().unwrap();
    let head = format!(
        "POST /mutate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{first}",
        body.len()
    );
    client.send(head.as_bytes()).unwrap();
    // A request whose head has been read is under way; what is idle is closed.
    let mut probe = webhook.connect().unwrap();
    works(&mut probe);
    webhook.signal(Signal::TERM);
    until("nobody listens", || TcpStream::connect(webhook.address).is_err());
    client.send(rest.as_bytes()).unwrap();
    let (status, answer) = client.response().unwrap();
    assert_eq!(status, 200);
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["response"]["allowed"], true);
    assert!(!matches!(idle.0.read(&mut [0]), Ok(1..)));
    assert_eq!(webhook.ended().code(), Some(0));
}

#[test]
fn the_process_is_confined_and_needs_nothing_that_it_gave_up() {
    let webhook = Webhook::start(&[]);
    works(&mut webhook.connect().unwrap());
    assert_eq!(webhook.status("NoNewPrivs:"), "1");
    assert_eq!(webhook.status("Seccomp:"), "2");
    assert_eq!(webhook.metric("vsock_confinement{kind=\"seccomp\"}"), 1.0);
    assert_eq!(webhook.metric("vsock_refused_system_calls_total"), 0.0);
}

#[test]
fn what_keeps_it_from_starting_is_one_line() {
    let authority = Authority::new();
    let pair = authority.issue(2050);
    let volume = Volume::new(&pair);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (certificate, key) = (volume.file("tls.crt"), volume.file("tls.key"));
    let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
    let no_metrics = ["--metrics", "none"];
    let bad_level = ["--metrics", "none", "--log-level", "inof"];
    let bad_settings = ["--config", "/nonexistent.yaml"];
    let (any, none) = ("127.0.0.1:0", "/nonexistent/tls.crt");
    for (certificate, key, listen, more, word) in [
        (none, key, any, &[][..], none),
        (certificate, certificate, any, &[], "is no private key"),
        (key, key, any, &[], "no chain of certificates"),
        (certificate, key, address.as_str(), &no_metrics, "--listen"),
        (certificate, key, any, &["--metrics", &address], "--metrics"),
        (certificate, key, any, &bad_level, "--log-level"),
        (certificate, key, "localhost", &[], "--listen"),
        (certificate, key, any, &["--metrics", "x"], "or none"),
        (certificate, key, any, &bad_settings, "/nonexistent.yaml"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_vsock-sidecar"))
            .args(["webhook", "--image", "x", "--log-format", "json"])
            .args(["--certificate", certificate, "--key", key, "--listen", listen])
            .args(more)
            .env_remove("VSOCK_SIDECAR_LOG")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{word}: {said}");
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn every_family_of_the_webhook_is_documented_and_every_documented_one_exists() {
    let webhook = Webhook::start(&[]);
    let page = webhook.scrape();
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/webhook.md")).unwrap();
    let families: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    for family in &families {
        let known = family.starts_with("process_") || text.contains(&format!("`{family}`"));
        assert!(known, "{family} is not in docs/webhook.md");
    }
    let documented = text.split('`').filter(|word| word.starts_with("vsock_webhook_"));
    for word in documented {
        let family = word.split('{').next().unwrap();
        assert!(families.contains(&family), "{family} is not exported");
    }
}
