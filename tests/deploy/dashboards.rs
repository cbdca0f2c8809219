//! Grafana's dashboards: complete as JSON, and every expression is one that Prometheus evaluates over what a sidecar exports.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::expressions::{TARGET_LABELS, parse};
use crate::live::{Busy, Prometheus, page};
use crate::support::until;
use crate::tools::{IMAGE_TOOLS, files, list, root, run, success, text};

fn dashboards() -> Vec<(String, Value)> {
    let found = files("charts/vsock-sidecar/dashboards", ".json");
    assert!(!found.is_empty());
    found
        .into_iter()
        .map(|path| {
            let dashboard = serde_json::from_str(&text(&path)).unwrap_or_else(|e| panic!("{path}: {e}"));
            (path, dashboard)
        })
        .collect()
}

/// Panels with something in them.
fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    list(&dashboard["panels"])
        .iter()
        .filter(|panel| panel["type"] != "row")
}

/// Every expression with its panel's title, annotations included. The interval of rates is Grafana's to choose.
fn expressions(dashboard: &Value) -> Vec<(String, String)> {
    let of_panels = panels(dashboard).flat_map(|panel| {
        let title = panel["title"].as_str().unwrap();
        list(&panel["targets"])
            .iter()
            .map(move |target| (title.to_owned(), target["expr"].as_str().unwrap().to_owned()))
    });
    let annotations = list(&dashboard["annotations"]["list"]).iter();
    let annotations = annotations.map(|annotation| {
        (
            "annotation".to_owned(),
            annotation["expr"].as_str().unwrap().to_owned(),
        )
    });
    let all = of_panels.chain(annotations);
    all.map(|(title, expression)| (title, expression.replace("$__rate_interval", "5s")))
        .collect()
}

/// As Grafana sends it with "All" chosen everywhere.
fn filled_in(expression: &str) -> String {
    expression
        .replace("$namespace", ".*")
        .replace("$pod", ".*")
        .replace("$guest", ".*")
}

#[test]
fn every_panel_has_a_title_a_unit_and_a_sentence() {
    for (path, dashboard) in dashboards() {
        assert!(
            dashboard["uid"].is_string() && dashboard["title"].is_string(),
            "{path}"
        );
        assert!(panels(&dashboard).count() > 20, "{path}");
        let mut ids = BTreeSet::new();
        let mut places = BTreeSet::new();
        for panel in list(&dashboard["panels"]) {
            let title = panel["title"].as_str().unwrap();
            assert!(!title.is_empty(), "{path}: {panel:#}");
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{path}: {title}: id");
            let grid = |key: &str| panel["gridPos"][key].as_u64().unwrap();
            assert!(grid("x") + grid("w") <= 24, "{path}: {title} is too wide");
            for x in grid("x")..grid("x") + grid("w") {
                for y in grid("y")..grid("y") + grid("h") {
                    assert!(places.insert((x, y)), "{path}: {title} lies on another panel");
                }
            }
            if panel["type"] == "row" {
                continue;
            }
            assert!(
                panel["fieldConfig"]["defaults"]["unit"].is_string(),
                "{path}: {title}: unit"
            );
            assert!(
                panel["description"]
                    .as_str()
                    .is_some_and(|words| words.len() > 10),
                "{path}: {title}: description"
            );
            for target in list(&panel["targets"]) {
                assert_eq!(target["datasource"]["uid"], "${datasource}", "{path}: {title}");
            }
        }
    }
}

#[test]
fn the_rows_are_those_that_are_promised() {
    let (_, dashboard) = &dashboards()[0];
    let rows: Vec<&str> = list(&dashboard["panels"])
        .iter()
        .filter(|panel| panel["type"] == "row")
        .filter_map(|panel| panel["title"].as_str())
        .collect();
    let expected = [
        "Overview",
        "Negotiation",
        "Findings",
        "Throughput",
        "Connections",
        "Refusals and misbehaviour",
        "Latency",
        "Stalls",
        "Guest memory and translation",
        "Resources",
        "Configuration",
    ];
    assert_eq!(rows, expected);
}

/// A host has no namespace and no pod: `.*` matches a label that is not there, `.+` and a list of names do not.
#[test]
fn variables_let_through_what_has_no_namespace_and_no_pod() {
    for (path, dashboard) in dashboards() {
        let variables = list(&dashboard["templating"]["list"]);
        let names: Vec<&str> = variables.iter().filter_map(|v| v["name"].as_str()).collect();
        assert_eq!(names, ["datasource", "namespace", "pod", "guest"], "{path}");
        for variable in &variables[1..] {
            assert_eq!(variable["includeAll"], true);
            assert_eq!(variable["allValue"], ".*");
            assert_eq!(variable["current"]["value"], json!(["$__all"]));
        }
        for (title, expression) in expressions(&dashboard) {
            for selector in parse(&expression).0 {
                let matched = |name: &str| {
                    let place = selector.matchers.iter().find(|(label, _, _)| label == name);
                    place.map(|(_, operator, value)| (operator.as_str(), value.as_str()))
                };
                assert_eq!(matched("namespace"), Some(("=~", "$namespace")), "{title}");
                assert_eq!(matched("pod"), Some(("=~", "$pod")), "{title}");
            }
        }
    }
}

