//! The log of a whole process. Each scenario is a child of its own, since a process has one log.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use vsock_sidecar::config::LogFormat;
use vsock_sidecar::logging::{VARIABLE, init};
use vsock_sidecar::metrics::Registry;

const SCENARIO: &str = "VSOCK_SIDECAR_TEST_LOG_SCENARIO";

/// The test's own program, as a child that runs `scenario` of [`child`].
fn spawn(scenario: &str, variable: Option<&str>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--nocapture", "--quiet"])
        .env(SCENARIO, scenario)
        .env_remove(VARIABLE);
    if let Some(filter) = variable {
        command.env(VARIABLE, filter);
    }
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What the child wrote to stderr.
fn log_of(scenario: &str, variable: Option<&str>) -> String {
    let output = spawn(scenario, variable).wait_with_output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    log
}

/// Not a test: what the children do.
#[test]
fn child() {
    let Ok(scenario) = std::env::var(SCENARIO) else {
        return;
    };
    let registry = Registry::new().unwrap();
    let counts = registry.log_messages();
    match scenario.as_str() {
        "json" | "text" => {
            let format = if scenario == "json" {
                LogFormat::Json
            } else {
                LogFormat::Text
            };
            let _guard = init(format, "info", counts.clone()).unwrap();
            tracing::info!(
                guest = "web",
                rule = "db",
                bytes = 42u64,
                reason = "peer_fin",
                "connection closed"
            );
            tracing::debug!("not at this level");
            tracing::warn!(guest = "web", "first");
            log::error!(target: "virtio_queue::queue", "attempt to use virtio queue that is not marked ready");
            log::error!(target: "vhost_user_backend::handler", "vring 0 requested queue size 0 out of range");
            log::warn!(target: "some_library", "bridged");
            assert_eq!(
                (counts.warn.get(), counts.error.get(), counts.dropped.get()),
                (2, 0, 0)
            );
        }
        "twice" => {
            let _guard = init(LogFormat::Text, "off", counts.clone()).unwrap();
            let error = init(LogFormat::Text, "off", counts).unwrap_err();
            assert_eq!(error.to_string(), "the log is set up twice");
        }
        "refused" => {
            let error = init(LogFormat::Text, "info", counts).unwrap_err().to_string();
            assert!(
                error.contains("\"inof\"") && error.contains("VSOCK_SIDECAR_LOG"),
                "{error}"
            );
        }
        "flood" => {
            let guard = init(LogFormat::Json, "info", counts.clone()).unwrap();
            let start = Instant::now();
            for n in 0..100_000 {
                tracing::info!(n, "an event that nobody reads");
            }
            drop(guard);
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the log's reader holds us up"
            );
            assert!(counts.dropped.get() > 10_000, "{} dropped", counts.dropped.get());
        }
        "late reader" => {
            let guard = init(LogFormat::Json, "info", counts.clone()).unwrap();
            let mut n = 0;
            while counts.dropped.get() == 0 {
                n += 1;
                tracing::info!(n, "an event that is read late");
            }
            println!("stalled");
            // The warning about it is the only one there is.
            let deadline = Instant::now() + Duration::from_secs(30);
            while counts.warn.get() == 0 {
                assert!(
                    Instant::now() < deadline,
                    "nothing was said about {} lost events",
                    counts.dropped.get()
                );
                std::thread::sleep(Duration::from_millis(5));
            }
            drop(guard);
        }
        other => panic!("no scenario {other}"),
    }
}

#[test]
fn json_is_one_flat_object_a_line() {
    let log = log_of("json", None);
    let events: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    assert_eq!(events.len(), 3, "{log}");
    let closed = &events[0];
    assert_eq!(closed["level"], "INFO");
    assert_eq!(closed["message"], "connection closed");
    assert_eq!(
        (&closed["guest"], &closed["rule"], &closed["reason"]),
        (&"web".into(), &"db".into(), &"peer_fin".into())
    );
    assert_eq!(closed["bytes"], 42);
    let time = closed["timestamp"].as_str().unwrap();
    assert!(
        time.len() >= 20 && time.as_bytes()[10] == b'T' && time.ends_with('Z'),
        "{time}"
    );
    assert_eq!(
        (&events[2]["target"], &events[2]["message"]),
        (&"some_library".into(), &"bridged".into())
    );
}

#[test]
fn text_has_the_same_events_and_no_colour_in_a_pipe() {
    let log = log_of("text", None);
    assert_eq!(log.lines().count(), 3, "{log}");
    assert!(
        log.contains("connection closed guest=\"web\" rule=\"db\" bytes=42 reason=\"peer_fin\""),
        "{log}"
    );
    assert!(!log.contains('\x1b'), "{log:?}");
}

/// A guest can make virtio-queue write an error for each kick; what matters of it comes to us as an error value.
#[test]
fn errors_of_the_protocol_crates_are_silent_unless_asked_for() {
    assert!(!log_of("text", None).contains("virtio_queue"));
    let mut child = spawn("text", Some("info,virtio_queue=debug"));
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    // The child's own count of errors does not hold with this filter.
    child.wait().unwrap();
    assert!(log.contains("virtio_queue::queue: attempt to use"), "{log}");
    assert!(!log.contains("vhost_user_backend"), "{log}");
}

#[test]
fn the_variable_overrides_the_configuration_and_a_bad_one_is_refused() {
    log_of("refused", Some("inof"));
    log_of("text", Some("  "));
    log_of("twice", None);
}

/// Stderr is a pipe whose reader may stall. The child's events need far more than the pipe holds.
#[test]
fn a_log_that_nobody_reads_stalls_nothing() {
    let mut child = spawn("flood", None);
    let stderr = child.stderr.take().unwrap();
    let deadline = Instant::now() + Duration::from_secs(90);
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("the child waits for its log to be read");
            }
        }
    };
    drop(stderr);
    assert!(status.success());
}

#[test]
fn a_log_that_lost_events_says_so_as_soon_as_it_is_read() {
    let mut child = spawn("late reader", None);
    let mut stdout = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(
        stdout.any(|line| line.unwrap().contains("stalled")),
        "the child ended without losing an event"
    );
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(
        child.wait().unwrap().success(),
        "{}",
        log.lines().last().unwrap_or_default()
    );
    let warnings: Vec<_> = log
        .lines()
        .filter(|line| line.contains("log events were dropped"))
        .collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let warning: Value = serde_json::from_str(warnings[0]).unwrap();
    assert!(warning["events"].as_u64() >= Some(1), "{warning}");
}
