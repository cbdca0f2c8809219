//! `vsock-sidecar inject`: manifests in, manifests with the sidecar out, for people without the webhook.
//!
//! YAML is read as kubectl reads it (YAML 1.1: `0644` is octal), and written so that both versions of YAML agree on it: every
//! string that is not plainly a word is quoted.

use serde_json::Value;
use serde_saphyr::{DuplicateKeyPolicy, Options};

use super::inject::{Outcome, inject};
use super::refusal::Refusal;
use super::settings::Settings;
use crate::terminal::escaped;

/// Why manifests cannot be injected. One line each.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// No YAML.
    #[error("{0}")]
    NotYaml(String),
    /// A pod that asks for the sidecar cannot have it.
    #[error("{of}: {refusal}")]
    Refused {
        /// Kind and name of the manifest.
        of: String,
        /// Why.
        refusal: Refusal,
    },
    /// Not one pod asks for it.
    #[error(
        "no pod here asks for the sidecar: set the label vsock-sidecar.io/inject: \"true\" on the pod, or on the pod template of a \
         Deployment or the like"
    )]
    NothingToDo,
}

/// Manifests with the sidecar.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifests {
    /// As YAML, a document for each.
    pub yaml: String,
    /// What the user should know, a line each.
    pub notes: Vec<String>,
}

/// Puts the sidecar into the pods of `yaml` that ask for it: pods, pod templates of workloads, and lists of these. Others stay as
/// they are, but for comments, which are lost.
///
/// # Errors
/// If a pod is refused, or none asks.
pub fn inject_manifests(yaml: &str, settings: &Settings) -> Result<Manifests, ManifestError> {
    let options = serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::Error,
        legacy_octal_numbers: true,
        with_snippet: false,
    };
    let mut documents = read(yaml, options)?;
    let mut work = Work {
        settings,
        notes: Vec::new(),
        found: false,
    };
    for document in &mut documents {
        work.manifest(document)?;
    }
    if !work.found {
        return Err(ManifestError::NothingToDo);
    }
    let mut yaml = String::new();
    for (index, document) in documents.iter().enumerate() {
        if index > 0 {
            yaml.push_str("---\n");
        }
        write(&mut yaml, document, 0, false);
    }
    Ok(Manifests {
        yaml,
        notes: work.notes,
    })
}

fn read(yaml: &str, options: Options) -> Result<Vec<Value>, ManifestError> {
    serde_saphyr::from_multiple_with_options(yaml, options)
        .map_err(|error| ManifestError::NotYaml(error.to_string()))
}

struct Work<'a> {
    settings: &'a Settings,
    notes: Vec<String>,
    /// Whether a pod has the sidecar.
    found: bool,
}

impl Work<'_> {
    fn manifest(&mut self, manifest: &mut Value) -> Result<(), ManifestError> {
        let text = |pointer: &str| {
            manifest
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let of = escaped(&format!("{} {}", text("/kind"), text("/metadata/name")));
        let way = match text("/kind") {
            "Pod" => "",
            "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "ReplicationController" | "Job" => {
                "/spec/template"
            }
            "CronJob" => "/spec/jobTemplate/spec/template",
            kind if kind == "List" || kind == "PodList" => {
                let items = manifest.get_mut("items").and_then(Value::as_array_mut);
                return items
                    .into_iter()
                    .flatten()
                    .try_for_each(|item| self.manifest(item));
            }
            _ => return Ok(()),
        };
        let Some(pod) = manifest.pointer_mut(way) else {
            return Ok(());
        };
        match inject(pod, self.settings) {
            Ok(Outcome::Injected { patched, warnings }) => {
                *pod = patched.document().clone();
                self.found = true;
                self.notes
                    .extend(warnings.into_iter().map(|warning| format!("{of}: {warning}")));
            }
            Ok(Outcome::Unchanged) => {
                self.found = true;
                self.notes.push(format!("{of} has the sidecar already"));
            }
            Ok(Outcome::NotSelected { warning }) => {
                self.notes
                    .extend(warning.map(|warning| format!("{of}: {warning}")));
            }
            Err(refusal) => return Err(ManifestError::Refused { of, refusal }),
        }
        Ok(())
    }
}

/// Writes a value in block style. `inline`: the first line goes on where the text ends.
fn write(yaml: &mut String, value: &Value, indent: usize, inline: bool) {
    let margin = |yaml: &mut String, first: bool| {
        if !(first && inline) {
            yaml.extend(std::iter::repeat_n(' ', indent));
        }
    };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (index, (key, value)) in fields.iter().enumerate() {
                margin(yaml, index == 0);
                yaml.push_str(&scalar(key));
                yaml.push(':');
                match value {
                    Value::Object(fields) if !fields.is_empty() => {
                        yaml.push('\n');
                        write(yaml, value, indent + 2, false);
                    }
                    Value::Array(items) if !items.is_empty() => {
                        yaml.push('\n');
                        write(yaml, value, indent, false);
                    }
                    _ => {
                        yaml.push(' ');
                        write(yaml, value, indent + 2, true);
                    }
                }
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                margin(yaml, index == 0);
                yaml.push_str("- ");
                write(yaml, item, indent + 2, true);
            }
        }
        leaf => {
            margin(yaml, true);
            match leaf {
                Value::String(text) if is_block(text) => block(yaml, text, indent),
                Value::String(text) => yaml.push_str(&scalar(text)),
                // Empty collections, numbers, booleans and null are the same in JSON and in YAML.
                other => yaml.push_str(&other.to_string()),
            }
            yaml.push('\n');
        }
    }
}

