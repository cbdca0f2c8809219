use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::*;

const LABELS: LabelSets = LabelSets {
    refused: &["no_rule", "limit"],
    closed: &["guest_shutdown", "peer_fin"],
    misbehavior: &["bad_cid"],
    ring_errors: &["loop"],
};

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| {
        line.strip_prefix(series)
            .is_some_and(|rest| rest.starts_with(' '))
    });
    let line = line.unwrap_or_else(|| panic!("no series {series} in\n{text}"));
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

fn encoded(sample: SessionSample) -> String {
    let registry = Registry::new().unwrap();
    registry.add_session("web", move || sample.clone());
    registry.encode().unwrap()
}

#[test]
fn a_guest_without_a_vmm_has_every_series_at_zero() {
    let text = encoded(SessionSample {
        cid: 3,
        socket: "/run/web.sock".to_owned(),
        ..SessionSample::default()
    });
    let zero = [
        r#"vsock_session_active{guest="web"}"#,
        r#"vsock_session_state{guest="web",state="running"}"#,
        r#"vsock_sessions_total{guest="web"}"#,
        r#"vsock_session_errors_total{guest="web",reason="protocol"}"#,
        r#"vsock_session_errors_total{guest="web",reason="other"}"#,
        r#"vsock_session_start_timestamp_seconds{guest="web"}"#,
        r#"vsock_session_info{guest="web",guest_cid="3",vmm_hint="",socket="/run/web.sock"}"#,
        r#"vsock_vhost_user_requests_total{guest="web",request="set_mem_table"}"#,
        r#"vsock_vhost_user_requests_total{guest="web",request="other"}"#,
        r#"vsock_virtio_feature_acked{guest="web",feature="access_platform"}"#,
        r#"vsock_protocol_feature_offered{guest="web",feature="device_state"}"#,
        r#"vsock_vring_started{guest="web",queue="event"}"#,
        r#"vsock_memory_map_changes_total{guest="web",op="remove"}"#,
        r#"vsock_access_platform_mode{guest="web",mode="translate"}"#,
        r#"vsock_finding{guest="web",code="access-platform-without-iotlb"}"#,
        r#"vsock_backend_requests_total{guest="web",request="iotlb_msg"}"#,
    ];
    for series in zero {
        assert_eq!(value(&text, series), 0.0, "{series}");
    }
    assert_eq!(
        value(&text, r#"vsock_access_platform_mode{guest="web",mode="none"}"#),
        1.0
    );
    assert_eq!(
        value(&text, r#"vsock_session_state{guest="web",state="listening"}"#),
        1.0
    );
}

#[test]
fn a_running_session_is_shown_as_it_is() {
    let text = encoded(SessionSample {
        state: SessionState::Running,
        connected: true,
        sessions: 2,
        errors: vec![("io", 3), ("something new", 4)],
        started: Some(UNIX_EPOCH + Duration::from_millis(1_700_000_000_500)),
        cid: 3,
        vmm_hint: "qemu".to_owned(),
        socket: "/run/web.sock".to_owned(),
        requests: vec![
            ("set_mem_table", 5),
            ("gpu_set_socket", 1),
            ("postcopy_advise", 1),
        ],
        request_errors: 1,
        features_offered: 1 << 33 | 1 << 32 | 1,
        features_acked: 1 << 62 | 1 << 32 | 1,
        protocol_features_offered: 1 << 3,
        protocol_features_acked: 1 << 3,
        rings: [
            RingSample {
                size: 128,
                enabled: true,
                started: true,
                available: 127,
            },
            RingSample {
                size: 256,
                enabled: true,
                started: false,
                available: 0,
            },
            RingSample::default(),
        ],
        memory_regions: 2,
        memory_bytes: 1 << 30,
        memory_map_changes: MemoryMapChanges {
            set_table: 1,
            add: 2,
            remove: 3,
        },
        dirty_log_active: true,
        access_platform_mode: "translate",
        backend_requests: 7,
        findings: vec!["driver-not-ready", "of another version"],
    });
    let expected = [
        (r#"vsock_session_active{guest="web"}"#, 1.0),
        (r#"vsock_session_state{guest="web",state="running"}"#, 1.0),
        (r#"vsock_session_state{guest="web",state="listening"}"#, 0.0),
        (r#"vsock_sessions_total{guest="web"}"#, 2.0),
        (r#"vsock_session_errors_total{guest="web",reason="io"}"#, 3.0),
        (r#"vsock_session_errors_total{guest="web",reason="other"}"#, 4.0),
        (
            r#"vsock_session_start_timestamp_seconds{guest="web"}"#,
            1_700_000_000.5,
        ),
        (
            r#"vsock_session_info{guest="web",guest_cid="3",vmm_hint="qemu",socket="/run/web.sock"}"#,
            1.0,
        ),
        (
            r#"vsock_vhost_user_requests_total{guest="web",request="set_mem_table"}"#,
            5.0,
        ),
        (
            r#"vsock_vhost_user_requests_total{guest="web",request="other"}"#,
            2.0,
        ),
        (r#"vsock_vhost_user_request_errors_total{guest="web"}"#, 1.0),
        (
            r#"vsock_virtio_feature_offered{guest="web",feature="access_platform"}"#,
            1.0,
        ),
        (
            r#"vsock_virtio_feature_acked{guest="web",feature="access_platform"}"#,
            0.0,
        ),
        (
            r#"vsock_virtio_feature_acked{guest="web",feature="version_1"}"#,
            1.0,
        ),
        (r#"vsock_virtio_features_unknown_acked{guest="web"}"#, 1.0),
        (
            r#"vsock_protocol_feature_acked{guest="web",feature="reply_ack"}"#,
            1.0,
        ),
        (r#"vsock_access_platform_mode{guest="web",mode="translate"}"#, 1.0),
        (r#"vsock_access_platform_mode{guest="web",mode="none"}"#, 0.0),
        (r#"vsock_iotlb_enabled{guest="web"}"#, 1.0),
        (
            r#"vsock_backend_requests_total{guest="web",request="iotlb_msg"}"#,
            7.0,
        ),
        (r#"vsock_finding{guest="web",code="driver-not-ready"}"#, 1.0),
        (r#"vsock_finding{guest="web",code="memory-not-shared"}"#, 0.0),
        (r#"vsock_vring_size{guest="web",queue="tx"}"#, 256.0),
        (r#"vsock_vring_enabled{guest="web",queue="tx"}"#, 1.0),
        (r#"vsock_vring_started{guest="web",queue="tx"}"#, 0.0),
        (
            r#"vsock_vring_available_descriptors{guest="web",queue="rx"}"#,
            127.0,
        ),
        (r#"vsock_memory_regions{guest="web"}"#, 2.0),
        (r#"vsock_memory_region_bytes{guest="web"}"#, 1073741824.0),
        (r#"vsock_memory_map_changes_total{guest="web",op="add"}"#, 2.0),
        (r#"vsock_dirty_log_active{guest="web"}"#, 1.0),
    ];
    for (series, expected) in expected {
        assert_eq!(value(&text, series), expected, "{series}");
    }
}

/// A session that counts anew for each VMM must not look to Prometheus like a restart of the sidecar.
#[test]
fn counters_never_fall_when_samples_do() {
    let sample = Arc::new(std::sync::Mutex::new(SessionSample::default()));
    let registry = Registry::new().unwrap();
    let sampled = sample.clone();
    registry.add_session("web", move || sampled.lock().unwrap().clone());
    let mut seen = Vec::new();
    for requests in [5, 9, 9, 2, 3, 0, 1] {
        sample.lock().unwrap().requests = vec![("get_features", requests)];
        let text = registry.encode().unwrap();
        seen.push(value(
            &text,
            r#"vsock_vhost_user_requests_total{guest="web",request="get_features"}"#,
        ));
    }
    assert_eq!(seen, [5.0, 9.0, 9.0, 11.0, 12.0, 12.0, 13.0]);
}

#[test]
fn a_second_sampler_for_a_guest_replaces_the_first_and_its_counters_go_on() {
    let registry = Registry::new().unwrap();
    registry.add_session("web", || SessionSample {
        sessions: 4,
        ..SessionSample::default()
    });
    registry.add_session("db", SessionSample::default);
    assert_eq!(
        value(
            &registry.encode().unwrap(),
            r#"vsock_sessions_total{guest="web"}"#
        ),
        4.0
    );
    registry.add_session("web", || SessionSample {
        sessions: 1,
        ..SessionSample::default()
    });
    let text = registry.encode().unwrap();
    assert_eq!(value(&text, r#"vsock_sessions_total{guest="web"}"#), 5.0);
    assert_eq!(value(&text, r#"vsock_sessions_total{guest="db"}"#), 0.0);
}

/// The hint comes from outside the process.
#[test]
fn a_hint_of_any_length_and_content_is_one_short_label() {
    let text = encoded(SessionSample {
        vmm_hint: format!("a\"b\\c\n{}", "ü".repeat(100)),
        ..Default::default()
    });
    let line = text
        .lines()
        .find(|line| line.starts_with("vsock_session_info{"))
        .unwrap();
    assert!(line.contains(r#"vmm_hint="a\"b\\c\nü"#), "{line}");
    assert!(line.len() < 200, "{line}");
}

#[test]
fn rules_past_the_cap_share_one_label() {
    let registry = Registry::new().unwrap();
    let names: Vec<String> = (0..MAX_RULES + 10).map(|n| format!("rule{n}")).collect();
    let guest = registry.guest("web", &LABELS);
    let outbound = guest.rules(Direction::GuestToHost, &names);
    let _inbound = guest.rules(Direction::HostToGuest, &["ssh".to_owned()]);
    outbound[MAX_RULES - 1].opened.inc();
    outbound[MAX_RULES].opened.inc();
    outbound[MAX_RULES + 9].opened.inc();
    outbound[MAX_RULES].active.inc();
    outbound[MAX_RULES + 9].active.inc();
    outbound[MAX_RULES].active.dec();
    assert_eq!(outbound[MAX_RULES + 9].name, "rule73", "the log still says which");
    assert!(outbound[MAX_RULES].is_shared() && !outbound[MAX_RULES - 1].is_shared());
    let text = registry.encode().unwrap();
    let opened = |rule: &str| {
        value(
            &text,
            &format!(
                r#"vsock_connections_opened_total{{direction="guest_to_host",guest="web",rule="{rule}"}}"#
            ),
        )
    };
    assert_eq!(opened("rule63"), 1.0);
    assert_eq!(opened(OVERFLOW_RULE), 2.0);
    assert_eq!(
        value(
            &text,
            r#"vsock_connections_active{direction="guest_to_host",guest="web",rule="_overflow"}"#
        ),
        1.0
    );
    assert!(!text.contains("rule64"));
    assert_eq!(
        value(&text, r#"vsock_rules{direction="guest_to_host",guest="web"}"#),
        74.0
    );
    assert_eq!(
        value(&text, r#"vsock_rules{direction="host_to_guest",guest="web"}"#),
        1.0
    );
}

/// A request that matches no rule has no name, can be refused, and can be nothing else.
#[test]
fn no_rule_is_an_empty_label_in_one_family_only() {
    let registry = Registry::new().unwrap();
    let guest = registry.guest("web", &LABELS);
    guest.no_rule.refused[0].inc();
    guest.no_rule.opened.inc();
    let text = registry.encode().unwrap();
    let series =
        r#"vsock_connections_refused_total{direction="guest_to_host",guest="web",reason="no_rule",rule=""}"#;
    assert_eq!(value(&text, series), 1.0);
    for line in text.lines().filter(|line| line.contains(r#"rule="""#)) {
        assert!(line.starts_with("vsock_connections_refused_total{"), "{line}");
    }
}

#[test]
fn the_process_is_described_under_the_standard_names() {
    let text = Registry::new().unwrap().encode().unwrap();
    assert!(value(&text, "process_cpu_seconds_total") >= 0.0);
    assert!(value(&text, "process_resident_memory_bytes") > 1e6);
    assert!(value(&text, "process_virtual_memory_bytes") >= value(&text, "process_resident_memory_bytes"));
    assert!(value(&text, "process_open_fds") >= 3.0);
    assert!(value(&text, "process_max_fds") >= value(&text, "process_open_fds"));
    assert!(value(&text, "process_threads") >= 1.0);
    let age = UNIX_EPOCH.elapsed().unwrap().as_secs_f64() - value(&text, "process_start_time_seconds");
    assert!((-2.0..86400.0).contains(&age), "the process is {age} s old");
}

/// CPU time in whole seconds would make every rate a comb.
#[test]
fn cpu_time_has_fractions() {
    let registry = Registry::new().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while value(&registry.encode().unwrap(), "process_cpu_seconds_total").fract() == 0.0 {
        assert!(
            std::time::Instant::now() < deadline,
            "CPU time stays a whole number"
        );
    }
}

#[test]
fn build_and_configuration_say_what_runs() {
    let registry = Registry::new().unwrap();
    registry.set_config("0123456789abcdef0123456789abcdef");
    registry.set_config("fedcba9876543210");
    let text = registry.encode().unwrap();
    assert_eq!(value(&text, r#"vsock_config_info{sha256="fedcba987654"}"#), 1.0);
    assert!(!text.contains("0123456789ab"), "the old configuration is gone");
    let build = text
        .lines()
        .find(|line| line.starts_with("vsock_build_info{"))
        .unwrap();
    assert!(
        build.contains(&format!("version=\"{}\"", env!("CARGO_PKG_VERSION"))),
        "{build}"
    );
    assert!(
        build.contains("linux") && !build.contains(r#"rustc="""#),
        "{build}"
    );
}

/// The samples of rules and guests, without their values.
fn series(registry: &Registry, of: &str) -> Vec<String> {
    let text = registry.encode().unwrap();
    let lines = text
        .lines()
        .filter(|line| !line.starts_with('#') && line.contains(of));
    lines
        .map(|line| line.rsplit_once(' ').unwrap().0.to_owned())
        .collect()
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// What a reload does: the new list is asked for while the old one is held.
#[test]
fn a_rule_that_keeps_its_name_keeps_its_counters_and_one_that_goes_takes_its_series_along() {
    let registry = Registry::new().unwrap();
    let guest = registry.guest("web", &LABELS);
    let before = guest.rules(Direction::GuestToHost, &names(&["db", "cache"]));
    let inbound = guest.rules(Direction::HostToGuest, &names(&["cache"]));
    before[0].opened.inc();
    let connection = Arc::clone(&before[1]);
    let after = guest.rules(Direction::GuestToHost, &names(&["queue", "db"]));
    drop(before);
    after[1].opened.inc();
    assert_eq!(after[1].opened.get(), 2);
    let text = registry.encode().unwrap();
    let opened = r#"vsock_connections_opened_total{direction="guest_to_host",guest="web",rule="db"}"#;
    assert_eq!(value(&text, opened), 2.0);

    // A connection of a rule that is gone holds its series, and counts into them.
    connection.closed[0].inc();
    let closed = r#"vsock_connections_closed_total{direction="guest_to_host",guest="web",reason="guest_shutdown",rule="cache"}"#;
    assert_eq!(value(&registry.encode().unwrap(), closed), 1.0);
    drop(connection);
    let left = series(&registry, r#"rule="cache""#);
    assert!(
        left.iter()
            .all(|line| !line.contains(r#"direction="guest_to_host""#) || line.contains("upstream")),
        "{left:?}"
    );
    assert!(
        left.iter().any(|line| line.contains("upstream")),
        "the inbound rule of that name has these too"
    );
    drop(inbound);
    assert_eq!(series(&registry, r#"rule="cache""#), [""; 0]);
    drop(after);
    assert_eq!(series(&registry, r#"rule="db""#), [""; 0]);
}

/// An operator who renames a rule a thousand times, with a connection that is left of each, gets no page of a thousand rules.
#[test]
fn rules_of_the_past_are_bounded_and_leave_room_for_those_of_today() {
    let registry = Registry::new().unwrap();
    let guest = registry.guest("web", &LABELS);
    let mut connections = Vec::new();
    let mut most = 0;
    for n in 0..10 * MAX_RULES {
        let rules = guest.rules(Direction::GuestToHost, &names(&[&format!("rule{n}")]));
        connections.extend(rules);
        let lines = series(&registry, "vsock_connections_opened_total{");
        most = most.max(lines.len());
    }
    assert_eq!(most, 2 * MAX_RULES + 1, "and the one that they share");
    // They end, and the next reload finds room for a name that had none.
    let last = connections.pop().unwrap();
    assert!(last.is_shared());
    drop(connections);
    let rules = guest.rules(Direction::GuestToHost, std::slice::from_ref(&last.name));
    assert!(!rules[0].is_shared());
    drop(last);
    assert_eq!(series(&registry, "vsock_connections_opened_total{").len(), 1);
}

#[test]
fn a_guest_that_is_removed_leaves_no_series() {
    let registry = Registry::new().unwrap();
    let stays = registry.guest("web", &LABELS);
    let before = series(&registry, "guest=");
    let goes = registry.guest("db", &LABELS);
    registry.add_session("db", SessionSample::default);
    let rules = goes.rules(Direction::HostToGuest, &names(&["ssh"]));
    assert!(!series(&registry, r#"guest="db""#).is_empty());
    drop((goes, rules));
    registry.remove_guest("db");
    assert_eq!(series(&registry, r#"guest="db""#), [""; 0]);
    assert_eq!(series(&registry, "guest="), before);
    drop(stays);
}

#[test]
fn a_reload_that_is_refused_shows_until_one_is_not() {
    let registry = Registry::new().unwrap();
    let read = |name: &str| value(&registry.encode().unwrap(), name);
    let state = || {
        (
            read("vsock_config_reloads_total"),
            read("vsock_config_reload_failures_total"),
            read("vsock_config_last_reload_successful"),
            read("vsock_config_last_reload_success_timestamp_seconds"),
        )
    };
    let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
    let reloads = registry.reloads();
    reloads.started(at(1000));
    assert_eq!(state(), (0.0, 0.0, 1.0, 1000.0));
    reloads.refused();
    reloads.refused();
    assert_eq!(state(), (2.0, 2.0, 0.0, 1000.0));
    reloads.succeeded(at(2000));
    assert_eq!(state(), (3.0, 2.0, 1.0, 2000.0));
}
