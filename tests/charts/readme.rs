//! The README's reference of the values, made of values.yaml.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use serde_json::Value;

use super::schema::{schema, values};
use super::tools::{chart, hold};

const BEGIN: &str = "<!-- begin: made of values.yaml by tests/charts/readme.rs -->\n";
const END: &str = "<!-- end -->\n";

#[test]
fn the_readme_has_every_value_with_its_comment_and_default() {
    let path = chart().join("README.md");
    let text = fs::read_to_string(&path).expect("README.md");
    let (before, rest) = text
        .split_once(BEGIN)
        .expect("the mark where the reference begins");
    let (_, after) = rest.split_once(END).expect("the mark where it ends");
    hold(&path, &format!("{before}{BEGIN}{}{END}{after}", reference()));
}

fn reference() -> String {
    let (comments, values, schema) = (comments(), values(), schema());
    let mut text = String::from("\n### General\n\n");
    text.push_str(HEAD);
    let top = values.as_object().expect("a mapping");
    let is_section = |key: &str| schema["properties"][key]["properties"].is_object() || key == "config";
    for (key, value) in top.iter().filter(|(key, _)| !is_section(key)) {
        row(&mut text, key, &schema["properties"][key], value, &comments);
    }
    for (key, value) in top.iter().filter(|(key, _)| is_section(key)) {
        let comment = comments
            .get(key.as_str())
            .unwrap_or_else(|| panic!("values.yaml: {key} has no comment"));
        let _ = write!(text, "\n### `{key}`\n\n{comment}\n\n");
        if key == "config" {
            let _ = write!(text, "```yaml\n{}```\n", config_text());
            continue;
        }
        text.push_str(HEAD);
        rows(&mut text, key, &schema["properties"][key], value, &comments);
    }
    text.push('\n');
    text
}

const HEAD: &str = "| Key | Type | Default | Meaning |\n|---|---|---|---|\n";

fn rows(text: &mut String, path: &str, schema: &Value, value: &Value, comments: &BTreeMap<String, String>) {
    for (key, value) in value.as_object().into_iter().flatten() {
        let path = format!("{path}.{key}");
        let schema = &schema["properties"][key];
        row(text, &path, schema, value, comments);
        if schema["properties"].is_object() && value.as_object().is_some_and(|value| !value.is_empty()) {
            rows(text, &path, schema, value, comments);
        }
    }
}

fn row(text: &mut String, path: &str, schema: &Value, value: &Value, comments: &BTreeMap<String, String>) {
    let comment = comments
        .get(path)
        .unwrap_or_else(|| panic!("values.yaml: {path} has no comment that begins with `# --`"));
    let section =
        schema["properties"].is_object() && value.as_object().is_some_and(|value| !value.is_empty());
    let (kind, default) = match section {
        true => (String::new(), String::new()),
        false => (kind(schema, value), format!("`{value}`")),
    };
    let comment = comment.replace('|', "\\|");
    let _ = writeln!(
        text,
        "| `{path}` | {kind} | {} | {comment} |",
        default.replace('|', "\\|")
    );
}

fn kind(schema: &Value, value: &Value) -> String {
    if let Some(choices) = schema["enum"].as_array() {
        let choices: Vec<String> = choices
            .iter()
            .filter_map(Value::as_str)
            .filter(|choice| !choice.is_empty())
            .map(|choice| format!("`{choice}`"))
            .collect();
        return choices.join(" or ");
    }
    match value {
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "text",
        Value::Array(_) => "list",
        Value::Object(_) => "mapping",
        Value::Null => "nothing",
    }
    .to_owned()
}

/// The lines of values.yaml below `config:`.
fn config_text() -> String {
    let text = fs::read_to_string(chart().join("values.yaml")).expect("values.yaml");
    let below = text.lines().skip_while(|line| *line != "config:");
    let mut block = String::new();
    for (index, line) in below.enumerate() {
        if index > 0 && !line.starts_with(' ') {
            break;
        }
        block.push_str(line);
        block.push('\n');
    }
    block
}

/// By the dotted path of the key: the comment above it that begins with `# --`, on one line.
fn comments() -> BTreeMap<String, String> {
    let text = fs::read_to_string(chart().join("values.yaml")).expect("values.yaml");
    let mut comments = BTreeMap::new();
    let mut path: Vec<&str> = Vec::new();
    let mut comment = String::new();
    for line in text.lines() {
        let content = line.trim_start();
        let depth = (line.len() - content.len()) / 2;
        if let Some(first) = content.strip_prefix("# -- ") {
            comment = first.to_owned();
        } else if let Some(more) = content.strip_prefix("# ") {
            if !comment.is_empty() {
                comment.push(' ');
                comment.push_str(more);
            }
        } else if let Some((key, _)) = content
            .split_once(':')
            .filter(|(key, _)| !key.contains([' ', '"']))
        {
            path.truncate(depth);
            path.push(key);
            if !comment.is_empty() {
                comments.insert(path.join("."), std::mem::take(&mut comment));
            }
        } else {
            comment.clear();
        }
    }
    comments
}
