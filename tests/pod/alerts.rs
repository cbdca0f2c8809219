//! Which of the chart's alerts fire on what a sidecar exports.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::tools::{IMAGE_TOOLS, root, run, success};

/// Holds the chart's rules against pages of metrics, as if each had been scraped for three minutes, one after the other: promtool says
/// whether exactly these alerts fire at the end.
#[track_caller]
pub fn fire(pages: &[&str], alerts: &[(&str, &str)]) {
    const MINUTES: usize = 3;
    let samples = |page: &str| -> Vec<(String, f64)> {
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        let sample = |line: &str| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (series.to_owned(), value.parse().unwrap())
        };
        lines.map(sample).collect()
    };
    let pages: Vec<Vec<(String, f64)>> = pages.iter().map(|page| samples(page)).collect();
    let names: BTreeSet<&String> = pages.iter().flatten().map(|(series, _)| series).collect();
    let series = |name: &&String| {
        let value = |page: &Vec<(String, f64)>| {
            let found = page.iter().find(|(series, _)| series == *name);
            match found {
                Some((_, value)) => vec![value.to_string(); MINUTES],
                None => vec!["_".to_owned(); MINUTES],
            }
        };
        let values: Vec<String> = pages.iter().flat_map(value).collect();
        json!({"series": name, "values": values.join(" ")})
    };
    let samples: Vec<Value> = alerts
        .iter()
        .map(|(name, severity)| {
            let labels =
                format!("ALERTS{{alertname=\"{name}\",alertstate=\"firing\",severity=\"{severity}\"}}");
            json!({"labels": labels, "value": 1})
        })
        .collect();
    let test = json!({
        "rule_files": [root().join("charts/vsock-sidecar/rules/vsock-sidecar.yaml")],
        "evaluation_interval": "1m",
        "tests": [{
            "interval": "1m",
            "input_series": names.iter().map(series).collect::<Vec<_>>(),
            "promql_expr_test": [{
                "expr": "ALERTS{alertstate=\"firing\"}",
                "eval_time": format!("{}m", pages.len() * MINUTES - 1),
                "exp_samples": samples,
            }],
        }],
    });
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("test.yaml");
    // JSON is YAML.
    fs::write(&file, test.to_string()).unwrap();
    success(run(
        Command::new("promtool").args(["test", "rules"]).arg(&file),
        IMAGE_TOOLS,
    ));
}
