//! The exported families as a whole: clean for Prometheus' linter, initialised, documented, and few.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use crate::missing;
use crate::page::{self, LABELS, populated};

/// Name to (type, label names).
type Families = BTreeMap<String, (String, BTreeSet<String>)>;

/// The families of a page in text format.
fn exported(text: &str) -> Families {
    let mut families = Families::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        families.insert(name.to_owned(), (kind.to_owned(), BTreeSet::new()));
    }
    for (name, labels, _) in samples(text) {
        let family = match families.contains_key(&name) {
            true => name.clone(),
            false => ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end))
                .unwrap()
                .to_owned(),
        };
        let (_, known) = families
            .get_mut(&family)
            .unwrap_or_else(|| panic!("{name} has no TYPE"));
        known.extend(labels.into_keys().filter(|label| label != "le"));
    }
    families
}

/// Name, labels and value of each line. Values here hold no commas and quotes.
fn samples(text: &str) -> impl Iterator<Item = (String, BTreeMap<String, String>, f64)> {
    text.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let labels = labels
            .trim_end_matches('}')
            .split(',')
            .filter(|label| !label.is_empty());
        let labels = labels.map(|label| {
            let (name, value) = label.split_once('=').unwrap();
            (name.to_owned(), value.trim_matches('"').to_owned())
        });
        (name.to_owned(), labels.collect(), value.parse().unwrap())
    })
}

fn documentation() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
    std::fs::read_to_string(path).unwrap()
}

/// The rows of the tables whose first cell is a family.
fn documented(text: &str) -> Families {
    let mut families = Families::new();
    for line in text
        .lines()
        .filter(|line| line.starts_with("| `vsock_") || line.starts_with("| `process_"))
    {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, meaning] = cells[..] else {
            panic!("four cells expected: {line}")
        };
        assert!(meaning.len() > 3, "{name} has no meaning");
        let labels = labels
            .split(',')
            .map(|label| label.trim().trim_matches('`').to_owned());
        let labels = labels.filter(|label| !label.is_empty()).collect();
        let before = families.insert(name.trim_matches('`').to_owned(), (kind.to_owned(), labels));
        assert!(before.is_none(), "{name} is documented twice");
    }
    families
}

#[test]
fn every_family_is_documented_as_it_is_exported_and_no_other() {
    let exported = exported(&populated().encode().unwrap());
    let documented = documented(&documentation());
    for (name, (kind, labels)) in &exported {
        let (doc_kind, doc_labels) = documented
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not documented"));
        assert_eq!((kind, labels), (doc_kind, doc_labels), "{name}");
    }
    for name in documented.keys() {
        assert!(
            exported.contains_key(name),
            "{name} is documented and not exported"
        );
    }
    assert!(exported.len() > 50, "only {} families", exported.len());
}

/// Values of closed lists are part of the interface: alerts select by them.
#[test]
fn every_label_value_of_a_closed_list_is_documented() {
    let text = documentation();
    let by_configuration = [
        "guest",
        "rule",
        "guest_cid",
        "vmm_hint",
        "socket",
        "sha256",
        "version",
        "revision",
        "rustc",
        "target",
        "le",
    ];
    for (name, labels, _) in samples(&populated().encode().unwrap()) {
        for (label, value) in labels {
            if by_configuration.contains(&label.as_str()) {
                continue;
            }
            assert!(
                text.contains(&format!("`{value}`")),
                "{name}{{{label}={value:?}}} is not documented"
            );
        }
    }
}

#[test]
fn every_known_label_value_is_there_before_anything_happens() {
    let registry = page::fresh();
    let text = registry.encode().unwrap();
    let mut values: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for (name, labels, value) in samples(&text) {
        let happened = name.starts_with("vsock_") && (name.ends_with("_total") || name.ends_with("_count"));
        assert!(!happened || value == 0.0, "{name} begins at {value}");
        for (label, label_value) in labels {
            values
                .entry((name.clone(), label))
                .or_default()
                .insert(label_value);
        }
    }
    let count = |family: &str, label: &str| {
        values
            .get(&(family.to_owned(), label.to_owned()))
            .map_or(0, BTreeSet::len)
    };
    assert_eq!(count("vsock_packets_total", "op"), 8);
    assert_eq!(count("vsock_packets_total", "socket_type"), 3);
    assert_eq!(
        count("vsock_connections_refused_total", "reason"),
        LABELS.refused.len()
    );
    assert_eq!(
        count("vsock_connections_closed_total", "reason"),
        LABELS.closed.len()
    );
    assert_eq!(count("vsock_misbehavior_total", "kind"), LABELS.misbehavior.len());
    assert_eq!(count("vsock_vring_errors_total", "queue"), 3);
    assert_eq!(count("vsock_iotlb_faults_total", "access"), 2);
    assert_eq!(count("vsock_virtio_feature_acked", "feature"), 17);
    assert_eq!(count("vsock_protocol_feature_offered", "feature"), 19);
    assert_eq!(count("vsock_session_state", "state"), 6);
    assert_eq!(count("vsock_access_platform_mode", "mode"), 4);
    assert_eq!(count("vsock_finding", "code"), 14);
    assert_eq!(count("vsock_log_messages_total", "level"), 2);
    assert_eq!(count("vsock_tcp_dial_duration_seconds_bucket", "le"), 15);
}

/// A guest and a rule cost a fixed number of series. These are budgets: when a new family breaks one, it is the
/// moment to ask whether it earns its series.
#[test]
fn the_number_of_series_is_within_its_budget() {
    let count = |guests: usize, rules: usize| samples(&page::with(guests, rules).encode().unwrap()).count();
    let (empty, guest) = (count(0, 0), count(1, 0));
    assert!(empty <= 15, "{empty} series without a guest");
    // A third of them are feature bits, at two layers; the findings are 14.
    assert!(guest - empty <= 380, "{} series for a guest", guest - empty);
    let (ten, twenty) = (count(1, 10), count(1, 20));
    assert!(
        (twenty - ten) / 10 <= 46,
        "{} series for an outbound rule",
        (twenty - ten) / 10
    );
    assert_eq!(count(1, 70), count(1, 7000), "rules past the cap cost nothing");
}

/// `curl /metrics | promtool check metrics`
#[test]
fn promtool_has_no_complaint() {
    let mut promtool = match Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    {
        Ok(child) => child,
        Err(error) => return missing("promtool", "prometheus", &error),
    };
    let text = populated().encode().unwrap();
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr]
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .concat();
    assert!(
        output.status.success() && said.trim().is_empty(),
        "{}: {said}",
        output.status
    );
}
