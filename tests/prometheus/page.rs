//! Registries as a running program has them.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use vsock_sidecar::guest::RingFault;
use vsock_sidecar::metrics::{
    Direction, GuestMetrics, LabelSets, MemoryMapChanges, Registry, RingSample, RuleMetrics, SessionSample,
    SessionState, TotalsSample,
};
use vsock_sidecar::vsock::misbehavior::Misbehavior;
use vsock_sidecar::vsock::reason::{CloseReason, RefuseReason};

/// The program's lists.
pub const LABELS: LabelSets = LabelSets {
    refused: RefuseReason::LABELS,
    closed: CloseReason::LABELS,
    misbehavior: Misbehavior::LABELS,
    ring_errors: RingFault::LABELS,
};

/// Guests of which nothing has been heard yet.
pub fn with(guests: usize, outbound_rules: usize) -> Registry {
    let registry = Registry::new().unwrap();
    for n in 0..guests {
        let guest = registry.guest(&format!("guest{n}"), &LABELS);
        let names: Vec<String> = (0..outbound_rules).map(|rule| format!("rule{rule}")).collect();
        // Series of rules end with whoever holds them, and the page is for the whole of a test.
        std::mem::forget(guest.rules(Direction::GuestToHost, &names));
        registry.add_session(&format!("guest{n}"), || SessionSample {
            cid: 3,
            ..SessionSample::default()
        });
    }
    registry
}

/// A guest with a rule of each kind, before its VMM comes.
pub fn fresh() -> Registry {
    let registry = Registry::new().unwrap();
    std::mem::forget(rules(&registry.guest("web", &LABELS)));
    registry.add_session("web", || SessionSample {
        cid: 3,
        socket: "/run/web.sock".to_owned(),
        ..Default::default()
    });
    registry
}

/// A guest that has been busy: every family has a value.
pub fn populated() -> Registry {
    let registry = Registry::new().unwrap();
    registry
        .reloads()
        .succeeded(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    registry.set_config("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08");
    registry.log_messages().warn.inc();
    registry.set_totals(|| TotalsSample {
        connections: (3, Some(20_000)),
        memory: (4096, None),
        descriptors: (3, Some(900)),
    });
    let guest = registry.guest("web", &LABELS);
    let rules = rules(&guest);
    for direction in Direction::ALL {
        for op in 0..10 {
            guest.packet(direction, op, 1);
        }
        guest.payload(direction, 1, 4096);
        guest.duration[direction as usize].observe(1.5);
        guest.credit_stalls[direction as usize].inc();
        guest.credit_stall_seconds[direction as usize].inc_by(0.25);
        guest.backpressure_pauses[direction as usize].inc();
        guest.buffered_bytes[direction as usize].set(512);
    }
    for rule in &rules {
        rule.opened.inc();
        rule.active.inc();
        rule.closed
            .iter()
            .chain(&rule.refused)
            .chain(&rule.upstream_bytes)
            .for_each(|counter| counter.inc());
        rule.dials
            .iter()
            .chain(&rule.dial_failures)
            .for_each(|counter| counter.inc());
        rule.dial_duration
            .iter()
            .for_each(|histogram| histogram.observe(0.003));
    }
    std::mem::forget(rules);
    guest.no_rule.refused[RefuseReason::NoRule as usize].inc();
    guest.misbehavior.iter().for_each(|counter| counter.inc());
    for queue in &guest.queues {
        queue.kicks.inc();
        queue.full.inc();
        queue.full_seconds.inc_by(0.5);
        queue.errors.iter().for_each(|counter| counter.inc());
    }
    registry.add_session("web", || SessionSample {
        state: SessionState::Running,
        connected: true,
        sessions: 2,
        errors: vec![("io", 1)],
        started: Some(UNIX_EPOCH + Duration::from_secs(1_700_000_000)),
        cid: 3,
        vmm_hint: "qemu".to_owned(),
        socket: "/run/vsock-sidecar/web.sock".to_owned(),
        requests: vec![("get_features", 2), ("set_mem_table", 1)],
        request_errors: 1,
        features_offered: 0x1_7000_0005,
        features_acked: 0x1_7000_0001,
        protocol_features_offered: 0x220b,
        protocol_features_acked: 0x0209,
        rings: [RingSample {
            size: 128,
            enabled: true,
            started: true,
            available: 100,
        }; 3],
        memory_regions: 2,
        memory_bytes: 1 << 30,
        memory_map_changes: MemoryMapChanges {
            set_table: 1,
            add: 1,
            remove: 1,
        },
        dirty_log_active: false,
        access_platform_mode: "translate",
        backend_requests: 7,
        findings: vec!["driver-not-ready", "of another version"],
    });
    registry
}

/// One rule of each kind.
fn rules(guest: &GuestMetrics) -> Vec<Arc<RuleMetrics>> {
    let mut rules = guest.rules(Direction::GuestToHost, &["db".to_owned()]);
    rules.extend(guest.rules(Direction::HostToGuest, &["ssh".to_owned()]));
    rules
}
