//! Alert rules: what promtool makes of them and of their unit tests, what they select, and what the runbooks say of them.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

use crate::expressions::{TARGET_LABELS, parse};
use crate::live::page;
use crate::tools::{IMAGE_TOOLS, document, files, list, root, run, success, text};

const RULES: &str = "charts/vsock-sidecar/rules/vsock-sidecar.yaml";

/// Every alert of the file by its name.
fn alerts() -> BTreeMap<String, Value> {
    let file = document(RULES);
    let groups = list(&file["groups"]).iter();
    let rules = groups.flat_map(|group| list(&group["rules"]).to_vec());
    rules
        .map(|rule| (rule["alert"].as_str().expect("an alert").to_owned(), rule))
        .collect()
}

#[test]
fn promtool_accepts_the_rules_and_their_unit_tests_hold() {
    success(run(
        Command::new("promtool").args(["check", "rules", RULES]),
        IMAGE_TOOLS,
    ));
    let tests = files("tests/deploy/alerts", ".yaml");
    assert_eq!(tests.len(), 2);
    success(run(
        Command::new("promtool").args(["test", "rules"]).args(tests),
        IMAGE_TOOLS,
    ));
}

#[test]
fn every_alert_is_seen_to_fire() {
    let tests = document("tests/deploy/alerts/fires.yaml");
    let fired: BTreeSet<String> = list(&tests["tests"])
        .iter()
        .flat_map(|test| list(&test["promql_expr_test"]))
        .flat_map(|expected| list(&expected["exp_samples"]))
        .map(|sample| {
            let (_, labels) = sample["labels"]
                .as_str()
                .unwrap()
                .split_once("alertname=\"")
                .unwrap();
            labels.split('"').next().unwrap().to_owned()
        })
        .collect();
    assert_eq!(fired, alerts().into_keys().collect());
}

#[test]
fn rules_select_nothing_but_what_a_sidecar_exports() {
    for (name, alert) in alerts() {
        let (selectors, labels) = parse(alert["expr"].as_str().unwrap());
        assert!(!selectors.is_empty(), "{name}");
        for selector in selectors {
            assert_eq!(page().complaint(&selector), None, "{name}");
        }
        // What is matched or dropped by name must not be a label that only one way of scraping has.
        for label in labels {
            assert!(
                page().labels().contains(label.as_str()) || ["job", "instance"].contains(&label.as_str()),
                "{name}: {label}"
            );
        }
    }
}

#[test]
fn every_alert_says_what_happened_and_where_to_read_on() {
    let runbook = text("docs/alerts.md");
    let sections: Vec<&str> = runbook
        .lines()
        .filter_map(|line| line.strip_prefix("## Vsock"))
        .collect();
    let sections: Vec<String> = sections.iter().map(|name| format!("Vsock{name}")).collect();
    let names: Vec<String> = sections.clone();
    let mut known: Vec<String> = alerts().into_keys().collect();
    let mut documented = names;
    known.sort();
    documented.sort();
    assert_eq!(documented, known, "docs/alerts.md has a section for each alert");

    for (name, alert) in alerts() {
        let severity = alert["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning", "info"].contains(&severity), "{name}");
        let section = runbook.split(&format!("## {name}\n")).nth(1).unwrap();
        let section = section.split("\n## ").next().unwrap();
        assert!(
            section.contains(&format!("Severity: {severity}.")),
            "{name}: docs/alerts.md says another severity"
        );
        for part in ["**Means.**", "**Look.**", "**Do.**"] {
            assert!(
                section.contains(part),
                "{name}: {part} is missing in docs/alerts.md"
            );
        }
        let annotations = &alert["annotations"];
        assert_eq!(
            annotations["runbook_url"],
            format!("docs/alerts.md#{}", name.to_lowercase())
        );
        for key in ["summary", "description"] {
            let words = annotations[key].as_str().unwrap();
            assert!(words.len() > 20, "{name}: {key}");
            for place in words.split("$labels.").skip(1) {
                let label: String = place
                    .chars()
                    .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                    .collect();
                assert!(
                    page().labels().contains(label.as_str()) || TARGET_LABELS.contains(&label.as_str()),
                    "{name}: {label} is no label"
                );
            }
        }
    }
}

/// A finding alerts by the worst that docs/findings.md says of it, unless it is only worth knowing.
#[test]
fn findings_alert_by_their_severity() {
    let alerts = alerts();
    let codes = |alert: &str| -> BTreeSet<String> {
        let (selectors, _) = parse(alerts[alert]["expr"].as_str().unwrap());
        selectors[0].matchers[0].2.split('|').map(str::to_owned).collect()
    };
    let mut documented: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let findings = text("docs/findings.md");
    for section in findings.split("\n## `").skip(1) {
        let (code, rest) = section.split_once('`').unwrap();
        let severity = rest
            .split("Severity: `")
            .nth(1)
            .unwrap()
            .split('`')
            .next()
            .unwrap();
        let severity = ["error", "warning", "info"]
            .into_iter()
            .find(|known| *known == severity)
            .unwrap();
        documented.entry(severity).or_default().insert(code.to_owned());
    }
    assert_eq!(codes("VsockFindingError"), documented["error"]);
    assert_eq!(codes("VsockFindingWarning"), documented["warning"]);
}

#[test]
fn the_link_in_deploy_leads_to_the_chart_s_rules() {
    for (link, file) in [
        ("deploy/alerts/vsock-sidecar.yaml", RULES),
        (
            "deploy/dashboards/vsock-sidecar.json",
            "charts/vsock-sidecar/dashboards/vsock-sidecar.json",
        ),
    ] {
        let led = root().join(link).canonicalize().unwrap();
        assert_eq!(led, root().join(file).canonicalize().unwrap());
    }
}