/// Whether a text of several lines can be written as it is: a file in a ConfigMap, mostly.
fn is_block(text: &str) -> bool {
    let lines = text.strip_suffix('\n').unwrap_or(text);
    lines.contains('\n')
        && !lines.starts_with([' ', '\n'])
        && !lines.ends_with('\n')
        && lines.chars().all(|c| c == '\n' || !needs_escape(c) && c != '\t')
}

fn block(yaml: &mut String, text: &str, indent: usize) {
    yaml.push_str(if text.ends_with('\n') { "|" } else { "|-" });
    for line in text.lines() {
        yaml.push('\n');
        if !line.is_empty() {
            yaml.extend(std::iter::repeat_n(' ', indent));
            yaml.push_str(line);
        }
    }
}

/// A string: as it is if no version of YAML could take it for something else, or else as JSON has it, which YAML reads too.
fn scalar(text: &str) -> String {
    // YAML 1.1's booleans and nulls, which kubectl knows.
    const WORDS: [&str; 9] = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
        && !WORDS.iter().any(|word| text.eq_ignore_ascii_case(word));
    if plain {
        return text.to_owned();
    }
    let mut quoted = String::new();
    for c in Value::from(text).to_string().chars() {
        match needs_escape(c) {
            true => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => quoted.push(c),
        }
    }
    quoted
}

/// What JSON lets stand in a string and YAML does not (YAML 1.2, section 5.1), or breaks a line in one of its versions.
fn needs_escape(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}')
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn injected(yaml: &str) -> Result<Manifests, ManifestError> {
        inject_manifests(yaml, &Settings::new("registry.example/vsock-sidecar:1").unwrap())
    }

    const POD: &str = "kind: Pod\nmetadata: {name: vm, labels: {vsock-sidecar.io/inject: \"true\"}, annotations: \
        {vsock-sidecar.io/config: web}}\nspec: {containers: [{name: qemu, image: qemu}]}\n";

    #[test]
    fn what_is_written_is_what_was_read() {
        let values = [
            "",
            "a",
            "y",
            "No",
            "ON",
            "true",
            "null",
            "~",
            "1",
            "1e3",
            "0x1f",
            "0644",
            "1_000",
            "12:30:45",
            "2026-01-01",
            "-",
            "- a",
            "a: b",
            "a #b",
            "#",
            "&a",
            "*a",
            "!t",
            "%",
            "@",
            "`",
            "'",
            "\"",
            "\\",
            "{",
            "[",
            "a\nb",
            "a\nb\n",
            "\na\n",
            " a\nb",
            "a\n\n  b\n",
            "a\nb\n\n",
            "a\tb\nc",
            "\u{7f}\u{85}",
            "\u{2028}",
            "\u{feff}",
            "é東😀",
            "/run/x",
            "a:b",
            "=",
            "<<",
            ".inf",
        ];
        for value in values {
            let document = json!({"kind": "ConfigMap", value: {"list": [[value, {}], {"k": value}, []], "n": [1, -2.5, true, null]}});
            let mut yaml = String::new();
            write(&mut yaml, &document, 0, false);
            let again: Value =
                serde_saphyr::from_str(&yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
            assert_eq!(again, document, "{value:?}\n{yaml}");
        }
    }

    #[test]
    fn pods_and_templates_are_injected_and_the_rest_is_passed_on() {
        let template = "template: {metadata: {labels: {vsock-sidecar.io/inject: \"true\"}, annotations: {vsock-sidecar.io/config: \
            web}}, spec: {containers: [{name: qemu}]}}";
        let yaml = format!(
            "{POD}---\nkind: Deployment\nspec: {{{template}}}\n---\nkind: CronJob\nspec: {{jobTemplate: {{spec: {{{template}}}}}}}\n\
             ---\n# nothing\n---\nkind: ConfigMap\ndata: {{config.yaml: \"guests:\\n  - a\\n\"}}\n---\nkind: List\nitems: [{{kind: Job, spec: {{{template}}}}}]\n"
        );
        let manifests = injected(&yaml).unwrap();
        assert_eq!(
            manifests.yaml.matches("name: vsock-sidecar\n").count(),
            4,
            "{}",
            manifests.yaml
        );
        assert_eq!(manifests.yaml.matches("---\n").count(), 4);
        assert!(
            manifests
                .yaml
                .contains("  config.yaml: |\n    guests:\n      - a\n"),
            "{}",
            manifests.yaml
        );
        let again = injected(&manifests.yaml).unwrap();
        assert_eq!(again.yaml, manifests.yaml);
        assert_eq!(again.notes.len(), 4, "{:?}", again.notes);
    }

    /// `0644` is what people write for a mode, and 420 is what kubectl makes of it.
    #[test]
    fn octal_numbers_are_those_of_kubectl() {
        let yaml = POD.replace(
            "spec: {",
            "spec: {volumes: [{name: v, configMap: {name: c, defaultMode: 0644}}], ",
        );
        let manifests = injected(&yaml).unwrap();
        assert!(
            manifests.yaml.contains("defaultMode: 420\n"),
            "{}",
            manifests.yaml
        );
    }

    #[test]
    fn what_cannot_be_injected_is_named() {
        let no_config = POD.replace("vsock-sidecar.io/config", "other");
        for (yaml, word) in [
            (no_config.as_str(), "Pod vm: the pod asks for"),
            ("kind: Pod\nspec: {containers: [{name: a}]}", "no pod here asks"),
            ("", "no pod here asks"),
            ("a: [", "line 1"),
            ("a: 1\na: 2", "duplicate"),
        ] {
            let error = injected(yaml).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
