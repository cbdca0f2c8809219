//! As much of PromQL as says which metrics and labels an expression uses. Whether it is PromQL is promtool's to say.

use std::collections::{BTreeMap, BTreeSet};

/// Words that are no metric where they stand.
const WORDS: [&str; 9] = [
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "group_left",
    "group_right",
    "inf",
    "nan",
];
/// Words in front of a list of labels.
const LABEL_LISTS: [&str; 4] = ["by", "without", "on", "ignoring"];

/// A metric with what is asked of its labels.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Selector {
    pub metric: String,
    /// Label, operator, value.
    pub matchers: Vec<(String, String, String)>,
}

/// Every selector of an expression, and every label that it groups or matches by.
pub fn parse(expression: &str) -> (Vec<Selector>, BTreeSet<String>) {
    let mut selectors: Vec<Selector> = Vec::new();
    let mut labels = BTreeSet::new();
    let mut rest = expression;
    while let Some(first) = rest.chars().next() {
        if first == '{' {
            let (matchers, after) = matchers(&rest[1..]);
            selectors
                .last_mut()
                .expect("braces follow a metric")
                .matchers
                .extend(matchers);
            rest = after;
        } else if first.is_ascii_alphabetic() || first == '_' {
            let end = rest
                .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
                .unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            rest = after;
            let behind = after.trim_start();
            let opens = behind.strip_prefix('(');
            // `sum by (guest) (...)`.
            let aggregates = ["by ", "by(", "without ", "without("]
                .iter()
                .any(|clause| behind.starts_with(clause));
            if LABEL_LISTS.contains(&word) {
                let (list, after) = opens.unwrap().split_once(')').unwrap();
                labels.extend(list.split(',').map(|label| label.trim().to_owned()));
                rest = after;
            } else if opens.is_none() && !aggregates && !WORDS.contains(&word) {
                selectors.push(Selector {
                    metric: word.to_owned(),
                    matchers: Vec::new(),
                });
            }
        } else if first.is_ascii_digit() {
            // With its unit, if it has one.
            rest = rest.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '.');
        } else {
            rest = &rest[first.len_utf8()..];
        }
    }
    (selectors, labels)
}

/// `label="value",...}` and what is behind it. Values here hold no quotes.
fn matchers(text: &str) -> (Vec<(String, String, String)>, &str) {
    let mut found = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(after) = rest.strip_prefix('}') {
            return (found, after);
        }
        let end = rest.find(['=', '!']).expect("a matcher");
        let (label, after) = rest.split_at(end);
        let (operator, after) = after.split_once('"').expect("a value");
        let (value, after) = after.split_once('"').expect("the end of a value");
        found.push((label.to_owned(), operator.to_owned(), value.to_owned()));
        rest = after;
    }
}

/// What a page of metrics has: names of series, and for each label the values.
pub struct Page(BTreeMap<String, BTreeMap<String, BTreeSet<String>>>);

impl Page {
    pub fn read(text: &str) -> Page {
        let mut series: BTreeMap<String, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let end = line.find(['{', ' ']).unwrap();
            let labels = series.entry(line[..end].to_owned()).or_default();
            if line[end..].starts_with('{') {
                for (label, _, value) in matchers(&line[end + 1..]).0 {
                    labels.entry(label).or_default().insert(value);
                }
            }
        }
        Page(series)
    }

    /// What is wrong with a selector, if anything. Labels that come from the target are never wrong, and values only of labels
    /// with a closed list.
    pub fn complaint(&self, selector: &Selector) -> Option<String> {
        let Selector { metric, matchers } = selector;
        let Some(labels) = self.0.get(metric) else {
            return Some(format!("{metric} is not exported"));
        };
        for (label, operator, value) in matchers {
            if TARGET_LABELS.contains(&label.as_str()) {
                continue;
            }
            let Some(known) = labels.get(label) else {
                return Some(format!("{metric} has no label {label}"));
            };
            if value.contains('$') || ["guest", "rule"].contains(&label.as_str()) {
                continue;
            }
            for value in value.split('|') {
                if !known.contains(value) {
                    return Some(format!("{metric}: no series with {label}{operator}{value:?}"));
                }
            }
        }
        None
    }

    /// Every label of any series.
    pub fn labels(&self) -> BTreeSet<&str> {
        self.0
            .values()
            .flat_map(BTreeMap::keys)
            .map(String::as_str)
            .collect()
    }
}

/// Labels that Prometheus gives what it scrapes.
pub const TARGET_LABELS: [&str; 4] = ["instance", "job", "namespace", "pod"];

#[test]
fn an_expression_is_taken_apart() {
    let text = r#"sum by (guest, le) (rate(a_total{x="1|2",y=~"$z"}[5m])) / on (job) group_left b offset 5m > 0.5 or c{} == 1"#;
    let (selectors, labels) = parse(text);
    let names: Vec<&str> = selectors.iter().map(|s| s.metric.as_str()).collect();
    assert_eq!(names, ["a_total", "b", "c"]);
    assert_eq!(
        selectors[0].matchers,
        [
            ("x".into(), "=".into(), "1|2".into()),
            ("y".into(), "=~".into(), "$z".into())
        ]
    );
    assert_eq!(labels, BTreeSet::from(["guest", "le", "job"].map(str::to_owned)));
}

#[test]
fn a_page_knows_what_it_has() {
    let page = Page::read("# TYPE a counter\na{x=\"1\",guest=\"web\"} 3\nb 4\n");
    let complaint = |expression: &str| page.complaint(&parse(expression).0[0]);
    assert_eq!(complaint("b"), None);
    assert_eq!(complaint(r#"a{x="1",guest="$guest",pod="any"}"#), None);
    assert_eq!(complaint("c").unwrap(), "c is not exported");
    assert_eq!(complaint(r#"a{y="1"}"#).unwrap(), "a has no label y");
    assert!(complaint(r#"a{x=~"1|2"}"#).unwrap().contains("\"2\""));
}