#[test]
fn dashboards_select_nothing_but_what_a_sidecar_exports() {
    for (path, dashboard) in dashboards() {
        for (title, expression) in expressions(&dashboard) {
            let (selectors, labels) = parse(&expression);
            assert!(!selectors.is_empty(), "{path}: {title}");
            for selector in &selectors {
                assert_eq!(page().complaint(selector), None, "{path}: {title}");
            }
            for label in labels {
                assert!(
                    page().labels().contains(label.as_str()) || TARGET_LABELS.contains(&label.as_str()),
                    "{path}: {title}: {label}"
                );
            }
        }
        for panel in panels(&dashboard) {
            for target in list(&panel["targets"]) {
                for place in target["legendFormat"].as_str().unwrap().split("{{").skip(1) {
                    let label = place.split("}}").next().unwrap();
                    assert!(
                        page().labels().contains(label) || TARGET_LABELS.contains(&label),
                        "{path}: {}: {label}",
                        panel["title"]
                    );
                }
            }
        }
    }
}

/// A family that nobody looks at is a family that nobody would miss: it is in the dashboards, in the alerts, or named here.
#[test]
fn dashboards_leave_out_little_of_what_is_exported() {
    let unseen = [
        // Constant but for the rare live migration.
        "vsock_dirty_log_active",
        "vsock_memory_map_changes_total",
        "vsock_memory_regions",
        // Rings: the size is for /state, and what runs is in the session's state.
        "vsock_vring_enabled",
        "vsock_vring_size",
        "vsock_vring_full_total",
        // Details of translation.
        "vsock_backend_requests_total",
        "vsock_iotlb_enabled",
        "vsock_iotlb_entries",
        "vsock_iotlb_flushes_total",
        "vsock_iotlb_invalidations_total",
        "vsock_iotlb_mapped_bytes",
        "vsock_iotlb_updates_total",
        // Off by default, and for whoever tunes it: docs/performance.md.
        "vsock_busy_polls_total",
        "vsock_busy_poll_seconds_total",
        "vsock_rules",
        "process_max_fds",
        "process_start_time_seconds",
        "process_threads",
        "process_virtual_memory_bytes",
    ];
    let mut seen = BTreeSet::new();
    for (_, dashboard) in dashboards() {
        seen.extend(
            expressions(&dashboard)
                .iter()
                .flat_map(|(_, expression)| parse(expression).0)
                .map(|selector| selector.metric),
        );
    }
    seen.extend(
        text("charts/vsock-sidecar/rules/vsock-sidecar.yaml")
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .map(str::to_owned),
    );
    let documented = text("docs/metrics.md");
    let families = documented
        .lines()
        .filter(|line| line.starts_with("| `vsock_") || line.starts_with("| `process_"))
        .map(|line| line.split('`').nth(1).unwrap());
    for family in families {
        let in_use = seen.contains(family) || seen.contains(&format!("{family}_bucket"));
        assert!(
            in_use || unseen.contains(&family),
            "{family} is on no dashboard and in no alert"
        );
    }
}

/// Expressions as recording rules: promtool parses them, a real server evaluates them over a real scrape, without namespace and pod.
#[test]
fn prometheus_evaluates_every_expression_over_a_real_scrape() {
    let directory = tempfile::tempdir().unwrap();
    let expressions: Vec<(String, String)> = dashboards()
        .iter()
        .flat_map(|(_, dashboard)| expressions(dashboard))
        .map(|(title, expression)| (title, filled_in(&expression)))
        .collect();
    let rules: Vec<Value> = expressions
        .iter()
        .enumerate()
        .map(|(n, (_, expression))| json!({"record": format!("dashboard:{n}"), "expr": expression}))
        .collect();
    let file = directory.path().join("dashboards.yaml");
    let groups = json!({"groups": [{"name": "dashboards", "rules": rules}]});
    fs::write(&file, groups.to_string()).unwrap();
    success(run(
        Command::new("promtool").args(["check", "rules"]).arg(&file),
        IMAGE_TOOLS,
    ));

    let busy = Busy::start();
    let alerts = root().join("charts/vsock-sidecar/rules/vsock-sidecar.yaml");
    let prometheus = Prometheus::start(directory.path(), busy.port, &alerts);
    until("three scrapes are stored", || {
        let stored = prometheus.query("count_over_time(vsock_build_info[1m]) >= 3");
        !stored.is_empty()
    });
    for (title, expression) in &expressions {
        let result = prometheus.query(expression);
        // A comparison may leave nothing over.
        let may_be_empty = expression.contains(" > ") || expression.contains("== 1");
        assert!(
            may_be_empty || !result.is_empty(),
            "{title}: nothing comes of {expression}"
        );
    }
    // The rules are evaluated, too, and a sidecar that works alerts about nothing.
    let rules = prometheus.get("/api/v1/rules").unwrap();
    for group in list(&rules["data"]["groups"]) {
        for rule in list(&group["rules"]) {
            assert_eq!(rule["lastError"], Value::Null, "{rule:#}");
        }
    }
    assert_eq!(prometheus.query("ALERTS"), Vec::<Value>::new());
}
